"""lab/trees.py: the trees, the trials, which of them are chosen, and what is read off a graph."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F

from lab import shared, trees
from lab.cost import count
from lab.trees import RATES, Trial
from tests.helpers import REPOSITORY, assert_refused, assert_same, randomize, results_and_gradients


@pytest.fixture(autouse=True)
def small_trials(monkeypatch):
    """Trials are evaluated on few trees, and every test has a file of results of its own."""
    monkeypatch.setattr(trees, "PROBED", 300)
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))


def test_trees_are_what_their_tables_say():
    """Inner nodes look up their two children, and a table has all values equally often."""
    tokens, levels = trees.draw_test_trees(Trial("sum"))
    assert torch.equal(tokens[:, :8], levels[0] + 6 * torch.arange(8))
    assert (tokens[:, 8] == 48).all()  # "="
    for n, tables in enumerate(trees.make_tables(3, draw=1)):
        assert (tables.flatten(1).sort().values == torch.arange(36) // 6).all()
        for tree in range(300):
            children = levels[n][tree].view(-1, 2)
            for i, (left, right) in enumerate(children):
                assert levels[n + 1][tree, i] == tables[i, left, right]


@pytest.mark.parametrize("arm", ["sum", "series", "dag2_silu", "coe", "dense"])
def test_the_short_cut_is_gpt_forward(arm):
    """Its logits at "=" and every gradient are those of the whole network."""
    model = randomize(trees.make_model(Trial(arm))).double()
    tokens, _ = trees.draw_test_trees(Trial(arm))
    ours = results_and_gradients(lambda: trees.answer(model, tokens)[0], {}, model)
    whole = results_and_gradients(lambda: model(tokens).logits[:, -1], {}, model)
    assert_same(ours, whole, 1e-6)  # positions are computed in float32


@pytest.mark.parametrize("arm", ["sum", "shared", "series"])
def test_arms_are_fair(arm):
    """They have as many parameters as dag2_silu, or with _compute multiply-adds, within 2 %."""
    dag = count(trees.make_model(Trial("dag2_silu")).config)
    same = count(trees.make_model(Trial(arm)).config)
    wider = count(trees.make_model(Trial(f"{arm}_compute")).config)
    assert same.parameters == pytest.approx(dag.parameters, abs=0.02 * 31_424)  # of the MoE
    assert wider.multiply_adds == pytest.approx(dag.multiply_adds, abs=0.02 * 37_376)


def test_one_table_is_learned(monkeypatch):
    """A trial learns one table, and is right only by chance about trees with random roots."""
    trial = Trial("sum", depth=1, steps=250, rate=6e-3)
    assert trees.train_trial(trial)[0].accuracy > 0.9
    tokens, (leaves, root) = trees.draw_test_trees(trial)
    others = (tokens, [leaves, root[torch.randperm(300)]])
    monkeypatch.setattr(trees, "draw_test_trees", lambda trial: others)
    assert trees.train_trial(trial)[0].accuracy < 0.4


def test_a_trial_is_a_plain_loop():
    """A loop with the same trees, warm-up, losses of the router and clipping gives its weights."""
    trial = Trial("dag2_silu", draw=2, seed=3, steps=4, rate=0.5)
    model = trees.make_model(trial)
    norms = [weight for weight in model.parameters() if weight.dim() == 1]
    others = [weight for weight in model.parameters() if weight.dim() > 1]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(2003)
    for step in range(4):
        tokens, levels = trees.draw_trees(trees.make_tables(3, draw=2), 256, generator)
        logits, (balance_loss, z_loss) = trees.answer(model, tokens)
        assert balance_loss < 2 < z_loss  # E/K, and in a new router the z-loss is ln(E)² = 4.3
        loss = F.cross_entropy(logits, levels[-1][:, 0]) + 0.01 * balance_loss + 0.001 * z_loss
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
    """The file gets a row for each trial that it lacks: what training returns, each time."""
    trials = [Trial(arm, steps=20) for arm in ("series", "dag2_silu")]
    trees.run_missing(trials[:1])
    trees.run_missing(trials)
    rows = shared.read_rows(Path("trees.csv"), Trial)
    sizes = [(row.arm, row.parameters, row.multiply_adds) for row in rows]
    assert sizes == [("series", 31_872, 16_384), ("dag2_silu", 31_424, 37_376)]
    again, _ = trees.train_trial(trials[1])
    assert again._replace(seconds=rows[1].seconds) == rows[1]


def test_the_best_rate_is_chosen_on_other_tables(monkeypatch):
    """Each rate has two trials on draw 0, the better two have three more, and the best has all."""

    def make_up(trial: Trial) -> tuple:
        lucky = 0.9 if trial.seed == 1 else 0.5  # 0.7 in two trials, 0.58 in five
        accuracy = {RATES[1]: 0.6, RATES[2]: lucky}.get(trial.rate, 0.1)
        return trial._replace(accuracy=accuracy if trial.draw == 0 else 1 - accuracy), None

    monkeypatch.setattr(trees, "train_trial", make_up)
    others = [Trial("sum", seed=seed, rate=RATES[0], accuracy=1.0) for seed in range(6, 12)]
    with open("trees.csv", "w") as file:
        csv.writer(file).writerows([Trial._fields, *others])
    trees.run_arm("sum")
    rows = trees.read_trials()[6:]
    assert {row.rate for row in rows if row.draw > 0} == {RATES[1]}
    assert [row.draw for row in rows].count(0) == 14
    assert sorted({row.steps for row in rows}) == [12_000, 40_000, 64_000]


def test_the_published_figures_are_printed(monkeypatch, capsys):
    """--plot prints the rows of trees.md, and others at rates that are not the best, and draws."""
    monkeypatch.setattr(trees, "RESULTS", REPOSITORY / "lab/results/trees.csv")
    trees.main(["--plot=a.png"])
    out = capsys.readouterr().out
    assert "   105  0.831  25   0.901 ± 0.067  0.989 0.992 0.998 0.935 0.590; " in out
    assert "+0.243 ± 0.052 ± 0.151, 25 of 25" in out
    words = out.split("depth 3, 64,000 steps\n")[1].splitlines()[0].split()
    assert [*words[:4], words[-1]] == ["sum", "31,296", "15,872", "0.00075", "0.921"]
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert shared.half_width([0.0] * 24 + [25.0]) == pytest.approx(2.064 * 25**0.5 / 5)


@pytest.mark.parametrize(("end", "reason"), [("\n", "TypeError"), ("", "ValueError")])
def test_a_line_that_is_cut_off_is_named(end, reason):
    """The error has the file and the number of the line."""
    Path("trees.csv").write_text(f"{','.join(Trial._fields)}\nsum,3,1,1,12000,0.0015,31296{end}")
    message = f"trees.csv, line 2: not a row of Trial ({reason}"
    assert_refused(trees.main, ["--plot=a.png"], message)


def test_intervals_are_over_trials_and_over_draws(capsys):
    """The two trials of a pair have the same draw and seed, and one value has no interval."""
    of_sum = {(1, 1): 0.1, (1, 2): 0.2, (2, 1): 0.1, (1, 3): 0.3}
    trees.print_accuracies({(1, 1): 0.9, (1, 2): 1.0, (2, 1): 0.5}, of_sum)
    row = "   3   0.800 ± 0.657  0.950 0.500; +0.667 ± 0.574 ± 2.541, 3 of 3\n"
    assert capsys.readouterr().out == row


def test_what_is_in_the_nodes_is_read_off(monkeypatch):
    """Values in the nodes are read, even if coded by expert, and what is not there is guessed."""
    monkeypatch.setattr(trees, "PROBED", 3000)
    tokens, levels = trees.draw_test_trees(Trial("sum"))
    generator = torch.Generator().manual_seed(0)
    empty = torch.randn(3000 * 9, 2, 24, generator=generator)
    full = torch.zeros(3000 * 9, 2, 24)
    expert = torch.rand(3000 * 9, 8, generator=generator).argsort(dim=1)[:, :2]
    codes = (levels[1] + expert[8::9, 1:]) % 6
    full[8::9, 1] = F.one_hot(codes, 6).flatten(1).float()
    depths = [Namespace(before=empty, after=after, expert=expert) for after in (empty, full)]
    monkeypatch.setattr(trees, "observe", lambda model, tokens: [depths])
    rows = trees.read_off(Namespace(config=Namespace(n_expert=8)), tokens, levels)
    shares = [trees.shares_right(row, levels) for row in rows]
    assert 0.5 < shares[0][0] < 0.7
    for row in shares[1:3]:
        assert row == pytest.approx([1 / 6] * 3, abs=0.06)
    assert shares[3][0] == 1.0
    assert shares[3][2] < 0.5


def test_the_page_has_a_tree(monkeypatch):
    """It shows a tree of the task whose root is read right after the graph, and not before it."""
    model = randomize(trees.make_model(Trial("dag2_silu")), seed=1)
    monkeypatch.setattr(trees, "train_trial", lambda trial: (trial, model))
    trees.main(["--page=tree.html"])
    data = json.loads(Path("tree.html").read_text().split("const data = ")[1].split(";\n")[0])
    leaves, *_, root = data["tree"]["values"]
    assert data["tokens"] == [*map(str, leaves), "="]
    _, levels = trees.draw_test_trees(Trial("dag2_silu"))
    i = levels[0].tolist().index(leaves)
    assert data["tree"]["values"] == [level[i].tolist() for level in levels]
    assert data["tree"]["read"][0][-1] != root
    assert data["tree"]["read"][-1][-1] == root
