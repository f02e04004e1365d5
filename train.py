"""Train a model on a prepared dataset, on one device or on several with torchrun.

    python train.py configs/quickstart.toml
    python train.py configs/quickstart.toml --aggregator=sum --out_dir=out/sum
    python train.py --resume --out_dir=out/sum --max_steps=8000
    torchrun --standalone --nproc_per_node=8 train.py configs/owt.toml

Settings: the defaults below, then the keys of the config files, then --key=value, later ones winning. Results:
log.csv, a row per evaluation; ckpt.pt, to go on from with --resume; best.pt, the best weights so far, to sample.
"""

import argparse
import csv
import difflib
import gc
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import tomllib
import zipfile
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, VERSION, ModelConfig, check_types
from prepare import DATA, KNOWN, Dataset, Parser, get_encoding, open_dataset, prepare, replacing, require, run, visible

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
LOG_COLUMNS = ["step", "tokens", "train_loss", "val_loss", "val_bpb", "balance", "z", "lr", "grad_norm", "tokens_per_s"]
CHECKPOINT = {"model": dict, "optimizer": dict, "model_config": dict, "train_config": dict, "encoding": str}
CHECKPOINT |= {"data": dict, "version": str, "step": int, "log": list, "losses": list, "grad_norm": float}
EXPLAINED = {  # torch's errors
    "out of memory|allocate|overflow": "too large for the memory: a smaller --batch_size or a smaller model",
    "size mismatch|missing key|unexpected key": "the weights do not fit the settings: leave out those that differ",
    "compiler": "torch.compile needs a C++ compiler: --compile=false",
    "gloo|nccl|peer": "another rank has ended; go on from the last checkpoint with --resume",
}


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
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0: any
    balance_coef: float = 0.01  # weight of the balance loss
    z_coef: float = 0.001  # weight of the router's z-loss
    eval_interval: int = 200  # steps between evaluations, each with a row in log.csv and a checkpoint
    eval_tokens: int = 100_000  # validation tokens per evaluation, in evenly spaced windows
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), or a torch device
    dtype: str = "auto"  # precision of matrix products: auto (bfloat16 on CUDA, else float32), float32, bfloat16
    compile: bool = False  # compile the model with torch.compile: slow to start, then faster in bfloat16
    resume: bool = False  # go on from OUT_DIR/ckpt.pt; settings not given are those of the checkpoint
    init_from: str = ""  # out/OTHER or a checkpoint: start from its weights, a sum's also as a dag; fresh optimizer

    def __post_init__(self):
        check_types(self, may_be_zero=("seed", "warmup_steps"))
        for f in fields(self):
            value = getattr(self, f.name)
            require(f.type is not float or 0 <= value < math.inf, f"{f.name} must be 0 or more and finite, got {value}")
        require(self.min_lr <= self.learning_rate, f"min_lr ({self.min_lr}) must not exceed learning_rate")


KINDS = {f.name: f.type for f in (*fields(TrainConfig), *fields(ModelConfig))}


