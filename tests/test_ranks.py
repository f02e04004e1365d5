"""Several processes do together what one does alone."""

import os
import signal
import time
from pathlib import Path

import pytest

import train
from tests.conftest import REPOSITORY, TINY_RUN
from tests.test_resume import RESUMED, load, start

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TWO_RANKS = [*TORCHRUN, str(REPOSITORY / "train.py"), *TINY_RUN]


def signal_second_rank(number: int) -> tuple[int, str, str]:
    """Let a signal reach one rank of a long run: return exit status, stdout and stderr."""
    process = start(*TWO_RANKS, "--max_steps=100000", "--eval_interval=20", "--grad_accum=2")
    while not Path("out/tiny/best.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), number)
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def test_two_ranks_equal_one(corpus, call):
    """The same weights and log, although of 64 experts most get no token on a rank."""
    settings = ["--n_expert=64", "--batch_size=1", "--grad_accum=4", "--learning_rate=1e-3"]
    settings += ["--max_steps=10", "--eval_interval=5", "--balance_coef=1"]
    process = start(*TWO_RANKS, *settings, "--out_dir=out/two")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count("step     10: validation loss") == 1, "only rank 0 speaks"
    assert call(train, *TINY_RUN, *settings, "--out_dir=out/one")[0] == 0
    one = load("out/one/ckpt.pt")
    two = load("out/two/ckpt.pt")
    for name, weight in one["model"].items():
        assert (weight - two["model"][name]).abs().max() <= 1e-5, name
    for row, other in zip(one["log"][1:], two["log"][1:], strict=True):
        # The balance loss is a mean over batches, which ranks evaluate in other portions.
        for column in set(row) - {"balance_loss", "tokens_per_s"}:
            assert row[column] == pytest.approx(other[column], rel=1e-4), column


def test_a_stop_of_one_rank_stops_all_after_the_same_step(corpus):
    """A signal that only the second rank gets is shared; the checkpoint is whole."""
    status, out, error = signal_second_rank(signal.SIGTERM)
    assert status == 0, error
    assert f"stopped at step {load()['step']}; go on with --resume" in out


def test_after_the_death_of_a_rank_one_process_can_go_on(corpus, call):
    """A killed rank ends the job, and the last checkpoint is good."""
    status, _, error = signal_second_rank(signal.SIGKILL)
    assert status != 0
    assert "SIGKILL" in error
    assert call(train, *RESUMED, f"--max_steps={load()['step'] + 2}")[0] == 0


def test_a_mistake_is_told_in_a_line(corpus, refused, monkeypatch):
    """The number of micro-steps must be a multiple of the number of ranks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("grad_accum=3 is not a multiple of 2 processes", train, *TINY_RUN, "--grad_accum=3")
