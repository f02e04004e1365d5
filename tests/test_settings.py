"""The settings of train.py: where they come from, and what is refused in one line."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch._inductor.exc import InductorError

import train
from model import GPT, ModelConfig
from tests.conftest import REPOSITORY, TINY_RUN

SHORT_RUN = [word for word in TINY_RUN if "out_dir" not in word] + ["--max_steps=1"]


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("small.toml mine.toml", {"out_dir": "mine", "n_layer": 9}),
        ("--n_layer=5 mine.toml --out_dir out/typed", {"out_dir": "out/typed", "n_layer": 5}),
        ("--compile --n_layer 5", {"out_dir": "out/default", "n_layer": 5, "compile": True}),
        ("--compile small.toml", {"out_dir": "out/small", "n_layer": 3, "compile": True}),
        ("--compile false small.toml", {"out_dir": "out/small", "n_layer": 3, "compile": False}),
    ],
)
def test_where_a_setting_comes_from(words, settings):
    """A typed value goes before the last file that has the key, and that before a default."""
    Path("small.toml").write_text("n_layer = 3\n")
    Path("mine.toml").write_text('n_layer = 9\nout_dir = "mine"\n')
    assert train.read_settings(words.split()) == settings


def test_help_shows_every_setting_with_its_comment(call):
    """It is the source of both dataclasses."""
    status, out, _ = call(train, "--help")
    assert status == 0
    for key in train.SETTING_TYPES:
        assert f"    {key}: " in out
    assert "# K, experts chosen per token" in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--n_layr=3", "unknown setting n_layr=3, did you mean n_layer?"),
        ("--compile=yes", "compile must be of type bool, got 'yes'"),
        ("float.toml", "seed must be of type int, got 1.5"),
        ("broken.toml", "cannot read the config file broken.toml"),
        ("none.toml", "cannot read the config file none.toml"),
        ("--dtype=float16", "dtype must be auto, float32 or bfloat16"),
        ("--aggregator=mean", "aggregator must be "),
        ("--n_layer=0", "n_layer must be at least 1"),
        ("--max_steps=0", "max_steps must be 1 or more"),
        ("--learning_rate=nan", "learning_rate must be 0 or more"),
        ("--seed=2147483648", "seed must be 0 or more, below 2**31"),
        ("--min_lr=0.5", "min_lr (0.5) exceeds learning_rate 0.01"),
        ("--top_k=5", "top_k (5) must not exceed n_expert (4)"),
        ("--n_embd=18", "n_embd (18) must be a multiple of 2·n_head (4)"),
        ("--n_kv_head=3", "n_head (2) must be a multiple of n_kv_head (3)"),
        ("--vocab_size=256", "tiny needs vocab_size=257 or more"),
        ("--block_size=99999", "a split of tiny is not longer than block_size"),
        ("--device=cuda", "no device 'cuda' here"),
        ("--dataset=other", "prepare.py FILES --name other"),
    ],
)
def test_a_bad_setting_is_refused(word, message, corpus, refused):
    """Typed or in a config file, it is named in one line, and nothing is written."""
    Path("float.toml").write_text("seed = 1.5\n")
    Path("broken.toml").write_text("n_layer = \n")
    refused(message, train, *SHORT_RUN, word)
    assert not Path("out").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_beyond_the_vocabulary_is_refused(split, corpus, refused):
    """The ids of 257 embeddings are 0 to 256."""
    np.memmap(f"data/tiny/{split}.bin", np.uint16, "r+").fill(257)
    refused("the data has ids beyond vocab_size", train, *SHORT_RUN)


def test_folders_are_as_in_a_shell(corpus, trained, call, monkeypatch):
    """A tilde is $HOME, and how to go on after a stop is said with a space in quotes."""

    def receive_at_once(number, handler):
        if callable(handler):
            handler(number, None)

    monkeypatch.setattr(train.signal, "signal", receive_at_once)
    home = Path("text").absolute()
    monkeypatch.setenv("HOME", str(home))
    (home / "best.pt").write_bytes(trained)
    words = ["--max_steps=2", "--init_from=~/best.pt", "--out_dir=~/a run"]
    _, out, _ = call(train, *SHORT_RUN, *words)
    assert f"stopped at step 1; go on with --resume --out_dir='{home}/a run'\n" in out
    assert (home / "a run/ckpt.pt").exists()


@pytest.mark.parametrize(
    ("words", "is_due"), [("--warmup_steps=1", True), ("--warmup_steps=0 --dtype=bfloat16", False)]
)
def test_settings_that_gain_nothing(words, is_due, corpus, call, monkeypatch):
    """A warm-up without end and compiling in float32 for a CPU are allowed, with advice."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    _, out, _ = call(train, *SHORT_RUN, "--compile", *words.split())
    assert ("the warm-up never ends" in out) == is_due
    assert ("--compile pays" in out) == is_due


def test_only_an_error_of_the_compiler_is_told_in_a_line(corpus, call, refused, monkeypatch):
    """One can do without it, but a slip in the code keeps its traceback."""
    network = Mock(side_effect=InductorError(OSError("no g++"), None))
    monkeypatch.setattr(torch, "compile", lambda model: network)
    refused("--compile=false", train, *SHORT_RUN, "--compile")
    network.side_effect = RuntimeError
    with pytest.raises(RuntimeError):
        call(train, *SHORT_RUN, "--compile")


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.toml")))
def test_config_files_are_valid(path):
    """All settings are accepted, and dag_moe_l has the 699M parameters of the paper's model."""
    settings = train.read_settings([str(path)])
    train.make_config(train.TrainConfig, settings)
    with torch.device("meta"):  # shapes without numbers
        model = GPT(train.make_config(ModelConfig, settings))
    if path.stem == "dag_moe_l":
        assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == 699
