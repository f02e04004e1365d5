"""DAG-MoE in one file: a Llama-style GPT whose mixture-of-experts layers end in a small graph.

A mixture-of-experts (MoE) layer has E small feed-forward networks, the experts. For every token a
router chooses K of them, and the layer adds up their K outputs, each times a weight from the
router. In DAG-MoE (arXiv 2606.01062 v1; "Eq. 7" is an equation there) the K outputs of a token
first talk to each other L times, much as K tokens do in attention. Compared with attention:
- An edge from output j to output i has D gates, one per channel, instead of one softmax weight.
- The message on an edge depends on both of its ends, where attention's value is the sender's alone.
- Every output hears every output, itself included, and all pairs share the same matrices.
- There are no positions: node i is the token's i-th choice, whichever expert that is.

The graph comes first, then what feeds it, then the transformer around both. They meet in MoE:

    weight, expert, aux = self.router(x)      # (S, K), (S, K), two losses for the router's sake
    out = self.experts(x, expert)             # (S, K, C), one output per chosen expert
    h = self.aggregate(h, out, weight)        # (S, C), by a WeightedSum or by a DAGAggregator

Letters in comments and shapes, with the paper's letter in brackets where it is another one:

    C  n_embd [d]         width of the residual stream h | S       tokens, in B sequences of T
    E  n_expert [N]       experts per layer              | x       RMSNorm(h), what experts read
    K  top_k              experts chosen per token       | weight  router's weight of a choice [g]
    H  expert_dim [d_r]   hidden width of an expert      | out     output of a choice [E(x)]
    L  dag_depth          depth of the graph             | node    a choice in the graph [n_i]
    D  dag_dim [d_g]      width of the graph's messages  | e, m    gates and message of an edge
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # in every RMSNorm, x / sqrt(mean(x²) + eps) · scale
INIT_STD = 0.02  # of a new matrix, times its init_scale (see GPT)


@dataclass(frozen=True)
class ModelConfig:
    """The settings that determine the network. Impossible sizes raise a ValueError."""

    vocab_size: int = 257  # number of token ids
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 4  # blocks of attention and MoE
    n_head: int = 4  # query heads of an attention
    n_kv_head: int = 2  # key/value heads; several query heads share one
    n_embd: int = 128  # C, width of the residual stream
    rope_theta: float = 10000.0  # base wavelength of the rotary positions
    tie_embeddings: bool = True  # the output layer is the embedding, transposed
    n_expert: int = 16  # E, experts per layer
    top_k: int = 4  # K, experts chosen per token
    norm_topk: bool = True  # divide the K weights by their sum (never if K = 1)
    expert_dim: int = 64  # H, hidden width of an expert
    shared_dim: int = 0  # hidden width of an expert for all tokens; 0: none
    aggregator: str = "dag"  # how the K outputs are combined: sum or dag
    dag_depth: int = 2  # L, depth of the graph
    dag_dim: int = 32  # D, width of the graph's messages
    dag_gate: str = "silu"  # σ of Eq. 9: silu or sigmoid

    def __post_init__(self):
        check_sizes(self)


def pairwise(linear: nn.Linear, z: Tensor) -> Tensor:
    """Apply a linear map to concat(z_i, z_j) for all pairs of nodes: z (S, K, D) → (S, K, K, D).

    As W concat(z_i, z_j) = W1 z_i + W2 z_j, each half of W works on K nodes, not on K² pairs.
    """
    w1, w2 = linear.weight.chunk(2, dim=1)  # (D, D) each
    receiver = F.linear(z, w1).unsqueeze(2)  # (S, K, 1, D), index i
    sender = F.linear(z, w2).unsqueeze(1)  # (S, 1, K, D), index j
    return receiver + sender  # Eq. 8, (S, K, K, D): [s, i, j] is the edge j → i


class DAGLayer(nn.Module):
    """One step of depth: every node of a token hears every node, itself included (Eq. 7 to 11)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.dag_dim
        self.sigma = torch.sigmoid if config.dag_gate == "sigmoid" else F.silu
        self.norm = nn.RMSNorm(C, NORM_EPS)
        self.w_down = nn.Linear(C, D, bias=False)
        self.w_edge = nn.Linear(2 * D, D, bias=False)
        self.w_node = nn.Linear(2 * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)
        # W_up begins at zero, so a new graph passes its nodes on unchanged, and a new DAG-MoE is
        # the weighted sum. It still learns: the gradient of W_up is made of the messages, which are
        # not zero. The other three matrices get a gradient as soon as W_up has left zero.
        nn.init.zeros_(self.w_up.weight)
        self.w_up.weight.init_scale = 0.0  # so that GPT leaves it at zero, too

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gates and messages of all edges: node (S, K, C) → e, m (S, K, K, D)."""
        # RMSNorm divides a node by its root mean square, and scales its channels. W_down is linear:
        # the scale goes into it, and the division comes after it, on D channels instead of C.
        rms = (node.square().mean(dim=-1, keepdim=True) + NORM_EPS).sqrt()  # (S, K, 1)
        z = F.linear(node, self.w_down.weight * self.norm.weight) / rms  # Eq. 7, (S, K, D)
        e = self.sigma(pairwise(self.w_edge, z))  # Eq. 9: e[s, i, j] has D gates
        m = e * pairwise(self.w_node, z)  # Eq. 10
        return e, m

    def forward(self, node: Tensor) -> Tensor:
        """Take all nodes from one depth to the next: (S, K, C) → (S, K, C)."""
        _, m = self.edges(node)
        return node + self.w_up(m.sum(dim=2))  # Eq. 11, Σ over the senders j


class DAGAggregator(nn.Module):
    """DAG-MoE's way to combine the K outputs of a token: a graph of depth L (Eq. 6 to 12)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = nn.ModuleList(DAGLayer(config) for _ in range(config.dag_depth))

    def forward(self, h: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """Combine h (S, C) and outputs (S, K, C), with weights (S, K), into the new h (S, C)."""
        S, K, C = out.shape
        # Every node carries a K-th of h, so that it knows its token, and yet the sum of all nodes
        # has h exactly once: Σ_i (g_i E_i(x) + h / K) = h + Σ_i g_i E_i(x).
        node = weight.unsqueeze(-1) * out + h.unsqueeze(1) / K  # Eq. 6, (S, K, C)
        for layer in self.layers:
            node = layer(node)  # Eq. 7 to 11
        return node.sum(dim=1)  # Eq. 12


class WeightedSum(nn.Module):
    """The standard MoE's way to combine the K outputs of a token, which is linear in them."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def forward(self, h: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """Return h + Σ_i g_i E_i(x): h (S, C), outputs (S, K, C), weights (S, K) → (S, C)."""
        return h + (weight.unsqueeze(-1) * out).sum(dim=1)


class Router(nn.Module):
    """The router chooses K of E experts for each token, and says how much each of them counts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.top_k
        # Divided by their sum, as in Mixtral, the K weights add up to 1 whatever K is. A single
        # weight is not divided: it would always be 1, and the router would learn nothing from it.
        self.renormalise = config.norm_topk and config.top_k > 1
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))  # W_r, drawn by GPT

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route x (S, C): return weights (S, K), largest first, expert ids (S, K), and aux (2)."""
        # Always float32: a choice is all or nothing, and bfloat16 would round close logits to
        # ties, so that a token's experts would depend on the precision it is computed in.
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(self.weight.dtype), self.weight)  # (S, E)
        prob = logits.softmax(dim=-1)
        weight, expert = prob.topk(self.top_k, dim=-1)
        if self.renormalise:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        # Left alone, a router favours few experts. So the balance loss E Σ_e f_e P_e (Switch) makes
        # an expert's mean probability P_e cost the more, the larger its share f_e of all choices.
        # Shares are counts and have no gradient: it reaches the router through P_e alone.
        E = len(self.weight)
        share = F.one_hot(expert, E).to(prob.dtype).mean(dim=(0, 1))  # f_e, (E)
        balance_loss = E * (share * prob.mean(dim=0)).sum()
        z_loss = logits.logsumexp(dim=-1).square().mean()  # keeps logits small (ST-MoE)
        return weight, expert, torch.stack([balance_loss, z_loss])


class Experts(nn.Module):
    """Experts are SwiGLU networks, down(SiLU(gate(x)) ⊙ up(x)), all in three stacked tensors."""

    def __init__(self, config: ModelConfig, n_expert: int, hidden_dim: int):
        super().__init__()
        E, C, H = n_expert, config.n_embd, hidden_dim
        self.gate_proj = nn.Parameter(torch.empty(E, H, C))
        self.up_proj = nn.Parameter(torch.empty(E, H, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, H))
        # 2·n_layer modules add to the residual stream. As in GPT-2 each starts that much smaller.
        self.down_proj.init_scale = (2 * config.n_layer) ** -0.5

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """Apply to each token its chosen experts: x (S, C), expert ids (S, K) → out (S, K, C)."""
        S, K = expert.shape
        E, C, H = self.down_proj.shape
        # Sort the S·K slots, one per choice, so that an expert's rows are side by side. If E = 3:
        #     expert   2  0  2  1  0    what each of five slots asks for
        #     order    1  4  3  0  2    sorted: slots 1 and 4 want expert 0, slot 3 wants expert 1
        #     ends     2  3  5          rows 0 and 1 are expert 0's, row 2 is expert 1's, and so on
        order = expert.flatten().argsort(stable=True)
        ends = F.one_hot(expert, E).sum(dim=(0, 1)).cumsum(dim=0, dtype=torch.int32)
        rows = x.index_select(0, order // K)  # (S·K, C): slot n belongs to token n // K
        groups = choose_groups(rows, self.down_proj, ends)
        hidden = F.silu(grouped_linear(rows, self.gate_proj, groups))  # (S·K, H)
        hidden = hidden * grouped_linear(rows, self.up_proj, groups)
        rows = grouped_linear(hidden, self.down_proj, groups)  # (S·K, C)
        return rows.index_select(0, order.argsort()).view(S, K, C)  # undoes the sort


class MoE(nn.Module):
    """The second half of a block: normalise, route, apply experts, combine their outputs with h."""

    def __init__(self, config: ModelConfig, aggregate: nn.Module):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.router = Router(config)
        self.experts = Experts(config, config.n_expert, config.expert_dim)
        self.aggregate = aggregate
        self.shared = Experts(config, 1, config.shared_dim) if config.shared_dim else None

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take h (B, T, C) to the new h (B, T, C), which includes the old one, and aux (2)."""
        x = self.norm(h).flatten(0, 1)  # (S, C)
        weight, expert, aux = self.router(x)
        out = self.experts(x, expert)  # (S, K, C)
        new_h = self.aggregate(h.flatten(0, 1), out, weight)  # (S, C)
        if self.shared is not None:
            number_0 = torch.zeros_like(expert[:, :1])  # (S, 1), its only expert
            new_h = new_h + self.shared(x, number_0).squeeze(1)
        return new_h.view_as(h), aux


