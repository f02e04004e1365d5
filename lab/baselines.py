"""What the paper compares DAG-MoE with, and DAG-MoE with one part taken out: more values of the setting `aggregator`.

    python -m lab.baselines lab/configs/ablation/base.toml --aggregator=mlp    # train.py, which then knows these, too

    mlp           the weighted sum, and an ungated MLP over all K nodes
    coe           Chain-of-Experts: two rounds of K/2 experts; the second sees what the first has found
    series        two MoEs, one after the other, without an attention between them
    dense         no experts: one SwiGLU of hidden size K·H
    dag_ungated   without Eq. 9: every edge is open
    dag_self      without messages: of all edges only those from a node to itself

Importing this module is enough to know them. Names of parameters are chosen so that GPT.cost() stays right: what works
on each of the K nodes is in `aggregate.layers`, what is beside the selected experts is not in `experts`.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import train
from model import FEED_FORWARD, NORM_EPS, Aux, DAGAggregator, DAGLayer, Experts, ModelConfig, MoE, WeightedSum, pairwise
from prepare import run


class MLPMixing(nn.Module):
    """The paper's ungated control: h' = Σ_i n_i + W_up GELU(W_mix concat(z_1, ..., z_K)), n_i of Eq. 6, z_i of Eq. 7.

    Unlike in the graph, the order of the slots counts. Departure: the norm of Eq. 7, which the paper does not mention.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, K, D = config.n_embd, config.top_k, config.dag_dim
        self.norm = nn.RMSNorm(C, NORM_EPS)
        self.layers = nn.ModuleDict({"w_down": nn.Linear(C, D, bias=False)})
        self.w_mix = nn.Linear(K * D, D, bias=False)
        self.w_up = nn.Linear(D, C, bias=False)
        self.w_up.weight.init_scale = 0.0  # so that it begins as the standard MoE, as the graph does

    def forward(self, h: Tensor, out: Tensor, gate: Tensor) -> Tensor:
        """h (S, C), out (S, K, C), gate (S, K) → (S, C)."""
        S, K, C = out.shape
        node = gate.unsqueeze(-1) * out + h.unsqueeze(1) / K  # Eq. 6
        z = self.layers["w_down"](self.norm(node))  # Eq. 7, (S, K, D)
        mixed = F.gelu(self.w_mix(z.flatten(1)))  # (S, D)
        return node.sum(dim=1) + self.w_up(mixed)


class Series(MoE):
    """h¹ = h + Σ g E(norm(h)), h' = h¹ + Σ g' E'(norm'(h¹)): the plain way to do two steps between two attentions."""

    def __init__(self, config: ModelConfig):
        super().__init__(WeightedSum, config)  # the first one
        self.second = MoE(WeightedSum, config)

    def forward(self, h: Tensor) -> tuple[Tensor, Aux]:
        """h (B, T, C) → (B, T, C), Aux: means of the two routers' losses."""
        h, (balance, z) = super().forward(h)
        h, (second_balance, second_z) = self.second(h)
        return h, ((balance + second_balance) / 2, (z + second_z) / 2)


class ChainOfExperts(Series):
    """A series of two rounds with the same experts, K/2 each, and a router per round (arXiv 2506.18945).

    Departure: the norm is applied anew in each round, not passed on. Raises ValueError unless K is even.
    """

    def __init__(self, config: ModelConfig):
        if config.top_k % 2:
            raise ValueError(f"top_k must be even for coe, which spends it over two rounds, got {config.top_k}")
        super().__init__(replace(config, top_k=config.top_k // 2))
        self.second.norm, self.second.experts, self.second.shared = self.norm, self.experts, None


class Dense(nn.Module):
    """No experts to choose from: one SwiGLU with the multiply-adds of a token's K experts and of the shared one."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.n_embd, NORM_EPS)
        self.network = Experts(config, 1, config.top_k * config.expert_dim + config.shared_dim)

    def forward(self, h: Tensor) -> tuple[Tensor, Aux]:
        """h (B, T, C) → (B, T, C), Aux of a router in perfect balance."""
        x = self.norm(h).flatten(0, 1)  # (S, C)
        first = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)  # the only expert
        return h + self.network(x, first).view_as(h), (x.new_ones(()), x.new_zeros(()))


class UngatedLayer(DAGLayer):
    """One depth of the graph without its gates: e_ij = 1 in Eq. 10."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.w_edge

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """node (S, K, C) → ones and messages, both (S, K, K, D)."""
        z = self.w_down(self.norm(node))  # Eq. 7
        m = pairwise(self.w_node, z)  # Eq. 10
        return torch.ones_like(m), m


class SelfLayer(DAGLayer):
    """One depth of the graph whose nodes hear nothing of each other: e_ij = 0 unless i = j."""

    def edges(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """node (S, K, C) → gates and messages, both (S, K, K, D)."""
        e, m = super().edges(node)
        itself = torch.eye(node.shape[1]).to(m).unsqueeze(-1)  # (K, K, 1)
        return e * itself, m * itself


class OtherDAG(DAGAggregator):
    """The graph with another kind of layer."""

    def __init__(self, layer: type[DAGLayer], config: ModelConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.dag_depth))


FEED_FORWARD.update(
    mlp=partial(MoE, MLPMixing),
    coe=ChainOfExperts,
    series=Series,
    dense=Dense,
    dag_ungated=partial(MoE, partial(OtherDAG, UngatedLayer)),
    dag_self=partial(MoE, partial(OtherDAG, SelfLayer)),
)

if __name__ == "__main__":
    run(train.main)
