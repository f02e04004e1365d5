"""A task that needs several steps in one layer, and what each way to combine experts makes of it.

    python -m lab.trees                    # sum, dag, two MoEs in series: minutes on one core
    python -m lab.trees --full [ARM ...]   # what is missing in lab/results/trees.csv: many hours
    python -m lab.trees --plot FILE.png    # the results: a table (--against ARM), and a picture
    python -m lab.trees --page FILE.html   # trains a graph, and shows it beside a tree: minutes

A tree has 2^depth leaves of V values, and at each inner node a fixed random table, V x V → V, of
all values equally often. A model of one attention and one MoE reads a token per leaf and "=", and
answers with the value at the root.
"""

import argparse
import csv
import itertools
import math
import time
import tomllib
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm, trange

from lab import baselines
from lab.cost import count_multiply_adds
from lab.graph import observe, write_page
from lab.shared import check_target, half_width, new_figure, paired_differences, read_rows, save_png
from model import GPT, ModelConfig, rope_table, rotate
from train import TrainConfig, get_learning_rate, make_optimizer

RESULTS = Path(__file__).parent / "results/trees.csv"
ARMS = tomllib.loads((Path(__file__).parent / "configs/trees.toml").read_text(encoding="utf-8"))
SHARED_SETTINGS = ARMS.pop("base")
PLAN = ARMS.pop("plan")  # of --full
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3)  # each arm gets the one that serves it best on draw 0
VALUES = 6  # V
BATCH = 256  # trees per step
POINTS = 20  # evaluations of a trial
TESTED = 4096  # trees in each of them
PROBED = 12_288  # trees that read_off gets
NAMES = {  # arms in the picture: what they are called there, and how the name is placed
    "sum": ("sum", "center"),
    "sum_compute": ("sum, as many products", "center"),
    "series": ("two MoEs in series", "bottom"),
    "dag2_silu": ("dag, L = 2", "top"),
}


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
    """Draw trees with random leaves.

    Returned are their tokens (count, 2^depth + 1), the last of which is "=", and the values at
    each level (count, nodes), leaves first.
    """
    levels = [torch.randint(VALUES, (count, 2 * len(tables[0])), generator=generator)]
    for table in tables:
        left = levels[-1][:, 0::2]
        right = levels[-1][:, 1::2]
        levels.append(table[torch.arange(len(table)), left, right])
    n = levels[0].shape[1]
    # A leaf's token tells its place, too, so that attention can gather the leaves.
    tokens = VALUES * torch.arange(n) + levels[0]
    return F.pad(tokens, (0, 1), value=VALUES * n), levels


