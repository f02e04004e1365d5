"""What the paper compares DAG-MoE with, and DAG-MoE with one part taken out.

    python -m lab.baselines configs/quickstart.toml --aggregator=mlp --out_dir=out/mlp

This is train.py with more values for --aggregator. Three of them take the place of the graph:

    mlp           an MLP over all K nodes, without gates: the paper's control
    dag_ungated   the graph without Eq. 9: every edge is open
    dag_self      the graph without edges between different nodes

Three take the place of the whole MoE:

    series        two MoEs, one after the other, with no attention between them
    coe           Chain-of-Experts: two rounds of K/2 experts; the second sees the first's output
    dense         no experts: one SwiGLU network of hidden size K·H

All of them work with --shared_dim as well.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from model import (
    AGGREGATORS,
    GPT,
    NORM_EPS,
    DAGAggregator,
    DAGLayer,
    Experts,
    ModelConfig,
    MoE,
    Router,
    SwiGLU,
    WeightedSum,
    pairwise,
)


class MLPLayer(nn.Module):
    """An MLP over all nodes of a token, which knows their order. With z_i of Eq. 7:

        h' = Σ_i n_i + W_up GELU(W_mix concat(z_1, ..., z_K))

    Departure: the RMSNorm in front of W_down, which the paper has in its graph only.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, K, D = config.n_embd, config.top_k, config.dag_dim
        self.norm = nn.RMSNorm(C, NORM_EPS)
        self.w_down = nn.Linear(C, D, bias=False)
        self.w_mix = nn.Linear(K * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)
        nn.init.zeros_(self.w_up.weight)  # it begins as the weighted sum, as the graph does

    def forward(self, node: Tensor) -> Tensor:
        """Update all nodes: (S, K, C) → (S, K, C)."""
        K = node.shape[1]
        z = self.w_down(self.norm(node))  # Eq. 7, (S, K, D)
        mixed = self.w_up(F.gelu(self.w_mix(z.flatten(1))))  # (S, C)
        # Every node gets a K-th, so that the sum of all nodes, Eq. 12, has it once.
        return node + mixed.unsqueeze(1) / K


class MLPMixing(DAGAggregator):
    """The nodes of Eq. 6, an MLP over all of them, and their sum."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList([MLPLayer(config)])


class UngatedLayer(DAGLayer):
    """One step of depth without gates: e_ij = 1 in Eq. 10."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.w_edge  # of Eq. 9

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gates, all of them 1, and messages: node (S, K, C) → e, m (S, K, K, D)."""
        z = self.w_down(self.norm(node))  # Eq. 7
        m = pairwise(self.w_node, z)  # Eq. 10
        return torch.ones_like(m), m


class UngatedGraph(DAGAggregator):
    """A graph of ungated layers."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(UngatedLayer(config) for _ in range(config.dag_depth))


class SelfLayer(DAGLayer):
    """One step of depth in which a node hears only itself: e_ij = 0 unless i = j."""

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gates and messages: node (S, K, C) → e, m (S, K, K, D)."""
        e, m = super().edges(node)
        K = node.shape[1]
        is_self = torch.eye(K).to(m).unsqueeze(-1)  # (K, K, 1)
        return e * is_self, m * is_self


class SelfGraph(DAGAggregator):
    """A graph whose only edges are from a node to itself."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(SelfLayer(config) for _ in range(config.dag_depth))


class Series(MoE):
    """Two MoEs, one after the other: the plain way to take two steps in a layer.

    The first one is the parent class, so that its weights have the names, and therefore the initial
    values, of a model with one MoE.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.second = MoE(config)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update h (B, T, C); return it, and the means of both routers' losses."""
        h, balance_loss_1, z_loss_1 = super().forward(h)
        h, balance_loss_2, z_loss_2 = self.second(h)
        return h, (balance_loss_1 + balance_loss_2) / 2, (z_loss_1 + z_loss_2) / 2


class ChainOfExperts(nn.Module):
    """Two rounds with the same experts, K/2 of them each, and a router per round.

    Source: arXiv 2506.18945. Departure: each round normalizes h; there, the second round continues
    from the normalized state.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.top_k % 2 != 0:
            raise SystemExit(f"error: coe needs an even top_k, got {config.top_k}")
        half = replace(config, top_k=config.top_k // 2)
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.router = Router(half)
        self.second_router = Router(half)
        self.experts = Experts(config)
        self.shared = SwiGLU(config.n_embd, config.shared_dim) if config.shared_dim else None

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update h (B, T, C); return it, and the means of both routers' losses."""
        new_h, balance_loss_1, z_loss_1 = self.take_round(h, self.router)
        if self.shared is not None:
            new_h = new_h + self.shared(self.norm(h))
        new_h, balance_loss_2, z_loss_2 = self.take_round(new_h, self.second_router)
        return new_h, (balance_loss_1 + balance_loss_2) / 2, (z_loss_1 + z_loss_2) / 2

    def take_round(self, h: Tensor, router: Router) -> tuple[Tensor, Tensor, Tensor]:
        """Add the weighted sum of K/2 experts to h (B, T, C)."""
        x = self.norm(h).flatten(0, 1)  # (S, C)
        weight, expert, balance_loss, z_loss = router(x)
        out = self.experts(x, expert)  # (S, K/2, C)
        weighted_sum = (weight.unsqueeze(-1) * out).sum(dim=1)
        return h + weighted_sum.view_as(h), balance_loss, z_loss


class Dense(nn.Module):
    """One SwiGLU network, with the multiply-adds of the K experts and of the shared one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden_dim = config.top_k * config.expert_dim + config.shared_dim
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.mlp = SwiGLU(config.n_embd, hidden_dim)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update h (B, T, C); return it, and the losses of a perfectly balanced router."""
        return h + self.mlp(self.norm(h)), h.new_tensor(1.0), h.new_tensor(0.0)


AGGREGATORS["mlp"] = MLPMixing
AGGREGATORS["dag_ungated"] = UngatedGraph
AGGREGATORS["dag_self"] = SelfGraph
MOES = {"series": Series, "coe": ChainOfExperts, "dense": Dense}
for name in MOES:
    AGGREGATORS[name] = WeightedSum  # which Series needs in both of its MoEs


def make_model(config: ModelConfig) -> GPT:
    """Make a GPT with one of the aggregators or MoEs above, or of model.py."""
    model = GPT(config)
    if config.aggregator in MOES:
        for block in model.blocks:
            block.moe = MOES[config.aggregator](config)
        model.init_weights()
    return model


if __name__ == "__main__":
    train.main(make_model=make_model)
