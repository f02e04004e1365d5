"""Train the arms of a comparison with several seeds, and say what became of them.

    python -m lab.compare sweep lab/configs/ablation --seeds 5 --jobs 2   # whatever is missing of every arm and seed
    python -m lab.compare table out/ablation                              # a row per arm: loss, difference to sum, cost
    python -m lab.compare plot out/ablation quality.png

A folder of arms holds base.toml, what all of them share, and a file per arm with its difference. Runs of one seed have
the same data in the same order and the same first weights, so differences between arms are of such pairs.
"""

import argparse
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import lab.baselines  # noqa: F401  a checkpoint may be one of them
import train
from prepare import Parser, open_dataset, replacing, require, run

OF_THE_MACHINE = {"out_dir", "device", "compile", "resume"}  # settings that may differ without making another run
EQUAL = ("data", "evaluated_on", "eval_tokens", "tokens", "training")  # what all runs of a table must share
OF_AN_ARM = ("model", "learning_rate")  # what all runs of an arm must share
FREE = {"seed", "learning_rate", "min_lr", "init_from"} | OF_THE_MACHINE  # not in the checksum `training`
# Student's t: the 97.5 % quantiles for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
STUDENT_T += (2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064)


def plan_runs(folder: Path, arms: list[str], seeds: range, out: Path, settings: list[str]) -> dict[Path, list[str]]:
    """Settings of each run by its folder; seed by seed, so that unfinished sweeps compare, too. Raises ValueError."""
    files = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    base = files.pop("base", None)
    require(base and files, f"{folder} must hold base.toml, and beside it a file per arm, to be swept")
    unknown = [arm for arm in arms if arm not in files]
    require(not unknown, f"{folder} has no arm {', '.join(unknown)}; there are: {', '.join(files)}")
    own = [setting for setting in settings if setting.split("=")[0] in ("--seed", "--out_dir", "--resume")]
    require(not own, f"{', '.join(own)}: the sweep sets that itself; see --seeds and --out")
    runs = {}
    for seed, arm in itertools.product(seeds, arms or files):
        filled = [setting.replace("{arm}", arm).replace("{seed}", str(seed)) for setting in settings]
        out_dir = out / f"{arm}-{seed}"
        runs[out_dir] = [str(base), str(files[arm]), *filled, f"--seed={seed}", f"--out_dir={out_dir}"]
    return runs


def steps_done(out_dir: Path) -> int:
    """The step of a run's last evaluation, 0 if there was none."""
    log = out_dir / "log.csv"
    return int(read_rows(log)[-1]["step"]) if log.exists() else 0


def steps_to_do(out_dir: Path, arguments: list[str]) -> int:
    """max_steps of a run, 0 if it has done them all. Raises ValueError if its folder holds another run."""
    settings = train.read_settings(arguments)
    config = train.make_config(train.TrainConfig, settings)
    open_dataset(config.dataset)  # or say how to prepare it
    if not (out_dir / "ckpt.pt").exists():
        return config.max_steps
    _, checkpoint = train.load_checkpoint(out_dir / "ckpt.pt")
    there, wanted = checkpoint["train_config"] | checkpoint["model_config"], asdict(config) | settings
    for key in wanted.keys() - OF_THE_MACHINE:
        what = f"{out_dir} was begun with another {key} ({there[key]}, now {wanted[key]})"
        require(there[key] == wanted[key], f"{what}: choose another --out")
    return 0 if checkpoint["step"] == config.max_steps else config.max_steps


def start(out_dir: Path, arguments: list[str], jobs: int) -> subprocess.Popen:
    """Begin or go on with a run; what it prints is in OUT_DIR.log, because train.py wants to make OUT_DIR itself."""
    resume = ["--resume"] if (out_dir / "ckpt.pt").exists() else []
    environment = {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // jobs or 1), **os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "lab.baselines", *arguments, *resume]
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out_dir}.log", "ab") as log:  # in a session of its own: Ctrl-C is for the sweep
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def sweep(runs: dict[Path, list[str]], jobs: int) -> None:
    """Train what is not finished, `jobs` at a time. Raises ValueError, when all others are done, if runs failed."""
    steps = {out_dir: steps_to_do(out_dir, arguments) for out_dir, arguments in runs.items()}
    todo = [out_dir for out_dir in runs if steps[out_dir]]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished already, {jobs} at a time", flush=True)
    waiting, running, failed, stop = list(todo), {}, [], train.StopRequest()
    bar = tqdm(total=sum(steps.values()), initial=sum(map(steps_done, todo)), unit="step", mininterval=10)
    try:
        while (running or waiting) and not stop.seen:
            while waiting and len(running) < jobs:
                out_dir = waiting.pop(0)
                running[out_dir] = start(out_dir, runs[out_dir], jobs)
            time.sleep(0.5)
            for out_dir, process in list(running.items()):
                if process.poll() is None or stop.seen:
                    continue
                del running[out_dir]
                if process.returncode == 0 and steps_done(out_dir) == steps[out_dir]:
                    tqdm.write(f"{out_dir}: validation loss {read_rows(out_dir / 'log.csv')[-1]['val_loss']}")
                else:
                    failed.append(str(out_dir))
                    said = Path(f"{out_dir}.log").read_text(errors="replace").strip().splitlines() or ["nothing"]
                    tqdm.write(f"{out_dir} ended with status {process.returncode}, and said: {said[-1]}")
            bar.update(sum(map(steps_done, todo)) - bar.n)
    finally:
        for process in running.values():
            process.terminate()  # it finishes its step and saves
        for process in running.values():
            process.wait()
        bar.close()
    if stop.seen:
        print("stopped; the same command goes on")
    require(not failed, f"{len(failed)} of {len(todo)} runs failed: {', '.join(failed)}; see the .log beside each")


