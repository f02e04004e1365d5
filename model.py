"""DAG-MoE in one file: a Llama-style GPT whose mixture-of-experts layers combine experts through a small graph.

A sparse mixture-of-experts (MoE) layer sends each token to K of its E experts and adds up the K outputs, weighted by
the router. DAG-MoE (arXiv 2606.01062 v1) keeps router and experts and replaces the sum: the K outputs become the nodes
of a graph that is L edges deep. At every depth each node receives a message from every node of the depth before,
through gates that a light module computes per token.

First comes the graph, then the router and the experts that feed it, then the transformer around them. Equation numbers
are the paper's; README.md lists what differs from it, and why. The seam, in class MoE:

    gate, expert, aux = router(x)             # (S, K), (S, K)
    out = experts(x, expert)                  # (S, K, C), one slot per selected expert
    h = aggregate(h, out, gate)               # (S, C): WeightedSum or DAGAggregator

Symbols, here and in every shape comment:

    code         paper  meaning                     |  code            paper  meaning
    B, T                sequences, tokens in each   |  n_expert, E     N      experts per layer
    S                   tokens, S = B·T             |  top_k, K        K      experts selected per token
    n_embd, C    d      width of the residual h     |  expert_dim, H   d_r    hidden size of an expert
    h                   residual stream             |  dag_depth, L    L      depth of the graph
    x                   RMSNorm(h)                  |  dag_dim, D      d_g    width of the graph's messages
    gate         g      router weight of a slot     |  node            n_i^l  node i at depth l, i = 1..K
    out          E(x)   output of a slot's expert   |  e, m            e_ij, m_ij: gate and message from node j to i
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

VERSION = "0.2.0"  # written into every checkpoint
NORM_EPS = 1e-5  # inside every RMSNorm: x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich 2019)
INIT_STD = 0.02  # GPT draws every matrix with it, times its init_scale; until then Router and Experts are empty
GATES = {"sigmoid": torch.sigmoid, "silu": F.silu}  # σ of Eq. 9
Aux = tuple[Tensor, Tensor]  # what training adds to the loss for a router's sake: balance loss (), z-loss ()


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
    norm_topk: bool = True  # renormalise the K selected router probabilities to sum to 1 (never for K = 1)
    expert_dim: int = 64  # H, hidden size of each SwiGLU expert
    shared_dim: int = 0  # hidden size of an always-on expert beside the selected ones (DeepSeekMoE); 0: none
    aggregator: str = "dag"  # how the K outputs are combined: sum (the standard MoE) | dag
    dag_depth: int = 2  # L, depth of the graph
    dag_dim: int = 32  # D, width of the graph's messages
    dag_gate: str = "silu"  # edge gate of Eq. 9: sigmoid | silu

    def __post_init__(self):
        check_types(self, may_be_zero=("shared_dim",))
        for holds, rule in (
            (self.block_size >= 2, "block_size must be at least 2"),
            (max(self.n_layer, self.dag_depth) <= 1000, "n_layer and dag_depth must not exceed 1000"),
            (self.n_embd % (2 * self.n_head) == 0, "n_embd must be a multiple of 2·n_head"),
            (self.n_head % self.n_kv_head == 0, "n_head must be a multiple of n_kv_head"),
            (self.top_k <= self.n_expert, "top_k must not exceed n_expert"),
            (1 < self.rope_theta < 1e30, "rope_theta must lie between 1 and 1e30"),
            (self.aggregator in FEED_FORWARD, f"aggregator must be one of {', '.join(FEED_FORWARD)}"),
            (self.dag_gate in GATES, f"dag_gate must be one of {', '.join(GATES)}"),
        ):
            if not holds:
                got = {key: value for key, value in vars(self).items() if key in rule}
                raise ValueError(f"{rule}, got {got}")


def check_types(config, may_be_zero: tuple[str, ...]) -> None:
    """Raise ValueError unless each field of a dataclass has its type, and each int is at least 1 (or 0) and < 2**31."""
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) is not field.type and (field.type, type(value)) != (float, int):
            raise ValueError(f"{field.name} must be of type {field.type.__name__}, got {value!r}")
        least = 0 if field.name in may_be_zero else 1
        if field.type is int and not least <= value < 2**31:
            raise ValueError(f"{field.name} must be at least {least} and below 2**31, got {value}")


def pairwise(linear: nn.Linear, z: Tensor) -> Tensor:
    """Eq. 8, W concat(z_i, z_j) = W₁ z_i + W₂ z_j: z (S, K, D), W (D, 2D) → (S, K, K, D), [s, receiver i, sender j]."""
    w1, w2 = linear.weight.chunk(2, dim=1)
    return F.linear(z, w1).unsqueeze(2) + F.linear(z, w2).unsqueeze(1)  # (S, K, 1, D) of i + (S, 1, K, D) of j


class DAGLayer(nn.Module):
    """One depth of the graph: every node receives a message from every node, itself included (Eq. 7 to 11)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.dag_dim
        self.sigma = GATES[config.dag_gate]
        self.norm = nn.RMSNorm(C, NORM_EPS)
        self.w_down = nn.Linear(C, D, bias=False)
        self.w_edge = nn.Linear(2 * D, D, bias=False)
        self.w_node = nn.Linear(2 * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)
        self.w_up.weight.init_scale = 0.0  # read by GPT: a new DAG-MoE computes what the standard MoE does

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """node (S, K, C) → gates e and messages m, both (S, K, K, D): [s, i, j] is the edge from node j to node i."""
        z = self.w_down(self.norm(node))  # Eq. 7, (S, K, D), with RMSNorm for LN
        e = self.sigma(pairwise(self.w_edge, z))  # Eq. 9, (S, K, K, D): of an edge, a gate per channel
        m = e * pairwise(self.w_node, z)  # Eq. 10
        return e, m

    def forward(self, node: Tensor) -> Tensor:
        """n^(l-1) → n^l, both (S, K, C)."""
        _, m = self.edges(node)  # (S, K, K, D)
        return node + self.w_up(m.sum(dim=2))  # Eq. 11: Σ over j, the senders


