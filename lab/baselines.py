"""What the paper compares DAG-MoE with, and DAG-MoE with one part taken out.

    python -m lab.baselines lab/configs/ablation/base.toml --aggregator=mlp

is train.py, which then knows these values of the setting `aggregator`, too:

    mlp           the weighted sum, and an ungated MLP over all K nodes
    coe           Chain-of-Experts: two rounds of K/2 experts; the second sees what the first found
    series        two MoEs, one after the other, without an attention between them
    dense         no experts: one SwiGLU of hidden size K·H
    dag_ungated   without Eq. 9: every edge is open
    dag_self      without messages: of all edges only those from a node to itself

Whoever builds such a model calls add_baselines() first.
"""

from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import train
from model import (
    FEED_FORWARD,
    NORM_EPS,
    DAGLayer,
    Experts,
    ModelConfig,
    MoE,
    WeightedSum,
    pairwise,
)
from prepare import UserError, run


class MLPMixing(nn.Module):
    """The paper's ungated control adds an MLP over all nodes, n_i of Eq. 6 and z_i of Eq. 7:

        h' = Σ_i n_i + W_up GELU(W_mix concat(z_1, ..., z_K))

    Unlike in the graph, the order of the nodes counts. Departure: the norm of Eq. 7, which the
    paper does not mention here.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, K, D = config.n_embd, config.top_k, config.dag_dim
        self.norm = nn.RMSNorm(C, NORM_EPS)
        self.layers = nn.ModuleDict({"w_down": nn.Linear(C, D, bias=False)})
        self.w_mix = nn.Linear(K * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)
        # It begins as the standard MoE, as the graph does.
        self.w_up.weight.init_scale = 0.0

    def forward(self, h: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """Combine h (S, C) and the outputs (S, K, C), with weights (S, K), into a new h (S, C)."""
        S, K, C = out.shape
        node = weight.unsqueeze(-1) * out + h.unsqueeze(1) / K  # Eq. 6
        z = self.layers["w_down"](self.norm(node))  # Eq. 7, (S, K, D)
        mixed = F.gelu(self.w_mix(z.flatten(1)))  # (S, D)
        return node.sum(dim=1) + self.w_up(mixed)


class Series(MoE):
    """Two MoEs in series, with no attention between them, are the plain way to do two steps:

    h¹ = h + Σ g E(norm(h)), h' = h¹ + Σ g' E'(norm'(h¹)).
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config, WeightedSum(config))  # the first one
        self.second = MoE(config, WeightedSum(config))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take h (B, T, C) to the new h (B, T, C), and the means of both routers' aux (2)."""
        h, first_aux = super().forward(h)
        h, second_aux = self.second(h)
        return h, (first_aux + second_aux) / 2


class ChainOfExperts(Series):
    """A series of two rounds with the same experts, K/2 each, and a router per round.

    Source: arXiv 2506.18945. Departure: the norm is applied anew in each round, not passed on.
    """

    def __init__(self, config: ModelConfig):
        if config.top_k % 2 != 0:
            raise UserError(f"coe spends top_k over two rounds, so it must be even: {config.top_k}")
        super().__init__(replace(config, top_k=config.top_k // 2))
        self.second.norm = self.norm
        self.second.experts = self.experts
        self.second.shared = None


class Dense(nn.Module):
    """A single SwiGLU has the multiply-adds of the K chosen experts and of the shared one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.network = Experts(config, 1, config.top_k * config.expert_dim + config.shared_dim)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take h (B, T, C) to the new h (B, T, C), and the aux (2) of a router in balance."""
        x = self.norm(h).flatten(0, 1)  # (S, C)
        number_0 = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)  # the only expert
        new_h = h + self.network(x, number_0).view_as(h)
        return new_h, x.new_tensor([1.0, 0.0])


class UngatedLayer(DAGLayer):
    """One depth of the graph without its gates: e_ij = 1 in Eq. 10."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.w_edge

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gates, which are one, and messages: node (S, K, C) → (S, K, K, D) each."""
        z = self.w_down(self.norm(node))  # Eq. 7
        m = pairwise(self.w_node, z)  # Eq. 10
        return torch.ones_like(m), m


class SelfLayer(DAGLayer):
    """One depth of the graph whose nodes hear nothing of each other: e_ij = 0 unless i = j."""

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gates and messages: node (S, K, C) → (S, K, K, D) each."""
        e, m = super().edges(node)
        itself = torch.eye(node.shape[1]).to(m).unsqueeze(-1)  # (K, K, 1)
        return e * itself, m * itself


def change_layers(config: ModelConfig, layer_class: type[DAGLayer]) -> MoE:
    """Make a DAG-MoE with another kind of layer in its graph."""
    moe = FEED_FORWARD["dag"](config)
    moe.aggregate.layers = nn.ModuleList(layer_class(config) for _ in range(config.dag_depth))
    return moe


def add_baselines() -> None:
    """Add the values above to those that model.py knows for the setting `aggregator`."""
    FEED_FORWARD["mlp"] = lambda config: MoE(config, MLPMixing(config))
    FEED_FORWARD["coe"] = ChainOfExperts
    FEED_FORWARD["series"] = Series
    FEED_FORWARD["dense"] = Dense
    FEED_FORWARD["dag_ungated"] = lambda config: change_layers(config, UngatedLayer)
    FEED_FORWARD["dag_self"] = lambda config: change_layers(config, SelfLayer)


if __name__ == "__main__":
    add_baselines()
    run(train.main)
