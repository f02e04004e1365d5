"""What the graphs of a trained model do: a page for one text, statistics over many.

    python -m lab.graph page out/NAME --prompt "class Node:" graph.html
    python -m lab.graph stats out/NAME --dataset stdlib

The page shows, in a browser, the graph at every token of the prompt and of its continuation. The
statistics are a table: how open the edges are, how alike the nodes of a token are (their cosine),
and how much of what a layer adds is beyond the experts' weighted sum.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lab import baselines  # a checkpoint may hold dag_self or dag_ungated, which have graphs, too
from lab.shared import check_target
from model import GPT, ModelConfig, MoE
from prepare import get_encoding, open_dataset
from sample import get_token_bytes
from train import autocast, choose_device, load_checkpoint, make_config, read_windows

TEMPLATE = Path(__file__).with_name("graph.html")
BATCH = 4096  # tokens in a batch
ALMOST_ZERO = 1e-30  # in place of a divisor that is zero


def load_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """Return the model of a checkpoint, or of a run's folder, and all else that is stored there."""
    checkpoint = load_checkpoint(path)
    config = make_config(ModelConfig, checkpoint["model_config"])
    if not config.aggregator.startswith("dag"):
        raise SystemExit(
            f"error: {path} has no graph: it was trained with aggregator={config.aggregator}"
        )
    model = baselines.make_model(config).to(device)
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


class Depth(NamedTuple):
    """What one depth of a layer's graph does with S tokens; [s, i, j] is the edge from j to i."""

    expert: Tensor  # (S, K) ids of the nodes' experts
    weight: Tensor  # (S, K) the router's weights
    gate: Tensor  # (S, K, K) mean of |e_ij| over its D channels: how open the edge is
    share: Tensor  # (S, K, K) ‖m_ij‖ / Σ_j ‖m_ij‖: how much of what i receives comes from j
    before: Tensor  # (S, K, C) the nodes
    after: Tensor  # (S, K, C) the nodes of the next depth
    beyond: Tensor  # (S) ‖h' - h - Σ_i g_i E_i(x)‖ / ‖h' - h‖ of the layer, for all depths the same


@torch.no_grad()
def observe(model: GPT, tokens: Tensor) -> list[list[Depth]]:
    """Return for each layer what the depths of its graph do with tokens (B, T), in S = B·T rows.

    Forward hooks see it. They are there during this call only, so that the model stays plain.
    """
    calls = {}  # by module: its arguments and its result

    def record(module, arguments, result) -> None:
        calls[module] = (arguments, result)

    handles = []
    for block in model.blocks:
        aggregate = block.moe.aggregate
        for module in (block.moe.router, aggregate, *aggregate.layers):
            handles.append(module.register_forward_hook(record))
    model(tokens)
    for handle in handles:
        handle.remove()
    return [describe_layer(block.moe, calls) for block in model.blocks]


def describe_layer(moe: MoE, calls: dict) -> list[Depth]:
    """Compute a layer's depths from the calls that `observe` has recorded."""
    _, (weight, expert, _, _) = calls[moe.router]
    (h, out, _), new_h = calls[moe.aggregate]
    added = new_h - h
    weighted_sum = (weight.unsqueeze(-1) * out).sum(dim=1)
    beyond = (added - weighted_sum).norm(dim=-1) / added.norm(dim=-1).clamp_min(ALMOST_ZERO)
    depths = []
    for layer in moe.aggregate.layers:
        (before,), after = calls[layer]
        e, m = layer.edges(before)  # once more, because forward returns nodes only
        gate = e.float().abs().mean(dim=-1)
        message = m.float().norm(dim=-1)
        share = message / message.sum(dim=-1, keepdim=True).clamp_min(ALMOST_ZERO)
        depths.append(Depth(expert, weight, gate, share, before, after, beyond))
    return depths


def make_page(args: argparse.Namespace) -> None:
    """Continue a prompt, as sample.py does, and write the page of the whole text."""
    check_target(args.page, ".html")
    device = choose_device(args.device)
    model, checkpoint = load_model(args.path, device)
    encoding = get_encoding(checkpoint["data"]["encoding"])
    token_bytes = get_token_bytes(encoding)
    tokens = encoding.encode(args.prompt, allowed_special="all")
    tokens = tokens or [encoding.eot_token]  # which begins a new document
    n_prompt = len(tokens)
    rows = torch.tensor([tokens], device=device)
    torch.manual_seed(args.seed)
    with autocast(device):
        for ids in model.generate(rows, args.max_new_tokens, args.temperature):
            if ids.item() not in token_bytes:
                break
            tokens.append(ids.item())
        texts = [encoding.decode([token]) for token in tokens]
        write_page(args.page, model, tokens, texts, n_prompt)


