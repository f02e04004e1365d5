"""Train the arms of a comparison with several seeds, and say what became of them.

    python -m lab.compare sweep lab/configs/ablation --seeds 5 --jobs 2   # whatever is missing
    python -m lab.compare table out/ablation         # a row per arm: loss, difference to sum, cost
    python -m lab.compare plot out/ablation quality.png

A folder of arms holds base.toml, what all of them share, and a file per arm with its difference.
Runs of one seed have the same data in the same order and the same first weights, so differences
between arms are of such pairs.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import train
from lab.cost import cost
from lab.shared import check_target, half_width, new_figure, read_rows, save_png
from model import GPT, ModelConfig
from prepare import UserError, atomic_write, open_dataset, run

# Settings that may differ without making it another run.
OF_THE_MACHINE = {"out_dir", "device", "compile", "resume"}
# Settings that are not in the checksum `training`.
NOT_IN_CHECKSUM = {"seed", "learning_rate", "min_lr", "init_from"} | OF_THE_MACHINE
COLUMNS_THAT_MUST_AGREE = ("data", "evaluated_on", "eval_tokens", "tokens", "training")
COLUMNS_OF_AN_ARM = ("model", "learning_rate")  # must agree between the runs of one arm


def plan_runs(
    folder: Path, arms: list[str], seeds: range, out: Path, settings: list[str]
) -> dict[Path, list[str]]:
    """Return the settings of each run by its folder, with all arms of a seed before the next."""
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    base = files.pop("base", None)
    if base is None or not files:
        raise UserError(f"{folder} must hold base.toml, and beside it a file per arm, to be swept")
    for arm in arms:
        if arm not in files:
            raise UserError(f"{folder} has no arm {arm}; there are: {', '.join(files)}")
    for setting in settings:
        if setting.split("=")[0] in ("--seed", "--out_dir", "--resume"):
            raise UserError(f"{setting}: the sweep sets that itself; see --seeds and --out")
    runs = {}
    for seed, arm in itertools.product(seeds, arms or files):
        out_dir = out / f"{arm}-{seed}"
        runs[out_dir] = [str(base), str(files[arm])]
        for setting in settings:
            runs[out_dir].append(setting.replace("{arm}", arm).replace("{seed}", str(seed)))
        runs[out_dir] += [f"--seed={seed}", f"--out_dir={out_dir}"]
    return runs


def steps_done(out_dir: Path) -> int:
    """Return the step of a run's last evaluation, 0 if there was none."""
    log = out_dir / "log.csv"
    return int(read_rows(log)[-1]["step"]) if log.exists() else 0


def steps_to_do(out_dir: Path, arguments: list[str]) -> int:
    """Return max_steps of a run, or 0 if it has done them all, after a look at what is there."""
    settings = train.read_settings(arguments)
    config = train.make_config(train.TrainConfig, settings)
    open_dataset(config.dataset)  # or say how to prepare it
    if not (out_dir / "ckpt.pt").exists():
        return config.max_steps
    checkpoint = train.load_checkpoint(out_dir / "ckpt.pt")
    stored = checkpoint["train_config"] | checkpoint["model_config"]
    wanted = asdict(config) | settings
    for key in wanted.keys() - OF_THE_MACHINE:
        if stored[key] != wanted[key]:
            difference = f"another {key} ({stored[key]}, now {wanted[key]})"
            raise UserError(f"{out_dir} was begun with {difference}: choose another --out")
    last_row = checkpoint["log"][-1]  # there is one, of step 0 at least
    return 0 if last_row["step"] == config.max_steps else config.max_steps


