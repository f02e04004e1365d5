"""lab/baselines.py and lab/cost.py: baselines equal plain loops, and costs are counted right."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab import cost
from lab.baselines import make_model
from model import Router
from tests import helpers
from tests.helpers import REPOSITORY, TINY_RUN, assert_refused, assert_same, randomize, tiny_config
from tests.reference import plain_cost, plain_half

GRAPHS = ["dag", "mlp", "dag_ungated", "dag_self"]  # start as sum
ALL = ["sum", "coe", "series", "dense", *GRAPHS]


@pytest.mark.parametrize("name", ALL)
def test_every_moe_equals_plain_loops(name):
    """Each of them is right, and so is every gradient, norm, router and shared expert included."""
    config = tiny_config(aggregator=name, top_k=4, shared_dim=20)
    moe = randomize(make_model(config).blocks[0].moe).double()
    generator = torch.Generator().manual_seed(3)
    inputs = {"h": torch.randn(6, 32, generator=generator, dtype=torch.float64)}
    ours = helpers.results_and_gradients(lambda h: moe(h[None])[0][0], inputs, moe)
    plain = helpers.results_and_gradients(lambda h: plain_half(name, moe, h), inputs, moe)
    assert all(x.abs().max() > 1e-3 for x in ours.values()), "a value of zero would test nothing"
    assert_same(ours, plain, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_the_losses_of_all_routers_are_averaged(name):
    """Balance loss and z-loss are means over routers, or without one those of perfect balance."""
    model = randomize(make_model(tiny_config(aggregator=name, top_k=4)))
    losses = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *call: losses.append(torch.stack(call[-1][2:])))
    out = model(torch.arange(12)[None])
    means = torch.stack(losses or [torch.tensor([1.0, 0.0])]).mean(dim=0)
    assert torch.allclose(torch.stack([out.balance_loss, out.z_loss]), means)


@pytest.mark.parametrize("name", ALL)
def test_models_of_one_seed_start_alike(name):
    """All have the weights of sum, except in dense's MoE, and graphs start with its logits."""
    model = make_model(tiny_config(aggregator=name, top_k=4))
    of_sum = make_model(tiny_config(aggregator="sum", top_k=4))
    for key, weight in of_sum.state_dict().items():
        if name != "dense" or ".moe." not in key:
            assert torch.equal(weight, model.state_dict()[key]), key
    if name in GRAPHS:
        tokens = torch.arange(12)[None]
        assert (model(tokens).logits - of_sum(tokens).logits).abs().max() <= 1e-5


def test_baselines_are_trained(corpus):
    """`python -m lab.baselines` trains coe, unless K is odd, as there are two rounds."""
    process = helpers.start("-m", "lab.baselines", *TINY_RUN, "--aggregator=coe")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert "blocks.0.moe.second_router.weight" in helpers.load()["model"]
    with pytest.raises(SystemExit, match="error: coe needs an even top_k, got 3"):
        make_model(tiny_config(aggregator="coe", top_k=3))


@pytest.mark.parametrize("changes", [{"n_layer": 3}, {"shared_dim": 12}, {"tie_embeddings": False}])
@pytest.mark.parametrize("name", ALL)
def test_costs_equal_a_formula(name, changes):
    """Parameters, those that a token uses and multiply-adds are right, also of two sequences."""
    config = tiny_config(aggregator=name, top_k=4, **changes)
    parameters, active, multiply_adds = plain_cost(config)
    assert cost.count(config) == (parameters, active, multiply_adds)
    two_sequences = torch.zeros(2, config.block_size, dtype=torch.long)
    assert cost.count_multiply_adds(make_model(config), two_sequences) == multiply_adds
    if name == "dense":  # it has the experts' products, but not the router's
        _, _, of_sum = plain_cost(tiny_config(aggregator="sum", top_k=4, **changes))
        assert multiply_adds == of_sum - config.n_layer * 8 * 32


@pytest.mark.parametrize("name", ["ablation", "ablation_s"])
def test_arms_of_the_ablations_are_fair(name):
    """shared has as many weights as dag2's matrices, and *_compute as many multiply-adds."""
    folder = REPOSITORY / "lab/configs" / name
    parameters = {}
    multiply_adds = {}
    for path in folder.glob("*.toml"):
        config, _ = cost.read_configs([str(folder / "base.toml"), str(path), "--n_layer=1"])
        parameters[path.stem], _, multiply_adds[path.stem] = plain_cost(config)
    assert parameters["shared"] == parameters["dag2_silu"] - 2 * config.n_embd  # its two norms
    for arm in parameters.keys() & {"shared_compute", "sum_compute"}:
        assert multiply_adds[arm] == multiply_adds["dag2_silu"]


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
def test_steps_are_measured(what, monkeypatch, capsys):
    """A step computes three times the products that were counted for its forward pass."""
    monkeypatch.setattr(cost, "time_in_turns", count_flops)
    # With this n_embd torch does not use grouped_mm, which it cannot count.
    cost.main([what, *TINY_RUN, "--vocab_size=23", "--n_embd=18", "--n_head=1"])
    rows = {}
    for line in capsys.readouterr().out.splitlines()[2:]:
        rows[line[:8].strip()] = line[8:].split()
    assert list(rows) == ["sum", "series", "mlp", "dense", "coe", "shared", "dag L=1", "dag L=2"]
    for _, _, relative_products, _, relative_time, _, _, share in rows.values():
        assert relative_time == relative_products
        assert share == "100%"
    assert [rows[name][1] for name in ("shared", "dag L=1", "dag L=2")] == PRODUCTS[what]


def test_functions_take_turns():
    """Each function is called once a round, and the first round, which warms up, does not count."""
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = cost.time_in_turns(functions, torch.device("cpu"), rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert len(seconds["a"]) == len(seconds["b"]) == 2


def test_at_least_one_round_is_measured():
    """No rounds at all are refused, because there would be nothing to print."""
    assert_refused(cost.main, ["step", "--repeats=0"], "--repeats must be at least 1")