def answer(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the logits (B, vocab_size) at the last of tokens (B, T), and its router's losses (2).

    The logits are those of GPT.forward, in a sixth of the time. Only the last token goes through
    the MoE. And as each token has one place only, one key and value per token of the vocabulary
    will do, and the query of "=".
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
    h, balance_loss, z_loss = block.moe(h.unsqueeze(1))
    logits = model.head(model.norm(h)).squeeze(1)
    return logits, torch.stack([balance_loss, z_loss])


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
    seconds: float = 0.0  # CPU time of its one thread; nan if on a machine unlike the others'
    accuracy: float = 0.0
    probe: str = ""  # of a graph: shares of read_off that are right, its rows joined by |
    curve: str = ""  # accuracies at POINTS evenly spaced steps; the last is the accuracy

    def settings(self) -> tuple:
        """Return the values that determine the trial."""
        return self.arm, self.depth, self.draw, self.seed, self.steps, self.rate


def make_model(trial: Trial) -> GPT:
    """Make an untrained model; those of one seed share the weights of what they have in common."""
    torch.manual_seed(trial.seed)
    n = 2**trial.depth  # leaves
    settings = SHARED_SETTINGS | ARMS[trial.arm]
    return baselines.make_model(
        ModelConfig(vocab_size=VALUES * n + 1, block_size=n + 1, **settings)
    )


def draw_test_trees(trial: Trial) -> tuple[Tensor, list[Tensor]]:
    """Draw trees of the trial's tables: for all seeds the same, in a random stream of their own."""
    tables = make_tables(trial.depth, trial.draw)
    return draw_trees(tables, PROBED, torch.Generator().manual_seed(0))


def train_trial(trial: Trial) -> tuple[Trial, GPT]:
    """Train the model of a trial. Returned is the trial with what became of it, and the model."""
    model = make_model(trial)
    tables = make_tables(trial.depth, trial.draw)
    generator = torch.Generator().manual_seed(1000 * trial.draw + trial.seed)
    config = TrainConfig(
        learning_rate=trial.rate, min_lr=trial.rate / 10, warmup_steps=200, max_steps=trial.steps
    )
    optimizer = make_optimizer(model, config.weight_decay)
    test_tokens, test_levels = draw_test_trees(trial)
    curve = []
    started = time.process_time()
    name = f"{trial.arm}, seed {trial.seed}"
    for step in trange(trial.steps, desc=name, unit="step", mininterval=1, leave=False):
        tokens, levels = draw_trees(tables, BATCH, generator)
        logits, (balance_loss, z_loss) = answer(model, tokens)
        loss = F.cross_entropy(logits, levels[-1].squeeze(1))
        router_loss = config.balance_coef * balance_loss + config.z_coef * z_loss
        (loss + router_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) * POINTS % trial.steps < POINTS:
            with torch.no_grad():
                logits, _ = answer(model, test_tokens[:TESTED])
            is_right = logits.argmax(dim=-1, keepdim=True) == test_levels[-1][:TESTED]
            curve.append(is_right.float().mean().item())
    seconds = round(time.process_time() - started, 1)
    rows = read_off(model, test_tokens, test_levels) if "dag" in model.config.aggregator else []
    moe = model.blocks[0].moe
    one_token = torch.zeros(1, 1, model.config.n_embd)
    trial = trial._replace(
        parameters=sum(weight.numel() for weight in moe.parameters()),
        multiply_adds=count_multiply_adds(moe, one_token),
        seconds=seconds,
        accuracy=curve[-1],
        curve=join_numbers(curve),
        probe="|".join(join_numbers(shares_right(row, test_levels)) for row in rows),
    )
    return trial, model


def join_numbers(numbers: list[float]) -> str:
    """Write numbers with four decimals, and spaces between them."""
    return " ".join(f"{number:.4f}" for number in numbers)


@torch.no_grad()
def read_off(model: GPT, tokens: Tensor, levels: list[Tensor]) -> list[list[Tensor]]:
    """Read the values of trees off the nodes that the graph has at "=", the last of tokens (S, T).

    A linear map is fitted to two thirds of the trees: ridge regression to one-hot vectors. It sees
    all K nodes at once, each in its expert's place, every feature scaled to equal deviation.
    Returned is what it reads for the last third at each level but the leaves. There is a row for
    the leaves themselves, one for the nodes before the graph, and one for those after each depth.
    """
    depths = observe(model, tokens)[0]
    T = tokens.shape[1]
    expert = depths[0].expert[T - 1 :: T].unsqueeze(-1)  # (S, K, 1)
    features = [F.one_hot(levels[0], VALUES)]
    for nodes in (depths[0].before, *(depth.after for depth in depths)):
        node = nodes[T - 1 :: T]  # (S, K, C)
        by_expert = node.new_zeros(len(node), model.config.n_expert, node.shape[2])
        features.append(by_expert.scatter(1, expert.expand_as(node), node))
    n_fit = 2 * len(tokens) // 3
    rows = []
    for feature in features:
        x = feature.flatten(1).double()
        x = x / x.std(dim=0).clamp_min(1e-12)
        x = F.pad(x, (0, 1), value=1.0)  # the intercept
        identity = torch.eye(x.shape[1], dtype=x.dtype)
        gram = x[:n_fit].T @ x[:n_fit] + 1e-3 * n_fit * identity
        row = []
        for values in levels[1:]:
            one_hot = F.one_hot(values, VALUES).flatten(1).double()
            matrix = torch.linalg.solve(gram, x[:n_fit].T @ one_hot[:n_fit])
            scores = (x[n_fit:] @ matrix).unflatten(1, (-1, VALUES))
            row.append(scores.argmax(dim=-1))
        rows.append(row)
    return rows


def shares_right(row: list[Tensor], levels: list[Tensor]) -> list[float]:
    """Return how much is right in a row of read_off, at each level but the leaves: 1 is all."""
    shares = []
    for read, right in zip(row, levels[1:], strict=True):
        shares.append((read == right[-len(read) :]).float().mean().item())
    return shares


def combine(arm: str, depths=(3,), draws=(1,), seeds=(1,), steps=(12_000,), rates=RATES):
    """Return the trials of an arm with all combinations of these settings."""
    settings = itertools.product(depths, draws, seeds, steps, rates)
    return [Trial(arm, *values) for values in settings]


def run_arm(arm: str) -> None:
    """Choose an arm's rate on draw 0, and run its other trials with it."""
    seeds = (1, 2, 3, 4, 5) if arm in PLAN["five_seeds"] else (1,)
    run_missing(combine(arm, draws=[0], seeds=seeds[:2]))
    better_two = rates_by_merit(arm, read_trials())[-2:]
    run_missing(combine(arm, draws=[0], seeds=seeds[2:], rates=better_two))
    best = [best_rate(arm, read_trials())]
    run_missing(combine(arm, draws=[1, 2, 3, 4, 5], seeds=seeds, rates=best))
    if arm in PLAN["more_steps"]:
        run_missing(combine(arm, seeds=[1, 2], steps=PLAN["more_steps"][arm], rates=best))
        run_missing(combine(arm, depths=[2, 4], seeds=[1, 2, 3], rates=best))


def run_missing(trials: list[Trial]) -> None:
    """Run the trials that lab/results/trees.csv lacks, and add a row for each when it is done."""
    done = {trial.settings() for trial in read_trials()}
    missing = [trial for trial in trials if trial.settings() not in done]
    for trial in tqdm(missing, unit="trial", leave=False):
        trial, _ = train_trial(trial)
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(Trial._fields)
            writer.writerow(trial)


def read_trials() -> list[Trial]:
    """Return the rows of lab/results/trees.csv, of equal trials the last."""
    if not RESULTS.exists():
        return []
    trials = {trial.settings(): trial for trial in read_rows(RESULTS, Trial)}
    return list(trials.values())


def rates_by_merit(arm: str, trials: list[Trial]) -> list[float]:
    """Return all rates, the best last, as the arm's trials on draw 0 have it.

    A rate with more trials is better: only the two that were best in two trials get three more.
    """
    by_rate = {rate: [] for rate in RATES}
    for trial in trials:
        if trial.arm == arm and trial.draw == 0 and trial.rate in by_rate:
            by_rate[trial.rate].append(trial.accuracy)
    return sorted(RATES, key=lambda rate: (len(by_rate[rate]), np.mean(by_rate[rate] or 0)))


def best_rate(arm: str, trials: list[Trial]) -> float:
    """Return the rate that serves the arm best."""
    return rates_by_merit(arm, trials)[-1]


def group_trials(trials: list[Trial], depth: int, steps: int) -> dict[tuple, list[Trial]]:
    """Return the trials of this depth and steps by arm and rate, but those on draw 0."""
    groups = {}
    for trial in trials:
        if (trial.depth, trial.steps) == (depth, steps) and trial.draw != 0:
            groups.setdefault((trial.arm, trial.rate), []).append(trial)
    return dict(sorted(groups.items()))


def accuracies(trials: list[Trial]) -> dict[tuple[int, int], float]:
    """Return the accuracies by draw and seed."""
    return {(trial.draw, trial.seed): trial.accuracy for trial in trials}


def means_by_draw(values: dict[tuple[int, int], float]) -> list[float]:
    """Return the means over seeds, one for each draw, of values by draw and seed."""
    by_draw = {}
    for (draw, _), value in sorted(values.items()):
        by_draw.setdefault(draw, []).append(value)
    return [fmean(of_draw) for of_draw in by_draw.values()]


def best_pace(arm: str, depth: int, trials: list[Trial]) -> float:
    """Return the seconds per step of an arm's fastest trial, nan if none was timed."""
    paces = [t.seconds / t.steps for t in trials if (t.arm, t.depth) == (arm, depth)]
    return min([pace for pace in paces if not math.isnan(pace)], default=math.nan)


def mean_curve(trials: list[Trial]) -> np.ndarray:
    """Return the mean accuracies at POINTS evenly spaced steps."""
    return np.array([trial.curve.split() for trial in trials], dtype=float).mean(axis=0)


def mean_probe(trials: list[Trial]) -> np.ndarray:
    """Return the shares that read_off has right, (L + 2, levels): means over one arm's trials."""
    probes = []
    for trial in trials:
        probes.append([row.split() for row in trial.probe.split("|")])
    return np.array(probes, dtype=float).mean(axis=0)


def print_table(trials: list[Trial], against: str) -> None:
    """Print a row for each arm and rate, and for graphs what can be read off their nodes."""
    print("arm, parameters, multiply-adds, rate (* the arm's best), seconds of the fastest trial,")
    print(f"accuracy when {against} is done; trials, accuracy ± over trials, means on the draws;")
    print(f"less {against} in equal pairs: ± over trials, ± over draws, in how many it is ahead")
    for depth, steps in sorted({(trial.depth, trial.steps) for trial in trials}):
        print(f"depth {depth}, {steps:,} steps")
        groups = group_trials(trials, depth, steps)
        others = accuracies(groups.get((against, best_rate(against, trials)), []))
        seconds_of_other = steps * best_pace(against, depth, trials)
        for (arm, rate), group in groups.items():
            seconds = steps * best_pace(arm, depth, trials)
            shares_of_time = np.arange(1, POINTS + 1) / POINTS
            at_equal_time = np.interp(seconds_of_other / seconds, shares_of_time, mean_curve(group))
            mark = "*" if rate == best_rate(arm, trials) else ""
            print(f"{arm:16}{group[0].parameters:7,}{group[0].multiply_adds:8,}", end="")
            print(f"{rate:8g}{mark:1}{seconds:6.0f}{at_equal_time:7.3f}", end="")
            print_accuracies(accuracies(group), others)
            if group[0].probe:
                shares = mean_probe(group).round(2).tolist()
                print(f"{'':16}leaves, nodes by depth; by level:", *shares)


def print_accuracies(ours: dict[tuple[int, int], float], others: dict) -> None:
    """Print the mean of accuracies, and that of their differences to others, by draw and seed."""
    values = list(ours.values())
    draws = " ".join(f"{mean:.3f}" for mean in means_by_draw(ours))
    print(f"{len(values):4}{fmean(values):8.3f} ± {half_width(values):.3f}  {draws}", end="")
    by_draw_and_seed = paired_differences(ours, others)
    if by_draw_and_seed:
        gaps = list(by_draw_and_seed.values())
        over_draws = half_width(means_by_draw(by_draw_and_seed))
        print(f"; {fmean(gaps):+.3f} ± {half_width(gaps):.3f} ± {over_draws:.3f}", end="")
        print(f", {sum(gap > 0 for gap in gaps)} of {len(gaps)}", end="")
    print()


def draw_picture(path: Path, trials: list[Trial]) -> None:
    """Draw four arms' accuracy against steps, and what can be read off the nodes of dag2_silu."""
    groups = group_trials(trials, 3, 12_000)
    figure = new_figure(12, 4.5)
    curves, nodes = figure.subplots(1, 2)
    for arm, (name, place) in NAMES.items():
        group = groups.get((arm, best_rate(arm, trials)))
        if group is None:  # not yet trained
            continue
        accuracy = mean_curve(group)
        line = curves.plot(np.arange(1, POINTS + 1) / POINTS * 12_000, accuracy)[0]
        curves.text(12_200, accuracy[-1], name, color=line.get_color(), va=place)
    curves.set(xlabel="steps", ylabel="accuracy", xlim=(0, 19_000), ylim=(0, 1))
    curves.set(xticks=range(0, 12_001, 4_000), title="mean over five draws of the tables")
    shares = mean_probe(groups["dag2_silu", best_rate("dag2_silu", trials)])
    nodes.imshow(shares, vmin=1 / VALUES, vmax=1, cmap="Blues", aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        color = "white" if share > 0.6 else "black"
        nodes.text(j, i, f"{share:.2f}", ha="center", color=color)
    nodes.set(title="values that are read off right, dag, L = 2")
    nodes.set(xticks=range(3), xticklabels=["level 1", "level 2", "root"])
    places = ["leaves", "nodes before the graph", "after depth 1", "after depth 2"]
    nodes.set(yticks=range(4), yticklabels=places)
    save_png(path, figure)


def make_page(path: Path) -> None:
    """Train dag2_silu, and show its graph at "=" beside a tree, as lab.graph shows that of a text.

    It is the first tree whose root is read wrong before the graph, and right after it.
    """
    trial, model = train_trial(Trial("dag2_silu", rate=RATES[0]))
    tokens, levels = draw_test_trees(trial)
    rows = read_off(model, tokens, levels)[1:]
    before = rows[0][-1]  # the roots that are read
    after = rows[-1][-1]
    root = levels[-1][-len(after) :]
    is_example = (before != root) & (after == root)
    i = is_example.flatten().tolist().index(True) - len(root)  # counted from the end
    tree = {
        # The values at each level, leaves first.
        "values": [values[i].tolist() for values in levels],
        # What is read off the nodes, by depth.
        "read": [[read[i].tolist() for read in row] for row in rows],
        # How much of that is right over all trees, by depth and level.
        "right": [shares_right(row, levels) for row in rows],
    }
    texts = [*map(str, tree["values"][0]), "="]
    write_page(path, model, tokens[i].tolist(), texts, len(texts), tree=tree)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--against", default="sum", choices=ARMS, help="(default: sum)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--full", nargs="*", choices=ARMS, metavar="ARM", help="all trials (of these arms)")
    add("--plot", type=Path, metavar="FILE.png", help="a table and a picture of what is there")
    add("--page", type=Path, metavar="FILE.html", help="a trained graph beside a tree")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.full is not None:
        for arm in args.full or ARMS:
            run_arm(arm)
    elif args.plot:
        check_target(args.plot, ".png")
        trials = read_trials()
        print_table(trials, args.against)
        draw_picture(args.plot, trials)
    elif args.page:
        check_target(args.page, ".html")
        make_page(args.page)
    else:
        for arm in ("sum", "dag2_silu", "series"):
            trial, _ = train_trial(Trial(arm, steps=8_000, rate=RATES[0]))
            print(f"{arm:12}{trial.accuracy:.3f}", flush=True)


if __name__ == "__main__":
    main()
