"""Compare the losses of runs that differ in how they combine experts, seed by seed.

    python -m lab.compare table out/ablation         # a row per arm: loss, difference to sum, cost
    python -m lab.compare plot out/ablation quality.png

The folder holds a folder ARM-SEED for each run of train.py; lab/README.md has the loop that trains
them. Runs of one seed have the same data in the same order and the same first weights, so arms are
compared by the differences between such pairs.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from lab.cost import count
from lab.shared import check_target, half_width, new_figure, paired_differences, read_rows, save_png
from model import ModelConfig
from train import TrainConfig, load_checkpoint

# Settings of train.py that say where and how a run is computed, not what it is.
SETTINGS_OF_THE_MACHINE = {"out_dir", "device", "compile", "resume"}
# Settings that may differ between runs whose losses are compared; each is a column of its own.
SETTINGS_OF_A_RUN = {"seed", "learning_rate", "min_lr", "init_from"}
# Columns that must agree between all runs of a table, and between those of one arm.
COLUMNS_OF_ALL = ("data", "evaluated_on", "eval_tokens", "tokens", "training")
COLUMNS_OF_AN_ARM = ("model", "learning_rate", "min_lr", "init_from")


class Evaluation(NamedTuple):
    """One evaluation of one run: a row of the CSV files in lab/results/."""

    arm: str  # name of the config file
    seed: int
    data: str  # beginning of the checksum of the training tokens
    evaluated_on: str  # the same of the validation tokens
    eval_tokens: int  # how many of these are read, roughly
    tokens: int  # that the run is to be trained on in all
    training: str  # checksum of all other settings of the training
    model: str  # checksum of the model's settings
    parameters: int
    active: int  # parameters that a token uses
    multiply_adds: int  # per token, of a forward pass
    learning_rate: float
    min_lr: float
    init_from: str
    at_token: int  # when this evaluation was made
    val_loss: float  # nats per token, cross-entropy alone
    tokens_per_s: float  # since the evaluation before; nan if unknown


Runs = dict[tuple[str, int], list[Evaluation]]  # by arm and seed, the evaluations in their order


def checksum(settings: dict) -> str:
    """Return eight hexadecimal digits that tell settings apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def read_run(out_dir: Path) -> list[Evaluation]:
    """Return the evaluations of a run, from its folder."""
    checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    config = TrainConfig(**checkpoint["train_config"])
    model_config = ModelConfig(**checkpoint["model_config"])
    arm, _, seed = out_dir.name.rpartition("-")
    if not arm or seed != str(config.seed):
        raise SystemExit(
            f"error: {out_dir} should be called ARM-{config.seed}, for that is its seed"
        )
    training = asdict(config)
    for key in SETTINGS_OF_THE_MACHINE | SETTINGS_OF_A_RUN:
        del training[key]
    splits = checkpoint["data"]["splits"]
    step_tokens = config.grad_accum * config.batch_size * model_config.block_size
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
            **count(model_config)._asdict(),  # parameters, active, multiply_adds
            learning_rate=config.learning_rate,
            min_lr=config.min_lr,
            init_from=config.init_from,
            at_token=row["tokens"],
            val_loss=row["val_loss"],
            tokens_per_s=row["tokens_per_s"],
        )
        evaluations.append(evaluation)
    return evaluations


def collect_runs(paths: list[Path]) -> Runs:
    """Return the evaluations of all runs in folders of runs and in CSV files, if comparable."""
    evaluations = []
    for path in paths:
        rows_of_path = read_rows(path, Evaluation) if path.is_file() else []
        for checkpoint in path.glob("*/ckpt.pt"):
            rows_of_path += read_run(checkpoint.parent)
        if not rows_of_path:
            raise SystemExit(f"error: {path} holds no runs")
        evaluations += rows_of_path
    evaluations.sort(key=lambda row: (row.arm, row.seed, row.at_token))
    runs = {}
    first_of_arm = {}
    for row in evaluations:
        check_comparable(row, evaluations[0], COLUMNS_OF_ALL)
        check_comparable(row, first_of_arm.setdefault(row.arm, row), COLUMNS_OF_AN_ARM)
        rows_of_run = runs.setdefault((row.arm, row.seed), [])
        if rows_of_run and rows_of_run[-1].at_token == row.at_token:
            raise SystemExit(f"error: {row.arm}-{row.seed} is there twice")
        rows_of_run.append(row)
    return runs


def check_comparable(row: Evaluation, other: Evaluation, columns: tuple[str, ...]) -> None:
    """Exit if two evaluations differ in one of the columns."""
    for name in columns:
        if getattr(row, name) != getattr(other, name):
            names = f"{row.arm}-{row.seed} and {other.arm}-{other.seed}"
            values = f"{getattr(row, name)} and {getattr(other, name)}"
            raise SystemExit(f"error: {names} can't be compared: they differ in {name} ({values})")


class Arm(NamedTuple):
    """An arm compared with another one, over the seeds that both have finished."""

    last: Evaluation  # of its first seed
    differences: list[float]  # its loss less the other's with the same seed
    mean: float  # of the differences
    half_width: float  # of its 95 % interval
    curve: list[tuple[int, float]]  # tokens, and the mean loss then
    tokens_per_s: float  # median of all stretches of all seeds


