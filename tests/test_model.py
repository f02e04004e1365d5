"""The network: router, experts, causality, equality with Hugging Face's Mixtral, generation, sizes and costs."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from model import GPT, Experts, ModelConfig, Router, RouterStats, balance_loss, window_start
from tests.reference import (
    assert_same,
    plain_experts,
    plain_swiglu,
    randomize,
    results_and_gradients,
    rms_norm,
    tiny_config,
)  # fmt: skip

ALL = pytest.mark.parametrize("aggregator", model_module.AGGREGATORS)


def tiny_model(**changes) -> GPT:
    """A model with weights large enough that every part matters."""
    return randomize(GPT(tiny_config(**changes)))


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(seed))


# Router


def balance_of(stats: RouterStats) -> torch.Tensor:
    """The balance loss of one layer."""
    return balance_loss(stats.load[None], stats.prob[None])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss(top_k):
    """1 when balanced for any K; E/K when collapsed onto K experts."""
    E = 8
    config = tiny_config(n_expert=E, top_k=top_k, n_embd=32)
    router = Router(config)
    with torch.no_grad():
        router.weight.zero_()[:, :E] = torch.eye(E)
    # Token s prefers experts s, s+1, …, s+K-1 equally: every expert is chosen equally often.
    balanced = torch.zeros(E, 32)
    for s in range(E):
        for i in range(top_k):
            balanced[s, (s + i) % E] = 20.0
    assert balance_of(router(balanced)[2]).item() == pytest.approx(1.0, abs=1e-4)
    collapsed = torch.zeros(E, 32)
    collapsed[:, :top_k] = 20.0
    _, expert, stats = router(collapsed)
    assert balance_of(stats).item() == pytest.approx(E / top_k, rel=1e-4)
    assert stats.load.tolist() == [E] * top_k + [0] * (E - top_k)
    assert set(expert.flatten().tolist()) == set(range(top_k))


def test_balance_gradient_reaches_unselected_experts():
    """Every expert's router weights get a gradient from the balance loss, also those no token selected."""
    router = randomize(Router(tiny_config(n_expert=8, top_k=1)))
    _, expert, stats = router(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    balance_of(stats).backward()
    unselected = [e for e in range(8) if e not in expert]
    assert len(unselected) == 7
    assert (router.weight.grad[unselected].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("norm_topk", [True, False])
def test_router_equals_a_loop(norm_topk):
    """Gates, experts, load, both losses and the largest logit as the formulas have them, token by token."""
    config = tiny_config(norm_topk=norm_topk)
    router = randomize(Router(config)).double()
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate, expert, stats = router(x)
    load, mean_prob, z, max_logit = [0] * 8, torch.zeros(8, dtype=torch.float64), 0.0, 0.0
    for s in range(9):
        logits = router.weight @ x[s]
        prob = logits.exp() / logits.exp().sum()
        best = sorted(range(8), key=lambda e: -prob[e].item())[:3]
        assert expert[s].tolist() == best
        total = sum(prob[e] for e in best) if norm_topk else 1.0
        for i, e in enumerate(best):
            assert gate[s, i].item() == pytest.approx((prob[e] / total).item(), abs=1e-12)
            load[e] += 1
        mean_prob += prob / 9
        z += (logits.exp().sum().log() ** 2 / 9).item()
        max_logit = max(max_logit, *(abs(x) for x in logits.tolist()))
    assert stats.load.tolist() == load
    assert stats.z.item() == pytest.approx(z, abs=1e-10)
    assert stats.max_logit.item() == pytest.approx(max_logit, abs=1e-12) and not stats.max_logit.requires_grad
    assert router(-x)[2].max_logit.item() == pytest.approx(max_logit, abs=1e-12), "by absolute value"
    balance = 8 * sum(load[e] / 27 * mean_prob[e].item() for e in range(8))
    assert balance_of(stats).item() == pytest.approx(balance, abs=1e-10)


def test_balance_loss_of_parts_averages_to_that_of_the_whole():
    """With the whole batch's load, the losses of a batch's parts, and their gradients, average to the whole's."""
    router = randomize(Router(tiny_config())).double()
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = router(x)[2]
    halves = [router(part)[2] for part in x.split(6)]
    losses = [balance_loss(whole.load[None], half.prob[None]) for half in halves]
    gradients = [torch.autograd.grad(loss, router.weight)[0] for loss in (balance_of(whole), sum(losses) / 2)]
    assert sum(losses).item() / 2 == pytest.approx(balance_of(whole).item(), abs=1e-12)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12
    assert sum(balance_of(half) for half in halves).item() / 2 != pytest.approx(balance_of(whole).item(), abs=1e-3)
    layers = torch.stack([whole.load, halves[0].load]), torch.stack([whole.prob, halves[0].prob])
    mean = (balance_of(whole) + balance_of(halves[0])).item() / 2
    assert balance_loss(*layers).item() == pytest.approx(mean, abs=1e-12)


def test_router_keeps_full_precision_under_autocast():
    """bfloat16 autocast changes neither the selection nor the gates."""
    router = randomize(Router(tiny_config()))
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))
    gate, expert, _ = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        gate16, expert16, _ = router(x)
    assert torch.equal(expert, expert16) and torch.equal(gate, gate16) and gate16.dtype == torch.float32


