"""Train a DAG-MoE on a dataset that prepare.py has made.

    python train.py configs/quickstart.toml
    python train.py --resume --out_dir=out/quickstart --max_steps=8000
    torchrun --standalone --nproc_per_node=8 train.py configs/owt.toml

The settings are the fields of TrainConfig, below, and of ModelConfig, in model.py. A config
file overrides their defaults, and --key=value overrides the file. A run writes log.csv, ckpt.pt,
to go on from with --resume, and best.pt, the weights of the lowest validation loss so far.
"""

import csv
import difflib
import gc
import inspect
import math
import os
import shlex
import signal
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare
from model import GPT, ModelConfig
from prepare import UserError, atomic_write, open_dataset

VERSION = "0.3"  # of the contents of checkpoints


@dataclass(frozen=True)
class TrainConfig:
    dataset: str = "stdlib"  # folder below data/, made by prepare.py
    out_dir: str = "out/default"  # new folder for the results; out/NAME with configs/NAME.toml
    resume: bool = False  # go on from out_dir/ckpt.pt, with the settings that are stored there
    init_from: str = ""  # out/OTHER: start from its best weights, which may gain a graph
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences of block_size tokens per micro-step
    grad_accum: int = 1  # micro-steps per optimizer step, of all processes together
    seed: int = 1337  # decides the first weights and the order of the data
    learning_rate: float = 1e-3  # peak, reached after the warm-up
    min_lr: float = 1e-4  # what it has fallen to at max_steps, along a cosine
    warmup_steps: int = 100  # steps in which it rises linearly from zero
    weight_decay: float = 0.1  # of AdamW, for matrices only
    grad_clip: float = 1.0  # largest norm of the gradient; 0 means no limit
    balance_coef: float = 0.01  # weight of the balance loss, which spreads tokens over experts
    z_coef: float = 0.001  # weight of the z-loss, which keeps the router's logits small
    eval_interval: int = 200  # steps between evaluations, each of which saves the run
    eval_tokens: int = 100_000  # validation tokens to read each time
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes the fastest there is
    dtype: str = "auto"  # of matrix products: float32 or bfloat16; auto takes the latter on CUDA
    compile: bool = False  # torch.compile: a slow start, then faster steps in bfloat16

    def __post_init__(self):
        at_least_one = ("max_steps", "batch_size", "grad_accum", "eval_interval", "eval_tokens")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in at_least_one else 0
            if field.type in (int, float) and not least <= value < 2**31:
                raise ValueError(f"{field.name} must be {least} or more, below 2**31, got {value}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr ({self.min_lr}) exceeds learning_rate {self.learning_rate}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}")


SETTING_TYPES = TrainConfig.__annotations__ | ModelConfig.__annotations__
BOOLEANS = {"true": True, "false": False}


def convert(key: str, value) -> bool | int | float | str:
    """Turn the value of a setting, typed or from a TOML file, into the type of its field."""
    if key not in SETTING_TYPES:
        nearest = difflib.get_close_matches(key, SETTING_TYPES, n=1, cutoff=0)[0]
        raise UserError(f"unknown setting {key}={value}, did you mean {nearest}?")
    kind = SETTING_TYPES[key]
    try:
        if kind is bool:
            return BOOLEANS[str(value).lower()]
        return kind(str(value))  # str() first, because int(1.5) would round
    except (KeyError, ValueError):
        raise UserError(f"{key} must be of type {kind.__name__}, got {value!r}") from None


