"""Measure, side by side: first the cost, then, at the end of the file, what it buys.

python bench.py cost                  # the quick start's training step with each aggregator; or another CONFIG's
python bench.py layer                 # one feed-forward layer with each aggregator; --growth: how that grows
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

import numpy as np
import torch
from tqdm import tqdm

import prepare
import train
from model import AGGREGATORS, GPT, ModelConfig, window_start
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


# Evidence: the same training with one difference, for several seeds


def arm_files(folder: Path, wanted: list[str]) -> dict[str, Path]:
    """Config files of the arms, by name: those wanted, or all but base.toml. Raises UserError."""
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    if "base" not in files:
        raise UserError(f"{folder / 'base.toml'} does not exist: a sweep needs it, and a file per arm beside it")
    del files["base"]
    for name in wanted:
        if name not in files:
            raise UserError(f"{folder} has no arm {name!r}; there are: {', '.join(files)}")
    return {name: files[name] for name in wanted} if wanted else files


def is_finished(out_dir: Path, arguments: list[str]) -> bool:
    """Whether the run in out_dir has done all its steps. Raises UserError if it was another one than wanted."""
    if not (out_dir / "ckpt.pt").exists():
        return False
    settings = train.read_settings([*arguments, f"--out_dir={out_dir}"])
    config, data = train.make_config(train.TrainConfig, settings), train.open_dataset(settings["dataset"])
    checkpoint = train.load_to_resume(out_dir)
    model_config = train.make_config(ModelConfig, {"vocab_size": data.meta["vocab_size"]} | settings)
    train.check_resume(out_dir / "ckpt.pt", checkpoint, config, model_config, data)
    return checkpoint["step"] == config.max_steps


def steps_done(out_dir: Path) -> int:
    """The step of the last evaluation of a run, 0 if there was none."""
    path = out_dir / "log.csv"
    return int(read_rows(path)[-1]["step"]) if path.exists() else 0


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def seed_range(text: str) -> range:
    """5 is seeds 1 to 5, 4-5 is 4 and 5. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)", text)
    seeds = range(int(match[1] or 1), int(match[2]) + 1) if match else ()
    if not seeds:
        raise UserError(f"--seeds must be a number, for seeds 1 to that, or a range such as 4-5, got {text!r}")
    return seeds


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

    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    stop, running, failed, waiting = train.StopRequest(), {}, [], list(commands)
    bar = tqdm(
        total=sum(steps.values()),
        initial=sum(map(steps_done, commands)),
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 60,
    )
    with bar as progress:
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
            time.sleep(0.2)
            for process in running.values() if stop.seen else ():
                process.terminate()  # it finishes its step and saves
            for out_dir, process in list(running.items()):
                if (process.wait() if stop.seen else process.poll()) is None:
                    continue
                del running[out_dir]
                if process.returncode and not stop.seen:
                    failed.append(str(out_dir))
                    last = (out_dir / "train.log").read_text(errors="replace").strip().splitlines()[-1]
                    tqdm.write(f"{out_dir} failed: {last}")
                elif not stop.seen:
                    tqdm.write(f"{out_dir}: validation loss {read_rows(out_dir / 'log.csv')[-1]['val_loss']}")
            progress.update(sum(map(steps_done, commands)) - progress.n)
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
    eval_tokens: int  # how many of them
    block_size: int
    tokens: int  # that the run is trained on in all
    parameters: int
    active: int  # parameters that a token uses
    multiply_adds: int  # per token, of a forward pass
    learning_rate: float
    at_token: int  # when this evaluation was made
    val_loss: float  # nats per token, cross-entropy alone
    tokens_per_s: float | None  # since the evaluation before


EQUAL = ("data", "evaluated_on", "eval_tokens", "block_size", "tokens")  # what all runs of a table must share
OF_AN_ARM = ("parameters", "multiply_adds", "learning_rate")  # what all runs of an arm must share