def start(out_dir: Path, arguments: list[str], jobs: int) -> subprocess.Popen:
    """Begin or go on with a run; what it prints goes to OUT_DIR.log."""
    command = [sys.executable, "-m", "lab.baselines", *arguments]
    if (out_dir / "ckpt.pt").exists():
        command.append("--resume")
    threads = (os.cpu_count() or 1) // jobs or 1
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out_dir}.log", "ab") as log:
        # In a session of its own, because Ctrl-C is for the sweep.
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def catch_signals() -> list[int]:
    """Return a list that receives the signals which ask to stop, until there is a second one."""
    signals = []

    def receive(number: int, frame) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second one ends the sweep at once
        os.write(2, b"\nthe runs finish their step and save; once more to end at once\n")

    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it for SIGHUP
            signal.signal(number, receive)
    return signals


def ended_well(out_dir: Path, status: int, steps: int) -> bool:
    """Say what became of a run that has ended, and return whether it did all its steps."""
    if status == 0 and steps_done(out_dir) == steps:
        val_loss = float(read_rows(out_dir / "log.csv")[-1]["val_loss"])
        tqdm.write(f"{out_dir}: validation loss {val_loss:.4f}")
        return True
    said = Path(f"{out_dir}.log").read_text(errors="replace").strip().splitlines() or ["nothing"]
    tqdm.write(f"{out_dir} ended with status {status}, and said: {said[-1]}")
    return False


def sweep(runs: dict[Path, list[str]], jobs: int) -> None:
    """Train what is not finished, `jobs` at a time; runs that fail are reported at the end."""
    steps = {out_dir: steps_to_do(out_dir, arguments) for out_dir, arguments in runs.items()}
    todo = [out_dir for out_dir in runs if steps[out_dir] > 0]
    n_finished = len(runs) - len(todo)
    print(f"{len(runs)} runs, {n_finished} of them finished already, {jobs} at a time", flush=True)
    waiting = list(todo)
    running = {}
    failed = []
    signals = catch_signals()
    done = sum(map(steps_done, todo))
    bar = tqdm(total=sum(steps.values()), initial=done, unit="step", mininterval=10)
    try:
        while (running or waiting) and not signals:
            while waiting and len(running) < jobs:
                out_dir = waiting.pop(0)
                running[out_dir] = start(out_dir, runs[out_dir], jobs)
            time.sleep(0.5)
            for out_dir, process in list(running.items()):
                if process.poll() is not None and not signals:
                    del running[out_dir]
                    if not ended_well(out_dir, process.returncode, steps[out_dir]):
                        failed.append(str(out_dir))
            bar.update(sum(map(steps_done, todo)) - bar.n)
    finally:
        for process in running.values():
            process.terminate()  # it finishes its step and saves
        for process in running.values():
            process.wait()
        bar.close()
    if signals:
        print("stopped; the same command goes on")
    if failed:
        names = ", ".join(failed)
        raise UserError(f"{len(failed)} of {len(todo)} runs failed: {names}; see the .log of each")


class Evaluation(NamedTuple):
    """One evaluation of one run: a row of the CSV files in lab/results/."""

    arm: str  # name of the config file
    seed: int
    data: str  # beginning of the checksum of the training tokens
    evaluated_on: str  # the same of the validation tokens
    eval_tokens: int  # how many of them, about
    tokens: int  # that the run is to be trained on in all
    training: str  # checksum of all settings of the training but those in NOT_IN_CHECKSUM
    model: str  # checksum of the model's settings
    parameters: int
    active: int  # parameters that a token uses
    multiply_adds: int  # per token, of a forward pass
    learning_rate: float
    at_token: int  # when this evaluation was made
    val_loss: float  # nats per token, cross-entropy alone
    tokens_per_s: float | None  # since the evaluation before


Runs = dict[tuple[str, int], list[Evaluation]]  # by arm and seed, the evaluations in their order


def evaluations_in(path: Path) -> list[Evaluation]:
    """Return the rows of a file that `table --csv` wrote."""
    kinds = Evaluation.__annotations__ | {"tokens_per_s": float}
    rows = []
    try:
        for texts in read_rows(path):
            values = {name: kinds[name](text) if text else None for name, text in texts.items()}
            row = Evaluation(**values)
            if None in row[:-1] or not math.isfinite(row.val_loss) or row.tokens <= 0:
                raise ValueError("a value is missing")
            rows.append(row)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        message = f"{path} is not a file that lab.compare table --csv wrote"
        raise UserError(f"{message} ({error!r:.100})") from error
    return rows


