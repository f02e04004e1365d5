"""The network: the graph against the paper's equations, router, experts, equality with Mixtral, generation, cost."""

import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import GPT, DAGAggregator, Experts, ModelConfig, Router, WeightedSum
from tests import reference
from tests.conftest import REPOSITORY
from tests.reference import assert_same, plain_dag, randomize, results_and_gradients, tiny_config

KINDS = {"sum": {"aggregator": "sum"}, "dag": {}, "dag+shared": {"shared_dim": 8}}
ALL = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def tiny_model(**changes) -> GPT:
    """A model with weights large enough that every part matters."""
    return randomize(GPT(tiny_config(**changes)))


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_inputs(config, tokens: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """h, out and gate of the seam."""
    generator = torch.Generator().manual_seed(7)
    h = torch.randn(tokens, config.n_embd, generator=generator, dtype=dtype)
    out = torch.randn(tokens, config.top_k, config.n_embd, generator=generator, dtype=dtype)
    gate = torch.rand(tokens, config.top_k, generator=generator, dtype=dtype).softmax(-1)
    return {"h": h, "out": out, "gate": gate}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("gate_name", ["sigmoid", "silu"])
@pytest.mark.parametrize(("depth", "top_k"), [(1, 1), (1, 4), (2, 2), (3, 3)])
def test_dag_equals_the_papers_equations(depth, top_k, gate_name, dtype, tolerance):
    """Value and the gradients of h, out, gate and every weight equal those of the plain Eq. 6 to 12."""
    config = tiny_config(dag_depth=depth, top_k=top_k, dag_gate=gate_name)
    aggregator = randomize(DAGAggregator(config)).to(dtype)
    inputs = random_inputs(config, tokens=5, dtype=dtype)
    ours = results_and_gradients(aggregator, inputs, aggregator)
    plain = results_and_gradients(lambda **x: plain_dag(aggregator, gate_name, **x), inputs, aggregator)
    assert len(ours) == 1 + 3 + 5 * depth
    assert all(x.abs().max() > 1e-3 for x in ours.values()), "what vanishes tests nothing"
    assert_same(ours, plain, tolerance)


def test_worked_example_of_the_readme():
    """Its gates, messages, nodes and result are those of the code; [s, i, j] is the edge from node j to node i."""
    graph = DAGAggregator(ModelConfig(n_embd=2, n_head=1, n_kv_head=1, top_k=2, dag_depth=1, dag_dim=1))
    layer, node = graph.layers[0], torch.tensor([[[4.0, 4.0], [1.0, -1.0]]])
    for name, weight in {"w_down": [[0, 1]], "w_edge": [[1, 2]], "w_node": [[1, 3]], "w_up": [[1], [0]]}.items():
        getattr(layer, name).weight.data = torch.tensor(weight).float()
    gate, out, h = torch.tensor([[0.75, 0.25]]), torch.tensor([[[4.0, 4.0], [0.0, -8.0]]]), torch.tensor([[2.0, 2.0]])
    results = torch.cat([x.flatten() for x in (*layer.edges(node), layer(node), graph(h, out, gate))]).tolist()
    example = re.search(r"    h = \(2, 2\).*?\n\n", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert re.findall(r"-?\d+\.\d\d", example[0]) == [f"{result:.2f}" for result in results]


@pytest.mark.parametrize("cls", [WeightedSum, DAGAggregator])
def test_mixed_second_difference(cls):
    """f(a,b) - f(a,0) - f(0,b) + f(0,0) in two expert outputs: zero for the sum, not for the DAG.

    So the DAG is no reparameterised linear combination of the expert outputs. For both, their order does not matter.
    """
    config = tiny_config(top_k=2)
    aggregator, x = randomize(cls(config)).double(), random_inputs(config, tokens=6)

    def f(first: float, second: float) -> torch.Tensor:
        return aggregator(x["h"], x["out"] * torch.tensor([first, second]).view(1, 2, 1), x["gate"])

    mixed = (f(1, 1) - f(1, 0) - f(0, 1) + f(0, 0)).abs().max().item()
    assert mixed < 1e-12 if cls is WeightedSum else mixed > 1e-2
    permuted = aggregator(x["h"], x["out"].flip(1), x["gate"].flip(1))
    assert (permuted - aggregator(**x)).abs().max() < 1e-12


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss(top_k):
    """1 when balanced for any K; E/K when collapsed onto K experts, whose gradient reaches all the others, too."""
    E = 8
    router = Router(tiny_config(n_expert=E, top_k=top_k))
    with torch.no_grad():
        router.weight.zero_()[:, :E] = torch.eye(E)
    # Token s prefers experts s, s+1, …, s+K-1 equally: every expert is chosen equally often.
    balanced = torch.zeros(E, 32)
    for s in range(E):
        for i in range(top_k):
            balanced[s, (s + i) % E] = 20.0
    assert router(balanced)[2][0].item() == pytest.approx(1.0, abs=1e-4)
    collapsed = torch.zeros(E, 32)
    collapsed[:, :top_k] = 20.0
    _, expert, (balance, _) = router(collapsed)
    assert balance.item() == pytest.approx(E / top_k, rel=1e-4)
    assert expert.flatten().bincount(minlength=E).tolist() == [E] * top_k + [0] * (E - top_k)
    router(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))[2][0].backward()
    assert (router.weight.grad.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize(("norm_topk", "top_k"), [(True, 3), (False, 3), (True, 1)])
def test_router_equals_a_loop(norm_topk, top_k):
    """Gates, experts and both losses as the formulas have them, token by token; no rounding under autocast."""
    router = randomize(Router(tiny_config(norm_topk=norm_topk, top_k=top_k))).double()
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate, expert, (balance, z) = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (router.float()(x.float())[0] - gate).abs().max() < 1e-5
    router.double()
    expected_load, mean_prob, expected_z = [0] * 8, torch.zeros(8, dtype=torch.float64), 0.0
    for s in range(9):
        logits = router.weight @ x[s]
        prob = logits.exp() / logits.exp().sum()
        best = sorted(range(8), key=lambda e: -prob[e].item())[:top_k]
        assert expert[s].tolist() == best
        total = sum(prob[e] for e in best) if norm_topk and top_k > 1 else 1.0
        for i, e in enumerate(best):
            assert gate[s, i].item() == pytest.approx((prob[e] / total).item(), abs=1e-12)
            expected_load[e] += 1
        mean_prob += prob / 9
        expected_z += (logits.exp().sum().log() ** 2 / 9).item()
    assert z.item() == pytest.approx(expected_z, abs=1e-10)
    expected = 8 * sum(expected_load[e] / (9 * top_k) * mean_prob[e].item() for e in range(8))
    assert balance.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("dtype", "expert_dim", "tolerance"),
    [(torch.float32, 16, 1e-5), (torch.float64, 16, 1e-10), (torch.float32, 6, 1e-5)],
    ids=["grouped_mm", "float64 loop", "unaligned loop"],
)
def test_experts_equal_a_loop_over_tokens(dtype, expert_dim, tolerance, monkeypatch):
    """Both ways to multiply (one grouped product, or a loop over experts) with experts that get no token."""
    used, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: used.append(1) or grouped_mm(*a, **k))
    experts = randomize(Experts(tiny_config(), 8, expert_dim)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 32, generator=generator, dtype=dtype)
    expert = torch.stack([torch.randperm(5, generator=generator)[:3] + 1 for _ in range(7)])  # 0, 6 and 7 stay empty
    inputs = {"x": x, "expert": expert}
    fast = results_and_gradients(experts, inputs, experts)
    assert bool(used) == (dtype == torch.float32 and expert_dim == 16)
    plain = results_and_gradients(lambda **x: reference.plain_experts(experts, **x), inputs, experts)
    assert_same(fast, plain, tolerance)
    assert fast["grad gate_proj"][[0, 6, 7]].abs().max() == 0