class Evaluation(NamedTuple):
    """One evaluation of one run: a row of the CSV files in lab/results/."""

    arm: str  # name of the config file
    seed: int
    data: str  # beginning of the checksum of the training tokens
    evaluated_on: str  # the same of the validation tokens
    eval_tokens: int  # how many of them, about
    tokens: int  # that the run is to be trained on in all
    training: str  # checksum of all settings of the training but those in FREE
    model: str  # checksum of the model's settings
    parameters: int
    active: int  # parameters that a token uses
    multiply_adds: int  # per token, of a forward pass
    learning_rate: float
    at_token: int  # when this evaluation was made
    val_loss: float  # nats per token, cross-entropy alone
    tokens_per_s: float | None  # since the evaluation before


Runs = dict[tuple[str, int], list[Evaluation]]  # by arm and seed, the evaluations in their order


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def evaluations_in(path: Path) -> list[Evaluation]:
    """The rows of a file that `table --csv` wrote. Raises ValueError."""
    kinds, rows = Evaluation.__annotations__ | {"tokens_per_s": float}, []
    try:
        for texts in read_rows(path):
            row = Evaluation(**{name: kinds[name](text) if text else None for name, text in texts.items()})
            require(None not in row[:-1] and math.isfinite(row.val_loss) and row.tokens > 0, "a value is missing")
            rows.append(row)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a file that lab.compare table --csv wrote ({error!r:.100})") from error
    return rows


def evaluations_of(out_dir: Path) -> list[Evaluation]:
    """What a run's folder holds. Raises ValueError."""
    model, checkpoint = train.load_checkpoint(out_dir / "ckpt.pt")
    config, cost = train.TrainConfig(**checkpoint["train_config"]), model.cost()
    arm, _, seed = out_dir.name.rpartition("-")
    require(arm and seed == str(config.seed), f"{out_dir} should be called ARM-{config.seed}, for that is its seed")
    settings = {key: value for key, value in asdict(config).items() if key not in FREE}, asdict(model.config)
    texts = (json.dumps(each, sort_keys=True).encode() for each in settings)
    run = {
        "arm": arm,
        "seed": config.seed,
        "data": checkpoint["data"]["train"][:12],
        "evaluated_on": checkpoint["data"]["val"][:12],
        "eval_tokens": config.eval_tokens,
        "tokens": config.max_steps * config.grad_accum * config.batch_size * model.config.block_size,
        "learning_rate": config.learning_rate,
    }
    run["training"], run["model"] = (hashlib.sha256(text).hexdigest()[:8] for text in texts)
    run |= {key: cost[key] for key in ("parameters", "active", "multiply_adds")}
    measured = [(row["tokens"], row["val_loss"], row["tokens_per_s"]) for row in checkpoint["log"]]
    return [Evaluation(**run, at_token=n, val_loss=loss, tokens_per_s=speed) for n, loss, speed in measured]


def finished(rows: list[Evaluation]) -> bool:
    """Whether a run has been evaluated after its last token."""
    return bool(rows) and rows[-1].at_token == rows[-1].tokens


def collect_runs(paths: list[Path]) -> Runs:
    """The evaluations of all runs in folders of runs and in CSV files. Raises ValueError if they can't be compared."""
    everything = []
    for path in paths:
        found = evaluations_in(path) if path.is_file() else []
        for checkpoint in sorted(path.glob("*/ckpt.pt")):
            found += evaluations_of(checkpoint.parent)
        require(found, f"{path} holds no runs: python -m lab.compare sweep lab/configs/ablation --out {path}")
        everything += found
    runs = {}
    for row in sorted(everything, key=lambda row: (row.arm, row.seed, row.at_token)):
        runs.setdefault((row.arm, row.seed), []).append(row)
    check_comparable(runs)
    return runs


