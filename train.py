"""Train a model on a prepared dataset, on one device or on several with torchrun.

    python train.py configs/quickstart.toml
    python train.py configs/quickstart.toml --aggregator=sum --out_dir=out/sum
    torchrun --standalone --nproc_per_node=8 train.py configs/owt.toml

Settings: the defaults below, then the keys of the config file, then --key=value. Results: OUT_DIR/log.csv with a row
per evaluation, OUT_DIR/ckpt.pt to go on from with --resume, OUT_DIR/best.pt, of the lowest validation loss, to sample.
"""

import argparse
import csv
import difflib
import inspect
import math
import os
import re
import shlex
import signal
import sys
import time
import tomllib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, VERSION, ModelConfig, check_types
from prepare import (
    DATA,
    KNOWN,
    SPLITS,
    Parser,
    UserError,
    get_encoding,
    load_meta,
    load_tokens,
    prepare,
    replacing,
    run,
)  # fmt: skip
from sample import autocast, choose_device, choose_dtype, continue_text, load_checkpoint

LOG_COLUMNS = (
    "step", "tokens", "train_loss", "val_loss", "val_bpb", "balance", "z",
    "lr", "grad_norm", "tokens_per_s", "max_expert_share", "dead_experts",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything else that determines a run. Raises ValueError, showing the numbers, for what can't be meant."""

    dataset: str = "stdlib"  # folder below data/, made by prepare.py
    out_dir: str = ""  # where results go; if empty, out/ and the config file's name
    seed: int = 1337  # of the initial weights and of the order of the data
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences of block_size tokens per micro-step
    grad_accum: int = 1  # micro-steps per optimizer step, shared out over all ranks
    learning_rate: float = 1e-3  # highest learning rate, reached after the warm-up
    min_lr: float = 1e-4  # learning rate at the last step, reached along a cosine
    warmup_steps: int = 100  # steps in which the learning rate rises linearly from zero
    weight_decay: float = 0.1  # AdamW's decay, of matrices only
    beta1: float = 0.9  # AdamW's decay rate of the gradient's mean
    beta2: float = 0.95  # AdamW's decay rate of the gradient's square
    grad_clip: float = 1.0  # largest norm of the whole gradient
    balance_coef: float = 0.01  # weight of the balance loss
    z_coef: float = 0.001  # weight of the router's z-loss
    eval_interval: int = 200  # steps between evaluations, each with a row in log.csv and a checkpoint
    eval_tokens: int = 100_000  # validation tokens per evaluation, in evenly spaced windows
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), or a torch device
    dtype: str = "auto"  # precision of matrix products: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    compile: bool = False  # compile the model with torch.compile: slow to start, then faster
    resume: bool = False  # go on from OUT_DIR/ckpt.pt

    def __post_init__(self):
        check_types(self, least=0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        for name in ("max_steps", "batch_size", "grad_accum", "eval_interval", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("min_lr", "weight_decay", "balance_coef", "z_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed learning_rate ({self.learning_rate})")


# Settings


def read_settings(argv: list[str]) -> dict:
    """Settings of the config file and of the command line, by key, the latter winning. Raises UserError."""
    parser = Parser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", type=Path, help="a file such as configs/quickstart.toml")
    known, flags = {}, set()
    for config in (TrainConfig, ModelConfig):
        group = parser.add_argument_group(config.__name__)
        comments = dict(re.findall(r"^ {4}(\w+): .*?  # (.+)$", inspect.getsource(config), re.MULTILINE))
        for field in fields(config):
            known[field.name] = field.type
            flags |= {f"--{field.name}"} if field.type is bool else set()
            kind, value = (parse_bool, "true|false") if field.type is bool else (field.type, "VALUE")
            default = "" if field.default == "" else f" (default: {field.default})"
            help = (comments[field.name] + default).replace("%", "%%")
            group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, metavar=value, type=kind, help=help)
    argv = [f"{argument}=true" if argument in flags else argument for argument in argv]  # --compile: --compile=true
    arguments, unknown = parser.parse_known_args(argv)
    for argument in unknown:
        raise UserError(unknown_key(argument.removeprefix("--").split("=")[0], argument, known))
    settings = vars(arguments)
    path = settings.pop("config")
    if path is None:
        return settings | {"out_dir": settings.get("out_dir") or "out/default"}
    try:
        file = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        there = ", ".join(str(p) for p in sorted(Path("configs").rglob("*.toml"))) or "none"
        raise UserError(f"config {path} does not exist; there are: {there}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    for key in file:
        if key not in known:
            raise UserError(unknown_key(key, f"{key} = {file[key]!r} in {path}", known))
        if type(file[key]) is not known[key] and not (known[key] is float and type(file[key]) is int):
            raise UserError(f"{key} in {path} must be of type {known[key].__name__}, got {file[key]!r}")
    settings = file | settings
    return settings | {"out_dir": settings.get("out_dir") or f"out/{path.stem}"}


def unknown_key(key: str, where: str, known: dict) -> str:
    """Error message for a key that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0)[0]
    return f"unknown setting {where}; the nearest key is {nearest} (python train.py --help lists all)"


def parse_bool(text: str) -> bool:
    """true or false, as argparse wants it."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text == "true"


def make_config(cls: type, settings: dict):
    """A ModelConfig or TrainConfig from those settings that belong to it. Raises UserError."""
    try:
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})
    except ValueError as error:
        raise UserError(str(error)) from error


