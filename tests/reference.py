"""The slow, plain versions that the fast code must equal: loops over tokens, experts and edges."""

import torch

from model import NORM_EPS, DAGAggregator, Experts, ModelConfig

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


GATES = {"sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu, "open": torch.ones_like}


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
