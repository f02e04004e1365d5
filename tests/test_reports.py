"""lab/results/: the tables of the reports have what their CSV files say, or what lab/ prints."""

import csv
from statistics import fmean, median

import pytest

from lab import compare, cost, trees
from lab.shared import half_width, paired_differences
from tests.helpers import REPOSITORY
from tests.reference import plain_cost

RESULTS = REPOSITORY / "lab/results"


def read_table(name: str, place: str) -> list[list[str]]:
    """Return the cells of a report's first table after some words; minus signs become hyphens."""
    text = (RESULTS / name).read_text(encoding="utf-8").replace("−", "-")
    table = text[text.index(place) :].partition("\n\n|")[2].partition("\n\n")[0]
    lines = table.splitlines()[2:]  # below the names of the columns
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def read_column(name: str, key: str, column: str) -> dict[str, list[float]]:
    """Return the numbers in a column of a CSV file, by what is in another column."""
    numbers = {}
    for row in csv.DictReader((RESULTS / name).read_text().splitlines()):
        numbers.setdefault(row[key], []).append(float(row[column]))
    return numbers


def write_interval(mean: float, width: float) -> str:
    """Write a mean and its interval as the tables have them."""
    return f"{mean:+.4f} ({mean - width:+.4f} to {mean + width:+.4f})"


@pytest.mark.parametrize(
    ("place", "files", "arms", "against"),
    [
        ("## Twenty seeds", ["text.csv", "text_seeds.csv"], 3, ["sum", "shared"]),
        ("## Seven arms", ["text.csv"], 7, ["sum"]),
        ("## One size larger", ["ablation_s.csv"], 4, ["sum"]),
    ],
)
def test_text(place, files, arms, against):
    """Each row has parameters, multiply-adds, loss, and differences to one arm or to two."""
    runs = compare.collect_runs([RESULTS / file for file in files])
    rows = read_table("text.md", place)
    assert len(rows) == arms
    for name, *cells in rows:
        arm = name.split("`")[1]
        last = runs[arm, 1][-1]
        multiply_adds = f"{last.multiply_adds / runs['sum', 1][-1].multiply_adds:.2f} ×"
        expected = [f"{last.parameters:,}", "1" if arm == "sum" else multiply_adds]
        summaries = [compare.summarize(runs, other)[arm] for other in against]
        expected.append(f"{summaries[0].curve[-1][1]:.4f}")
        for other, summary in zip(against, summaries, strict=True):
            if arm != other:
                difference = write_interval(summary.mean, summary.half_width)
                expected.append(difference.removesuffix(" (+nan to +nan)"))  # of a single seed
        assert [cell for cell in cells if cell in expected] == expected


def test_hello_world():
    """The table has means of five seeds, and their differences to those of sum."""
    names = ("steps", "cpu_seconds", "val_loss")
    steps, seconds, losses = (read_column("hello_world.csv", "arm", name) for name in names)
    rows = read_table("text.md", "## nanoGPT's hello world")
    for arm, (_, *cells) in zip(["sum", "shared", "dag1", "dag2"], rows, strict=True):
        means = [f"{fmean(steps[arm]):,.0f}", f"{fmean(seconds[arm]):.0f}"]
        means.append(f"{fmean(losses[arm]):.4f}")
        gaps = [ours - theirs for ours, theirs in zip(losses[arm], losses["sum"], strict=True)]
        difference = "" if arm == "sum" else write_interval(fmean(gaps), half_width(gaps))
        assert cells == [*means, difference]


@pytest.mark.parametrize(
    ("place", "arms", "against", "seeds"),
    [("## Table", 9, "sum", 5), ("The second table", 11, "dag2_silu", 1)],
)
def test_trees(place, arms, against, seeds):
    """One table has all trials less those of sum, one those of seed 1 less those of dag2_silu."""
    trials = trees.read_trials()
    groups = trees.group_trials([t for t in trials if t.seed <= seeds], depth=3, steps=12_000)
    others = trees.accuracies(groups[against, trees.best_rate(against, trials)])
    rows = read_table("trees.md", place)
    assert len(rows) == arms
    for name, parameters, multiply_adds, rate, *cells in rows:
        arm = name.split("`")[1]
        assert float(rate) == trees.best_rate(arm, trials)
        trial = groups[arm, float(rate)][0]
        assert [parameters, multiply_adds] == [f"{trial.parameters:,}", f"{trial.multiply_adds:,}"]
        ours = trees.accuracies(groups[arm, float(rate)])
        means = trees.means_by_draw(ours)
        result = [fmean(ours.values()), half_width(list(ours.values())), *means]
        gaps = paired_differences(ours, others)
        difference = [fmean(gaps.values()), half_width(list(gaps.values()))]
        difference.append(half_width(trees.means_by_draw(gaps)))
        seconds = [12_000 * trees.best_pace(arm, 3, trials)]
        if seeds == 1:  # that table has neither intervals over trials nor seconds
            del result[1], difference[1], seconds[0]
        if arm == against:
            difference = []
        words = " ".join(cells).split()
        for word, number in zip(words, result + difference + seconds, strict=True):
            decimals = len(word.partition(".")[2])
            assert float(word) == pytest.approx(number, abs=0.51 * 10**-decimals), (arm, word)


def test_gpu_speeds():
    """They are medians of all stretches but the first, in which torch compiles."""
    speeds = read_column("gpu.csv", "run", "tokens_per_s")
    rows = read_table("gpu.md", "## Training, compiled")
    for (_, cell, _), of_run in zip(rows, speeds.values(), strict=True):
        assert cell.split()[0] == f"{median(of_run[2:]) / 1e3:.0f},000"


def test_costs(monkeypatch, capsys):
    """The table is what lab.cost prints of all configs, with what a formula says."""
    monkeypatch.setattr(cost, "count", lambda config: cost.Cost(*plain_cost(config)))
    cost.main(["table", *map(str, REPOSITORY.glob("configs/*.toml"))])
    table = capsys.readouterr().out
    assert "| quickstart | 2 | 128 |" in table
    assert table in (RESULTS / "cost.md").read_text(encoding="utf-8")
