"""The comparison: its configurations are fair, its statistics right, and a sweep goes on where it was stopped."""

import csv
import dataclasses
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import torch

import bench
import train
from model import GPT, ModelConfig
from sample import load_checkpoint
from tests.conftest import TINY_RUN, make_corpus

ABLATION = Path(bench.__file__).with_name("configs") / "ablation"
ARMS = sorted(path.stem for path in ABLATION.glob("*.toml") if path.stem != "base")
SMALL = [setting for setting in TINY_RUN if "out_dir" not in setting]


def settings_of(arm: str, folder: Path = ABLATION) -> dict:
    return train.read_settings([str(folder / "base.toml"), str(folder / f"{arm}.toml")])


def model_of(arm: str, folder: Path = ABLATION) -> GPT:
    with torch.device("meta"):
        return GPT(train.make_config(ModelConfig, settings_of(arm, folder)))


# The arms


@pytest.mark.parametrize("arm", ARMS)
def test_arms_differ_in_the_aggregator_only(arm):
    """An arm changes nothing about data, schedule, backbone or router; of the experts only sum_compute their width."""
    keys = tomllib.loads((ABLATION / f"{arm}.toml").read_text()).keys()
    allowed = {"aggregator", "shared_dim"} | ({"expert_dim"} if arm == "sum_compute" else set())
    assert "aggregator" in keys, "said, because with --init_from the default is the other model's"
    assert all(key in allowed or key.startswith("dag_") for key in keys)
    train.make_config(train.TrainConfig, settings_of(arm))
    train.make_config(ModelConfig, settings_of(arm))


def test_equal_parameters_and_equal_compute():
    """shared has the weights of dag2's matrices; sum_compute and shared_compute its multiply-adds, within 1 %."""
    sizes = {arm: model_of(arm).count_parameters().total for arm in ARMS}
    cost = {arm: model_of(arm).multiply_adds_per_token() for arm in ARMS}
    config = model_of("dag2").config
    assert sizes["dag2"] - sizes["shared"] == config.n_layer * config.dag_depth * config.n_embd  # the graph's norms
    for arm in ("sum_compute", "shared_compute"):
        assert cost[arm].total == pytest.approx(cost["dag2"].total, rel=0.01)
    assert cost["dense"].total == pytest.approx(cost["sum"].total, rel=0.01)
    assert cost["coe"].total == pytest.approx(cost["sum"].total, rel=0.01)


def test_the_large_comparison_is_the_small_ones():
    """configs/ablation_s: the shape of dag_moe_s, arms of equal parameters and of equal compute, 100M tokens each."""
    folder = ABLATION.with_name("ablation_s")
    arms = sorted(path.stem for path in folder.glob("*.toml") if path.stem != "base")
    assert arms == ["dag2", "shared", "shared_compute", "sum"]
    large = train.read_settings([str(ABLATION.with_name("dag_moe_s.toml")), "--vocab_size=257"])
    config = model_of("dag2", folder).config
    assert config == train.make_config(ModelConfig, large)
    sizes = {arm: model_of(arm, folder).count_parameters().total for arm in arms}
    cost = {arm: model_of(arm, folder).multiply_adds_per_token().total for arm in arms}
    assert sizes["dag2"] - sizes["shared"] == config.n_layer * config.dag_depth * config.n_embd  # the graph's norms
    assert cost["shared_compute"] == pytest.approx(cost["dag2"], rel=0.01)
    training = {arm: train.make_config(train.TrainConfig, settings_of(arm, folder)) for arm in arms}
    assert len({dataclasses.replace(each, out_dir="") for each in training.values()}) == 1
    assert training["sum"].max_steps * train.tokens_per_step(config, training["sum"]) >= 100e6


# The table


def evaluation(**changes) -> bench.Evaluation:
    """One evaluation of a made-up run."""
    made_up = dict(
        arm="sum", seed=1, data="d", evaluated_on="v", eval_tokens=100, tokens=1000, training="t", model="m",
        parameters=10, active=5, multiply_adds=20, learning_rate=0.1, at_token=1000, val_loss=1.0, tokens_per_s=100.0,
    )  # fmt: skip
    return bench.Evaluation(**made_up | changes)


