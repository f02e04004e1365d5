"""Measure, side by side: first the cost, then, at the end of the file, what it buys.

python bench.py cost                  # the quick start's training step with each aggregator; or another CONFIG's
python bench.py layer                 # one feed-forward layer: dense, sum and dag; --growth: how that grows
python bench.py prepare               # prepare.py against tiktoken alone, on the standard library's text
python bench.py prepare novels/       # the same on other text
python bench.py memory                # peak memory of prepare.py on a small and on a large corpus
python bench.py loop                  # train.py's loop against a bare one: forward, backward, step
python bench.py sample out/NAME       # sampling with the key/value cache against without, one text and 16

python bench.py sweep configs/ablation --seeds 5   # train every arm with every seed; started again, it goes on
python bench.py quality out/ablation               # one table: loss, difference to sum, cost
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

import prepare
import train
from model import AGGREGATORS, GPT, ModelConfig, window_start
from prepare import Parser, Reader, Source, UserError, get_encoding, local_source, run, stdlib_source
from sample import (
    autocast,
    checkpoint_path,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    load_model,
    pyplot_if_installed,
)  # fmt: skip


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
    if resource is None:
        raise UserError("this system does not tell a program's peak memory: use Linux or macOS")
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
    config = train.make_config(train.TrainConfig, settings)
    data = train.open_dataset(config.dataset)
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
        return float(read_rows(Path(folder, "log.csv"))[-1]["tokens_per_s"])

    def bare_loop() -> float:
        torch.manual_seed(config.seed)
        model = GPT(model_config).to(device)
        optimizer = train.make_optimizer(model, config)
        network = train.compile_if_possible(model) if config.compile else model
        x, y = (t.to(device) for t in train.get_batch(data.train, model_config, config, 0, 0))

        def compute() -> None:
            for _ in range(steps):
                with cast:
                    out = network(x, y)
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
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier calls have freed and keep_freed_memory has kept
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
    if "vocab_size" not in settings:  # as in training: the output head may be most of a small model's cost
        try:
            settings["vocab_size"] = train.open_dataset(config.dataset).meta["vocab_size"]
        except UserError as error:
            raise UserError(f"{error}; or give --vocab_size=50257, gpt2's, or 257 for bytes") from error
    base = train.make_config(ModelConfig, settings)
    plain = [name for name in AGGREGATORS if name != "dag" and (name != "coe" or base.top_k % 2 == 0)]
    variants = {name: {"aggregator": name} for name in plain}
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
            logits = model.next_logits(model.hidden(window)[0])  # generate has no other head either
            tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)

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


# Evidence: the same training with one difference, for several seeds


def arm_files(folder: Path, wanted: list[str]) -> dict[str, Path]:
    """Config files of the arms, by name: those wanted, or all but base.toml. Raises UserError."""
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if len(files) < 2 or "base" not in files:
        raise UserError(f"{folder} must hold base.toml, and beside it a file per arm, to be swept")
    del files["base"]
    for name in wanted:
        if name not in files:
            raise UserError(f"{folder} has no arm {name!r}; there are: {', '.join(files)}")
    return {name: files[name] for name in wanted} if wanted else files


def seed_range(text: str) -> range:
    """5 is seeds 1 to 5, 4-5 is 4 and 5. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)", text)
    seeds = range(int(match[1] or 1), int(match[2]) + 1) if match else ()
    if not seeds:
        raise UserError(f"--seeds must be a number, for seeds 1 to that, or a range such as 4-5, got {text!r}")
    return seeds


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def steps_done(out_dir: Path) -> int:
    """The step of the last evaluation of a run, 0 if there was none."""
    path = out_dir / "log.csv"
    rows = read_rows(path) if path.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def is_finished(out_dir: Path, arguments: list[str]) -> bool:
    """Whether the run in out_dir has made its last evaluation. Raises UserError if it is another run than wanted."""
    if not (out_dir / "ckpt.pt").exists():
        return False
    checkpoint = train.load_to_resume(out_dir)
    settings = checkpoint["model_config"] | train.read_settings([*arguments, f"--out_dir={out_dir}"])
    config, model_config = (train.make_config(kind, settings) for kind in (train.TrainConfig, ModelConfig))
    changed = train.check_resume(
        out_dir / "ckpt.pt", checkpoint, config, model_config, train.open_dataset(config.dataset)
    )
    changed = [text for text in changed if text.split()[0] not in ("out_dir", "device", "compile")]
    if changed:  # --resume would take it, but the arms' schedules would differ
        raise UserError(f"{out_dir} was begun with another {', '.join(changed)}: choose another --out")
    return steps_done(out_dir) == config.max_steps


