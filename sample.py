"""Write text with a trained model, and a page that shows by which graphs it combined its experts.

    python sample.py out/NAME --prompt "def main("
    python sample.py out/NAME --prompt "def main(" --prompt "class " --num_samples 4
    python sample.py out/NAME --prompt "def main(" --dag graph.html

Needs nothing but the checkpoint, which holds the model's settings and the name of its encoding.
"""

import argparse
import codecs
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from tiktoken import Encoding
from torch import Tensor
from tqdm import tqdm

from model import GPT, DAGAggregator
from prepare import Parser, get_encoding, replacing, run, visible
from train import autocast, choose_device, load_checkpoint

TEMPLATE = Path(__file__).parent / "assets" / "graph.html"


def print_text(encoding: Encoding, prompt: str, tokens: Iterable[int]) -> list[int]:
    """Print prompt and tokens as they come, characters when all their bytes are there; returns those before an end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    written = []
    print(visible(prompt), end="", flush=True)
    for token in tokens:
        if token == encoding.eot_token:
            break
        written.append(token)
        print(visible(decoder.decode(encoding.decode_single_token_bytes(token))), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return written


def print_samples(encoding: Encoding, prompt: str, steps: Iterator[Tensor], count: int, limit: int) -> list[list[int]]:
    """Print one text while GPT.generate takes its steps, several when all are finished; returns the tokens of each."""
    if count == 1:
        return [print_text(encoding, prompt, (ids.item() for ids in steps))]
    rows, ended = [], torch.zeros(count, dtype=torch.bool)
    for ids in tqdm(steps, total=limit, unit="token", leave=False, disable=None):  # None: only on a terminal
        rows.append(ids.tolist())
        ended |= ids.cpu() == encoding.eot_token
        if ended.all():
            break
    samples = []
    for i in range(count):
        print(f"--- sample {i + 1} of {count} ---")
        samples.append(print_text(encoding, prompt, (row[i] for row in rows)))
    return samples


class Depth(NamedTuple):
    """What one depth of a layer's graph did with S tokens. [s, i, j] is the edge from node j to node i."""

    expert: Tensor  # (S, K) ids of the nodes' experts
    weight: Tensor  # (S, K) the router's weights
    beyond: Tensor  # (S) of the whole layer, ‖h' - h - Σ_i g_i E_i(x)‖ / ‖h' - h‖: what the weighted sum does not have
    gate: Tensor  # (S, K, K) mean of |e_ij| over its D channels: how open the edge is
    message: Tensor  # (S, K, K) ‖m_ij‖
    share: Tensor  # (S, K, K) ‖m_ij‖ / Σ_j ‖m_ij‖: how much of what node i receives comes from node j
    before: Tensor  # (S, K, C) nodes
    after: Tensor  # (S, K, C) nodes of the next depth


def check_graph(model: GPT) -> None:
    """Raise ValueError if the model has no graph."""
    if not all(isinstance(getattr(block.moe, "aggregate", None), DAGAggregator) for block in model.blocks):
        raise ValueError(f"this model combines its experts by {model.config.aggregator!r}: there is no graph to show")


@torch.no_grad()
def observe(model: GPT, tokens: Tensor) -> list[list[Depth]]:
    """What all depths of each layer do with tokens (B, T), seen by forward hooks that stay for this call only."""
    calls = {}  # module → its arguments and its result

    def keep(module, arguments, result):
        calls[module] = arguments, result

    with ExitStack() as hooks:
        for block in model.blocks:
            for module in (block.moe.router, block.moe.aggregate, *block.moe.aggregate.layers):
                hooks.enter_context(module.register_forward_hook(keep))
        model(tokens)

    layers = []
    for block in model.blocks:
        _, (weight, expert, _) = calls[block.moe.router]
        (h, out, _), combined = calls[block.moe.aggregate]
        update = combined - h
        beyond = (update - (weight.unsqueeze(-1) * out).sum(dim=1)).norm(dim=-1) / update.norm(dim=-1).clamp_min(1e-30)
        depths = []
        for layer in block.moe.aggregate.layers:
            (before,), after = calls[layer]
            e, m = layer.edges(before)
            message = m.float().norm(dim=-1)
            share = message / message.sum(dim=-1, keepdim=True).clamp_min(1e-30)
            depths.append(Depth(expert, weight, beyond, e.float().abs().mean(dim=-1), message, share, before, after))
        layers.append(depths)
    return layers


