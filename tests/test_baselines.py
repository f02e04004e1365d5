"""lab/baselines.py and lab/cost.py: baselines equal plain loops, costs are counted."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab import cost
from lab.baselines import add_baselines
from model import FEED_FORWARD, GPT
from tests import reference
from tests.conftest import REPOSITORY, TINY_RUN
from tests.reference import assert_same, plain_cost, plain_half, randomize, tiny_config

add_baselines()
ABLATION = REPOSITORY / "lab/configs/ablation"
GRAPHS = ["dag", "mlp", "dag_ungated", "dag_self"]  # begin as sum
ALL = ["sum", "coe", "series", "dense", *GRAPHS]


@pytest.mark.parametrize("name", ALL)
def test_feed_forward_halves_equal_plain_loops(name):
    """Router, norm and shared expert included, and every gradient (float64, 1e-10)."""
    config = tiny_config(aggregator=name, top_k=4, shared_dim=20)
    moe = randomize(FEED_FORWARD[name](config)).double()
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    ours = reference.results_and_gradients(lambda h: moe(h[None])[0][0], {"h": h}, moe)
    theirs = reference.results_and_gradients(lambda h: plain_half(name, moe, h), {"h": h}, moe)
    assert min(x.abs().max() for x in ours.values()) > 1e-3
    assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_seeds_are_paired(name):
    """All begin with the weights that sum has, but for dense's MoE, and graphs with its logits."""
    model = GPT(tiny_config(aggregator=name, top_k=4))
    of_sum = GPT(tiny_config(aggregator="sum", top_k=4))
    for key, weight in of_sum.state_dict().items():
        if name != "dense" or ".moe." not in key:
            assert torch.equal(weight, model.state_dict()[key]), key
    if name in GRAPHS:
        tokens = torch.arange(12)[None]
        assert (model(tokens).logits - of_sum(tokens).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("changes", [{"n_layer": 3}, {"shared_dim": 12}, {"tie_embeddings": False}])
@pytest.mark.parametrize("name", ALL)
def test_count_equals_formula(name, changes):
    """Parameters, those that a token uses, and multiply-adds, also of several sequences."""
    config = tiny_config(aggregator=name, top_k=4, **changes)
    parameters, active, multiply_adds = plain_cost(config)
    assert cost.count(config) == (parameters, active, multiply_adds)
    two_sequences = torch.zeros(2, config.block_size, dtype=torch.long)
    assert cost.count_multiply_adds(GPT(config), two_sequences) == multiply_adds


@pytest.mark.parametrize("folder", [ABLATION, ABLATION.with_name("ablation_s")])
def test_arms_are_fair(folder):
    """shared has the weights of dag2's matrices, *_compute its multiply-adds."""
    parameters = {}
    multiply_adds = {}
    for path in folder.glob("*.toml"):
        words = [str(folder / "base.toml"), str(path), "--n_layer=1"]
        config, _ = cost.read_configs(words)
        parameters[path.stem], _, multiply_adds[path.stem] = plain_cost(config)
    norms = 2 * config.n_embd
    assert parameters["shared"] == parameters["dag2_silu"] - norms
    for arm in parameters.keys() & {"shared_compute", "sum_compute"}:
        assert multiply_adds[arm] == multiply_adds["dag2_silu"]


def test_readme_has_the_table(call, monkeypatch):
    """It is what `table` prints of all configs, with what the formula says."""
    monkeypatch.setattr(cost, "count", lambda config: cost.Cost(*plain_cost(config)))
    table = call(cost, "table", *REPOSITORY.glob("configs/*.toml"))[1]
    assert "| quickstart | 2 | 128 |" in table
    assert table in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def count_flops(functions, device, rounds):
    """Stand in for time_in_turns, as on a device that does a GFLOP per second."""
    seconds = {}
    for name, function in functions.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
        seconds[name] = np.array([counter.get_total_flops() / 1e9])
    return seconds


# Those of sum and 3 C · C/2 for a shared expert, or K (2 C D + 4 D²) for each depth of the graph.
PRODUCTS = {"step": ["7,002", "6,862", "7,694"], "layer": ["1,422", "1,352", "1,768"]}


@pytest.mark.parametrize("what", PRODUCTS)
def test_steps_are_printed(what, call, monkeypatch):
    """Three times the products that were counted forward are all that a step computes."""
    monkeypatch.setattr(cost, "time_in_turns", count_flops)
    # For this n_embd torch does not use grouped_mm, which it cannot count.
    changes = ["--vocab_size=23", "--n_embd=18", "--n_head=1"]
    out = call(cost, what, *TINY_RUN, *changes)[1]
    rows = {row[:8].strip(): row[8:].split() for row in out.splitlines()[2:]}
    assert list(rows) == ["sum", "series", "mlp", "dense", "coe", "shared", "dag L=1", "dag L=2"]
    for _, _, relative_products, _, relative_time, _, _, share in rows.values():
        assert relative_time == relative_products
        assert share == "100%"
    assert [rows[name][1] for name in ("shared", "dag L=1", "dag L=2")] == PRODUCTS[what]


def test_functions_take_turns():
    """The round that warms up has no times."""
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = cost.time_in_turns(functions, torch.device("cpu"), rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert len(seconds["a"]) == len(seconds["b"]) == 2


def test_no_repeats_are_refused(refused):
    refused("--repeats must be at least 1", cost, "step", "--repeats=0")
