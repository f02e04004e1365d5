"""The slow, plain versions that the fast code must equal: loops over tokens, experts, nodes and edges."""

import torch
import torch.nn.functional as F

from model import NORM_EPS, DAGAggregator, Experts, ModelConfig

TINY = dict(
    vocab_size=23, block_size=16, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_expert=8, top_k=3,
    expert_dim=16, dag_depth=2, dag_dim=8,
)  # fmt: skip


def tiny_config(**changes) -> ModelConfig:
    """A model that computes in milliseconds."""
    even = {"top_k": 4} if changes.get("aggregator") == "coe" else {}
    return ModelConfig(**TINY | even | changes)


def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Weights large enough that every term matters, W_up and the norms' scales included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (1.0 if p.dim() == 1 else 0.0))
    return module


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    return x / (x.pow(2).mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight


def plain_dag(aggregator: DAGAggregator, gate_name: str, h, out, gate):
    """Eq. 6 to 12 as the paper writes them: every concatenation of two nodes is built. (S, C), (S, K, C), (S, K)."""
    K = out.shape[1]
    sigma = {"sigmoid": torch.sigmoid, "silu": lambda x: x * torch.sigmoid(x), "open": torch.ones_like}[gate_name]
    nodes = [gate[:, i, None] * out[:, i] + h / K for i in range(K)]  # Eq. 6
    for layer in aggregator.layers:
        z = [rms_norm(n, layer.norm.weight) @ layer.w_down.weight.T for n in nodes]  # Eq. 7
        new = []
        for i in range(K):
            total = 0
            for j in range(K):
                edge = torch.cat([z[i], z[j]], dim=-1)  # Eq. 8
                e = sigma(edge @ layer.w_edge.weight.T)  # Eq. 9
                total = total + e * (edge @ layer.w_node.weight.T)  # Eq. 10
            new.append(nodes[i] + total @ layer.w_up.weight.T)  # Eq. 11
        nodes = new
    return sum(nodes)  # Eq. 12


def plain_swiglu(gate_proj, up_proj, down_proj, x: torch.Tensor) -> torch.Tensor:
    """down(silu(gate x) ⊙ up x)."""
    gate = x @ gate_proj.T
    return (gate * torch.sigmoid(gate) * (x @ up_proj.T)) @ down_proj.T


def plain_router(weight: torch.Tensor, x: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ids of the top_k likeliest experts, (S, top_k) each, the gates adding up to one."""
    prob = (x @ weight.T).exp() / (x @ weight.T).exp().sum(dim=-1, keepdim=True)
    order = prob.argsort(dim=-1, descending=True)[:, :top_k]
    chosen = prob.gather(1, order)
    return chosen / chosen.sum(dim=-1, keepdim=True), order


def plain_experts(experts: Experts, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """SwiGLU by SwiGLU, token by token, slot by slot."""
    rows = []
    for s in range(expert.shape[0]):
        for e in expert[s].tolist():
            hidden = F.silu(experts.gate_proj[e] @ x[s]) * (experts.up_proj[e] @ x[s])
            rows.append(experts.down_proj[e] @ hidden)
    return torch.stack(rows).view(*expert.shape, -1)


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    """Compare tensors of the same names; the error is relative to the largest value, or to 1 if that is larger."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = max(1.0, theirs[name].abs().max().item())
        error = (ours[name] - theirs[name]).abs().max().item() / scale
        assert error <= tolerance, f"{name}: off by {error:.2e}, allowed {tolerance:.0e}"


def results_and_gradients(function, inputs: dict[str, torch.Tensor], module: torch.nn.Module, seed: int = 1) -> dict:
    """function's value and the gradients of every input and every parameter, for a random upstream gradient."""
    inputs = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    module.zero_grad()
    value = function(**inputs)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)
    value.backward(upstream)
    gradients = {f"grad {name}": x.grad for name, x in inputs.items() if x.requires_grad}
    gradients |= {f"grad {name}": p.grad.clone() for name, p in module.named_parameters()}
    return {"value": value.detach()} | gradients
