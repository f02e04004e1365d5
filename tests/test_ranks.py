"""Several processes do together what one does alone."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import REPOSITORY, TINY_RUN

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def start_two_ranks(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, str(REPOSITORY / "train.py"), *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def find_ranks(process: subprocess.Popen) -> list[int]:
    """Return the process numbers of the ranks, in their order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(number) for number in children.split()]


def wait_for(path: str, process: subprocess.Popen) -> None:
    while not Path(path).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize(("aggregator", "grad_accum"), [("sum", 2), ("dag", 4)])
def test_two_ranks_equal_one(corpus, call, aggregator, grad_accum):
    """The same weights and log, although of 64 experts most get no token on a rank."""
    settings = [*TINY_RUN, f"--aggregator={aggregator}", "--n_expert=64", "--batch_size=1"]
    settings += ["--learning_rate=1e-3", "--max_steps=10", "--eval_interval=5"]
    settings += [f"--grad_accum={grad_accum}", "--balance_coef=1"]
    process = start_two_ranks(*settings, "--out_dir=out/two")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count("step     10: validation loss") == 1, "only rank 0 speaks"
    assert out.count("--- sample") == 2
    assert call(train, *settings, "--out_dir=out/one")[0] == 0
    one = load("out/one/ckpt.pt")
    two = load("out/two/ckpt.pt")
    for name, weight in one["model"].items():
        assert (weight - two["model"][name]).abs().max() <= 1e-5, name
    for row_of_one, row_of_two in zip(one["log"], two["log"], strict=True):
        for column in set(row_of_one) - {"balance_loss", "tokens_per_s"}:
            # The balance loss is a mean over batches, which ranks evaluate in other portions.
            same = pytest.approx(row_of_two[column] or 0.0, rel=1e-4)
            assert (row_of_one[column] or 0.0) == same, column


def test_a_stop_of_one_rank_stops_all_after_the_same_step(corpus):
    """A signal that only the second rank gets is shared; the checkpoint is whole."""
    settings = ["--max_steps=100000", "--eval_interval=100000", "--grad_accum=2"]
    process = start_two_ranks(*TINY_RUN, *settings)
    wait_for("out/tiny/ckpt.pt", process)
    os.kill(find_ranks(process)[-1], signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    step = re.search(r"stopped at step (\d+); go on with --resume", out)[1]
    assert load("out/tiny/ckpt.pt")["step"] == int(step)


def test_after_the_death_of_a_rank_one_process_can_go_on(corpus, call):
    """A killed rank ends the job, and the last checkpoint is good."""
    settings = ["--max_steps=100000", "--eval_interval=20", "--grad_accum=2"]
    process = start_two_ranks(*TINY_RUN, *settings)
    wait_for("out/tiny/best.pt", process)
    os.kill(find_ranks(process)[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGKILL" in error
    step = load("out/tiny/ckpt.pt")["step"]
    assert call(train, "--resume", "--out_dir=out/tiny", f"--max_steps={step + 2}")[0] == 0


def test_a_mistake_is_told_in_a_line(corpus):
    """The number of micro-steps must be a multiple of the number of ranks."""
    process = start_two_ranks(*TINY_RUN, "--grad_accum=3")
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "\nerror: grad_accum=3 is not a multiple of 2 processes\n" in "\n" + error
