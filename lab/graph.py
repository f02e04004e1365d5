"""What the graphs of a trained model do: a page for one text, statistics over a whole split.

    python -m lab.graph page out/NAME --prompt "class Node:" graph.html
    python -m lab.graph stats out/NAME --dataset stdlib

The page shows the graph at every token of the prompt and of its continuation. The statistics are a
table, and a picture of which expert sends to which, dag-DATASET.png beside the checkpoint; it needs
matplotlib.
"""

import argparse
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lab.shared import check_target, load_model, new_figure, save_png
from model import GPT, DAGAggregator, MoE
from prepare import END_OF_TEXT, UserError, atomic_write, get_encoding, open_dataset, run
from sample import find_known_ids
from train import autocast, choose_device, read_windows

TEMPLATE = Path(__file__).with_name("graph.html")
MIN_TOKENS = 100  # a pair of experts that fewer tokens have chosen has no say
BATCH = 4096  # tokens looked at together
ALMOST_ZERO = 1e-30  # in place of a divisor that is zero


class Depth(NamedTuple):
    """What one depth of a layer's graph did with S tokens; [s, i, j] is the edge from j to i."""

    expert: Tensor  # (S, K) ids of the nodes' experts
    weight: Tensor  # (S, K) the router's weights
    beyond: Tensor  # (S) of the whole layer, ‖h' - h - Σ_i g_i E_i(x)‖ / ‖h' - h‖
    gate: Tensor  # (S, K, K) mean of |e_ij| over its D channels: how open the edge is
    message: Tensor  # (S, K, K) ‖m_ij‖
    share: Tensor  # (S, K, K) ‖m_ij‖ / Σ_j ‖m_ij‖: how much of what i receives comes from j
    before: Tensor  # (S, K, C) nodes
    after: Tensor  # (S, K, C) nodes of the next depth


def check_graph(model: GPT) -> None:
    """Raise a UserError if the model has no graph."""
    for block in model.blocks:
        if not isinstance(getattr(block.moe, "aggregate", None), DAGAggregator):
            how = f"this model combines its experts by {model.config.aggregator!r}"
            raise UserError(f"{how}: there is no graph to show")


@torch.no_grad()
def observe(model: GPT, tokens: Tensor) -> list[list[Depth]]:
    """Return for each layer what all depths of its graph do with tokens (B, T).

    Forward hooks see it. They are there during this call only, so that the model stays plain.
    """
    calls = {}  # by module: its arguments and its result

    def keep(module, arguments, result) -> None:
        calls[module] = (arguments, result)

    with ExitStack() as hooks:
        for block in model.blocks:
            aggregate = block.moe.aggregate
            for module in (block.moe.router, aggregate, *aggregate.layers):
                hooks.enter_context(module.register_forward_hook(keep))
        model(tokens)
    return [describe_layer(block.moe, calls) for block in model.blocks]


def describe_layer(moe: MoE, calls: dict) -> list[Depth]:
    """Compute a layer's depths from what the hooks of `observe` have kept."""
    _, (weight, expert, _) = calls[moe.router]
    (h, out, _), new_h = calls[moe.aggregate]
    added = new_h - h
    weighted_sum = (weight.unsqueeze(-1) * out).sum(dim=1)
    beyond = (added - weighted_sum).norm(dim=-1) / added.norm(dim=-1).clamp_min(ALMOST_ZERO)
    depths = []
    for layer in moe.aggregate.layers:
        (before,), after = calls[layer]
        e, m = layer.edges(before)
        gate = e.float().abs().mean(dim=-1)
        message = m.float().norm(dim=-1)
        share = message / message.sum(dim=-1, keepdim=True).clamp_min(ALMOST_ZERO)
        depths.append(Depth(expert, weight, beyond, gate, message, share, before, after))
    return depths


