"""Train a model on a prepared dataset, on one device or on several with torchrun.

    python train.py configs/quickstart.toml
    python train.py configs/quickstart.toml --aggregator=sum --out_dir=out/sum
    python train.py configs/quickstart.toml --resume --max_steps=8000
    python train.py configs/quickstart.toml --init_from=out/quickstart --dataset=mine --out_dir=out/tuned
    python train.py configs/quickstart.toml --eval_only=stdlib,mine
    torchrun --standalone --nproc_per_node=8 train.py configs/owt.toml

    python train.py configs/ablation/base.toml configs/ablation/shared.toml --seed=1

Settings: the defaults below, then the keys of the config files, then --key=value, later ones winning. Results:
OUT_DIR/log.csv with a row per evaluation, OUT_DIR/ckpt.pt to go on from with --resume, previous.pt, the one before it,
and best.pt, of the lowest validation loss, to sample.
"""

import argparse
import csv
import difflib
import inspect
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from model import GPT, VERSION, LayerRecord, ModelConfig, Output, balance_loss, check_types
from prepare import (
    DATA,
    KNOWN,
    Dataset,
    Parser,
    UserError,
    cut_windows,
    get_encoding,
    open_dataset,
    prepare,
    replacing,
    run,
    spaced_offsets,
)  # fmt: skip
from sample import (
    Text,
    autocast,
    checkpoint_path,
    choose_device,
    choose_dtype,
    continue_texts,
    keep_freed_memory,
    load_checkpoint,
    load_model,
)  # fmt: skip

LOG_COLUMNS = (
    "step", "tokens", "train_loss", "val_loss", "val_bpb", "balance", "z",
    "lr", "grad_norm", "tokens_per_s", "max_logit", "max_expert_share", "dead_experts",
)  # fmt: skip
RESUME_MAY_CHANGE = (
    "max_steps", "batch_size", "grad_accum", "eval_interval", "device", "dtype", "compile",
    "out_dir", "resume", "eval_only",
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
    resume: bool = False  # go on from OUT_DIR/ckpt.pt; settings not given are those of the checkpoint
    init_from: str = ""  # out/OTHER or a checkpoint: start from its weights, a sum's also as a dag; fresh optimizer
    eval_only: str = ""  # datasets, with commas between: print the losses of OUT_DIR or init_from on them, and end

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
        if self.eval_only and not all(self.eval_only.split(",")):
            raise ValueError(f"eval_only must be names of datasets with commas between, got {self.eval_only!r}")
        if self.eval_only and self.resume:
            raise ValueError("resume and eval_only exclude each other")


# Settings


def read_settings(argv: list[str]) -> dict:
    """Settings of the config files and of the command line, by key, later ones winning. Raises UserError."""
    fixed = [f.name for f in (*fields(TrainConfig), *fields(ModelConfig)) if f.name not in RESUME_MAY_CHANGE]
    epilog = (
        f"With --resume another value is taken, and reported, for: {', '.join(RESUME_MAY_CHANGE)} (batch_size and "
        "grad_accum only if their product stays the same). It is refused, because the result would be that of another "
        f"run, for: {', '.join(fixed)}, and for a dataset that was prepared anew."
    )
    parser = Parser(
        prog="train.py",
        description=__doc__,
        epilog=textwrap.fill(epilog, 120),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="*", type=Path, help="files such as configs/quickstart.toml")
    known, flags = {}, set()
    for config in (TrainConfig, ModelConfig):
        group = parser.add_argument_group(config.__name__)
        comments = dict(re.findall(r"^ {4}(\w+): .*?  # (.+)$", inspect.getsource(config), re.MULTILINE))
        for f in fields(config):
            known[f.name] = f.type
            flags |= {f"--{f.name}"} if f.type is bool else set()
            kind, value = (parse_bool, "true|false") if f.type is bool else (f.type, "VALUE")
            default = "" if f.default == "" else f" (default: {f.default})"
            help = (comments[f.name] + default).replace("%", "%%")
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar=value, type=kind, help=help)
    argv = [f"{argument}=true" if argument in flags else argument for argument in argv]  # --compile: --compile=true
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    for argument in unknown:
        raise UserError(unknown_key(argument.removeprefix("--").split("=")[0], argument, known))
    settings = vars(arguments)
    paths = settings.pop("config")
    in_files = {}
    for path in paths:
        in_files |= read_file(path, known)
    settings = in_files | settings
    return settings | {"out_dir": settings.get("out_dir") or f"out/{paths[-1].stem if paths else 'default'}"}


