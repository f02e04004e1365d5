"""DAG-MoE in one file: a Llama-style GPT whose mixture-of-experts layers combine experts through a small graph.

A sparse mixture-of-experts (MoE) layer sends each token to K of its E experts and adds up the K outputs, weighted by
the router. DAG-MoE ("From Simple Mixture to Structural Aggregation in Mixture-of-Experts", arXiv 2606.01062 v1) keeps
router and experts and replaces the sum: the K outputs become the nodes of a graph that is L edges deep. At every depth
each node receives a message from every node of the depth before, through gates that a light module computes per token.

Read from top to bottom. Equation numbers are the paper's; what differs from it is marked "Departure" here and listed in
README.md. Between its attention and the next layer, every layer of a DAG-MoE or a standard MoE does this (class MoE):

    x = RMSNorm(h)                            # (S, C)
    gate, expert, stats = router(x)           # (S, K), (S, K)
    out = experts(x, expert)                  # (S, K, C), one slot per selected expert
    h = aggregate(h, out, gate)               # (S, C): here WeightedSum, MLPMixing and DAGAggregator differ

Symbols, here and in every shape comment:

    code         paper  meaning                     |  code            paper  meaning
    B, T                sequences, tokens in each   |  n_expert, E     N      experts per layer
    S                   tokens, S = B·T             |  top_k, K        K      experts selected per token
    n_embd, C    d      width of the residual h     |  expert_dim, H   d_r    hidden size of an expert
    h                   residual stream             |  dag_depth, L    L      depth of the graph
    x                   RMSNorm(h)                  |  dag_dim, D      d_g    width of the graph's messages
    gate, g      g      router weight of a slot     |  node            n_i^l  node i at depth l, i = 1..K
    out          E(x)   output of a slot's expert   |  w_down, w_edge, w_node, w_up: W_down, W_edge, W_node, W_up

Beside the DAG stand the baselines that it is compared with, each a value of the setting `aggregator`; two of them put
something else in the place of class MoE: ChainOfExperts and Dense. Who reads for the DAG alone may skip them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

VERSION = "0.1.0"  # written into every checkpoint
NORM_EPS = 1e-5  # inside every RMSNorm
INIT_STD = 0.02  # of every weight matrix, before the exceptions in GPT.init_weights
GATES = {"sigmoid": torch.sigmoid, "silu": F.silu, "none": None}  # σ of Eq. 9
RESIDUALS = ("1/K", "full", "none", "outside")  # where h goes in Eq. 6; only the first is the paper's
AGGREGATORS = ("sum", "shared", "mlp", "coe", "dense", "dag")


def check_types(config, least: int) -> None:
    """Raise ValueError unless every field of a dataclass has its type, and every int is `least` or more."""
    for field in fields(config):
        value = getattr(config, field.name)
        fits = type(value) is field.type or (field.type is float and type(value) is int)
        if not fits:
            raise ValueError(f"{field.name} must be of type {field.type.__name__}, got {value!r}")
        if field.type is int and value < least:
            raise ValueError(f"{field.name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the network's shape. Raises ValueError, showing the numbers, if it can't be built."""

    vocab_size: int = 257  # size of the vocabulary (train.py takes the dataset's if no config sets it)
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 4  # decoder blocks
    n_head: int = 4  # attention heads (queries)
    n_kv_head: int = 2  # key/value heads; fewer than n_head is grouped-query attention
    n_embd: int = 128  # C, width of the residual stream
    rope_theta: float = 10000.0  # base wavelength of the rotary positions
    tie_embeddings: bool = True  # output head shares the token embedding's weights
    n_expert: int = 16  # E, experts per layer
    top_k: int = 4  # K, experts selected per token
    norm_topk: bool = True  # renormalise the K selected router probabilities to sum to 1 (for K = 1: to 1)
    expert_dim: int = 64  # H, hidden size of each SwiGLU expert
    aggregator: str = "dag"  # how the K outputs are combined: sum | shared | mlp | coe | dense | dag (see README)
    shared_dim: int = 64  # hidden size of the always-on expert of `shared`
    dag_depth: int = 2  # L, depth of the graph
    dag_dim: int = 32  # D, width of the graph's messages, and of those of `mlp`
    dag_gate: str = "sigmoid"  # edge gate of Eq. 9: sigmoid | silu | none (all edges open)
    dag_residual: str = "1/K"  # h in a node of Eq. 6: 1/K | full (all of it) | none | outside (none, added at the end)
    dag_zero_init: bool = True  # W_up starts at zero; false: as small as what else writes into h

    def __post_init__(self):
        check_types(self, least=1)
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.head_dim % 2:
            raise ValueError(f"n_embd / n_head must be even for rotary positions, got {self.n_embd} / {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.top_k > self.n_expert:
            raise ValueError(f"top_k ({self.top_k}) must not exceed n_expert ({self.n_expert})")
        if not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be a number above 1, got {self.rope_theta}")
        for name, known in (
            ("aggregator", AGGREGATORS),
            ("dag_gate", GATES),
            ("dag_residual", RESIDUALS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.aggregator == "coe" and self.top_k % 2:
            raise ValueError(f"top_k ({self.top_k}) must be even for coe, which spends it over two rounds")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head


# Backbone: RMSNorm, rotary positions, grouped-query attention


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


def rope_table(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (T, head_dim), for positions (T): channel i turns at theta^(-2i/head_dim) per token."""
    channel = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = config.rope_theta ** (-channel / config.head_dim)
    angle = positions[:, None] * frequency  # (T, head_dim/2)
    angle = torch.cat([angle, angle], dim=-1)  # rotate-half pairs channel i with i + head_dim/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su 2021, in Llama's rotate-half layout) on queries or keys x (B, heads, T, head_dim)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class KeyValueCache:
    """Keys and values of the tokens read so far, for one attention layer: two (B, n_kv_head, block_size, head_dim)."""

    def __init__(self):
        self.length = 0

    def extend(self, k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Add k, v (B, n_kv_head, T, head_dim) and return all that is stored, as views."""
        B, heads, T, head_dim = k.shape
        if self.length == 0:
            self.k, self.v = k.new_empty(2, B, heads, block_size, head_dim)
        self.k[:, :, self.length : self.length + T] = k
        self.v[:, :, self.length : self.length + T] = v
        self.length += T
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Attention(nn.Module):
    """Causal grouped-query attention: groups of n_head / n_kv_head query heads share one key/value head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        kv_dim = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, C) → (B, T, C). With a cache, x is either a whole prompt (empty cache) or one token.

        mask (B, 1, T, tokens in all), True where a token may look, is needed only where rows are padded.
        """
        B, T, C = x.shape
        split_heads = (B, T, -1, self.config.head_dim)
        q = rotate(self.q_proj(x).view(split_heads).transpose(1, 2), rope)  # (B, n_head, T, head_dim)
        k = rotate(self.k_proj(x).view(split_heads).transpose(1, 2), rope)  # (B, n_kv_head, T, head_dim)
        v = self.v_proj(x).view(split_heads).transpose(1, 2)
        if cache is not None:
            assert T == 1 or cache.length == 0, f"{T} tokens after {cache.length} cached ones"
            k, v = cache.extend(k, v, self.config.block_size)
        # A single token may look at everything cached, so only longer inputs need the causal mask.
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


# Mixture of experts: router, experts


class RouterStats(NamedTuple):
    """What a router did with S tokens. In Output the same of all routers, stacked along a first dimension."""

    prob: Tensor  # (E) P_e, mean probability of each expert
    load: Tensor  # (E) slots assigned to each expert, summing to S times its K; without gradient
    z: Tensor  # () z-loss: mean of logsumexp(logits)²
    max_logit: Tensor  # () largest logit by absolute value, without gradient


def balance_loss(load: Tensor, prob: Tensor) -> Tensor:
    """load, prob (routers, E) → (): mean over routers, one per layer, of E · Σ_e f_e P_e (Switch 2021).

    f_e is the share of the slots that expert e got. The loss is 1 when balanced and E/K when collapsed onto K experts.
    `load` must be that of the whole batch of an optimizer step; where `prob` is that of a part, the parts' losses
    average to the loss of the whole, so it does not matter how the batch is cut (arXiv 2501.11873).
    """
    share = load.to(prob.dtype) / load.sum(dim=-1, keepdim=True)  # f_e: counts, so no gradient
    return load.shape[-1] * (share * prob).sum(dim=-1).mean()  # P_e's gradient reaches every expert


class Router(nn.Module):
    """Token-choice top-K router (Shazeer 2017; losses of Switch 2021 and ST-MoE 2022). Always in full precision."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))  # W_r

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, RouterStats]:
        """x (S, C) → gate (S, K) in descending order, expert (S, K) ids, RouterStats."""
        E, K = self.config.n_expert, self.config.top_k
        with torch.autocast(x.device.type, enabled=False):  # rounding logits to bfloat16 would change the selection
            logits = F.linear(x.to(self.weight.dtype), self.weight)  # (S, E)
        prob = logits.softmax(dim=-1)
        gate, expert = prob.topk(K, dim=-1)
        if self.config.norm_topk:  # Departure (the paper leaves it open): gates sum to 1, as in Mixtral
            gate = gate / gate.sum(dim=-1, keepdim=True)

        slots = expert.flatten()
        load = torch.zeros(E, dtype=torch.long, device=x.device).scatter_add_(0, slots, torch.ones_like(slots))
        z = logits.logsumexp(dim=-1).square().mean()
        return gate, expert, RouterStats(prob.mean(dim=0), load, z, logits.detach().abs().amax())


class SwiGLU(nn.Module):
    """down(SiLU(gate x) ⊙ up x): one feed-forward network, for all tokens (Shazeer 2020)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) → (..., dim)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """E SwiGLU feed-forward networks, stacked. Dropless: every selected (token, expert) pair is computed.

    A capacity that drops pairs would make a token's output depend on later tokens and on the rest of the batch.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, C, H = config.n_expert, config.n_embd, config.expert_dim
        self.gate_proj = nn.Parameter(torch.empty(E, H, C))
        self.up_proj = nn.Parameter(torch.empty(E, H, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, H))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x (S, C), expert (S, K) ids → (S, K, C): slot (s, k) holds expert[s, k] applied to x[s]."""
        S, K = expert.shape
        E, C, _ = self.down_proj.shape
        if S * K < E:  # few tokens, as in sampling: fetch the weights of each slot, instead of visiting every expert
            x = x.unsqueeze(1).expand(S, K, C).reshape(S * K, 1, C)
            gate, up, down = (
                w.index_select(0, expert.flatten()).mT for w in (self.gate_proj, self.up_proj, self.down_proj)
            )
            return torch.bmm(F.silu(torch.bmm(x, gate)) * torch.bmm(x, up), down).view(S, K, C)
        # Sort the S·K slots by expert, so that each expert's rows are contiguous: expert e owns rows ends[e-1]:ends[e].
        sorted_expert, order = expert.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_expert, torch.arange(E, device=x.device), right=True, out_int32=True)
        x = as_in_a_product(x)  # before there are K copies of it
        rows = x.index_select(0, order // K)  # (S·K, C); index_select's backward is far faster than x[...]'s on CPU
        hidden = F.silu(grouped_linear(rows, self.gate_proj, ends)) * grouped_linear(rows, self.up_proj, ends)
        rows = grouped_linear(hidden, self.down_proj, ends)
        return rows.index_select(0, order.argsort()).view(S, K, C)  # undo the sort


def as_in_a_product(x: Tensor) -> Tensor:
    """x in the precision that autocast would give it in a matrix product."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """F.linear with another weight for each group of rows: rows (N, I), weight (E, O, I), ends (E) → (N, O).

    Rows ends[e-1]:ends[e] are multiplied by weight[e]; a group may be empty. One kernel where F.grouped_mm can be used,
    else a loop over the experts: grouped_mm has no float64, needs rows of a multiple of 16 bytes, exists for CPU and
    CUDA, and in a compiled graph takes bfloat16 only.
    """
    rows, weight = as_in_a_product(rows), as_in_a_product(weight)  # grouped_mm is not on autocast's list
    device = rows.device.type
    dtypes = (torch.bfloat16,) if device == "cuda" or torch.compiler.is_compiling() else (torch.bfloat16, torch.float32)
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if device in ("cpu", "cuda") and rows.dtype in dtypes and aligned:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(group, w) for group, w in zip(rows.split(sizes), weight, strict=True)])


# Aggregation: (h (S, C), out (S, K, C), gate (S, K)) → (S, C), the residual included


class DepthRecord(NamedTuple):
    """What one depth of the graph did with S tokens; norms are Euclidean."""

    edge_gate: Tensor  # (S, K, K) mean over the D channels of e_ij: [s, i, j] is the edge from node j to node i
    message: Tensor  # (S, K, K) ‖m_ij‖
    update: Tensor  # (S, K) ‖W_up Σ_j m_ij‖, what node i is changed by
    node: Tensor  # (S, K) ‖n_i‖ before the change
    cosine: Tensor  # (S, K, K) between the directions of n_i and n_j: 1 where two nodes hold the same

    @property
    def relative_update(self) -> Tensor:
        """(S, K) ‖W_up Σ_j m_ij‖ / ‖n_i‖."""
        return self.update / self.node.clamp_min(1e-30)


class LayerRecord(NamedTuple):
    """What the MoE of one layer did with S tokens. GPT.forward collects these where it is given a list for them."""

    expert: Tensor  # (S, K) ids
    gate: Tensor  # (S, K) router weights
    depths: list[DepthRecord]  # one per depth of the graph; empty for an aggregator without a graph
    update: Tensor  # (S) ‖h' - h‖, all that the layer adds to the residual stream
    beyond_sum: Tensor  # (S) ‖h' - h - Σ_i g_i E_i(x)‖, what it adds beyond the weighted sum

    @property
    def share_beyond_sum(self) -> Tensor:
        """(S) ‖h' - h - Σ_i g_i E_i(x)‖ / ‖h' - h‖."""
        return self.beyond_sum / self.update.clamp_min(1e-30)


def weigh(out: Tensor, gate: Tensor) -> Tensor:
    """g_i E_i(x): out (S, K, C) and gate (S, K) → (S, K, C), in the precision of out."""
    return gate.unsqueeze(-1).to(out.dtype) * out


class WeightedSum(nn.Module):
    """The standard MoE: h + Σ_i g_i E_i(x). Linear in the expert outputs."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def forward(self, h: Tensor, out: Tensor, gate: Tensor, depths: list[DepthRecord] | None = None) -> Tensor:
        """h (S, C), out (S, K, C), gate (S, K) → (S, C). There is no graph, so nothing to add to `depths`."""
        return h + weigh(out, gate).sum(dim=1)


class MLPMixing(nn.Module):
    """The paper's ungated control: the weighted sum, and an MLP over all K nodes in the order of their slots.

    h' = Σ_i n_i + W_up GELU(W_mix concat(z_1, ..., z_K)), with n_i and z_i as in Eq. 6 and 7, and W_up = 0 at first.
    Departure: the norm of Eq. 7, of which the paper's description of this control says nothing.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, K, D = config.n_embd, config.top_k, config.dag_dim
        self.norm = RMSNorm(C)
        self.w_down = nn.Linear(C, D, bias=False)
        self.w_mix = nn.Linear(K * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)

    def forward(self, h: Tensor, out: Tensor, gate: Tensor, depths: list[DepthRecord] | None = None) -> Tensor:
        """h (S, C), out (S, K, C), gate (S, K) → (S, C). There is no graph, so nothing to add to `depths`."""
        K = out.shape[1]
        weighted = weigh(out, gate)
        node = weighted + (h / K).unsqueeze(1)
        z = self.w_down(self.norm(node))  # (S, K, D)
        mixed = F.gelu(self.w_mix(z.flatten(1)))  # (S, D)
        return h + weighted.sum(dim=1) + self.w_up(mixed)


class DAGLayer(nn.Module):
    """The weights of one depth of the graph, shared by all its edges, and the messages that flow along them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.dag_dim
        self.gate_function = GATES[config.dag_gate]
        self.norm = RMSNorm(C)
        self.w_down = nn.Linear(C, D, bias=False)
        self.w_edge = nn.Linear(2 * D, D, bias=False) if config.dag_gate != "none" else None
        self.w_node = nn.Linear(2 * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)

    def down(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """node (S, K, C) → z (S, K, D) before normalisation, and the factors (S, K, 1) that normalise it."""
        C = node.shape[-1]
        # Eq. 7: z_i = W_down RMSNorm(n_i). Departure: RMSNorm for the paper's LN, as everywhere in the backbone.
        # The norm divides a node by one number, which may as well be done after the product, where the row is short.
        squares = torch.linalg.vecdot(node, node).unsqueeze(-1)  # (S, K, 1); its gradient stays in node's precision
        scale = (squares.to(self.norm.weight.dtype) / C + NORM_EPS).rsqrt()  # 1 / root mean square
        z = F.linear(node, self.w_down.weight * self.norm.weight)
        return z, scale.to(z.dtype)

    def parts(self, z: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """edge_to, edge_from (None without gates), node_to, node_from, each (S, K, D): a node's part in its edges."""
        z = z * scale
        # Eq. 8: W concat(z_i, z_j) = W₁ z_i + W₂ z_j, so four D×D products per node serve all K² edges.
        node_to, node_from = (F.linear(z, w) for w in self.w_node.weight.chunk(2, dim=1))
        if self.gate_function is None:
            return None, None, node_to, node_from
        edge_to, edge_from = (F.linear(z, w) for w in self.w_edge.weight.chunk(2, dim=1))
        return edge_to, edge_from, node_to, node_from

    def edges_from(
        self, j: int, edge_to: Tensor | None, edge_from: Tensor | None, node_to: Tensor, node_from: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The edges from node j to all nodes i: e_ij and m_ij, each (S, K, D)."""
        content = node_to + node_from[:, j : j + 1]
        if self.gate_function is None:  # every edge is open
            return content.new_ones(()).expand_as(content), content
        e = self.gate_function(edge_to + edge_from[:, j : j + 1])  # Eq. 9: a gate for each of D channels
        return e, e * content  # Eq. 10

    def exchange(self, z: Tensor, scale: Tensor, last: bool) -> Tensor:
        """From what `down` returns to what `forward` returns: all edges, their sum at each node, and W_up."""
        parts = self.parts(z, scale)
        messages = torch.zeros_like(z)  # Σ_j m_ij of every node i, one source node j at a time
        for j in range(z.shape[1]):
            messages = messages + self.edges_from(j, *parts)[1]
        return self.w_up(messages.sum(dim=1) if last else messages)  # Eq. 11; at the end Σ_i (Eq. 12) before W_up

    def forward(self, node: Tensor, last: bool) -> Tensor:
        """node (S, K, C) → W_up Σ_j m_ij, which is to be added to it, (S, K, C); at the last depth its sum, (S, C)."""
        z, scale = self.down(node)
        if not torch.is_grad_enabled():
            return self.exchange(z, scale, last)
        # Recomputed in the backward pass: what is kept grows with K, not with the K² edges, and is little beside node.
        return checkpoint(self.exchange, z, scale, last, use_reentrant=False, preserve_rng_state=False)

    def record(self, node: Tensor) -> DepthRecord:
        """node (S, K, C) → what the messages to it look like, edge by edge."""
        parts = self.parts(*self.down(node))
        direction = F.normalize(node.float(), dim=-1)
        gates, messages = zip(*(self.edges_from(j, *parts) for j in range(node.shape[1])), strict=True)
        return DepthRecord(
            edge_gate=torch.stack([e.float().mean(dim=-1) for e in gates], dim=-1),
            message=torch.stack([m.float().norm(dim=-1) for m in messages], dim=-1),
            update=self.w_up(sum(messages)).float().norm(dim=-1),
            node=node.float().norm(dim=-1),
            cosine=direction @ direction.mT,
        )


class DAGAggregator(nn.Module):
    """DAG-MoE (Eq. 6 to 12): K·(L+1) nodes, an edge from every node of a depth to every node of the next.

    In plain form, with n_i⁰ = g_i E_i(x) + h/K, every depth l adds W_up Σ_j m_ij to node i and the result is Σ_i n_i^L.
    The sum of the nodes is carried along in `h` instead: Σ_i n_i⁰ = h + Σ_i g_i E_i(x), the standard MoE, and each
    depth adds its Σ_i to it. That is the same function, keeps the residual stream's precision when nodes are bfloat16,
    and spares the last depth K - 1 of its K applications of W_up. With W_up = 0 this is WeightedSum exactly.
    (Ablations: `dag_residual` gives the nodes more of h, or nothing.)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(DAGLayer(config) for _ in range(config.dag_depth))
        K = config.top_k
        # How much of h each node has, and how much h' has: as much as all K nodes together, except for "outside".
        shares = {"1/K": (1 / K, 1), "full": (1, K), "none": (0, 0), "outside": (0, 1)}
        self.share_in_node, self.share_in_all = shares[config.dag_residual]

    def forward(self, h: Tensor, out: Tensor, gate: Tensor, depths: list[DepthRecord] | None = None) -> Tensor:
        """h (S, C), out (S, K, C), gate (S, K) → (S, C). Adds a DepthRecord per depth to `depths`, if given."""
        weighted = weigh(out, gate)  # (S, K, C)
        # Eq. 6. Departure (the paper leaves it open): h is the residual stream itself, whose K shares add up to one.
        node = weighted + (self.share_in_node * h).unsqueeze(1).to(out.dtype)
        h = self.share_in_all * h + weighted.sum(dim=1)
        for layer in self.layers:
            if depths is not None:
                depths.append(layer.record(node))
            last = layer is self.layers[-1]
            step = layer(node, last)  # (S, K, C), at the end (S, C)
            if not last:
                node = node + step  # Eq. 11
                step = step.sum(dim=1)
            h = h + step  # Eq. 12
        return h


# The network


class MoE(nn.Module):
    """The feed-forward half of a block: normalise, route, compute experts, aggregate. Adds the residual itself.

    With the aggregator `shared` one more expert, of hidden size shared_dim, works for every token (DeepSeekMoE 2024).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.n_embd)
        self.router = Router(config)
        self.experts = Experts(config)
        self.aggregate = {"dag": DAGAggregator, "mlp": MLPMixing}.get(config.aggregator, WeightedSum)(config)
        self.shared = SwiGLU(config.n_embd, config.shared_dim) if config.aggregator == "shared" else None

    def forward(self, h: Tensor, records: list[LayerRecord] | None = None) -> tuple[Tensor, list[RouterStats]]:
        """h (B, T, C) → (B, T, C), RouterStats of its one router. Adds a LayerRecord to `records`, if given."""
        B, T, C = h.shape
        h = h.view(B * T, C)
        x = self.norm(h)
        gate, expert, stats = self.router(x)
        out = self.experts(x, expert)
        depths = None if records is None else []
        combined = self.aggregate(h, out, gate, depths)
        if self.shared is not None:
            combined = combined + self.shared(x)
        if records is not None:
            update = combined - h
            beyond_sum = update - weigh(out, gate).sum(dim=1)
            records.append(LayerRecord(expert, gate, depths, update.norm(dim=-1), beyond_sum.norm(dim=-1)))
        return combined.view(B, T, C), [stats]


class ChainOfExperts(nn.Module):
    """Two rounds of K/2 experts, the second of which sees what the first has found (CoE, arXiv 2506.18945).

    h¹ = h + Σ g E(norm(h)), h' = h¹ + Σ g E(norm(h¹)): a router per round, the same experts. Departure from the
    original, whose rounds pass on the normalised state: the norm is applied anew in each round, with the same weights.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        half = replace(config, aggregator="sum", top_k=config.top_k // 2)
        self.norm = RMSNorm(config.n_embd)
        self.router, self.second_router = Router(half), Router(half)
        self.experts = Experts(config)
        self.aggregate = WeightedSum(config)

    def forward(self, h: Tensor, records: list[LayerRecord] | None = None) -> tuple[Tensor, list[RouterStats]]:
        """h (B, T, C) → (B, T, C), RouterStats of both routers. There is nothing to add to `records`."""
        B, T, C = h.shape
        h = h.view(B * T, C)
        all_stats = []
        for router in (self.router, self.second_router):
            x = self.norm(h)
            gate, expert, stats = router(x)
            h = self.aggregate(h, self.experts(x, expert), gate)
            all_stats.append(stats)
        return h.view(B, T, C), all_stats


class Dense(nn.Module):
    """No experts to choose from: one SwiGLU of hidden size K·H, with the multiply-adds of a token's K experts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.norm = RMSNorm(config.n_embd)
        self.network = SwiGLU(config.n_embd, config.top_k * config.expert_dim)

    def forward(self, h: Tensor, records: list[LayerRecord] | None = None) -> tuple[Tensor, list[RouterStats]]:
        """h (B, T, C) → (B, T, C), and the RouterStats of perfect balance. There is nothing to add to `records`."""
        h = h + self.network(self.norm(h))
        E = self.config.n_expert
        balanced = torch.full((E,), 1 / E, device=h.device)
        zero = torch.zeros((), device=h.device)
        return h, [RouterStats(balanced, torch.ones(E, dtype=torch.long, device=h.device), zero, zero)]


class Block(nn.Module):
    """One decoder layer: h + attention, then the MoE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.moe = {"dense": Dense, "coe": ChainOfExperts}.get(config.aggregator, MoE)(config)

    def forward(
        self,
        h: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
        records: list[LayerRecord] | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        """h (B, T, C) → (B, T, C), RouterStats of each of the layer's routers."""
        h = h + self.attention(self.norm(h), rope, cache, mask)
        return self.moe(h, records)


class Output(NamedTuple):
    """What GPT.forward always returns. Whoever trains adds the auxiliary losses: balance_loss, and router.z.mean()."""

    logits: Tensor  # (B, T, vocab_size)
    loss: Tensor | None  # () cross-entropy in nats per token and nothing else, None without targets
    router: RouterStats  # of all routers, one per layer (coe: two): prob and load (routers, E), z, max_logit (routers)


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    total: int  # all; tied embeddings once
    active: int  # total without the E - K experts of each layer that a token does not use
    embeddings: int  # token embedding, and the output head where it is not tied; part of total and of active


class MultiplyAdds(NamedTuple):
    """Multiply-adds of the matrix products of one forward pass, per token. Two floating-point operations each."""

    attention: int  # projections, and scores and values over block_size positions (a causal kernel may skip half)
    experts: int  # router and the K selected experts
    aggregator: int  # what is beyond the experts: the DAG's matrices are applied to each of K nodes, not once
    head: int  # output head

    @property
    def total(self) -> int:
        """All four together."""
        return sum(self)


class GPT(nn.Module):
    """Decoder-only language model (Llama 3's layout) with an MoE in every layer. No biases, no dropout.

    Weights are drawn from torch's global generator: seed it with torch.manual_seed.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Drawn before the layers' own default initialisation draws anything.
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw every weight anew: normal(0, 0.02), smaller by sqrt(2·n_layer) where a layer writes into h; norms 1.

        What only some aggregators have comes last, so that for one seed models with different aggregators share all
        other weights. W_up starts at zero: a new DAG-MoE computes what the standard MoE with the same seed computes.
        """
        into_residual = INIT_STD / math.sqrt(2 * self.config.n_layer)
        std = {self.embed.weight: INIT_STD, self.head.weight: INIT_STD}  # one entry where the two are tied
        for block in self.blocks:
            attention, moe = block.attention, block.moe
            std |= dict.fromkeys((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight), INIT_STD)
            if not isinstance(moe, Dense):
                std |= dict.fromkeys((moe.router.weight, moe.experts.gate_proj, moe.experts.up_proj), INIT_STD)
            std[attention.o_proj.weight] = into_residual
            if not isinstance(moe, Dense):
                std[moe.experts.down_proj] = into_residual
        for module in self.modules():
            if isinstance(module, SwiGLU):
                std |= {module.gate_proj.weight: INIT_STD, module.up_proj.weight: INIT_STD}
                std[module.down_proj.weight] = into_residual
            elif isinstance(module, ChainOfExperts):
                std[module.second_router.weight] = INIT_STD
            elif isinstance(module, DAGLayer | MLPMixing):
                inner = [linear for linear in module.children() if isinstance(linear, nn.Linear)]
                std |= {linear.weight: INIT_STD for linear in inner}
                zero = isinstance(module, MLPMixing) or self.config.dag_zero_init
                std[module.w_up.weight] = 0.0 if zero else into_residual
        for weight, deviation in std.items():
            weight.normal_(0.0, deviation, generator=generator)
        norms = [module.weight for module in self.modules() if isinstance(module, RMSNorm)]
        for weight in norms:
            weight.fill_(1.0)
        assert len(std) + len(norms) == len(list(self.parameters())), "a parameter has no initialisation"

    def hidden(
        self,
        tokens: Tensor,
        cache: list[KeyValueCache] | None = None,
        pad: Tensor | None = None,
        records: list[LayerRecord] | None = None,
    ) -> tuple[Tensor, RouterStats]:
        """tokens (B, T), continuing what `cache` holds → final normalised states (B, T, C), RouterStats of all routers.

        pad (B): how many tokens at the start of each row, cached ones included, are padding that nobody looks at.
        Adds a LayerRecord per MoE to `records`, if given: how the experts were combined, for pictures and statistics.
        """
        start = cache[0].length if cache else 0
        end = start + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size {self.config.block_size}")
        position, mask = torch.arange(start, end, device=tokens.device), None
        if pad is not None:  # positions need no shift: rotary attention depends on their differences only
            key, query, first = torch.arange(end, device=tokens.device), position[:, None], pad[:, None, None]
            mask = (key <= query) & (key >= first) | (key == query)  # padding looks at itself: no row may be empty
            mask = mask.unsqueeze(1)  # (B, 1, T, end)
        rope = rope_table(position, self.config)
        h = self.embed(tokens)
        stats = []
        for i, block in enumerate(self.blocks):
            h, layer_stats = block(h, rope, cache[i] if cache else None, mask, records)
            stats += layer_stats
        return self.norm(h), RouterStats(*(torch.stack(values) for values in zip(*stats, strict=True)))

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, records: list[LayerRecord] | None = None
    ) -> Output:
        """tokens (B, T) ids, T ≥ 1, targets (B, T) ids or -1 where no loss is wanted (not everywhere) → Output.

        `records` as in `hidden`; the output is the same with it, bit for bit.
        """
        x, router = self.hidden(tokens, records=records)
        logits = self.head(x)  # (B, T, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return Output(logits, loss, router)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        n_token: int | None = None,
        pad: list[int] | None = None,
    ) -> Iterator[Tensor]:
        """Continue tokens (B, T): yield max_new_tokens times the next (B) ids, as soon as they are known.

        Row b begins with pad[b] tokens that do not count, so that texts of different lengths end together; each gets
        what it would get alone. A row's context is the window of `window_start`: all its tokens up to block_size,
        afterwards the last ones, of which half are dropped and the rest read afresh whenever the window is full. Keys
        and values are cached. Temperature 0 takes the likeliest token; top_k and top_p (nucleus sampling, Holtzman
        2020) restrict the choice first. With n_token, only ids below it are chosen: a vocabulary may be padded with ids
        that its encoding can't decode.
        """
        pad = pad or [0] * len(tokens)
        starts = None
        for _ in range(max_new_tokens):
            lengths = [tokens.shape[1] - p for p in pad]
            now = [window_start(length, self.config.block_size) for length in lengths]
            if now != starts:  # at the beginning, and whenever a row's window moves: read all windows
                starts, cache = now, [KeyValueCache() for _ in self.blocks]
                widths = [length - start for length, start in zip(lengths, starts, strict=True)]
                unread = max(widths)
                padding = torch.tensor([unread - width for width in widths], device=tokens.device)
                window_pad = padding if padding.any() else None
            else:
                unread = 1
            x, _ = self.hidden(tokens[:, -unread:], cache, window_pad)
            logits = self.next_logits(x).float()[:, :n_token]  # (B, vocab_size)
            next_token = choose(logits, temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, next_token[:, None]], dim=1)
            yield next_token

    def next_logits(self, x: Tensor) -> Tensor:
        """The output head on the last of the states x (B, T, C) → (B, vocab_size), for sampling."""
        # W xᵀ, from two columns on, takes torch's CPU kernels less than half as long as x Wᵀ where B is small.
        last = x[:, -1] if len(x) > 1 else x[:, -1].repeat(2, 1)
        return (self.head.weight @ last.T).T[: len(x)]

    @property
    def dag_square_matrices(self) -> int:
        """D×D matrices at each depth of the graph: two halves each of W_node and, where there are gates, of W_edge."""
        return 2 if self.config.dag_gate == "none" else 4

    def count_parameters(self) -> ParameterCount:
        """Numbers of parameters, by formula (checked against the tensors in the tests)."""
        c = self.config
        C, E, K, H, L, D = c.n_embd, c.n_expert, c.top_k, c.expert_dim, c.dag_depth, c.dag_dim
        square = self.dag_square_matrices
        embeddings = c.vocab_size * C * (1 if c.tie_embeddings else 2)
        attention = 2 * C * C + 2 * C * c.n_kv_head * c.head_dim
        expert = 3 * C * H
        aggregator = {
            "shared": 3 * C * c.shared_dim,
            "mlp": 2 * C * D + K * D * D + C,
            "dag": L * (2 * C * D + square * D * D + C),  # each C is a norm
        }.get(c.aggregator, 0)
        router = {"dense": 0, "coe": 2 * E * C}.get(c.aggregator, E * C)
        unused = 0 if c.aggregator == "dense" else (E - K) * expert
        layer = attention + router + K * expert + unused + aggregator + 2 * C  # 2·C: two norms
        total = embeddings + c.n_layer * layer + C
        return ParameterCount(total, total - c.n_layer * unused, embeddings)

    def multiply_adds_per_token(self) -> MultiplyAdds:
        """Multiply-adds per token of a full window's forward pass, by formula (checked by counting in the tests).

        Matrix products only: norms, gates, the weighted sum and the DAG's K²·D element-wise products per depth are not
        counted. A backward pass costs twice as much again.
        """
        c = self.config
        C, K, H, L, D = c.n_embd, c.top_k, c.expert_dim, c.dag_depth, c.dag_dim
        projections = 2 * C * C + 2 * C * c.n_kv_head * c.head_dim
        scores_and_values = 2 * c.block_size * C
        aggregator = {
            "shared": 3 * C * c.shared_dim,
            "mlp": K * C * D + K * D * D + C * D,
            # W_down and the halves of W_edge and W_node on K nodes; W_up, too, but at the last depth on their sum
            "dag": L * K * (C * D + self.dag_square_matrices * D * D) + (L - 1) * K * C * D + C * D,
        }.get(c.aggregator, 0)
        router = {"dense": 0, "coe": 2 * c.n_expert * C}.get(c.aggregator, c.n_expert * C)
        return MultiplyAdds(
            attention=c.n_layer * (projections + scores_and_values),
            experts=c.n_layer * (router + 3 * K * C * H),
            aggregator=c.n_layer * aggregator,
            head=C * c.vocab_size,
        )


def window_start(length: int, block_size: int) -> int:
    """First token in view when `length` tokens exist: moves in steps of half a window, once the window is full."""
    step = block_size // 2
    return max(0, math.ceil((length - block_size) / step)) * step


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """logits (B, vocab_size) → (B) ids: greedy at temperature 0, else sampled from the top_k and top_p likeliest."""
    if temperature < 1e-4:  # dividing by less would overflow, and the likeliest wins anyway
        return logits.argmax(dim=-1)
    logits, token = (logits / temperature).sort(dim=-1, descending=True)  # likeliest first
    prob = logits.softmax(dim=-1)
    if top_p is not None:
        likelier = prob.cumsum(dim=-1)[:, :-1]  # total probability of all tokens before the second, the third, ...
        prob[:, 1:] = prob[:, 1:].masked_fill(likelier >= top_p, 0.0)
    if top_k is not None:
        prob[:, top_k:] = 0.0
    choice = torch.multinomial(prob, 1, generator=generator)
    return token.gather(1, choice).squeeze(1)
