"""A task that needs several steps in one layer, and what each way to combine experts makes of it.

    python -m lab.trees                   # sum, dag, two MoEs in series: some minutes on one core
    python -m lab.trees --full [ARM ...]  # what is missing in lab/results/trees.csv: many hours
    python -m lab.trees --plot FILE.png   # that file as a table (--against ARM) and as a picture

A tree has 2^depth leaves of V values, and at each inner node a fixed random table, V x V → V, of
all values equally often. A model of one attention and one MoE reads a token per leaf and "=", and
answers with the value at the root.
"""

import argparse
import csv
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from lab.cost import count_multiply_adds
from lab.graph import read_off, shares_right
from lab.shared import check_target, half_width, new_figure, read_rows, save_png
from model import GPT, ModelConfig, rope_table, rotate
from prepare import UserError, run
from train import TrainConfig, get_learning_rate, make_optimizer

RESULTS = Path(__file__).parent / "results/trees.csv"
ARMS = tomllib.loads((Path(__file__).parent / "configs/trees.toml").read_text(encoding="utf-8"))
BASE = ARMS.pop("base")
MAIN = ("sum", "sum_compute", "series", "dag2_silu", "dag2_sigmoid", "dag1_silu", "dag1_sigmoid")
MAIN += ("mlp", "coe")
LONG = {  # arms that are also trained for more steps
    "sum": (40_000, 64_000),
    "series": (40_000,),
    "dag1_silu": (40_000,),
    "dag2_silu": (40_000,),
}
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)  # each arm gets the one that serves it best
VALUES = 6  # V
BATCH = 256  # trees per step
POINTS = 20  # evaluations of a trial
TESTED = 4096  # trees in each of them
PROBED = 12_288  # trees that read_off gets


SUMMARY = {  # arms in README's picture: what they are called there, and how the name is placed
    "sum": ("sum", "center"),
    "sum_compute": ("sum, as many products", "center"),
    "series": ("two MoEs in series", "bottom"),
    "dag2_silu": ("dag, L = 2", "top"),
}


class Trial(NamedTuple):
    """One training, a row of the CSV file: what determines it, and what became of it."""

    arm: str
    depth: int = 3  # of the tree
    draw: int = 1  # of its tables
    seed: int = 1  # of first weights and data
    steps: int = 12_000
    rate: float = 1.5e-3  # highest learning rate
    parameters: int = 0  # of the feed-forward half
    multiply_adds: int = 0  # of it, per token
    seconds: float = 0.0  # CPU time of its one thread
    accuracy: float = 0.0
    probe: str = ""  # of a graph: shares of read_off that are right, its rows joined by |
    curve: str = ""  # accuracies at POINTS evenly spaced steps; the last is the accuracy

    def settings(self) -> tuple:
        """Return the values that determine the trial."""
        return self.arm, self.depth, self.draw, self.seed, self.steps, self.rate


def make_tables(depth: int, draw: int) -> list[Tensor]:
    """Draw the tables of each level's nodes, from the leaves up: (nodes, V, V) each."""
    rng = np.random.default_rng((draw, depth))
    values = np.arange(VALUES**2) % VALUES  # each V times
    levels = []
    for level in reversed(range(depth)):
        tables = np.stack([rng.permutation(values) for _ in range(2**level)])
        levels.append(torch.from_numpy(tables).view(-1, VALUES, VALUES))
    return levels


def draw_trees(tables: list[Tensor], count: int, generator) -> tuple[Tensor, list[Tensor]]:
    """Draw trees with random leaves: tokens (count, 2^depth + 1), the last of which is "=",

    and the values at each level (count, nodes), leaves first.
    """
    levels = [torch.randint(VALUES, (count, 2 * len(tables[0])), generator=generator)]
    for table in tables:
        left = levels[-1][:, 0::2]
        right = levels[-1][:, 1::2]
        levels.append(table[torch.arange(len(table)), left, right])
    n = levels[0].shape[1]
    # A leaf's token tells its place, too, so that attention can gather the leaves.
    tokens = VALUES * torch.arange(n) + levels[0]
    return nn.functional.pad(tokens, (0, 1), value=VALUES * n), levels


def make_model(trial: Trial) -> GPT:
    """Make an untrained model; those of one seed share the weights of what they have in common."""
    torch.manual_seed(trial.seed)
    n = 2**trial.depth  # leaves
    return GPT(ModelConfig(vocab_size=VALUES * n + 1, block_size=n + 1, **BASE | ARMS[trial.arm]))


