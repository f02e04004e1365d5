"""lab/results/: the tables of the reports are what their CSV files say."""

import csv
import re
from statistics import fmean, median

import pytest

from lab import compare, shared, trees
from tests.conftest import REPOSITORY

RESULTS = REPOSITORY / "lab/results"
INTERVAL = r"[+-]\d\.\d{4} \([+-]\d\.\d{4} to [+-]\d\.\d{4}\)"


def read_rows(name: str, columns: int) -> list[list[str]]:
    """Return the cells of a report's table that has so many columns; minus signs are hyphens."""
    text = (RESULTS / name).read_text(encoding="utf-8").replace("−", "-")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


def numbers(cells: list[str]) -> list[float]:
    """Return all numbers in the cells."""
    return [float(word) for cell in cells for word in cell.split()]


def test_text_has_its_losses(call):
    """Losses and differences of twenty seeds to both arms, and of up to five seeds."""
    text = RESULTS / "text.csv"
    more = RESULTS / "text_seeds.csv"
    few = call(compare, "table", text)[1]
    many = call(compare, "table", text, more)[1]
    many += call(compare, "table", text, more, "--against=shared")[1]
    for columns, out in ((9, few), (6, many)):
        rows = read_rows("text.md", columns)
        assert len(rows) == (7 if columns == 9 else 3)
        for row in rows:
            for number in re.findall(rf"{INTERVAL}|^1\.2\d{{3}}$", "\n".join(row), re.MULTILINE):
                assert number in out


@pytest.mark.parametrize(
    ("columns", "arms", "against", "seeds"), [(11, 9, "sum", 5), (8, 11, "dag2_silu", 1)]
)
def test_trees_have_their_accuracies(columns, arms, against, seeds):
    """All trials less those of sum come first, then those of seed 1 less those of dag2_silu."""
    trials = trees.read_trials()
    groups = trees.group_trials(trials, 3, 12_000)

    def accuracies(arm: str) -> dict:
        by_key = trees.accuracies(groups[arm, trees.best_rate(arm, trials)])
        return {(draw, seed): by_key[draw, seed] for draw, seed in by_key if seed <= seeds}

    rows = read_rows("trees.md", columns)
    assert len(rows) == arms
    for name, parameters, multiply_adds, rate, *cells in rows:
        arm = name.split("`")[1]
        assert float(rate) == trees.best_rate(arm, trials)
        trial = groups[arm, float(rate)][0]
        assert [parameters, multiply_adds] == [f"{trial.parameters:,}", f"{trial.multiply_adds:,}"]
        ours = accuracies(arm)
        gaps = shared.paired_differences(ours, accuracies(against))
        over_draws = shared.half_width(trees.means_by_draw(gaps))
        draws = cells.pop(2 if seeds > 1 else 1)
        assert numbers([draws]) == pytest.approx(trees.means_by_draw(ours), abs=5.1e-3), arm
        expected = [fmean(ours.values()), fmean(gaps.values()), over_draws]
        if seeds > 1:
            cells.pop()  # the seconds
            expected.insert(1, shared.half_width(list(ours.values())))
            expected.insert(3, shared.half_width(list(gaps.values())))
        expected = expected[: len(numbers(cells))] if arm == against else expected
        assert numbers(cells) == pytest.approx(expected, abs=5.1e-4), arm


def test_hello_world_has_its_losses():
    """Means of five seeds, less those of sum."""
    losses = {}
    for row in csv.DictReader((RESULTS / "hello_world.csv").read_text().splitlines()):
        losses.setdefault(row["arm"], {})[row["seed"]] = float(row["val_loss"])
    arms = {"sum": "sum", "shared": "shared", "L = 1": "dag1", "L = 2": "dag2"}
    for name, _, _, loss, difference in read_rows("text.md", 5)[-4:]:
        arm = next(arms[word] for word in arms if word in name.split(", the ")[0])
        assert float(loss) == pytest.approx(fmean(losses[arm].values()), abs=6e-5)
        gaps = list(shared.paired_differences(losses[arm], losses["sum"]).values())
        low = fmean(gaps) - shared.half_width(gaps)
        high = fmean(gaps) + shared.half_width(gaps)
        expected = f"{fmean(gaps):+.4f} ({low:+.4f} to {high:+.4f})"
        assert difference == ("" if arm == "sum" else expected)


def test_gpu_has_its_speeds():
    """They are medians of all stretches but the first, in which torch compiles."""
    speeds = {}
    for row in csv.DictReader((RESULTS / "gpu.csv").read_text().splitlines()):
        speeds.setdefault(row["run"], []).append(float(row["tokens_per_s"]))
    expected = [f"{median(values[2:]) / 1e3:.0f},000" for values in speeds.values()]
    text = (RESULTS / "gpu.md").read_text(encoding="utf-8")
    assert re.findall(r"\| ([\d,]+) \([\d,]+ to [\d,]+\) \|", text) == expected