# Experts


@pytest.mark.parametrize(
    ("dtype", "expert_dim", "tolerance"),
    [(torch.float32, 16, 1e-5), (torch.float64, 16, 1e-10), (torch.float32, 6, 1e-5)],
    ids=["grouped_mm", "float64 loop", "unaligned loop"],
)
def test_experts_equal_a_loop_over_tokens(dtype, expert_dim, tolerance, monkeypatch):
    """Both ways to multiply (one grouped product, or a loop over experts) with experts that get no token."""
    used = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: used.append(1) or grouped_mm(*a, **k))
    experts = randomize(Experts(tiny_config(expert_dim=expert_dim))).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 32, generator=generator, dtype=dtype)
    expert = torch.stack([torch.randperm(5, generator=generator)[:3] + 1 for _ in range(7)])  # 0, 6 and 7 stay empty
    fast = results_and_gradients(experts, {"x": x, "expert": expert}, experts)
    assert bool(used) == (dtype == torch.float32 and expert_dim == 16)
    plain = results_and_gradients(
        lambda x, expert: plain_experts(experts, x, expert), {"x": x, "expert": expert}, experts
    )
    assert_same(fast, plain, tolerance)
    assert fast["grad gate_proj"][[0, 6, 7]].abs().max() == 0


def test_experts_for_few_tokens_equal_a_loop():
    """Two tokens' six slots are fewer than the eight experts, so the slots' weights are fetched instead."""
    experts = randomize(Experts(tiny_config()))
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    inputs = {"x": x, "expert": torch.tensor([[3, 0, 5], [7, 3, 1]])}
    plain = results_and_gradients(lambda x, expert: plain_experts(experts, x, expert), inputs, experts)
    assert_same(results_and_gradients(experts, inputs, experts), plain, 1e-5)


# The whole network


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
    mine, other = ours.blocks[0], theirs.model.layers[0]
    assert_same(
        {"embed": ours.embed.weight.grad, "q": mine.attention.q_proj.weight.grad, "x": mine.moe.experts.down_proj.grad},
        {"embed": theirs.model.embed_tokens.weight.grad, "q": other.self_attn.q_proj.weight.grad,
         "x": other.mlp.experts.down_proj.grad},
        1e-4,
    )  # fmt: skip


@ALL
@pytest.mark.parametrize("training", [True, False])
def test_no_leak_from_the_future_or_from_other_rows(aggregator, training):
    """Logits at t change neither with later tokens nor with other rows of the batch, training or not."""
    model = tiny_model(aggregator=aggregator).train(training)
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
    """Logits, loss, router statistics of every layer; targets of -1 are ignored; load counts every slot."""
    model = tiny_model()
    tokens, targets = random_tokens(2, 16), random_tokens(2, 16, seed=1)
    without, with_targets = model(tokens), model(tokens, targets)
    assert without.loss is None and torch.equal(without.logits, with_targets.logits)
    plain = F.cross_entropy(without.logits.flatten(0, 1), targets.flatten())
    assert with_targets.loss.item() == pytest.approx(plain.item(), abs=1e-6)
    router = without.router
    assert router.load.shape == (2, 8) and (router.load.sum(dim=1) == 2 * 16 * 3).all()
    assert router.prob.shape == (2, 8) and router.z.shape == router.max_logit.shape == (2,)

    masked = targets.clone()
    masked[:, 5:] = -1
    part = F.cross_entropy(without.logits[:, :5].flatten(0, 1), targets[:, :5].flatten())
    assert model(tokens, masked).loss.item() == pytest.approx(part.item(), abs=1e-6)
    with pytest.raises(ValueError, match="17 tokens do not fit block_size 16"):
        model(random_tokens(1, 17))


