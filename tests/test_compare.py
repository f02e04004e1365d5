"""lab/compare.py: sweeps stop, go on and refuse what differs, tables are right."""

import csv
import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from lab import compare
from lab.shared import read_rows
from tests.conftest import REPOSITORY, TINY_RUN

RESULTS = REPOSITORY / "lab/results"
TINY_ARM = [word for word in TINY_RUN if "out_dir" not in word]
SWEEP = ["sweep", REPOSITORY / "lab/configs/ablation", "--seeds=1", *TINY_ARM, "--arms"]


def write_rows(path: str, rows: list[compare.Evaluation]) -> None:
    """Write a file as `table --csv` does."""
    with open(path, "w") as file:
        csv.writer(file).writerows([compare.Evaluation._fields, *rows])


def test_table_has_the_published_figures(call):
    """Rows are what earlier versions printed, and the CSV file is written as it was read."""
    text = RESULTS / "text.csv"
    out = call(compare, "table", text, "--csv=b.csv")[1]
    assert "1.2406  -0.0024 (-0.0178 to +0.0129)     1.4003     3,623  0.57" in out
    assert Path("b.csv").read_bytes() == text.read_bytes()
    more = RESULTS / "text_seeds.csv"
    assert "+0.0016 (-0.0038 to +0.0070)" in call(compare, "table", text, more)[1]
    assert call(compare, "plot", text, "c.png")[0] == 0
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_counts_once_and_when_finished(call, refused):
    """Runs without an end are left out with a word, runs given twice are refused."""
    text = RESULTS / "text.csv"
    write_rows("a.csv", read_rows(text, compare.Evaluation)[:-1])
    assert "left out: sum-5, because" in call(compare, "table", "a.csv")[1]
    refused("dag1_sigmoid-1 is there twice", compare, "table", text, "a.csv")
    refused("a.csv must be a .png file", compare, "plot", text, "a.csv")


OF_ALL = ("data", "evaluated_on", "eval_tokens", "tokens", "training")
OF_AN_ARM = ("model", "learning_rate", "min_lr", "init_from")


@pytest.mark.parametrize("column", OF_ALL + OF_AN_ARM)
def test_runs_that_differ_are_not_compared(column, refused):
    """The column that differs is named."""
    rows = read_rows(RESULTS / "text.csv", compare.Evaluation)
    rows[0] = rows[0]._replace(**{column: "7"})
    write_rows("a.csv", rows)
    refused(f"they differ in {column} (", compare, "table", "a.csv")


def test_rows_are_read_from_runs(corpus, call, refused):
    """Two runs that differ in their schedule's end do not become one arm."""
    for seed, min_lr in ((1, 0.001), (2, 0.001), (3, 0.002)):
        settings = [*TINY_ARM, f"--out_dir=out/runs/sum-{seed}", "--aggregator=sum"]
        assert call(train, *settings, f"--seed={seed}", f"--min_lr={min_lr}")[0] == 0
    first, second, third = (compare.read_run(path) for path in sorted(Path("out/runs").iterdir()))
    log = train.load_checkpoint(Path("out/runs/sum-2/ckpt.pt"))["log"]
    assert [row.val_loss for row in second] == [row["val_loss"] for row in log]
    assert [row.at_token for row in second] == [0, 192, 384]
    for name in OF_ALL + OF_AN_ARM:
        assert getattr(first[0], name) == getattr(second[0], name)
        is_same = getattr(first[0], name) == getattr(third[0], name)
        assert is_same == (name != "min_lr")
    refused("they differ in min_lr (", compare, "table", "out/runs")


def start_sweep(monkeypatch, *words: str) -> subprocess.Popen:
    """Start a sweep in a process of its own, and wait for the first step of mlp-1."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    command = [sys.executable, "-m", "lab.compare", *SWEEP, "mlp", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not Path("out/ablation/mlp-1/ckpt.pt").exists():
        time.sleep(0.05)
    return process


def test_a_sweep_goes_on_where_it_was_stopped(corpus, call, refused, monkeypatch):
    """Two quick signals stop its trainings. Later it finishes, or refuses another model."""
    settings = ["--max_steps=400", "--eval_interval=200", "--top_k=3", "--rope_theta=5000"]
    process = start_sweep(monkeypatch, *settings)
    process.send_signal(signal.SIGTERM)  # SIGINT is ignored by jobs in the background
    time.sleep(0.1)  # else the two would be one
    process.send_signal(signal.SIGTERM)
    assert "stopped; the same command goes on" in process.communicate(timeout=60)[0]
    with open("out/ablation/mlp-1.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if a training has it
        refused("mlp-1 is being trained already", compare, *SWEEP, "mlp", *settings)
    # coe shares top_k out between two rounds, and 3 is odd.
    assert "failed: out/ablation/coe-1;" in call(compare, *SWEEP, "mlp", "coe", *settings)[2]
    assert "1 runs, 1 of them finished already" in call(compare, *SWEEP, "mlp", *settings)[1]
    refused("was begun with rope_theta=5000.0, not 10", compare, *SWEEP, "mlp", *settings[:3])


def test_a_killed_sweep_leaves_no_second_writer(corpus, refused, monkeypatch):
    """Its training lives on, and is waited for."""
    process = start_sweep(monkeypatch, "--max_steps=400")
    process.kill()
    process.wait()
    refused("mlp-1 is being trained already", compare, *SWEEP, "mlp", "--max_steps=400")