def write_page(path: Path, model: GPT, tokens: list[int], texts: list[str], n_prompt: int, **more):
    """Write a page for a browser that shows the graphs at each token of a text.

    It has the last block_size tokens, because the model looks at no more at once. The first
    n_prompt of all tokens are marked. `more` is what else the template draws: a tree, from
    lab/tree_page.py.
    """
    start = max(0, len(tokens) - model.config.block_size)
    rows = torch.tensor([tokens[start:]], device=model.embed.weight.device)
    layers = []
    for depths in observe(model, rows):
        layer = {
            "expert": depths[0].expert.tolist(),
            "weight": round_all(depths[0].weight),
            "beyond": round_all(depths[0].beyond),
            "depths": [],
        }
        for depth in depths:
            edges = {"gate": round_all(depth.gate), "share": round_all(depth.share)}
            layer["depths"].append(edges)
        layers.append(layer)
    data = {
        "gate": model.config.dag_gate,
        "tokens": texts[start:],
        "prompt": max(0, n_prompt - start),
        "layers": layers,
        **more,
    }
    # Written as JSON's \u003c, a "<" in a token cannot end the script element the data stand in.
    script = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    page = template.replace("/*DATA*/null", script, 1).encode()
    with atomic_write(path) as file:
        file.write(page)
    print(f"wrote {path} ({len(page) // 1000:,} kB); open it in a browser", file=sys.stderr)


def round_all(x: Tensor) -> list:
    """Return a tensor as nested lists of numbers with three decimals."""
    return x.cpu().double().round(decimals=3).tolist()