def parse(arguments: list[str]) -> dict:
    """Settings by key, and the paths of config files (first). Raises ValueError, naming the nearest key, if unknown."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("config", nargs="*", type=Path, help="files such as configs/quickstart.toml")
    flag = {"choices": ("true", "false"), "nargs": "?", "const": "true"}  # --compile, --compile=false, --compile false
    for config in (TrainConfig, ModelConfig):
        comments = dict(re.findall(r"^ {4}(\w+): .*?  # (.+)$", inspect.getsource(config), re.MULTILINE))
        for f in fields(config):
            text = f"{comments[f.name]} (default: {f.default!r})".replace("%", "%%")
            kind = flag if f.type is bool else {"type": f.type, "metavar": "VALUE"}
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    settings, unknown = parser.parse_known_intermixed_args(arguments)
    for argument in [*unknown, *(path for path in map(str, settings.config) if path.startswith("-"))]:
        nearest = difflib.get_close_matches(argument.split("=")[0].strip("-"), KINDS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown setting {argument}; the nearest key is {nearest} (see python train.py --help)")
    return {key: value == "true" if KINDS.get(key) is bool else value for key, value in vars(settings).items()}


def read_settings(argv: list[str]) -> dict:
    """Settings of the config files, each read as if its keys were --key=value, then of the command line, by key."""
    given, in_files = parse(argv), {}
    for path in given["config"]:
        require(path.exists() and not path.is_dir(), f"there is no config file {path}; try configs/quickstart.toml")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
            texts = {key: x if KINDS.get(key) is str else json.dumps(x, default=str) for key, x in values.items()}
            in_files |= parse([f"--{key}={text}" for key, text in texts.items()])
        except ValueError as error:  # no TOML, no UTF-8, or a wrong setting
            raise ValueError(f"{path}: {error}") from error
    settings = in_files | given
    paths = settings.pop("config")
    return settings | {"out_dir": settings.get("out_dir") or f"out/{paths[-1].stem if paths else 'default'}"}


def make_config(cls: type, settings: dict):
    """A ModelConfig or TrainConfig from those settings that belong to it."""
    return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})


def windows(tokens: np.ndarray, offsets: np.ndarray, model: GPT) -> Tensor:
    """What begins at `offsets`, on the model's device: (offsets, block_size + 1) ids, the inputs and the targets."""
    ids = np.stack([tokens[i : i + model.config.block_size + 1] for i in offsets]).astype(np.int64)
    require(ids.max() < model.config.vocab_size, f"{tokens.filename} has ids beyond the vocabulary: prepare it again")
    return torch.from_numpy(ids).to(model.embed.weight.device)


def spaced_offsets(tokens: np.ndarray, block_size: int, wanted: int) -> np.ndarray:
    """Where evenly spaced windows begin that hold about `wanted` tokens together."""
    count = max(1, min(wanted, len(tokens) - 1) // block_size)
    return np.linspace(0, len(tokens) - block_size - 1, count).astype(np.int64)


def get_batch(tokens: np.ndarray, model: GPT, config: TrainConfig, step: int) -> list[Tensor]:
    """This rank's micro-steps of a step, each (batch_size, block_size + 1): a pure function of data, seed and step.

    The offsets of the whole step are drawn at once, so two ranks with two micro-steps each see what one with four sees.
    """
    rng = np.random.default_rng((config.seed, step))
    offsets = rng.integers(0, len(tokens) - model.config.block_size, size=(config.grad_accum, config.batch_size))
    return [windows(tokens, of_one, model) for of_one in offsets[RANK::RANKS]]


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, a GPU per rank, else MPS (Apple; one rank only), else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and RANKS == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        device = torch.zeros(1, device=name).device
        require(device.type in ("cpu", "cuda", "mps"), "train.py knows no such device")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(f"device {name!r} can't be used here ({str(error).splitlines()[0][:100]}); try cpu") from error


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """A context for forward passes: weights stay float32, matrix products are in `dtype`; auto: bfloat16 on CUDA."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    require(dtype in ("float32", "bfloat16"), f"dtype must be auto, float32 or bfloat16, got {dtype!r}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def load_checkpoint(path: Path) -> tuple[GPT, dict]:
    """The model, in evaluation mode on the CPU, and all contents of a checkpoint; of a run's folder, of its best.pt.

    Raises ValueError if the file is missing, damaged or does not fit. No code in it is executed.
    """
    path = path / "best.pt" if path.is_dir() else path
    mend = "give the folder of a run, or begin one: python train.py configs/quickstart.toml"
    require(path.is_file(), f"{path} does not exist: {mend}")
    try:
        with zipfile.ZipFile(path) as archive:
            require(archive.testzip() is None, "checksum")  # torch.load does not compare what torch.save wrote
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [key for key, kind in CHECKPOINT.items() if not isinstance(checkpoint[key], kind)]
        require(not wrong, f"wrong types: {wrong}")
        model = GPT(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        for moment in ("exp_avg", "exp_avg_sq") if checkpoint["optimizer"] else ():
            shapes = sorted(state[moment].shape for state in checkpoint["optimizer"].values())
            require(shapes == sorted(p.shape for p in model.parameters()), "moments of other shapes")
        numbers = [*checkpoint["losses"], *(x for row in checkpoint["log"] for x in row.values() if x is not None)]
        tensors = [*model.parameters(), torch.tensor([*numbers, checkpoint["grad_norm"]])]
        require(all(x.isfinite().all() for x in tensors), "numbers that are not finite")
    except Exception as error:  # whatever torch stumbles over: the file is not what train.py wrote
        raise ValueError(f"{path} is damaged, or not a checkpoint of this train.py ({error!r:.200})") from error
    return model.eval(), checkpoint | {"path": path}


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, embeddings and stacked experts, and none on the norms' scales."""
    matrices, scales = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    fused = model.embed.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rises linearly for warmup_steps, then falls along a cosine to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


def accumulate_gradients(network: nn.Module, batch: list[Tensor], config: TrainConfig, cast: torch.autocast) -> Tensor:
    """Add a step's gradient, averaged over micro-steps and ranks. Returns this rank's mean cross-entropy."""
    losses = []
    for i, tokens in enumerate(batch):
        network.require_backward_grad_sync = i == len(batch) - 1  # DDP: ranks exchange gradients once per step
        with cast:
            out = network(tokens[:, :-1], tokens[:, 1:])
        loss = out.loss + config.balance_coef * out.balance + config.z_coef * out.z
        (loss / len(batch)).backward()
        losses.append(out.loss.detach())
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: TrainConfig, cast: torch.autocast) -> dict[str, float]:
    """Mean cross-entropy (nats per token) and auxiliary losses over the same validation windows, however many ranks."""
    offsets = spaced_offsets(data.val, model.config.block_size, config.eval_tokens)
    means = torch.zeros(3, device=model.embed.weight.device)
    starts = range(RANK * config.batch_size, len(offsets), RANKS * config.batch_size)
    for start in tqdm(starts, "evaluating", leave=False, delay=1, mininterval=1, disable=RANK > 0):
        tokens = windows(data.val, offsets[start : start + config.batch_size], model)
        with cast:
            out = model(tokens[:, :-1], tokens[:, 1:])
        means += torch.stack([out.loss, out.balance, out.z]) * len(tokens) / len(offsets)
    if RANKS > 1:
        dist.all_reduce(means)
    loss, balance, z = means.tolist()
    return {"val_loss": loss, "val_bpb": loss / math.log(2) / data.bytes_per_token, "balance": balance, "z": z}


