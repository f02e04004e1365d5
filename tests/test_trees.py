"""lab/trees.py: trees, the short cut against GPT.forward, fair arms, what is chosen, resumed, read off and shown."""

from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
import torch.nn.functional as F

from lab import graph, trees
from lab.trees import ARMS, RATES, Trial
from tests.reference import assert_same, randomize

trees.PROBED, trees.POINTS = 300, 4  # are enough here


def test_trees_are_what_their_tables_say():
    """Every inner node looks its two children up in a balanced table of its own; tokens tell place and value."""
    tables = trees.make_tables(3, draw=1)
    assert [len(table) for table in tables] == [4, 2, 1]
    assert all((table.flatten(1).sort().values == torch.arange(6).repeat_interleave(6)).all() for table in tables)
    assert not torch.equal(tables[0][0], tables[0][1]) and not torch.equal(tables[0], trees.make_tables(3, 2)[0])
    tokens, levels = trees.draw_trees(tables, 50, torch.Generator().manual_seed(0))
    assert (tokens[:, -1] == 6 * 8).all() and tokens.max(dim=0).values.tolist()[:2] == [5, 11]

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
    for arm in [arm for arm in ARMS if arm.startswith(("sum", "shared", "series"))]:
        name, in_moe = ("multiply_adds", 37_376) if arm.endswith("_compute") else ("parameters", 31_424)
        assert abs(costs[arm][name] - costs["dag2_silu"][name]) <= 0.02 * in_moe


def test_a_trial_learns_and_is_determined_by_its_settings(monkeypatch):
    """One table is learned in no time; another rate, seed, draw or arm gives another curve; arms see the same trees."""
    assert trees.train_trial(Trial("sum", depth=1, steps=250, rate=6e-3))[0].accuracy > 0.9
    seen, answer = [], trees.answer
    monkeypatch.setattr(trees, "answer", lambda model, tokens: seen.append(tokens) or answer(model, tokens))
    trials = [Trial("sum", steps=24, **change) for change in ({}, {"rate": 6e-3}, {"seed": 2}, {"draw": 2}, {})]
    curves = [trees.train_trial(trial)[0].curve for trial in [*trials, Trial("dag2_silu", steps=24)]]
    assert len(set(curves)) == 5 and curves[0] == curves[4] and not torch.equal(seen[0], seen[56])
    assert not torch.equal(trees.make_model(trials[0]).embed.weight, trees.make_model(trials[2]).embed.weight)
    assert all(torch.equal(tokens, others) for tokens, others in zip(seen[:28], seen[-28:], strict=True))
    monkeypatch.setattr(trees, "learning_rate", lambda step, config: 0.0)
    assert len(set(trees.train_trial(trials[0])[0].curve.split())) == 1


def test_trials_are_added_and_not_repeated(monkeypatch, refused):
    """A row of the file is what training returned; started again, nothing is trained twice; a damaged row is named."""
    monkeypatch.setattr(trees, "RESULTS", results := Path("trees.csv"))
    trials = [Trial(arm, steps=20) for arm in ("sum", "dag2_silu")]
    trees.run_missing(trials[:1])
    trees.run_missing(trials)
    rows = trees.read_trials()
    assert [row[:6] for row in rows] == [trial[:6] for trial in trials]
    assert trees.train_trial(trials[1])[0]._replace(seconds=rows[1].seconds) == rows[1]
    assert (rows[0].probe, rows[1].parameters, rows[1].multiply_adds) == ("", 31_424, 37_376)
    assert rows[1].curve.endswith(f" {rows[1].accuracy:.4f}") and len(rows[1].curve.split()) == trees.POINTS
    whole = results.read_text()
    results.write_text(whole + whole.splitlines()[1])
    assert len(trees.read_trials()) == 2, "one of two equal ones"
    results.write_text(whole[:-9])
    refused("trees.csv, line 3: not a whole row", trees, "--plot=a.png")