def bench_sweep(folder: Path, arms: list[str], seeds: range, jobs: int, out: Path, settings: list[str]) -> None:
    """Run train.py for every arm and seed, `jobs` at a time; skip what is finished, go on with what was stopped.

    `settings` are added to every command line, after {arm} and {seed} in them are filled in. What a run prints is in
    its folder's train.log. Raises UserError, when all others are done, if runs failed.
    """
    files = arm_files(folder, arms)
    for setting in settings:
        if setting.split("=")[0] in ("--seed", "--out_dir", "--resume", "--eval_only"):
            raise UserError(f"{setting}: the sweep sets that itself; see --seeds and --out")
    commands, steps = {}, {}
    for seed in seeds:  # seed by seed, so that an unfinished sweep can be compared, too
        for arm, path in files.items():
            filled = [setting.replace("{arm}", arm).replace("{seed}", str(seed)) for setting in settings]
            arguments = [str(folder / "base.toml"), str(path), f"--seed={seed}", *filled]
            config = train.make_config(train.TrainConfig, train.read_settings(arguments))
            train.prepare_known([config.dataset])
            out_dir = out / f"{arm}-{seed}"
            if not is_finished(out_dir, arguments):
                commands[out_dir], steps[out_dir] = arguments, config.max_steps
    runs = len(files) * len(seeds)
    print(f"{runs} runs, {runs - len(commands)} of them finished already, {jobs} at a time")

    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    environment = threads | os.environ | {"PYTHONUNBUFFERED": "1"}  # an error is the last line of train.log
    done = {out_dir: steps_done(out_dir) for out_dir in commands}
    stop, running, failed, waiting = train.StopRequest(), {}, [], list(commands)
    bar = tqdm(
        total=sum(steps.values()),
        initial=sum(done.values()),
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 60,
    )
    try:
        while running or (waiting and not stop.seen):
            while waiting and len(running) < jobs and not stop.seen:
                out_dir = waiting.pop(0)
                out_dir.mkdir(parents=True, exist_ok=True)
                resume = ["--resume"] if (out_dir / "ckpt.pt").exists() else []
                command = [sys.executable, train.__file__, *commands[out_dir], f"--out_dir={out_dir}", *resume]
                with open(out_dir / "train.log", "ab") as log:  # in a session of its own: Ctrl-C is for the sweep
                    running[out_dir] = subprocess.Popen(
                        command, env=environment, stdout=log, stderr=log, start_new_session=True
                    )
            time.sleep(0.5)
            if stop.seen:
                break
            for out_dir, process in list(running.items()):
                done[out_dir] = steps_done(out_dir)
                if process.poll() is None:
                    continue
                del running[out_dir]
                if process.returncode == 0 and done[out_dir] == steps[out_dir]:
                    tqdm.write(f"{out_dir}: validation loss {read_rows(out_dir / 'log.csv')[-1]['val_loss']}")
                else:
                    failed.append(str(out_dir))
                    said = (out_dir / "train.log").read_text(errors="replace").strip().splitlines() or ["nothing"]
                    tqdm.write(f"{out_dir} ended with status {process.returncode}, and said: {said[-1]}")
            bar.update(sum(done.values()) - bar.n)
    finally:
        for process in running.values():
            process.terminate()  # it finishes its step and saves
        for process in running.values():
            process.wait()
        bar.close()
    if stop.seen:
        print("stopped; the same command goes on")
    if failed:
        raise UserError(f"{len(failed)} of {len(commands)} runs failed: {', '.join(failed)}; see train.log there")