def read_file(path: Path, known: dict[str, type]) -> dict:
    """Settings of a config file. Raises UserError unless all of them are `known` and of the right type."""
    try:
        file = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, IsADirectoryError):
        there = ", ".join(str(p) for p in sorted(Path("configs").rglob("*.toml"))) or "none"
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"config {path} {what}; there are: {there}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    for key in file:
        if key not in known:
            raise UserError(unknown_key(key, f"{key} = {file[key]!r} in {path}", known))
        if type(file[key]) is not known[key] and not (known[key] is float and type(file[key]) is int):
            raise UserError(f"{key} in {path} must be of type {known[key].__name__}, got {file[key]!r}")
    return file


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
    return inputs_and_targets(tokens, offsets[micro_step], model_config)


def inputs_and_targets(
    tokens: np.ndarray, offsets: np.ndarray, model_config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of block_size tokens that start at `offsets`, and the same windows one token later."""
    windows = torch.from_numpy(cut_windows(tokens, offsets, model_config.block_size + 1, model_config.vocab_size))
    return windows[:, :-1], windows[:, 1:]


def prepare_known(names: list[str]) -> None:
    """Prepare those datasets that are missing and that prepare.py can get by itself, on the first rank only."""
    first = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"
    for name in names:
        if first and name in KNOWN and not (DATA / name / "meta.json").exists():
            print(f"dataset {name!r} is not there yet: python prepare.py {name}")
            prepare([name])


# Ranks: one process, or several that torchrun started


def join_ranks(device: str) -> str:
    """Join the process group if torchrun started several processes. Returns the device of this one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if device in ("auto", "cuda") and torch.cuda.is_available():
            rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if rank >= gpus:
                raise UserError(f"more processes than GPUs ({gpus}) here: start one for each GPU, or add --device=cpu")
            device = f"cuda:{rank}"
            torch.cuda.set_device(device)
        elif device == "auto":
            device = "cpu"  # there is no exchange between processes on MPS
        backend = "nccl" if device.startswith("cuda") else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may be preparing the data first
        except ValueError as error:
            raise UserError(f"WORLD_SIZE is set, but not by torchrun ({error}); unset it, or use torchrun") from error
    return device


def this_rank() -> tuple[int, int]:
    """This process' rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(x: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Sum (or another reduction) of x over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


@contextmanager
def explaining_errors(out_dir: Path) -> Iterator[None]:
    """Turn a GPU's full memory, and the error that a rank gets when another one is gone, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{str(error).split('. GPU')[0]}: once more with half the --batch_size and twice the --grad_accum, which "
            f"compute the same; with --resume if there is a checkpoint in {out_dir}"
        ) from error
    except RuntimeError as error:
        if this_rank()[1] == 1 or not re.search("gloo|nccl|peer", str(error), re.IGNORECASE):
            raise
        print(f"rank {this_rank()[0]} has lost another rank; waiting for torchrun to end this one", file=sys.stderr)
        time.sleep(2)  # torchrun reports the rank that ends first, which shall be the one with the cause
        raise UserError(
            f"another rank has ended (its own message, or torchrun's, says why); the last checkpoint is in {out_dir}: "
            "go on with --resume, if need be with fewer ranks"
        ) from error


# Checkpoints


