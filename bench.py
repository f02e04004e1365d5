"""Measure, side by side in one run.

python bench.py prepare               # prepare.py against tiktoken alone, on the standard library's text
python bench.py prepare novels/       # the same on other text
python bench.py memory                # peak memory of prepare.py on a small and on a large corpus
python bench.py loop                  # train.py's loop against a bare one: forward, backward, step
python bench.py sample out/NAME       # sampling with the key/value cache against without, one text and 16
"""

import argparse
import contextlib
import csv
import io
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

import prepare
import train
from model import GPT, ModelConfig, balance_loss, window_start
from prepare import Parser, Reader, Source, UserError, get_encoding, local_source, run, stdlib_source
from sample import autocast, checkpoint_path, choose_device, choose_dtype, load_model


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
        start = time.perf_counter()
        for _ in range(steps):
            with cast:
                out = model(x, y)
            balance = balance_loss(out.router.load, out.router.prob)
            (out.loss + config.balance_coef * balance + config.z_coef * out.router.z.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return steps * x.numel() / (time.perf_counter() - start)

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
                begun = time.perf_counter()
                function()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                speeds[name].append(batch * new_tokens / (time.perf_counter() - begun))
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
    if rest and args.what != "loop":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.what == "loop":
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