def check_finite(model: GPT, step: int, **values: float) -> None:
    """Raise ValueError, naming the step and the first bad tensor, if one of the values is not a finite number."""
    if not all(map(math.isfinite, values.values())):
        tensors = {f"weight {name}": p for name, p in model.named_parameters()}
        # Gradients are computed from the output to the input: the last one in the model went wrong first.
        tensors |= {f"gradient of {name}": p.grad for name, p in reversed(list(model.named_parameters()))}
        bad = next((name for name, x in tensors.items() if x is not None and not x.isfinite().all()), "no tensor")
        raise ValueError(f"step {step}: not finite: {values}, first {bad}; try a lower --learning_rate in a new run")


class StopRequest:
    """Notices Ctrl-C, SIGTERM and SIGHUP, so that what is under way is finished and saved. Two stop at once."""

    def __init__(self):
        self.seen, self.under_way = False, "this step"
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # not on Windows
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                signal.signal(number, self.notice)

    def notice(self, number: int, frame) -> None:
        self.seen = True
        signal.signal(number, signal.SIG_DFL)
        print(f"\nfinishing {self.under_way}, then saving (once more: stop at once)", file=sys.stderr)


def outlive_reader(stream) -> None:
    """Let a text stream lose what can't be written any more, as after `| head`, instead of ending the training."""
    write = stream.write

    def attempt(text: str) -> None:
        try:
            write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write = attempt