class DAGAggregator(nn.Module):
    """DAG-MoE (Eq. 6 to 12): K·(L+1) nodes, an edge from every node of a depth to every node of the next."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(DAGLayer(config) for _ in range(config.dag_depth))

    def forward(self, h: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        """h (S, C), out (S, K, C), gate (S, K) → (S, C)."""
        S, K, C = out.shape
        node = gate.unsqueeze(-1) * out + h.unsqueeze(1) / K  # Eq. 6, (S, K, C): K shares of the residual stream
        for layer in self.layers:
            node = layer(node)
        return node.sum(dim=1)  # Eq. 12


class WeightedSum(nn.Module):
    """The standard MoE: h + Σ_i g_i E_i(x). Linear in the expert outputs."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def forward(self, h: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        """h (S, C), out (S, K, C), gate (S, K) → (S, C)."""
        return h + (gate.unsqueeze(-1) * out).sum(dim=1)


class Router(nn.Module):
    """Token-choice top-K router (Shazeer 2017). Always in full precision: rounding would change the selection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k, self.renormalise = config.top_k, config.norm_topk and config.top_k > 1
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))  # W_r

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Aux]:
        """x (S, C) → gate (S, K) in descending order, expert (S, K) ids, Aux."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)  # (S, E)
        prob = logits.softmax(dim=-1)
        gate, expert = prob.topk(self.top_k, dim=-1)
        if self.renormalise:  # as in Mixtral; a single gate would be 1 always, its gradient zero
            gate = gate / gate.sum(dim=-1, keepdim=True)
        E = len(self.weight)
        count = F.one_hot(expert, E).sum(dim=(0, 1))  # (E), of S·K slots in all
        share = count.to(prob.dtype) / expert.numel()  # f_e: made of counts, so no gradient
        balance = E * (share * prob.mean(dim=0)).sum()  # E · Σ_e f_e P_e (Switch 2021); P_e's gradient reaches all
        z = logits.logsumexp(dim=-1).square().mean()  # ST-MoE 2022
        return gate, expert, (balance, z)


class Experts(nn.Module):
    """Stacked SwiGLU networks, down(SiLU(gate x) ⊙ up x) (Shazeer 2020). No slot is ever dropped."""

    def __init__(self, config: ModelConfig, n_expert: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(n_expert, hidden_dim, config.n_embd))
        self.up_proj = nn.Parameter(torch.empty(n_expert, hidden_dim, config.n_embd))
        self.down_proj = nn.Parameter(torch.empty(n_expert, config.n_embd, hidden_dim))
        self.down_proj.init_scale = (2 * config.n_layer) ** -0.5  # as all 2·n_layer that write into h (GPT-2)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """x (S, C), expert (S, K) ids → (S, K, C): slot (s, k) holds expert[s, k] applied to x[s]."""
        S, K = expert.shape
        E, C, H = self.down_proj.shape
        # Sort the S·K slots by expert, so that each expert's rows are contiguous: those of number i end at ends[i].
        sorted_expert, order = expert.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_expert, torch.arange(E, device=x.device), right=True, out_int32=True)
        rows = x.index_select(0, order // K)  # (S·K, C): slot n is token n // K's
        hidden = F.silu(grouped_linear(rows, self.gate_proj, ends)) * grouped_linear(rows, self.up_proj, ends)
        rows = grouped_linear(hidden, self.down_proj, ends)
        return rows.index_select(0, order.argsort()).view(S, K, C)  # undo the sort


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """F.linear with a weight per group of rows: rows (N, I), weight (E, O, I), ends (E) → (N, O). Groups may be empty.

    One kernel where F.grouped_mm can be used: CPU or CUDA, rows of a multiple of 16 bytes, bfloat16, and on the CPU,
    unless compiled, float32. Else a loop over the experts.
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):  # autocast does not know grouped_mm
        rows, weight = (x.to(torch.get_autocast_dtype(device)) for x in (rows, weight))
    float32_too = device == "cpu" and not torch.compiler.is_compiling()
    known = rows.dtype == torch.bfloat16 or (float32_too and rows.dtype == torch.float32)
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if device in ("cpu", "cuda") and known and aligned:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([F.linear(group, w) for group, w in zip(rows.split(sizes), weight, strict=True)])