def checksum(settings: dict) -> str:
    """Return eight hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def evaluations_of(out_dir: Path) -> list[Evaluation]:
    """Return what a run's folder holds."""
    checkpoint = train.load_checkpoint(out_dir / "ckpt.pt")
    config = train.TrainConfig(**checkpoint["train_config"])
    model_config = ModelConfig(**checkpoint["model_config"])
    arm, _, seed = out_dir.name.rpartition("-")
    if not arm or seed != str(config.seed):
        raise UserError(f"{out_dir} should be called ARM-{config.seed}, for that is its seed")
    training = {key: x for key, x in asdict(config).items() if key not in NOT_IN_CHECKSUM}
    splits = checkpoint["data"]["splits"]
    step_tokens = config.grad_accum * config.batch_size * model_config.block_size
    costs = cost(GPT(model_config))
    evaluations = []
    for row in checkpoint["log"]:
        evaluation = Evaluation(
            arm=arm,
            seed=config.seed,
            data=splits["train"]["sha256"][:12],
            evaluated_on=splits["val"]["sha256"][:12],
            eval_tokens=config.eval_tokens,
            tokens=config.max_steps * step_tokens,
            training=checksum(training),
            model=checksum(asdict(model_config)),
            parameters=costs["parameters"],
            active=costs["active"],
            multiply_adds=costs["multiply_adds"],
            learning_rate=config.learning_rate,
            at_token=row["tokens"],
            val_loss=row["val_loss"],
            tokens_per_s=row["tokens_per_s"] or None,  # 0 before the first step
        )
        evaluations.append(evaluation)
    return evaluations


def finished(rows: list[Evaluation]) -> bool:
    """Say whether a run has been evaluated after its last token."""
    return bool(rows) and rows[-1].at_token == rows[-1].tokens


def collect_runs(paths: list[Path]) -> Runs:
    """Return the evaluations of all runs in folders of runs and in CSV files, if comparable."""
    everything = []
    for path in paths:
        rows = evaluations_in(path) if path.is_file() else []
        for checkpoint in sorted(path.glob("*/ckpt.pt")):
            rows += evaluations_of(checkpoint.parent)
        if not rows:
            command = f"python -m lab.compare sweep lab/configs/ablation --out {path}"
            raise UserError(f"{path} holds no runs: {command}")
        everything += rows
    runs = {}
    for row in sorted(everything, key=lambda row: (row.arm, row.seed, row.at_token)):
        runs.setdefault((row.arm, row.seed), []).append(row)
    check_comparable(runs)
    return runs


def check_comparable(runs: Runs) -> None:
    """Raise a UserError, naming two runs and what differs, unless all losses can be compared."""
    first_of_all = next(iter(runs.values()))[0]
    first_of_arm = {}
    for (arm, seed), rows in runs.items():
        first = first_of_arm.setdefault(arm, rows[0])
        for row in rows:
            for name in COLUMNS_THAT_MUST_AGREE + COLUMNS_OF_AN_ARM:
                other = first_of_all if name in COLUMNS_THAT_MUST_AGREE else first
                ours = getattr(row, name)
                theirs = getattr(other, name)
                if ours != theirs:
                    names = f"{arm}-{seed} and {other.arm}-{other.seed}"
                    difference = f"{names} differ in {name} ({ours} and {theirs})"
                    raise UserError(f"{difference}, so their losses can't be compared")
        if len(rows) != len({row.at_token for row in rows}):
            raise UserError(f"{arm}-{seed} is there twice")


class Arm(NamedTuple):
    """What became of an arm's finished runs, beside another arm's of the same seeds."""

    last: Evaluation  # of its first seed
    differences: list[float]  # to the other arm's loss with the same seed
    gap: float  # their mean
    half_width: float  # of its 95 % interval
    curve: list[tuple[int, float]]  # tokens, and the loss then, the mean over seeds
    tokens_per_s: float  # median over all stretches of all seeds; nan if it was not measured