class Run:
    """Everything that a training needs, made from its settings, and how far it has come."""

    def __init__(self, given: dict):
        where = {key: given[key] for key in ("out_dir", "resume", "init_from") if key in given}
        c, old, checkpoint = make_config(TrainConfig, where), None, {}
        if c.resume:
            old, checkpoint = load_checkpoint(Path(c.out_dir, "ckpt.pt"))
            kept = checkpoint["train_config"] | checkpoint["model_config"]
            for key in given.keys() & {"dataset", "seed", "batch_size", "grad_accum", *checkpoint["model_config"]}:
                contradiction = f"{key} is {kept[key]!r} in {checkpoint['path']}, not {given[key]!r}"
                require(given[key] == kept[key], f"{contradiction}: leave it, or the file that has it, out")
            given = kept | given
        elif c.init_from:
            old, checkpoint = load_checkpoint(Path(c.init_from))
            given = checkpoint["model_config"] | given
        self.config = c = make_config(TrainConfig, given)
        self.out_dir, self.device = Path(c.out_dir), choose_device(c.device)
        require(c.resume or not self.out_dir.exists(), f"{c.out_dir} exists: --resume it, or take another --out_dir")
        require(c.grad_accum % RANKS == 0, f"grad_accum ({c.grad_accum}) must be a multiple of the {RANKS} ranks")
        self.cast = autocast(self.device, c.dtype)
        if c.dataset in KNOWN and RANK == 0 and not (DATA / c.dataset / "meta.json").exists():
            print(f"dataset {c.dataset!r} is not there yet, so first python prepare.py {c.dataset} is run", flush=True)
            prepare([c.dataset])
        if RANKS > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
            dist.all_reduce(torch.zeros(1, device=self.device))  # waits for the first rank, which may be preparing
        self.data = open_dataset(c.dataset)
        self.model_config = make_config(ModelConfig, {"vocab_size": self.data.meta["vocab_size"]} | given)
        self.encoding = get_encoding(checkpoint.get("encoding", self.data.meta["encoding"]))
        self.data.check_fits(self.encoding.name, self.model_config.vocab_size, self.model_config.block_size)

        torch.manual_seed(c.seed)
        self.model = GPT(self.model_config)
        if old is not None:  # a graph that is new in it keeps its own first weights, with W_up = 0
            own = {name: weight for name, weight in self.model.state_dict().items() if ".aggregate." in name}
            self.model.load_state_dict(own | old.state_dict())
        self.optimizer = make_optimizer(self.model.to(self.device), c)
        self.state = {"step": 0, "log": [], "losses": [], "grad_norm": 0.0}  # losses: since the last evaluation
        if c.resume:
            require(checkpoint["data"] == self.data.fingerprint, f"{c.dataset} has changed since {checkpoint['path']}")
            self.state = {key: checkpoint[key] for key in self.state}
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": checkpoint["optimizer"], "param_groups": groups})

    def save(self) -> None:
        """Write best.pt if the last evaluation was the best one, log.csv, and at last ckpt.pt."""
        self.out_dir.mkdir(parents=True, exist_ok=self.state["step"] > 0)  # fails if another run has made it since
        contents = {"model": self.model.state_dict(), "encoding": self.encoding.name, "data": self.data.fingerprint}
        contents |= {"model_config": asdict(self.model_config), "train_config": asdict(self.config), "version": VERSION}
        log = self.state["log"]
        if log[-1]["step"] == self.state["step"] and log[-1]["val_loss"] == min(row["val_loss"] for row in log):
            with replacing(self.out_dir / "best.pt") as file:
                torch.save(contents | self.state | {"optimizer": {}}, file)
        with replacing(self.out_dir / "log.csv", "w") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()} for row in log)
        with replacing(self.out_dir / "ckpt.pt") as file:
            torch.save(contents | self.state | {"optimizer": self.optimizer.state_dict()["state"]}, file)

    def print_samples(self) -> None:
        """Two short texts, to see what was learned."""
        start = torch.full((2, 1), self.encoding.eot_token, device=self.device)
        choice = {"temperature": 0.8, "generator": torch.Generator(self.device).manual_seed(self.config.seed)}
        with self.cast:
            ids = torch.stack(list(self.model.eval().generate(start, 400, self.encoding.n_vocab, **choice)), dim=1)
        for text in ids.tolist():
            end = [*text, self.encoding.eot_token].index(self.encoding.eot_token)
            print(f"\n--- sample ---\n{visible(self.encoding.decode(text[:end]))}")
        if self.model_config.aggregator in ("sum", "dag"):  # sample.py knows no others
            print(f"\nfor more: python sample.py {self.out_dir} --prompt 'YOUR TEXT'")


