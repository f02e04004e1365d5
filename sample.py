"""Write text with a trained model, and look at the graphs by which it combines its experts.

    python sample.py out/NAME --prompt "def main("
    python sample.py out/NAME --prompt "def main(" --prompt "class " --num-samples 4
    python sample.py out/NAME --prompt "def main(" --dag graph.html
    python sample.py out/NAME --dag-stats stdlib

Needs nothing but the checkpoint, which holds the model's configuration and the name of its encoding.
"""

import argparse
import codecs
import contextlib
import ctypes
import json
import math
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from model import GPT, LayerRecord, ModelConfig
from prepare import (
    Parser,
    UserError,
    cut_windows,
    get_encoding,
    open_dataset,
    read_text,
    replacing,
    run,
    spaced_offsets,
)  # fmt: skip

TEMPLATE = Path(__file__).parent / "assets" / "graph.html"
STATISTICS_TOKENS = 100_000  # read by --dag-stats
PAIRS = 100  # a pair of experts that is rarer in them has no say

CHECKPOINT_TYPES = {  # what train.py writes
    "model": dict, "optimizer": dict, "model_config": dict, "train_config": dict, "encoding": str, "data": dict,
    "version": str, "step": int, "log": list, "loss_sum": float, "loss_steps": int, "grad_norm": float | None,
}  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS (Apple), else the CPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"device {name!r} can't be used here ({reason}); try cpu") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} can't be used here; choose auto, cpu, cuda or mps")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of matrix products: "auto" is bfloat16 on a CUDA device that has it, else float32. Raises UserError."""
    if name == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float32
    if name == "float16":
        raise UserError(
            "dtype float16 is refused: its gradients underflow without loss scaling; use bfloat16, or float32 where "
            "the device has no bfloat16"
        )
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype must be auto, float32 or bfloat16, got {name!r}")
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Weights stay in float32; in this context, which can be entered again and again, products are in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def keep_freed_memory() -> None:
    """Tell glibc, where that is the C library, to keep freed memory instead of giving it back to the system.

    On a CPU every large tensor would otherwise be mapped anew, and filling in its pages can take longer than computing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: no block is too large for the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's free end is kept


def checkpoint_path(path: Path) -> Path:
    """A run's folder stands for its best.pt."""
    return path / "best.pt" if path.is_dir() else path


def load_checkpoint(path: Path) -> dict:
    """Contents of a checkpoint that train.py wrote, on the CPU. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; train a model first, for example: python train.py configs/quickstart.toml"
        )
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if archive.testzip():  # torch.load does not compare the checksums that torch.save wrote
                raise ValueError("checksum")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch stumbles over: the file is not what train.py wrote
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})") from error
    for key, kind in CHECKPOINT_TYPES.items():
        if not isinstance(checkpoint, dict) or key not in checkpoint or not isinstance(checkpoint[key], kind):
            raise UserError(f"{path} is not a checkpoint of train.py: {key!r} is missing or of another type")
    return checkpoint


def load_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """The model of a checkpoint, in evaluation mode, and the whole checkpoint. Raises UserError."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit this version of model.py ({str(error).splitlines()[-1].strip()})"
        ) from error
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{path} holds weights that are not finite: the run diverged; use an earlier checkpoint")
    if get_encoding(checkpoint["encoding"]).n_vocab > model.config.vocab_size:
        raise UserError(f"{path} is damaged: its {checkpoint['encoding']} encoding has more ids than its model")
    return model.to(device).eval(), checkpoint


# Writing


