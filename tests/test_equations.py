"""Graph, router and experts equal the paper's equations, computed one edge at a time."""

import runpy
from pathlib import Path

import pytest
import torch

from model import (
    DAGAggregator,
    DAGLayer,
    Experts,
    ModelConfig,
    MoE,
    Router,
    WeightedSum,
    has_grouped_kernel,
)
from tests.helpers import (
    REPOSITORY,
    assert_same,
    randomize,
    results_and_gradients,
    tiny_config,
)
from tests.reference import plain_dag, plain_experts, plain_router, plain_swiglu

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def random_inputs(config: ModelConfig, tokens: int, dtype=torch.float64) -> dict:
    """Draw what an aggregator gets: h (S, C), outputs (S, K, C) and weights (S, K)."""
    generator = torch.Generator().manual_seed(7)
    K, C = config.top_k, config.n_embd
    h = torch.randn(tokens, C, generator=generator, dtype=dtype)
    out = torch.randn(tokens, K, C, generator=generator, dtype=dtype)
    weight = torch.rand(tokens, K, generator=generator, dtype=dtype).softmax(-1)
    return {"h": h, "out": out, "weight": weight}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("gate_name", ["sigmoid", "silu"])
@pytest.mark.parametrize(("depth", "top_k"), [(1, 1), (1, 4), (2, 2), (3, 3)])
def test_the_graph_equals_the_papers_equations(depth, top_k, gate_name, dtype, tolerance):
    """The graph computes Eq. 6 to 12, and so are its gradients, in every input and every matrix."""
    config = tiny_config(dag_depth=depth, top_k=top_k, dag_gate=gate_name)
    graph = randomize(DAGAggregator(config)).to(dtype)
    inputs = random_inputs(config, tokens=5, dtype=dtype)
    ours = results_and_gradients(graph, inputs, graph)
    plain = results_and_gradients(lambda **x: plain_dag(graph, gate_name, **x), inputs, graph)
    assert len(ours) == 1 + 3 + 5 * depth
    assert all(x.abs().max() > 1e-3 for x in ours.values()), "a value of zero would test nothing"
    assert_same(ours, plain, tolerance)


def test_the_five_lines_of_the_readme_compute_the_sum():
    """A new graph, put into another MoE with the README's five lines, changes nothing."""
    x = random_inputs(ModelConfig(n_embd=512, top_k=4), tokens=7, dtype=torch.float32)
    expected = x["h"] + (x["weight"].unsqueeze(-1) * x["out"]).sum(dim=1)
    start = README.index("    from model import DAGAggregator, ModelConfig")
    lines = [line.removeprefix("    ") for line in README[start:].splitlines()[:5]]
    Path("five_lines.py").write_text("\n".join(lines), encoding="utf-8")
    h = runpy.run_path("five_lines.py", init_globals=x)["h"]
    assert (h - expected).abs().max() < 1e-5


def test_an_edge_has_a_gate_per_channel():
    """The D gates of an edge differ, and each of them depends on both ends of the edge."""
    config = tiny_config(top_k=2, dag_depth=1)
    layer = randomize(DAGLayer(config)).double()
    node = torch.randn(1, 2, config.n_embd, dtype=torch.float64)
    e, m = layer.edges(node)
    assert e.shape == m.shape == (1, 2, 2, config.dag_dim)
    assert e[0, 1, 0].std() > 0.1
    for changed in (0, 1):
        other = node.clone()
        other[0, changed] += torch.randn(config.n_embd, dtype=torch.float64)
        assert (layer.edges(other)[0][0, 1, 0] - e[0, 1, 0]).abs().min() > 0


