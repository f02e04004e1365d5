"""The graph, router and experts equal the paper's equations, computed one edge at a time."""

import re

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

PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)


def random_inputs(config: ModelConfig, tokens: int, dtype=torch.float64) -> dict:
    """Draw what the aggregator gets: h (S, C), outputs (S, K, C) and weights (S, K)."""
    generator = torch.Generator().manual_seed(7)
    K, C = config.top_k, config.n_embd
    h = torch.randn(tokens, C, generator=generator, dtype=dtype)
    out = torch.randn(tokens, K, C, generator=generator, dtype=dtype)
    weight = torch.rand(tokens, K, generator=generator, dtype=dtype).softmax(-1)
    return {"h": h, "out": out, "weight": weight}


@PRECISIONS
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
def test_only_the_graph_lets_experts_interact(aggregator_class):
    """f(a,b) - f(a,0) - f(0,b) + f(0,0) in two outputs is zero for the sum, and not for the DAG.

    So the DAG is no linear combination of the experts' outputs in disguise.
    """
    config = tiny_config(top_k=2)
    aggregator = randomize(aggregator_class(config)).double()
    x = random_inputs(config, tokens=6)

    def f(first: float, second: float) -> torch.Tensor:
        scale = torch.tensor([first, second]).view(1, 2, 1)
        return aggregator(x["h"], x["out"] * scale, x["weight"])

    mixed = (f(1, 1) - f(1, 0) - f(0, 1) + f(0, 0)).abs().max().item()
    if aggregator_class is WeightedSum:
        assert mixed < 1e-12
    else:
        assert mixed > 1e-2


@pytest.mark.parametrize("aggregator_class", [WeightedSum, DAGAggregator])
def test_the_order_of_the_experts_does_not_matter(aggregator_class):
    """A permutation of the K outputs, and of their weights, leaves the result as it is."""
    config = tiny_config(top_k=4)
    aggregator = randomize(aggregator_class(config)).double()
    x = random_inputs(config, tokens=6)
    order = [2, 0, 3, 1]
    permuted = aggregator(x["h"], x["out"][:, order], x["weight"][:, order])
    assert (permuted - aggregator(**x)).abs().max() < 1e-12


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


def route(router: Router, x: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Return the expert ids, the balance loss and the z-loss."""
    _, expert, (balance_loss, z_loss) = router(x)
    return expert, balance_loss.item(), z_loss.item()


def preferring_router(n_expert: int, top_k: int) -> Router:
    """Make a router whose logit of expert e is channel e of its input."""
    router = Router(tiny_config(n_expert=n_expert, top_k=top_k))
    torch.nn.init.eye_(router.weight)
    return router


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_balance_loss_of_balanced_experts_is_one(top_k):
    """Token s prefers experts s to s + K - 1 alike, so all are chosen equally often."""
    router = preferring_router(8, top_k)
    x = torch.zeros(8, 32)
    for s in range(8):
        for i in range(top_k):
            x[s, (s + i) % 8] = 20.0
    assert route(router, x)[1] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_balance_loss_of_collapsed_experts_is_their_number_over_k(top_k):
    """All tokens prefer the same K experts."""
    router = preferring_router(8, top_k)
    x = torch.zeros(8, 32)
    x[:, :top_k] = 20.0
    expert, balance_loss, _ = route(router, x)
    assert expert.flatten().bincount(minlength=8).tolist() == [8] * top_k + [0] * (8 - top_k)
    assert balance_loss == pytest.approx(8 / top_k, rel=1e-4)


def test_the_balance_loss_reaches_the_logits_of_all_experts():
    """Experts that no token chose get a gradient, too."""
    router = preferring_router(8, 2)
    _, _, (balance_loss, _) = router(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    balance_loss.backward()
    assert (router.weight.grad.abs().amax(dim=1) > 0).all()


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


def test_the_five_slots_in_the_comment_are_sorted_as_it_says():
    """expert = [2, 0, 2, 1, 0] gives order = [1, 4, 3, 0, 2] and ends = [2, 3, 5]."""
    expert = torch.tensor([2, 0, 2, 1, 0])
    assert expert.argsort(stable=True).tolist() == [1, 4, 3, 0, 2]
    assert F.one_hot(expert, 3).sum(dim=0).cumsum(dim=0).tolist() == [2, 3, 5]


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