def write_results(path: str, rows: list[bench.Evaluation]) -> str:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, bench.Evaluation._fields)
        writer.writeheader()
        writer.writerows(row._asdict() for row in rows)
    return path


def test_the_table_is_what_the_logs_say(call):
    """Means, standard errors, paired differences with their interval, equal time and speed, by hand."""
    losses = {"sum": [1.0, 1.2, 1.1], "dag": [0.9, 1.15, 1.02]}
    rows = []
    for arm, values in losses.items():
        for seed, loss in enumerate(values, start=1):
            speed = {"sum": 100.0, "dag": 50.0}[arm]
            shared = dict(arm=arm, seed=seed, multiply_adds={"sum": 20, "dag": 30}[arm])
            rows.append(evaluation(**shared, at_token=0, val_loss=5.0, tokens_per_s=None))
            rows.append(evaluation(**shared, at_token=500, val_loss=2.0, tokens_per_s=speed))
            rows.append(evaluation(**shared, at_token=1000, val_loss=loss, tokens_per_s=speed))
    rows.append(evaluation(arm="one", seed=2, val_loss=1.3, learning_rate=0.2))
    rows.append(evaluation(arm="dag", seed=4, multiply_adds=30, at_token=0, val_loss=5.0, tokens_per_s=None))
    rows.append(evaluation(arm="dag", seed=4, multiply_adds=30, at_token=500, val_loss=9.0))
    rows.append(evaluation(arm="one", seed=5, val_loss=1.5, learning_rate=0.2))
    rows.reverse()  # the order of a file's rows does not matter
    path = write_results("a.csv", rows)
    status, out, error = call(bench, "quality", path)
    assert status == 0, error
    table = {line.split()[0]: line for line in out.splitlines()[3:6]}
    assert list(table) == ["dag", "sum", "one"], "the best first"
    assert out.splitlines()[6:] == [
        "At 10 s the fastest arm is done; slower ones are in mid-schedule, at a higher learning rate (interpolated).",
        "Learning rates: one 0.2, dag 0.1, sum 0.1.",
        "Without a pair: one with seed 5.",
        "Left out: dag-4, at 500 tokens, with loss 9.0000.",
    ]
    differences = [-0.1, -0.05, -0.08]
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(3)
    low, high = mean - 4.303 * error, mean + 4.303 * error
    assert f"{mean:+.4f} ({low:+.4f} to {high:+.4f})" in table["dag"]
    assert f"1.0233 ± {statistics.stdev(losses['dag']) / math.sqrt(3):.4f}" in table["dag"]
    assert table["dag"].split()[-3:] == ["2.0000", "50", "0.50"] and table["sum"].split()[-3:] == [
        "1.1000",
        "100",
        "1.00",
    ]
    assert " 1.50 " in table["dag"], "multiply-adds"
    assert "+0.1000" in table["one"] and "(" not in table["one"], "one pair, with the same seed of sum"

    again = call(bench, "quality", path, "--csv=b.csv", "--plot=b.png")
    assert again[0] == 0 and Path("b.png").read_bytes().startswith(b"\x89PNG")
    assert call(bench, "quality", "b.csv")[1] == out
    with mock.patch.object(bench, "FAR", 0.05), mock.patch("matplotlib.figure.Figure.suptitle") as title:
        assert call(bench, "quality", path, "--plot=c.png")[0] == 0
    title.assert_called_once_with("not drawn, because far worse: one (+0.10)")
    assert "-0.1000" in call(bench, "quality", path, "--against=one")[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "other"}, "dag-1 and sum-1 differ in data (other and d)"),
        ({"tokens": 2000}, "differ in tokens (2000 and 1000)"),
        ({"evaluated_on": "w"}, "differ in evaluated_on"),
        ({"eval_tokens": 50}, "differ in eval_tokens"),
        ({"training": "u"}, "differ in training"),
        ({"arm": "sum", "seed": 2, "model": "n"}, "sum-2 and sum-1 differ in model (n and m)"),
        ({"arm": "sum", "seed": 2, "at_token": 999, "tokens": 1000}, "sum-2 was evaluated at other steps than sum-1"),
        ({"arm": "sum", "seed": 2, "learning_rate": 0.2}, "differ in learning_rate (0.2 and 0.1)"),
    ],
)
def test_what_can_not_be_compared_is_refused(refused, changes, message):
    """Runs unequal in data, tokens or evaluation, and runs of an arm that are not of one arm."""
    write_results("a.csv", [evaluation(), evaluation(**{"arm": "dag"} | changes)])
    refused(message, bench, "quality", "a.csv")