def summarize(runs: Runs, against: str) -> dict[str, Arm]:
    """Return what became of each arm, the best first, for the seeds that both have finished."""
    pairs = {}
    for (arm, seed), rows in runs.items():
        other_rows = runs.get((against, seed), [])
        if finished(rows) and finished(other_rows):
            pairs.setdefault(arm, []).append((rows, other_rows))
    if not pairs:
        names = ", ".join(sorted({arm for arm, _ in runs}))
        raise UserError(f"no run of {against!r} is finished; there are runs of {names}")
    arms = {}
    for arm, pairs_of_arm in pairs.items():
        differences = [ours[-1].val_loss - theirs[-1].val_loss for ours, theirs in pairs_of_arm]
        # Each moment has a row of every seed.
        moments = list(zip(*(ours for ours, _ in pairs_of_arm), strict=True))
        curve = [(rows[0].at_token, fmean(row.val_loss for row in rows)) for rows in moments]
        all_rows = itertools.chain(*moments)
        speeds = [row.tokens_per_s for row in all_rows if row.tokens_per_s] or [math.nan]
        arms[arm] = Arm(
            last=moments[-1][0],
            differences=differences,
            gap=fmean(differences),
            half_width=half_width(differences),
            curve=curve,
            tokens_per_s=median(speeds),
        )
    return dict(sorted(arms.items(), key=lambda item: item[1].gap))


def print_table(runs: Runs, against: str) -> None:
    """Print a row per arm, and what is not in it."""
    arms = summarize(runs, against)
    other = arms[against].last
    seconds = other.tokens / max(arm.tokens_per_s for arm in arms.values())
    is_measured = math.isfinite(seconds)
    print(f"trained on {other.tokens:,} tokens ({other.data}), ", end="")
    print(f"evaluated on about {other.eval_tokens:,} ({other.evaluated_on})")
    print(f"loss: nats per token; difference to {against} with the same seed, ", end="")
    print("mean and 95 % interval")
    if is_measured:
        print(f"at {seconds:.0f} s the fastest arm is done; ", end="")
        print("slower ones are in mid-schedule (interpolated)")
    header = f"{'parameters':>28}{'multiply-adds':>15}{'×':>6}{'rate':>8}{'seeds':>7}{'loss':>9}"
    header += f"{'difference':>30}"
    if is_measured:
        header += f"{f'at {seconds:.0f} s':>11}{'tokens/s':>10}{'×':>6}"
    print(header)
    for name, arm in arms.items():
        relative = arm.last.multiply_adds / other.multiply_adds
        low = arm.gap - arm.half_width
        high = arm.gap + arm.half_width
        difference = f"{arm.gap:+.4f}"
        if low < high:  # not so for a single seed, nor for the arm itself
            difference += f" ({low:+.4f} to {high:+.4f})"
        line = f"{name:16}{arm.last.parameters:12,}{arm.last.multiply_adds:15,}{relative:6.2f}"
        line += f"{arm.last.learning_rate:8g}{len(arm.differences):7}"
        line += f"{arm.curve[-1][1]:9.4f}{difference:>30}"
        if is_measured:
            tokens, losses = zip(*arm.curve, strict=True)
            loss_then = np.interp(seconds * arm.tokens_per_s, tokens, losses)
            speed = arm.tokens_per_s / arms[against].tokens_per_s
            line += f"{loss_then:11.4f}{arm.tokens_per_s:10,.0f}{speed:6.2f}"
        print(line)
    for (name, seed), rows in runs.items():
        if not (finished(rows) and finished(runs.get((against, seed), []))):
            print(f"Left out: {name}-{seed}, at {rows[-1].at_token:,} tokens; ", end="")
            print(f"it or {against}-{seed} is not finished.")


