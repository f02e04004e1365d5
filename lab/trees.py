"""Several steps in one layer: a task that needs them, and what one layer makes of it with each way to combine experts.

    python -m lab.trees                   # sum, dag and two MoEs in series, once each: some minutes on one core
    python -m lab.trees --full [ARM ...]  # what is missing of the whole table in lab/results/trees.csv: many hours
    python -m lab.trees --plot FILE.png   # what that file holds, as a table (--against ARM) and a picture

A tree has 2^depth leaves of V values, and at each inner node a fixed random table, V x V → V, of all values equally
often. A model of one attention and one MoE reads a token per leaf and "=", and answers with the value at the root.
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

import lab.baselines  # noqa: F401  series, mlp, coe, dense, dag_ungated, dag_self
from lab.compare import half_width, new_figure, read_rows, save_png
from lab.cost import count_multiply_adds
from lab.graph import read_off, shares_right
from model import GPT, ModelConfig, rope_table, rotate
from prepare import Parser, require, run
from train import TrainConfig, learning_rate, make_optimizer

RESULTS = Path(__file__).parent / "results/trees.csv"
ARMS = tomllib.loads(Path(__file__).with_name("configs").joinpath("trees.toml").read_text(encoding="utf-8"))
BASE = ARMS.pop("base")
MAIN = ("sum", "sum_compute", "series", "dag2_silu", "dag2_sigmoid", "dag1_silu", "dag1_sigmoid", "mlp", "coe")
VALUES, BATCH, POINTS, TESTED, PROBED = 6, 256, 20, 4096, 12_288  # V; trees per step; evaluations, of trees; probed
LONG = {"sum": (40_000, 64_000), "series": (40_000,), "dag1_silu": (40_000,), "dag2_silu": (40_000,)}  # more steps
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)  # each arm gets the one that serves it best


class Trial(NamedTuple):
    """One training: the six values that determine it, and once it is done what became of it. A row of the CSV file."""

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
    probe: str = ""  # of a graph: rows of read_off, joined by |
    curve: str = ""  # accuracies at POINTS evenly spaced steps; the last is the accuracy


def make_tables(depth: int, draw: int) -> list[Tensor]:
    """For each level from the leaves up: the tables of its nodes (nodes, V, V), each value V times in a table."""
    rng = np.random.default_rng((draw, depth))
    values = np.arange(VALUES**2) % VALUES
    levels = [[rng.permutation(values) for _ in range(2**level)] for level in reversed(range(depth))]
    return [torch.from_numpy(np.stack(tables)).view(-1, VALUES, VALUES) for tables in levels]


def draw_trees(tables: list[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """Tokens (count, 2^depth + 1) of random leaves and "=", and values (count, nodes) at each level, leaves first."""
    levels = [torch.randint(VALUES, (count, 2 * len(tables[0])), generator=generator)]
    for table in tables:
        left, right = levels[-1][:, 0::2], levels[-1][:, 1::2]
        levels.append(table[torch.arange(len(table)), left, right])
    n = levels[0].shape[1]
    tokens = VALUES * torch.arange(n) + levels[0]  # that tell each leaf's place, so that attention can gather them
    return nn.functional.pad(tokens, (0, 1), value=VALUES * n), levels


def make_model(trial: Trial) -> GPT:
    """An untrained model. Those of one seed share the first weights of what they have in common."""
    torch.manual_seed(trial.seed)
    n = 2**trial.depth  # leaves
    return GPT(ModelConfig(vocab_size=VALUES * n + 1, block_size=n + 1, **BASE | ARMS[trial.arm]))


def answer(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens (B, T) → logits (B, vocab_size) at the last one, and its router's balance loss and z-loss.

    The logits are GPT.forward's, in a sixth of the time: only the last token goes through the MoE; and as a token has
    one place, and "=" is always the last, one query is enough, and one key and value for each token of the vocabulary.
    """
    block, attention, vocab_size = model.blocks[0], model.blocks[0].attention, model.config.vocab_size
    rope = rope_table(torch.arange(vocab_size) // VALUES, attention.head_dim, model.config.rope_theta)
    x = block.norm(model.embed.weight)  # (vocab_size, C)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (project(x).unflatten(1, (-1, attention.head_dim)).transpose(0, 1) for project in projections)
    score = rotate(q, rope)[:, -1:] @ rotate(k, rope).mT / attention.head_dim**0.5  # (heads, 1, vocab_size)
    present = torch.zeros(len(tokens), vocab_size, dtype=torch.bool).scatter(1, tokens, True)
    weight = score.masked_fill(~present, -torch.inf).softmax(dim=-1)  # (heads, B, vocab_size)
    h = model.embed.weight[-1] + attention.o_proj((weight @ v).transpose(0, 1).flatten(1))  # (B, C)
    h, (balance, z) = block.moe(h.unsqueeze(1))
    return model.head(model.norm(h)).squeeze(1), balance, z


def train_trial(trial: Trial) -> tuple[Trial, GPT, tuple]:
    """Train and evaluate. Returns the finished trial, the model, and tokens, levels and rows of read_off."""
    model, tables = make_model(trial), make_tables(trial.depth, trial.draw)
    generator = torch.Generator().manual_seed(1000 * trial.draw + trial.seed)
    config = TrainConfig(learning_rate=trial.rate, min_lr=trial.rate / 10, warmup_steps=200, max_steps=trial.steps)
    optimizer = make_optimizer(model, config)
    test, right = draw_trees(tables, PROBED, torch.Generator().manual_seed(0))
    curve, began = [], time.process_time()
    for step in trange(trial.steps, desc=f"{trial.arm}, seed {trial.seed}", unit="step", mininterval=1, leave=False):
        tokens, levels = draw_trees(tables, BATCH, generator)
        logits, balance, z = answer(model, tokens)
        loss = nn.functional.cross_entropy(logits, levels[-1].squeeze(1))
        (loss + config.balance_coef * balance + config.z_coef * z).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * POINTS % trial.steps < POINTS:
            with torch.no_grad():
                guess = answer(model, test[:TESTED])[0].argmax(dim=-1, keepdim=True)
            curve.append((guess == right[-1][:TESTED]).float().mean().item())
    seconds = round(time.process_time() - began, 1)
    rows = read_off(model, test, right, VALUES) if "dag" in model.config.aggregator else []
    trial = trial._replace(
        parameters=sum(weight.numel() for weight in model.blocks[0].moe.parameters()),
        multiply_adds=count_multiply_adds(model.blocks[0].moe, torch.zeros(1, 1, BASE["n_embd"], dtype=torch.float64)),
        seconds=seconds,
        accuracy=curve[-1],
        curve=" ".join(f"{share:.4f}" for share in curve),
        probe="|".join(" ".join(f"{share:.4f}" for share in shares_right(row, right[1:])) for row in rows),
    )
    return trial, model, (test, right, rows)


def read_trials() -> list[Trial]:
    """The rows of lab/results/trees.csv, the last one of each trial. Raises ValueError."""
    rows, kinds, trials = read_rows(RESULTS) if RESULTS.exists() else [], Trial.__annotations__, {}
    for number, row in enumerate(rows, start=2):
        whole = len((row.get("curve") or "").split()) == POINTS and None not in row.values()
        require(whole and row.keys() == kinds.keys(), f"{RESULTS}, line {number}: not a whole row; remove it")
        trial = Trial(**{name: kind(row[name]) for name, kind in kinds.items()})
        trials[trial[:6]] = trial  # by what determines it
    return list(trials.values())


def run_missing(trials: list[Trial]) -> None:
    """Run those that are not in lab/results/trees.csv yet, and add a row for each when it is done."""
    done = {trial[:6] for trial in read_trials()}
    for trial in tqdm([trial for trial in trials if trial[:6] not in done], unit="trial", leave=False):
        trial, *_ = train_trial(trial)
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([trial] if file.tell() else [Trial._fields, trial])


def rates_by_merit(arm: str, trials: list[Trial]) -> list[float]:
    """The best last: by the number, then the accuracy of an arm's trials that are to choose a rate, those on draw 0."""
    shares = {r: [t.accuracy for t in trials if (t.arm, t.draw, t.rate) == (arm, 0, r)] for r in RATES}
    return sorted(RATES, key=lambda rate: (len(shares[rate]), np.mean(shares[rate] or [0.0])))


def run_arm(arm: str) -> None:
    """Choose an arm's rate on draw 0; run the rest with it: five seeds of MAIN; more steps, other trees of LONG."""
    seeds = range(1, 6 if arm in MAIN else 2)
    run_missing([Trial(arm, draw=0, seed=seed, rate=rate) for rate in RATES for seed in seeds[:2]])
    better = rates_by_merit(arm, read_trials())[-2:]
    run_missing([Trial(arm, draw=0, seed=seed, rate=rate) for rate in better for seed in seeds[2:]])
    rate = rates_by_merit(arm, read_trials())[-1]
    run_missing([Trial(arm, draw=draw, seed=seed, rate=rate) for draw in range(1, 6) for seed in seeds])
    run_missing([Trial(arm, seed=seed, steps=steps, rate=rate) for steps in LONG.get(arm, ()) for seed in (1, 2)])
    run_missing([Trial(arm, depth=depth, seed=s, rate=rate) for depth in (2, 4) for s in (1, 2, 3) if arm in LONG])


def by_arm(trials: list[Trial], depth: int, steps: int) -> dict[str, list[Trial]]:
    """Trials of this depth and steps at their arm's best rate, not on draw 0; seconds of its fastest, per step."""
    best = {arm: rates_by_merit(arm, trials)[-1] for arm in ARMS}
    group = [t for t in trials if t.draw and (t.depth, t.steps, t.rate) == (depth, steps, best.get(t.arm))]
    pace = {arm: min(t.seconds / t.steps for t in trials if t[:2] == (arm, depth)) for arm in {t.arm for t in group}}
    return {arm: [t._replace(seconds=steps * pace[arm]) for t in group if t.arm == arm] for arm in ARMS if arm in pace}


def mean_probe(trials: list[Trial]) -> np.ndarray:
    """What is read off the leaves, and off the nodes at each depth (L + 2, levels): the mean of one arm's trials."""
    return np.array([[row.split() for row in trial.probe.split("|")] for trial in trials], dtype=float).mean(axis=0)


def print_table(trials: list[Trial], against: str) -> None:
    """A row per arm for each depth of the tree and number of steps, ± half of 95 % intervals; what nodes hold."""
    print(f"parameters, multiply-adds, rate, seconds, trials, accuracy, less {against} ± trial ± draw, ahead, by draw")
    for depth, steps in sorted({(trial.depth, trial.steps) for trial in trials}):
        print(f"depth {depth}, {steps:,} steps")
        arms = by_arm(trials, depth, steps)
        other = {(t.draw, t.seed): t.accuracy for t in arms.get(against, [])}
        for arm, found in arms.items():
            first, shares = found[0], [t.accuracy for t in found]
            pairs = [t for t in found if (t.draw, t.seed) in other]
            gaps = np.array([t.accuracy - other[t.draw, t.seed] for t in pairs] or [np.nan])
            of_draws = [gaps[[t.draw == draw for t in pairs]].mean() for draw in {t.draw for t in pairs}]
            by_draw = [np.mean([t.accuracy for t in found if t.draw == d]) for d in sorted({t.draw for t in found})]
            print(f"{arm:16}{first.parameters:7,}{first.multiply_adds:8,}{first.rate:8g}{first.seconds:6.0f}", end="")
            print(f"{len(found):4}{np.mean(shares):8.3f} ± {half_width(shares):.3f}{gaps.mean():+9.3f} ±", end="")
            print(f" {half_width(gaps):.3f} ± {half_width(of_draws):.3f}{(gaps > 0).sum():4}  ", *np.round(by_draw, 3))
            if first.probe:
                print(f"{'':16}leaves, nodes by depth; by level:", *mean_probe(found).round(2).tolist())


def draw_picture(path: Path, trials: list[Trial]) -> None:
    """Accuracy against steps, compute and time; what can be read off dag2_silu's nodes. A PNG. Raises ValueError."""
    figure = new_figure(13, 9)
    *curves, nodes = figure.subplots(2, 2).flat
    for steps, line in ((12_000, "-"), (40_000, ":")):
        for arm, found in by_arm([t for t in trials if t.arm in MAIN], 3, steps).items():
            share = np.array([trial.curve.split() for trial in found], dtype=float).mean(axis=0)
            compute = 3e-12 * steps * BATCH * found[0].multiply_adds
            for axis, end in zip(curves, (steps, compute, found[0].seconds), strict=True):
                at = np.arange(1, POINTS + 1) / POINTS * end
                axis.plot(at, share, line, color=f"C{MAIN.index(arm)}", label=arm if line == "-" else None)
    for axis, label in zip(curves, ("steps", "10¹² multiply-adds, with gradients", "seconds"), strict=True):
        axis.set(xlabel=label, ylabel="accuracy")
    curves[0].legend(fontsize="small", ncols=2)
    for found in by_arm([t for t in trials if t.arm == "dag2_silu"], 3, 12_000).values():
        nodes.imshow(rows := mean_probe(found), vmin=1 / VALUES, vmax=1, cmap="Blues", aspect="auto")
        for (i, j), share in np.ndenumerate(rows):
            nodes.text(j, i, f"{share:.2f}", ha="center", color="white" if share > 0.6 else "black")
    nodes.set(xticks=range(3), xticklabels=["level 1", "level 2", "root"], title="share read off right, dag2_silu")
    nodes.set(yticks=range(4), yticklabels=["leaves", "nodes before the graph", "after depth 1", "after depth 2"])
    save_png(path, figure)


def main() -> None:
    parser = Parser(prog="-m lab.trees", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", nargs="*", metavar="ARM", choices=ARMS, help="the whole table (of these arms only)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="what has been found so far")
    parser.add_argument("--against", default="sum", choices=ARMS, help="what the table compares with (default: sum)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.full is None and not args.plot:
        for arm in ("sum", "dag2_silu", "series"):
            print(f"{arm:12}{train_trial(Trial(arm, steps=8_000, rate=RATES[0]))[0].accuracy:.3f}", flush=True)
        return
    for arm in ARMS if args.full == [] else args.full or []:
        run_arm(arm)
    print_table(trials := read_trials(), args.against)
    if args.plot:
        draw_picture(args.plot, trials)


if __name__ == "__main__":
    run(main)