class Evaluation(NamedTuple):
    """One evaluation of one run: a row of the CSV files in results/."""

    arm: str  # name of the config file
    seed: int
    data: str  # beginning of the checksum of the training tokens
    evaluated_on: str  # the same of the validation tokens
    eval_tokens: int  # how many of them, about
    tokens: int  # that the run is to be trained on in all
    training: str  # checksum of all settings of the training but seed and learning rate
    model: str  # checksum of the model's settings
    parameters: int
    active: int  # parameters that a token uses
    multiply_adds: int  # per token, of a forward pass
    learning_rate: float
    at_token: int  # when this evaluation was made
    val_loss: float  # nats per token, cross-entropy alone
    tokens_per_s: float | None  # since the evaluation before


Runs = dict[str, dict[int, list[Evaluation]]]  # by arm and seed, the evaluations in their order
EQUAL = ("data", "evaluated_on", "eval_tokens", "tokens", "training")  # what all runs of a table must share
FAR = 0.2  # an arm that is so much worse, in nats per token, is not drawn
OF_AN_ARM = ("model", "learning_rate")  # what all runs of an arm must share
FREE = {"seed", "learning_rate", "min_lr", "out_dir", "device", "compile", "resume", "init_from", "eval_only"}


def evaluations_of(out_dir: Path, dataset: str | None) -> list[Evaluation]:
    """What is in a run's folder. Raises UserError.

    With a dataset, the only evaluation is one on that dataset, made now, with the run's last weights.
    """
    model, checkpoint = load_model(out_dir / "ckpt.pt", choose_device("auto"))
    config, log = train.make_config(train.TrainConfig, checkpoint["train_config"]), checkpoint["log"]
    arm, _, seed = out_dir.name.rpartition("-")
    if not arm or seed != str(config.seed):
        raise UserError(f"{out_dir} should be called ARM-{config.seed}, for that is its seed")

    def checksum(settings: dict) -> str:
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    size = model.count_parameters()
    run = Evaluation(
        arm=arm,
        seed=config.seed,
        data=str(checkpoint["data"]["train"])[:12],
        evaluated_on=str(checkpoint["data"]["val"])[:12],
        eval_tokens=config.eval_tokens,
        tokens=config.max_steps * train.tokens_per_step(model.config, config),
        training=checksum({key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}),
        model=checksum(dataclasses.asdict(model.config)),
        parameters=size.total,
        active=size.active,
        multiply_adds=model.multiply_adds_per_token().total,
        learning_rate=config.learning_rate,
        at_token=0,
        val_loss=math.nan,
        tokens_per_s=None,
    )
    rows = [
        run._replace(at_token=row["tokens"], val_loss=row["val_loss"], tokens_per_s=row["tokens_per_s"]) for row in log
    ]
    if dataset is None:
        return rows
    if not rows or not finished(rows):
        return []
    data, device = train.open_dataset(dataset), model.embed.weight.device
    data.check_fits(checkpoint["encoding"], model.config.vocab_size, model.config.block_size)
    config = dataclasses.replace(config, batch_size=32)  # the loss is the same, sooner
    loss = train.evaluate(model, data, config, autocast(device, choose_dtype(config.dtype, device)))["val_loss"]
    return [rows[-1]._replace(evaluated_on=str(data.fingerprint["val"])[:12], val_loss=loss, tokens_per_s=None)]


def finished(run: list[Evaluation]) -> bool:
    """Whether a run has been evaluated after its last token."""
    return run[-1].at_token == run[-1].tokens


def read_evaluations(path: Path) -> list[Evaluation]:
    """The rows of a file that `quality --csv` wrote. Raises UserError."""
    kinds = {name: float if kind == float | None else kind for name, kind in Evaluation.__annotations__.items()}
    try:
        rows = [
            Evaluation(**{
                key: None if key == "tokens_per_s" and not text else kinds[key](text) for key, text in row.items()
            })
            for row in read_rows(path)
        ]  # fmt: skip
        if not all(row.arm and math.isfinite(row.val_loss) and row.tokens > 0 for row in rows):
            raise ValueError("a row without arm, loss or tokens")
        return rows
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a file that bench.py quality --csv wrote ({type(error).__name__})") from error