def read_settings(words: list[str]) -> dict:
    """Collect the settings of a command line: those of config files, then --key=value."""
    typed = {}
    from_files = {"out_dir": TrainConfig.out_dir}
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            if not equals:
                # The next word is the value, unless a --compile stands alone and means true.
                is_bare = not words or (SETTING_TYPES.get(key) is bool and words[0] not in BOOLEANS)
                value = "true" if is_bare else words.pop(0)
            typed[key] = value
        else:
            from_files["out_dir"] = f"out/{Path(word).stem}"
            try:
                from_files |= tomllib.loads(Path(word).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read the config file {word}: {error}") from error
    settings = from_files | typed
    return {key: convert(key, value) for key, value in settings.items()}


def make_config(config_class: type, settings: dict):
    """Build a TrainConfig or ModelConfig from those settings that are fields of it."""
    own = {key: settings[key] for key in config_class.__annotations__ if key in settings}
    try:
        return config_class(**own)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_windows(tokens, offsets, model_config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Stack the windows of ids that begin at the offsets: (offsets, block_size + 1)."""
    length = model_config.block_size + 1
    windows = np.stack([tokens[start : start + length] for start in offsets]).astype(np.int64)
    # A GPU would answer an id that has no embedding with a riddle.
    if windows.max() >= model_config.vocab_size:
        raise UserError("the data has ids beyond vocab_size: prepare it again")
    batch = torch.from_numpy(windows)
    if device.type == "cuda":
        batch = batch.pin_memory()  # so that the GPU can fetch it by itself
    return batch.to(device, non_blocking=True)


def get_batch(tokens, config, model_config, device, step: int, rank: int, ranks: int) -> list:
    """Return this rank's micro-batches of a step, which the seed and the step alone decide."""
    generator = np.random.default_rng((config.seed, step))
    shape = (config.grad_accum, config.batch_size)
    offsets = generator.integers(0, len(tokens) - model_config.block_size, size=shape)
    # Drawn for all ranks, then dealt out: two ranks with two each see what one with four sees.
    return [read_windows(tokens, row, model_config, device) for row in offsets[rank::ranks]]


def choose_device(name: str) -> torch.device:
    """Return the device of this name, or for "auto" a GPU if there is one, else the CPU."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    try:
        if name == "cuda":
            # torchrun numbers the processes of a machine, so that each takes a GPU of its own.
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise UserError(f"there is no device {name!r} here, try --device=cpu") from error


def autocast(device: torch.device, dtype: str = "auto") -> torch.autocast:
    """Make a context in which matrix products are in bfloat16, if wanted; weights stay float32."""
    if dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False):
        dtype = "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def get_learning_rate(step: int, config: TrainConfig) -> float:
    """Rise linearly during the warm-up, then fall to min_lr along half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 down to 0
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def make_optimizer(model: GPT, weight_decay: float) -> torch.optim.AdamW:
    """Make an AdamW that lets matrices decay, but not the scales of the norms."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    scales = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": scales}]
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), fused=True)


@torch.no_grad()
def evaluate(model: GPT, tokens, config: TrainConfig, cast, rank=0, ranks=1) -> list[float]:
    """Return the mean cross-entropy, balance loss and z-loss over evenly spaced windows."""
    block_size = model.config.block_size
    count = max(1, min(config.eval_tokens, len(tokens) - 1) // block_size)
    offsets = np.linspace(0, len(tokens) - block_size - 1, count).astype(np.int64)
    means = torch.zeros(3, device=model.embed.weight.device)
    for start in range(rank * config.batch_size, count, ranks * config.batch_size):
        part = offsets[start : start + config.batch_size]
        batch = read_windows(tokens, part, model.config, means.device)
        with cast:
            out = model(batch[:, :-1], batch[:, 1:])
        means += torch.stack([out.loss, out.balance_loss, out.z_loss]) * len(batch) / count
    if ranks > 1:
        dist.all_reduce(means)
    return means.tolist()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint file, or the best one of a run's folder, without executing code in it."""
    path = path.expanduser()
    if path.is_dir():
        path = path / "best.pt" if (path / "best.pt").exists() else path / "ckpt.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["version"]
    except Exception as error:  # of many kinds, if the file is missing, damaged, or something else
        raise UserError(f"{path} is not a checkpoint of train.py: {error!r:.120}") from error
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, and this is version {VERSION}")
    return checkpoint


def main() -> None:
    # -- settings --
    if "--help" in sys.argv:
        print(__doc__, inspect.getsource(TrainConfig), inspect.getsource(ModelConfig), sep="\n")
        return
    settings = read_settings(sys.argv[1:])
    out_dir = Path(settings["out_dir"]).expanduser()
    checkpoint = None  # what the run starts from, unless it is a fresh one
    if settings.get("resume"):
        checkpoint = load_checkpoint(out_dir / "ckpt.pt")
        stored = checkpoint["train_config"] | checkpoint["model_config"]
        # With any of these changed it would be a different run.
        for key in ["dataset", "seed", "batch_size", "grad_accum", *checkpoint["model_config"]]:
            if settings.get(key, stored[key]) != stored[key]:
                raise UserError(f"{out_dir} was begun with {key}={stored[key]}, so keep it")
        settings = stored | settings
    elif (out_dir / "ckpt.pt").exists():
        raise UserError(f"{out_dir} exists: --resume it, or choose another --out_dir")
    elif settings.get("init_from"):
        checkpoint = load_checkpoint(Path(settings["init_from"]))
        settings = checkpoint["model_config"] | settings
    config = make_config(TrainConfig, settings)

    # -- ranks and device --
    # torchrun starts several processes, called ranks, and tells each its number.
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if config.grad_accum % ranks != 0:
        raise UserError(f"grad_accum={config.grad_accum} is not a multiple of {ranks} processes")
    device = choose_device(config.device)
    cast = autocast(device, config.dtype)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # -- data --
    if config.dataset == "stdlib" and ranks == 1 and not (prepare.DATA / "stdlib").exists():
        prepare.main(["stdlib"])  # it takes a second and needs no download
    meta, train_tokens, val_tokens = open_dataset(config.dataset)
    model_config = make_config(ModelConfig, {"vocab_size": meta["vocab_size"]} | settings)
    if model_config.vocab_size < meta["vocab_size"]:
        raise UserError(f"{config.dataset} needs vocab_size={meta['vocab_size']} or more")
    if min(len(train_tokens), len(val_tokens)) <= model_config.block_size:
        raise UserError(f"a split of {config.dataset} is not longer than block_size")
    if checkpoint and checkpoint["data"]["encoding"] != meta["encoding"]:
        raise UserError(f"{config.dataset} is in {meta['encoding']}, which the model cannot read")
    if config.resume and checkpoint["data"] != meta:
        raise UserError(f"{config.dataset} has changed since {out_dir} was saved")
    bytes_per_token = meta["splits"]["val"]["bytes"] / meta["splits"]["val"]["tokens"]

    # -- model and optimizer --
    torch.manual_seed(config.seed)  # sum and dag begin alike, see GPT
    model = GPT(model_config)
    if checkpoint:
        # A graph that the checkpoint does not have keeps its first weights, which do nothing yet.
        graph = {name: w for name, w in model.state_dict().items() if ".aggregate." in name}
        try:
            model.load_state_dict(graph | checkpoint["model"])
        except RuntimeError as error:
            raise UserError(f"the weights of {config.init_from} do not fit these sizes") from error
    model.to(device)
    optimizer = make_optimizer(model, config.weight_decay)
    step = 0
    losses = []  # of the steps since the last evaluation
    log = []  # a row per evaluation
    grad_norm = 0.0
    if config.resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        losses = checkpoint["losses"]
        log = checkpoint["log"]
        grad_norm = checkpoint["grad_norm"]
    network = torch.compile(model) if config.compile else model  # of the same weights
    if ranks > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)

    def save(name: str) -> None:
        contents = {
            "version": VERSION,
            "data": meta,  # with the checksums of both splits
            "model_config": asdict(model_config),
            "train_config": asdict(config),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict() if name == "ckpt.pt" else None,
            "step": step,
            "losses": losses,
            "log": log,
            "grad_norm": grad_norm,
        }
        with atomic_write(out_dir / name) as file:
            torch.save(contents, file)

    # -- the loop --
    step_tokens = config.grad_accum * config.batch_size * model_config.block_size
    if rank == 0:
        total = sum(weight.numel() for weight in model.parameters())
        experts = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
        active = total - experts + experts * model_config.top_k // model_config.n_expert
        print(f"{total:,} parameters, {active:,} active per token, {step_tokens:,} tokens per step")
        if config.warmup_steps >= config.max_steps:
            print(f"the warm-up never ends: warmup_steps={config.warmup_steps}")
        if config.compile and not cast._enabled:
            print("--compile pays with --dtype=bfloat16 only")
    bar = tqdm(total=config.max_steps, initial=step, disable=rank > 0)
    if not sys.stderr.isatty():  # a log file gets a line a minute in place of the bar
        bar.mininterval = 60
        bar.bar_format = "step {n} of {total}{postfix}, {remaining} left\n"
    batch = get_batch(train_tokens, config, model_config, device, step, rank, ranks)
    signals = []  # that ask to stop: Ctrl-C, SIGTERM, a closed terminal

    def receive(number: int, frame) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one ends the process at once
        # Not print(), which fails if the signal comes in the middle of another print().
        os.write(2, b"\nfinishing this step, then saving; once more to end at once\n")

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it for SIGHUP
            signal.signal(number, receive)
    stopping = False  # what all ranks have agreed on
    last_step = step  # that was evaluated
    last_time = time.perf_counter()
    while True:
        # Evaluate and save, unless it was done at this very step before the run was resumed.
        is_due = step % config.eval_interval == 0 or step == config.max_steps
        is_done = len(log) > 0 and log[-1]["step"] == step
        if is_due and not is_done and not stopping:
            speed = (step - last_step) * step_tokens / (time.perf_counter() - last_time)
            val_loss, balance_loss, z_loss = evaluate(model, val_tokens, config, cast, rank, ranks)
            if not math.isfinite(val_loss):
                raise UserError(f"step {step}: the validation loss is {val_loss}")
            row = {
                "step": step,
                "tokens": step * step_tokens,
                "train_loss": sum(losses) / len(losses) if losses else None,
                "val_loss": val_loss,
                "val_bpb": val_loss / math.log(2) / bytes_per_token,
                "balance_loss": balance_loss,
                "z_loss": z_loss,
                "lr": get_learning_rate(step, config),
                "grad_norm": grad_norm,
                "tokens_per_s": speed,
            }
            log.append(row)
            losses = []
            if rank == 0:
                elapsed = tqdm.format_interval(bar.format_dict["elapsed"])
                losses_text = f"validation loss {val_loss:.4f}, bits/byte {row['val_bpb']:.4f}"
                bar.write(f"step {step:>6}: {losses_text}, {speed:,.0f} tokens/s, {elapsed}")
            if rank == 0 and step > 0:  # before, there is nothing to lose
                if val_loss == min(row["val_loss"] for row in log[1:]):
                    save("best.pt")
                with atomic_write(out_dir / "log.csv", "w") as file:
                    writer = csv.DictWriter(file, row, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(log)
                save("ckpt.pt")
            last_step = step
            last_time = time.perf_counter()
        if stopping or step >= config.max_steps:
            break

        # Add up gradients: a large batch in parts, each of which fits the memory.
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step, config)
        mean_loss = torch.zeros((), device=device)
        for i, tokens in enumerate(batch):
            # Ranks exchange gradients once per step, after the last part: the sum is the same.
            network.require_backward_grad_sync = i == len(batch) - 1
            try:
                with cast:
                    out = network(tokens[:, :-1], tokens[:, 1:])
                router_loss = config.balance_coef * out.balance_loss + config.z_coef * out.z_loss
                # Divided, so that what adds up is the mean over the large batch.
                ((out.loss + router_loss) / len(batch)).backward()
            except torch._dynamo.exc.TorchDynamoException as error:
                raise UserError(f"use --compile=false: cannot compile, {error!r:.100}") from error
            mean_loss += out.loss.detach() / len(batch)
        # A GPU is still at work on this when the CPU gets here, and loads the next batch meanwhile.
        batch = get_batch(train_tokens, config, model_config, device, step + 1, rank, ranks)

        # All ranks decide together whether to stop: the others would wait for one that left.
        totals = torch.stack([mean_loss, torch.full_like(mean_loss, len(signals) > 0)])
        if ranks > 1:
            dist.all_reduce(totals)
        train_loss = totals[0].item() / ranks
        stopping = totals[1].item() > 0 and step + 1 < config.max_steps

        # Clip, because one odd batch with a huge gradient could undo what hundreds have taught.
        largest = config.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest).item()
        if not math.isfinite(train_loss + grad_norm):
            raise UserError(f"step {step}: loss {train_loss}, norm of the gradient {grad_norm}")
        optimizer.step()
        optimizer.zero_grad()  # else the next step would add its gradient to this one
        step += 1
        losses.append(train_loss)
        bar.set_postfix_str(f"loss {train_loss:.3f}", refresh=False)
        bar.update()
        if rank == 0 and step == 1:  # from now on the folder is taken
            out_dir.mkdir(parents=True, exist_ok=True)
            save("ckpt.pt")

    # -- the end --
    bar.close()
    if rank == 0 and stopping:
        save("ckpt.pt")
        print(f"stopped at step {step}; go on with --resume --out_dir={shlex.quote(str(out_dir))}")
    elif rank == 0:
        import sample  # here, because it imports this file

        try:
            sample.main([str(out_dir), "--num_samples=2"])
        except UserError as error:
            print(f"no samples: {error}")
    if ranks > 1:
        # Were the wrapper still alive when the process group ends, the process would abort.
        del network
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    prepare.run(main)