# Data: a batch is a pure function of (data, seed, step), so resuming needs no loader state


def get_batch(
    tokens: np.ndarray, model_config: ModelConfig, config: TrainConfig, step: int, micro_step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (batch_size, block_size), of one of the grad_accum micro-steps of a step.

    The offsets of the step's whole batch are drawn at once, whoever computes which part: one process with four
    micro-steps sees what two processes with two each see.
    """
    rng = np.random.default_rng((config.seed, step))
    offsets = rng.integers(0, len(tokens) - model_config.block_size, size=(config.grad_accum, config.batch_size))
    return cut_windows(tokens, offsets[micro_step], model_config)


def cut_windows(
    tokens: np.ndarray, offsets: np.ndarray, model_config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of block_size tokens that start at `offsets`, and the same windows one token later."""
    windows = np.stack([tokens[i : i + model_config.block_size + 1] for i in offsets]).astype(np.int64)
    if windows.max() >= model_config.vocab_size:
        raise UserError(
            f"{tokens.filename} holds token id {windows.max()}, beyond vocab_size {model_config.vocab_size}: "
            "prepare the dataset again with python prepare.py"
        )
    windows = torch.from_numpy(windows)
    return windows[:, :-1], windows[:, 1:]


def open_dataset(name: str, settings: dict) -> tuple[ModelConfig, dict, dict[str, np.ndarray]]:
    """The model's configuration, the dataset's meta.json, and its tokens per split. Raises UserError if they don't fit.

    Without a vocab_size in the settings the model gets the dataset's.
    """
    meta = load_meta(name)
    model_config = make_config(ModelConfig, {"vocab_size": meta["vocab_size"]} | settings)
    if meta["vocab_size"] > model_config.vocab_size:
        raise UserError(
            f"dataset {name!r} has {meta['vocab_size']} token ids, more than vocab_size {model_config.vocab_size}: "
            "raise vocab_size, or leave it out to take the dataset's"
        )
    splits = {split: load_tokens(name, split) for split in SPLITS}
    for split, tokens in splits.items():
        if len(tokens) <= model_config.block_size:
            raise UserError(
                f"the {split} split of {name!r} has {len(tokens)} tokens, too few for block_size "
                f"{model_config.block_size}: prepare more text, or choose a smaller block_size"
            )
    return model_config, meta, splits


# Ranks: one process, or several that torchrun started


def join_ranks(device: str) -> str:
    """Join the process group if torchrun started several processes. Returns the device of this one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may be preparing the data first
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is set, but not by torchrun ({error}); unset it, or use torchrun") from error
    return device


def this_rank() -> tuple[int, int]:
    """This process' rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# Training


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, embeddings and stacked experts, and none on the norms' scales."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    scales = [p for p in parameters if p.dim() < 2]
    assert len({id(p) for p in matrices + scales}) == len(matrices) + len(scales) == len(parameters)
    fused = model.embed.weight.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": scales}], lr=config.learning_rate, fused=fused)
    set_decay_rates(optimizer, config)
    return optimizer


def set_decay_rates(optimizer: torch.optim.AdamW, config: TrainConfig) -> None:
    """Weight decay and betas as configured, also after a checkpoint has brought back those of an earlier run."""
    matrices, scales = optimizer.param_groups
    matrices["weight_decay"], scales["weight_decay"] = config.weight_decay, 0.0
    for group in optimizer.param_groups:
        group["betas"] = (config.beta1, config.beta2)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rises linearly for warmup_steps, then falls along a cosine to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


@torch.no_grad()
def evaluate(model: GPT, tokens: np.ndarray, config: TrainConfig, cast: AbstractContextManager) -> dict:
    """Mean cross-entropy (nats per token, nothing else in it), router losses and expert load on the validation split.

    Always the same evenly spaced windows, shared out over the ranks. The balance loss is that of each batch of
    batch_size windows, averaged, and so depends a little on how many windows a batch has.
    """
    rank, ranks = this_rank()
    block_size, device = model.config.block_size, model.embed.weight.device
    count = max(1, min(config.eval_tokens, len(tokens) - 1) // block_size)
    offsets = np.linspace(0, len(tokens) - block_size - 1, count).astype(np.int64)[rank::ranks]
    sums = torch.zeros(3, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    load = torch.zeros(model.config.n_layer, model.config.n_expert, device=device, dtype=torch.long)
    model.eval()
    for start in range(0, len(offsets), config.batch_size):
        x, y = cut_windows(tokens, offsets[start : start + config.batch_size], model.config)
        with cast:
            out = model(x.to(device), y.to(device))
        sums += torch.stack([out.loss, out.balance, out.z]).to(sums) * len(x)
        load += out.load
    model.train()
    val_loss, balance, z = (sum_over_ranks(sums) / count).tolist()
    load = sum_over_ranks(load)
    share = load / load.sum(dim=1, keepdim=True)
    return {
        "val_loss": val_loss,
        "balance": balance,
        "z": z,
        "max_expert_share": share.max().item(),  # of the slots of its layer
        "dead_experts": int((load == 0).sum()),  # in all layers together
    }


def accumulate_gradients(
    network: nn.Module,
    tokens: np.ndarray,
    model_config: ModelConfig,
    config: TrainConfig,
    step: int,
    cast: AbstractContextManager,
) -> torch.Tensor:
    """Add this step's gradient, averaged over its micro-steps, to the parameters. Returns this rank's mean loss."""
    rank, ranks = this_rank()
    micro_steps = range(rank, config.grad_accum, ranks)
    device = next(network.parameters()).device
    mean_loss = torch.zeros((), device=device)
    for micro_step in micro_steps:
        x, y = get_batch(tokens, model_config, config, step, micro_step)
        exchange = ranks == 1 or micro_step == micro_steps[-1]  # ranks average their gradients once per step
        with nullcontext() if exchange else network.no_sync():
            with cast:
                out = network(x.to(device), y.to(device))
            loss = out.loss + config.balance_coef * out.balance + config.z_coef * out.z
            (loss / len(micro_steps)).backward()
        mean_loss += out.loss.detach() / len(micro_steps)
    return mean_loss


def write_log(path: Path, rows: list[dict]) -> None:
    """Write log.csv anew; floats to six significant digits, an empty field where there is no value yet."""
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()})


class StopRequest:
    """Notices Ctrl-C and SIGTERM, so that the step under way can be finished and saved. A second one stops at once."""

    def __init__(self):
        self.seen = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.notice)

    def notice(self, number: int, frame) -> None:
        """Signal handler."""
        self.seen = True
        signal.signal(number, signal.SIG_DFL)
        print("\nfinishing this step, then saving (once more: stop at once)", file=sys.stderr)