def collect_runs(paths: list[Path], dataset: str | None) -> Runs:
    """The evaluations of all runs, by arm and seed. Raises UserError if they can't be compared."""
    runs = {}
    for path in paths:
        if path.is_file() and dataset:
            raise UserError(f"{path} holds no weights that could be evaluated on {dataset}: give the runs' folder")
        if path.is_file():
            found = read_evaluations(path)
        else:
            folders = sorted(checkpoint.parent for checkpoint in path.glob("*/ckpt.pt"))
            with tqdm(folders, unit="run", leave=False, disable=not folders) as bar:
                found = [row for folder in bar for row in evaluations_of(folder, dataset)]
        if not found:
            raise UserError(f"{path} holds no runs: python bench.py sweep configs/ablation --out {path}")
        there = {(row.arm, row.seed) for row in found} & {(arm, seed) for arm in runs for seed in runs[arm]}
        if there:
            raise UserError(f"{'{}-{}'.format(*min(there))} is there twice, the second time in {path}")
        for row in found:
            runs.setdefault(row.arm, {}).setdefault(row.seed, []).append(row)
    for seeds in runs.values():
        for rows in seeds.values():
            rows.sort(key=lambda row: row.at_token)
    check_comparable(runs)
    return runs


def check_comparable(runs: Runs) -> None:
    """Raise UserError, naming two runs and what differs, unless all their losses can be compared."""
    first = next(iter(next(iter(runs.values())).values()))[0]
    for arm, seeds in runs.items():
        first_of_arm = next(iter(seeds.values()))
        for seed, rows in seeds.items():
            for row in rows:
                for names, other in ((EQUAL, first), (OF_AN_ARM, first_of_arm[0])):
                    for name in names:
                        ours, theirs = getattr(row, name), getattr(other, name)
                        if ours != theirs:
                            raise UserError(
                                f"{arm}-{seed} and {other.arm}-{other.seed} differ in {name} ({ours} and {theirs}), so "
                                "their losses can't be compared"
                            )
            points, others = ([row.at_token for row in run] for run in (rows, first_of_arm))
            if points != others[: len(points)] and points[: len(others)] != others:
                raise UserError(f"{arm}-{seed} was evaluated at other steps than {arm}-{first_of_arm[0].seed}")


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution, to three digits."""
    exact = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if degrees <= len(exact):
        return exact[degrees - 1]
    z, n = statistics.NormalDist().inv_cdf(0.975), degrees  # the expansion of Cornish and Fisher, 1938
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + terms[0] / n + terms[1] / n**2 + terms[2] / n**3


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error, None for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def curve(runs: dict[int, list[Evaluation]]) -> list[tuple[int, float]]:
    """(tokens, loss) of an arm, the mean over its seeds."""
    rows = zip(*runs.values(), strict=True)
    return [(same_time[0].at_token, statistics.fmean(row.val_loss for row in same_time)) for same_time in rows]


def speed(runs: dict[int, list[Evaluation]]) -> float | None:
    """Tokens/s of an arm: the median over all stretches of all seeds."""
    measured = [row.tokens_per_s for rows in runs.values() for row in rows if row.tokens_per_s]
    return statistics.median(measured) if measured else None


def differences(runs: Runs, arm: str, against: str) -> list[float]:
    """Final loss of an arm less that of `against`, for each seed that both have."""
    common = [seed for seed in runs[arm] if seed in runs[against]]
    return [runs[arm][seed][-1].val_loss - runs[against][seed][-1].val_loss for seed in common]


def gap(runs: Runs, arm: str, against: str) -> float:
    """Mean difference of final losses: over the seeds that both arms have, or where there is none over all."""
    mine, theirs = (statistics.fmean(rows[-1].val_loss for rows in runs[name].values()) for name in (arm, against))
    return statistics.fmean(differences(runs, arm, against) or [mine - theirs])


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval, None for a single value."""
    mean, error = mean_and_error(values)
    return mean, None if error is None else student_t(len(values) - 1) * error


