"""A run that was stopped or killed goes on, and ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare
import train
from tests.conftest import REPOSITORY, TINY_RUN

RESUMED = ["--resume", "--out_dir=out/tiny"]
KILLED = """
import os, torch, train
save = torch.save
saves = []
def save_or_die(contents, file):
    saves.append(contents["step"])
    if len(saves) == {number}:
        file.write(b"half of a checkpoint")
        file.flush()
        os.kill(os.getpid(), 9)
    save(contents, file)
torch.save = save_or_die
train.main()
"""
SIGNALLED = """
import os, signal, train
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # which nohup and & let pytest ignore
get_batch = train.get_batch
def get_batch_and_signals(*arguments):
    if arguments[4] == {step}:
        for name in {names}:
            os.kill(os.getpid(), getattr(signal, name))
    return get_batch(*arguments)
train.get_batch = get_batch_and_signals
train.main()
"""


def load(path: str = "out/tiny/ckpt.pt") -> dict:
    return torch.load(path, weights_only=True)


def start(*arguments: str) -> subprocess.Popen:
    """Start a Python process that can import train.py, and keep what it prints."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def assert_same_end(call) -> None:
    """Compare weights, moments of AdamW, and log with those of an undisturbed run: bit for bit."""
    assert call(train, *TINY_RUN, "--out_dir=out/whole")[0] == 0
    contents = []
    for name in ("tiny", "whole"):
        checkpoint = load(f"out/{name}/ckpt.pt")
        for row in checkpoint["log"]:
            del row["tokens_per_s"]
        contents.append([checkpoint[key] for key in ("step", "model", "optimizer", "log")])
    torch.testing.assert_close(*contents, rtol=0, atol=0)


@pytest.fixture
def begun(corpus, call) -> Path:
    """The checkpoint of a run that has made one step."""
    assert call(train, *TINY_RUN, "--max_steps=1")[0] == 0
    return Path("out/tiny/ckpt.pt")


@pytest.mark.parametrize(("name", "step"), [("SIGINT", 1), ("SIGHUP", 3), ("SIGTERM", 4)])
def test_a_stopped_run_ends_as_an_undisturbed_one(corpus, call, name, step):
    """A signal lets a step end, also where an evaluation follows, and nothing is forgotten."""
    process = start("-c", SIGNALLED.format(step=step, names=[name]), *TINY_RUN)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert error.count("finishing this step, then saving; once more to end at once") == 1
    assert f"stopped at step {step}; go on with --resume --out_dir=out/tiny\n" in out
    assert load()["step"] == step
    assert call(train, *RESUMED)[0] == 0
    assert_same_end(call)


@pytest.mark.parametrize("number", [2, 3, 4], ids=["in best.pt", "in ckpt.pt", "in a later one"])
def test_a_run_killed_while_it_saves_goes_on(corpus, call, number):
    """kill -9 with half a file on the disk: the result is that of an undisturbed run."""
    process = start("-c", KILLED.format(number=number), *TINY_RUN)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert call(train, *RESUMED)[0] == 0
    assert_same_end(call)


def test_a_finished_run_can_go_on_longer(begun, call):
    """A larger --max_steps adds steps, and other rates may be given."""
    assert call(train, *RESUMED, "--max_steps=9", "--learning_rate=9e-5", "--min_lr=0")[0] == 0
    assert [row["step"] for row in load()["log"]] == [0, 1, 3, 6, 9]


def test_a_second_signal_ends_a_process_at_once(corpus):
    """It dies of it, without saving."""
    code = SIGNALLED.format(step=2, names=["SIGTERM", "SIGTERM"])
    process = start("-c", code, *TINY_RUN)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert load()["step"] == 1


def test_a_run_cannot_become_another_one(begun, refused):
    """What decides its course must stay, and the line says what it was."""
    for change in ("seed=1", "dataset=other", "batch_size=2", "grad_accum=2", "aggregator=sum"):
        key = change.split("=")[0]
        refused(f"out/tiny was begun with {key}=", train, *RESUMED, f"--{change}")


def test_a_run_is_neither_overwritten_nor_resumed_on_other_data(begun, refused):
    """The same command again is refused, and so is --resume when there is more text."""
    refused("out/tiny exists: --resume it, or choose another --out_dir", train, *TINY_RUN)
    Path("text/new.txt").write_text("another document")
    prepare.main(["text", "--name=tiny", "--encoding=bytes"])
    refused("tiny has changed since out/tiny was saved", train, *RESUMED, "--max_steps=9")


def test_a_checkpoint_that_is_of_no_use_is_refused_in_one_line(begun, refused):
    """It is named, whether an older version wrote it, or it is cut short, or empty."""
    torch.save(load() | {"version": "0.2.0"}, begun)
    refused("out/tiny/ckpt.pt is of version 0.2.0", train, *RESUMED)
    for size in (-100, 100, 0):
        begun.write_bytes(begun.read_bytes()[:size])
        refused("out/tiny/ckpt.pt is not a checkpoint", train, *RESUMED)


def test_a_failed_save_keeps_the_old_checkpoint(begun, call, monkeypatch):
    """Its temporary file, which carries the number of the process, is removed."""
    before = begun.read_bytes()

    def fail(contents, file):
        assert Path(file.name).suffixes == [".pt", f".{os.getpid()}", ".tmp"]
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        call(train, *RESUMED, "--max_steps=9")
    assert begun.read_bytes() == before
    assert not list(Path("out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("owner", "name", "is_folder"),
    [(torch.nn.utils, "clip_grad_norm_", False), (torch, "save", True)],
    ids=["in the first step", "in the first save"],
)
def test_a_run_that_failed_at_once_can_be_begun_again(
    corpus, call, monkeypatch, owner, name, is_folder
):
    """There is no folder before the first step, and one without ckpt.pt is no obstacle."""

    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(train, *TINY_RUN)
    assert Path("out").exists() == is_folder
    assert call(train, *TINY_RUN)[0] == 0