def write_csv(path: Path, runs: Runs) -> None:
    """Write all evaluations, a row each."""
    check_target(path)
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Evaluation._fields, *itertools.chain(*runs.values())])


def draw(path: Path, runs: Runs, against: str) -> None:
    """Draw differences with their intervals, and the losses against tokens, compute and time."""
    arms = summarize(runs, against)
    check_target(path)
    figure = new_figure(13, 9)
    differences, *curves = figure.subplots(2, 2).flat
    for i, (name, arm) in enumerate(arms.items()):  # the best one on top
        color = f"C{i}" if i < 5 else "darkgray"
        differences.errorbar(arm.gap, i, xerr=arm.half_width, fmt="o", color=color, capsize=4)
        heights = [i] * len(arm.differences)
        differences.plot(arm.differences, heights, "|", color=color, markersize=10)
        tokens, losses = np.transpose(arm.curve[1:] or arm.curve)  # the untrained loss left out
        scales = {
            "million tokens": 1e-6,
            "multiply-adds, forward and backward, in 10¹²": 3e-12 * arm.last.multiply_adds,
            "seconds of training, at the arm's median speed": 1 / arm.tokens_per_s,
        }
        for axis, (label, scale) in zip(curves, scales.items(), strict=True):
            axis.plot(tokens * scale, losses, color=color)
            axis.annotate(
                name,
                (tokens[-1] * scale, losses[-1]),
                (1.02, 0.05 * (len(arms) - i)),  # beside the axes
                textcoords="axes fraction",
                va="center",
                color=color,
                arrowprops=dict(arrowstyle="-", color=color, linewidth=0.5, relpos=(0, 0.5)),
            )
            axis.set(xlabel=label, ylabel="validation loss, nats per token")
    differences.axvline(0, color="gray", linewidth=1)
    differences.set(yticks=range(len(arms)), yticklabels=arms)
    differences.set_xlabel(f"loss less that of {against}: mean, 95 % interval")
    differences.invert_yaxis()
    save_png(path, figure)


def seed_range(text: str) -> range:
    """Read "5" as the seeds 1 to 5, and "4-5" as 4 and 5."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)", text)
    seeds = range(int(match[1] or 1), int(match[2]) + 1) if match else ()
    if not seeds:
        advice = "a number, for seeds 1 to that, or a range such as 4-5"
        raise UserError(f"--seeds must be {advice}, got {text!r}")
    return seeds


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, prog="python -m lab.compare")
    add = commands.add_parser("sweep", allow_abbrev=False).add_argument
    add("folder", type=Path, help="of base.toml and a file per arm; then settings of train.py")
    add("--arms", nargs="+", default=[], metavar="ARM", help="only these (default: all)")
    add("--seeds", default="5", help="1 to this number, or a range such as 4-5 (default: 5)")
    add("--jobs", type=int, default=1, help="trainings at once, which share cores (default: 1)")
    add("--out", type=Path, help="folder of the runs (default: out/ and the folder's name)")
    table = commands.add_parser("table")
    plot = commands.add_parser("plot")
    for command in (table, plot):
        command.add_argument("paths", type=Path, nargs="+", help="folders of runs, or CSV files")
        command.add_argument("--against", default="sum", help="the arm to compare with")
    table.add_argument("--csv", type=Path, help="a file to write all evaluations to")
    plot.add_argument("png", type=Path)
    args, settings = parser.parse_known_args()
    if args.command == "sweep":
        if args.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {args.jobs}")
        out = args.out or Path("out", args.folder.resolve().name)
        runs = plan_runs(args.folder, args.arms, seed_range(args.seeds), out, settings)
        sweep(runs, args.jobs)
        return
    if settings:
        raise UserError(f"unknown: {' '.join(settings)} (see python -m lab.compare --help)")
    runs = collect_runs(args.paths)
    if args.command == "plot":
        draw(args.png, runs, args.against)
    else:
        print_table(runs, args.against)
        if args.csv:
            write_csv(args.csv, runs)


if __name__ == "__main__":
    run(main)