def answer(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the logits (B, vocab_size) at the last of tokens (B, T), and its router's aux (2).

    The logits are those of GPT.forward, in a sixth of the time: only the last token goes through
    the MoE; and as a token has one place, and "=" is always the last, one query is enough, and one
    key and value for each token of the vocabulary.
    """
    block = model.blocks[0]
    attention = block.attention
    vocab_size = model.config.vocab_size
    place = torch.arange(vocab_size) // VALUES
    rope = rope_table(place, attention.head_dim, model.config.rope_theta)
    x = block.norm(model.embed.weight)  # (vocab_size, C)
    heads = (-1, attention.head_dim)
    q = attention.q_proj(x).unflatten(1, heads).transpose(0, 1)  # (heads, vocab_size, head_dim)
    k = attention.k_proj(x).unflatten(1, heads).transpose(0, 1)
    v = attention.v_proj(x).unflatten(1, heads).transpose(0, 1)
    score = rotate(q, rope)[:, -1:] @ rotate(k, rope).mT / attention.head_dim**0.5
    is_there = torch.zeros(len(tokens), vocab_size, dtype=torch.bool).scatter(1, tokens, True)
    weight = score.masked_fill(~is_there, -torch.inf).softmax(dim=-1)  # (heads, B, vocab_size)
    gathered = (weight @ v).transpose(0, 1).flatten(1)  # (B, C)
    h = model.embed.weight[-1] + attention.o_proj(gathered)
    h, aux = block.moe(h.unsqueeze(1))
    return model.head(model.norm(h)).squeeze(1), aux


def train_trial(trial: Trial) -> tuple[Trial, GPT, tuple]:
    """Return the finished trial, its model, and tokens, levels and rows of read_off."""
    model = make_model(trial)
    tables = make_tables(trial.depth, trial.draw)
    generator = torch.Generator().manual_seed(1000 * trial.draw + trial.seed)
    config = TrainConfig(
        learning_rate=trial.rate, min_lr=trial.rate / 10, warmup_steps=200, max_steps=trial.steps
    )
    optimizer = make_optimizer(model, config.weight_decay)
    test, right = draw_trees(tables, PROBED, torch.Generator().manual_seed(0))
    curve = []
    started = time.process_time()
    name = f"{trial.arm}, seed {trial.seed}"
    for step in trange(trial.steps, desc=name, unit="step", mininterval=1, leave=False):
        tokens, levels = draw_trees(tables, BATCH, generator)
        logits, (balance_loss, z_loss) = answer(model, tokens)
        loss = nn.functional.cross_entropy(logits, levels[-1].squeeze(1))
        router_loss = config.balance_coef * balance_loss + config.z_coef * z_loss
        (loss + router_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * POINTS % trial.steps < POINTS:
            with torch.no_grad():
                logits, _ = answer(model, test[:TESTED])
            guess = logits.argmax(dim=-1, keepdim=True)
            curve.append((guess == right[-1][:TESTED]).float().mean().item())
    seconds = round(time.process_time() - started, 1)
    rows = []
    if "dag" in model.config.aggregator:
        rows = read_off(model, test, right, VALUES)
    moe = model.blocks[0].moe
    one_token = torch.zeros(1, 1, BASE["n_embd"], dtype=torch.float64)
    trial = trial._replace(
        parameters=sum(weight.numel() for weight in moe.parameters()),
        multiply_adds=count_multiply_adds(moe, one_token),
        seconds=seconds,
        accuracy=curve[-1],
        curve=join_numbers(curve),
        probe="|".join(join_numbers(shares_right(row, right[1:])) for row in rows),
    )
    return trial, model, (test, right, rows)


def join_numbers(numbers: list[float]) -> str:
    """Write numbers with four decimals, and spaces between them."""
    return " ".join(f"{number:.4f}" for number in numbers)


def read_trials() -> list[Trial]:
    """Return the rows of lab/results/trees.csv, of equal trials the last."""
    rows = read_rows(RESULTS) if RESULTS.exists() else []
    kinds = Trial.__annotations__
    trials = {}
    for number, row in enumerate(rows, start=2):
        is_whole = row.keys() == kinds.keys() and None not in row.values()
        if not is_whole or len(row["curve"].split()) != POINTS:
            raise UserError(f"{RESULTS}, line {number}: not a whole row; remove it")
        trial = Trial(**{name: kind(row[name]) for name, kind in kinds.items()})
        trials[trial.settings()] = trial
    return list(trials.values())


def run_missing(trials: list[Trial]) -> None:
    """Run the trials that lab/results/trees.csv lacks, and add a row for each when it is done."""
    done = {trial.settings() for trial in read_trials()}
    missing = [trial for trial in trials if trial.settings() not in done]
    for trial in tqdm(missing, unit="trial", leave=False):
        trial, _, _ = train_trial(trial)
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(Trial._fields)
            writer.writerow(trial)


def rates_by_merit(arm: str, trials: list[Trial]) -> list[float]:
    """Return all rates, the best last, as the arm's trials on draw 0 have it.

    A rate with more of them is better, because only the better two get more than two.
    """
    accuracies = {rate: [] for rate in RATES}
    for trial in trials:
        if trial.arm == arm and trial.draw == 0 and trial.rate in accuracies:
            accuracies[trial.rate].append(trial.accuracy)
    return sorted(RATES, key=lambda r: (len(accuracies[r]), np.mean(accuracies[r] or [0.0])))


def run_arm(arm: str) -> None:
    """Choose an arm's rate on draw 0, and run the rest with it.

    Arms of MAIN get five seeds, those of LONG more steps and other trees, too.
    """
    seeds = range(1, 6 if arm in MAIN else 2)
    run_missing([Trial(arm, draw=0, seed=s, rate=rate) for rate in RATES for s in seeds[:2]])
    better = rates_by_merit(arm, read_trials())[-2:]
    run_missing([Trial(arm, draw=0, seed=s, rate=rate) for rate in better for s in seeds[2:]])
    rate = rates_by_merit(arm, read_trials())[-1]
    run_missing([Trial(arm, draw=draw, seed=s, rate=rate) for draw in range(1, 6) for s in seeds])
    if arm in LONG:
        steps = LONG[arm]
        run_missing([Trial(arm, seed=s, steps=n, rate=rate) for n in steps for s in (1, 2)])
        run_missing([Trial(arm, depth=d, seed=s, rate=rate) for d in (2, 4) for s in (1, 2, 3)])


def by_arm(trials: list[Trial], depth: int, steps: int) -> dict[str, list[Trial]]:
    """Return the trials of this depth and steps at their arm's best rate, but those on draw 0.

    Their seconds are those of the arm's fastest trial, by its time per step.
    """
    groups = {}
    for arm in ARMS:
        rate = rates_by_merit(arm, trials)[-1]
        group = []
        paces = []
        for trial in trials:
            if (trial.arm, trial.depth) == (arm, depth):
                paces.append(trial.seconds / trial.steps)
                if trial.draw != 0 and (trial.steps, trial.rate) == (steps, rate):
                    group.append(trial)
        if group:
            groups[arm] = [trial._replace(seconds=steps * min(paces)) for trial in group]
    return groups


def mean_probe(trials: list[Trial]) -> np.ndarray:
    """Return the shares that read_off has right, (L + 2, levels): means over one arm's trials."""
    probes = [[row.split() for row in trial.probe.split("|")] for trial in trials]
    return np.array(probes, dtype=float).mean(axis=0)


def print_table(trials: list[Trial], against: str) -> None:
    """Print a row per arm for each depth of the tree and number of steps, and what nodes hold.

    Behind ± is half the width of a 95 % interval.
    """
    print("parameters, multiply-adds, rate, seconds, trials, accuracy, ", end="")
    print(f"less {against} ± trial ± draw, ahead, by draw")
    for depth, steps in sorted({(trial.depth, trial.steps) for trial in trials}):
        print(f"depth {depth}, {steps:,} steps")
        arms = by_arm(trials, depth, steps)
        others = {(trial.draw, trial.seed): trial.accuracy for trial in arms.get(against, [])}
        for arm, group in arms.items():
            print_arm(arm, group, others)


def print_arm(arm: str, trials: list[Trial], others: dict[tuple[int, int], float]) -> None:
    """Print an arm's row; others are the accuracies to compare with, by draw and seed."""
    draws = sorted({trial.draw for trial in trials})
    accuracies = [trial.accuracy for trial in trials]
    by_draw = {draw: [] for draw in draws}
    gaps_by_draw = {draw: [] for draw in draws}
    for trial in trials:
        by_draw[trial.draw].append(trial.accuracy)
        if (trial.draw, trial.seed) in others:
            gap = trial.accuracy - others[trial.draw, trial.seed]
            gaps_by_draw[trial.draw].append(gap)
    gaps_by_draw = {draw: gaps for draw, gaps in gaps_by_draw.items() if gaps}
    gaps = np.array([gap for gaps in gaps_by_draw.values() for gap in gaps] or [np.nan])
    means = [np.mean(gaps) for gaps in gaps_by_draw.values()] or [np.nan]
    first = trials[0]
    line = f"{arm:16}{first.parameters:7,}{first.multiply_adds:8,}{first.rate:8g}"
    line += f"{first.seconds:6.0f}{len(trials):4}"
    line += f"{np.mean(accuracies):8.3f} ± {half_width(accuracies):.3f}"
    line += f"{gaps.mean():+9.3f} ± {half_width(gaps):.3f} ± {half_width(means):.3f}"
    line += f"{(gaps > 0).sum():4}  "
    print(line, *[np.round(np.mean(by_draw[draw]), 3) for draw in draws])
    if first.probe:
        shares = mean_probe(trials).round(2).tolist()
        print(f"{'':16}leaves, nodes by depth; by level:", *shares)


def draw_picture(path: Path, trials: list[Trial]) -> None:
    """Draw accuracy against steps, compute and time, and what can be read off dag2_silu's nodes."""
    figure = new_figure(13, 9)
    *curves, nodes = figure.subplots(2, 2).flat
    main_trials = [trial for trial in trials if trial.arm in MAIN]
    for steps, line in ((12_000, "-"), (40_000, ":")):
        for arm, group in by_arm(main_trials, 3, steps).items():
            accuracy = np.array([trial.curve.split() for trial in group], dtype=float).mean(axis=0)
            compute = 3e-12 * steps * BATCH * group[0].multiply_adds
            color = f"C{MAIN.index(arm)}"
            label = arm if line == "-" else None
            for axis, end in zip(curves, (steps, compute, group[0].seconds), strict=True):
                x = np.arange(1, POINTS + 1) / POINTS * end
                axis.plot(x, accuracy, line, color=color, label=label)
    labels = ("steps", "10¹² multiply-adds, with gradients", "seconds")
    for axis, label in zip(curves, labels, strict=True):
        axis.set(xlabel=label, ylabel="accuracy")
    curves[0].legend(fontsize="small", ncols=2)
    draw_nodes(nodes, trials)
    save_png(path, figure)


def draw_nodes(axis, trials: list[Trial]) -> None:
    """Draw as a heat map what can be read off dag2_silu's nodes."""
    shown = by_arm([trial for trial in trials if trial.arm == "dag2_silu"], 3, 12_000)
    if shown:
        shares = mean_probe(shown["dag2_silu"])
        axis.imshow(shares, vmin=1 / VALUES, vmax=1, cmap="Blues", aspect="auto")
        for (i, j), share in np.ndenumerate(shares):
            color = "white" if share > 0.6 else "black"
            axis.text(j, i, f"{share:.2f}", ha="center", color=color)
    axis.set(title="values that are read off right, dag, L = 2")
    axis.set(xticks=range(3), xticklabels=["level 1", "level 2", "root"])
    places = ["leaves", "nodes before the graph", "after depth 1", "after depth 2"]
    axis.set(yticks=range(4), yticklabels=places)


def draw_summary(path: Path, trials: list[Trial]) -> None:
    """Draw README's picture: four arms' accuracy against steps, and what nodes hold."""
    figure = new_figure(12, 4.5)
    curves, nodes = figure.subplots(1, 2)
    arms = by_arm([trial for trial in trials if trial.arm in SUMMARY], 3, 12_000)
    for arm, group in arms.items():
        accuracy = np.array([trial.curve.split() for trial in group], dtype=float).mean(axis=0)
        x = np.arange(1, POINTS + 1) / POINTS * 12_000
        line = curves.plot(x, accuracy)[0]
        name, place = SUMMARY[arm]
        curves.text(12_200, accuracy[-1], name, color=line.get_color(), va=place)
    curves.set(xlabel="steps", ylabel="accuracy", xlim=(0, 19_000), ylim=(0, 1))
    curves.set(xticks=range(0, 12_001, 4_000), title="mean over five draws of the tables")
    draw_nodes(nodes, trials)
    save_png(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("--full", nargs="*", choices=ARMS, metavar="ARM", help="the whole table (of these arms)")
    add("--plot", type=Path, metavar="FILE.png", help="what has been found so far")
    add("--summary", type=Path, metavar="FILE.png", help="the same in two panels, as in README")
    add("--against", default="sum", choices=ARMS, metavar="ARM", help="compare with (default: sum)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.plot:
        check_target(args.plot)
    if args.full is None and not args.plot and not args.summary:
        for arm in ("sum", "dag2_silu", "series"):
            trial, _, _ = train_trial(Trial(arm, steps=8_000, rate=RATES[0]))
            print(f"{arm:12}{trial.accuracy:.3f}", flush=True)
        return
    if args.full is not None:
        for arm in args.full or ARMS:
            run_arm(arm)
    trials = read_trials()
    print_table(trials, args.against)
    if args.plot:
        draw_picture(args.plot, trials)
    if args.summary:
        draw_summary(args.summary, trials)


if __name__ == "__main__":
    run(main)
