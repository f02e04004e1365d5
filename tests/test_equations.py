"""The graph, router and experts equal the paper's equations, computed one edge at a time."""

import re
import textwrap

import pytest
import torch
import torch.nn.functional as F

from model import DAGAggregator, DAGLayer, Experts, ModelConfig, MoE, Router, WeightedSum
from tests.conftest import REPOSITORY
from tests.reference import (
    assert_same,
    plain_dag,
    plain_experts,
    plain_swiglu,
    randomize,
    results_and_gradients,
    tiny_config,
)


def random_inputs(config: ModelConfig, tokens: int, dtype=torch.float64) -> dict:
    """Draw what the aggregator gets: h (S, C), outputs (S, K, C) and weights (S, K)."""
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
    """The value and the gradients of h, outputs, weights and matrices are those of Eq. 6 to 12."""
    config = tiny_config(dag_depth=depth, top_k=top_k, dag_gate=gate_name)
    graph = randomize(DAGAggregator(config)).to(dtype)
    inputs = random_inputs(config, tokens=5, dtype=dtype)
    ours = results_and_gradients(graph, inputs, graph)
    plain = results_and_gradients(lambda **x: plain_dag(graph, gate_name, **x), inputs, graph)
    assert len(ours) == 1 + 3 + 5 * depth
    assert all(x.abs().max() > 1e-3 for x in ours.values()), "what vanishes tests nothing"
    assert_same(ours, plain, tolerance)


def test_the_five_lines_of_the_readme_compute_the_sum():
    """In an MoE of somebody else's a new graph changes nothing before it is trained."""
    x = random_inputs(ModelConfig(n_embd=512, top_k=4), tokens=7, dtype=torch.float32)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    first_line = "    from model import DAGAggregator, ModelConfig"
    lines = readme[readme.index(first_line) :].splitlines()[:5]
    expected = x["h"] + (x["weight"].unsqueeze(-1) * x["out"]).sum(dim=1)
    exec(textwrap.dedent("\n".join(lines)), x)
    assert (x["h"] - expected).abs().max() < 1e-5


def test_an_edge_has_a_gate_per_channel():
    """The D gates of an edge differ, and each depends on both of its ends."""
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


def test_the_worked_example_of_the_readme_is_what_the_code_computes():
    """Gates, messages, nodes and result; [s, i, j] is the edge from node j to node i."""
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
    results = [gates, messages, layer(node), graph(h, out, weight)]
    numbers = torch.cat([result.flatten() for result in results]).tolist()
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    example = re.search(r"    h = \(2, 2\).*?\n\n", readme, re.DOTALL)
    assert re.findall(r"-?\d+\.\d\d", example[0]) == [f"{number:.2f}" for number in numbers]


@pytest.mark.parametrize("aggregator_class", [WeightedSum, DAGAggregator])
def test_the_order_of_the_experts_does_not_matter(aggregator_class):
    """A permutation of the K outputs, and of their weights, leaves the result as it is."""
    config = tiny_config(top_k=4)
    aggregator = randomize(aggregator_class(config)).double()
    x = random_inputs(config, tokens=6)
    order = [2, 0, 3, 1]
    permuted = aggregator(x["h"], x["out"][:, order], x["weight"][:, order])
    assert (permuted - aggregator(**x)).abs().max() < 1e-12


@pytest.mark.parametrize(("aggregator_class", "interacts"), [(WeightedSum, 0), (DAGAggregator, 1)])
def test_only_a_graph_lets_experts_interact(aggregator_class, interacts):
    """f(a,b) - f(a,0) - f(0,b) + f(0,0) in two outputs is zero for a sum: a DAG is none."""
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
    """Built alone, without GPT, it computes what WeightedSum computes, and W_up has a gradient."""
    config = tiny_config(dag_depth=3)
    graph = DAGAggregator(config).double()
    x = random_inputs(config, tokens=6)
    result = graph(**x)
    assert (result - WeightedSum(config)(**x)).abs().max() < 1e-12
    result.square().sum().backward()
    for layer in graph.layers:
        assert layer.w_up.weight.grad.abs().max() > 1e-3
        assert layer.w_edge.weight.grad.abs().max() == 0, "before W_up has left zero"


@pytest.mark.parametrize(("norm_topk", "top_k"), [(True, 3), (False, 3), (True, 1)])
def test_the_router_equals_a_loop_over_tokens(norm_topk, top_k):
    """Weights, experts and both losses are as the formulas have them."""
    router = randomize(Router(tiny_config(norm_topk=norm_topk, top_k=top_k))).double()
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight, expert, (balance_loss, z_loss) = router(x)
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
    assert (router.weight.grad.abs().amax(dim=1) > 0).all(), "experts that no token chose, too"


def test_the_router_is_not_rounded_by_autocast():
    """In a bfloat16 context it still computes in float32."""
    router = randomize(Router(tiny_config()))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    exact = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        weight, expert, aux = router(x)
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
    ids=["grouped_mm", "float64 loop", "unaligned loop"],
)
def test_experts_equal_a_loop_over_tokens(dtype, expert_dim, tolerance, is_grouped, monkeypatch):
    """Both ways to multiply are right, in every gradient, also where experts get no tokens."""
    calls = []
    grouped_mm = F.grouped_mm

    def counted(*arguments, **options):
        calls.append("grouped_mm")
        return grouped_mm(*arguments, **options)

    monkeypatch.setattr(F, "grouped_mm", counted)
    experts = randomize(Experts(tiny_config(), 8, expert_dim)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 32, generator=generator, dtype=dtype)
    rows = [torch.randperm(5, generator=generator)[:3] + 1 for _ in range(7)]  # never 0, 6 or 7
    inputs = {"x": x, "expert": torch.stack(rows)}
    fast = results_and_gradients(experts, inputs, experts)
    assert bool(calls) == is_grouped
    plain = results_and_gradients(lambda **x: plain_experts(experts, **x), inputs, experts)
    assert_same(fast, plain, tolerance)
    assert fast["grad gate_proj"][[0, 6, 7]].abs().max() == 0


def test_the_device_is_waited_for_once_per_layer(monkeypatch):
    """Without grouped_mm the sizes of the groups are read once, not for each of three products."""
    calls = []
    tolist = torch.Tensor.tolist

    def counted(tensor):
        calls.append("tolist")
        return tolist(tensor)

    experts = randomize(Experts(tiny_config(), 8, 6))  # which is not aligned
    expert = torch.tensor([[2, 0, 1], [2, 1, 0]])
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    experts(torch.randn(2, 32), expert)
    assert len(calls) == 1


def test_a_shared_expert_is_added_for_every_token():
    """With shared_dim the MoE is the MoE without, plus a SwiGLU of the normalised input."""
    moe = randomize(MoE(tiny_config(shared_dim=20), WeightedSum(tiny_config()))).double()
    h = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with_shared, _ = moe(h)
    shared = moe.shared
    moe.shared = None
    without, _ = moe(h)
    expected = plain_swiglu(
        shared.gate_proj[0], shared.up_proj[0], shared.down_proj[0], moe.norm(h)
    )
    assert (with_shared - without - expected).abs().max() < 1e-12