def make_page(args: argparse.Namespace) -> None:
    """Continue a prompt, as sample.py does, and write the page of the whole text."""
    if args.max_new_tokens < 0 or args.seed < 0:
        raise UserError("--max_new_tokens and --seed must not be negative")
    if args.page.suffix != ".html":
        raise UserError(f"{args.page} must end in .html, for a browser to know what it is")
    check_target(args.page)
    device = choose_device(args.device)
    model, checkpoint = load_model(args.path, device)
    check_graph(model)
    encoding = get_encoding(checkpoint["data"]["encoding"])
    known = find_known_ids(encoding, model.config.vocab_size).to(device)
    tokens = encoding.encode(args.prompt, allowed_special={END_OF_TEXT}, disallowed_special=())
    tokens = tokens or [encoding.eot_token]  # which begins a new document
    n_prompt = len(tokens)
    rows = torch.tensor([tokens], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    sampling = {"temperature": args.temperature, "generator": generator}
    with autocast(device):
        for ids in model.generate(rows, args.max_new_tokens, known, **sampling):
            if ids.item() == encoding.eot_token:
                break
            tokens.append(ids.item())
        texts = [encoding.decode([token]) for token in tokens]
        write_page(args.page, model, tokens, texts, n_prompt)


class Statistics(NamedTuple):
    """Means of one depth in one layer over tokens, nodes and edges; nan where there are none."""

    gate: float  # of an edge: the mean size of its channels
    spread: float  # standard deviation of that over tokens and edges
    self_gate: float  # gate of an edge from a node to itself
    other_gate: float  # gate of any other edge
    self_share: float  # share of what a node receives that comes from itself
    alike: float  # cosine between two different nodes: 1 where both hold the same
    incoming: float  # effective number of a node's incoming edges, 1 / Σ_j share_ij²: 1 to K
    update: float  # ‖W_up Σ_j m_ij‖ / ‖n_i‖
    beyond: float  # of the layer: ‖h' - h - Σ_i g_i E_i(x)‖ / ‖h' - h‖
    # (E, E) mean ‖m_ij‖ [expert that receives, expert that sends], nan where rarer than MIN_TOKENS
    strength: Tensor


def measure(depth: Depth) -> Tensor:
    """Return means over the tokens of one batch, (9) in float64.

    They are those of Statistics, but for `spread` the mean square of the gates.
    """
    itself = torch.eye(depth.gate.shape[1], dtype=torch.bool, device=depth.gate.device)
    direction = F.normalize(depth.before.float(), dim=-1)
    cosine = direction @ direction.mT
    concentration = depth.share.square().sum(dim=-1)  # 1/K to 1; 0 if nothing at all is received
    change = (depth.after - depth.before).float().norm(dim=-1)
    values = (
        depth.gate,
        depth.gate.square(),
        depth.gate[:, itself],
        depth.gate[:, ~itself],
        depth.share[:, itself],
        cosine[:, ~itself],
        torch.where(concentration > 0, 1 / concentration, 0.0),
        change / depth.before.float().norm(dim=-1).clamp_min(ALMOST_ZERO),
        depth.beyond,
    )
    return torch.stack([value.cpu().double().mean() for value in values])


def measure_pairs(depth: Depth, n_expert: int) -> Tensor:
    """Return the sum of ‖m_ij‖ and the number of edges for each pair of experts.

    (2, E·E) in float64, where the pair's number is (expert that receives) · E + (that sends).
    """
    expert = depth.expert.cpu()
    pair = (expert[:, :, None] * n_expert + expert[:, None, :]).flatten()
    message = depth.message.cpu().double().flatten()
    total = torch.bincount(pair, message, minlength=n_expert**2)
    count = torch.bincount(pair, minlength=n_expert**2).double()
    return torch.stack([total, count])


def graph_statistics(model: GPT, tokens: np.ndarray, n_tokens: int) -> list[list[Statistics]]:
    """Return statistics by layer and depth, over evenly spaced windows of n_tokens in all."""
    config = model.config
    device = model.embed.weight.device
    E, L = config.n_expert, config.dag_depth
    n_windows = max(1, min(n_tokens, len(tokens) - 1) // config.block_size)
    offsets = np.linspace(0, len(tokens) - config.block_size - 1, n_windows).astype(np.int64)
    means = torch.zeros(config.n_layer, L, 9, dtype=torch.float64)
    pairs = torch.zeros(config.n_layer, L, 2, E * E, dtype=torch.float64)
    size = max(1, BATCH // config.block_size)
    for start in tqdm(range(0, n_windows, size), unit="batch", leave=False, disable=None):
        batch = read_windows(tokens, offsets[start : start + size], config, device)[:, :-1]
        for i, depths in enumerate(observe(model, batch)):
            for d, depth in enumerate(depths):
                means[i, d] += measure(depth) * len(batch) / n_windows
                pairs[i, d] += measure_pairs(depth, E)

    def finish(i: int, d: int) -> Statistics:
        gate, square, *other_means = means[i, d].tolist()
        spread = max(0.0, square - gate**2) ** 0.5
        total, count = pairs[i, d].view(2, E, E)
        strength = torch.where(count >= MIN_TOKENS, total / count, math.nan)
        return Statistics(gate, spread, *other_means, strength)

    return [[finish(i, d) for d in range(L)] for i in range(config.n_layer)]


def strongest_pairs(strength: Tensor, count: int = 3) -> list[str]:
    """Name the pairs with the largest messages: "E2→E5 1.8", if the mean of all pairs is 1."""
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
    """Print a row per layer and depth."""
    print("layer  depth  gate ± spread  to itself  to others  share to itself", end="  ")
    print("nodes alike  edges in  update  beyond sum  strongest pairs, × the mean of all pairs")
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
    print(f"An edge whose share is as large as all others' has 1/K = {1 / K:.2f}", end="; ")
    print(f"'edges in' then is K = {K}.")


def draw_statistics(path: Path, statistics: list[list[Statistics]]) -> None:
    """Draw the mean messages between experts, with a row per layer and a column per depth."""
    rows = len(statistics)
    columns = len(statistics[0])
    figure = new_figure(4.2 * columns, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, depths in enumerate(statistics):
        for d, row in enumerate(depths):
            axis = axes[i][d]
            image = axis.imshow(row.strength.numpy())
            axis.set(title=f"layer {i + 1}, depth {d + 1}")
            axis.set(xlabel="expert that sends", ylabel="that receives")
            figure.colorbar(image, ax=axis, label="mean ‖m_ij‖")
    save_png(path, figure)


def show_statistics(args: argparse.Namespace) -> None:
    """Print and draw the statistics of a model's graphs over a validation split."""
    if args.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {args.tokens}")
    device = choose_device(args.device)
    model, checkpoint = load_model(args.path, device)
    check_graph(model)
    meta, _, tokens = open_dataset(args.dataset)
    encoding = checkpoint["data"]["encoding"]
    if meta["encoding"] != encoding:
        difference = f"is encoded as {meta['encoding']}, the model reads {encoding}"
        raise UserError(f"the dataset {args.dataset} {difference}")
    if len(tokens) <= model.config.block_size:
        raise UserError(f"{args.dataset} has no more than block_size tokens to validate on")
    with autocast(device):
        statistics = graph_statistics(model, tokens, args.tokens)
    print_statistics(statistics, model.config.top_k)
    folder = args.path if args.path.is_dir() else args.path.parent
    draw_statistics(folder / f"dag-{meta['name']}.png", statistics)


@torch.no_grad()
def read_off(model: GPT, tokens: Tensor, levels: list[Tensor], classes: int) -> list[list[Tensor]]:
    """Read known values off the nodes that a one-layer model has at the last token.

    tokens (S, T); levels: the values, below `classes`, each (S, any number), the input's own first.
    A linear map is fitted to two thirds of the tokens: ridge regression to one-hot vectors. It sees
    all K nodes at once, each in its expert's place, every feature scaled to equal deviation.
    Returned is what it reads for the last third at each level but the first. There is a row for the
    input, as one-hot vectors, one for the nodes before the graph, and one for those after each
    depth.
    """
    depths = observe(model, tokens)[0]
    T = tokens.shape[1]
    expert = depths[0].expert[T - 1 :: T].unsqueeze(-1)  # (S, K, 1)
    features = [F.one_hot(levels[0], classes)]
    for nodes in (depths[0].before, *(depth.after for depth in depths)):
        node = nodes[T - 1 :: T]  # (S, K, C)
        by_expert = node.new_zeros(len(node), model.config.n_expert, node.shape[2])
        features.append(by_expert.scatter(1, expert.expand_as(node), node))
    n_fit = 2 * len(tokens) // 3
    rows = []
    for feature in features:
        x = feature.flatten(1).double()
        x = x / x.std(dim=0).clamp_min(1e-12)
        x = F.pad(x, (0, 1), value=1.0)  # the intercept
        identity = torch.eye(x.shape[1], dtype=x.dtype)
        gram = x[:n_fit].T @ x[:n_fit] + 1e-3 * n_fit * identity
        row = []
        for values in levels[1:]:
            one_hot = F.one_hot(values, classes).flatten(1).double()
            matrix = torch.linalg.solve(gram, x[:n_fit].T @ one_hot[:n_fit])
            scores = (x[n_fit:] @ matrix).unflatten(1, (-1, classes))
            row.append(scores.argmax(dim=-1))
        rows.append(row)
    return rows


def shares_right(row: list[Tensor], levels: list[Tensor]) -> list[float]:
    """Return how much is right in a row of read_off, at each of its levels: 1 is all."""
    shares = []
    for read, right in zip(row, levels, strict=True):
        shares.append((read == right[-len(read) :]).float().mean().item())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, prog="python -m lab.graph")
    page = commands.add_parser("page")
    stats = commands.add_parser("stats")
    for command in (page, stats):
        command.add_argument("path", type=Path, help="the folder of a run, or a checkpoint file")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    page.add_argument("page", type=Path, help="the .html file to write")
    page.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    page.add_argument("--max_new_tokens", type=int, default=200, help="longest text (default: 200)")
    page.add_argument("--temperature", type=float, default=0.8, help="as in sample.py")
    page.add_argument("--seed", type=int, default=1337, help="another seed, another text")
    stats.add_argument("--dataset", required=True, help="whose validation split is looked at")
    stats.add_argument("--tokens", type=int, default=100_000, help="how many (default: 100,000)")
    args = parser.parse_args()
    if args.command == "page":
        make_page(args)
    else:
        show_statistics(args)


if __name__ == "__main__":
    run(main)