def load_run(path: Path, model_config: ModelConfig, config: TrainConfig) -> dict:
    """The checkpoint to go on from. Raises UserError if going on with these settings would be another run."""
    if not path.exists():
        raise UserError(f"{path} does not exist, so there is no run to go on with: start without --resume")
    checkpoint = load_checkpoint(path)
    old = checkpoint["train_config"] | checkpoint["model_config"]
    new = asdict(config) | asdict(model_config)
    keys = ["dataset", "seed", "batch_size", "grad_accum", *asdict(model_config)]
    changed = [f"{key} (was {old.get(key)!r}, now {new[key]!r})" for key in keys if old.get(key) != new[key]]
    if changed:
        raise UserError(f"can't resume {path} with another {', '.join(changed)}; start anew with another --out_dir")
    if checkpoint["step"] > config.max_steps:
        raise UserError(f"{path} is at step {checkpoint['step']} already, beyond max_steps {config.max_steps}")
    return checkpoint


def tokens_per_step(model_config: ModelConfig, config: TrainConfig) -> int:
    """Tokens of one optimizer step, over all micro-steps and ranks."""
    return config.grad_accum * config.batch_size * model_config.block_size


def print_plan(model: GPT, tokens: np.ndarray, config: TrainConfig, device: torch.device) -> None:
    """What is about to be computed, on what, and how much of it."""
    size, cost = model.count_parameters(), model.multiply_adds_per_token()
    per_step = tokens_per_step(model.config, config)
    print(
        f"{this_rank()[1]} x {device.type}, {choose_dtype(config.dtype, device)}; "
        f"{size.total:,} parameters, {size.active:,} active per token\n"
        f"{cost.total:,} multiply-adds per token, {cost.aggregator / cost.total:.0%} of them in the aggregator\n"
        f"{config.max_steps:,} steps of {per_step:,} tokens, which is {config.max_steps * per_step / len(tokens):.2g} "
        f"times all of {config.dataset}; results in {config.out_dir}"
    )
    if config.warmup_steps > config.max_steps:
        print(f"note: the warm-up ({config.warmup_steps} steps) is longer than the run: learning_rate is never reached")


