"""A run that was stopped or killed goes on, and ends as if nothing had happened."""

import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import prepare
import train
from model import ModelConfig
from tests.helpers import REPOSITORY, TINY_RUN, assert_refused, load, start

# What the run that is killed was about to do: a function, and which of its calls.
MOMENTS = [
    ("torch.save", 1),  # to write the first ckpt.tmp
    ("torch.save", 2),  # to write best.tmp
    ("torch.save", 3),  # to write a later ckpt.tmp
    ("pathlib.Path.replace", 4),  # to rename best.tmp
    ("pathlib.Path.replace", 5),  # to rename log.tmp
    ("pathlib.Path.replace", 6),  # to rename ckpt.tmp
    ("train.train_step", 5),  # to take a step
]
# Settings that may be changed when a run goes on, and change what it learns.
CHANGES = [
    "learning_rate=0.03",
    "min_lr=0.009",
    "warmup_steps=5",
    "max_steps=7",
    "grad_clip=0.01",
    "balance_coef=3",
    "z_coef=3",
    "dtype=bfloat16",
]
# Settings that decide which run it is.
FIXED = ["dataset=other", "out_dir=out/b", "init_from=out/b", "seed=1"]
FIXED += ["batch_size=2", "grad_accum=2", "weight_decay=0.5", "aggregator=sum", "n_layer=3"]