def bench_quality(
    paths: list[Path], against: str, dataset: str | None, csv_path: Path | None, plot: Path | None
) -> None:
    """Print what became of a sweep: a row per arm. Losses are means over seeds, differences are of pairs of a seed."""
    everything = collect_runs(paths, dataset)
    runs = {arm: {seed: rows for seed, rows in seeds.items() if finished(rows)} for arm, seeds in everything.items()}
    runs = {arm: seeds for arm, seeds in runs.items() if seeds}
    if against not in runs:
        raise UserError(f"there is no finished run of {against!r} to compare with; there are: {', '.join(runs) or '-'}")
    final = {arm: [rows[-1].val_loss for rows in seeds.values()] for arm, seeds in runs.items()}
    speeds = {arm: speed(seeds) for arm, seeds in runs.items()}
    first = next(iter(runs[against].values()))[-1]
    timed = all(speeds.values())
    seconds = first.tokens / max(speeds.values()) if timed else 0.0  # when the fastest arm is done
    print(
        f"trained on {first.tokens:,} tokens ({first.data}), evaluated on about {first.eval_tokens:,} "
        f"({first.evaluated_on})\n"
        f"loss: nats per token, mean ± standard error; difference to {against} with the same seed, with a 95 % interval"
    )
    print(f"{'':16}{'parameters':>12}{'multiply-adds':>15}{'×':>6}{'seeds':>7}{'loss':>19}{'difference':>30}", end="")
    print(f"{f'at {seconds:.0f} s':>11}{'tokens/s':>10}{'×':>6}" if timed else "")
    for arm in sorted(runs, key=lambda arm: gap(runs, arm, against)):
        row = next(iter(runs[arm].values()))[-1]
        mean, error = mean_and_error(final[arm])
        loss = f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")
        pairs, difference = differences(runs, arm, against), "-"
        if pairs and arm != against:
            mean, half = interval(pairs)
            difference = f"{mean:+.4f}" + ("" if half is None else f" ({mean - half:+.4f} to {mean + half:+.4f})")
        print(
            f"{arm:16}{row.parameters:12,}{row.multiply_adds:15,}{row.multiply_adds / first.multiply_adds:6.2f}"
            f"{len(final[arm]):7}{loss:>19}{difference:>30}",
            end="",
        )
        if timed:
            tokens, losses = zip(*curve(runs[arm]), strict=True)
            then = np.interp(seconds * speeds[arm], tokens, losses)
            print(f"{then:11.4f}{speeds[arm]:10,.0f}{speeds[arm] / speeds[against]:6.2f}", end="")
        print()
    if timed:
        print(
            f"At {seconds:.0f} s the fastest arm is done; slower ones are in mid-schedule, at a higher learning rate "
            "(interpolated)."
        )
    if len({row[-1].learning_rate for seeds in runs.values() for row in seeds.values()}) > 1:
        rates = (f"{arm} {next(iter(seeds.values()))[0].learning_rate}" for arm, seeds in runs.items())
        print(f"Learning rates: {', '.join(rates)}.")
    for arm, seeds in everything.items():
        for seed, rows in seeds.items():
            if not finished(rows):
                print(f"Left out: {arm}-{seed}, at {rows[-1].at_token:,} tokens, with loss {rows[-1].val_loss:.4f}.")
        lone = sorted(set(runs.get(arm, {})) - set(runs[against]))
        if lone:
            print(f"Without a pair: {arm} with seed {', '.join(map(str, lone))}.")
    if csv_path:
        rows = [row._asdict() for seeds in everything.values() for evaluations in seeds.values() for row in evaluations]
        csv_path.parent.mkdir(parents=True, exist_ok=True)
        train.write_log(csv_path, rows, list(Evaluation._fields))
        print(f"wrote {csv_path}")
    if plot:
        draw_quality(plot, runs, against)


