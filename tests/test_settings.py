"""The settings of train.py: where they come from, and what is refused in one line."""

import re
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

import prepare
import sample
import train
from model import GPT, Experts, ModelConfig
from tests.conftest import REPOSITORY, TINY_RUN
from train import TrainConfig

CONFIGS = sorted(REPOSITORY.glob("configs/*.toml"))
SHORT_RUN = [word for word in TINY_RUN if "out_dir" not in word] + ["--max_steps=1"]
WRONG_TYPE = [("n_layer", 1.5), ("min_lr", "low"), ("compile", "yes")]
NO_CHOICE = [("dtype", "float16"), ("aggregator", "mean"), ("dag_gate", "relu")]
TOO_SMALL = [("max_steps", 0), ("seed", -1), ("n_layer", 0), ("n_embd", -16), ("block_size", 1)]
TOO_LARGE = [("learning_rate", float("nan")), ("learning_rate", float("inf")), ("seed", 10**20)]
COMPILER_ERRORS = [(TorchDynamoException, ["no g++"]), (InductorError, [OSError("no g++"), None])]


@pytest.fixture(autouse=True)
def no_samples(monkeypatch):
    """Leave out the samples at the end of a training, which take longer than its one step."""
    monkeypatch.setattr(sample, "main", lambda arguments: None)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("small.toml", {"out_dir": "out/small", "n_layer": 3}),
        ("small.toml mine.toml", {"out_dir": "mine", "n_layer": 9}),
        ("mine.toml small.toml", {"out_dir": "out/small", "n_layer": 3}),
        ("--n_layer=5 mine.toml", {"out_dir": "mine", "n_layer": 5}),
        ("mine.toml --out_dir out/typed", {"out_dir": "out/typed", "n_layer": 9}),
        ("--compile --n_layer 5", {"out_dir": "out/default", "n_layer": 5, "compile": True}),
        ("--compile small.toml", {"out_dir": "out/small", "n_layer": 3, "compile": True}),
        ("--compile=false", {"out_dir": "out/default", "compile": False}),
        ("--compile false small.toml", {"out_dir": "out/small", "n_layer": 3, "compile": False}),
    ],
)
def test_where_a_setting_comes_from(words, settings):
    """A typed value goes before the last file that has the key, and that before a default."""
    Path("small.toml").write_text("n_layer = 3\n")
    Path("mine.toml").write_text('n_layer = 9\nout_dir = "mine"\n')
    assert train.read_settings(words.split()) == settings


@pytest.mark.parametrize("form", ["--{}={}", "{} = {!r}"], ids=["typed", "toml"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n_layr", 3, "unknown setting n_layr=3, did you mean n_layer?"),
        ("n_layer", "two", "n_layer must be of type int, got 'two'"),
        ("min_lr", 0.5, "min_lr (0.5) exceeds learning_rate 0.001"),
        ("top_k", 17, "top_k (17) must not exceed n_expert (16)"),
        ("n_embd", 20, "n_embd (20) must be a multiple of 2·n_head (8)"),
        ("n_kv_head", 3, "n_head (4) must be a multiple of n_kv_head (3)"),
        ("vocab_size", 256, "tiny needs vocab_size=257 or more"),
        ("device", "gpu", "no device 'gpu' here"),
        ("device", "cuda", "no device 'cuda' here"),
        ("dataset", "other", "prepare.py FILES --name other"),
        ("dataset", "shakespeare", "prepare.py shakespeare"),
        *[(key, value, f"{key} must be ") for key, value in WRONG_TYPE + NO_CHOICE],
        *[(key, value, f"{key} must be ") for key, value in TOO_SMALL + TOO_LARGE],
    ],
)
def test_a_bad_setting_is_refused(key, value, message, form, corpus, refused):
    """Typed or in a config file, it is named in one line with its value, and nothing is written."""
    setting = form.format(key, value)
    Path("base.toml").write_text('dataset = "tiny"\nmax_steps = 1\nn_layer = 1\n')
    Path("bad.toml").write_text(setting)
    refused(message, train, "base.toml", setting if setting.startswith("--") else "bad.toml")
    assert not Path("out").exists()


@pytest.mark.parametrize("word", ["none.toml", "broken.toml", "nested.toml"])
def test_what_holds_no_settings_is_refused(word, corpus, refused):
    """A file that is not a flat list of settings is named."""
    Path("broken.toml").write_text("n_layer = \n")
    Path("nested.toml").write_text("[nested]\nn_layer = 3\n")
    refused(word.removeprefix("--").removesuffix(".toml"), train, *SHORT_RUN, word)