@pytest.mark.parametrize("tie", [True, False])
def test_sum_equals_hugging_face_mixtral(tie):
    """With `sum` the network is Mixtral: same weights, same logits, same loss gradients (float32, 1e-4)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    ours = tiny_model(aggregator="sum", tie_embeddings=tie, rope_theta=5000.0)
    config = ours.config
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.expert_dim,
            num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
            num_local_experts=config.n_expert, num_experts_per_tok=config.top_k, tie_word_embeddings=tie,
            max_position_embeddings=config.block_size, rms_norm_eps=1e-5, hidden_act="silu", sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, pad_token_id=None,
            bos_token_id=None, eos_token_id=None, attn_implementation="eager",
        )
    ).float()  # fmt: skip
    names = {"model.embed_tokens.weight": ours.embed.weight, "model.norm.weight": ours.norm.weight}
    names["lm_head.weight"] = ours.head.weight
    for i, block in enumerate(ours.blocks):
        experts = block.moe.experts
        layer = {
            "input_layernorm.weight": block.norm.weight,
            "post_attention_layernorm.weight": block.moe.norm.weight,
            "mlp.gate.weight": block.moe.router.weight,
            "mlp.experts.gate_up_proj": torch.cat([experts.gate_proj, experts.up_proj], dim=1),
            "mlp.experts.down_proj": experts.down_proj,
        }
        for p in "qkvo":
            layer[f"self_attn.{p}_proj.weight"] = getattr(block.attention, f"{p}_proj").weight
        names |= {f"model.layers.{i}.{name}": weight for name, weight in layer.items()}
    theirs.load_state_dict({name: weight.detach() for name, weight in names.items()}, strict=True)
    tokens, targets = random_tokens(3, 16), random_tokens(3, 16, seed=1)
    logits = theirs(tokens).logits
    output = ours(tokens, targets)
    assert logits.abs().max() > 1, "logits that are nearly zero compare nothing"
    assert (output.logits - logits).abs().max() <= 1e-4
    output.loss.backward()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {"embed": theirs.model.embed_tokens.weight.grad}  # which depends on everything
    assert_same({"embed": ours.embed.weight.grad}, gradients, 1e-4)


@ALL
@pytest.mark.parametrize("training", [True, False])
def test_no_leak_from_the_future_or_from_other_rows(changes, training):
    """Logits at t change neither with later tokens nor with other rows of the batch, training or not."""
    model = tiny_model(**changes).train(training)
    tokens = random_tokens(4, 16)
    logits = model(tokens).logits
    future = tokens.clone()
    future[:, 10:] = (future[:, 10:] + 1) % 23
    changed = model(future).logits
    assert (changed[:, :10] - logits[:, :10]).abs().max() <= 1e-5
    assert (changed[:, 10:] - logits[:, 10:]).abs().max() > 1e-2
    rows = tokens.clone()
    rows[1:] = (rows[1:] + 5) % 23
    assert (model(rows).logits[0] - logits[0]).abs().max() <= 1e-5
    assert (model(tokens[:1]).logits[0] - logits[0]).abs().max() <= 1e-5


def test_forward_always_returns_the_same_thing():
    """Logits, loss, both auxiliary losses as means over layers; targets of -1 are ignored."""
    model = tiny_model()
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    aux = []
    hooks = [block.moe.router.register_forward_hook(lambda *a: aux.append(a[2][2])) for block in model.blocks]
    without = model(tokens)
    for hook in hooks:
        hook.remove()
    with_targets = model(tokens, targets)
    assert without.loss is None and torch.equal(without.logits, with_targets.logits)
    plain = F.cross_entropy(without.logits.flatten(0, 1), targets.flatten())
    assert with_targets.loss.item() == pytest.approx(plain.item(), abs=1e-6)
    assert without.balance.item() == pytest.approx(sum(a[0].item() for a in aux) / 2, abs=1e-6)
    assert without.z.item() == pytest.approx(sum(a[1].item() for a in aux) / 2, abs=1e-5)
    masked = targets.clone()
    masked[:, 5:] = -1
    part = F.cross_entropy(without.logits[:, :5].flatten(0, 1), targets[:, :5].flatten())
    assert model(tokens, masked).loss.item() == pytest.approx(part.item(), abs=1e-6)
    with pytest.raises(ValueError, match="17 tokens do not fit block_size 16"):
        model(random_tokens(1, 17))


@ALL
def test_one_batch_overfits(changes):
    """At most two hundred steps on one batch bring the loss below 0.05."""
    torch.manual_seed(0)
    model = GPT(tiny_config(**changes, n_embd=64, expert_dim=64))
    tokens = random_tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(200):
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        if loss.item() < 0.05:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pytest.fail(f"the loss is still {loss.item():.3f}")


def test_initialisation():
    """normal(0, 0.02); what writes into the residual stream smaller by sqrt(2·n_layer); W_up zero; norms one."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=3, tie_embeddings=False, shared_dim=64))
    small = {"o_proj", "down_proj"}
    for name, weight in model.named_parameters():
        part = name.removesuffix(".weight").split(".")[-1]
        if weight.dim() == 1 or part == "w_up":
            assert (weight == (1.0 if weight.dim() == 1 else 0.0)).all(), name
        else:
            std = 0.02 / math.sqrt(6) if part in small else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.1) and abs(weight.mean().item()) <= 0.1 * std, name
    assert not torch.equal(model.blocks[0].attention.q_proj.weight, model.blocks[1].attention.q_proj.weight)


