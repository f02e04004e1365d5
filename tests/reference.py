"""The slow, plain versions that the fast code must equal: loops over tokens, experts and edges."""

import torch
import torch.nn.functional as F

from lab.baselines import make_model
from model import NORM_EPS, DAGAggregator, Experts, ModelConfig


def rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute x / sqrt(mean(x²) + eps) · scale."""
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x / (mean_square + NORM_EPS).sqrt() * scale


GATES = {"sigmoid": torch.sigmoid, "silu": F.silu}


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
                m = edge @ layer.w_node.weight.T
                if gate_name != "open":
                    e = GATES[gate_name](edge @ layer.w_edge.weight.T)  # Eq. 9
                    m = e * m  # Eq. 10
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
    for_all = moe.mlp if name == "dense" else moe.shared
    matrices = [linear.weight for linear in (for_all.gate_proj, for_all.up_proj, for_all.down_proj)]
    shared = plain_swiglu(*matrices, rms_norm(h, moe.norm.weight))
    if name == "dense":
        return h + shared
    if name == "coe":
        h = h + shared + plain_outputs(moe, moe.router, h, 2).sum(dim=1)
        return h + plain_outputs(moe, moe.second_router, h, 2).sum(dim=1)
    out = plain_outputs(moe, moe.router, h, 4)
    one = torch.ones(len(h), 4)  # in place of weights, which `out` has already
    if name == "sum":
        return h + shared + out.sum(dim=1)
    if name == "mlp":
        mlp = moe.aggregate.layers[0]
        nodes = [o + h / 4 for o in out.unbind(dim=1)]
        z = [rms_norm(node, mlp.norm.weight) @ mlp.w_down.weight.T for node in nodes]
        hidden = F.gelu(torch.cat(z, dim=-1) @ mlp.w_mix.weight.T)
        return shared + sum(nodes) + hidden @ mlp.w_up.weight.T
    if name == "dag_self":  # four graphs of a node each
        graphs = [plain_dag(moe.aggregate, "silu", h / 4, out[:, [i]], one) for i in range(4)]
        return shared + sum(graphs)
    gate_name = "open" if name == "dag_ungated" else "silu"
    return shared + plain_dag(moe.aggregate, gate_name, h, out, one)


def plain_cost(config: ModelConfig) -> tuple[int, int, int]:
    """Compute by formula what lab.cost counts: parameters, active ones, multiply-adds per token.

    Every matrix works once per token, and those of a graph, and W_down of mlp, once per node.
    """
    with torch.device("meta"):
        model = make_model(config)
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
            nodes = config.top_k if ".aggregate." in name else 1
            if config.aggregator == "mlp" and not name.endswith("w_down.weight"):
                nodes = 1
            multiply_adds += used * nodes
    return parameters, active, multiply_adds