def write_page(path: Path, model: GPT, tokens: list[int], texts: list[str], n_prompt: int, **more):
    """Write a page for a browser that shows the graphs at each token of a text.

    It has the last block_size tokens, because the model looks at no more at once. The first
    n_prompt of all tokens are marked. `more` is what else the template can draw, such as a tree.
    """
    start = max(0, len(tokens) - model.config.block_size)
    rows = torch.tensor([tokens[start:]], device=model.embed.weight.device)
    layers = []
    for depths in observe(model, rows):
        layer = {
            "expert": depths[0].expert.tolist(),
            "weight": round_all(depths[0].weight),
            "beyond": round_all(depths[0].beyond),
            "depths": [{"gate": round_all(d.gate), "share": round_all(d.share)} for d in depths],
        }
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
    path.write_bytes(page)
    print(f"wrote {path} ({len(page) // 1000:,} kB); open it in a browser", file=sys.stderr)


def round_all(x: Tensor) -> list:
    """Return a tensor as nested lists of numbers with three decimals."""
    return x.cpu().double().round(decimals=3).tolist()


def show_statistics(args: argparse.Namespace) -> None:
    """Print a row of statistics for each layer and depth, over a validation split."""
    if args.tokens < 1:
        raise SystemExit(f"error: --tokens must be at least 1, got {args.tokens}")
    device = choose_device(args.device)
    model, checkpoint = load_model(args.path, device)
    meta, _, tokens = open_dataset(args.dataset)
    if meta["encoding"] != checkpoint["data"]["encoding"]:
        raise SystemExit(
            f"error: {args.dataset} is in {meta['encoding']}, which the model cannot read"
        )
    table = compute_statistics(model, tokens, args.tokens)
    print("layer  depth   gate ± spread  nodes alike  beyond sum")
    for i, rows in enumerate(table.tolist()):
        for d, (gate, spread, alike, beyond) in enumerate(rows):
            print(f"{i + 1:5}{d + 1:7}{gate:8.3f} ± {spread:.3f}{alike:13.2f}{beyond:12.3f}")


def compute_statistics(model: GPT, tokens: np.ndarray, n_tokens: int) -> Tensor:
    """Compute statistics over evenly spaced windows of tokens, n_tokens in all.

    Returned are the mean gate, its standard deviation, the cosine between two nodes of a token, and
    `beyond`, for each layer and depth: (n_layer, L, 4).
    """
    config = model.config
    device = model.embed.weight.device
    n_windows = max(1, min(n_tokens, len(tokens) - 1) // config.block_size)
    offsets = np.linspace(0, len(tokens) - config.block_size - 1, n_windows).astype(np.int64)
    means = torch.zeros(config.n_layer, config.dag_depth, 4, dtype=torch.float64)
    size = max(1, BATCH // config.block_size)
    for start in tqdm(range(0, n_windows, size), unit="batch", leave=False, disable=None):
        part = offsets[start : start + size]
        windows = read_windows(tokens, part, config.block_size, device)
        with autocast(device):
            layers = observe(model, windows[:, :-1])
        for i, depths in enumerate(layers):
            for d, depth in enumerate(depths):
                # The last batch may be smaller, and then counts for less.
                means[i, d] += mean_statistics(depth) * len(windows) / n_windows
    variance = means[..., 1] - means[..., 0] ** 2  # of the gates
    means[..., 1] = variance.clamp_min(0.0).sqrt()
    return means


def mean_statistics(depth: Depth) -> Tensor:
    """Return means over a batch: gate, gate², cosine of two nodes, beyond; (4) in float64."""
    K = depth.gate.shape[1]
    different = ~torch.eye(K, dtype=torch.bool, device=depth.gate.device)
    direction = F.normalize(depth.before, dim=-1)
    cosine = direction @ direction.mT  # (S, K, K)
    values = (depth.gate, depth.gate.square(), cosine[:, different], depth.beyond)
    return torch.stack([value.cpu().double().mean() for value in values])


def main(arguments: list[str] | None = None) -> None:
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
    args = parser.parse_args(arguments)
    if args.command == "page":
        make_page(args)
    else:
        show_statistics(args)


if __name__ == "__main__":
    main()