def test_nonsense_is_refused(refused, workdir):
    """Files that are no results, runs given twice, no runs, an unknown arm."""
    good = write_results("a.csv", [evaluation()])
    refused("sum-1 is there twice, the second time in a.csv", bench, "quality", good, good)
    refused(
        "there is no finished run of 'dag' to compare with; there are: sum", bench, "quality", good, "--against=dag"
    )
    refused("a.csv holds no weights that could be evaluated on tiny", bench, "quality", good, "--on=tiny")
    (workdir / "bad.csv").write_text("arm,seed\nsum,x\n")
    refused("bad.csv is not a file that bench.py quality --csv wrote", bench, "quality", "bad.csv")
    for column, value in (("val_loss", ""), ("val_loss", "nan"), ("arm", ""), ("seed", "x"), ("arm", "a" * 200_000)):
        write_results("bad.csv", [evaluation(), evaluation(**{"seed": 2, column: value})])
        refused("bad.csv is not a file that bench.py quality --csv wrote", bench, "quality", "bad.csv")
    (workdir / "empty.csv").touch()
    refused("empty.csv holds no runs", bench, "quality", "empty.csv")
    refused("nowhere holds no runs", bench, "quality", "nowhere")
    (workdir / "binary.csv").write_bytes(bytes(range(256)))
    refused("binary.csv is not a file that bench.py quality --csv wrote", bench, "quality", "binary.csv")
    (workdir / "empty").mkdir()
    refused("empty holds no runs: python bench.py sweep", bench, "quality", "empty")
    refused("empty must hold base.toml, and beside it a file per arm", bench, "sweep", "empty")
    for seeds in ("0", "5-4", "-1", "two", ""):
        refused("--seeds must be a number, for seeds 1 to that, or", bench, "sweep", ABLATION, f"--seeds={seeds}")
    refused("--jobs must be at least 1", bench, "sweep", ABLATION, "--jobs=0")
    refused("has no arm 'dag3'; there are: coe, dag1,", bench, "sweep", ABLATION, "--arms", "dag3")
    refused("--seed=3: the sweep sets that itself", bench, "sweep", ABLATION, "--seed=3")
    refused("the nearest key is n_layer", bench, "sweep", ABLATION, "--n_layers=3")


def test_seeds():
    """A number counts from 1, a range is what it says."""
    assert list(bench.seed_range("3")) == [1, 2, 3] and list(bench.seed_range("4-5")) == [4, 5]


def test_student_t():
    """Table values, and the expansion that goes on where the table ends."""
    assert bench.student_t(2) == 4.303 and bench.student_t(10) == 2.228
    assert bench.student_t(11) == pytest.approx(2.201, abs=2e-3)
    assert bench.student_t(30) == pytest.approx(2.042, abs=1e-3)


# Runs