@dataclass
class Progress:
    """How far a run has come: with weights, optimizer and settings all that is needed to go on."""

    step: int = 0  # optimizer steps done
    log: list[dict] = field(default_factory=list)  # the rows of log.csv
    loss_sum: float = 0.0  # of the training losses since the last evaluation
    loss_steps: int = 0  # how many those are
    grad_norm: float | None = None  # of the last step, before clipping

    @property
    def evaluated(self) -> bool:
        """Whether the last row of the log belongs to this step."""
        return bool(self.log) and self.log[-1]["step"] == self.step

    @property
    def best(self) -> bool:
        """Whether no evaluation had a lower validation loss than the last one."""
        return self.log[-1]["val_loss"] == min(row["val_loss"] for row in self.log)


def hold(out_dir: Path) -> IO:
    """Keep other trainings out of a folder until the file that is returned is closed. Raises UserError if one is in.

    The lock is the operating system's, so it ends with the process, however that ends. Windows has none.
    """
    file = (out_dir / "lock").open("w")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another train.py is at work in {out_dir}: wait for it, or stop it") from error
        except OSError:  # a file system without locks
            pass
    return file


def save_checkpoint(path: Path, contents: dict) -> None:
    """Write a checkpoint; the one that was there becomes previous.pt. Raises UserError, and keeps the old one."""
    try:
        with replacing(path) as file:
            torch.save(contents, file)
            if path.exists():
                also_call(path, path.with_name("previous.pt"))
    except (OSError, RuntimeError) as error:
        reason = error.__context__ or error  # torch.save answers a full disk with a RuntimeError of its own
        kept = "the one made before is kept: make room, and go on with --resume" if path.exists() else "none is kept"
        raise UserError(f"{path} can't be written ({str(reason).splitlines()[0]}); {kept}") from error


