"""lab/trees.py: the trees, a short cut through the model, what is chosen, resumed and read off."""

from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F

from lab import graph, trees
from lab.cost import cost
from lab.trees import RATES, Trial
from tests.reference import assert_same, randomize, results_and_gradients


@pytest.fixture(autouse=True)
def small_trials(monkeypatch):
    """Trials are evaluated on few trees, and a test has a file of results of its own."""
    monkeypatch.setattr(trees, "PROBED", 300)
    monkeypatch.setattr(trees, "POINTS", 4)
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))


def draw_trees(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return trees.draw_trees(trees.make_tables(3, draw=1), count, generator)


def test_trees_are_what_their_tables_say():
    """Inner nodes look their two children up, and a table has all values equally often."""
    tokens, levels = draw_trees(50)
    assert torch.equal(tokens[:, :8], levels[0] + 6 * torch.arange(8))
    assert (tokens[:, 8] == 48).all()  # "="
    for n, tables in enumerate(trees.make_tables(3, draw=1)):
        assert (tables.flatten(1).sort().values == torch.arange(36) // 6).all()
        for tree in range(50):
            children = levels[n][tree].view(-1, 2)
            for i, (left, right) in enumerate(children):
                assert levels[n + 1][tree, i] == tables[i, left, right]


@pytest.mark.parametrize("arm", ["sum", "series", "dag2_silu", "coe", "dense"])
def test_short_cut_is_gpt_forward(arm):
    """Logits at "=" and every gradient are equal (float64, 1e-6: positions are float32)."""
    model = randomize(trees.make_model(Trial(arm))).double()
    tokens, _ = draw_trees(40)
    ours = results_and_gradients(lambda: trees.answer(model, tokens)[0], {}, model)
    theirs = results_and_gradients(lambda: model(tokens).logits[:, -1], {}, model)
    assert_same(ours, theirs, 1e-6)


@pytest.mark.parametrize("arm", ["sum", "shared", "series"])
def test_arms_are_fair(arm):
    """They have dag2's parameters, with _compute its multiply-adds, within 2 % of its MoE's."""
    dag = cost(trees.make_model(Trial("dag2_silu")))
    same = cost(trees.make_model(Trial(arm)))
    wider = cost(trees.make_model(Trial(f"{arm}_compute")))
    assert same["parameters"] == pytest.approx(dag["parameters"], abs=0.02 * 31_424)
    assert wider["multiply_adds"] == pytest.approx(dag["multiply_adds"], abs=0.02 * 37_376)


def test_one_table_is_learned():
    """Chance would be 0.17."""
    trial, _, _ = trees.train_trial(Trial("sum", depth=1, steps=250, rate=6e-3))
    assert trial.accuracy > 0.9


def test_trials_are_added_and_not_repeated():
    """A row of the file is what training returns, each time."""
    trials = [Trial(arm, steps=20) for arm in ("sum", "dag2_silu")]
    trees.run_missing(trials[:1])
    trees.run_missing(trials)
    rows = trees.read_trials()
    assert [row.arm for row in rows] == ["sum", "dag2_silu"]
    again = trees.train_trial(trials[1])[0]
    assert again._replace(seconds=rows[1].seconds) == rows[1]
    assert rows[1].parameters == 31_424
    assert rows[1].multiply_adds == 37_376


def test_the_best_rate_is_chosen_on_other_tables(monkeypatch):
    """Two trials a rate on draw 0, and three more of the better two; all else has the best."""

    def make_up(trial: Trial) -> tuple:
        lucky = 0.9 if trial.seed == 1 else 0.5  # 0.7 in two trials, 0.58 in five
        accuracy = {RATES[1]: 0.6, RATES[2]: lucky}.get(trial.rate, 0.1)
        return trial._replace(accuracy=accuracy, curve="0 0 0 0"), None, None

    monkeypatch.setattr(trees, "train_trial", make_up)
    trees.run_arm("sum")
    rows = trees.read_trials()
    assert {row.rate for row in rows if row.draw > 0} == {RATES[1]}
    assert [row.draw for row in rows].count(0) == 14


def test_table_and_picture(monkeypatch, call):
    """Means, intervals over trials and draws, gaps in pairs, the fastest trial's seconds."""
    of_sum = Trial("sum", parameters=7, multiply_adds=9, accuracy=0.1, curve="0 0 0 1")
    dag = of_sum._replace(arm="dag2_silu", seconds=7.0, probe="0.1 0.2|0.4 0.5|1 1")
    rows = [of_sum._replace(draw=0), dag._replace(draw=0)]  # which choose the rate
    rows.append(of_sum._replace(seed=3, accuracy=0.3))  # has no partner
    rows.append(dag._replace(steps=40_000, seconds=13.4))  # 4.02 in 12,000
    for draw, seed, accuracy in ((1, 1, 0.9), (1, 2, 1.0), (2, 1, 0.5)):
        rows.append(of_sum._replace(draw=draw, seed=seed, accuracy=0.1 * seed))
        rows.append(dag._replace(draw=draw, seed=seed, accuracy=accuracy))
    monkeypatch.setattr(trees, "read_trials", lambda: rows)
    out = call(trees, "--plot=a.png")[1]
    assert [" ".join(line.split()) for line in out.splitlines()[1:5]] == [
        "depth 3, 12,000 steps",
        "sum 7 9 0.0015 0 4 0.175 ± 0.152 +0.000 ± 0.000 ± 0.000 0 0.2 0.1",
        "dag2_silu 7 9 0.0015 4 3 0.800 ± 0.657 +0.667 ± 0.574 ± 2.541 3 0.95 0.5",
        "leaves, nodes by depth; by level: [0.1, 0.2] [0.4, 0.5] [1.0, 1.0]",
    ]
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_read_off(monkeypatch):
    """Values in the nodes, coded by expert, are read; what is not there is guessed."""
    generator = torch.Generator().manual_seed(0)
    tokens, levels = draw_trees(3000)
    empty = torch.randn(3000 * 9, 2, 24, generator=generator)
    full = torch.zeros(3000 * 9, 2, 24)
    expert = torch.rand(3000 * 9, 8, generator=generator).argsort(dim=1)[:, :2]
    codes = (levels[1] + expert[8::9, 1:]) % 6
    full[8::9, 1] = F.one_hot(codes, 6).flatten(1).float()
    first = Namespace(before=empty, after=empty, expert=expert)
    second = Namespace(before=empty, after=full, expert=expert)
    monkeypatch.setattr(graph, "observe", lambda model, tokens: [[first, second]])
    rows = graph.read_off(Namespace(config=Namespace(n_expert=8)), tokens, levels, 6)
    shares = [graph.shares_right(row, levels[1:]) for row in rows]
    assert 0.5 < shares[0][0] < 0.7
    for row in shares[1:3]:
        assert row == pytest.approx([1 / 6] * 3, abs=0.06)
    assert shares[3][0] == 1.0
    assert shares[3][2] < 0.5
