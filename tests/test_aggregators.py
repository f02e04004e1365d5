"""The seam (h, out, gate) → h': the DAG against the paper's equations, and what makes it more than a weighted sum."""

import pytest
import torch

from bench import kept_bytes
from model import (
    AGGREGATORS,
    GPT,
    RESIDUALS,
    ChainOfExperts,
    DAGAggregator,
    MLPMixing,
    ModelConfig,
    MoE,
    WeightedSum,
    balance_loss,
)  # fmt: skip
from tests.reference import (
    assert_same,
    plain_dag,
    plain_experts,
    plain_mlp,
    plain_router,
    plain_swiglu,
    randomize,
    results_and_gradients,
    rms_norm,
    tiny_config,
)  # fmt: skip

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def random_inputs(config, tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    h = torch.randn(tokens, config.n_embd, generator=generator, dtype=dtype)
    out = torch.randn(tokens, config.top_k, config.n_embd, generator=generator, dtype=dtype)
    gate = torch.rand(tokens, config.top_k, generator=generator, dtype=dtype).softmax(-1)
    return {"h": h, "out": out, "gate": gate}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("gate_name", "residual"),
    [("sigmoid", "1/K"), ("silu", "1/K"), ("none", "1/K"), *(("sigmoid", name) for name in RESIDUALS[1:])],
)
@pytest.mark.parametrize(("depth", "top_k"), [(1, 1), (1, 4), (2, 2), (3, 3)])
def test_dag_equals_the_papers_equations(depth, top_k, gate_name, residual, dtype):
    """Value and the gradients of h, out, gate and every weight equal those of the plain Eq. 6 to 12."""
    config = tiny_config(dag_depth=depth, top_k=top_k, dag_gate=gate_name, dag_residual=residual)
    aggregator = randomize(DAGAggregator(config)).to(dtype)
    inputs = random_inputs(config, tokens=5, dtype=dtype)
    fast = results_and_gradients(aggregator, inputs, aggregator)
    plain = results_and_gradients(
        lambda h, out, gate: plain_dag(aggregator, gate_name, h, out, gate, residual), inputs, aggregator
    )
    assert len(fast) == 1 + 3 + (4 if gate_name == "none" else 5) * depth
    vanishes = {"grad h"} if residual == "none" else set()
    assert all(x.abs().max() > 1e-3 for name, x in fast.items() if name not in vanishes), "what vanishes tests nothing"
    assert_same(fast, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("gate_name", ["sigmoid", "silu"])
def test_dag_gradcheck(gate_name):
    """Gradients equal finite differences, also for a node that is exactly zero."""
    config = tiny_config(n_embd=8, dag_dim=3, dag_depth=2, top_k=2, dag_gate=gate_name)
    aggregator = randomize(DAGAggregator(config)).double()
    inputs = random_inputs(config, tokens=2, dtype=torch.float64)
    arguments = [x.requires_grad_() for x in inputs.values()]
    weights = list(aggregator.parameters())
    assert torch.autograd.gradcheck(lambda h, out, gate, *_: aggregator(h, out, gate), (*arguments, *weights))

    zero = aggregator(torch.zeros_like(inputs["h"]), torch.zeros_like(inputs["out"]).requires_grad_(), inputs["gate"])
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(zero.sum(), weights, allow_unused=False))


def test_weighted_sum_equals_a_loop():
    """h + Σ g_i out_i, with gradients."""
    config = tiny_config()
    aggregator = WeightedSum(config)
    inputs = random_inputs(config, tokens=5, dtype=torch.float64)

    def plain(h, out, gate):
        rows = [h[s] + sum(gate[s, i] * out[s, i] for i in range(config.top_k)) for s in range(len(h))]
        return torch.stack(rows)

    ours = results_and_gradients(aggregator, inputs, aggregator)
    assert_same(ours, results_and_gradients(plain, inputs, aggregator), 1e-12)


