"""Measure, side by side in one run.

python bench.py cost                  # the quick start's training step with each aggregator; or another CONFIG's
python bench.py layer                 # one feed-forward layer with each aggregator; --growth: how that grows
python bench.py prepare               # prepare.py against tiktoken alone, on the standard library's text
python bench.py prepare novels/       # the same on other text
python bench.py memory                # peak memory of prepare.py on a small and on a large corpus
python bench.py loop                  # train.py's loop against a bare one: forward, backward, step
python bench.py sample out/NAME       # sampling with the key/value cache against without, one text and 16
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

import prepare
import train
from model import GPT, ModelConfig, window_start
from prepare import Parser, Reader, Source, UserError, get_encoding, local_source, run, stdlib_source
from sample import autocast, checkpoint_path, choose_device, choose_dtype, keep_freed_memory, load_model


@contextlib.contextmanager
def scratch_folder() -> Iterator[None]:
    """Work in an empty folder on the disk where data/ would be; it is deleted at the end."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=here) as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def read_documents(source: Source) -> list[str]:
    """All documents of a source, the long ones in pieces, in memory."""
    with tqdm(disable=True) as progress:
        return [piece.text for piece in source.documents(Reader("strict", progress)) if piece.text]


def bench_prepare(paths: list[str], encoding_name: str, workers: int, repeats: int) -> None:
    """Print MB/s of encode_ordinary_batch on documents in memory, and of prepare.py from files to finished bins."""
    encoding = get_encoding(encoding_name)
    what = [str(Path(path).resolve()) for path in paths] or ["stdlib"]
    texts = read_documents(local_source(what, "*.txt", None) if paths else stdlib_source())
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents or pieces of longer ones, {megabytes:.1f} MB, {encoding_name}, {workers} threads")

    def tiktoken_alone() -> None:
        encoding.encode_ordinary_batch(texts, num_threads=workers)

    def whole_preparation() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare.prepare(what, name="bench", encoding=encoding_name, workers=workers)

    seconds = {"encode_ordinary_batch": [], "prepare.py": []}
    with scratch_folder():
        for _ in range(repeats):  # in turn, because machines are noisy
            for name, function in (("encode_ordinary_batch", tiktoken_alone), ("prepare.py", whole_preparation)):
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    print(compare("speed of prepare.py against tiktoken's own", *seconds.values()))
    for name, values in seconds.items():
        speeds = [megabytes / s for s in values]
        print(f"{name:24}{statistics.median(speeds):7.1f} MB/s ({min(speeds):.1f} to {max(speeds):.1f})")