def print_samples(model: GPT, encoding: str, config: TrainConfig, cast: AbstractContextManager) -> None:
    """Two short texts, to see what was learned."""
    device = model.embed.weight.device
    try:
        get_encoding(encoding)
    except UserError as error:
        print(f"no samples: {error}")
        return
    model.eval()
    for i in range(2):
        print(f"\n--- sample {i + 1} ---")
        generator = torch.Generator(device).manual_seed(config.seed + i)
        with cast:
            for piece in continue_text(model, encoding, "", 400, temperature=0.8, generator=generator):
                print(piece, end="", flush=True)
        print()


def main() -> None:
    settings = read_settings(sys.argv[1:])
    config = make_config(TrainConfig, settings)
    first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
    if first and config.dataset in KNOWN and not (DATA / config.dataset / "meta.json").exists():
        print(f"dataset {config.dataset!r} is not there yet: python prepare.py {config.dataset}")
        prepare([config.dataset])
    device = choose_device(join_ranks(config.device))
    cast = autocast(device, choose_dtype(config.dtype, device))
    rank, ranks = this_rank()
    main_rank = rank == 0
    if config.grad_accum % ranks:
        raise UserError(f"grad_accum ({config.grad_accum}) must be a multiple of the number of ranks ({ranks})")
    model_config, meta, data = open_dataset(config.dataset, settings)

    out_dir = Path(config.out_dir)
    resumed = load_run(out_dir / "ckpt.pt", model_config, config) if config.resume else None
    if not resumed and any((out_dir / name).exists() for name in ("ckpt.pt", "best.pt", "log.csv")):
        raise UserError(f"{out_dir} holds a run already: add --resume to go on, choose another --out_dir, or delete it")

    torch.manual_seed(config.seed)
    try:
        model = GPT(model_config).to(device)
    except RuntimeError as error:  # torch's way to say that memory does not suffice
        raise UserError(
            f"a model of this size can't be built on {device.type}: {str(error).splitlines()[0]}"
        ) from error
    optimizer = make_optimizer(model, config)
    out_dir.mkdir(parents=True, exist_ok=True)
    step, best_val_loss, log = 0, math.inf, []
    loss_sum, loss_steps, grad_norm = 0.0, 0, None  # training loss since the last evaluation; norm of the last gradient
    if resumed:
        try:
            model.load_state_dict(resumed["model"])
            optimizer.load_state_dict(resumed["optimizer"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{out_dir / 'ckpt.pt'} is damaged: its weights do not fit its configuration") from error
        set_decay_rates(optimizer, config)
        step, best_val_loss, log = resumed["step"], resumed["best_val_loss"], resumed["log"]
        loss_sum, loss_steps, grad_norm = resumed["loss_sum"], resumed["loss_steps"], resumed["grad_norm"]

    def save(name: str) -> None:
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_config": asdict(model_config),
            "train_config": asdict(config),
            "encoding": meta["encoding"],
            "step": step,
            "best_val_loss": best_val_loss,
            "log": log,
            "loss_sum": loss_sum,
            "loss_steps": loss_steps,
            "grad_norm": grad_norm,
            "version": VERSION,
        }
        with replacing(out_dir / name) as file:
            torch.save(checkpoint, file)

    network = torch.compile(model) if config.compile else model  # has the parameters of `model`, not copies
    if ranks > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    step_tokens = tokens_per_step(model_config, config)
    if main_rank:
        print_plan(model, data["train"], config, device)

    stop, stopping = StopRequest(), False
    started = time.perf_counter()
    timed_steps, timed_seconds = 0, 0.0  # since the last evaluation, evaluations left out
    bar = tqdm(
        total=config.max_steps,
        initial=step,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants fewer lines than a terminal
        disable=not main_rank,
    )
    with bar:
        while True:
            due = step % config.eval_interval == 0 or step == config.max_steps
            if due and not stopping and not (log and log[-1]["step"] == step):
                result = evaluate(model, data["val"], config, cast)
                val = meta["splits"]["val"]
                row = {
                    "step": step,
                    "tokens": step * step_tokens,
                    "train_loss": loss_sum / loss_steps if loss_steps else None,
                    "val_bpb": result["val_loss"] / math.log(2) * val["tokens"] / val["bytes"],  # bits per byte
                    "lr": learning_rate(step, config),
                    "grad_norm": grad_norm,
                    "tokens_per_s": timed_steps * step_tokens / timed_seconds if timed_steps else None,
                }
                log.append(row | result)
                loss_sum, loss_steps, timed_steps, timed_seconds = 0.0, 0, 0, 0.0
                if main_rank:
                    tqdm.write(
                        f"step {step:>6}: validation loss {result['val_loss']:.4f}, "
                        f"perplexity {math.exp(result['val_loss']):.2f}, bits per byte {row['val_bpb']:.4f}"
                    )
                    write_log(out_dir / "log.csv", log)
                    if result["val_loss"] < best_val_loss:
                        best_val_loss = result["val_loss"]
                        save("best.pt")
                    save("ckpt.pt")
            if stopping or step == config.max_steps:
                break

            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            step_loss = accumulate_gradients(network, data["train"], model_config, config, step, cast)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            # Whether to stop is decided by all ranks together, at the same step.
            totals = sum_over_ranks(torch.stack([step_loss, torch.full_like(step_loss, stop.seen)]))
            step_loss, stopping, grad_norm = totals[0].item() / ranks, totals[1].item() > 0, grad_norm.item()
            if not math.isfinite(step_loss) or not math.isfinite(grad_norm):
                raise UserError(
                    f"step {step}: loss {step_loss}, gradient norm {grad_norm}. The checkpoint of the last evaluation "
                    f"is kept in {out_dir}; try a lower --learning_rate or a longer --warmup_steps"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            loss_sum, loss_steps = loss_sum + step_loss, loss_steps + 1
            timed_steps, timed_seconds = timed_steps + 1, timed_seconds + time.perf_counter() - start
            tokens_per_s = timed_steps * step_tokens / timed_seconds
            bar.set_postfix_str(f"loss {step_loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            bar.update()

    if main_rank and stopping:
        save("ckpt.pt")
        start = ["python"] if ranks == 1 else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
        command = shlex.join([*start, *sys.argv] + ["--resume"] * (not config.resume))
        print(f"stopped after step {step} and saved; go on with: {command}")
    elif main_rank:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # all is saved: Ctrl-C may end the samples
        print(f"{time.perf_counter() - started:.0f} s for training; lowest validation loss {best_val_loss:.4f}")
        print_samples(model, meta["encoding"], config, cast)
        print(f"\nfor more: python sample.py {shlex.quote(config.out_dir)} --prompt 'YOUR TEXT'")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