@ALL
def test_one_batch_overfits(aggregator):
    """At most two hundred steps on one batch bring the loss below 0.05."""
    torch.manual_seed(0)
    model = GPT(tiny_config(aggregator=aggregator, n_embd=64, expert_dim=64))
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
    model = GPT(ModelConfig(n_layer=3, tie_embeddings=False))
    small = 0.02 / math.sqrt(6)
    block = model.blocks[1]
    layer = block.moe.aggregate.layers[0]
    for std, weights in {
        0.02: [
            model.embed.weight, model.head.weight, block.attention.q_proj.weight, block.attention.k_proj.weight,
            block.attention.v_proj.weight, block.moe.router.weight, block.moe.experts.gate_proj,
            block.moe.experts.up_proj, layer.w_down.weight, layer.w_edge.weight, layer.w_node.weight,
        ],
        small: [block.attention.o_proj.weight, block.moe.experts.down_proj],
        0.0: [layer.w_up.weight],
    }.items():  # fmt: skip
        for weight in weights:
            assert weight.std().item() == pytest.approx(std, rel=0.1)
            assert abs(weight.mean().item()) <= 0.1 * std
    assert all((p == 1).all() for p in model.parameters() if p.dim() == 1)
    torch.manual_seed(0)
    again = GPT(ModelConfig(n_layer=3, tie_embeddings=False))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(GPT(again.config).embed.weight, again.embed.weight), "another draw, another model"