def check_comparable(runs: Runs) -> None:
    """Raise ValueError, naming two runs and what differs, unless all their losses can be compared."""
    of_all, of_arm = next(iter(runs.values())), {}
    for (arm, seed), rows in runs.items():
        first = of_arm.setdefault(arm, rows)
        for row, name in itertools.product(rows, EQUAL + OF_AN_ARM):
            other = of_all[0] if name in EQUAL else first[0]
            ours, theirs = getattr(row, name), getattr(other, name)
            what = f"{arm}-{seed} and {other.arm}-{other.seed} differ in {name} ({ours} and {theirs})"
            require(ours == theirs, f"{what}, so their losses can't be compared")
        require(len(rows) == len({row.at_token for row in rows}), f"{arm}-{seed} is there twice")


class Arm(NamedTuple):
    """What became of an arm's finished runs, beside those of the arm that it is compared with, seed by seed."""

    last: Evaluation  # of its first seed
    differences: list[float]  # to the other arm's loss with the same seed
    gap: float  # their mean
    half_width: float  # of its 95 % interval
    curve: list[tuple[int, float]]  # tokens, and the loss then, the mean over seeds
    tokens_per_s: float  # median over all stretches of all seeds; nan if it was not measured


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of their mean (Student's t), beyond 25 values a bit too wide; of a single one nan."""
    n = len(values)
    return STUDENT_T[min(n - 1, len(STUDENT_T)) - 1] * stdev(values) / n**0.5 if n > 1 else math.nan


def summarize(runs: Runs, against: str) -> dict[str, Arm]:
    """What became of each arm, the best first, for the seeds that `against` has finished, too. Raises ValueError."""
    pairs, arms = {}, {}
    for (arm, seed), rows in runs.items():
        other = runs.get((against, seed), [])
        if finished(rows) and finished(other):
            pairs.setdefault(arm, []).append((rows, other))
    require(pairs, f"no run of {against!r} is finished; there are runs of {', '.join(sorted({a for a, _ in runs}))}")
    for arm, pairs_of_arm in pairs.items():
        differences = [ours[-1].val_loss - theirs[-1].val_loss for ours, theirs in pairs_of_arm]
        moments = list(zip(*(ours for ours, _ in pairs_of_arm), strict=True))  # each with a row of every seed
        curve = [(rows[0].at_token, fmean(row.val_loss for row in rows)) for rows in moments]
        speeds = [row.tokens_per_s for row in itertools.chain(*moments) if row.tokens_per_s] or [math.nan]
        arms[arm] = Arm(moments[-1][0], differences, fmean(differences), half_width(differences), curve, median(speeds))
    return dict(sorted(arms.items(), key=lambda item: item[1].gap))


def print_table(runs: Runs, against: str) -> None:
    """A row per arm, and what is not in it."""
    arms = summarize(runs, against)
    of, speed = arms[against].last, arms[against].tokens_per_s
    seconds = of.tokens / max(arm.tokens_per_s for arm in arms.values())
    measured = math.isfinite(seconds)
    print(f"trained on {of.tokens:,} tokens ({of.data}), evaluated on about {of.eval_tokens:,} ({of.evaluated_on})")
    print(f"loss: nats per token; difference to {against} with the same seed, mean and 95 % interval")
    if measured:
        print(f"at {seconds:.0f} s the fastest arm is done; slower ones are in mid-schedule (interpolated)")
    print(f"{'':16}{'parameters':>12}{'multiply-adds':>15}{'×':>6}{'rate':>8}{'seeds':>7}{'loss':>9}", end="")
    print(f"{'difference':>30}" + (f"{f'at {seconds:.0f} s':>11}{'tokens/s':>10}{'×':>6}" if measured else ""))
    for name, arm in arms.items():
        low, high = arm.gap - arm.half_width, arm.gap + arm.half_width
        difference = f"{arm.gap:+.4f} ({low:+.4f} to {high:+.4f})" if low < high else f"{arm.gap:+.4f}"
        then = np.interp(seconds * arm.tokens_per_s, *zip(*arm.curve, strict=True))
        speeds = f"{then:11.4f}{arm.tokens_per_s:10,.0f}{arm.tokens_per_s / speed:6.2f}" if measured else ""
        print(
            f"{name:16}{arm.last.parameters:12,}{arm.last.multiply_adds:15,}"
            f"{arm.last.multiply_adds / of.multiply_adds:6.2f}{arm.last.learning_rate:8g}{len(arm.differences):7}"
            f"{arm.curve[-1][1]:9.4f}{difference:>30}{speeds}"
        )
    for (name, seed), rows in runs.items():
        if not (finished(rows) and finished(runs.get((against, seed), []))):
            print(f"Left out: {name}-{seed}, at {rows[-1].at_token:,} tokens; it or {against}-{seed} is not finished.")


def write_csv(path: Path, runs: Runs) -> None:
    """All evaluations, a row each."""
    with replacing(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Evaluation._fields, *itertools.chain(*runs.values())])