def test_the_worked_example_of_the_readme():
    """The code computes the gates, messages, nodes and result that the README prints."""
    config = ModelConfig(n_embd=2, n_head=1, n_kv_head=1, top_k=2, dag_depth=1, dag_dim=1)
    graph = DAGAggregator(config)
    layer = graph.layers[0]
    layer.w_down.weight.data = torch.tensor([[0.0, 1.0]])
    layer.w_edge.weight.data = torch.tensor([[1.0, 2.0]])
    layer.w_node.weight.data = torch.tensor([[1.0, 3.0]])
    layer.w_up.weight.data = torch.tensor([[1.0], [0.0]])
    node = torch.tensor([[[4.0, 4.0], [1.0, -1.0]]])
    h = torch.tensor([[2.0, 2.0]])
    out = torch.tensor([[[4.0, 4.0], [0.0, -8.0]]])
    weight = torch.tensor([[0.75, 0.25]])
    gates, messages = layer.edges(node)
    first, second = layer(node)[0]
    to_first, to_second = messages[0]
    results = [gates, messages, to_first, first, to_second, second, graph(h, out, weight)]
    expected = [f"{number:.2f}" for result in results for number in result.flatten().tolist()]
    start = README.index("    all edges")
    example = README[start:].split("\n\n")[0]
    words = example.replace("(", " ").replace(")", " ").replace(",", " ").split()
    assert [word for word in words if word[-3:-2] == "."] == expected


@pytest.mark.parametrize("aggregator_class", [WeightedSum, DAGAggregator])
def test_the_order_of_the_experts_does_not_matter(aggregator_class):
    """Permuting the K outputs along with their weights leaves the result as it is."""
    config = tiny_config(top_k=4)
    aggregator = randomize(aggregator_class(config)).double()
    x = random_inputs(config, tokens=6)
    order = [2, 0, 3, 1]
    permuted = aggregator(x["h"], x["out"][:, order], x["weight"][:, order])
    assert (permuted - aggregator(**x)).abs().max() < 1e-12


@pytest.mark.parametrize(("aggregator_class", "interacts"), [(WeightedSum, 0), (DAGAggregator, 1)])
def test_only_a_graph_lets_experts_interact(aggregator_class, interacts):
    """As a function of two outputs, f(a, b) - f(a, 0) - f(0, b) + f(0, 0) is 0 for a sum only."""
    config = tiny_config(top_k=2)
    aggregator = randomize(aggregator_class(config)).double()
    x = random_inputs(config, tokens=6)
    mixed = 0
    for first, second in ((1, 1), (1, 0), (0, 1), (0, 0)):
        out = x["out"] * torch.tensor([first, second]).view(1, 2, 1)
        sign = 1 if first == second else -1
        mixed = mixed + sign * aggregator(x["h"], out, x["weight"])
    assert (mixed.abs().max() > 1e-2) == interacts
    assert interacts or mixed.abs().max() < 1e-12


def test_a_new_graph_is_a_weighted_sum():
    """A new graph computes the weighted sum, and of its four matrices only W_up has a gradient."""
    config = tiny_config(dag_depth=3)
    graph = DAGAggregator(config).double()
    x = random_inputs(config, tokens=6)
    result = graph(**x)
    assert (result - WeightedSum(config)(**x)).abs().max() < 1e-12
    result.square().sum().backward()
    for layer in graph.layers:
        assert layer.w_up.weight.grad.abs().max() > 1e-3
        for matrix in (layer.w_down, layer.w_edge, layer.w_node):
            assert matrix.weight.grad.abs().max() == 0