def summarize(runs: Runs, against: str) -> dict[str, Arm]:
    """Return what became of each arm, the best one first."""
    finished = {key for key, rows in runs.items() if rows[-1].at_token == rows[-1].tokens}
    by_arm = {}
    for arm, seed in runs:
        if (arm, seed) in finished and (against, seed) in finished:
            by_arm.setdefault(arm, {})[seed] = runs[arm, seed]
        else:
            print(f"left out: {arm}-{seed}, because it or {against}-{seed} is not finished")
    if against not in by_arm:
        names = ", ".join(sorted({arm for arm, _ in runs}))
        raise SystemExit(f"error: no run of {against!r} is finished; there are runs of {names}")
    losses = {}
    for arm, by_seed in by_arm.items():
        losses[arm] = {seed: rows[-1].val_loss for seed, rows in by_seed.items()}
    arms = {}
    for arm, by_seed in by_arm.items():
        differences = list(paired_differences(losses[arm], losses[against]).values())
        curve = []
        for rows in zip(*by_seed.values(), strict=True):  # of all seeds at one moment
            curve.append((rows[0].at_token, fmean(row.val_loss for row in rows)))
        speeds = [row.tokens_per_s for row in itertools.chain(*by_seed.values())]
        arms[arm] = Arm(
            last=next(iter(by_seed.values()))[-1],
            differences=differences,
            mean=fmean(differences),
            half_width=half_width(differences),
            curve=curve,
            tokens_per_s=median([speed for speed in speeds if speed > 0] or [math.nan]),
        )
    return dict(sorted(arms.items(), key=lambda item: item[1].mean))


def print_table(runs: Runs, against: str) -> None:
    """Print a row per arm."""
    arms = summarize(runs, against)
    other = arms[against]
    speeds = [arm.tokens_per_s for arm in arms.values() if arm.tokens_per_s > 0]
    seconds = other.last.tokens / max(speeds, default=math.nan)
    print(f"trained on {other.last.tokens:,} tokens ({other.last.data}), ", end="")
    print(f"evaluated on about {other.last.eval_tokens:,} ({other.last.evaluated_on})")
    print(f"loss in nats per token; difference to {against} with the same seed: ", end="")
    print("mean and 95 % interval")
    print(f"after {seconds:.0f} s (nan: not measured) the fastest arm is done, ", end="")
    print("and slower ones are in mid-schedule")
    print(f"{'parameters':>28}{'multiply-adds':>15}{'×':>6}{'rate':>8}{'seeds':>7}", end="")
    print(f"{'loss':>9}{'difference':>30}{f'at {seconds:.0f} s':>11}{'tokens/s':>10}{'×':>6}")
    for name, arm in arms.items():
        relative = arm.last.multiply_adds / other.last.multiply_adds
        tokens, losses = zip(*arm.curve, strict=True)
        loss_at_equal_time = np.interp(seconds * arm.tokens_per_s, tokens, losses)
        low = arm.mean - arm.half_width
        high = arm.mean + arm.half_width
        difference = f"{arm.mean:+.4f} ({low:+.4f} to {high:+.4f})"
        print(f"{name:16}{arm.last.parameters:12,}{arm.last.multiply_adds:15,}", end="")
        print(f"{relative:6.2f}{arm.last.learning_rate:8g}{len(arm.differences):7}", end="")
        print(f"{losses[-1]:9.4f}{difference:>30}{loss_at_equal_time:11.4f}", end="")
        print(f"{arm.tokens_per_s:10,.0f}{arm.tokens_per_s / other.tokens_per_s:6.2f}")


def draw(path: Path, runs: Runs, against: str) -> None:
    """Draw differences with their intervals, and the losses against tokens, compute and time."""
    check_target(path, ".png")
    arms = summarize(runs, against)
    figure = new_figure(13, 9)
    differences, *curves = figure.subplots(2, 2).flat
    for i, (name, arm) in enumerate(arms.items()):  # the best one on top
        differences.errorbar(arm.mean, i, xerr=arm.half_width, fmt="o", color=f"C{i}", capsize=4)
        heights = [i] * len(arm.differences)
        differences.plot(arm.differences, heights, "|", color=f"C{i}", markersize=10)
        tokens, losses = np.transpose(arm.curve[1:])  # the untrained loss left out
        scales = {
            "million tokens": 1e-6,
            "multiply-adds, forward and backward, in 10¹²": 3e-12 * arm.last.multiply_adds,
            "seconds of training, at the arm's median speed": 1 / arm.tokens_per_s,
        }
        for axis, (label, scale) in zip(curves, scales.items(), strict=True):
            axis.plot(tokens * scale, losses, color=f"C{i}", label=name)
            axis.set(xlabel=label, ylabel="validation loss, nats per token")
            axis.legend()
    differences.axvline(0, color="gray", linewidth=1)
    differences.set(yticks=range(len(arms)), yticklabels=arms)
    differences.set_xlabel(f"loss less that of {against}: mean, 95 % interval")
    differences.invert_yaxis()
    save_png(path, figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, prog="python -m lab.compare")
    table = commands.add_parser("table")
    plot = commands.add_parser("plot")
    for command in (table, plot):
        command.add_argument("paths", type=Path, nargs="+", help="folders of runs, or CSV files")
        command.add_argument("--against", default="sum", help="the arm to compare with")
    table.add_argument("--csv", type=Path, help="a file to write all evaluations to")
    plot.add_argument("png", type=Path)
    args = parser.parse_args(arguments)
    runs = collect_runs(args.paths)
    if args.command == "plot":
        draw(args.png, runs, args.against)
    else:
        if args.csv:
            check_target(args.csv, ".csv")
            with open(args.csv, "w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([Evaluation._fields, *itertools.chain(*runs.values())])
        print_table(runs, args.against)


if __name__ == "__main__":
    main()