def write_page(path: Path, model: GPT, tokens: list[int], texts: list[str], n_prompt: int, **more) -> None:
    """Write the page of a text's graphs: of its last block_size tokens, because the model looks at no more at once."""

    def plain(x: Tensor) -> list:
        return x.cpu().double().round(decimals=3).tolist()

    start = max(0, len(tokens) - model.config.block_size)
    layers = []
    for depths in observe(model, torch.tensor([tokens[start:]], device=model.embed.weight.device)):
        edges = [{"gate": plain(depth.gate), "share": plain(depth.share)} for depth in depths]
        expert, weight, beyond, *_ = depths[0]
        layers.append({"expert": expert.tolist(), "weight": plain(weight), "beyond": plain(beyond), "depths": edges})
    graph = {"gate": model.config.dag_gate, "tokens": texts[start:], "prompt": max(0, n_prompt - start)}
    # `more` is what else the template draws (lab/tree_page.py gives it a tree).
    # "<" is written as JSON's \u003c, so that no token can end the script element in which the data stand.
    data = json.dumps(graph | {"layers": layers} | more, separators=(",", ":")).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", data, 1).encode()
    with replacing(path) as file:
        file.write(page)
    print(f"wrote {path} ({len(page) // 1000:,} kB); open it in a browser", file=sys.stderr)


def within(kind: type, least: float, most: float) -> Callable[[str], float]:
    """An argparse type: numbers in a range."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must lie between {least} and {most}, got {text}")
        return value

    return number


def read_text(name: str) -> str:
    """An argparse type: the text of a UTF-8 file or pipe, or for "-" of standard input, read to its end."""
    if name == "-":
        name, data = "standard input", sys.stdin.buffer.read() if sys.stdin else b""
    else:
        data = Path(name).read_bytes()
    if not data:
        raise argparse.ArgumentTypeError(f"{name} is empty, or was read already")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{name} is not UTF-8 text: convert it with iconv ({error})") from error


def read_prompt(text: str) -> str:
    """An argparse type: the text itself, or for "-" standard input."""
    return read_text(text) if text == "-" else text


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises ValueError, OSError."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=Path, metavar="out/NAME", help="a run's folder (its best.pt), or a checkpoint file")
    add("--prompt", type=read_prompt, action="append", help="text to continue, - for standard input; repeatable")
    add("--prompt_file", type=read_text, action="append", dest="prompt", help="file with text to continue; repeatable")
    add("--num_samples", type=within(int, 1, 10_000), default=1, help="texts per prompt, all at once (default: 1)")
    add("--max_new_tokens", type=within(int, 0, 2**31), default=200, help="longest text, in tokens (default: 200)")
    add("--temperature", type=within(float, 0, 1000), default=0.8, help="0: always the likeliest token (default: 0.8)")
    add("--top_k", type=within(int, 1, 2**31), help="choose among the K likeliest tokens only")
    add("--top_p", type=within(float, 1e-9, 1), help="choose among the likeliest tokens that together reach P only")
    add("--seed", type=within(int, 0, 2**63 - 1), default=1337, help="another seed, another text (default: 1337)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--dag", type=Path, metavar="FILE.html", help="write a page that shows the graphs of the text")
    args = parser.parse_args()
    args.prompt = args.prompt or [""]  # a new document
    if args.dag and (len(args.prompt) > 1 or args.num_samples > 1):
        parser.error("--dag shows one text: give one --prompt, and no --num_samples")
    if args.dag and (args.dag.suffix != ".html" or args.dag.is_dir() or not args.dag.parent.is_dir()):
        parser.error(f"--dag must name a .html file in a folder that exists, got {str(args.dag)!r}")
    return args


def main() -> None:
    """Do what the command line says."""
    args = parse_arguments()
    device = choose_device(args.device)
    model, checkpoint = load_checkpoint(args.path)
    model.to(device)
    encoding = get_encoding(checkpoint["encoding"])
    if args.dag:
        check_graph(model)  # before anything is written
    start, count = time.perf_counter(), 0
    with autocast(device):
        for i, prompt in enumerate(args.prompt):
            if len(args.prompt) > 1:
                print(f"--- prompt {i + 1} of {len(args.prompt)} ---")
            tokens = encoding.encode_ordinary(prompt) or [encoding.eot_token]
            rows = torch.tensor([tokens] * args.num_samples, device=device)
            choice = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
            generator = torch.Generator(device).manual_seed(args.seed)
            steps = model.generate(rows, args.max_new_tokens, encoding.n_vocab, generator=generator, **choice)
            samples = print_samples(encoding, prompt, steps, args.num_samples, args.max_new_tokens)
            count += sum(len(sample) for sample in samples)
        seconds = time.perf_counter() - start
        speed = f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s"
        print(f"{speed}, from {checkpoint['path']} (step {checkpoint['step']})", file=sys.stderr)
        if args.dag:
            texts = [encoding.decode([token]) for token in tokens + samples[0]]
            write_page(args.dag, model, tokens + samples[0], texts, len(tokens))


if __name__ == "__main__":
    run(main)
