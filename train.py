"""Train a DAG-MoE on a dataset made by prepare.py.

    python train.py configs/quickstart.toml
    python train.py configs/quickstart.toml --aggregator=sum --out_dir=out/sum
    python train.py --resume=out/quickstart --max_steps=8000
    torchrun --standalone --nproc_per_node=8 train.py configs/owt.toml

The settings are the fields of TrainConfig (below) and ModelConfig (in model.py). A config file
overrides their defaults, and --key=value overrides the file. After every evaluation, a run writes
log.csv, ckpt.pt (which --resume continues from) and, if the validation loss is a new low, best.pt.
If you stop a run with Ctrl-C, only the steps since the last evaluation are lost.
"""

import argparse
import csv
import inspect
import math
import os
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, ModelConfig
from prepare import open_dataset

VERSION = "0.4"  # of the checkpoint format

# torchrun starts several processes and numbers them. Without it there is one, number 0.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class TrainConfig:
    dataset: str = "stdlib"  # folder below data/, made by prepare.py
    out_dir: str = "out/default"  # folder for the results; out/NAME with configs/NAME.toml
    resume: str = ""  # out_dir of a run to continue, with its stored settings
    init_from: str = ""  # out_dir of a run whose best weights to start from; a sum may gain a graph
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences of block_size tokens per micro-batch
    grad_accum: int = 1  # micro-batches per optimizer step, of all processes together
    seed: int = 1337  # sets the initial weights and the order of the data
    learning_rate: float = 1e-3  # peak, reached after the warm-up
    min_lr: float = 1e-4  # reached at max_steps, along a cosine
    warmup_steps: int = 100  # steps in which the learning rate rises linearly from zero
    weight_decay: float = 0.1  # of AdamW, for matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0 means no limit
    balance_coef: float = 0.01  # weight of the balance loss, which spreads tokens over experts
    z_coef: float = 0.001  # weight of the z-loss, which keeps the router's logits small
    eval_interval: int = 200  # steps between evaluations, each of which saves a checkpoint
    eval_tokens: int = 100_000  # validation tokens per evaluation
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: a GPU if there is one
    dtype: str = "auto"  # of matrix products: float32 or bfloat16; auto: bfloat16 on CUDA
    compile: bool = False  # torch.compile: a slow start, then faster steps in bfloat16


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError  # argparse reports it
    return text.lower() == "true"


def parse_settings(arguments: list[str] | None = None) -> dict:
    """Return the settings from the config files and the command line; the latter win."""
    parser = argparse.ArgumentParser(
        usage="train.py [CONFIG.toml ...] [--key=value ...]",
        description=__doc__ + inspect.getsource(TrainConfig) + inspect.getsource(ModelConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # return only what is given
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="*", type=Path, default=[])
    for f in (*fields(TrainConfig), *fields(ModelConfig)):
        kind = boolean if f.type is bool else f.type
        parser.add_argument(f"--{f.name}", type=kind, help=argparse.SUPPRESS)
    typed = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_intermixed_args(typed)
    if given.configs and "resume" in given:
        raise SystemExit("error: --resume brings its own settings, so leave out the config file")
    # Treat settings in a file as if they were typed first, so that typed ones override them.
    from_files = []
    for path in given.configs:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: cannot read {path}: {error}") from None
        from_files.append(f"--out_dir=out/{path.stem}")
        from_files += [f"--{name}={value}" for name, value in table.items()]
    settings = vars(parser.parse_intermixed_args([*from_files, *typed]))
    del settings["configs"]
    return settings


def make_config(config_class: type, settings: dict):
    """Build a TrainConfig or a ModelConfig from the settings that belong to it."""
    own = {f.name: settings[f.name] for f in fields(config_class) if f.name in settings}
    for name, value in own.items():
        may_be_zero = type(value) is float or name in ("seed", "warmup_steps", "shared_dim")
        least = 0 if may_be_zero else 1
        if type(value) in (int, float) and not value >= least:  # nan, too
            raise SystemExit(f"error: {name} must be at least {least}, got {value}")
    try:
        return config_class(**own)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def read_windows(tokens, starts, block_size: int, device: torch.device) -> Tensor:
    """Stack windows of token ids, one per start: (len(starts), block_size + 1)."""
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts])
    return torch.from_numpy(windows.astype(np.int64)).to(device)