def test_mlp_mixing_equals_a_loop():
    """The ungated control equals its formula, token by token, with every gradient; the order of the slots counts."""
    config = tiny_config(aggregator="mlp", top_k=4)
    mixing = randomize(MLPMixing(config)).double()
    inputs = random_inputs(config, tokens=5, dtype=torch.float64)
    ours = results_and_gradients(mixing, inputs, mixing)
    assert len(ours) == 1 + 3 + 4 and all(x.abs().max() > 1e-3 for x in ours.values())
    assert_same(ours, results_and_gradients(lambda **x: plain_mlp(mixing, **x), inputs, mixing), 1e-10)
    order = torch.tensor([2, 0, 3, 1])
    permuted = mixing(inputs["h"], inputs["out"][:, order], inputs["gate"][:, order])
    assert (permuted - mixing(**inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("aggregator", ["shared", "coe"])
def test_shared_expert_and_chain_of_experts_equal_loops(aggregator):
    """The whole feed-forward half, router and norm included, equals the formula with plain loops, with gradients."""
    config = tiny_config(aggregator=aggregator, top_k=4, shared_dim=20)
    moe = randomize({"shared": MoE, "coe": ChainOfExperts}[aggregator](config)).double()
    h = torch.randn(6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def round_of(router, h: torch.Tensor, top_k: int) -> torch.Tensor:
        x = rms_norm(h, moe.norm.weight)
        gate, expert = plain_router(router.weight, x, top_k)
        return (gate.unsqueeze(-1) * plain_experts(moe.experts, x, expert)).sum(dim=1)

    def plain(h: torch.Tensor) -> torch.Tensor:
        if aggregator == "shared":
            return h + round_of(moe.router, h, 4) + plain_swiglu(moe.shared, rms_norm(h, moe.norm.weight))
        first = h + round_of(moe.router, h, 2)
        return first + round_of(moe.second_router, first, 2)

    ours = results_and_gradients(lambda h: moe(h.unsqueeze(0))[0].squeeze(0), {"h": h}, moe)
    assert len(ours) == 1 + 1 + (8 if aggregator == "shared" else 6)
    assert all(x.abs().max() > 1e-3 for x in ours.values())
    assert_same(ours, results_and_gradients(plain, {"h": h}, moe), 1e-10)


def test_each_round_of_a_chain_is_balanced_by_itself():
    """Two routers that prefer opposite experts are unbalanced, although their slots together are not."""
    model = GPT(tiny_config(aggregator="coe"))
    router = model(torch.randint(23, (2, 16), generator=torch.Generator().manual_seed(0))).router
    assert router.load.shape == router.prob.shape == (4, 8) and router.z.shape == (4,)
    assert (router.load.sum(dim=1) == 2 * 16 * 2).all()
    opposite = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert balance_loss(opposite, opposite / 2).item() == pytest.approx(2.0)


def test_switches_of_the_start():
    """dag_zero_init=False draws W_up like what else writes into h, and changes no other weight."""
    models = {}
    for zero in (True, False):
        torch.manual_seed(5)
        models[zero] = dict(GPT(ModelConfig(n_layer=2, dag_zero_init=zero)).named_parameters())
    for name, weight in models[True].items():
        if "w_up" in name:
            assert weight.abs().max() == 0
            assert models[False][name].std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 · 2 layers)
        else:
            assert torch.equal(weight, models[False][name]), name


@pytest.mark.parametrize("width", [128, 512, 1024])
def test_equal_parameters(width):
    """The paper's comparison: the matrices of D = C/4, L = 2 are as many weights as a shared expert of H = C/2."""
    sizes = dict(n_embd=width, n_layer=1, dag_dim=width // 4, dag_depth=2, shared_dim=width // 2)
    counts = {name: GPT(ModelConfig(aggregator=name, **sizes)).count_parameters().total for name in AGGREGATORS}
    assert counts["dag"] - 2 * width == counts["shared"]  # the norm of each depth
    assert counts["shared"] - counts["sum"] == 3 * width * width // 2


@pytest.mark.parametrize("aggregator", ["dag", "mlp"])
def test_new_model_is_the_sum_model(aggregator):
    """W_up = 0: for one seed dag, or mlp, and sum give equal logits (float32, 1e-5)."""
    tokens = torch.randint(23, (3, 16), generator=torch.Generator().manual_seed(0))
    models = []
    for name in ("sum", aggregator):
        torch.manual_seed(5)
        models.append(GPT(tiny_config(aggregator=name)))
    assert (models[0](tokens).logits - models[1](tokens).logits).abs().max() <= 1e-5

    # It must start as the sum, not stay it: W_up gets a gradient.
    models[1](tokens, tokens).loss.backward()
    w_up = [p for name, p in models[1].named_parameters() if "w_up" in name]
    assert w_up and all(p.grad.abs().max() > 0 for p in w_up[-1:])


@pytest.mark.parametrize("aggregator", ["shared", "mlp", "coe", "dag"])
def test_seeds_are_paired(aggregator):
    """For one seed all aggregators but dense share every weight that sum has."""
    weights = {}
    for name in ("sum", aggregator):
        torch.manual_seed(5)
        weights[name] = dict(GPT(tiny_config(aggregator=name, top_k=4)).named_parameters())
    assert len(weights[aggregator]) > len(weights["sum"])
    for name, weight in weights["sum"].items():
        assert torch.equal(weight, weights[aggregator][name]), name


@pytest.mark.parametrize(("name", "linear"), [("sum", True), ("dag", False)])
def test_mixed_second_difference(name, linear):
    """f(a,b) - f(a,0) - f(0,b) + f(0,0) in two expert outputs: zero for the sum, not for the DAG.

    So the DAG is no reparameterised linear combination of the expert outputs.
    """
    config = tiny_config(top_k=2)
    aggregator = randomize({"sum": WeightedSum, "dag": DAGAggregator}[name](config)).double()
    x = random_inputs(config, tokens=6, dtype=torch.float64)

    def f(first: float, second: float) -> torch.Tensor:
        return aggregator(x["h"], x["out"] * torch.tensor([first, second]).view(1, 2, 1), x["gate"])

    mixed = (f(1, 1) - f(1, 0) - f(0, 1) + f(0, 0)).abs().max().item()
    assert mixed < 1e-12 if linear else mixed > 1e-2


@pytest.mark.parametrize("cls", [WeightedSum, DAGAggregator])
def test_order_of_the_experts_does_not_matter(cls):
    """Both aggregators are symmetric in the K nodes: their order carries no information."""
    config = tiny_config(top_k=4)
    aggregator = randomize(cls(config)).double()
    x = random_inputs(config, tokens=3, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    permuted = aggregator(x["h"], x["out"][:, order], x["gate"][:, order])
    assert (permuted - aggregator(**x)).abs().max() < 1e-12


def test_nothing_grows_with_the_number_of_edges():
    """What the DAG keeps for the backward pass grows with K, not with K²: no edge tensor is stored."""
    kept = {}
    for top_k in (4, 8):
        config = tiny_config(n_embd=64, dag_dim=16, dag_depth=1, top_k=top_k)
        aggregator = randomize(DAGAggregator(config))
        storages = {}
        weights = {p.untyped_storage().data_ptr() for p in aggregator.parameters()}

        def pack(x, storages=storages, weights=weights):
            if x.untyped_storage().data_ptr() not in weights:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            inputs = {k: v.requires_grad_() for k, v in random_inputs(config, 32, torch.float32).items()}
            result = aggregator(**inputs)
        kept[top_k] = sum(storages.values())
        assert result.requires_grad
    assert kept[8] <= 2.1 * kept[4], kept


# What is recorded


@pytest.mark.parametrize("gate_name", ["sigmoid", "silu"])
def test_records_are_the_equations_edge_by_edge(gate_name):
    """Mean gates, norms of messages, updates and nodes, per depth, equal a loop over tokens and edges."""
    config = tiny_config(dag_gate=gate_name)
    aggregator = randomize(DAGAggregator(config)).double()
    inputs = random_inputs(config, tokens=5, dtype=torch.float64)
    depths = []
    aggregator(**inputs, depths=depths)
    sigma = {"sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu}[gate_name]
    h, out, gate = inputs.values()
    for s in range(5):
        nodes = [gate[s, i] * out[s, i] + h[s] / 3 for i in range(3)]
        for layer, record in zip(aggregator.layers, depths, strict=True):
            z = [layer.w_down.weight @ rms_norm(n, layer.norm.weight) for n in nodes]
            new = []
            for i in range(3):
                total = 0
                for j in range(3):
                    edge = torch.cat([z[i], z[j]])
                    e = sigma(layer.w_edge.weight @ edge)
                    m = e * (layer.w_node.weight @ edge)
                    cosine = nodes[i] @ nodes[j] / nodes[i].norm() / nodes[j].norm()
                    assert record.cosine[s, i, j].item() == pytest.approx(cosine.item(), rel=1e-4)
                    assert record.edge_gate[s, i, j].item() == pytest.approx(e.mean().item(), rel=1e-4)
                    assert record.message[s, i, j].item() == pytest.approx(m.norm().item(), rel=1e-4)
                    total = total + m
                step = layer.w_up.weight @ total
                assert record.update[s, i].item() == pytest.approx(step.norm().item(), rel=1e-4)
                assert record.node[s, i].item() == pytest.approx(nodes[i].norm().item(), rel=1e-4)
                new.append(nodes[i] + step)
            nodes = new


@pytest.mark.parametrize("aggregator", ["sum", "shared", "mlp", "dag"])
def test_recording_changes_nothing(aggregator):
    """Logits and losses are bit-identical with records; a record per layer, whose norms are those of the update."""
    torch.manual_seed(0)
    model = randomize(GPT(tiny_config(aggregator=aggregator)))
    tokens = torch.randint(23, (2, 16), generator=torch.Generator().manual_seed(1))
    records = []
    plain, recorded = model(tokens, tokens), model(tokens, tokens, records)
    assert torch.equal(plain.logits, recorded.logits) and torch.equal(plain.loss, recorded.loss)
    assert len(records) == 2
    for i, record in enumerate(records):
        slots = torch.bincount(record.expert.flatten(), minlength=8)
        assert record.expert.shape == record.gate.shape == (32, 3) and torch.equal(slots, plain.router.load[i])
        assert (record.gate.sum(dim=1) - 1).abs().max() <= 1e-5
        assert len(record.depths) == (2 if aggregator == "dag" else 0)
        beyond = (record.beyond_sum / record.update).max().item()
        assert beyond < 1e-4 if aggregator == "sum" else beyond > 0.1


def test_norms_of_the_record_are_those_of_the_moe():
    """update and beyond_sum are the norms of h' - h and of its part that a weighted sum would not have added."""
    torch.manual_seed(0)
    moe = randomize(MoE(tiny_config()))
    h = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    records = []
    update = moe(h, records)[0] - h
    x = moe.norm(h).view(7, 32)
    gate, expert, _ = moe.router(x)
    weighted = (gate.unsqueeze(-1) * moe.experts(x, expert)).sum(dim=1)
    beyond_sum = update.view(7, 32) - weighted
    assert_same(
        {"update": records[0].update, "beyond_sum": records[0].beyond_sum},
        {"update": update.view(7, 32).norm(dim=-1), "beyond_sum": beyond_sum.norm(dim=-1)},
        1e-5,
    )


# Memory


@pytest.mark.parametrize("top_k", [2, 8])
def test_what_is_kept_for_the_backward_pass_grows_with_k(top_k):
    """A depth beyond the first keeps at most 1.5 times the bytes of one (S, K, C) tensor, and K² edges nothing."""
    S, C = 1024, 512

    def kept(depth: int) -> int:
        aggregator = DAGAggregator(tiny_config(n_embd=C, dag_dim=128, dag_depth=depth, top_k=top_k))
        inputs = random_inputs(tiny_config(n_embd=C, top_k=top_k), S, torch.float32)
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        return kept_bytes(lambda: aggregator(**inputs))

    one = S * top_k * C * 4
    assert one < kept(2) - kept(1) <= 1.5 * one and one < kept(3) - kept(2) <= 1.5 * one