class MoE(nn.Module):
    """The feed-forward half of a block: normalise, route, compute experts, aggregate. Adds the residual itself."""

    def __init__(self, aggregator: type[nn.Module], config: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.router = Router(config)
        self.experts = Experts(config, config.n_expert, config.expert_dim)
        self.aggregate = aggregator(config)
        self.shared = Experts(config, 1, config.shared_dim) if config.shared_dim else None

    def forward(self, h: Tensor) -> tuple[Tensor, Aux]:
        """h (B, T, C) → (B, T, C), Aux of its router."""
        x = self.norm(h).flatten(0, 1)  # (S, C)
        gate, expert, aux = self.router(x)
        out = self.experts(x, expert)  # (S, K, C)
        combined = self.aggregate(h.flatten(0, 1), out, gate)  # (S, C)
        if self.shared is not None:  # its only expert, number 0, is everyone's
            combined = combined + self.shared(x, torch.zeros_like(expert[:, :1])).squeeze(1)
        return combined.view_as(h), aux


# What makes a block's feed-forward half, by the setting `aggregator`. lab/baselines.py adds others.
FEED_FORWARD = {"sum": partial(MoE, WeightedSum), "dag": partial(MoE, DAGAggregator)}


def rope_table(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, head_dim/2) for position (T): each position turns pair i by theta^(-2i/head_dim)."""
    channel = torch.arange(0, head_dim, 2, device=position.device)
    angle = position[:, None] * theta ** (-channel / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions (Su 2021): x (B, heads, T, head_dim), channel i paired with i + head_dim/2 as in Llama."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention: groups of n_head / n_kv_head query heads share one key/value head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.o_proj.weight.init_scale = (2 * config.n_layer) ** -0.5

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: dict[str, Tensor] | None = None) -> Tensor:
        """x (B, T, C) → (B, T, C). Extends `cache`, keys and values of earlier tokens; if there are any, T is 1."""
        B, T, C = x.shape
        split_heads = (B, T, -1, self.head_dim)
        q = rotate(self.q_proj(x).view(split_heads).transpose(1, 2), rope)  # (B, n_head, T, head_dim)
        k = rotate(self.k_proj(x).view(split_heads).transpose(1, 2), rope)  # (B, n_kv_head, T, head_dim)
        v = self.v_proj(x).view(split_heads).transpose(1, 2)
        if cache:
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        if cache is not None:
            cache.update(k=k, v=v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)  # one token may see all others
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """One decoder layer: h + attention, then the MoE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.attention = Attention(config)
        self.moe = FEED_FORWARD[config.aggregator](config)

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], cache: dict | None = None) -> tuple[Tensor, Aux]:
        """h (B, T, C) → (B, T, C), Aux of its router."""
        return self.moe(h + self.attention(self.norm(h), rope, cache))