def get_batch(tokens, step: int, config: TrainConfig, block_size: int, device) -> list[Tensor]:
    """Return this process's micro-batches for a step, each (batch_size, block_size + 1).

    Seed and step alone decide the batch. It is drawn for all processes and then dealt out, so two
    processes with two micro-batches each see what one process with four of them sees.
    """
    rng = np.random.default_rng((config.seed, step))
    shape = (config.grad_accum, config.batch_size)
    starts = rng.integers(0, len(tokens) - block_size, shape)
    return [read_windows(tokens, row, block_size, device) for row in starts[RANK::WORLD_SIZE]]


def choose_device(name: str) -> torch.device:
    """Return the named device; "auto" is a GPU if there is one, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun: a GPU for each process
    try:
        device = torch.zeros(1, device=name).device  # an unusable device fails here
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: cannot compute on device {name}: {reason}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    """Return the named dtype; "auto" is bfloat16 on a GPU that has it, else float32."""
    if name != "auto":
        return name
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float32"


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """Return a context for matrix products in this dtype; weights and gradients stay float32."""
    is_bfloat16 = choose_dtype(dtype, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16)


def make_optimizer(model: GPT, weight_decay: float) -> torch.optim.AdamW:
    """Make an AdamW with weight decay for matrices, but not for the scales of the norms."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    scales = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": scales}]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)


def get_learning_rate(step: int, config: TrainConfig) -> float:
    """Rise linearly during the warm-up, then fall to min_lr along half a cosine."""
    # AdamW's running averages are noisy at first, so the first steps are small.
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 down to 0
    return config.min_lr + cosine * (config.learning_rate - config.min_lr)


def train_step(network, optimizer, batch: list[Tensor], config: TrainConfig, amp):
    """Take one optimizer step; return the mean cross-entropy and the norm of the gradient."""
    mean_loss = torch.zeros((), device=batch[0].device)
    # A large batch may not fit in memory, so take it in parts and let their gradients add up.
    for i, tokens in enumerate(batch):
        if WORLD_SIZE > 1:
            # DDP averages gradients over the processes. Once is enough: after the last part.
            network.require_backward_grad_sync = i == len(batch) - 1
        with amp:
            out = network(tokens[:, :-1], tokens[:, 1:])
        loss = out.loss + config.balance_coef * out.balance_loss + config.z_coef * out.z_loss
        (loss / len(batch)).backward()
        mean_loss += out.loss.detach() / len(batch)
    # One odd batch can have a huge gradient; clipping keeps it from wrecking the weights.
    grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    if WORLD_SIZE > 1:
        dist.all_reduce(mean_loss)
    return mean_loss.item() / WORLD_SIZE, grad_norm.item()