class Text:
    """One text as it is written: its tokens, and from them the characters that are certain.

    A character whose bytes span several tokens is held back until it is whole, and whatever may be the beginning of
    the stop string until it turns out to be something else.
    """

    def __init__(self, encoding: tiktoken.Encoding, prompt: str, stop: str | None = None):
        self.encoding, self.prompt, self.stop = encoding, prompt, stop
        self.tokens = encoding.encode_ordinary(prompt) or [encoding.eot_token]  # no prompt: a new document
        self.n_prompt = len(self.tokens)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.ended = False  # by <|endoftext|>, by the stop string or by `end`

    def add(self, token: int) -> str:
        """Append a token, unless the text has ended; returns the characters that are certain now."""
        if self.ended:
            return ""
        if token == self.encoding.eot_token:
            return self.end()
        self.tokens.append(token)
        self.held += self.decoder.decode(self.encoding.decode_single_token_bytes(token))
        if not self.stop:
            return self.release(len(self.held))
        at = self.held.find(self.stop)
        if at >= 0:
            self.ended = True
            return self.release(at)
        beginnings = (n for n in range(len(self.stop) - 1, 0, -1) if self.held.endswith(self.stop[:n]))
        return self.release(len(self.held) - next(beginnings, 0))

    def release(self, count: int) -> str:
        """Take the first characters from what is held."""
        text, self.held = self.held[:count], self.held[count:]
        return text

    def end(self) -> str:
        """What was held back; nothing will follow."""
        if self.ended:
            return ""
        self.ended = True
        return self.held + self.decoder.decode(b"", final=True)


def continue_texts(
    model: GPT, texts: list[Text], max_new_tokens: int, **choice: float | torch.Generator | None
) -> Iterator[list[str]]:
    """Continue all texts at once: after each token yield the next characters of each, until all have ended.

    `choice` is what GPT.generate takes: temperature, top_k, top_p, generator.
    """
    encoding = texts[0].encoding
    longest = max(len(text.tokens) for text in texts)
    pad = [longest - len(text.tokens) for text in texts]
    rows = [[encoding.eot_token] * p + text.tokens for p, text in zip(pad, texts, strict=True)]
    tokens = torch.tensor(rows, device=model.embed.weight.device)
    for ids in model.generate(tokens, max_new_tokens, n_token=encoding.n_vocab, pad=pad, **choice):
        yield [text.add(token) for text, token in zip(texts, ids.tolist(), strict=True)]
        if all(text.ended for text in texts):
            return
    yield [text.end() for text in texts]


def print_texts(texts: list[Text], pieces: Iterator[list[str]], limit: int, source: str) -> None:
    """Print a single text while it is written; several one after the other, when all are finished."""
    alone = len(texts) == 1
    if alone:
        print(texts[0].prompt, end="", flush=True)
    written = [[] for _ in texts]
    start = time.perf_counter()
    for new in tqdm(pieces, total=limit, unit="token", leave=False, disable=alone or not sys.stderr.isatty()):
        for parts, piece in zip(written, new, strict=True):
            parts.append(piece)
        if alone:
            print(new[0], end="", flush=True)
    seconds = time.perf_counter() - start
    if alone:
        print()
    else:
        for i, (text, parts) in enumerate(zip(texts, written, strict=True)):
            print(f"--- sample {i + 1} of {len(texts)} ---\n{text.prompt}{''.join(parts)}")
    sys.stdout.flush()
    tokens = sum(len(text.tokens) - text.n_prompt for text in texts)
    if tokens:
        speed = f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
        print(f"{speed}, from {source}", file=sys.stderr)


# The graph of one text


def check_graph(model: GPT) -> None:
    """Raise UserError if the model has no graph."""
    if model.config.aggregator != "dag":
        raise UserError(f"this model combines its experts by {model.config.aggregator!r}: there is no graph to show")


def record(model: GPT, tokens: torch.Tensor) -> list[LayerRecord]:
    """What each layer does with tokens (B, T): GPT.forward's records."""
    records = []
    with torch.no_grad():
        model(tokens, records=records)
    return records


def shares(message: torch.Tensor) -> torch.Tensor:
    """Norms ‖m_ij‖ (..., K, K) → how much of what node i receives comes from node j: the rows sum to 1."""
    return message / message.sum(dim=-1, keepdim=True).clamp_min(1e-30)


def describe_graph(model: GPT, text: Text) -> dict:
    """Per token and layer the experts, their weights and all edges, as plain numbers for the page and for --dag-text.

    Of a text longer than block_size only its end, because the model can't look at more at once.
    """
    start = max(0, len(text.tokens) - model.config.block_size)
    tokens = text.tokens[start:]
    records = record(model, torch.tensor([tokens], device=model.embed.weight.device))

    def rounded(x: torch.Tensor) -> list:
        return [[round(value, 3) for value in row] for row in x.flatten(1).tolist()]

    return {
        "K": model.config.top_k,
        "gate": model.config.dag_gate,
        "tokens": [text.encoding.decode([token]) for token in tokens],
        "prompt": max(0, text.n_prompt - start),  # how many of the tokens
        "layers": [
            {
                "expert": layer.expert.tolist(),
                "weight": rounded(layer.gate),
                "beyond": [round(x, 3) for x in layer.share_beyond_sum.tolist()],
                "depths": [  # K·K numbers a token: row i, column j is the edge from node j to node i
                    {"gate": rounded(depth.edge_gate), "share": rounded(shares(depth.message))}
                    for depth in layer.depths
                ],
            }
            for layer in records
        ],
    }