def test_a_block_must_be_shorter_than_a_split(corpus, call, refused):
    """The longest block has one token less than the validation split, as it needs a target."""
    _, _, val_tokens = prepare.open_dataset("tiny")
    refused("block_size", train, *SHORT_RUN, f"--block_size={len(val_tokens)}")
    assert call(train, *SHORT_RUN, f"--block_size={len(val_tokens) - 1}")[0] == 0


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("token", [257, 60_000])
def test_an_id_beyond_the_vocabulary_is_refused(split, token, corpus, refused):
    """The ids of 257 embeddings are 0 to 256."""
    tokens = np.memmap(f"data/tiny/{split}.bin", np.uint16, "r+")
    tokens[:] = token
    refused("the data has ids beyond vocab_size", train, *SHORT_RUN)


@pytest.mark.parametrize("form", ["--out_dir=~/run", "run.toml"])
def test_a_tilde_is_the_home_directory(form, corpus, trained, call, monkeypatch):
    """Weights are found and written below $HOME, and no folder is called "~"."""
    monkeypatch.setenv("HOME", str(Path("text").absolute()))
    Path("text/best.pt").write_bytes(trained)
    Path("run.toml").write_text('out_dir = "~/run"\n')
    call(train, *SHORT_RUN, "--init_from=~/best.pt", form)
    assert Path("text/run/ckpt.pt").exists()
    assert not Path("~").exists()


def test_how_to_go_on_is_said_in_words_of_a_shell(corpus, call, monkeypatch):
    """The command that is printed when a run was stopped quotes a folder with a space."""

    def receive_at_once(number, handler):
        if callable(handler):
            handler(number, None)

    monkeypatch.setattr(train.signal, "signal", receive_at_once)
    _, out, _ = call(train, *SHORT_RUN, "--max_steps=2", "--out_dir=out/a run")
    assert "stopped at step 1; go on with --resume --out_dir='out/a run'\n" in out


@pytest.mark.parametrize(
    ("words", "advice", "is_due"),
    [
        ("--warmup_steps=1", "the warm-up never ends", True),
        ("--warmup_steps=0", "the warm-up never ends", False),
        ("--compile", "--compile pays", True),
        ("--compile --dtype=bfloat16", "--compile pays", False),
    ],
)
def test_settings_that_gain_nothing(words, advice, is_due, corpus, call, monkeypatch):
    """A warm-up without end and compiling in float32 for a CPU are allowed, with advice."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    _, out, _ = call(train, *SHORT_RUN, *words.split())
    assert (advice in out) == is_due


@pytest.mark.parametrize(("kind", "arguments"), COMPILER_ERRORS)
def test_what_torch_cannot_compile(kind, arguments, corpus, refused, monkeypatch):
    """An error of the compiler is no riddle, because one line says how to do without it."""

    def fail(*inputs):
        raise kind(*arguments)

    monkeypatch.setattr(torch, "compile", lambda model: fail)
    refused("--compile=false", train, *SHORT_RUN, "--compile")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_error_in_the_code_keeps_its_traceback(kind, corpus, call, monkeypatch):
    """A slip in the model is nothing that the person at the keyboard could mend."""
    monkeypatch.setattr(train, "evaluate", lambda *arguments: [0.0, 0.0, 0.0])
    monkeypatch.setattr(Experts, "forward", Mock(side_effect=kind))
    with pytest.raises(kind):
        call(train, *SHORT_RUN)


def test_help_explains_every_setting(call):
    """--help has a line for each field, with its type, its default and a comment."""
    _, out, _ = call(train, "--help")
    explained = re.findall(r"^ +(\w+): \w+ = .+  # \w", out, re.MULTILINE)
    assert explained == [field.name for field in fields(TrainConfig) + fields(ModelConfig)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_are_valid(path):
    """Every file in configs/ says what it is for, and is accepted."""
    settings = train.read_settings([str(path)])
    train.make_config(TrainConfig, settings)
    train.make_config(ModelConfig, settings)
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_dag_moe_l_has_the_papers_size():
    """The model of configs/dag_moe_l.toml has 699M parameters."""
    settings = train.read_settings([str(REPOSITORY / "configs/dag_moe_l.toml")])
    with torch.device("meta"):  # shapes without numbers
        model = GPT(train.make_config(ModelConfig, settings))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == 699