@pytest.mark.parametrize(("norm_topk", "top_k"), [(True, 3), (False, 3), (True, 1)])
def test_the_router_equals_a_loop_over_tokens(norm_topk, top_k):
    """Weights, choices, balance loss and z-loss are what their formulas say, token by token."""
    router = randomize(Router(tiny_config(norm_topk=norm_topk, top_k=top_k))).double()
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight, expert, balance_loss, z_loss = router(x)
    counts = [0] * 8
    mean_prob = torch.zeros(8, dtype=torch.float64)
    mean_z = 0.0
    for s in range(9):
        logits = router.weight @ x[s]
        prob = logits.exp() / logits.exp().sum()
        best = sorted(range(8), key=lambda e: -prob[e].item())[:top_k]
        assert expert[s].tolist() == best
        total = sum(prob[e] for e in best) if norm_topk and top_k > 1 else 1.0
        for i, e in enumerate(best):
            assert weight[s, i].item() == pytest.approx((prob[e] / total).item(), abs=1e-12)
            counts[e] += 1
        mean_prob += prob / 9
        mean_z += (logits.exp().sum().log() ** 2 / 9).item()
    expected = 8 * sum(counts[e] / (9 * top_k) * mean_prob[e].item() for e in range(8))
    assert balance_loss.item() == pytest.approx(expected, abs=1e-10)
    assert z_loss.item() == pytest.approx(mean_z, abs=1e-10)
    balance_loss.backward()
    assert (router.weight.grad.abs().amax(dim=1) > 0).all(), "also for experts that no token chose"


def test_the_router_is_not_rounded_by_autocast():
    """Under autocast to bfloat16 the router still computes in float32."""
    router = randomize(Router(tiny_config()))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    exact = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        weight, expert, balance_loss, z_loss = router(x)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, exact[0])
    assert torch.equal(expert, exact[1])


@pytest.mark.parametrize(
    ("dtype", "expert_dim", "tolerance", "is_grouped"),
    [
        (torch.float32, 16, 1e-5, True),
        (torch.float64, 16, 1e-10, False),
        (torch.float32, 6, 1e-5, False),
    ],
    ids=["grouped kernel", "loop in float64", "loop over unaligned rows"],
)
def test_experts_equal_a_loop_over_tokens(dtype, expert_dim, tolerance, is_grouped):
    """Both ways to multiply are right in every gradient, also where experts get no tokens."""
    experts = randomize(Experts(tiny_config(expert_dim=expert_dim))).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 32, generator=generator, dtype=dtype)
    assert has_grouped_kernel(x, experts.gate_proj) == is_grouped
    rows = [torch.randperm(5, generator=generator)[:3] + 1 for _ in range(7)]  # never 0, 6 or 7
    inputs = {"x": x, "expert": torch.stack(rows)}
    fast = results_and_gradients(experts, inputs, experts)
    plain = results_and_gradients(lambda **x: plain_experts(experts, **x), inputs, experts)
    assert_same(fast, plain, tolerance)
    assert fast["grad gate_proj"][[0, 6, 7]].abs().max() == 0


def test_experts_compute_in_bfloat16_under_autocast():
    """Autocast does not know the grouped kernel, but its dtype is used all the same."""
    experts = randomize(Experts(tiny_config()))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    expert = torch.tensor([[0, 3, 5]] * 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, expert)
    assert out.dtype == torch.bfloat16
    expected = plain_experts(experts, x, expert)
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("aggregator", ["sum", "dag"])
@pytest.mark.parametrize("shared_dim", [0, 20])
def test_an_moe_equals_its_parts(aggregator, shared_dim):
    """It routes RMSNorm(h), combines the outputs with h itself, and adds the shared expert."""
    config = tiny_config(aggregator=aggregator, shared_dim=shared_dim)
    moe = randomize(MoE(config)).double()
    h = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = moe.norm(h).flatten(0, 1)
    weight, expert = plain_router(moe.router.weight, x, config.top_k)
    out = plain_experts(moe.experts, x, expert)
    expected = moe.aggregate(h.flatten(0, 1), out, weight)
    if shared_dim > 0:
        projections = (moe.shared.gate_proj, moe.shared.up_proj, moe.shared.down_proj)
        expected = expected + plain_swiglu(*(linear.weight for linear in projections), x)
    new_h, balance_loss, z_loss = moe(h)
    assert (new_h - expected.view_as(h)).abs().max() < 1e-12