@torch.no_grad()
def evaluate(model: GPT, tokens, config: TrainConfig, amp) -> list[float]:
    """Return the mean cross-entropy, balance loss and z-loss over evenly spaced windows."""
    device = model.embed.weight.device
    block_size = model.config.block_size
    count = max(1, min(config.eval_tokens, len(tokens) - 1) // block_size)
    starts = np.linspace(0, len(tokens) - block_size - 1, count).astype(np.int64)
    means = torch.zeros(3, device=device)
    model.eval()  # no effect here, but it matters once you add dropout
    for first in range(0, count, config.batch_size):
        part = starts[first : first + config.batch_size]
        batch = read_windows(tokens, part, block_size, device)
        with amp:
            out = model(batch[:, :-1], batch[:, 1:])
        means += torch.stack([out.loss, out.balance_loss, out.z_loss]) * len(part) / count
    model.train()
    return means.tolist()


def save_run(out_dir: Path, model: GPT, optimizer, step: int, log: list, config, meta) -> None:
    """Save ckpt.pt, log.csv and, if the validation loss is the lowest so far, best.pt."""
    checkpoint = {
        "version": VERSION,
        "data": meta,
        "train_config": asdict(config),
        "model_config": asdict(model.config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "log": log,
    }
    unfinished = out_dir / "ckpt.tmp"
    if step == 0 and (unfinished.exists() or (out_dir / "ckpt.pt").exists()):
        raise SystemExit(f"error: another run has started in {out_dir}")
    # Write to a temporary file and rename it: a crash never leaves a half-written file.
    torch.save(checkpoint, unfinished)
    if log[-1]["val_loss"] == min(row["val_loss"] for row in log):
        torch.save(checkpoint | {"optimizer": None}, out_dir / "best.tmp")
        (out_dir / "best.tmp").replace(out_dir / "best.pt")
    with open(out_dir / "log.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, log[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    (out_dir / "log.tmp").replace(out_dir / "log.csv")
    unfinished.replace(out_dir / "ckpt.pt")


def load_checkpoint(path: Path) -> dict:
    """Load a checkpoint file, or the best one in the folder of a run."""
    path = path.expanduser()
    if path.is_dir():
        path = path / "best.pt"
    if not path.exists():
        raise SystemExit(f"error: there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["version"]
    except Exception:  # a damaged or foreign file can raise almost anything
        raise SystemExit(f"error: {path} is not a checkpoint of train.py") from None
    if version != VERSION:
        raise SystemExit(f"error: {path} is of version {version}, and this is {VERSION}")
    return checkpoint


def load_weights(model: GPT, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights. Graphs missing from it stay new, and change nothing yet."""
    graphs = {name: w for name, w in model.state_dict().items() if ".aggregate." in name}
    try:
        model.load_state_dict(graphs | weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise SystemExit(f"error: the checkpoint does not fit this model: {reason:.200}") from None


def find_start(settings: dict) -> tuple[dict, dict | None]:
    """Return all settings, and the checkpoint to resume or start from, if there is one."""
    if settings.get("resume"):
        checkpoint = load_checkpoint(Path(settings["resume"]) / "ckpt.pt")
        return resume_settings(settings, checkpoint), checkpoint
    if settings.get("init_from"):
        checkpoint = load_checkpoint(Path(settings["init_from"]))
        return checkpoint["model_config"] | settings, checkpoint
    return settings, None


def resume_settings(settings: dict, checkpoint: dict) -> dict:
    """Return the stored settings of a run, with the new ones where a change is allowed."""
    folder = settings["resume"]
    stored = checkpoint["train_config"] | checkpoint["model_config"] | {"out_dir": folder}
    # Changing one of these would make it a different run.
    fixed = ["dataset", "out_dir", "init_from", "seed", "batch_size", "grad_accum", "weight_decay"]
    for name in [*fixed, *checkpoint["model_config"]]:
        if settings.get(name, stored[name]) != stored[name]:
            raise SystemExit(f"error: {folder} was started with {name}={stored[name]}; keep that")
    settings = stored | settings
    if settings["max_steps"] <= checkpoint["step"]:
        raise SystemExit(f"error: {folder} is at step {checkpoint['step']}; raise --max_steps")
    return settings


def check_run(config: TrainConfig, model_config: ModelConfig, meta: dict, checkpoint) -> None:
    """Exit if the settings, the dataset and the checkpoint do not go together."""
    data = config.dataset
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise SystemExit(f"error: dtype must be auto, float32 or bfloat16, got {config.dtype}")
    if config.min_lr > config.learning_rate:
        raise SystemExit(f"error: min_lr={config.min_lr} is above learning_rate; lower it, too")
    if config.grad_accum % WORLD_SIZE != 0:
        raise SystemExit(f"error: grad_accum must be a multiple of the {WORLD_SIZE} processes")
    if not config.resume and (Path(config.out_dir).expanduser() / "ckpt.pt").exists():
        raise SystemExit(f"error: {config.out_dir} holds a run: --resume it, or change --out_dir")
    if config.resume and checkpoint["data"] != meta:
        raise SystemExit(f"error: {data} has changed since {config.resume} was saved")
    if checkpoint:
        here = meta["encoding"]
        there = checkpoint["data"]["encoding"]
        if here != there:
            raise SystemExit(f"error: {data} holds {here} tokens, the checkpoint {there} tokens")
        if checkpoint["model_config"]["tie_embeddings"] != model_config.tie_embeddings:
            raise SystemExit("error: tie_embeddings must be as in the checkpoint")
    if model_config.vocab_size < meta["vocab_size"]:
        raise SystemExit(f"error: {data} needs a vocab_size of at least {meta['vocab_size']}")
    for split, counts in meta["splits"].items():
        n_tokens = counts["tokens"]
        if n_tokens <= model_config.block_size:
            sizes = f"{n_tokens} tokens, too few for block_size {model_config.block_size}"
            raise SystemExit(f"error: {data}/{split}.bin has {sizes}")


def count_parameters(model: GPT) -> tuple[int, int]:
    """Return the number of parameters, and how many a token uses (K of the E experts)."""
    total = sum(weight.numel() for weight in model.parameters())
    experts = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
    used = experts * model.config.top_k // model.config.n_expert
    return total, total - experts + used


def main(arguments: list[str] | None = None, make_model=GPT) -> None:
    settings, checkpoint = find_start(parse_settings(arguments))
    config = make_config(TrainConfig, settings)
    meta, train_tokens, val_tokens = open_dataset(config.dataset)
    model_config = make_config(ModelConfig, {"vocab_size": meta["vocab_size"]} | settings)
    check_run(config, model_config, meta, checkpoint)

    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    amp = autocast(device, dtype)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(config.seed)
    model = make_model(model_config)  # lab/baselines.py passes its own
    if checkpoint:
        load_weights(model, checkpoint["model"])
    model.to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    step = 0  # optimizer steps taken
    log = []  # the rows of log.csv, one per evaluation
    resumed_at = -1
    if config.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = resumed_at = checkpoint["step"]
        log = checkpoint["log"]
    checkpoint = None  # frees its memory
    network = torch.compile(model) if config.compile else model  # shares the weights
    if WORLD_SIZE > 1:
        network = DistributedDataParallel(network)

    out_dir = Path(config.out_dir).expanduser()
    block_size = model_config.block_size
    step_tokens = config.grad_accum * config.batch_size * block_size
    val = meta["splits"]["val"]
    bits_per_byte = val["tokens"] / val["bytes"] / math.log(2)  # per nat per token
    if RANK == 0:  # only this process prints, evaluates and saves
        out_dir.mkdir(parents=True, exist_ok=True)
        if not config.resume:
            (out_dir / "ckpt.tmp").unlink(missing_ok=True)  # left by a run that was killed
        total, active = count_parameters(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(f"{name}, {dtype}; {total:,} parameters, {active:,} active per token")
        epochs = config.max_steps * step_tokens / len(train_tokens)
        print(f"{config.max_steps:,} steps of {step_tokens:,} tokens: {epochs:.1f} epochs")
    bar = tqdm(initial=step, total=config.max_steps, disable=RANK > 0, mininterval=1)
    learning_rate = grad_norm = 0.0  # of the last step
    losses = []  # since the last evaluation
    started = time.perf_counter()
    while True:
        is_due = step % config.eval_interval == 0 or step == config.max_steps
        if RANK == 0 and is_due and step != resumed_at:  # the others wait in the next train_step
            seconds = time.perf_counter() - started
            val_loss, balance_loss, z_loss = evaluate(model, val_tokens, config, amp)
            if not math.isfinite(val_loss):
                raise SystemExit(f"error: the validation loss is {val_loss} at step {step}")
            row = {
                "step": step,
                "tokens": step * step_tokens,
                "train_loss": sum(losses) / len(losses) if losses else math.nan,
                "val_loss": val_loss,
                "val_bpb": val_loss * bits_per_byte,
                "balance_loss": balance_loss,
                "z_loss": z_loss,
                "lr": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_s": len(losses) * step_tokens / seconds,
            }
            log.append(row)
            bar.write(
                f"step {step:>6}: validation loss {val_loss:.4f}, bits/byte {row['val_bpb']:.4f}, "
                f"balance loss {balance_loss:.2f}, {row['tokens_per_s']:,.0f} tokens/s"
            )
            save_run(out_dir, model, optimizer, step, log, config, meta)
            losses = []
            started = time.perf_counter()
        if step == config.max_steps:
            break

        learning_rate = get_learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        batch = get_batch(train_tokens, step, config, block_size, device)
        loss, grad_norm = train_step(network, optimizer, batch, config, amp)
        step += 1
        if not math.isfinite(loss):
            raise SystemExit(f"error: the loss is {loss} at step {step}")
        losses.append(loss)
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
    bar.close()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