@pytest.mark.parametrize(("arm", "best"), [("sum", RATES[1]), ("dense", RATES[2])])
def test_the_best_rate_is_chosen_on_other_tables(arm, best, monkeypatch):
    """Two trials a rate on draw 0, three more of the better two decide; others have one. All else has that rate."""
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))
    luck = ((0.5, 0.65, 1, 1, 1), (0.6, 0.6, 0.5, 0.5, 0.5), (0.9, 0.6, 0.1, 0.1, 0.1), (0.1, 0.1, 1, 1, 1))

    def made_up(trial: Trial) -> tuple:
        accuracy = trial.draw or luck[RATES.index(trial.rate)][trial.seed - 1]
        return trial._replace(accuracy=accuracy, curve="0 0 0 0"), None, None

    monkeypatch.setattr(trees, "train_trial", made_up)
    trees.run_missing([Trial(arm, rate=RATES[3]), Trial("coe", draw=0, rate=RATES[3], seed=2)])  # which have no say
    trees.run_arm(arm)
    found = [trial for trial in trees.read_trials() if trial.arm == arm]
    assert sum(trial.draw == 0 for trial in found) == (14 if arm == "sum" else 4)
    expected = {(3, draw, seed, 12_000) for draw in (1, 2, 3, 4, 5) for seed in (1, 2, 3, 4, 5)}
    expected |= {(3, 1, seed, steps) for seed in (1, 2) for steps in (40_000, 64_000)}
    expected |= {(depth, 1, seed, 12_000) for depth in (2, 4) for seed in (1, 2, 3)}
    rest = {trial[1:5] for trial in found if trial.draw > 0 and trial.rate == best}
    assert rest == (expected if arm == "sum" else {(3, draw, 1, 12_000) for draw in (1, 2, 3, 4, 5)})


def test_table_and_picture(monkeypatch, call):
    """Means, intervals over trials and draws, gaps in pairs, seconds of the fastest; curves and a heat map."""
    of, probe = dict(parameters=7, multiply_adds=9, curve="0 0 0 1"), "0.1 0.2 0.3|0.4 0.5 0.6|0.7 0.8 0.9|1 1 1"
    monkeypatch.setattr(trees, "RESULTS", Path("trees.csv"))
    monkeypatch.setattr(trees, "train_trial", lambda trial: (trial._replace(**of), None, None))
    other = ((0, 1.5e-3), (0, 7.5e-4), (1, 7.5e-4))  # draw and rate of what is not shown
    rows = [Trial("dag2_silu", draw=d, rate=r, accuracy=r, seconds=5.0) for d, r in other]
    found = ((1, 1, 0.9), (1, 2, 1.0), (2, 1, 0.5))  # draw, seed, accuracy
    rows += [Trial("dag2_silu", draw=d, seed=s, accuracy=a, seconds=7.0, probe=probe) for d, s, a in found]
    rows += [Trial("sum", draw=d, seed=s, accuracy=s / 10) for d, s in ((0, 1), (1, 1), (1, 2), (1, 3), (2, 1))]
    trees.run_missing([*rows, Trial("sum", depth=2), Trial("dag2_silu", steps=40_000, seconds=13.4, probe=probe)])
    out = call(trees, "--plot=a.png")[1]
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert [" ".join(line.split()) for line in out.splitlines()[3:7]] == [
        "depth 3, 12,000 steps",
        "sum 7 9 0.0015 0 4 0.175 ± 0.152 +0.000 ± 0.000 ± 0.000 0 0.2 0.1",
        "dag2_silu 7 9 0.0015 4 3 0.800 ± 0.657 +0.667 ± 0.574 ± 2.541 3 0.95 0.5",  # 0.8, 0.8, 0.4; draws 0.8, 0.4
        "leaves, nodes by depth; by level: [0.1, 0.2, 0.3] [0.4, 0.5, 0.6] [0.7, 0.8, 0.9] [1.0, 1.0, 1.0]",
    ]
    assert "-0.667 ± 0.574 ± 2.541   0  " in call(trees, "--plot=a.png", "--against=dag2_silu")[1]
    assert call(trees)[1].split() == ["sum", "0.000", "dag2_silu", "0.000", "series", "0.000"]


def test_what_is_read_off(monkeypatch):
    """Values that are in the nodes, each expert with a code of its own, are read; what is not there is guessed."""
    generator = torch.Generator().manual_seed(0)
    tokens, levels = trees.draw_trees(trees.make_tables(3, 1), 3000, generator)
    empty, full = torch.randn(3000 * 9, 2, 24, generator=generator), torch.zeros(3000 * 9, 2, 24)
    expert = torch.rand(3000 * 9, 8, generator=generator).argsort(dim=1)[:, :2]
    full[8::9, 1] = F.one_hot((levels[1] + expert[8::9, 1:]) % 6, 6).flatten(1).float()
    depths = [Namespace(before=empty, after=after, expert=expert) for after in (empty, full)]
    monkeypatch.setattr(graph, "observe", lambda *_: [depths])
    rows = graph.read_off(Namespace(config=Namespace(n_expert=8)), tokens, levels, 6)
    leaves, *empties, after = [graph.shares_right(row, levels[1:]) for row in rows]
    assert after[0] == 1.0 and 0.5 < leaves[0] < 0.7 and after[2] < 0.5
    assert len(empties) == 2 and all(row == pytest.approx([1 / 6] * 3, abs=0.06) for row in empties)