FEED_FORWARD = {  # by config.aggregator; lab/baselines.py adds others
    "sum": lambda config: MoE(config, WeightedSum(config)),
    "dag": lambda config: MoE(config, DAGAggregator(config)),
}


def rope_table(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines that `rotate` needs: position (T) → (T, head_dim / 2) each."""
    channel = torch.arange(0, head_dim, 2, device=position.device)
    angle = position[:, None] * theta ** (-channel / head_dim)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels of x (B, heads, T, head_dim), so that q · k sees distances (RoPE)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # channel i is paired with i + head_dim / 2, as in Llama
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


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
        self.o_proj.weight.init_scale = (2 * config.n_layer) ** -0.5  # see Experts

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: dict | None = None) -> Tensor:
        """Let each token of x (B, T, C) look at itself and at those before it → (B, T, C)."""
        B, T, C = x.shape
        heads = (B, T, -1, self.head_dim)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        q = rotate(q, rope)
        k = rotate(k, rope)
        if cache:
            k = torch.cat([cache["k"], k], dim=2)
            v = torch.cat([cache["v"], v], dim=2)
        if cache is not None:
            cache.update(k=k, v=v)
        # Tokens that follow cached ones come one by one (T = 1), and each may look at all of them.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """One layer of the network: an attention, then an MoE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.attention = Attention(config)
        self.moe = FEED_FORWARD[config.aggregator](config)

    def forward(self, h: Tensor, rope: tuple, cache: dict | None = None) -> tuple[Tensor, Tensor]:
        """Take h (B, T, C) to the new h (B, T, C), and aux (2) of the router."""
        h = h + self.attention(self.norm(h), rope, cache)
        return self.moe(h)


class Output(NamedTuple):
    """What GPT.forward returns, always."""

    logits: Tensor  # (B, T, vocab_size), or with a cache (B, 1, vocab_size)
    loss: Tensor | None  # cross-entropy in nats per token and nothing else; None without targets
    balance_loss: Tensor  # mean over layers: 1 if experts are used alike, E/K if always the same K
    z_loss: Tensor  # mean over layers


class GPT(nn.Module):
    """A decoder-only language model, laid out as Llama 3, with an MoE in every layer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        # Every matrix has a random generator of its own, seeded with its name. So two models of one
        # seed, a sum and a dag, begin with the same numbers in all matrices that both have.
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:  # the scales of the norms remain 1
                seed = torch.initial_seed() ^ zlib.crc32(name.encode())
                generator = torch.Generator().manual_seed(seed)
                std = INIT_STD * getattr(parameter, "init_scale", 1.0)
                nn.init.normal_(parameter, 0.0, std, generator=generator)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache=None) -> Output:
        """Predict what follows each of tokens (B, T). Targets (B, T) that are -1 add no loss.

        With a cache, a dict per layer, tokens continue what it holds, and only the last has logits.
        """
        B, T = tokens.shape
        config = self.config
        start = cache[0]["k"].shape[2] if cache and cache[0] else 0  # tokens in the cache
        if start + T > config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size {config.block_size}")
        position = torch.arange(start, start + T, device=tokens.device)
        rope = rope_table(position, config.n_embd // config.n_head, config.rope_theta)
        h = self.embed(tokens)  # (B, T, C)
        all_aux = []
        for i, block in enumerate(self.blocks):
            h, aux = block(h, rope, cache[i] if cache else None)
            all_aux.append(aux)
        if cache is not None:
            h = h[:, -1:]
        logits = self.head(self.norm(h))
        loss = None
        if targets is not None:
            # In float32: exp and log of bfloat16 numbers would round the loss to 1 in 200.
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        balance_loss, z_loss = torch.stack(all_aux).mean(dim=0)
        return Output(logits, loss, balance_loss, z_loss)

    @torch.no_grad()
    def generate(self, tokens: Tensor, max_new_tokens: int, allowed=None, **sampling):
        """Continue tokens (B, T): yield max_new_tokens times the next (B) ids, see `choose`."""
        block_size = self.config.block_size
        context = tokens[:, -block_size:]
        unread = context  # what the cache does not hold yet
        cache = [{} for _ in self.blocks]
        for _ in range(max_new_tokens):
            logits = self(unread, cache=cache).logits[:, -1].float()
            if allowed is not None:  # (vocab_size): False for ids without a text
                logits = logits.masked_fill(~allowed, -torch.inf)
            next_token = choose(logits, **sampling)
            yield next_token
            unread = next_token[:, None]
            context = torch.cat([context, unread], dim=1)
            if context.shape[1] > block_size:  # drop the older half, reread the rest
                context = context[:, -(block_size // 2) :]
                unread = context
                cache = [{} for _ in self.blocks]


def choose(logits: Tensor, temperature=1.0, top_k=None, top_p=None, generator=None) -> Tensor:
    """Draw an id per row of logits (B, vocab_size) → (B), within top_k and top_p."""
    if temperature < 1e-4:  # the likeliest wins, and dividing might overflow
        return logits.argmax(dim=-1)
    prob = (logits / temperature).softmax(dim=-1)
    if top_p is not None:  # the fewest ids that hold this probability (Holtzman)
        sorted_prob, token = prob.sort(dim=-1, descending=True)
        likelier = sorted_prob.cumsum(dim=-1) - sorted_prob  # the probability of all before it
        sorted_prob = sorted_prob.masked_fill(likelier >= top_p, 0.0)
        prob = torch.zeros_like(prob).scatter(1, token, sorted_prob)
    if top_k is not None:
        best, token = prob.topk(min(top_k, prob.shape[1]), dim=-1)
        prob = torch.zeros_like(prob).scatter(1, token, best)
    return torch.multinomial(prob, 1, generator=generator).squeeze(1)


def choose_groups(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor | list[int]:
    """Return where the groups of rows end, if F.grouped_mm works here, or else a list of sizes."""
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
    # It takes bfloat16, on the CPU also float32 unless compiled, and rows of full 16 bytes.
    float32_works = device == "cpu" and not torch.compiler.is_compiling()
    dtype_works = dtype == torch.bfloat16 or (dtype == torch.float32 and float32_works)
    aligned = all(size * dtype.itemsize % 16 == 0 for size in matrices.shape[1:])
    if device in ("cpu", "cuda") and dtype_works and aligned:
        return ends
    return ends.diff(prepend=ends.new_zeros(1)).tolist()  # waits for the device


def grouped_linear(rows: Tensor, matrices: Tensor, groups: Tensor | list[int]) -> Tensor:
    """Multiply each group of rows by its own matrix: rows (N, I), matrices (E, O, I) → (N, O).

    The last two lines say what is computed; those above let one kernel do it, where it can.
    """
    if torch.is_autocast_enabled(rows.device.type):  # which does not know F.grouped_mm
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, matrices = rows.to(dtype), matrices.to(dtype)
    if isinstance(groups, Tensor):
        return F.grouped_mm(rows, matrices.transpose(1, 2), offs=groups)
    pairs = zip(rows.split(groups), matrices, strict=True)
    return torch.cat([F.linear(group, matrix) for group, matrix in pairs])


def check_sizes(c: ModelConfig) -> None:
    """Raise a ValueError, with the numbers, if no network can have these sizes."""
    for name, value in vars(c).items():
        least = {"shared_dim": 0, "block_size": 2}.get(name, 1)
        if type(value) in (int, float) and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if c.n_embd % (2 * c.n_head) != 0:
        raise ValueError(f"n_embd ({c.n_embd}) must be a multiple of 2·n_head ({2 * c.n_head})")
    if c.n_head % c.n_kv_head != 0:
        raise ValueError(f"n_head ({c.n_head}) must be a multiple of n_kv_head ({c.n_kv_head})")
    if c.top_k > c.n_expert:
        raise ValueError(f"top_k ({c.top_k}) must not exceed n_expert ({c.n_expert})")
    if c.aggregator not in FEED_FORWARD:
        raise ValueError(f"aggregator must be {' or '.join(FEED_FORWARD)}, got {c.aggregator!r}")
    if c.dag_gate not in ("sigmoid", "silu"):
        raise ValueError(f"dag_gate must be sigmoid or silu, got {c.dag_gate!r}")