def write_page(path: Path, graph: dict) -> None:
    """Fill the template assets/graph.html: one file that needs no network."""
    if not TEMPLATE.exists():
        raise UserError(f"{TEMPLATE} is missing, though it belongs to this repository: git checkout assets")
    # "<" is written as JSON's \u003c, so that no token can end the script element in which the data stand.
    data = json.dumps(graph, separators=(",", ":")).replace("<", "\\u003c")
    with replacing(path) as file:
        file.write(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", data, 1).encode())
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser", file=sys.stderr)


def print_graph(graph: dict, position: int) -> None:
    """The edges at one token as tables. Raises UserError if there is no token at that position."""
    count, K = len(graph["tokens"]), graph["K"]
    if not -count <= position < count:
        raise UserError(f"--dag-text must lie between {-count} and {count - 1}: there are {count} tokens")
    s = position % count
    print(f"\nThe graph at token {s} of {count}, {graph['tokens'][s]!r}. A row receives, a column sends; in each cell")
    print(f"the edge's mean gate ({graph['gate']}), and its share of all that the row's node receives.")
    for i, layer in enumerate(graph["layers"]):
        experts = layer["expert"][s]
        weights = ", ".join(f"E{e} {w:.2f}" for e, w in zip(experts, layer["weight"][s], strict=True))
        print(f"\nlayer {i + 1}: router weights {weights}; {layer['beyond'][s]:.0%} of the update is not in their sum")
        for d, edges in enumerate(layer["depths"]):
            print(f"depth {d + 1:<5}" + "".join(f"{f'from E{e}':>14}" for e in experts))
            for node, e in enumerate(experts):
                row = slice(node * K, (node + 1) * K)
                cells = zip(edges["gate"][s][row], edges["share"][s][row], strict=True)
                print(f"{f'to E{e}':>11}" + "".join(f"{gate:9.3f} {share:4.0%}" for gate, share in cells))


# The graphs of a whole validation set


class GraphStatistics(NamedTuple):
    """Means over tokens, nodes and edges, of one depth in one layer."""

    gate: float  # an edge's mean gate
    spread: float  # standard deviation of that over tokens and edges
    self_gate: float  # mean gate of the edges from a node to itself
    self_share: float  # share of what a node receives that comes from itself
    cosine: float  # between two different nodes; NaN with K = 1
    incoming: float  # effective number of a node's incoming edges, 1 / Σ_j share_ij²: 1 to K
    update: float  # ‖W_up Σ_j m_ij‖ / ‖n_i‖
    beyond: float  # of the layer: ‖h' - h - Σ_i g_i E_i(x)‖ / ‖h' - h‖
    strength: torch.Tensor  # (E, E) mean ‖m_ij‖ [expert that receives, expert that sends], NaN where rarer than PAIRS


def graph_statistics(model: GPT, tokens: np.ndarray) -> list[list[GraphStatistics]]:
    """Statistics per layer and depth over evenly spaced windows of the tokens, about STATISTICS_TOKENS in all."""
    c, device = model.config, model.embed.weight.device
    offsets = spaced_offsets(tokens, c.block_size, STATISTICS_TOKENS)
    means = torch.zeros(c.n_layer, c.dag_depth, 8, device=device)
    different = ~torch.eye(c.top_k, dtype=torch.bool, device=device)
    strength, count = torch.zeros(2, c.n_layer, c.dag_depth, c.n_expert**2, device=device)
    for start in tqdm(range(0, len(offsets), 8), unit="batch", leave=False, disable=not sys.stderr.isatty()):
        windows = cut_windows(tokens, offsets[start : start + 8], c.block_size, c.vocab_size)
        weight = len(windows) / len(offsets)
        for i, layer in enumerate(record(model, torch.from_numpy(windows).to(device))):
            pair = (layer.expert[:, :, None] * c.n_expert + layer.expert[:, None, :]).flatten()
            for d, depth in enumerate(layer.depths):
                share = shares(depth.message)
                concentration = share.square().sum(dim=-1)  # 1/K to 1; 0 where a node receives nothing at all
                values = (
                    depth.edge_gate,
                    depth.edge_gate.square(),
                    depth.edge_gate.diagonal(dim1=1, dim2=2),
                    share.diagonal(dim1=1, dim2=2),
                    depth.cosine[:, different],
                    torch.where(concentration > 0, 1 / concentration, 0.0),
                    depth.relative_update,
                    layer.share_beyond_sum,
                )
                means[i, d] += weight * torch.stack([value.mean() for value in values])
                strength[i, d].index_add_(0, pair, depth.message.flatten())
                count[i, d].index_add_(0, pair, torch.ones_like(pair, dtype=count.dtype))
    strength = torch.where(count >= PAIRS, strength / count, math.nan).view(*strength.shape[:2], c.n_expert, c.n_expert)
    statistics = []
    for i in range(c.n_layer):
        rows = zip(means[i].tolist(), strength[i].cpu(), strict=True)
        statistics.append([
            GraphStatistics(gate, max(0.0, square - gate**2) ** 0.5, *others, pairs)
            for (gate, square, *others), pairs in rows
        ])  # fmt: skip
    return statistics


def print_statistics(statistics: list[list[GraphStatistics]], K: int) -> None:
    """A row per layer and depth, and which pairs of different experts send each other the largest messages."""
    print(
        f"{'layer':>5}{'depth':>6}{'gate ± spread':>18}{'to itself':>11}{'to others':>11}{'share to itself':>17}",
        end="",
    )
    print(
        f"{'nodes alike':>13}{'edges in':>10}{'update':>8}{'beyond sum':>12}  strongest pairs, × the mean of all pairs"
    )
    for i, depths in enumerate(statistics):
        for d, row in enumerate(depths):
            others = f"{(K * row.gate - row.self_gate) / (K - 1):11.3f}" if K > 1 else f"{'-':>11}"
            relative = row.strength / row.strength.nanmean()
            relative.fill_diagonal_(math.nan)
            best = relative.nan_to_num(-1.0).flatten().topk(min(3, relative.numel()))
            pairs = [
                f"E{at % len(relative)}→E{at // len(relative)} {value:.1f}"
                for value, at in zip(*(x.tolist() for x in best), strict=True)
                if value > 0
            ]
            print(
                f"{i + 1:>5}{d + 1:>6}{row.gate:>10.3f} ± {row.spread:.3f}{row.self_gate:>11.3f}{others}"
                f"{row.self_share:>17.2f}{row.cosine:>13.2f}"
                f"{row.incoming:>10.2f}{row.update:>8.3f}{row.beyond:>12.3f}  {', '.join(pairs)}"
            )
    print("Nodes alike: the mean cosine between two nodes of a token; at 1 all K hold the same.")
    print(f"An edge whose share is as large as all others' has 1/K = {1 / K:.2f}; 'edges in' then is K = {K}.")


def pyplot_if_installed() -> ModuleType | None:
    """matplotlib.pyplot, drawing to files only, or None after a line that names the command that installs it."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_statistics(path: Path, statistics: list[list[GraphStatistics]]) -> None:
    """Heat maps of the mean message between experts, a row per layer and a column per depth, as PNG."""
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return
    size = (len(statistics), len(statistics[0]))
    figure, axes = pyplot.subplots(*size, figsize=(4.2 * size[1], 3.6 * size[0]), squeeze=False, layout="constrained")
    for i, depths in enumerate(statistics):
        for d, row in enumerate(depths):
            image = axes[i][d].imshow(row.strength.numpy(), cmap="viridis")
            axes[i][d].set(title=f"layer {i + 1}, depth {d + 1}", xlabel="expert that sends", ylabel="that receives")
            figure.colorbar(image, ax=axes[i][d], label="mean ‖m_ij‖")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    print(f"wrote {path}", file=sys.stderr)


# The command


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UserError."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path", type=Path, metavar="out/NAME", help="a run's folder (its best.pt), or a checkpoint file"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", action="append", help="text to continue, - for standard input; may be repeated")
    prompt.add_argument("--prompt-file", type=Path, help="file whose text is continued (default: a new document)")
    parser.add_argument("--num-samples", type=int, default=1, help="texts per prompt, all at once (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, help="longest text, in tokens (default: 500; with --dag: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest tokens that together reach P only")
    parser.add_argument("--stop", help="end a text before these characters")
    parser.add_argument("--seed", type=int, default=1337, help="another seed, another text (default: 1337)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--dag", type=Path, metavar="FILE.html", help="write a page that shows the text's graphs")
    parser.add_argument(
        "--dag-text", type=int, nargs="?", const=-1, metavar="TOKEN", help="print the graphs at a token (default: last)"
    )
    parser.add_argument("--dag-stats", metavar="DATASET", help="print what the graphs are like on its validation split")
    args = parser.parse_args()
    graph = args.dag is not None or args.dag_text is not None
    if args.max_new_tokens is None:
        args.max_new_tokens = 100 if graph else 500
    least = {"num_samples": 1, "max_new_tokens": 0 if graph else 1, "temperature": 0, "top_k": 1, "seed": 0}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not value >= bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    if args.seed >= 2**63:
        raise UserError(f"--seed must be below 2**63, got {args.seed}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must lie above 0 and not above 1, got {args.top_p}")
    if args.stop == "":
        raise UserError("--stop must not be empty")
    if graph and (args.num_samples > 1 or len(args.prompt or []) > 1):
        raise UserError("--dag and --dag-text show one text: give one --prompt, and no --num-samples")
    if args.dag_stats is not None:
        given = {argument.split("=")[0] for argument in sys.argv[1:] if argument.startswith("--")}
        if given - {"--dag-stats", "--device"}:
            raise UserError("--dag-stats reads a dataset: it goes with --device only")
    if args.dag is not None and (args.dag.is_dir() or not args.dag.parent.is_dir()):
        raise UserError(f"--dag must name a file in a folder that exists, got {str(args.dag)!r}")
    return args


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The texts to continue. Raises UserError."""
    if args.prompt_file:
        return [read_text(args.prompt_file)]
    prompts = []
    if (args.prompt or []).count("-") > 1:
        raise UserError("--prompt - can be given once only: there is one standard input")
    for prompt in args.prompt or [""]:
        if prompt == "-":
            try:
                prompt = sys.stdin.buffer.read().decode()
            except UnicodeDecodeError as error:
                raise UserError(f"standard input is not UTF-8 text: byte {error.start} is in the way") from error
            if not prompt:
                raise UserError("standard input is empty; leave --prompt out for a new document")
        prompts.append(prompt)
    return prompts


def main() -> None:
    args = parse_arguments()
    device = choose_device(args.device)
    cast = autocast(device, choose_dtype("auto", device))
    path = checkpoint_path(args.path)
    model, checkpoint = load_model(path, device)
    encoding = get_encoding(checkpoint["encoding"])
    graph_wanted = args.dag is not None or args.dag_text is not None
    if graph_wanted or args.dag_stats is not None:
        check_graph(model)  # before anything is written

    if args.dag_stats is not None:
        data = open_dataset(args.dag_stats)
        data.check_fits(checkpoint["encoding"], model.config.vocab_size, model.config.block_size)
        with cast:
            statistics = graph_statistics(model, data.val)
        print_statistics(statistics, model.config.top_k)
        draw_statistics(path.with_name(f"dag-{data.name}.png"), statistics)
        return

    texts = [Text(encoding, prompt, args.stop) for prompt in read_prompts(args) for _ in range(args.num_samples)]
    generator = torch.Generator(device).manual_seed(args.seed)
    choice = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, generator=generator)
    with cast:
        pieces = continue_texts(model, texts, args.max_new_tokens, **choice)
        print_texts(texts, pieces, args.max_new_tokens, f"{path} (step {checkpoint['step']})")
        if graph_wanted:
            graph = describe_graph(model, texts[0])
    if args.dag_text is not None:
        print_graph(graph, args.dag_text)
    if args.dag is not None:
        write_page(args.dag, graph)


if __name__ == "__main__":
    run(main)