def test_finished_runs_are_read_from_their_folders(corpus, call, refused):
    """Rows from log and checkpoint; on another dataset the last weights' loss; what is not finished is named."""
    for arm, seed, steps in (("sum", 1, 6), ("dag", 1, 6), ("dag", 2, 3)):
        run = [f"--aggregator={arm}", f"--seed={seed}", f"--out_dir=out/all/{arm}-{seed}", f"--max_steps={steps}"]
        assert call(train, *SMALL, *run)[0] == 0
    refused("dag-2 and dag-1 differ in tokens (192 and 384)", bench, "quality", "out/all")
    checkpoint = load_checkpoint(Path("out/all/dag-2/ckpt.pt"))
    checkpoint["train_config"]["max_steps"] = 6  # as if it had been stopped
    torch.save(checkpoint, "out/all/dag-2/ckpt.pt")
    status, out, error = call(bench, "quality", "out/all", "--csv=a.csv")
    assert status == 0 and "Left out: dag-2, at 192 tokens" in out, error
    rows = {(row.arm, row.seed, row.at_token): row for row in bench.read_evaluations(Path("a.csv"))}
    assert set(rows) == {("dag", 2, 0), ("dag", 2, 192)} | {(a, 1, n) for a in ("dag", "sum") for n in (0, 192, 384)}
    log = bench.read_rows(Path("out/all/dag-1/log.csv"))
    assert [rows["dag", 1, int(row["tokens"])].val_loss for row in log] == [float(row["val_loss"]) for row in log]
    size = GPT(ModelConfig(**load_checkpoint(Path("out/all/dag-1/ckpt.pt"))["model_config"])).count_parameters()
    assert rows["dag", 1, 384].parameters == size.total and rows["dag", 1, 192].tokens == 384

    make_corpus(Path("more"), documents=20)
    bench.prepare.prepare(["more"], name="other", encoding="bytes")
    status, out, error = call(bench, "quality", "out/all", "--on=other", "--csv=b.csv")
    assert status == 0 and "tokens/s" not in out, error
    expected = call(train, "--init_from=out/all/dag-1/ckpt.pt", "--eval_only=other", "--eval_tokens=64")[1]
    loss = {row.arm: row.val_loss for row in bench.read_evaluations(Path("b.csv"))}["dag"]
    assert f"validation loss {loss:.4f}" in expected
    shutil.rmtree("out/all/dag-2")
    Path("out/all/dag-1").rename("out/all/dag-7")
    refused("out/all/dag-7 should be called ARM-1, for that is its seed", bench, "quality", "out/all")


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_stopped(corpus):
    """Stopped by SIGTERM and started again it ends with the losses of plain train.py runs and skips what is done."""
    Path("arms").mkdir()
    Path("arms/base.toml").write_text("max_steps = 200\neval_interval = 100\n")
    Path("arms/one.toml").write_text('aggregator = "sum"\n')
    Path("arms/two.toml").write_text('aggregator = "dag"\n')
    settings = [s for s in SMALL if not re.match("--(max_steps|eval_interval)", s)]
    sweep = [sys.executable, bench.__file__, "sweep", "arms", "--seeds=2", "--jobs=2", *settings]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment |= {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(sweep, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while not Path("out/arms/two-1/ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped; the same command goes on" in out, error
    assert not Path("out/arms/two-2").exists()

    whole = subprocess.run(sweep, capture_output=True, text=True, env=environment)
    assert whole.returncode == 0 and "4 runs, 0 of them finished already, 2 at a time" in whole.stdout, whole.stderr
    again = subprocess.run(sweep, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and "4 runs, 4 of them finished already" in again.stdout
    plain = [
        sys.executable,
        train.__file__,
        "arms/base.toml",
        "arms/two.toml",
        *settings,
        "--seed=2",
        "--out_dir=out/x",
    ]
    assert subprocess.run(plain, capture_output=True, env=environment).returncode == 0
    ours, theirs = (bench.read_rows(Path(f"out/{name}/log.csv"))[-1] for name in ("arms/two-2", "x"))
    assert {k: v for k, v in ours.items() if k != "tokens_per_s"} == {
        k: v for k, v in theirs.items() if k != "tokens_per_s"
    }

    # Each arm may start from its own weights; a run that fails is named, the others are done.
    more = [*sweep, "--out=out/more", "--init_from=out/arms/{arm}-{seed}", "--max_steps=250"]
    Path("out/arms/one-2/best.pt").unlink()
    Path("out/arms/one-2/ckpt.pt").unlink()
    failed = subprocess.run(more, capture_output=True, text=True, env=environment)
    assert failed.returncode == 2 and "1 of 4 runs failed: out/more/one-2; see train.log there" in failed.stderr
    assert "out/more/one-2 ended with status 2, and said: error: out/arms/one-2" in failed.stdout + failed.stderr
    assert (len(list(Path("out/more").glob("*/ckpt.pt")))) == 3
    for change, message in (
        ("--learning_rate=0.1", "with another learning_rate (was 0.01, now 0.1)"),
        ("--max_steps=300", "out/arms/two-1 was begun with another max_steps (was 200, now 300): choose another --out"),
    ):
        changed = subprocess.run([*sweep, "--arms", "two", change], capture_output=True, text=True, env=environment)
        assert changed.returncode == 2 and message in changed.stderr, changed.stderr
