"""The whole network equals Mixtral, never looks ahead, starts well, compiles and generates."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from model import GPT, KVCache, ModelConfig
from tests.helpers import assert_same, random_tokens, tiny_config, tiny_model

KINDS = {"sum": {"aggregator": "sum"}, "dag": {}, "dag+shared": {"shared_dim": 8}}
ALL_KINDS = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


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
    """With equal weights, the logits and the gradient of the embedding are those of Mixtral."""
    ours = tiny_model(aggregator="sum", tie_embeddings=tie, rope_theta=5000.0)
    theirs = mixtral_of(ours)
    tokens = random_tokens(3, 16)
    targets = random_tokens(3, 16, seed=1)
    logits = theirs(tokens).logits
    output = ours(tokens, targets)
    assert logits.abs().max() > 1, "comparing logits near zero would test nothing"
    assert (output.logits - logits).abs().max() <= 1e-4
    output.loss.backward()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    embedding = theirs.model.embed_tokens.weight
    assert_same({"grad": ours.embed.weight.grad}, {"grad": embedding.grad}, 1e-4)


@ALL_KINDS
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_logits_depend_on_earlier_tokens_alone(changes, training):
    """Neither later tokens nor the other sequences of a batch change the logits of a token."""
    model = tiny_model(**changes).train(training)
    tokens = random_tokens(4, 16)
    logits = model(tokens).logits
    tokens[:, 10:] = (tokens[:, 10:] + 1) % 23
    changed = model(tokens).logits
    assert (changed[:, :10] - logits[:, :10]).abs().max() <= 1e-5
    assert (changed[:, 10:] - logits[:, 10:]).abs().max() > 1e-2
    assert (model(tokens[:1]).logits - changed[:1]).abs().max() <= 1e-5


def test_targets_of_minus_one_add_no_loss():
    """The loss is the mean over all targets that are not -1."""
    model = tiny_model()
    tokens = random_tokens(2, 16)
    targets = random_tokens(2, 16, seed=1)
    logits = model(tokens).logits[:, :5]
    expected = F.cross_entropy(logits.flatten(0, 1), targets[:, :5].flatten())
    targets[:, 5:] = -1
    assert model(tokens, targets).loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert model(tokens).loss is None


def test_the_loss_is_computed_in_float32():
    """Even bfloat16 logits give a loss in float32, also where no autocast sees to it."""
    model = tiny_model().bfloat16()
    tokens = random_tokens(2, 16)
    targets = random_tokens(2, 16, seed=1)
    output = model(tokens, targets)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    expected = F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_routers_losses_are_means_over_layers():
    """GPT returns the unweighted mean of what its routers return."""
    model = tiny_model()
    losses = []

    def note(router, x, result) -> None:
        losses.append(torch.stack(result[2:]).detach())

    for block in model.blocks:
        block.moe.router.register_forward_hook(note)
    output = model(random_tokens(2, 16))
    balance_loss, z_loss = torch.stack(losses).mean(dim=0)
    assert output.balance_loss.item() == pytest.approx(balance_loss.item(), abs=1e-6)
    assert output.z_loss.item() == pytest.approx(z_loss.item(), abs=1e-5)
    assert abs(losses[0][0] - losses[1][0]) > 1e-3, "or one layer would do as well"


def test_more_tokens_than_block_size_are_refused():
    """The error has both numbers."""
    with pytest.raises(ValueError, match="17 tokens do not fit block_size 16"):
        tiny_model()(random_tokens(1, 17))


def test_a_cache_that_holds_tokens_takes_one_at_a_time():
    """Several tokens at once would need another mask, so they are refused."""
    model = tiny_model()
    caches = [KVCache() for _ in model.blocks]
    model(random_tokens(1, 5), caches=caches)
    with pytest.raises(ValueError, match="takes one more at a time, got 2"):
        model(random_tokens(1, 2), caches=caches)


def test_initial_weights():
    """Matrices start with deviation 0.02, or less if they write into the residual stream."""
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


def test_a_sum_and_a_dag_of_one_seed_start_alike():
    """They have the same weights where both have them, and compute the same logits."""
    models = []
    for aggregator in ("sum", "dag"):
        torch.manual_seed(3)
        models.append(GPT(tiny_config(aggregator=aggregator)))
    weights = models[1].state_dict()
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, weights[name]), name
    tokens = random_tokens(2, 16)
    assert (models[0](tokens).logits - models[1](tokens).logits).abs().max() < 1e-5


@ALL_KINDS
def test_it_compiles_without_breaks_in_bfloat16(changes):
    """A compiled step has the loss and gradient of a plain one, and the next needs no compiling."""
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