def train(run: Run) -> None:
    """From the first evaluation to the samples at the end."""
    model, config, state, cost = run.model, run.config, run.state, run.model.cost()
    step_tokens = config.grad_accum * config.batch_size * model.config.block_size
    if state["step"] >= config.max_steps:
        if RANK == 0:
            print(f"nothing left to do: {run.out_dir} is at step {state['step']} of --max_steps={config.max_steps}")
        return
    network = torch.compile(model) if config.compile else model  # has the parameters of `model`, not copies
    if RANKS > 1:
        network = DistributedDataParallel(network)
    if RANK == 0:
        print(f"{RANKS} x {run.device}; {cost['active']:,} of {cost['parameters']:,} parameters active per token")
        steps = f"steps {state['step']:,} to {config.max_steps:,} of {step_tokens:,} tokens of {config.dataset}"
        print(f"{run.out_dir}: {steps}" + "; compiling takes a minute" * config.compile)

    batch, stop, stopping = get_batch(run.data.train, model, config, state["step"]), StopRequest(), False
    since, then = time.perf_counter(), state["step"]  # of the end of the last evaluation
    done, wanted = state["step"] * step_tokens, config.max_steps * step_tokens
    bar = tqdm(total=wanted, initial=done, unit=" tokens", disable=RANK > 0)
    bar.mininterval = 0.2 if sys.stderr.isatty() else 10  # a log file wants fewer lines than a terminal
    with bar:
        while True:
            step, log = state["step"], state["log"]
            due = step % config.eval_interval == 0 or step == config.max_steps
            if due and not stopping and not (log and log[-1]["step"] == step):
                speed = (step - then) * step_tokens / (time.perf_counter() - since) if step > then else None
                stop.under_way = "this evaluation"
                result = evaluate(model, run.data, config, run.cast)
                stop.under_way = "this step"
                check_finite(model, step, validation_loss=result["val_loss"])
                row = {"step": step, "tokens": step * step_tokens, "lr": learning_rate(step, config), **result}
                row["train_loss"] = sum(state["losses"]) / len(state["losses"]) if state["losses"] else None
                log.append(row | {"grad_norm": state["grad_norm"], "tokens_per_s": speed})
                state["losses"] = []
                if RANK == 0:
                    bar.write(f"step {step:>6}: validation loss {row['val_loss']:.4f}, bits/byte {row['val_bpb']:.4f}")
                    run.save()
                since, then = time.perf_counter(), step
            if stopping or step >= config.max_steps:
                break

            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            loss = accumulate_gradients(network, batch, config, run.cast)
            batch = get_batch(run.data.train, model, config, step + 1)  # while a GPU is still busy with this one
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            totals = torch.stack([loss, torch.full_like(loss, stop.seen)])  # all ranks decide together whether to stop
            if RANKS > 1:
                dist.all_reduce(totals)
            loss, stopping = totals[0].item() / RANKS, totals[1].item() > 0 and step + 1 < config.max_steps
            check_finite(model, step, loss=loss, gradient_norm=grad_norm.item())
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip or math.inf, grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
            state |= {"step": step + 1, "grad_norm": grad_norm.item()}
            state["losses"].append(loss)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(step_tokens)
    if RANK == 0 and stopping:
        run.save()
        print(f"stopped after step {step} and saved; go on with --resume --out_dir={run.out_dir}")
    elif RANK == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # all is saved: Ctrl-C may end the samples
        run.print_samples()


def main() -> None:
    """Train, whoever reads what is printed, and say in one line what can be mended."""
    for stream in (sys.stdout, sys.stderr):
        outlive_reader(stream)
    try:
        train(Run(read_settings(sys.argv[1:])))
    except (ValueError, OSError, RuntimeError) as error:
        if RANK > 0:  # most errors are the first rank's, too, who prints them; torchrun then ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        for pattern, meaning in EXPLAINED.items():
            found = re.search(f"({pattern}).*", str(error), re.IGNORECASE | re.DOTALL)
            if isinstance(error, RuntimeError) and found:
                error = ValueError(f"{meaning} ({' '.join(found[0].split())[:150]})")
        raise error if isinstance(error, RuntimeError) else error.with_traceback(None) from None
    finally:
        if dist.is_initialized():
            gc.collect()  # of DDP's wrapper, which must not outlive the process group
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