@pytest.mark.slow
@ALL
def test_compiles_without_breaks_in_bfloat16(aggregator):
    """torch.compile(fullgraph=True) under bfloat16 autocast computes the same, and compiles nothing more after once."""
    torch._dynamo.reset()
    model = tiny_model(aggregator=aggregator)
    tokens = random_tokens(2, 16)

    def step(network):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = network(tokens, tokens)
        (out.loss + balance_loss(out.router.load, out.router.prob)).backward()
        return {"loss": out.loss.detach(), "grad": model.blocks[0].attention.o_proj.weight.grad.clone()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own deprecations
        network = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled = step(network)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(step(network), compiled, 1e-6)
    assert_same(compiled, step(model), 2e-2)


@pytest.mark.parametrize("aggregator", [name for name in model_module.AGGREGATORS if name != "dense"])
def test_bfloat16_is_close_to_float32(aggregator):
    """Autocast reaches every product, grouped ones included, and changes the loss by rounding only."""
    model = GPT(ModelConfig(aggregator=aggregator, n_layer=2))
    tokens = random_tokens(2, 64)
    exact = model(tokens, tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        x = model.embed(tokens).view(-1, 128)
        assert model.blocks[0].moe.experts(x, torch.zeros(128, 4, dtype=torch.long)).dtype == torch.bfloat16
        rounded = model(tokens, tokens).loss
    assert 0 < abs(exact.item() - rounded.item()) < 0.02


# Generation


def generate(model: GPT, tokens: torch.Tensor, count: int, **choice) -> list[list[int]]:
    return torch.stack(list(model.generate(tokens, count, **choice)), dim=1).tolist()


@ALL
def test_cached_generation_equals_uncached(aggregator):
    """Greedy tokens with the cache are those of whole forward passes over the documented window, far beyond it."""
    model = tiny_model(aggregator=aggregator)
    tokens = random_tokens(2, 5)
    cached = generate(model, tokens, 40, temperature=0)
    for _ in range(40):
        window = tokens[:, window_start(tokens.shape[1], 16) :]
        assert window.shape[1] <= 16
        tokens = torch.cat([tokens, model(window).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert cached == tokens[:, 5:].tolist()
    assert len({token for row in cached for token in row}) > 5, "a model that repeats itself tests little"


@ALL
def test_texts_of_different_lengths_share_a_batch(aggregator):
    """Each row gets what it gets alone, before and after its window slides; padding tokens' ids do not matter."""
    model = tiny_model(aggregator=aggregator)
    texts = [random_tokens(1, length, seed=length) for length in (1, 14, 5, 23)]
    alone = [generate(model, text, 40, temperature=0)[0] for text in texts]
    for filler in (0, 7):
        pad = [23 - text.shape[1] for text in texts]
        rows = [torch.cat([torch.full((1, p), filler), text], dim=1) for p, text in zip(pad, texts, strict=True)]
        assert generate(model, torch.cat(rows), 40, temperature=0, pad=pad) == alone


def test_window():
    """All tokens up to block_size, then half a window is dropped whenever it is full."""
    assert [window_start(n, 16) for n in (1, 15, 16, 17, 24, 25, 32, 33, 1000)] == [0, 0, 0, 8, 8, 16, 16, 24, 984]
    assert all(0 < n - window_start(n, size) <= size for size in (2, 3, 16) for n in range(1, 100))


def test_generating_changes_nothing():
    """The loss is the same before and after generating: nothing is kept on the module."""
    model = tiny_model()
    tokens = random_tokens(2, 16)
    before = dict(model.state_dict()), model(tokens, tokens)
    generate(model, tokens[:, :4], 20)
    after = model(tokens, tokens)
    assert torch.equal(before[1].loss, after.loss) and torch.equal(before[1].router.prob, after.router.prob)
    assert before[0].keys() == model.state_dict().keys()


def test_choice_of_the_next_token():
    """Temperature, top_k, top_p and n_token restrict the choice as documented; a seed repeats it."""
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def chosen(**choice) -> set[int]:
        arguments = {"temperature": 1.0, "top_k": None, "top_p": None} | choice
        generator = torch.Generator().manual_seed(0)
        return {model_module.choose(logits, generator=generator, **arguments).item() for _ in range(200)}

    assert chosen() == {0, 1, 2, 3}
    assert chosen(temperature=0) == {0} == chosen(top_k=1) == chosen(top_p=0.4) == chosen(temperature=0.05)
    assert chosen(top_k=3) == {0, 1, 2} == chosen(top_p=0.8)
    assert chosen(top_k=100) == {0, 1, 2, 3} == chosen(top_p=1.0)
    model = tiny_model()
    start = random_tokens(2, 3)
    first = generate(model, start, 30, generator=torch.Generator().manual_seed(4))
    assert first == generate(model, start, 30, generator=torch.Generator().manual_seed(4))
    assert max(max(row) for row in first) > 10
    few = generate(model, start, 30, generator=torch.Generator().manual_seed(4), n_token=10)
    assert max(max(row) for row in few) < 10


# Sizes and costs


@ALL
@pytest.mark.parametrize("tie", [True, False])
def test_parameter_formulas(aggregator, tie):
    """The formulas count the real tensors: all, those active for a token, embeddings."""
    model = GPT(tiny_config(aggregator=aggregator, tie_embeddings=tie))
    count = model.count_parameters()
    assert count.total == sum(p.numel() for p in model.parameters())
    stacked = [p for name, p in model.named_parameters() if ".experts." in name]
    E, K = model.config.n_expert, model.config.top_k
    assert count.active == count.total - sum(p.numel() for p in stacked) * (E - K) // E
    assert bool(stacked) == (aggregator != "dense")
    assert count.embeddings == sum(p.numel() for p in {model.embed.weight, model.head.weight})


class CountProducts(TorchDispatchMode):
    """Counts multiply-adds of every matrix product that is executed."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name in ("mm", "bmm", "_grouped_mm"):
            self.total += result.numel() * arguments[0].shape[-1]
        elif "attention" in name:
            q, k = arguments[:2]
            self.total += 2 * q.numel() * k.shape[-2]  # scores, and the same number for the values
        return result


def test_dense_is_one_swiglu_with_the_experts_multiply_adds():
    """h + down(silu(gate x) ⊙ up x) of hidden size K·H, no choice; as many multiply-adds as sum without its router."""
    model = tiny_model(aggregator="dense")
    moe, h = model.blocks[0].moe, torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
    ours = results_and_gradients(lambda h: moe(h)[0], {"h": h}, moe)
    plain = results_and_gradients(lambda h: h + plain_swiglu(moe.network, rms_norm(h, moe.norm.weight)), {"h": h}, moe)
    assert_same(ours, plain, 1e-5)
    assert moe.network.gate_proj.weight.shape == (3 * 16, 32)
    stats = moe(h)[1][0]
    assert balance_of(stats).item() == pytest.approx(1.0) and stats.z == stats.max_logit == 0
    dense, sparse = model.multiply_adds_per_token(), tiny_model(aggregator="sum").multiply_adds_per_token()
    with CountProducts() as products:
        moe(h)
    assert 2 * products.total / 10 == dense.experts == sparse.experts - 2 * 8 * 32
    assert dense.total == sparse.total - 2 * 8 * 32 and dense.aggregator == 0


@pytest.mark.parametrize(
    "changes",
    [{"aggregator": name} for name in ("sum", "shared", "mlp", "coe")]
    + [{"dag_depth": 1}, {"dag_depth": 3}, {"dag_depth": 2, "dag_gate": "none"}],
    ids=str,
)
def test_multiply_add_formulas(changes):
    """The formulas equal the products that a forward pass executes, part by part."""
    model = tiny_model(**changes)
    block, formula = model.blocks[0], model.multiply_adds_per_token()
    S, config = 2 * 16, model.config

    def count(function, *arguments) -> float:
        with torch.no_grad(), CountProducts() as products:
            function(*arguments)
        return products.total / S

    x = torch.randn(2, 16, 32)
    rope = model_module.rope_table(torch.arange(16), config)
    assert formula.attention == 2 * count(block.attention, x, rope)
    if config.aggregator != "coe":
        flat, expert = x.view(S, 32), torch.zeros(S, 3, dtype=torch.long)
        assert formula.experts == 2 * (count(block.moe.router, flat) + count(block.moe.experts, flat, expert))
        beyond = count(block.moe.aggregate, flat, torch.randn(S, 3, 32), torch.rand(S, 3))
        assert formula.aggregator == 2 * (beyond + (count(block.moe.shared, flat) if block.moe.shared else 0))
    assert formula.head == count(model.head, x)
    assert formula.total == count(model, random_tokens(2, 16))


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 30}, r"n_embd \(30\) must be a multiple of n_head \(4\)"),
        ({"n_embd": 12}, r"must be even for rotary positions, got 12 / 4"),
        ({"n_kv_head": 3}, r"n_head \(4\) must be a multiple of n_kv_head \(3\)"),
        ({"top_k": 9}, r"top_k \(9\) must not exceed n_expert \(8\)"),
        ({"n_layer": 0}, r"n_layer must be at least 1, got 0"),
        ({"block_size": 1}, r"block_size must be at least 2, got 1"),
        ({"dag_depth": 1.5}, r"dag_depth must be of type int, got 1.5"),
        ({"n_expert": True}, r"n_expert must be of type int, got True"),
        ({"tie_embeddings": 1}, r"tie_embeddings must be of type bool, got 1"),
        ({"rope_theta": -1.0}, r"rope_theta must be a number above 1, got -1.0"),
        ({"rope_theta": float("nan")}, r"rope_theta must be a number above 1, got nan"),
        ({"aggregator": "mean"}, r"aggregator must be one of sum, shared, mlp, coe, dense, dag, got 'mean'"),
        ({"dag_gate": "relu"}, r"dag_gate must be one of sigmoid, silu, none, got 'relu'"),
        ({"dag_residual": "h"}, r"dag_residual must be one of 1/K, full, none, outside, got 'h'"),
        ({"aggregator": "coe", "top_k": 3}, r"top_k \(3\) must be even for coe"),
    ],
)
def test_nonsense_is_refused(changes, message):
    """A configuration that can't be built is refused with the numbers in the message."""
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
