"""The settings of train.py: where they come from, and what is refused."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

import train
from model import GPT, ModelConfig
from tests.helpers import REPOSITORY, TINY_RUN, assert_refused

SHORT_RUN = [*TINY_RUN, "--max_steps=1"]
SHORT_RUN.remove("--out_dir=out/tiny")


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("small.toml mine.toml", {"out_dir": "mine", "n_layer": 9}),
        ("mine.toml small.toml", {"out_dir": "out/small", "n_layer": 3}),
        ("--n_layer=5 mine.toml --out_dir out/typed", {"out_dir": "out/typed", "n_layer": 5}),
        ("--compile=true --n_layer 5", {"n_layer": 5, "compile": True}),
        ("--compile=False small.toml", {"out_dir": "out/small", "n_layer": 3, "compile": False}),
        ("marked.toml", {"out_dir": "out/marked", "learning_rate": 1}),
    ],
)
def test_where_a_setting_comes_from(words, settings):
    """What is typed counts most, then the last config file that has the setting."""
    Path("small.toml").write_text("n_layer = 3\n")
    Path("mine.toml").write_text('n_layer = 9\nout_dir = "mine"\n')
    Path("marked.toml").write_text("learning_rate = 1\n", encoding="utf-8-sig")
    assert train.parse_settings(words.split()) == settings


def test_help_shows_every_setting_with_its_comment(capsys):
    """It is the source of both dataclasses."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    out = capsys.readouterr().out
    for field in (*fields(train.TrainConfig), *fields(ModelConfig)):
        assert f"    {field.name}: " in out
    assert "# K, experts chosen per token" in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--n_layr=3", "unrecognized arguments: --n_layr=3"),
        ("--lr=1e-3", "unrecognized arguments: --lr=1e-3"),
        ("--compile=yes", "argument --compile: invalid boolean value: 'yes'"),
        ("unknown.toml", "unrecognized arguments: --lr=0.001"),
        ("float.toml", "argument --seed: invalid int value: '1.5'"),
    ],
)
def test_an_unknown_name_or_a_wrong_type_is_refused(word, message, corpus, capsys):
    """argparse names it, whether it was typed or is in a config file, and exits with status 2."""
    Path("unknown.toml").write_text("lr = 1e-3\n")
    Path("float.toml").write_text("seed = 1.5\n")
    with pytest.raises(SystemExit, match="2"):
        train.main([*SHORT_RUN, word])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("broken.toml", "cannot read broken.toml"),
        ("none.toml", "cannot read none.toml"),
        ("--dtype=float16", "dtype must be auto, float32 or bfloat16"),
        ("--aggregator=mean", "aggregator must be sum or dag"),
        ("--dag_gate=relu", "dag_gate must be sigmoid or silu"),
        ("--n_layer=0", "n_layer must be at least 1"),
        ("--max_steps=0", "max_steps must be at least 1"),
        ("--batch_size=-4", "batch_size must be at least 1"),
        ("--seed=-1", "seed must be at least 0"),
        ("--grad_clip=-1", "grad_clip must be at least 0"),
        ("--learning_rate=nan", "learning_rate must be at least 0"),
        ("--min_lr=0.5", "min_lr=0.5 is above learning_rate"),
        ("--top_k=5", "top_k (5) must not exceed n_expert (4)"),
        ("--n_embd=18", "n_embd (18) must be a multiple of 2·n_head (4)"),
        ("--n_kv_head=3", "n_head (2) must be a multiple of n_kv_head (3)"),
        ("--vocab_size=256", "tiny needs a vocab_size of at least 257"),
        ("--block_size=2000", "tiny/val.bin has 1559 tokens, too few for block_size 2000"),
        ("--device=cuda", "cannot compute on device cuda:0: "),
        ("--dataset=other", "run python prepare.py FILES --name other"),
        ("--init_from=text", "there is no checkpoint text/best.pt"),
    ],
)
def test_a_bad_setting_is_refused(word, message, corpus):
    """Typed or in a config file, it is named in one line, and nothing is written."""
    Path("broken.toml").write_text("n_layer = \n")
    assert_refused(train.main, [*SHORT_RUN, word], message)
    assert not Path("out").exists()


def test_weights_of_another_encoding_are_refused(corpus, trained):
    """Both encodings are named, and not their sizes, which follow from them."""
    Path("best.pt").write_bytes(trained)
    contents = torch.load("best.pt", weights_only=True)
    contents["data"]["encoding"] = "gpt2"
    torch.save(contents, "best.pt")
    message = "tiny holds bytes tokens, the checkpoint gpt2 tokens"
    assert_refused(train.main, [*SHORT_RUN, "--init_from=best.pt", "--vocab_size=9"], message)


def test_a_tilde_is_the_home_folder(corpus, trained, monkeypatch):
    """Also behind the = of an option, where a shell leaves it alone."""
    monkeypatch.setenv("HOME", str(Path("text").absolute()))
    Path("text/best.pt").write_bytes(trained)
    train.main([*SHORT_RUN, "--init_from=~/best.pt", "--out_dir=~/a run"])
    train.main(["--resume=~/a run", "--max_steps=2"])
    assert Path("text/a run/ckpt.pt").exists()


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.toml")), ids=lambda p: p.stem)
def test_config_files_are_valid(path):
    """All settings are accepted, and dag_moe_l has the 699M parameters of the paper's model."""
    settings = train.parse_settings([str(path)])
    train.make_config(train.TrainConfig, settings)
    with torch.device("meta"):  # shapes without numbers
        model = GPT(train.make_config(ModelConfig, settings))
    if path.stem == "dag_moe_l":
        assert round(train.count_parameters(model)[0] / 1e6) == 699
