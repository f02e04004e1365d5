"""Several processes do together what one does alone."""

import os
import signal
import time
from pathlib import Path

import pytest

import train
from tests.helpers import REPOSITORY, TINY_RUN, assert_refused, load, start

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TWO_PROCESSES = [*TORCHRUN, str(REPOSITORY / "train.py"), *TINY_RUN]


def test_two_processes_equal_one(corpus):
    """Two processes with two micro-batches each take the same steps as one process with four."""
    # Of 64 experts most get no token in a process.
    settings = ["--n_expert=64", "--batch_size=1", "--grad_accum=4", "--learning_rate=1e-3"]
    settings += ["--max_steps=10", "--eval_interval=5", "--balance_coef=1"]
    process = start(*TWO_PROCESSES, *settings, "--out_dir=out/two")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count("step     10: validation loss") == 1, "only process 0 prints"
    train.main([*TINY_RUN, *settings, "--out_dir=out/one"])
    one = load("out/one/ckpt.pt")
    two = load("out/two/ckpt.pt")
    for name, weight in one["model"].items():
        assert (weight - two["model"][name]).abs().max() <= 1e-5, name
    for row, other in zip(one["log"][1:], two["log"][1:], strict=True):
        for column in set(row) - {"tokens_per_s"}:
            assert row[column] == pytest.approx(other[column], rel=1e-4), column


def test_one_process_can_resume_after_another_has_died(corpus):
    """If a process is killed, torchrun ends the others, and the last checkpoint is good."""
    process = start(*TWO_PROCESSES, "--max_steps=100000", "--eval_interval=20", "--grad_accum=2")
    while not Path("out/tiny/ckpt.pt").exists() or load()["step"] == 0:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    step = load()["step"]
    train.main(["--resume=out/tiny", f"--max_steps={step + 2}"])
    assert load()["step"] == step + 2


def test_micro_batches_are_dealt_out_evenly(corpus, monkeypatch):
    """grad_accum must be a multiple of the number of processes."""
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    message = "grad_accum must be a multiple of the 2 processes"
    assert_refused(train.main, [*TINY_RUN, "--grad_accum=3"], message)