def evaluations_of(out_dir: Path, dataset: str | None) -> list[Evaluation]:
    """What is in a finished run's folder; nothing if the run is not finished. Raises UserError.

    With a dataset, the only evaluation is one on that dataset, made now, with the run's last weights.
    """
    model, checkpoint = load_model(out_dir / "ckpt.pt", choose_device("auto"))
    config, log = train.make_config(train.TrainConfig, checkpoint["train_config"]), checkpoint["log"]
    if not log or log[-1]["step"] != config.max_steps:
        return []
    arm, _, seed = out_dir.name.rpartition("-")
    if seed != str(config.seed):
        raise UserError(f"{out_dir} should be called ARM-{config.seed}, for that is its seed")
    size = model.count_parameters()
    run = Evaluation(
        arm=arm, seed=config.seed, data=str(checkpoint["data"]["train"])[:12],
        evaluated_on=str(checkpoint["data"]["val"])[:12], eval_tokens=config.eval_tokens,
        block_size=model.config.block_size, tokens=log[-1]["tokens"], parameters=size.total, active=size.active,
        multiply_adds=model.multiply_adds_per_token().total, learning_rate=config.learning_rate,
        at_token=log[-1]["tokens"], val_loss=log[-1]["val_loss"], tokens_per_s=log[-1]["tokens_per_s"],
    )  # fmt: skip
    if dataset is None:
        keys = ("val_loss", "tokens_per_s")
        return [run._replace(at_token=row["tokens"], **{key: row[key] for key in keys}) for row in log]
    data, device = train.open_dataset(dataset), model.embed.weight.device
    data.check_fits(checkpoint["encoding"], model.config.vocab_size, model.config.block_size)
    loss = train.evaluate(model, data, config, autocast(device, choose_dtype(config.dtype, device)))["val_loss"]
    return [run._replace(evaluated_on=str(data.fingerprint["val"])[:12], val_loss=loss)]


def read_evaluations(path: Path) -> list[Evaluation]:
    """The rows of a file that `quality --csv` wrote. Raises UserError."""
    try:
        rows = read_rows(path)
        kinds = {name: float if kind == float | None else kind for name, kind in Evaluation.__annotations__.items()}
        return [Evaluation(**{key: kinds[key](value) if value else None for key, value in row.items()}) for row in rows]
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a file that bench.py quality --csv wrote ({type(error).__name__})") from error


def collect_runs(paths: list[Path], dataset: str | None) -> dict[str, dict[int, list[Evaluation]]]:
    """The evaluations of all finished runs, by arm and seed. Raises UserError if they can't be compared."""
    runs = {}
    for path in paths:
        if path.is_file() and dataset:
            raise UserError(f"{path} holds no weights that could be evaluated on {dataset}: give the runs' folder")
        if path.is_file():
            found = read_evaluations(path)
        else:
            folders = sorted(ckpt.parent for ckpt in path.glob("*/ckpt.pt"))
            found = []
            for folder in tqdm(folders, unit="run", leave=False, disable=not folders):
                evaluations = evaluations_of(folder, dataset)
                found += evaluations
                if not evaluations:
                    tqdm.write(f"left out, because it is not finished: {folder}", file=sys.stderr)
        if not found:
            raise UserError(f"{path} holds no finished run: python bench.py sweep configs/ablation --out {path}")
        new = {}
        for row in found:
            new.setdefault((row.arm, row.seed), []).append(row)
        for (arm, seed), rows in new.items():
            if seed in runs.setdefault(arm, {}):
                raise UserError(f"{arm} with seed {seed} is there twice, the second time in {path}")
            runs[arm][seed] = rows
    first = next(iter(next(iter(runs.values())).values()))[0]
    for arm, seeds in runs.items():
        for names, other in ((EQUAL, first), (OF_AN_ARM, next(iter(seeds.values()))[0])):
            for row in (row for rows in seeds.values() for row in rows):
                for name in names:
                    ours, theirs = getattr(row, name), getattr(other, name)
                    if ours != theirs:
                        raise UserError(
                            f"{arm}-{row.seed} and {other.arm}-{other.seed} differ in {name} ({ours} and {theirs}), so "
                            "their losses can't be compared"
                        )
    return runs


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
    return [
        (rows[0].at_token, statistics.fmean(row.val_loss for row in rows)) for rows in zip(*runs.values(), strict=True)
    ]


def speed(runs: dict[int, list[Evaluation]]) -> float | None:
    """Tokens/s of an arm: the median over all stretches of all seeds."""
    measured = [row.tokens_per_s for rows in runs.values() for row in rows if row.tokens_per_s]
    return statistics.median(measured) if measured else None


