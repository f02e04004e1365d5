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


def test_trees_have_their_accuracies():
    """The first table: all trials, less those of sum."""
    trials = trees.read_trials()
    groups = trees.group_trials(trials, 3, 12_000)
    of_sum = trees.accuracies(groups["sum", 1.5e-3])
    rows = read_rows("trees.md", 11)
    assert len(rows) == 9
    for name, parameters, multiply_adds, rate, *cells in rows:
        arm = name.split("`")[1]
        assert float(rate) == trees.best_rate(arm, trials)
        group = groups[arm, float(rate)]
        assert parameters == f"{group[0].parameters:,}"
        assert multiply_adds == f"{group[0].multiply_adds:,}"
        ours = trees.accuracies(group)
        gaps = shared.paired_differences(ours, of_sum)
        expected = [fmean(ours.values()), shared.half_width(list(ours.values()))]
        expected += trees.means_by_draw(ours)
        if arm != "sum":
            expected += [fmean(gaps.values()), shared.half_width(list(gaps.values()))]
            expected.append(shared.half_width(trees.means_by_draw(gaps)))
        assert numbers(cells[:-1]) == pytest.approx(expected, abs=6e-3), arm


def test_trees_of_one_seed_have_their_accuracies():
    """The second table: seed 1, less dag2_silu."""
    trials = trees.read_trials()
    groups = trees.group_trials(trials, 3, 12_000)
    of_dag = trees.accuracies(groups["dag2_silu", 7.5e-4])
    rows = read_rows("trees.md", 8)
    assert len(rows) == 11
    for name, _, _, rate, *cells in rows:
        arm = name.split("`")[1]
        everything = trees.accuracies(groups[arm, trees.best_rate(arm, trials)])
        ours = {key: value for key, value in everything.items() if key[1] == 1}
        gaps = list(shared.paired_differences(ours, of_dag).values())
        expected = [trees.best_rate(arm, trials), fmean(ours.values())]
        expected += trees.means_by_draw(ours)
        if arm != "dag2_silu":
            expected += [fmean(gaps), shared.half_width(gaps)]
        assert numbers([rate, *cells]) == pytest.approx(expected, abs=6e-3), arm


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