@ALL
def test_compiles_without_breaks_in_bfloat16(changes):
    """torch.compile(fullgraph=True) under bfloat16 autocast computes the same, and compiles nothing more after once."""
    torch._dynamo.reset()
    model, tokens = tiny_model(**changes), random_tokens(2, 16)

    def step(network):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = network(tokens, tokens)
        (out.loss + out.balance).backward()
        return {"loss": out.loss.detach(), "grad": model.blocks[0].attention.o_proj.weight.grad.clone()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own deprecations
        network = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled = step(network)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(step(network), compiled, 1e-6)
    assert_same(compiled, step(model), 2e-2)


def generate(model: GPT, tokens: torch.Tensor, count: int, **choice) -> list[list[int]]:
    return torch.stack(list(model.generate(tokens, count, **choice)), dim=1).tolist()


@ALL
@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_cached_generation_equals_uncached(changes, length):
    """Greedy tokens with the cache are those of whole forward passes over the documented window, far beyond it."""
    model, tokens = tiny_model(**changes), random_tokens(2, length)
    cached = generate(model, tokens, 40, temperature=0)
    window = tokens[:, -16:]
    for _ in range(40):
        new = model(window).logits[:, -1].argmax(-1, keepdim=True)
        tokens, window = torch.cat([tokens, new], dim=1), torch.cat([window, new], dim=1)
        window = window[:, -8:] if window.shape[1] > 16 else window
    assert cached == tokens[:, length:].tolist()
    assert len({token for row in cached for token in row}) > 5, "a model that repeats itself tests little"


def test_choice_of_the_next_token():
    """Temperature, top_k, top_p and n_token restrict the choice as documented; a seed repeats it."""
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def chosen(**choice) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {model_module.choose(logits, generator=generator, **choice).item() for _ in range(200)}

    assert chosen() == {0, 1, 2, 3} == chosen(top_k=100) == chosen(top_p=1.0)
    assert chosen(temperature=0) == {0} == chosen(top_k=1) == chosen(top_p=0.4) == chosen(temperature=0.05)
    assert chosen(temperature=1e-45) == {0} == chosen(top_p=1e-45)
    assert chosen(top_k=3) == {0, 1, 2} == chosen(top_p=0.8)
    model, start = tiny_model(), random_tokens(2, 3)
    first = generate(model, start, 30, generator=torch.Generator().manual_seed(4))
    assert first == generate(model, start, 30, generator=torch.Generator().manual_seed(4))
    assert max(max(row) for row in first) > 10
    assert max(max(row) for row in generate(model, start, 30, n_token=10)) < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 30}, "n_embd must be a multiple of 2·n_head, got .*'n_head': 4, 'n_embd': 30"),
        ({"n_kv_head": 3}, "n_head must be a multiple of n_kv_head, got .*'n_head': 4, 'n_kv_head': 3"),
        ({"top_k": 9}, "top_k must not exceed n_expert, got .*'n_expert': 8, 'top_k': 9"),
        ({"n_layer": 0}, r"n_layer must be at least 1 and below 2\*\*31, got 0"),
        ({"n_layer": 10**6}, "must not exceed 1000, got .*'n_layer': 1000000"),
        ({"shared_dim": -1}, "shared_dim must be at least 0"),
        ({"block_size": 1}, "block_size must be at least 2, got .*'block_size': 1"),
        ({"dag_depth": 1.5}, "dag_depth must be of type int, got 1.5"),
        ({"n_expert": True}, "n_expert must be of type int, got True"),
        ({"rope_theta": math.nan}, "rope_theta must lie between 1 and 1e30, got .*nan"),
        ({"aggregator": "mean"}, "aggregator must be one of sum, dag.*, got .*'mean'"),
        ({"dag_gate": "relu"}, "dag_gate must be one of sigmoid, silu, got .*'relu'"),
    ],
)
def test_nonsense_is_refused(changes, message):
    """A configuration that can't be built is refused with the numbers in the message."""
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