def bench_quality(
    paths: list[Path], against: str, dataset: str | None, csv_path: Path | None, plot: Path | None
) -> None:
    """Print what became of a sweep: a row per arm. Losses are means over seeds, differences are of pairs of a seed."""
    runs = collect_runs(paths, dataset)
    if against not in runs:
        raise UserError(f"there is no finished run of {against!r} to compare with; there are: {', '.join(runs)}")
    final = {arm: {seed: rows[-1].val_loss for seed, rows in seeds.items()} for arm, seeds in runs.items()}
    speeds = {arm: speed(seeds) for arm, seeds in runs.items()}
    first = next(iter(runs[against].values()))[-1]
    # The time at which the fastest arm is done; the others' learning rate is still higher then.
    seconds = first.tokens / max(speeds.values()) if all(speeds.values()) and not dataset else None
    at_time = "" if seconds is None else f"at {seconds:.0f} s"
    print(
        f"trained on {first.tokens:,} tokens ({first.data}), evaluated on {first.eval_tokens:,} "
        f"({first.evaluated_on})\n"
        f"loss: nats per token, mean ± standard error; difference to {against} with the same seed, with a 95 % interval"
    )
    print(f"{'':16}{'parameters':>12}{'multiply-adds':>15}{'×':>6}{'seeds':>7}{'loss':>19}{'difference':>30}", end="")
    print(f"{at_time:>11}{'tokens/s':>10}{'×':>6}")
    for arm in sorted(runs, key=lambda arm: statistics.fmean(final[arm].values())):
        row = next(iter(runs[arm].values()))[-1]
        mean, error = mean_and_error(list(final[arm].values()))
        loss = f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")
        pairs = [final[arm][seed] - final[against][seed] for seed in final[arm] if seed in final[against]]
        difference = "-"
        if pairs and arm != against:
            mean, error = mean_and_error(pairs)
            half = None if error is None else student_t(len(pairs) - 1) * error
            difference = f"{mean:+.4f}" + ("" if half is None else f" ({mean - half:+.4f} to {mean + half:+.4f})")
        then = ""
        if seconds is not None:
            tokens, losses = zip(*curve(runs[arm]), strict=True)
            then = f"{np.interp(seconds * speeds[arm], tokens, losses):.4f}"
        pace = f"{speeds[arm]:,.0f}{speeds[arm] / speeds[against]:6.2f}" if all(speeds.values()) else "-"
        print(
            f"{arm:16}{row.parameters:12,}{row.multiply_adds:15,}{row.multiply_adds / first.multiply_adds:6.2f}"
            f"{len(final[arm]):7}{loss:>19}{difference:>30}{then:>11}{pace:>16}"
        )
    if csv_path:
        rows = [row._asdict() for seeds in runs.values() for evaluations in seeds.values() for row in evaluations]
        csv_path.parent.mkdir(parents=True, exist_ok=True)
        train.write_log(csv_path, rows, list(Evaluation._fields))
        print(f"wrote {csv_path}")
    if plot:
        draw_quality(plot, runs, final, against)


def draw_quality(
    path: Path, runs: dict[str, dict[int, list[Evaluation]]], final: dict[str, dict[int, float]], against: str
) -> None:
    """Differences with their intervals, and the losses against tokens, compute and time, as PNG."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    differences, by_tokens, by_compute, by_time = axes.flat
    arms = sorted(runs, key=lambda arm: -statistics.fmean(final[arm].values()))  # the best one on top
    for i, arm in enumerate(arms):
        color = pyplot.colormaps["tab20"](i % 20)
        pairs = [final[arm][seed] - final[against][seed] for seed in final[arm] if seed in final[against]]
        if pairs:
            mean, error = mean_and_error(pairs)
            half = None if error is None else student_t(len(pairs) - 1) * error
            differences.errorbar(mean, i, xerr=half, fmt="o", color=color, capsize=4)
            differences.plot(pairs, [i] * len(pairs), "|", color=color, markersize=10)
        tokens, losses = zip(*curve(runs[arm])[1:] or curve(runs[arm]), strict=True)  # the untrained loss left out
        compute = 3 * next(iter(runs[arm].values()))[0].multiply_adds
        pace = speed(runs[arm])
        style = {"color": color, "marker": ".", "linestyle": "-" if i % 2 else "--", "label": arm}
        by_tokens.plot([t / 1e6 for t in tokens], losses, **style)
        by_compute.plot([t * compute / 1e12 for t in tokens], losses, **style)
        if pace:
            by_time.plot([t / pace for t in tokens], losses, **style)
    differences.axvline(0, color="gray", linewidth=1)
    differences.set(yticks=range(len(arms)), yticklabels=arms, xlabel="nats per token; left of 0 is better")
    differences.set_title(f"difference to {against}, same seed: mean, 95 % interval, each seed")
    for axis, label in (
        (by_tokens, "million tokens"),
        (by_compute, "multiply-adds, forward and backward, in 10¹²"),
        (by_time, "seconds of training, at the arm's median speed"),
    ):
        axis.set(xlabel=label, ylabel="validation loss, nats per token", yscale="log")
        axis.grid(alpha=0.3, which="both")
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
