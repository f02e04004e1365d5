"""The slow, plain versions that the fast code must equal: loops over tokens, experts and edges."""

from types import SimpleNamespace as Namespace

import torch
import torch.nn.functional as F

from model import GPT, NORM_EPS, DAGAggregator, Experts, ModelConfig

TINY = {
    "vocab_size": 23,
    "block_size": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "n_expert": 8,
    "top_k": 3,
    "expert_dim": 16,
    "dag_depth": 2,
    "dag_dim": 8,
}


def tiny_config(**changes) -> ModelConfig:
    """Describe a model that computes in milliseconds."""
    if changes.get("aggregator") == "coe":  # which spends an even number of experts
        changes = {"top_k": 4} | changes
    return ModelConfig(**TINY | changes)


def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Make weights large enough that every term matters, W_up and the norms' scales included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
    return module


def rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute x / sqrt(mean(x²) + eps) · scale."""
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x / (mean_square + NORM_EPS).sqrt() * scale


GATES = {"sigmoid": torch.sigmoid, "silu": F.silu, "open": torch.ones_like}


def plain_dag(aggregator: DAGAggregator, gate_name: str, h, out, weight):
    """Compute Eq. 6 to 12 as the paper writes them, building every concatenation."""
    K = out.shape[1]
    nodes = [weight[:, i, None] * out[:, i] + h / K for i in range(K)]  # Eq. 6
    for layer in aggregator.layers:
        z = [rms_norm(n, layer.norm.weight) @ layer.w_down.weight.T for n in nodes]  # Eq. 7
        new_nodes = []
        for i in range(K):
            total = 0
            for j in range(K):
                edge = torch.cat([z[i], z[j]], dim=-1)  # Eq. 8
                e = GATES[gate_name](edge @ layer.w_edge.weight.T)  # Eq. 9
                m = e * (edge @ layer.w_node.weight.T)  # Eq. 10
                total = total + m
            new_nodes.append(nodes[i] + total @ layer.w_up.weight.T)  # Eq. 11
        nodes = new_nodes
    return sum(nodes)  # Eq. 12


def plain_swiglu(gate_proj, up_proj, down_proj, x: torch.Tensor) -> torch.Tensor:
    """Compute down(silu(gate x) ⊙ up x)."""
    gate = x @ gate_proj.T
    return (gate * torch.sigmoid(gate) * (x @ up_proj.T)) @ down_proj.T


def plain_router(matrix: torch.Tensor, x: torch.Tensor, top_k: int):
    """Return weights, which add up to one, and ids of the likeliest experts: (S, top_k) each."""
    prob = (x @ matrix.T).softmax(dim=-1)
    order = prob.argsort(dim=-1, descending=True)[:, :top_k]
    chosen = prob.gather(1, order)
    return chosen / chosen.sum(dim=-1, keepdim=True), order


def plain_experts(experts: Experts, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Apply SwiGLU by SwiGLU, token by token, choice by choice: (S, C), (S, K) → (S, K, C)."""
    rows = []
    for s in range(expert.shape[0]):
        for e in expert[s].tolist():
            matrices = (experts.gate_proj[e], experts.up_proj[e], experts.down_proj[e])
            rows.append(plain_swiglu(*matrices, x[s]))
    return torch.stack(rows).view(*expert.shape, -1)


def plain_outputs(moe, router, h, top_k):
    """Compute the outputs of each token's experts, times their weights: (S, C) → (S, K, C)."""
    x = rms_norm(h, moe.norm.weight)
    weight, expert = plain_router(router.weight, x, top_k)
    return weight.unsqueeze(-1) * plain_experts(moe.experts, x, expert)


def plain_half(name, moe, h):
    """Compute the second half of a block, with K = 4 and a shared expert, for h (S, C)."""
    if name == "series":
        return plain_half("sum", moe.second, plain_half("sum", moe, h))
    everyones = moe.network if name == "dense" else moe.shared
    matrices = (everyones.gate_proj[0], everyones.up_proj[0], everyones.down_proj[0])
    shared = plain_swiglu(*matrices, rms_norm(h, moe.norm.weight))
    if name == "dense":
        return h + shared
    if name == "coe":
        h = h + shared + plain_outputs(moe, moe.router, h, 2).sum(dim=1)
        return h + plain_outputs(moe, moe.second.router, h, 2).sum(dim=1)
    out = plain_outputs(moe, moe.router, h, 4)
    one = torch.ones(len(h), 4)  # in place of weights, which `out` has already
    aggregate = moe.aggregate
    if name == "sum":
        return h + shared + out.sum(dim=1)
    if name == "mlp":
        nodes = [o + h / 4 for o in out.unbind(dim=1)]
        w_down = aggregate.layers["w_down"].weight
        z = [rms_norm(node, aggregate.norm.weight) @ w_down.T for node in nodes]
        x = torch.cat(z, dim=-1) @ aggregate.w_mix.weight.T
        return shared + sum(nodes) + F.gelu(x) @ aggregate.w_up.weight.T
    if name == "dag_self":  # four graphs of a node each
        for i in range(4):
            shared = shared + plain_dag(aggregate, "silu", h / 4, out[:, [i]], one)
        return shared
    if name == "dag_ungated":
        layers = [Namespace(w_edge=layer.w_node, **layer._modules) for layer in aggregate.layers]
        return shared + plain_dag(Namespace(layers=layers), "open", h, out, one)
    return shared + plain_dag(aggregate, "silu", h, out, one)


def plain_cost(config: ModelConfig) -> tuple[int, int, int]:
    """Compute by formula what lab.cost counts: parameters, active ones, multiply-adds per token.

    Every matrix works once per token, and those of a graph's layers once per node.
    """
    with torch.device("meta"):
        model = GPT(config)
    parameters = 0
    active = 0
    # Attention multiplies queries with keys, and what comes out with values.
    multiply_adds = 2 * config.n_layer * config.block_size * config.n_embd
    for name, weight in model.named_parameters():
        used = weight.numel()
        if ".experts." in name:
            used = used * config.top_k // config.n_expert
        parameters += weight.numel()
        active += used
        is_looked_up = name == "embed.weight" and not config.tie_embeddings
        if weight.dim() > 1 and not is_looked_up:
            nodes = config.top_k if ".aggregate.layers." in name else 1
            multiply_adds += used * nodes
    return parameters, active, multiply_adds


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    """Compare tensors by name; errors are relative to the largest value, or to 1 if it is less."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = max(1.0, theirs[name].abs().max().item())
        error = (ours[name] - theirs[name]).abs().max().item() / scale
        assert error <= tolerance, f"{name}: off by {error:.2e}, allowed {tolerance:.0e}"


def results_and_gradients(function, inputs: dict[str, torch.Tensor], module: torch.nn.Module):
    """Return the value, and the gradients of its product with fixed random numbers, by name."""
    inputs = {name: x.detach().clone() for name, x in inputs.items()}
    for x in inputs.values():
        x.requires_grad_(x.is_floating_point())
    module.zero_grad()
    value = function(**inputs)
    generator = torch.Generator().manual_seed(1)
    value.backward(torch.randn(value.shape, generator=generator, dtype=value.dtype))
    results = {"value": value.detach()}
    for name, x in inputs.items():
        if x.requires_grad:
            results[f"grad {name}"] = x.grad
    for name, parameter in module.named_parameters():
        results[f"grad {name}"] = parameter.grad.clone()
    return results
