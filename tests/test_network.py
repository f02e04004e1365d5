"""The whole network: it equals Mixtral, never looks ahead, begins well, compiles and generates."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from model import GPT, ModelConfig
from tests.reference import assert_same, randomize, tiny_config

KINDS = {"sum": {"aggregator": "sum"}, "dag": {}, "dag+shared": {"shared_dim": 8}}
ALL_KINDS = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def tiny_model(**changes) -> GPT:
    """Make a model whose weights are large enough that every part matters."""
    return randomize(GPT(tiny_config(**changes)))


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw ids of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(23, (batch, length), generator=generator)


def mixtral_of(ours: GPT):
    """Make Hugging Face's Mixtral of the same sizes and with the same weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = ours.config
    mixtral_config = MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.expert_dim,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        num_local_experts=config.n_expert,
        num_experts_per_tok=config.top_k,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.block_size,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    weights = {
        "model.embed_tokens.weight": ours.embed.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    for i, block in enumerate(ours.blocks):
        experts = block.moe.experts
        layer = {
            "input_layernorm.weight": block.norm.weight,
            "post_attention_layernorm.weight": block.moe.norm.weight,
            "mlp.gate.weight": block.moe.router.weight,
            "mlp.experts.gate_up_proj": torch.cat([experts.gate_proj, experts.up_proj], dim=1),
            "mlp.experts.down_proj": experts.down_proj,
        }
        for letter in "qkvo":
            projection = getattr(block.attention, f"{letter}_proj")
            layer[f"self_attn.{letter}_proj.weight"] = projection.weight
        for name, weight in layer.items():
            weights[f"model.layers.{i}.{name}"] = weight
    theirs = MixtralForCausalLM(mixtral_config).float()
    theirs.load_state_dict(weights, strict=True)
    return theirs


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_with_sum_the_network_is_mixtral(tie):
    """Same weights, same logits, and the same gradient of the embedding, on which all depends."""
    ours = tiny_model(aggregator="sum", tie_embeddings=tie, rope_theta=5000.0)
    theirs = mixtral_of(ours)
    tokens = random_tokens(3, 16)
    targets = random_tokens(3, 16, seed=1)
    logits = theirs(tokens).logits
    output = ours(tokens, targets)
    assert logits.abs().max() > 1, "logits that are nearly zero compare nothing"
    assert (output.logits - logits).abs().max() <= 1e-4
    output.loss.backward()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    embedding = theirs.model.embed_tokens.weight
    assert_same({"grad": ours.embed.weight.grad}, {"grad": embedding.grad}, 1e-4)


@ALL_KINDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_logits_depend_on_earlier_tokens_alone(changes, training):
    """Later tokens change no logits, and a row has the same ones beside others and alone."""
    model = tiny_model(**changes).train(training)
    tokens = random_tokens(4, 16)
    logits = model(tokens).logits
    tokens[:, 10:] = (tokens[:, 10:] + 1) % 23
    changed = model(tokens).logits
    assert (changed[:, :10] - logits[:, :10]).abs().max() <= 1e-5
    assert (changed[:, 10:] - logits[:, 10:]).abs().max() > 1e-2
    assert (model(tokens[:1]).logits - changed[:1]).abs().max() <= 1e-5


def test_targets_of_minus_one_add_no_loss():
    """The loss is the mean over the other targets."""
    model = tiny_model()
    tokens = random_tokens(2, 16)
    targets = random_tokens(2, 16, seed=1)
    logits = model(tokens).logits[:, :5]
    expected = F.cross_entropy(logits.flatten(0, 1), targets[:, :5].flatten())
    targets[:, 5:] = -1
    assert model(tokens, targets).loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert model(tokens).loss is None


def test_the_loss_is_computed_in_float32():
    """Of bfloat16 logits, too, also without autocast, which would see to it."""
    model = tiny_model().bfloat16()
    tokens = random_tokens(2, 16)
    targets = random_tokens(2, 16, seed=1)
    output = model(tokens, targets)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    expected = F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_routers_losses_are_means_over_layers():
    """GPT returns the mean of what its routers return, and weights nothing."""
    model = tiny_model()
    losses = []
    for block in model.blocks:
        block.moe.router.register_forward_hook(lambda module, x, result: losses.append(result[2]))
    output = model(random_tokens(2, 16))
    balance_loss, z_loss = (losses[0] + losses[1]) / 2
    assert output.balance_loss.item() == pytest.approx(balance_loss.item(), abs=1e-6)
    assert output.z_loss.item() == pytest.approx(z_loss.item(), abs=1e-5)
    assert abs(losses[0][0] - losses[1][0]) > 1e-3, "else a single layer would do as well"


def test_more_tokens_than_block_size_are_refused():
    """The error shows both numbers."""
    with pytest.raises(ValueError, match="17 tokens do not fit block_size 16"):
        tiny_model()(random_tokens(1, 17))


def test_first_weights_are_drawn_as_documented():
    """Deviation 0.02, less for what writes into the residual stream; W_up is 0, norms are 1."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=3, tie_embeddings=False, shared_dim=64))
    for name, weight in model.named_parameters():
        part = name.removesuffix(".weight").split(".")[-1]
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        elif part == "w_up":
            assert (weight == 0).all(), name
        else:
            std = 0.02 / math.sqrt(6) if part in ("o_proj", "down_proj") else 0.02
            assert weight.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(weight.mean().item()) <= 0.1 * std, name
    queries = [block.attention.q_proj.weight for block in model.blocks]
    assert not torch.equal(queries[0], queries[1])


@ALL_KINDS
def test_it_compiles_without_breaks_in_bfloat16(changes):
    """Compiled, it computes the same loss and gradient, and compiles nothing more after once."""
    torch._dynamo.reset()
    model = tiny_model(**changes)
    tokens = random_tokens(2, 16)

    def step(network) -> dict:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = network(tokens, tokens)
        (out.loss + out.balance_loss).backward()
        gradient = model.blocks[0].attention.o_proj.weight.grad.clone()
        return {"loss": out.loss.detach(), "grad": gradient}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own deprecations
        network = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled = step(network)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(step(network), compiled, 1e-6)
    assert_same(compiled, step(model), 2e-2)


@ALL_KINDS
@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_generation_with_the_cache_equals_generation_without(changes, length):
    """Greedy tokens are those of whole forward passes over the window, far beyond it."""
    model = tiny_model(**changes)
    tokens = random_tokens(2, length)
    cached = list(model.generate(tokens, 40, temperature=0))
    window = tokens[:, -16:]
    for next_token in cached:
        expected = model(window).logits[:, -1].argmax(-1)
        assert torch.equal(next_token, expected)
        window = torch.cat([window, expected[:, None]], dim=1)
        if window.shape[1] > 16:
            window = window[:, -8:]
    assert len(torch.stack(cached).unique()) > 5, "a model that repeats itself tests little"