def also_call(path: Path, name: Path) -> None:
    """Give a file a second name, which stays with it when its first is given to a newer file."""
    beside = name.with_name(name.name + ".tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, beside)
    os.replace(beside, name)
    beside.unlink(missing_ok=True)  # where both names were those of one file already, replace has done nothing


def load_to_resume(out_dir: Path) -> dict:
    """Contents of OUT_DIR/ckpt.pt. Raises UserError, which offers an older one, if it is missing or damaged."""
    path = out_dir / "ckpt.pt"
    if not path.exists():
        raise UserError(f"{path} does not exist, so there is no run to go on with: start without --resume")
    try:
        return load_checkpoint(path)
    except UserError as error:
        for older in (out_dir / "previous.pt", out_dir / "best.pt"):
            try:
                step = load_checkpoint(older)["step"]
            except UserError:
                continue
            raise UserError(f"{error}; {older}, of step {step}, is whole: mv {older} {path} and --resume") from error
        raise


def check_resume(
    path: Path, checkpoint: dict, config: TrainConfig, model_config: ModelConfig, data: Dataset
) -> list[str]:
    """What has changed since the checkpoint was written. Raises UserError if going on would be another run."""
    old = asdict(TrainConfig()) | asdict(ModelConfig()) | checkpoint["train_config"] | checkpoint["model_config"]
    new = asdict(config) | asdict(model_config)
    changed = {key: f"{key} (was {old[key]!r}, now {new[key]!r})" for key in new if old[key] != new[key]}
    refused = [text for key, text in changed.items() if key not in RESUME_MAY_CHANGE]
    if old["batch_size"] * old["grad_accum"] != new["batch_size"] * new["grad_accum"]:
        was, now = (f"{settings['batch_size']} x {settings['grad_accum']}" for settings in (old, new))
        refused += [f"batch_size x grad_accum (was {was}, now {now})"]
    if not refused and checkpoint["data"] != data.fingerprint:
        raise UserError(f"can't resume {path}: dataset {data.name!r} was prepared anew since, with another result")
    if refused:
        raise UserError(
            f"can't resume {path} with another {', '.join(refused)}; start anew with another --out_dir, or leave these "
            "settings out, and the config file that has them, to take the checkpoint's"
        )
    if checkpoint["step"] > config.max_steps:
        raise UserError(f"{path} is at step {checkpoint['step']} already, beyond max_steps {config.max_steps}")
    return [text for key, text in changed.items() if key != "resume"]


def check_init(path: Path, checkpoint: dict, model_config: ModelConfig) -> None:
    """Raise UserError unless the checkpoint's weights make sense in a model of this configuration.

    A sum may become a DAG: W_up = 0 makes the new model compute what the old one did (upcycling).
    """
    may_change = {"block_size"}
    old = asdict(ModelConfig()) | checkpoint["model_config"]  # a key that the checkpoint's version did not have yet
    of_a_dag = {"dag_depth", "dag_dim", "dag_gate"}
    if old["aggregator"] == "sum" and model_config.aggregator == "dag":
        may_change |= {"aggregator"} | of_a_dag
    changed = {
        key: f"{key} (there {old[key]!r}, here {new!r})"
        for key, new in asdict(model_config).items()
        if old[key] != new and key not in may_change
    }
    if changed:
        still_a_sum = old["aggregator"] == model_config.aggregator == "sum" and changed.keys() & of_a_dag
        upcycle = "; or add --aggregator=dag to go on with the sum as a dag" if still_a_sum else ""
        raise UserError(
            f"can't start from {path} with another {', '.join(changed.values())}: leave the setting out, or the "
            f"config file that has it, to take the checkpoint's{upcycle}"
        )


def load_weights(path: Path, checkpoint: dict, model: GPT, optimizer: torch.optim.Optimizer | None) -> None:
    """Copy the checkpoint's weights, and its optimizer's state if one is given. Raises UserError."""
    try:
        lacking, surplus = model.load_state_dict(checkpoint["model"], strict=False)
        upcycled = checkpoint["model_config"]["aggregator"] == "sum"  # the new aggregator keeps its own first weights
        if surplus or not all(upcycled and ".aggregate." in name for name in lacking):
            raise KeyError(f"{lacking} {surplus}")
        if optimizer:
            optimizer.load_state_dict(checkpoint["optimizer"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its weights do not fit its configuration") from error


# Training


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, embeddings and stacked experts, and none on the norms' scales."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    scales = [p for p in parameters if p.dim() < 2]
    assert len({id(p) for p in matrices + scales}) == len(matrices) + len(scales) == len(parameters)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    fused = model.embed.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rises linearly for warmup_steps, then falls along a cosine to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: TrainConfig, cast: AbstractContextManager) -> dict:
    """Mean cross-entropy (nats per token, nothing else in it) on the validation split, and how the model routes there.

    Always the same evenly spaced windows, shared out over the ranks; neither batch_size nor their number matters.
    """
    rank, ranks = this_rank()
    c, device, tokens = model.config, model.embed.weight.device, data.val
    all_offsets = spaced_offsets(tokens, c.block_size, config.eval_tokens)
    count, offsets = len(all_offsets), all_offsets[rank::ranks]
    wide = torch.float32 if device.type == "mps" else torch.float64
    means = torch.zeros(2 + len(graph_columns(c)), device=device, dtype=wide)  # loss, z-loss, and those columns
    routers = c.n_layer * (2 if c.aggregator == "coe" else 1)
    prob = torch.zeros(routers, c.n_expert, device=device, dtype=wide)
    load = torch.zeros(routers, c.n_expert, device=device, dtype=torch.long)
    max_logit = torch.zeros((), device=device)
    model.eval()
    for start in range(0, len(offsets), config.batch_size):
        x, y = inputs_and_targets(tokens, offsets[start : start + config.batch_size], c)
        records = []
        with cast:
            out = model(x.to(device), y.to(device), records)
        share = len(x) / count
        means += torch.stack([out.loss, out.router.z.mean(), *graph_means(records)]).to(wide) * share
        prob += out.router.prob * share
        load += out.router.load
        max_logit = torch.maximum(max_logit, out.router.max_logit.max())
    model.train()
    val_loss, z, *graph = over_ranks(means).tolist()
    load, prob, max_logit = over_ranks(load), over_ranks(prob), over_ranks(max_logit, dist.ReduceOp.MAX)
    share = load / load.sum(dim=1, keepdim=True)
    return {
        "val_loss": val_loss,
        "val_bpb": val_loss / math.log(2) / data.bytes_per_token,  # bits per byte
        "balance": balance_loss(load, prob).item(),
        "z": z,
        "max_logit": max_logit.item(),
        "max_expert_share": share.max().item(),  # of the slots of its router
        "dead_experts": int((load == 0).sum()),  # of all routers together
        **dict(zip(graph_columns(c), graph, strict=True)),
    }


def graph_columns(config: ModelConfig) -> list[str]:
    """Names of what graph_means returns."""
    depths = range(1, config.dag_depth + 1) if config.aggregator == "dag" else ()
    return [f"{what}_{depth}" for depth in depths for what in ("dag_gate", "dag_update")]


def graph_means(records: list[LayerRecord]) -> Iterator[torch.Tensor]:
    """Per depth of the graph, over layers, tokens and nodes: the mean gate, and the mean of ‖W_up Σ_j m_ij‖ / ‖n_i‖."""
    for depths in zip(*(record.depths for record in records), strict=True):
        yield torch.stack([depth.edge_gate.mean() for depth in depths]).mean()
        yield torch.stack([depth.relative_update.mean() for depth in depths]).mean()


def describe(result: dict) -> str:
    """The three usual ways to state a validation loss."""
    perplexity = math.exp(min(result["val_loss"], 700))  # more would overflow
    return (
        f"validation loss {result['val_loss']:.4f}, perplexity {perplexity:.2f}, bits per byte {result['val_bpb']:.4f}"
    )


def load_micro_steps(
    tokens: np.ndarray, model_config: ModelConfig, config: TrainConfig, step: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of this rank's micro-steps of a step, on their way to the device."""
    rank, ranks = this_rank()
    batches = [get_batch(tokens, model_config, config, step, i) for i in range(rank, config.grad_accum, ranks)]
    if device.type == "cuda":  # from pinned memory a copy does not wait for what the GPU is doing
        return [tuple(t.contiguous().pin_memory().to(device, non_blocking=True) for t in batch) for batch in batches]
    return [tuple(t.to(device) for t in batch) for batch in batches]


def objective(out: Output, load: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """What is minimised: cross-entropy, and the auxiliary losses with their weights. `load` is the whole batch's."""
    balance = balance_loss(load, out.router.prob)
    return out.loss + config.balance_coef * balance + config.z_coef * out.router.z.mean()


def accumulate_gradients(
    model: GPT,
    network: nn.Module,
    micro_steps: list[tuple[torch.Tensor, torch.Tensor]],
    config: TrainConfig,
    cast: AbstractContextManager,
) -> torch.Tensor:
    """Add a step's gradient, averaged over micro-steps and ranks, to the parameters. Returns this rank's mean loss.

    `network` computes what `model` does: it is the model itself, compiled, wrapped for several ranks, or both.
    """
    ranks = this_rank()[1]
    load = None  # slots per layer and expert, of the whole batch, which the balance loss needs from the first part on
    if len(micro_steps) > 1 and config.balance_coef > 0:  # so they are counted beforehand
        with torch.no_grad(), cast:
            load = over_ranks(sum(model.hidden(x)[1].load for x, _ in micro_steps))
    mean_loss = torch.zeros((), device=model.embed.weight.device)
    for i, (x, y) in enumerate(micro_steps):
        exchange = ranks == 1 or i == len(micro_steps) - 1  # ranks average their gradients once per step
        with nullcontext() if exchange else network.no_sync():
            with cast:
                out = network(x, y)
            loss = objective(out, over_ranks(out.router.load) if load is None else load, config)
            (loss / len(micro_steps)).backward()
        mean_loss += out.loss.detach() / len(micro_steps)
    return mean_loss


def check_finite(model: GPT, step: int, out_dir: Path, **values: float) -> None:
    """Raise UserError, naming the tensor, if one of the values is not a finite number."""
    if all(math.isfinite(value) for value in values.values()):
        return
    weights = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    gradients = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    where = "all weights and gradients are finite"
    if weights:
        where = f"not finite: weight {weights[0]}, and {len(weights) - 1} more"
    elif gradients:  # they are computed from the output to the input: the last one in the model went wrong first
        where = f"not finite: the gradient of {gradients[-1]}, and {len(gradients) - 1} more"
    numbers = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    raise UserError(
        f"step {step}: {numbers}; {where}. The last checkpoint is kept in {out_dir}; start anew, or from its weights "
        "with --init_from, with a lower --learning_rate or a longer --warmup_steps"
    )


def compile_if_possible(model: GPT) -> Callable:
    """The compiled model, or, after one warning, the model itself where there is no working compiler."""
    try:
        with torch._inductor.config.patch(force_disable_caches=True):  # what was compiled earlier would prove nothing
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=model.embed.weight.device))
    except Exception as error:  # whatever the compiler's absence makes torch say
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        print(f"warning: going on without --compile, because nothing can be compiled here: {reason}", file=sys.stderr)
        return model
    return torch.compile(model)


def write_log(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Write log.csv anew; floats to six significant digits, an empty field where there is no value yet."""
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
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


def tokens_per_step(model_config: ModelConfig, config: TrainConfig) -> int:
    """Tokens of one optimizer step, over all micro-steps and ranks."""
    return config.grad_accum * config.batch_size * model_config.block_size


def print_plan(model: GPT, data: Dataset, config: TrainConfig) -> None:
    """What is about to be computed, on what, and how much of it."""
    size, cost = model.count_parameters(), model.multiply_adds_per_token()
    per_step = tokens_per_step(model.config, config)
    device = model.embed.weight.device
    print(
        f"{this_rank()[1]} x {device.type}, {choose_dtype(config.dtype, device)}; "
        f"{size.total:,} parameters, {size.active:,} active per token\n"
        f"{cost.total:,} multiply-adds per token, {cost.aggregator / cost.total:.0%} of them in the aggregator "
        f"({model.config.aggregator})\n"
        f"{config.max_steps:,} steps of {per_step:,} tokens, which is "
        f"{config.max_steps * per_step / len(data.train):.2g} times all of {data.name}; results in {config.out_dir}"
    )
    if config.warmup_steps > config.max_steps:
        print(f"note: the warm-up ({config.warmup_steps} steps) is longer than the run: learning_rate is never reached")


def print_samples(model: GPT, encoding: str, config: TrainConfig, cast: AbstractContextManager) -> None:
    """Two short texts, to see what was learned."""
    device = model.embed.weight.device
    try:
        loaded = get_encoding(encoding)
    except UserError as error:
        print(f"no samples: {error}")
        return
    model.eval()
    for i in range(2):
        print(f"\n--- sample {i + 1} ---")
        generator = torch.Generator(device).manual_seed(config.seed + i)
        with cast:
            for (piece,) in continue_texts(model, [Text(loaded, "")], 400, temperature=0.8, generator=generator):
                print(piece, end="", flush=True)
        print()


def command_to_go_on(config: TrainConfig) -> str:
    """The command line of this run with --resume."""
    ranks = this_rank()[1]
    if ranks > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        return "the same commands on every machine, and --resume"
    start = ["python"] if ranks == 1 else ["torchrun", "--standalone", f"--nproc_per_node={ranks}"]
    return shlex.join([*start, *sys.argv] + ["--resume"] * (not config.resume))


def evaluate_only(config: TrainConfig, settings: dict) -> None:
    """Print a line of losses for each dataset in config.eval_only, on as many tokens as in the run unless told."""
    names = [name.strip() for name in config.eval_only.split(",")]
    prepare_known(names)
    device = choose_device(join_ranks(config.device))
    path = checkpoint_path(Path(config.init_from or config.out_dir))
    model, checkpoint = load_model(path, device)
    other = [key for key, value in asdict(model.config).items() if settings.get(key, value) != value]
    if other:
        raise UserError(
            f"{path} has another {', '.join(other)}, and is evaluated as it is: leave the setting out, or the config "
            "file that has it"
        )
    if "eval_tokens" not in settings:
        config = replace(config, eval_tokens=checkpoint["train_config"]["eval_tokens"])
    if this_rank()[0] == 0:
        print(f"{path}, step {checkpoint['step']}, on about {config.eval_tokens:,} tokens of each validation split")
    datasets = [open_dataset(name) for name in names]
    for data in datasets:
        data.check_fits(checkpoint["encoding"], model.config.vocab_size, model.config.block_size)
    width = max(len(data.name) for data in datasets)
    for data in datasets:
        result = evaluate(model, data, config, autocast(device, choose_dtype(config.dtype, device)))
        if this_rank()[0] == 0:
            print(f"{data.name:{width}}  {describe(result)}")


def main() -> None:
    settings = read_settings(sys.argv[1:])
    config = make_config(TrainConfig, settings)
    if config.eval_only:
        return evaluate_only(config, settings)

    out_dir = Path(config.out_dir)
    checkpoint = None  # what this run begins with
    if config.resume:
        path = out_dir / "ckpt.pt"
        checkpoint = load_to_resume(out_dir)
        settings = checkpoint["train_config"] | checkpoint["model_config"] | settings
        config = make_config(TrainConfig, settings)
    elif any((out_dir / name).exists() for name in ("ckpt.pt", "best.pt", "log.csv")):
        raise UserError(f"{out_dir} holds a run already: add --resume to go on, choose another --out_dir, or delete it")
    elif config.init_from:
        path = checkpoint_path(Path(config.init_from))
        checkpoint = load_checkpoint(path)
        settings = checkpoint["model_config"] | settings
    prepare_known([config.dataset])
    device = choose_device(join_ranks(config.device))
    cast = autocast(device, choose_dtype(config.dtype, device))
    rank, ranks = this_rank()
    main_rank = rank == 0
    if config.grad_accum % ranks:
        raise UserError(f"grad_accum ({config.grad_accum}) must be a multiple of the number of ranks ({ranks})")

    data = open_dataset(config.dataset)
    model_config = make_config(ModelConfig, {"vocab_size": data.meta["vocab_size"]} | settings)
    keep_freed_memory()
    encoding = checkpoint["encoding"] if checkpoint else data.meta["encoding"]
    data.check_fits(encoding, model_config.vocab_size, model_config.block_size)
    if config.resume:
        changed = check_resume(path, checkpoint, config, model_config, data)
    elif checkpoint:
        check_init(path, checkpoint, model_config)

    torch.manual_seed(config.seed)
    try:
        model = GPT(model_config).to(device)
    except RuntimeError as error:  # torch's way to say that memory does not suffice
        raise UserError(
            f"a model of this size can't be built on {device.type}: {str(error).splitlines()[0]}"
        ) from error
    optimizer = make_optimizer(model, config)
    progress = Progress()
    if checkpoint:
        load_weights(path, checkpoint, model, optimizer if config.resume else None)
    if config.resume:
        progress = Progress(**{f.name: checkpoint[f.name] for f in fields(Progress)})

    def save() -> None:
        contents = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_config": asdict(model_config),
            "train_config": asdict(config),
            "encoding": encoding,
            "data": data.fingerprint,
            "version": VERSION,
        }
        save_checkpoint(out_dir / "ckpt.pt", contents | asdict(progress))

    network = compile_if_possible(model) if config.compile else model  # has the parameters of `model`, not copies
    if ranks > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    step_tokens = tokens_per_step(model_config, config)
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = hold(out_dir) if main_rank else nullcontext()
    if main_rank:
        print_plan(model, data, config)
        if config.resume:
            print(
                f"going on after step {progress.step} of {config.max_steps}"
                + (f"; changed: {', '.join(changed)}" if changed else "")
            )
        elif checkpoint:
            print(f"starting from the weights of {path}, step {checkpoint['step']}")

    def load_step(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return load_micro_steps(data.train, model_config, config, step, device)

    batch = load_step(progress.step)
    stop, stopping = StopRequest(), False
    started = since = time.perf_counter()
    timed_steps = 0  # since the last evaluation ended, which is at the time `since`
    bar = tqdm(
        total=config.max_steps,
        initial=progress.step,
        unit="step",
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants fewer lines than a terminal
        disable=not main_rank,
    )
    with lock, bar, explaining_errors(out_dir):
        while True:
            step = progress.step
            if (step % config.eval_interval == 0 or step == config.max_steps) and not stopping:
                if not progress.evaluated:
                    seconds = time.perf_counter() - since
                    result = evaluate(model, data, config, cast)
                    check_finite(model, step, out_dir, validation_loss=result["val_loss"])
                    progress.log.append({
                        "step": step,
                        "tokens": step * step_tokens,
                        "train_loss": progress.loss_sum / progress.loss_steps if progress.loss_steps else None,
                        "lr": learning_rate(step, config),
                        "grad_norm": progress.grad_norm,
                        "tokens_per_s": timed_steps * step_tokens / seconds if timed_steps else None,
                        **result,
                    })  # fmt: skip
                    progress.loss_sum, progress.loss_steps = 0.0, 0
                    if main_rank:
                        tqdm.write(f"step {step:>6}: {describe(result)}")
                        save()
                if main_rank:  # after a resumption once more: the process may have been killed right here
                    if progress.best:
                        also_call(out_dir / "ckpt.pt", out_dir / "best.pt")
                    write_log(out_dir / "log.csv", progress.log, [*LOG_COLUMNS, *graph_columns(model_config)])
                since, timed_steps = time.perf_counter(), 0
            if stopping or step == config.max_steps:
                break

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            step_loss = accumulate_gradients(model, network, batch, config, cast)
            batch = load_step(step + 1)  # while a GPU is still busy with this one
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            # Whether to stop is decided by all ranks together, at the same step.
            totals = over_ranks(torch.stack([step_loss, torch.full_like(step_loss, stop.seen)]))
            step_loss, stopping = totals[0].item() / ranks, totals[1].item() > 0
            check_finite(model, step, out_dir, loss=step_loss, gradient_norm=grad_norm.item())
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.step, progress.grad_norm = step + 1, grad_norm.item()
            progress.loss_sum, progress.loss_steps = progress.loss_sum + step_loss, progress.loss_steps + 1
            timed_steps += 1
            tokens_per_s = timed_steps * step_tokens / (time.perf_counter() - since)
            bar.set_postfix_str(f"loss {step_loss:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            bar.update()
        if main_rank and stopping:
            save()
        if ranks > 1:  # a thread of gloo's that still holds a tensor when Python ends makes the process abort,
            dist.barrier()  # so the last exchange is one without tensors

    if main_rank and stopping:
        print(f"stopped after step {progress.step} and saved; go on with: {command_to_go_on(config)}")
        print(f"the text it writes so far: python sample.py {shlex.quote(str(out_dir / 'ckpt.pt'))}")
    elif main_rank:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # all is saved: Ctrl-C may end the samples
        lowest = min(row["val_loss"] for row in progress.log)
        print(f"{time.perf_counter() - started:.0f} s for training; lowest validation loss {lowest:.4f}")
        print_samples(model, encoding, config, cast)
        print(f"\nfor more: python sample.py {shlex.quote(config.out_dir)} --prompt 'YOUR TEXT'")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