def draw_quality(path: Path, runs: Runs, against: str) -> None:
    """Differences with their intervals, and the losses against tokens, compute and time, as PNG."""
    pyplot = pyplot_if_installed()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    to_other, by_tokens, by_compute, by_time = axes.flat
    gaps = {arm: gap(runs, arm, against) for arm in runs}
    arms = sorted((arm for arm in runs if gaps[arm] <= FAR), key=gaps.get, reverse=True)  # the best one on top
    far = [f"{arm} ({gaps[arm]:+.2f})" for arm in runs if arm not in arms]
    if far:
        figure.suptitle(f"not drawn, because far worse: {', '.join(far)}")
    for i, arm in enumerate(arms):
        color = pyplot.colormaps["tab20"](i % 20)
        pairs = differences(runs, arm, against)
        if pairs:
            mean, half = interval(pairs)
            to_other.errorbar(mean, i, xerr=half, fmt="o", color=color, capsize=4)
            to_other.plot(pairs, [i] * len(pairs), "|", color=color, markersize=10)
        tokens, points = zip(*curve(runs[arm])[1:] or curve(runs[arm]), strict=True)  # the untrained loss left out
        compute = 3 * next(iter(runs[arm].values()))[0].multiply_adds
        pace = speed(runs[arm])
        style = {"color": color, "marker": ".", "linestyle": "-" if i % 2 else "--", "label": arm}
        by_tokens.plot([t / 1e6 for t in tokens], points, **style)
        by_compute.plot([t * compute / 1e12 for t in tokens], points, **style)
        if pace:
            by_time.plot([t / pace for t in tokens], points, **style)
    to_other.axvline(0, color="gray", linewidth=1)
    to_other.set(yticks=range(len(arms)), yticklabels=arms, xlabel="nats per token; left of 0 is better")
    to_other.set_title(f"difference to {against}, same seed: mean, 95 % interval, each seed")
    for axis, label in (
        (by_tokens, "million tokens"),
        (by_compute, "multiply-adds, forward and backward, in 10¹²"),
        (by_time, "seconds of training, at the arm's median speed"),
    ):
        axis.set(xlabel=label, ylabel="validation loss, nats per token")
        axis.grid(alpha=0.3)
    by_tokens.legend(fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with prepare.replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    print(f"wrote {path}")


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
    layer = what.add_parser("layer", help="one feed-forward layer: dense, sum and dag")
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
    sweep = what.add_parser("sweep", help="train every arm of a comparison with every seed", allow_abbrev=False)
    sweep.add_argument("folder", type=Path, help="base.toml and a config file per arm, such as configs/ablation")
    sweep.add_argument("settings", nargs="*", metavar="SETTING", help="as for train.py; {arm} and {seed} are filled in")
    sweep.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these (default: all)")
    sweep.add_argument("--seeds", default="5", help="seeds 1 to this number, or a range such as 4-5 (default: 5)")
    sweep.add_argument("--jobs", type=int, default=1, help="trainings at once, each with its part of the cores")
    sweep.add_argument("--out", type=Path, help="folder of the runs' folders (default: out/ and the folder's name)")
    quality = what.add_parser("quality", help="one table of what became of a sweep")
    quality.add_argument(
        "paths", type=Path, nargs="*", metavar="PATH", help="sweeps' folders, files of --csv (default: out/ablation)"
    )
    quality.add_argument("--against", default="sum", metavar="ARM", help="the arm to compare with (default: sum)")
    quality.add_argument("--on", metavar="DATASET", help="evaluate the last weights on this dataset instead")
    quality.add_argument("--csv", type=Path, metavar="FILE.csv", help="write all evaluations there")
    quality.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses (needs matplotlib)")
    for either in (command, memory):
        either.add_argument("--encoding", default="gpt2", help="as in prepare.py (default: gpt2)")
    args, rest = parser.parse_known_args()
    if rest and args.what not in ("cost", "layer", "loop", "sweep"):
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
    elif args.what == "sweep":
        if args.jobs < 1:
            raise UserError("--jobs must be at least 1")
        out = args.out or Path("out", args.folder.resolve().name)
        bench_sweep(args.folder, args.arms, seed_range(args.seeds), args.jobs, out, [*args.settings, *rest])
    elif args.what == "quality":
        bench_quality(args.paths or [Path("out/ablation")], args.against, args.on, args.csv, args.plot)
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
