"""lab/trees.py: the trees, a short cut through the model, what is chosen, resumed and read off."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F

from lab import shared, trees
from lab.cost import count
from lab.trees import RATES, Trial
from tests.conftest import REPOSITORY
from tests.reference import assert_same, randomize, results_and_gradients


@pytest.fixture(autouse=True)
def small_trials(monkeypatch):
    """Trials are evaluated on few trees, and a test has a file of results of its own."""
    monkeypatch.setattr(trees, "PROBED", 300)
    monkeypatch.setattr(trees, "POINTS", 4)
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))
    write_trials([])


def write_trials(trials: list[Trial]) -> None:
    with open("trees.csv", "w") as file:
        csv.writer(file, lineterminator="\n").writerows([Trial._fields, *trials])


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
    dag = count(trees.make_model(Trial("dag2_silu")).config)
    same = count(trees.make_model(Trial(arm)).config)
    wider = count(trees.make_model(Trial(f"{arm}_compute")).config)
    assert same.parameters == pytest.approx(dag.parameters, abs=0.02 * 31_424)
    assert wider.multiply_adds == pytest.approx(dag.multiply_adds, abs=0.02 * 37_376)


def test_one_table_is_learned(monkeypatch):
    """It is tested on trees of its own: with other leaves, whose roots become random, by chance."""
    trial = Trial("sum", depth=1, steps=250, rate=6e-3)
    assert trees.train_trial(trial)[0].accuracy > 0.9
    tokens, (leaves, root) = trees.draw_test_trees(trial)
    others = (tokens, [leaves, root[torch.randperm(300)]])
    monkeypatch.setattr(trees, "draw_test_trees", lambda trial: others)
    assert trees.train_trial(trial)[0].accuracy < 0.4


def test_a_trial_is_a_plain_loop():
    """Its own stream of trees, warm-up, router losses and clipping give the same weights."""
    trial = Trial("dag2_silu", draw=2, seed=3, steps=4, rate=0.5)
    model = trees.make_model(trial)
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    others = [weight for weight in model.parameters() if weight.dim() > 1]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(2003)
    for step in range(4):
        tokens, levels = trees.draw_trees(trees.make_tables(3, draw=2), 256, generator)
        logits, aux = trees.answer(model, tokens)
        loss = F.cross_entropy(logits, levels[-1][:, 0]) + aux @ torch.tensor([0.01, 0.001])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            weight.grad = gradient / max(1.0, norm.item())
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * (step + 1) / 200
        optimizer.step()
    ours = dict(trees.train_trial(trial)[1].named_parameters())
    assert_same(ours, dict(model.named_parameters()), 1e-4)


def test_trials_are_added_and_not_repeated():
    """A row of the file is what training returns, each time."""
    trials = [Trial(arm, steps=20) for arm in ("sum", "dag2_silu")]
    trees.run_missing(trials[:1])
    trees.run_missing(trials)
    rows = trees.read_trials()
    assert [row.arm for row in rows] == ["sum", "dag2_silu"]
    again, _ = trees.train_trial(trials[1])
    assert again._replace(seconds=rows[1].seconds) == rows[1]
    assert (again.parameters, again.multiply_adds) == (31_424, 37_376)


def test_the_best_rate_is_chosen_on_other_tables(monkeypatch):
    """Two trials a rate on draw 0, and three more of the better two; all else has the best."""

    def make_up(trial: Trial) -> tuple:
        lucky = 0.9 if trial.seed == 1 else 0.5  # 0.7 in two trials, 0.58 in five
        accuracy = {RATES[1]: 0.6, RATES[2]: lucky}.get(trial.rate, 0.1)
        return trial._replace(accuracy=accuracy if trial.draw == 0 else 1 - accuracy), None

    monkeypatch.setattr(trees, "train_trial", make_up)
    write_trials([Trial("sum", seed=seed, rate=RATES[0], accuracy=1.0) for seed in range(6, 12)])
    trees.run_arm("sum")
    rows = trees.read_trials()[6:]
    assert {row.rate for row in rows if row.draw > 0} == {RATES[1]}
    assert [row.draw for row in rows].count(0) == 14
    assert sorted({row.steps for row in rows}) == [12_000, 40_000, 64_000]


def test_table_has_the_reports_figures(monkeypatch, call):
    """Rows of lab/results/trees.md, with 25 pairs, and one at a rate that is not the arm's best."""
    monkeypatch.setattr(trees, "RESULTS", REPOSITORY / "lab/results/trees.csv")
    monkeypatch.setattr(trees, "POINTS", 20)
    status, out, _ = call(trees, "--plot=a.png")
    assert status == 0
    assert "   105  0.831  25   0.901 ± 0.067  0.989 0.992 0.998 0.935 0.590; " in out
    assert "+0.243 ± 0.052 ± 0.151, 25 of 25" in out
    assert re.search(r"depth 3, 64,000 steps\nsum +31,296 +15,872 0\.00075 .* 0\.921\n", out)
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert shared.half_width([0.0] * 24 + [25.0]) == pytest.approx(2.064 * 25**0.5 / 5)


def test_a_cut_line_is_named(refused):
    Path("trees.csv").write_text(f"{','.join(Trial._fields)}\nsum,3,1,1,12000,0.0015,31296\n")
    refused("trees.csv, line 2: ", trees, "--plot=a.png")


def test_intervals_are_over_trials_and_draws(capsys):
    """A pair has the same draw and seed; of a single value there is no interval."""
    of_sum = {(1, 1): 0.1, (1, 2): 0.2, (2, 1): 0.1, (1, 3): 0.3}
    trees.print_accuracies({(1, 1): 0.9, (1, 2): 1.0, (2, 1): 0.5}, of_sum)
    row = "   3   0.800 ± 0.657  0.950 0.500; +0.667 ± 0.574 ± 2.541, 3 of 3\n"
    assert capsys.readouterr().out == row


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
    monkeypatch.setattr(trees, "observe", lambda model, tokens: [[first, second]])
    rows = trees.read_off(Namespace(config=Namespace(n_expert=8)), tokens, levels)
    shares = [trees.shares_right(row, levels) for row in rows]
    assert 0.5 < shares[0][0] < 0.7
    for row in shares[1:3]:
        assert row == pytest.approx([1 / 6] * 3, abs=0.06)
    assert shares[3][0] == 1.0
    assert shares[3][2] < 0.5


def test_page_of_a_tree(monkeypatch, call):
    """It has a tree of the task, and what is read off an example of it."""
    model = randomize(trees.make_model(Trial("dag2_silu")))
    monkeypatch.setattr(trees, "train_trial", lambda trial: (trial, model))
    assert call(trees, "--page=tree.html")[0] == 0
    data = json.loads(re.search("const data = (.*);\n", Path("tree.html").read_text())[1])
    leaves, *_, root = data["tree"]["values"]
    assert data["tokens"] == [*map(str, leaves), "="]
    value = leaves
    for tables in trees.make_tables(3, draw=1):
        nodes = torch.arange(len(tables))
        value = tables[nodes, value[0::2], value[1::2]].tolist()
    assert value == root
    assert data["tree"]["read"][0][-1] != root
    assert data["tree"]["read"][-1][-1] == root