def new_figure(width: float, height: float):
    """An empty figure of matplotlib's, sizes in inches. Raises ValueError if there is no matplotlib."""
    require(importlib.util.find_spec("matplotlib"), "the picture needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(path: Path, figure) -> None:
    """Write a figure."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    print(f"wrote {path}", file=sys.stderr)


def draw(path: Path, runs: Runs, against: str) -> None:
    """Differences with their intervals, and the losses against tokens, compute and time, as PNG. Raises ValueError."""
    arms = summarize(runs, against)
    figure = new_figure(13, 9)
    to_other, *curves = figure.subplots(2, 2).flat
    for i, (name, arm) in enumerate(arms.items()):  # the best one on top
        color = f"C{i}" if i < 5 else "darkgray"
        to_other.errorbar(arm.gap, i, xerr=arm.half_width, fmt="o", color=color, capsize=4)
        to_other.plot(arm.differences, [i] * len(arm.differences), "|", color=color, markersize=10)
        tokens, losses = np.transpose(arm.curve[1:] or arm.curve)  # the untrained loss left out
        scales = {
            "million tokens": 1e-6,
            "multiply-adds, forward and backward, in 10¹²": 3e-12 * arm.last.multiply_adds,
            "seconds of training, at the arm's median speed": 1 / arm.tokens_per_s,
        }
        for axis, (label, scale) in zip(curves, scales.items(), strict=True):
            axis.plot(tokens * scale, losses, color=color)
            end, beside = (tokens[-1] * scale, losses[-1]), (1.02, 0.05 * (len(arms) - i))
            line = dict(arrowstyle="-", color=color, linewidth=0.5, relpos=(0, 0.5))
            axis.annotate(name, end, beside, textcoords="axes fraction", va="center", color=color, arrowprops=line)
            axis.set(xlabel=label, ylabel="validation loss, nats per token")
    to_other.axvline(0, color="gray", linewidth=1)
    to_other.set(yticks=range(len(arms)), yticklabels=arms, xlabel=f"loss less that of {against}: mean, 95 % interval")
    to_other.invert_yaxis()
    save_png(path, figure)


def seed_range(text: str) -> range:
    """5 is seeds 1 to 5, 4-5 is 4 and 5. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)", text)
    seeds = range(int(match[1] or 1), int(match[2]) + 1) if match else ()
    require(seeds, f"--seeds must be a number, for seeds 1 to that, or a range such as 4-5, got {text!r}")
    return seeds


def main() -> None:
    parser = Parser(prog="-m lab.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("sweep", help="train every arm with every seed", allow_abbrev=False).add_argument
    add("folder", type=Path, help="base.toml and a file per arm; then settings of train.py, {arm} and {seed} filled in")
    add("--arms", nargs="+", default=[], metavar="ARM", help="only these (default: all)")
    add("--seeds", default="5", help="seeds 1 to this number, or a range such as 4-5 (default: 5)")
    add("--jobs", type=int, default=1, help="trainings at once, each with its part of the cores (default: 1)")
    add("--out", type=Path, help="folder of the runs' folders (default: out/ and the folder's name)")
    table = commands.add_parser("table", help="a row per arm: loss, difference, cost")
    plot = commands.add_parser("plot", help="differences, and losses against tokens, compute and time")
    for either in (table, plot):
        either.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folders of runs, or files of --csv")
        either.add_argument("--against", default="sum", metavar="ARM", help="the arm to compare with (default: sum)")
    table.add_argument("--csv", type=Path, metavar="FILE.csv", help="write all evaluations there")
    plot.add_argument("png", type=Path, metavar="FILE.png")
    args, settings = parser.parse_known_args()
    if args.command == "sweep":
        require(args.jobs > 0, f"--jobs must be at least 1, got {args.jobs}")
        out = args.out or Path("out", args.folder.resolve().name)
        return sweep(plan_runs(args.folder, args.arms, seed_range(args.seeds), out, settings), args.jobs)
    require(not settings, f"unknown: {' '.join(settings)} (see python -m lab.compare {args.command} --help)")
    if args.command == "plot":
        return draw(args.png, collect_runs(args.paths), args.against)
    runs = collect_runs(args.paths)
    print_table(runs, args.against)
    if args.csv:
        write_csv(args.csv, runs)


if __name__ == "__main__":
    run(main)
