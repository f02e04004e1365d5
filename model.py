"""DAG-MoE in one file: a Llama-style GPT whose mixture-of-experts layers end in a small graph.

A mixture-of-experts (MoE) layer has E small feed-forward networks, the experts. For every token, a
router picks K of them, and the layer adds up their outputs, each scaled by a weight from the
router. DAG-MoE (arXiv 2606.01062 v1; "Eq. 7" is an equation there) replaces this sum with a graph
whose nodes are the K outputs. For L rounds, every node sends a message to every node, itself
included. This is a lot like attention among K tokens, with three differences:
- An edge has D gates, one per channel, where attention has one softmax weight.
- A message depends on both its sender and its receiver; attention's value, on the sender only.
- There are no positions: node i is the token's i-th choice, whichever expert that is.

The file starts with the graph, goes on to what feeds it, and ends with the transformer around
both. This is where they meet, in MoE.forward:

    x = self.norm(h)                                         # (S, C), what the experts read
    weight, expert, balance_loss, z_loss = self.router(x)    # (S, K), (S, K) and two numbers
    out = self.experts(x, expert)                            # (S, K, C), an output per choice
    h = self.aggregate(h, out, weight)                       # (S, C), by a sum or by a graph

Letters in comments and shapes, with the paper's letter in brackets where it differs:

    S                     tokens in a batch, B sequences of T
    C  n_embd [d]         width of the residual stream h
    E  n_expert [N]       experts per layer
    K  top_k              experts chosen per token
    H  expert_dim [d_r]   hidden width of an expert
    L  dag_depth          depth of the graph
    D  dag_dim [d_g]      width of the graph's messages
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # in every RMSNorm, x / sqrt(mean(x²) + eps) · scale


@dataclass(frozen=True)
class ModelConfig:
    """Everything that defines the network. Incompatible sizes raise a ValueError."""

    vocab_size: int = 257  # number of token ids
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 4  # blocks of attention and MoE
    n_head: int = 4  # query heads per layer
    n_kv_head: int = 2  # key/value heads, each shared by several query heads
    n_embd: int = 128  # C, width of the residual stream
    rope_theta: float = 10000.0  # base of the rotary positions
    tie_embeddings: bool = True  # use the embedding matrix as the output layer, too
    n_expert: int = 16  # E, experts per layer
    top_k: int = 4  # K, experts chosen per token
    norm_topk: bool = True  # divide the K weights by their sum (ignored if K = 1)
    expert_dim: int = 64  # H, hidden width of an expert
    shared_dim: int = 0  # hidden width of a shared expert that every token uses; 0: none
    aggregator: str = "dag"  # how the K outputs are combined: sum or dag
    dag_depth: int = 2  # L, depth of the graph
    dag_dim: int = 32  # D, width of the graph's messages
    dag_gate: str = "silu"  # σ of Eq. 9: silu or sigmoid

    def __post_init__(self):
        check_sizes(self)


def pairwise(linear: nn.Linear, z: Tensor) -> Tensor:
    """Apply a linear map to concat(z_i, z_j) for all pairs of nodes: z (S, K, D) → (S, K, K, D).

    The concatenation of Eq. 8 is never built: since W concat(z_i, z_j) = W1 z_i + W2 z_j, each half
    of W works on K nodes instead of K² pairs.
    """
    w1, w2 = linear.weight.chunk(2, dim=1)  # the two halves
    receiver = F.linear(z, w1).unsqueeze(2)  # (S, K, 1, D), index i
    sender = F.linear(z, w2).unsqueeze(1)  # (S, 1, K, D), index j
    return receiver + sender  # (S, K, K, D): [s, i, j] is the edge j → i


class DAGLayer(nn.Module):
    """One step of depth: every node of a token hears every node, itself included (Eq. 7 to 11)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.dag_dim
        self.norm = nn.RMSNorm(C, NORM_EPS)
        self.w_down = nn.Linear(C, D, bias=False)
        self.w_edge = nn.Linear(2 * D, D, bias=False)
        self.w_node = nn.Linear(2 * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)
        self.sigma = torch.sigmoid if config.dag_gate == "sigmoid" else F.silu
        # W_up starts at zero, so a new graph passes its nodes on unchanged, and a new DAG-MoE is
        # the weighted sum. W_up itself has a gradient from the first step on; the layer's
        # other matrices get one once W_up is no longer zero.
        nn.init.zeros_(self.w_up.weight)

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gates and messages of all edges: node (S, K, C) → e, m (S, K, K, D)."""
        z = self.w_down(self.norm(node))  # Eq. 7, (S, K, D); RMSNorm where the paper has LayerNorm
        e = self.sigma(pairwise(self.w_edge, z))  # Eq. 9: e[s, i, j] has D gates
        m = e * pairwise(self.w_node, z)  # Eq. 10
        return e, m

    def forward(self, node: Tensor) -> Tensor:
        """Take all nodes from one depth to the next: (S, K, C) → (S, K, C)."""
        e, m = self.edges(node)  # m includes e; tests and pictures use both
        return node + self.w_up(m.sum(dim=2))  # Eq. 11, summed over the senders j


class DAGAggregator(nn.Module):
    """Combine a token's K outputs as DAG-MoE does: by a graph of depth L (Eq. 6 to 12)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(DAGLayer(config) for _ in range(config.dag_depth))

    def forward(self, h: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """Combine h (S, C) and outputs (S, K, C), with weights (S, K), into the new h (S, C)."""
        S, K, C = out.shape
        # Every node gets h / K, so that it knows its token, and the sum over nodes holds h once.
        node = weight.unsqueeze(-1) * out + h.unsqueeze(1) / K  # Eq. 6, (S, K, C)
        for layer in self.layers:
            node = layer(node)  # Eq. 7 to 11
        return node.sum(dim=1)  # Eq. 12


class WeightedSum(nn.Module):
    """Combine a token's K outputs as a standard MoE does: by their weighted sum."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def forward(self, h: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """Return h + Σ_i g_i E_i(x): h (S, C), outputs (S, K, C), weights (S, K) → (S, C)."""
        return h + (weight.unsqueeze(-1) * out).sum(dim=1)


AGGREGATORS = {"sum": WeightedSum, "dag": DAGAggregator}  # lab/baselines.py adds others


class Router(nn.Module):
    """Choose K of E experts for each token, and weigh them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k
        # As in Mixtral, the K weights are divided by their sum. If K = 1, that would make the
        # weight a constant 1, which teaches the router nothing, so then it is left alone.
        self.renormalize = config.norm_topk and config.top_k > 1
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Route x (S, C): return weights (S, K), expert ids (S, K), balance loss and z-loss."""
        # In float32 even under autocast: in bfloat16, close logits would often round to a tie.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)  # (S, E)
        prob = logits.softmax(dim=-1)
        weight, expert = prob.topk(self.top_k, dim=-1)  # the most probable expert first
        if self.renormalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)

        # Dividing by the sum cancels the other experts' logits, so the cross-entropy trains only
        # those of the K chosen ones. Two more losses reach all E.
        #
        # The balance loss E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961) keeps the router
        # from favoring a few experts: f_e is expert e's share of all choices, P_e its mean
        # probability. It is 1 if all experts are chosen equally often, and up to E/K if always the
        # same K are. f_e is a count and has no gradient, so the router learns from P_e.
        E = len(self.weight)
        share = F.one_hot(expert, E).to(prob.dtype).mean(dim=(0, 1))  # f_e, (E)
        balance_loss = E * (share * prob.mean(dim=0)).sum()
        # The z-loss keeps the logits small (ST-MoE, arXiv 2202.08906).
        z_loss = logits.logsumexp(dim=-1).square().mean()
        return weight, expert, balance_loss, z_loss


class Experts(nn.Module):
    """E SwiGLU networks, down(SiLU(gate(x)) ⊙ up(x)), with their matrices in three stacks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, C, H = config.n_expert, config.n_embd, config.expert_dim
        self.gate_proj = nn.Parameter(torch.empty(E, H, C))
        self.up_proj = nn.Parameter(torch.empty(E, H, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, H))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """Run each token through its chosen experts: x (S, C), ids (S, K) → out (S, K, C)."""
        S, K = expert.shape
        E, C, H = self.down_proj.shape
        # Sort the S·K choices, so that each expert's rows are next to each other. For E = 3:
        #     expert   2  0  2  1  0    what each of five choices asks for
        #     order    1  4  3  0  2    sorted: choices 1 and 4 want expert 0, choice 3 wants 1
        #     ends     2  3  5          rows 0 and 1 are expert 0's, row 2 is expert 1's, and so on
        order = expert.flatten().argsort(stable=True)
        ends = F.one_hot(expert, E).sum(dim=(0, 1)).cumsum(dim=0, dtype=torch.int32)
        rows = x.index_select(0, order // K)  # (S·K, C): choice n belongs to token n // K
        gate = grouped_linear(rows, self.gate_proj, ends)  # (S·K, H)
        up = grouped_linear(rows, self.up_proj, ends)
        rows = grouped_linear(F.silu(gate) * up, self.down_proj, ends)  # (S·K, C)
        return rows.index_select(0, order.argsort()).view(S, K, C)  # undo the sort


def grouped_linear(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix: rows (N, I), matrices (E, O, I) → (N, O).

    Group e ends just before row ends[e].
    """
    device = rows.device.type
    if torch.is_autocast_enabled(device):  # autocast handles F.linear, but not F.grouped_mm
        dtype = torch.get_autocast_dtype(device)
        rows, matrices = rows.to(dtype), matrices.to(dtype)
    if has_grouped_kernel(rows, matrices):
        return F.grouped_mm(rows, matrices.mT, offs=ends)  # the two lines below, in one kernel
    groups = rows.tensor_split(ends[:-1].long().cpu())
    return torch.cat([F.linear(group, w) for group, w in zip(groups, matrices, strict=True)])


def has_grouped_kernel(rows: Tensor, matrices: Tensor) -> bool:
    """Tell whether F.grouped_mm takes these: it is particular about dtypes and alignment."""
    kernels = [("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]
    if not torch.compiler.is_compiling():  # torch.compile knows it in bfloat16 only
        kernels.append(("cpu", torch.float32))
    row_bytes = [size * rows.element_size() for size in matrices.shape[1:]]
    is_aligned = all(size % 16 == 0 for size in row_bytes)
    return is_aligned and (rows.device.type, rows.dtype) in kernels


class SwiGLU(nn.Module):
    """The shared expert, which every token uses."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(SiLU(gate(x)) ⊙ up(x)): (..., dim) → (..., dim)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """The second half of a block: normalize, route, apply experts, combine their outputs with h."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.router = Router(config)
        self.experts = Experts(config)
        self.aggregate = AGGREGATORS[config.aggregator](config)
        self.shared = SwiGLU(config.n_embd, config.shared_dim) if config.shared_dim else None

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update the residual stream h (B, T, C); return it, the balance loss and the z-loss."""
        x = self.norm(h).flatten(0, 1)  # (S, C)
        weight, expert, balance_loss, z_loss = self.router(x)
        out = self.experts(x, expert)  # (S, K, C)
        new_h = self.aggregate(h.flatten(0, 1), out, weight)  # (S, C)
        if self.shared is not None:
            new_h = new_h + self.shared(x)
        return new_h.view_as(h), balance_loss, z_loss


def rope_table(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines that `rotate` needs: position (T) → (T, head_dim / 2) each."""
    channel = torch.arange(0, head_dim, 2, device=position.device)
    angle = position[:, None] * theta ** (-channel / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, heads, T, head_dim) by position, so that q · k depends on distances (RoPE)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # channel i is paired with i + head_dim / 2, as in Llama
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KVCache:
    """The keys and values of the tokens that an attention layer has seen so far."""

    def __init__(self):
        self.k = None  # (B, n_kv_head, tokens, head_dim)
        self.v = None

    @property
    def n_tokens(self) -> int:
        """Return how many tokens per sequence it holds."""
        return 0 if self.k is None else self.k.shape[2]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, and return those of all tokens."""
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)
            v = torch.cat([self.v, v], dim=2)
        self.k = k
        self.v = v
        return k, v


class Attention(nn.Module):
    """Causal attention in which groups of query heads share one key/value head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C = config.n_embd
        self.head_dim = C // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(C, C, bias=False)
        self.k_proj = nn.Linear(C, kv_dim, bias=False)
        self.v_proj = nn.Linear(C, kv_dim, bias=False)
        self.o_proj = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None) -> Tensor:
        """Let each token of x (B, T, C) attend to itself and to those before it → (B, T, C)."""
        B, T, C = x.shape
        shape = (B, T, -1, self.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_proj(x).view(shape).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q = rotate(q, rope)
        k = rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(k, v)
        # A single token, the newest, may look at everything in the cache.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """One layer: attention, then MoE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.attention = Attention(config)
        self.moe = MoE(config)

    def forward(self, h: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None):
        """Update h (B, T, C); return it, the balance loss and the z-loss of the router."""
        h = h + self.attention(self.norm(h), rope, cache)
        return self.moe(h)


class Output(NamedTuple):
    """What GPT.forward returns."""

    logits: Tensor  # (B, T, vocab_size), or with caches (B, 1, vocab_size)
    loss: Tensor | None  # cross-entropy in nats per token and nothing else; None without targets
    balance_loss: Tensor  # mean over layers
    z_loss: Tensor  # mean over layers


class GPT(nn.Module):
    """A decoder-only language model, built like Llama 3, with an MoE in every layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every matrix from its own random generator, seeded with the matrix's name.

        This way, two models with the same seed, say a sum and a dag, start with the same numbers
        in every matrix that they share.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 1 or name.endswith("w_up.weight"):
                continue  # the scales of norms stay 1, and W_up of a graph stays 0
            std = 0.02
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                # These write into the residual stream, twice per layer: smaller, as in GPT-2.
                std = 0.02 / (2 * self.config.n_layer) ** 0.5
            seed = torch.initial_seed() ^ zlib.crc32(name.encode())
            nn.init.normal_(weight, std=std, generator=torch.Generator().manual_seed(seed))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Output:
        """Predict what follows each of tokens (B, T). Targets of -1 are ignored.

        With caches, one per layer, a single token per sequence continues what they hold, and only
        the last token gets logits.
        """
        B, T = tokens.shape
        config = self.config
        start = caches[0].n_tokens if caches else 0
        if start + T > config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size {config.block_size}")
        if start > 0 and T > 1:
            raise ValueError(f"a cache that holds tokens takes one more at a time, got {T}")
        position = torch.arange(start, start + T, device=tokens.device)
        rope = rope_table(position, config.n_embd // config.n_head, config.rope_theta)
        h = self.embed(tokens)  # (B, T, C)
        balance_losses = []
        z_losses = []
        for i, block in enumerate(self.blocks):
            h, balance_loss, z_loss = block(h, rope, caches[i] if caches else None)
            balance_losses.append(balance_loss)
            z_losses.append(z_loss)
        if caches:
            h = h[:, -1:]
        logits = self.head(self.norm(h))
        loss = None
        if targets is not None:
            # In float32: bfloat16 would round the loss to one part in 200.
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        balance_loss = torch.stack(balance_losses).mean()
        z_loss = torch.stack(z_losses).mean()
        return Output(logits, loss, balance_loss, z_loss)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature=1.0, top_k=None, top_p=None
    ):
        """Continue tokens (B, T): yield the next ids (B), max_new_tokens times."""
        block_size = self.config.block_size
        context = tokens[:, -block_size:]
        caches = [KVCache() for _ in self.blocks]
        for _ in range(max_new_tokens):
            unread = context[:, caches[0].n_tokens :]
            logits = self(unread, caches=caches).logits[:, -1].float()
            next_token = choose(logits, temperature, top_k, top_p)
            yield next_token
            context = torch.cat([context, next_token[:, None]], dim=1)
            if context.shape[1] > block_size:  # full: drop the older half and reread the rest
                context = context[:, -((block_size + 1) // 2) :]
                caches = [KVCache() for _ in self.blocks]


def choose(logits: Tensor, temperature=1.0, top_k=None, top_p=None) -> Tensor:
    """Draw an id per row of logits (B, vocab_size) → (B), from the top_k and top_p likeliest."""
    if temperature < 1e-4:  # greedy; dividing by it could overflow
        return logits.argmax(dim=-1)
    prob = (logits / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return torch.multinomial(prob, 1).squeeze(1)
    prob, token = prob.sort(dim=-1, descending=True)
    if top_p is not None:  # the fewest ids whose probabilities add up to top_p (arXiv 1904.09751)
        before = prob.cumsum(dim=-1) - prob  # the probability of all likelier ids
        prob = prob.masked_fill(before >= top_p, 0.0)
    if top_k is not None:
        prob[:, top_k:] = 0.0
    place = torch.multinomial(prob, 1)  # in the sorted order; multinomial normalizes
    return token.gather(1, place).squeeze(1)


def check_sizes(c: ModelConfig) -> None:
    """Raise a ValueError, with the numbers, if the sizes do not fit together."""
    if c.n_embd % (2 * c.n_head) != 0:
        raise ValueError(f"n_embd ({c.n_embd}) must be a multiple of 2·n_head ({2 * c.n_head})")
    if c.n_head % c.n_kv_head != 0:
        raise ValueError(f"n_head ({c.n_head}) must be a multiple of n_kv_head ({c.n_kv_head})")
    if c.top_k > c.n_expert:
        raise ValueError(f"top_k ({c.top_k}) must not exceed n_expert ({c.n_expert})")
    if c.aggregator not in AGGREGATORS:
        raise ValueError(f"aggregator must be {' or '.join(AGGREGATORS)}, got {c.aggregator!r}")
    if c.dag_gate not in ("sigmoid", "silu"):
        raise ValueError(f"dag_gate must be sigmoid or silu, got {c.dag_gate!r}")
