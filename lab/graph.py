"""What the graphs of a trained model are like over a validation split: a table, and a picture of who sends to whom.

    python -m lab.graph out/NAME --dataset stdlib

The picture, dag-DATASET.png beside the checkpoint, needs matplotlib.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import lab.baselines  # noqa: F401  a checkpoint may be one of them
from lab.compare import new_figure, save_png
from model import GPT
from prepare import Parser, open_dataset, run
from sample import Depth, check_graph, observe, within
from train import autocast, choose_device, load_checkpoint, spaced_offsets, windows

MIN_TOKENS = 100  # a pair of experts that fewer tokens have selected has no say
BATCH = 4096  # tokens looked at together


class Statistics(NamedTuple):
    """Of one depth in one layer, means over tokens, nodes and edges; NaN where there are none: K = 1 nodes."""

    gate: float  # of an edge: the mean size of its channels
    spread: float  # standard deviation of that over tokens and edges
    self_gate: float  # gate of an edge from a node to itself
    other_gate: float  # gate of any other edge
    self_share: float  # share of what a node receives that comes from itself
    alike: float  # cosine between two different nodes: 1 where both hold the same
    incoming: float  # effective number of a node's incoming edges, 1 / Σ_j share_ij²: 1 to K
    update: float  # ‖W_up Σ_j m_ij‖ / ‖n_i‖
    beyond: float  # of the layer: ‖h' - h - Σ_i g_i E_i(x)‖ / ‖h' - h‖
    strength: Tensor  # (E, E) mean ‖m_ij‖ [expert that receives, expert that sends], NaN where rarer than MIN_TOKENS


def measure(depth: Depth) -> Tensor:
    """Means over the tokens of one batch, (9) float64: those of Statistics, but for `spread` the mean square."""
    itself = torch.eye(depth.gate.shape[1], dtype=torch.bool, device=depth.gate.device)
    direction = F.normalize(depth.before.float(), dim=-1)
    cosine = direction @ direction.mT
    concentration = depth.share.square().sum(dim=-1)  # 1/K to 1; 0 where a node receives nothing at all
    change = (depth.after - depth.before).float().norm(dim=-1)
    values = (
        depth.gate,
        depth.gate.square(),
        depth.gate[:, itself],
        depth.gate[:, ~itself],
        depth.share[:, itself],
        cosine[:, ~itself],
        torch.where(concentration > 0, 1 / concentration, 0.0),
        change / depth.before.float().norm(dim=-1).clamp_min(1e-30),
        depth.beyond,
    )
    return torch.stack([value.cpu().double().mean() for value in values])


def measure_pairs(depth: Depth, n_expert: int) -> Tensor:
    """Sum of ‖m_ij‖ and number of edges by their nodes' experts, (2, E·E) float64: [.., receives · E + sends]."""
    expert = depth.expert.cpu()
    pair = (expert[:, :, None] * n_expert + expert[:, None, :]).flatten()
    message = depth.message.cpu().double().flatten()
    return torch.stack([
        torch.bincount(pair, message, minlength=n_expert**2),
        torch.bincount(pair, minlength=n_expert**2).double(),
    ])  # fmt: skip