@pytest.fixture
def half(corpus, monkeypatch) -> Path:
    """The checkpoint of a run that Ctrl-C ended after three of six steps."""
    steps = iter([train.train_step] * 3)

    def step_or_stop(*arguments):
        for train_step in steps:
            return train_step(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", step_or_stop)
        with pytest.raises(KeyboardInterrupt):
            train.main(TINY_RUN)
    return Path("out/tiny/ckpt.pt")


def assert_equal_ends(ours: str, theirs: str) -> None:
    """Compare steps, weights, AdamW's moments and logs of two runs, bit for bit."""
    contents = []
    for folder in (ours, theirs):
        checkpoint = load(f"out/{folder}/ckpt.pt")
        for row in checkpoint["log"]:
            del row["tokens_per_s"]
        contents.append([checkpoint[key] for key in ("step", "model", "optimizer", "log")])
    torch.testing.assert_close(*contents, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("function", "number"), MOMENTS)
def test_a_run_that_was_killed_ends_as_an_undisturbed_one(corpus, function, number):
    """After kill -9 at any moment, the result is the same, bit for bit, with nothing left over."""
    process = start("-m", "tests.kill", function, number, "train", *TINY_RUN)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    if Path("out/tiny/ckpt.pt").exists():
        train.main(["--resume=out/tiny"])
    else:
        train.main(TINY_RUN)
    train.main([*TINY_RUN, "--out_dir=out/whole"])
    assert_equal_ends("tiny", "whole")
    assert sorted(path.name for path in Path("out/tiny").iterdir()) == [
        "best.pt",
        "ckpt.pt",
        "log.csv",
    ]
    best = load("out/tiny/best.pt")
    assert best["log"][-1]["val_loss"] == min(row["val_loss"] for row in load()["log"])


def test_a_finished_run_can_go_on_longer(corpus):
    """With a larger max_steps it takes more steps, and evaluates as often as before."""
    train.main([*TINY_RUN, "--max_steps=1"])
    train.main(["--resume=out/tiny", "--max_steps=9"])
    assert [row["step"] for row in load()["log"]] == [0, 1, 3, 6, 9]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_stored_and_applied(half, change):
    """What the checkpoint says is what the run did, and it did something else than without it."""
    name, _, value = change.partition("=")
    train.main(["--resume=out/tiny", f"--{change}"])
    checkpoint = load()
    assert str(checkpoint["train_config"][name]).startswith(value)
    config = train.TrainConfig(**checkpoint["train_config"])
    for group, weight_decay in zip(
        checkpoint["optimizer"]["param_groups"], (config.weight_decay, 0.0), strict=True
    ):
        assert group["lr"] == train.get_learning_rate(config.max_steps - 1, config)
        assert group["weight_decay"] == weight_decay
    weight = checkpoint["model"]["embed.weight"]
    train.main([*TINY_RUN, "--out_dir=out/whole"])
    assert not torch.equal(weight, load("out/whole/ckpt.pt")["model"]["embed.weight"])


@pytest.mark.parametrize("change", FIXED)
def test_a_run_cannot_become_another_one(half, change):
    """A setting that decides which run it is, is refused, along with the value that it has."""
    name = change.partition("=")[0]
    before = half.read_bytes()
    message = f"out/tiny was started with {name}="
    assert_refused(train.main, ["--resume=out/tiny", f"--{change}"], message)
    assert half.read_bytes() == before


def test_every_setting_is_either_fixed_or_applied():
    """No setting can be typed beside --resume without effect."""
    tested = {change.partition("=")[0] for change in CHANGES + FIXED}
    # These say where a run computes, and when and on what it is evaluated.
    tested |= {"resume", "device", "compile", "eval_interval", "eval_tokens"}
    assert tested - {f.name for f in fields(ModelConfig)} == {
        f.name for f in fields(train.TrainConfig)
    }


def test_config_files_and_steps_that_are_done_are_refused(half):
    """A config file would undo what the run was started with, and max_steps must lie ahead."""
    Path("base.toml").write_text("max_steps = 400\n")
    message = "leave out the config file"
    assert_refused(train.main, ["base.toml", "--resume=out/tiny"], message)
    message = "out/tiny is at step 3; raise --max_steps"
    assert_refused(train.main, ["--resume=out/tiny", "--max_steps=3"], message)


def test_a_run_is_neither_overwritten_nor_resumed_on_other_data(half):
    """The same command again is refused, and so is --resume if the dataset has changed."""
    assert_refused(train.main, TINY_RUN, "out/tiny holds a run: --resume it, or change --out_dir")
    Path("text/new.txt").write_text("another document")
    prepare.main(["text", "--name=tiny", "--encoding=bytes"])
    assert_refused(train.main, ["--resume=out/tiny"], "tiny has changed since out/tiny was saved")


def test_of_two_runs_in_one_folder_the_second_fails(corpus, monkeypatch):
    """The run that is second to save ends with an error, and overwrites nothing of the first."""
    evaluate = train.evaluate

    def start_another_run(*arguments):
        monkeypatch.setattr(train, "evaluate", evaluate)
        train.main([*TINY_RUN, "--seed=2"])
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", start_another_run)
    assert_refused(train.main, [*TINY_RUN, "--seed=1"], "another run has started in out/tiny")
    for name in ("best.pt", "ckpt.pt"):
        assert load(f"out/tiny/{name}")["train_config"]["seed"] == 2


def test_a_checkpoint_of_no_use_is_refused(half):
    """The error names the file, whether another version wrote it, or it is cut short, or empty."""
    torch.save(load() | {"version": "0.3"}, half)
    assert_refused(train.main, ["--resume=out/tiny"], "ckpt.pt is of version 0.3, and this is 0.4")
    for size in (-100, 100, 0):
        half.write_bytes(half.read_bytes()[:size])
        assert_refused(train.main, ["--resume=out/tiny"], "ckpt.pt is not a checkpoint")
    assert_refused(train.main, ["--resume=out/none"], "there is no checkpoint out/none/ckpt.pt")


def test_a_full_disk_leaves_the_old_checkpoint(half, monkeypatch):
    """If saving fails, what was saved before is still there, and the run can go on."""

    def fail(contents, path):
        raise OSError("No space left on device")

    before = half.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space left"):
            train.main(["--resume=out/tiny"])
    assert half.read_bytes() == before
    train.main(["--resume=out/tiny"])
    assert load()["step"] == 6


def test_no_signal_is_caught(corpus):
    """SIGTERM ends a run at once, as it ends any other program."""
    process = start(REPOSITORY / "train.py", *TINY_RUN, "--max_steps=100000")
    while not Path("out/tiny/ckpt.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