class Output(NamedTuple):
    """What GPT.forward always returns."""

    logits: Tensor  # (B, T, vocab_size); with a cache (B, 1, vocab_size)
    loss: Tensor | None  # () cross-entropy in nats per token and nothing else, None without targets
    balance: Tensor  # () mean over layers of the balance loss: 1 when balanced, E/K when collapsed onto K experts
    z: Tensor  # () mean over layers of the z-loss, mean of logsumexp(logits)²


class GPT(nn.Module):
    """Decoder-only language model (Llama 3's layout) with an MoE in every layer. No biases, no dropout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        # A generator of its own for each matrix: after one torch.manual_seed, sum and dag share what both have.
        for name, weight in self.named_parameters():
            if weight.dim() > 1:  # norms keep their ones
                generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(name.encode()))
                nn.init.normal_(weight, 0.0, INIT_STD * getattr(weight, "init_scale", 1.0), generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: list[dict] | None = None) -> Output:
        """tokens (B, T) ids, targets (B, T) ids, -1 where no loss is wanted, at least one of them an id → Output.

        With a cache, one dict per layer, tokens continue what it holds, and only the last one's logits are computed.
        """
        B, T = tokens.shape
        start = cache[0]["k"].shape[2] if cache and cache[0] else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size {self.config.block_size}")
        c = self.config
        rope = rope_table(torch.arange(start, start + T, device=tokens.device), c.n_embd // c.n_head, c.rope_theta)
        h, all_aux = self.embed(tokens), []
        for i, block in enumerate(self.blocks):
            h, aux = block(h, rope, cache[i] if cache else None)
            all_aux.append(aux)
        logits = self.head(self.norm(h if cache is None else h[:, -1:]))  # (B, T, vocab_size), or (B, 1, vocab_size)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        balance, z = (torch.stack(values).mean() for values in zip(*all_aux, strict=True))
        return Output(logits, loss, balance, z)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, n_token: int | None = None, **choice) -> Iterator[Tensor]:
        """Continue tokens (B, T): yield max_new_tokens times the next (B) ids, as soon as they are known.

        The context is at most block_size tokens; whenever it is full, its older half is dropped and the rest read
        afresh. Only ids below n_token, the encoding's vocabulary, are chosen; `choice` goes to `choose`.
        """
        unread, cache = tokens[:, -self.config.block_size :], [{} for _ in self.blocks]
        for _ in range(max_new_tokens):
            next_token = choose(self(unread, cache=cache).logits[:, 0, :n_token].float(), **choice)
            yield next_token
            tokens = torch.cat([tokens, next_token[:, None]], dim=1)
            unread = tokens[:, -1:]
            if cache[0]["k"].shape[2] == self.config.block_size:
                unread, cache = tokens[:, -(self.config.block_size // 2) :], [{} for _ in self.blocks]

    def cost(self) -> dict[str, int]:
        """parameters: all. active: those a token uses, embeddings whole. multiply_adds: per token, of all products of a
        forward pass over a full window, nothing masked. aggregator: those of the graph, whose matrices work on K nodes.
        """
        c = self.config
        cost = {"parameters": 0, "active": 0, "multiply_adds": 2 * c.n_layer * c.block_size * c.n_embd, "aggregator": 0}
        for name, weight in self.named_parameters():
            used = weight.numel() * c.top_k // c.n_expert if ".experts." in name else weight.numel()
            cost["parameters"] += weight.numel()
            cost["active"] += used
            looked_up = weight is self.embed.weight and not c.tie_embeddings
            if weight.dim() > 1 and not looked_up:
                products = used * c.top_k if ".aggregate.layers." in name else used  # `layers` work on every node
                cost["multiply_adds"] += products
                cost["aggregator"] += products if ".aggregate." in name else 0
        return cost


def choose(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, generator=None
) -> Tensor:
    """logits (B, n_token) → (B) ids, the likeliest, or drawn among the top_k and the nucleus top_p (Holtzman 2020)."""
    if temperature < 1e-4:  # dividing by less would overflow, and the likeliest wins anyway
        return logits.argmax(dim=-1)
    logits, token = (logits / temperature).sort(dim=-1, descending=True)  # likeliest first
    prob = logits.softmax(dim=-1)
    if top_p is not None:
        likelier = prob.cumsum(dim=-1) - prob  # total probability of all likelier ones
        prob = prob.masked_fill(likelier >= top_p, 0.0)
    if top_k is not None:
        prob[:, top_k:] = 0.0
    rank = torch.multinomial(prob, 1, generator=generator)
    return token.gather(1, rank).squeeze(1)
