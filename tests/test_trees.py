"""lab/trees.py: trees, the short cut against GPT.forward, fair arms, what is chosen, resumed, read off and shown."""

from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F

from lab import cost, graph, trees
from lab.trees import ARMS, RATES, Trial
from tests.reference import assert_same, randomize


def test_trees_are_what_their_tables_say(depth=3):
    """Every inner node looks its two children up in a balanced table of its own; tokens tell place and value."""
    tables = trees.make_tables(depth, draw=1)
    assert [len(table) for table in tables] == [2**level for level in reversed(range(depth))]
    assert all((table.flatten(1).sort().values == torch.arange(6).repeat_interleave(6)).all() for table in tables)
    assert not torch.equal(tables[0][0], tables[0][1]) and not torch.equal(tables[0], trees.make_tables(depth, 2)[0])
    tokens, levels = trees.draw_trees(tables, 50, torch.Generator().manual_seed(0))
    assert (tokens[:, -1] == 6 * 2**depth).all() and tokens.max(dim=0).values.tolist()[:2] == [5, 11]

    def value(row: list[int], level: int, node: int) -> int:
        if level == 0:
            return row[node] - 6 * node
        return tables[level - 1][node][value(row, level - 1, 2 * node), value(row, level - 1, 2 * node + 1)].item()

    for level, values in enumerate(levels):
        assert values.tolist() == [[value(row, level, i) for i in range(values.shape[1])] for row in tokens.tolist()]


@pytest.mark.parametrize("arm", ["sum", "shared", "series", "dag2_silu", "coe", "dense"])
def test_short_cut_is_gpt_forward(arm):
    """Logits at "=" and every gradient (float64, 1e-6: positions are float32); the losses of a router of that token."""
    model = randomize(trees.make_model(Trial(arm))).double()
    tokens, levels = trees.draw_trees(trees.make_tables(3, 1), 40, torch.Generator().manual_seed(0))

    def result(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        F.cross_entropy(logits, levels[-1].squeeze(1)).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach()} | gradients

    logits, balance, z = trees.answer(model, tokens)
    assert_same(result(logits), result(model(tokens).logits[:, -1]), 1e-6)
    with torch.no_grad():
        model.blocks[0].moe.register_forward_pre_hook(lambda moe, arguments: (arguments[0][:, -1:],))
        output = model(tokens)
    assert_same({"balance": balance, "z": z}, {"balance": output.balance, "z": output.z}, 1e-6)


def test_arms_are_fair():
    """sum, shared and series have dag2's parameters, with _compute its multiply-adds, both within 2 %."""
    costs = {arm: trees.make_model(Trial(arm)).cost() for arm in ARMS}
    for arm in trees.MAIN[:6]:
        name, in_moe = ("multiply_adds", 37_376) if arm.endswith("_compute") else ("parameters", 31_424)
        assert abs(costs[arm][name] - costs["dag2_silu"][name]) <= 0.02 * in_moe


def test_trials_are_added_and_not_repeated(monkeypatch, refused):
    """A row of the file is what training returned; started again, nothing is trained twice; a damaged row is named."""
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))
    monkeypatch.setattr(trees, "PROBED", 300)
    trials = [Trial(arm, steps=40) for arm in ("sum", "dag2_silu")]
    for some in (trials[:1], trials):
        trees.run_missing(some)
    rows = trees.read_trials()
    assert [row[:6] for row in rows] == [trial[:6] for trial in trials]
    assert trees.train_trial(trials[1])._replace(seconds=rows[1].seconds) == rows[1]
    moe, h = trees.make_model(trials[1]).blocks[0].moe, torch.zeros(1, 5, 64, dtype=torch.float64)
    assert rows[1].multiply_adds == cost.count_multiply_adds(moe, h)
    assert (rows[0].probe, rows[1].parameters, len(rows[1].curve.split())) == ("", 31_424, trees.POINTS)
    assert rows[1].curve.endswith(f" {rows[1].accuracy:.4f}")
    Path("trees.csv").write_text(Path("trees.csv").read_text() + "sum,3\n")
    refused("trees.csv: a row is not as this program writes it", trees, "--plot=a.png")


def test_the_best_rate_is_chosen_on_other_tables(monkeypatch):
    """Two trials a rate on draw 0; then all others at the rate that is best on average, and not at the luckiest."""
    luck = dict(zip(RATES, ((0.5, 0.5), (0.6, 0.6), (0.9, 0.2)), strict=True))
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))
    monkeypatch.setattr(trees, "train_trial", lambda t: t._replace(accuracy=1 if t.draw else luck[t.rate][t.seed % 2]))
    trees.run_missing([Trial("sum", rate=RATES[2])])  # which has no say
    trees.run_arm("sum")
    rest = [trial for trial in trees.read_trials()[1:] if trial.draw > 0]
    assert {trial.rate for trial in rest} == {RATES[1]} and len(rest) == 15 + 2 + 2 + 6


def test_table_and_picture(monkeypatch, call):
    """Means, intervals and differences to sum of the same tables and seed; three curves and a heat map."""
    curve, probe = " ".join(["0.5"] * 20), "0.1 0.2 0.3|0.4 0.5 0.6|0.7 0.8 0.9|1 1 1"
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))
    monkeypatch.setattr(trees, "train_trial", lambda trial: trial)
    of = dict(parameters=7, multiply_adds=9, curve=curve)
    rows = [Trial("dag2_silu", seed=s, accuracy=0.8 + s / 10, probe=probe, **of) for s in (1, 2)]
    rows += [Trial("sum", seed=s, accuracy=s / 10, **of) for s in (3, 2)] + [Trial("sum", draw=0, accuracy=0.1, **of)]
    trees.run_missing([*rows, Trial("dag2_silu", steps=40_000, probe=probe, **of)])
    status, out, _ = call(trees, "--plot=a.png")
    assert [line.split()[0] for line in call(trees)[1].splitlines()] == ["depth", "sum", "series", "dag2_silu"]
    assert status == 0 and Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert [" ".join(line.split()) for line in out.splitlines()[1:4]] == [
        "sum 7 9 0.0015 2 0.250 ± 0.635 +0.000 ± 0.000 0",
        "dag2_silu 7 9 0.0015 2 0.950 ± 0.635 +0.800 ± nan 0",
        "dag2_silu leaves, nodes by depth; by level: [0.1, 0.2, 0.3] [0.4, 0.5, 0.6] [0.7, 0.8, 0.9] [1.0, 1.0, 1.0]",
    ]


def test_what_is_read_off(monkeypatch):
    """Values that are in the nodes, whichever experts they come from, are read; what is not there is guessed."""
    tokens, levels = trees.draw_trees(trees.make_tables(3, 1), 3000, torch.Generator().manual_seed(0))
    empty, full, expert = torch.zeros(3000 * 9, 2, 24), torch.zeros(3000 * 9, 2, 24), torch.tensor([[5, 2]] * 3000 * 9)
    full[8::9, 1] = F.one_hot(levels[1], 6).flatten(1).float()
    monkeypatch.setattr(graph, "observe", lambda *_: [[Namespace(before=empty, after=full, expert=expert)]])
    leaves, before, after = graph.read_off(Namespace(config=Namespace(n_expert=8)), tokens, levels, 6)
    assert after[0] == 1.0 and 0.5 < leaves[0] < 0.7 and before == pytest.approx([1 / 6] * 3, abs=0.06)
