"""A small corpus in a folder of its own, and a way to run a script's main() as a user would."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

import prepare
import train

os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # references are in float32, a GPU takes bfloat16
torch.set_num_threads(1)  # several tests run at once
BAR = re.compile("(B|step|run|it|tokens)/s")  # a progress bar
REPOSITORY = Path(train.__file__).parent
TINY_RUN = (
    "--dataset=tiny", "--out_dir=out/tiny", "--device=cpu", "--block_size=16", "--n_layer=2", "--n_head=2",
    "--n_kv_head=1", "--n_embd=16", "--n_expert=4", "--top_k=2", "--expert_dim=8", "--dag_dim=4", "--batch_size=4",
    "--max_steps=6", "--eval_interval=3", "--eval_tokens=64", "--warmup_steps=2", "--learning_rate=0.01",
)  # fmt: skip


def make_corpus(folder, documents: int = 120) -> list[str]:
    """Write distinct .txt documents, with characters of one to four bytes; returns their texts."""
    folder.mkdir()
    texts = [f"Document {i}: naïve café, 日本 😀.\n" + f"Line {i * 7919} of text.\n" * 3 for i in range(documents)]
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return texts


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """Every test runs in an empty folder, so that data/ and out/ are its own; signal handlers stay pytest's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)
    return tmp_path


@pytest.fixture
def corpus(workdir):
    """A prepared dataset `tiny` of bytes, made from the folder `text`; returns the documents."""
    texts = make_corpus(workdir / "text")
    prepare.prepare(["text"], name="tiny", encoding="bytes")
    return texts


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *arguments) runs module.main() and returns (exit status, stdout, stderr)."""

    def call(module, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        status = 0
        try:
            prepare.run(module.main)
        except SystemExit as exit:
            status = exit.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(call):
    """refused(message, module, *arguments) checks: status 2, one line on stderr that contains the message."""

    def refused(message, module, *arguments):
        status, _, error = call(module, *arguments)
        lines = [line for line in re.split("[\r\n]", error) if line.strip() and not BAR.search(line)]
        assert (status, len(lines)) == (2, 1) and lines[0].startswith("error: ") and message in lines[0], error

    return refused


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The checkpoint of a tiny trained model, as bytes."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_corpus(folder / "text")
        prepare.prepare(["text"], name="tiny", encoding="bytes")
        patch.setattr(sys, "argv", ["train.py", *TINY_RUN])
        patch.setattr(train.signal, "signal", lambda *_: None)
        train.main()
    return (folder / "out/tiny/best.pt").read_bytes()
