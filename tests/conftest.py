"""A small corpus in a folder of its own, and a way to run a script's main() as a user would."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

import prepare
import train

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # references are in float32
torch.set_num_threads(1)  # several tests run at once

REPOSITORY = Path(train.__file__).parent
NO_MESSAGE = re.compile(r"^\s*$|(B|step|run|it|tokens)/s| left\s*$")  # a bar; \x1b[A moves it up
TINY_RUN = ["--dataset=tiny", "--out_dir=out/tiny", "--device=cpu", "--block_size=16"]
TINY_RUN += ["--n_layer=2", "--n_head=2", "--n_kv_head=1", "--n_embd=16"]
TINY_RUN += ["--n_expert=4", "--top_k=2", "--expert_dim=8", "--dag_dim=4"]
TINY_RUN += ["--batch_size=4", "--max_steps=6", "--eval_interval=3", "--eval_tokens=64"]
TINY_RUN += ["--warmup_steps=2", "--learning_rate=0.01"]


def make_corpus(folder: Path, documents: int = 120) -> list[str]:
    """Write distinct .txt documents with characters of one to four bytes, and return them."""
    folder.mkdir()
    texts = []
    for i in range(documents):
        text = f"Document {i}: naïve café, 日本 😀.\n" + f"Line {i * 7919} of text.\n" * 3
        (folder / f"{i:03}.txt").write_bytes(text.encode())
        texts.append(text)
    return texts


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """Every test runs in an empty folder, and what it does to signals is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)
    return tmp_path


@pytest.fixture
def corpus(workdir) -> list[str]:
    """A prepared dataset `tiny`, in bytes, made from the folder `text`: its documents."""
    texts = make_corpus(workdir / "text")
    prepare.main(["text", "--name=tiny", "--encoding=bytes"])
    return texts


@pytest.fixture
def call(monkeypatch, capfd):
    """call(module, *arguments) runs module.main(): it returns exit status, stdout and stderr."""

    def call(module, *arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            prepare.run(module.main)
        except SystemExit as exit:
            status = exit.code
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def refused(call):
    """refused(message, module, *arguments) checks for status 2 and one line with the message."""

    def refused(message, module, *arguments):
        status, _, error = call(module, *arguments)
        lines = [line for line in re.split("[\r\n]|\x1b.A", error) if not NO_MESSAGE.search(line)]
        assert status == 2, error
        assert len(lines) == 1, error
        assert re.match("error: .*" + re.escape(message), lines[0])

    return refused


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> bytes:
    """The checkpoint best.pt of a tiny trained model."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_corpus(folder / "text")
        prepare.main(["text", "--name=tiny", "--encoding=bytes"])
        patch.setattr(sys, "argv", ["train.py", *TINY_RUN])
        patch.setattr(train.signal, "signal", lambda number, handler: None)
        train.main()
    return (folder / "out/tiny/best.pt").read_bytes()
