"""lab/compare.py: tables are right, and runs that cannot be compared are refused."""

import csv
from pathlib import Path

import pytest

import train
from lab import compare
from lab.shared import read_rows
from tests.helpers import REPOSITORY, TINY_RUN, assert_refused, load

TEXT = REPOSITORY / "lab/results/text.csv"
OF_ALL = ["data", "evaluated_on", "eval_tokens", "tokens", "training"]
OF_AN_ARM = ["model", "learning_rate", "min_lr", "init_from"]


def write_rows(path: str, rows: list[compare.Evaluation]) -> None:
    """Write a file as `table --csv` does."""
    with open(path, "w") as file:
        csv.writer(file).writerows([compare.Evaluation._fields, *rows])


def test_the_published_figures_are_printed(capsys):
    """A table has what version 0.3 printed, --csv writes what was read, and `plot` a picture."""
    compare.main(["table", str(TEXT), "--csv=b.csv"])
    row = "1.2406  -0.0024 (-0.0178 to +0.0129)     1.4003     3,623  0.57\n"
    assert row in capsys.readouterr().out
    assert Path("b.csv").read_bytes() == TEXT.read_bytes()
    compare.main(["plot", str(TEXT), "c.png"])
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_counts_once_and_when_it_is_finished(capsys):
    """A run without its end is left out, which is said, and a run given twice is refused."""
    rows = read_rows(TEXT, compare.Evaluation)[:-1]
    rows[0] = rows[0]._replace(tokens_per_s=0.0)  # before the first step, which counts as unknown
    write_rows("a.csv", rows)
    compare.main(["table", "a.csv"])
    out = capsys.readouterr().out
    assert "left out: sum-5, because" in out
    assert " 4,707 " in out
    assert_refused(compare.main, ["table", TEXT, "a.csv"], "dag1_sigmoid-1 is there twice")
    assert_refused(compare.main, ["plot", TEXT, "a.csv"], "a.csv must be a .png file")


@pytest.mark.parametrize("column", OF_ALL + OF_AN_ARM)
def test_runs_that_differ_are_not_compared(column):
    """The error names the column in which they differ."""
    rows = read_rows(TEXT, compare.Evaluation)
    rows[0] = rows[0]._replace(**{column: "7"})
    write_rows("a.csv", rows)
    assert_refused(compare.main, ["table", "a.csv"], f"they differ in {column} (")


def test_rows_are_read_from_runs(corpus):
    """Runs of an arm may differ in their seed alone, and have it in their names."""
    for seed, x in ((1, 0.001), (2, 0.001), (3, 0.002)):
        settings = ["--aggregator=sum", f"--seed={seed}", f"--min_lr={x}", f"--z_coef={x}"]
        train.main([*TINY_RUN, *settings, f"--out_dir=out/runs/sum-{seed}"])
    first, second, third = (compare.read_run(Path(f"out/runs/sum-{seed}")) for seed in (1, 2, 3))
    log = load("out/runs/sum-2/ckpt.pt")["log"]
    assert [row.val_loss for row in second] == [row["val_loss"] for row in log]
    assert [row.at_token for row in second] == [0, 192, 384]
    for name in OF_ALL + OF_AN_ARM:
        assert getattr(first[0], name) == getattr(second[0], name)
        is_same = getattr(first[0], name) == getattr(third[0], name)
        assert is_same == (name not in ("min_lr", "training"))
    assert_refused(compare.main, ["table", "out/runs"], "they differ in training (")
    Path("out/runs/sum-3").rename("out/runs/sum-4")
    assert_refused(compare.main, ["table", "out/runs"], "sum-4 should be called ARM-3")