def bench_memory(encoding_name: str, sizes: list[int]) -> None:
    """Print the peak memory of prepare.py on one file of each size (MB), smallest first, made of the stdlib's text."""
    texts = read_documents(stdlib_source())
    with scratch_folder():
        for size in sorted(sizes):
            with open("text.txt", "w", newline="") as file:
                written = 0
                for text in itertools.cycle(texts):
                    written += file.write(text)
                    if written >= size * 1_000_000:
                        break
            command = [sys.executable, prepare.__file__, "text.txt", "--encoding", encoding_name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # largest child so far; KiB on Linux
            print(f"{size:6} MB of text: peak memory {peak / 1024:.0f} MiB")


def bench_loop(arguments: list[str], steps: int, repeats: int) -> None:
    """Print tokens/s of train.py and of a bare loop over the same model that does nothing but compute."""
    settings = train.read_settings(arguments)
    config, data = train.make_config(train.TrainConfig, settings), train.open_dataset(settings["dataset"])
    model_config = train.make_config(ModelConfig, {"vocab_size": data.meta["vocab_size"]} | settings)
    device = choose_device(config.device)
    cast = autocast(device, choose_dtype(config.dtype, device))
    if config.grad_accum > 1:
        raise UserError(f"the bare loop has no micro-steps: give --grad_accum=1, not {config.grad_accum}")

    def whole_loop(folder: str) -> float:
        fixed = (f"--max_steps={steps}", f"--eval_interval={steps}", "--eval_tokens=1", f"--out_dir={folder}")
        with (
            mock.patch.object(sys, "argv", ["train.py", *arguments, *fixed]),
            mock.patch.object(train, "print_samples"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            train.main()
        with open(Path(folder, "log.csv")) as file:
            return float(list(csv.DictReader(file))[-1]["tokens_per_s"])

    def bare_loop() -> float:
        torch.manual_seed(config.seed)
        model = GPT(model_config).to(device)
        optimizer = train.make_optimizer(model, config)
        x, y = (t.to(device) for t in train.get_batch(data.train, model_config, config, 0, 0))

        def compute() -> None:
            for _ in range(steps):
                with cast:
                    out = model(x, y)
                train.objective(out, out.router.load, config).backward()
                optimizer.step()
                optimizer.zero_grad()

        return steps * x.numel() / seconds_of(compute, device)

    speeds = {"train.py": [], "bare loop": []}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=repeats + 1, unit="pair") as progress:
        for i in range(repeats + 1):
            speeds["train.py"].append(whole_loop(f"{folder}/{i}"))
            speeds["bare loop"].append(bare_loop())
            progress.update()
    speeds = {name: values[1:] for name, values in speeds.items()}  # the first pair warms up
    print(compare(f"speed of train.py against a bare loop, {device.type}", *speeds.values()))
    for name, values in speeds.items():
        print(f"{name:12}{statistics.median(values):12,.0f} tokens/s")


class Row(NamedTuple):
    """What is measured of one model or layer."""

    step: Callable[[], None]  # forward, backward, and for a whole model the optimizer's step
    forward: Callable[[], torch.Tensor]
    parameters: str
    multiply_adds: int  # per token, of one forward pass


def matmul_peak(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """A function that measures the speed of a large matrix product: FLOP/s."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def measure() -> float:
        return 2 * n**3 / seconds_of(lambda: a @ b, device)

    return measure


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters left out, storages counted once."""
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not (x.is_leaf and x.requires_grad):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(storages.values())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory above what was in use before, on a CUDA device or on Linux; None elsewhere."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return None
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


def print_costs(rows: dict[str, Row], tokens: int, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
    """Time all rows in turn, `repeats` times, and print them with their ratios to `dense` and `sum`."""
    peak = matmul_peak(device, dtype)
    seconds, flops = {name: [] for name in rows}, []
    with tqdm(total=(repeats + 1) * len(rows), leave=False) as progress:
        for _ in range(repeats + 1):
            flops.append(peak())
            for name, row in rows.items():
                seconds[name].append(seconds_of(row.step, device))
                progress.update()
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    peak_flops = statistics.median(flops[1:])
    print(f"{tokens:,} tokens, {device.type}, {dtype}, matmul peak {peak_flops / 1e9:,.0f} GFLOP/s; × is to sum")
    print(f"{'':18}{'parameters':>24}{'multiply-adds':>14}{'×':>6}{'ms':>9}{'× (spread)':>20}{'tokens/s':>10}", end="")
    print(f"{'of peak':>9}{'peak MB':>9}{'kept B/token':>14}")
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds["sum"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        median = statistics.median(seconds[name])
        share = 3 * 2 * row.multiply_adds * tokens / median / peak_flops  # a backward pass is two forward passes
        memory = peak_bytes(row.step, device)
        print(
            f"{name:18}{row.parameters:>24}{row.multiply_adds:>14,}{row.multiply_adds / rows['sum'].multiply_adds:6.2f}"
            f"{median * 1e3:9.1f}{spread:>20}{tokens / median:10,.0f}{share:9.0%}"
            f"{'-' if memory is None else f'{memory / 1e6:.0f}':>9}{kept_bytes(row.forward) / tokens:14,.0f}"
        )


def bench_cost(arguments: list[str], repeats: int) -> None:
    """Print what a training step costs with each aggregator, all else equal."""
    settings = train.read_settings(arguments)
    config = train.make_config(train.TrainConfig, settings)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    cast = autocast(device, dtype)
    base = train.make_config(ModelConfig, settings)
    variants = {"dense": {"aggregator": "dense"}, "sum": {"aggregator": "sum"}}
    variants |= {f"dag L={depth} D={base.dag_dim}": {"aggregator": "dag", "dag_depth": depth} for depth in (1, 2)}
    x, y = torch.randint(base.vocab_size, (2, config.batch_size, base.block_size), device=device)

    def make_row(changes: dict) -> Row:
        model = GPT(dataclasses.replace(base, **changes)).to(device)
        optimizer = train.make_optimizer(model, config)
        network = torch.compile(model) if config.compile else model

        def forward() -> torch.Tensor:
            with cast:
                out = network(x, y)
            return train.objective(out, out.router.load, config)

        def step() -> None:
            forward().backward()
            optimizer.step()
            optimizer.zero_grad()

        size = model.count_parameters()
        sizes = f"{size.total:,} ({size.active / size.total:.0%} active)"
        return Row(step, forward, sizes, model.multiply_adds_per_token().total)

    print_costs({name: make_row(changes) for name, changes in variants.items()}, x.numel(), device, dtype, repeats)


LAYER = ("--n_embd=512", "--n_head=8", "--n_expert=16", "--top_k=4", "--expert_dim=512")
GRAPHS = ((1, 64), (2, 128))  # depth and width


def layer_row(config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> Row:
    """The feed-forward half of a block alone, forward and backward."""
    model = GPT(config).to(device)
    network = torch.compile(model.blocks[0].moe) if compiled else model.blocks[0].moe
    h = torch.randn(1, tokens, config.n_embd, device=device, requires_grad=True)
    upstream = torch.randn(1, tokens, config.n_embd, device=device)

    def forward() -> torch.Tensor:
        with autocast(device, dtype):
            return network(h)[0]

    def step() -> None:
        forward().backward(upstream)
        network.zero_grad()
        h.grad = None

    size, cost = sum(p.numel() for p in model.blocks[0].moe.parameters()), model.multiply_adds_per_token()
    return Row(step, forward, f"{size:,}", cost.experts + cost.aggregator)


def bench_layer(arguments: list[str], tokens: int, repeats: int, growth: bool) -> None:
    """Print what one feed-forward layer costs with each aggregator; with `growth` how the cost grows."""
    settings = train.read_settings([*LAYER, *arguments])
    config = train.make_config(train.TrainConfig, settings)
    base = train.make_config(ModelConfig, settings | {"n_layer": 1})
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)

    def rows(tokens: int, variants: dict[str, dict]) -> dict[str, Row]:
        configs = {name: dataclasses.replace(base, **changes) for name, changes in variants.items()}
        return {name: layer_row(c, tokens, device, dtype, config.compile) for name, c in configs.items()}

    plain = {"dense": {"aggregator": "dense"}, "sum": {"aggregator": "sum"}}
    graphs = {f"dag L={depth} D={dim}": dict(aggregator="dag", dag_depth=depth, dag_dim=dim) for depth, dim in GRAPHS}
    if not growth:
        return print_costs(rows(tokens, plain | graphs), tokens, device, dtype, repeats)
    dag = next(iter(graphs.values()))
    for count in (1024, 2048, 4096, 8192, 16384, 32768):
        print_costs(rows(count, plain | {"dag": dag}), count, device, dtype, repeats)
    for key, values in {"top_k": (1, 2, 4, 8), "n_expert": (8, 16, 32, 64)}.items():
        variants = {f"{key}={value} {name}": changes | {key: value} for value in values
                    for name, changes in (("sum", plain["sum"]), ("dag", dag))}  # fmt: skip
        print_costs(rows(tokens, {"sum": plain["sum"]} | variants), tokens, device, dtype, repeats)
    depths = {f"L={depth}": dag | {"dag_depth": depth} for depth in (1, 2, 3, 4)}
    print_costs(rows(tokens, {"sum": plain["sum"]} | depths), tokens, device, dtype, repeats)


@torch.no_grad()
def bench_sample(path: Path, new_tokens: int, repeats: int, device_name: str) -> None:
    """Print tokens/s of greedy sampling: one text without cache, one with, 16 at once with."""
    device = choose_device(device_name)
    model, checkpoint = load_model(checkpoint_path(path), device)
    start = torch.full((16, 1), get_encoding(checkpoint["encoding"]).eot_token, device=device)

    def cached(batch: int) -> None:
        for _ in model.generate(start[:batch], new_tokens, temperature=0):
            pass

    def uncached() -> None:
        tokens = start[:1]
        for _ in range(new_tokens):
            window = tokens[:, window_start(tokens.shape[1], model.config.block_size) :]
            tokens = torch.cat([tokens, model(window).logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)

    ways = {"uncached": (1, uncached), "cached": (1, lambda: cached(1)), "cached, 16 texts": (16, lambda: cached(16))}
    speeds = {name: [] for name in ways}
    with autocast(device, choose_dtype("auto", device)), tqdm(total=repeats + 1, unit="round") as progress:
        for _ in range(repeats + 1):
            for name, (batch, function) in ways.items():
                speeds[name].append(batch * new_tokens / seconds_of(function, device))
            progress.update()
    speeds = {name: values[1:] for name, values in speeds.items()}  # the first round warms up
    print(f"{new_tokens} new tokens, block_size {model.config.block_size}, {device.type}")
    print(compare("cached against uncached", speeds["cached"], speeds["uncached"]))
    print(compare("16 texts at once against one", speeds["cached, 16 texts"], speeds["cached"]))
    for name, values in speeds.items():
        print(f"{name:18}{statistics.median(values):10,.0f} tokens/s ({min(values):,.0f} to {max(values):,.0f})")


def compare(what: str, ours: list[float], theirs: list[float]) -> str:
    """Median and spread of the ratios of pairs that were measured one after the other."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{what}: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    command = what.add_parser("prepare", help="tokenizing against tiktoken alone")
    command.add_argument("paths", nargs="*", metavar="PATH", help="files or folders of .txt (default: the stdlib)")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one per core)")
    command.add_argument("--repeats", type=int, default=5, help="how often each is timed (default: 5)")
    memory = what.add_parser("memory", help="peak memory of prepare.py")
    memory.add_argument("--sizes", type=int, nargs="+", default=[200, 1000], help="in MB (default: 200 1000)")
    cost = what.add_parser("cost", help="a training step with each aggregator")
    layer = what.add_parser("layer", help="one feed-forward layer with each aggregator")
    for either in (cost, layer):
        either.add_argument("settings", nargs="*", metavar="SETTING", help="as for train.py")
        either.add_argument("--repeats", type=int, default=5, help="how often each is timed (default: 5)")
    layer.add_argument("--tokens", type=int, default=8192, help="tokens in the layer's input (default: 8192)")
    layer.add_argument("--growth", action="store_true", help="measure growth with tokens, K, experts and depth")
    loop = what.add_parser("loop", help="train.py's loop against a bare one")
    loop.add_argument("settings", nargs="*", metavar="SETTING", help="as for train.py (default: the quick start's)")
    loop.add_argument("--steps", type=int, default=100, help="steps of each (default: 100)")
    loop.add_argument("--repeats", type=int, default=5, help="how often each is timed (default: 5)")
    sample = what.add_parser("sample", help="sampling with and without cache, one text and 16")
    sample.add_argument("path", type=Path, metavar="out/NAME", help="a run's folder, or a checkpoint file")
    sample.add_argument("--new-tokens", type=int, default=512, help="tokens per text (default: 512)")
    sample.add_argument("--repeats", type=int, default=5, help="how often each is timed (default: 5)")
    sample.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    for either in (command, memory):
        either.add_argument("--encoding", default="gpt2", help="as in prepare.py (default: gpt2)")
    args, rest = parser.parse_known_args()
    if rest and args.what not in ("cost", "layer", "loop"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    keep_freed_memory()  # as train.py does
    if args.what in ("cost", "layer"):
        if min(args.repeats, getattr(args, "tokens", 1)) < 1:
            raise UserError("--repeats and --tokens must be at least 1")
        settings = [*args.settings, *rest]
        if args.what == "cost":
            bench_cost(settings if args.settings else ["configs/quickstart.toml", *settings], args.repeats)
        else:
            bench_layer(settings, args.tokens, args.repeats, args.growth)
    elif args.what == "loop":
        if min(args.steps, args.repeats) < 1:
            raise UserError("--steps and --repeats must be at least 1")
        bench_loop([*(args.settings or ["configs/quickstart.toml"]), *rest], args.steps, args.repeats)
    elif args.what == "sample":
        if min(args.new_tokens, args.repeats) < 1:
            raise UserError("--new-tokens and --repeats must be at least 1")
        bench_sample(args.path, args.new_tokens, args.repeats, args.device)
    elif args.what == "memory":
        if min(args.sizes) < 1:
            raise UserError(f"--sizes must be at least 1, got {min(args.sizes)}")
        bench_memory(args.encoding, args.sizes)
    else:
        if min(args.workers, args.repeats) < 1:
            raise UserError("--workers and --repeats must be at least 1")
        bench_prepare(args.paths, args.encoding, args.workers, args.repeats)


if __name__ == "__main__":
    run(main)
