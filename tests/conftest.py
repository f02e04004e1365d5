"""Fixtures: an empty working directory for every test, a small dataset, a trained model."""

import os
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # also for processes we start

import pytest
import torch

import prepare
import train
from tests.helpers import TINY_RUN, make_corpus

torch.set_num_threads(1)  # pytest runs a test per core


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch) -> Path:
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def corpus(workdir) -> list[str]:
    """A dataset called `tiny`, in bytes, and its documents, which lie in the folder `text`."""
    texts = make_corpus("text")
    prepare.main(["text", "--name=tiny", "--encoding=bytes"])
    return texts


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> bytes:
    """The contents of the best.pt of a tiny training run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_corpus("text")
        prepare.main(["text", "--name=tiny", "--encoding=bytes"])
        train.main(TINY_RUN)
    return (folder / "out/tiny/best.pt").read_bytes()