def graph_statistics(model: GPT, tokens: np.ndarray, wanted: int) -> list[list[Statistics]]:
    """Statistics per layer and depth over evenly spaced windows of the tokens, about `wanted` in all."""
    c = model.config
    offsets = spaced_offsets(tokens, c.block_size, wanted)
    means = torch.zeros(c.n_layer, c.dag_depth, 9, dtype=torch.float64)
    pairs = torch.zeros(c.n_layer, c.dag_depth, 2, c.n_expert**2, dtype=torch.float64)
    size = max(1, BATCH // c.block_size)
    for start in tqdm(range(0, len(offsets), size), unit="batch", leave=False, disable=None):
        batch = windows(tokens, offsets[start : start + size], model)[:, :-1]
        for i, depths in enumerate(observe(model, batch)):
            for d, depth in enumerate(depths):
                means[i, d] += measure(depth) * len(batch) / len(offsets)
                pairs[i, d] += measure_pairs(depth, c.n_expert)

    def finish(mean: Tensor, pair: Tensor) -> Statistics:
        gate, square, *others = mean.tolist()
        total, count = pair.view(2, c.n_expert, c.n_expert)
        strength = torch.where(count >= MIN_TOKENS, total / count, math.nan)
        return Statistics(gate, max(0.0, square - gate**2) ** 0.5, *others, strength)

    return [[finish(means[i, d], pairs[i, d]) for d in range(c.dag_depth)] for i in range(c.n_layer)]


def strongest_pairs(strength: Tensor, count: int = 3) -> list[str]:
    """Which expert sends which other one the largest messages: "E2→E5 1.8", in units of the mean of all pairs."""
    relative = strength / strength.nanmean()
    relative.fill_diagonal_(math.nan)
    values, places = relative.nan_to_num(0.0).flatten().topk(min(count, relative.numel()))
    pairs = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        receiver, sender = divmod(place, len(strength))
        if value > 0:
            pairs.append(f"E{sender}→E{receiver} {value:.1f}")
    return pairs


def print_statistics(statistics: list[list[Statistics]], K: int) -> None:
    """A row per layer and depth."""
    columns = ("gate ± spread", "to itself", "to others", "share to itself", "nodes alike", "edges in", "update")
    print("layer  depth", *columns, "beyond sum", "strongest pairs, × the mean of all pairs", sep="  ")
    for i, depths in enumerate(statistics):
        for d, row in enumerate(depths):
            numbers = (
                f"{i + 1:5}{d + 1:7}",
                f"{row.gate:6.3f} ± {row.spread:.3f}",
                f"{row.self_gate:9.3f}",
                f"{row.other_gate:9.3f}",
                f"{row.self_share:15.2f}",
                f"{row.alike:11.2f}",
                f"{row.incoming:8.2f}",
                f"{row.update:6.3f}",
                f"{row.beyond:10.3f}",
            )
            print(*numbers, ", ".join(strongest_pairs(row.strength)), sep="  ")
    print("Nodes alike: the mean cosine between two nodes of a token; at 1 all K hold the same.")
    print(f"An edge whose share is as large as all others' has 1/K = {1 / K:.2f}; 'edges in' then is K = {K}.")


def draw_statistics(path: Path, statistics: list[list[Statistics]]) -> None:
    """Heat maps of the mean message between experts, a row per layer and a column per depth. Raises ValueError."""
    rows, columns = len(statistics), len(statistics[0])
    figure = new_figure(4.2 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, depths in enumerate(statistics):
        for d, row in enumerate(depths):
            image = axes[i][d].imshow(row.strength.numpy())
            axes[i][d].set(title=f"layer {i + 1}, depth {d + 1}", xlabel="expert that sends", ylabel="that receives")
            figure.colorbar(image, ax=axes[i][d], label="mean ‖m_ij‖")
    save_png(path, figure)


@torch.no_grad()
def read_off(model: GPT, tokens: Tensor, levels: list[Tensor], classes: int) -> list[list[Tensor]]:
    """What a linear map reads of known values off the nodes that a one-layer model has at the last token.

    tokens (S, T); levels: what is to be read, each (S, any number) of values below `classes`, first the input's own.
    A row for that input, as one-hot vectors, for the nodes before the graph, and for those after each depth; in it the
    values read at each other level, for the last third of the tokens. Ridge regression to one-hot vectors on the other
    two thirds; all K nodes are seen at once, each in its expert's place, every feature scaled to equal deviation.
    """
    depths, T = observe(model, tokens)[0], tokens.shape[1]
    features = [F.one_hot(levels[0], classes)]
    for nodes in (depths[0].before, *(depth.after for depth in depths)):
        node, expert = nodes[T - 1 :: T], depths[0].expert[T - 1 :: T, :, None]  # (S, K, C), (S, K, 1)
        by_expert = node.new_zeros(len(node), model.config.n_expert, node.shape[2])
        features.append(by_expert.scatter(1, expert.expand_as(node), node))
    rows, fit = [], 2 * len(tokens) // 3
    for x in features:
        x, row = x.flatten(1).double(), []
        x = F.pad(x / x.std(dim=0).clamp_min(1e-12), (0, 1), value=1.0)  # with an intercept
        gram = x[:fit].T @ x[:fit] + 1e-3 * fit * torch.eye(x.shape[1], dtype=x.dtype)
        for values in levels[1:]:
            one_hot = F.one_hot(values, classes).flatten(1).double()
            weight = torch.linalg.solve(gram, x[:fit].T @ one_hot[:fit])
            row.append((x[fit:] @ weight).unflatten(1, (-1, classes)).argmax(dim=-1))
        rows.append(row)
    return rows


def shares_right(row: list[Tensor], levels: list[Tensor]) -> list[float]:
    """How much of what a row of read_off holds is right, at each level: 1 is all. levels: without the first one."""
    return [(read == right[-len(read) :]).float().mean().item() for read, right in zip(row, levels, strict=True)]


def main() -> None:
    """Do what the command line says."""
    parser = Parser(prog="-m lab.graph", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path", type=Path, metavar="out/NAME", help="a run's folder (its best.pt), or a checkpoint file"
    )
    parser.add_argument("--dataset", required=True, metavar="NAME", help="whose validation split is looked at")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--tokens", type=within(int, 1, 2**31), default=100_000, help="how many (default: 100,000)")
    args = parser.parse_args()
    device = choose_device(args.device)
    model, checkpoint = load_checkpoint(args.path)
    model.to(device)
    check_graph(model)
    data = open_dataset(args.dataset)
    data.check_fits(checkpoint["encoding"], model.config.vocab_size, model.config.block_size)
    with autocast(device):
        statistics = graph_statistics(model, data.val, args.tokens)
    print_statistics(statistics, model.config.top_k)
    draw_statistics(checkpoint["path"].with_name(f"dag-{data.name}.png"), statistics)


if __name__ == "__main__":
    run(main)
