"""train.py: the data order, exact resuming, ranks, evaluation, what is logged and saved, and bad input."""

import csv
import math
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import train
from model import GPT, ModelConfig, balance_loss
from tests.conftest import TINY_RUN
from tests.reference import randomize
from train import TrainConfig

REPOSITORY = Path(train.__file__).parent


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def read_log(path="out/tiny/log.csv") -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_equal_runs(a: dict, b: dict, tolerance: float = 0.0) -> None:
    """Weights and AdamW's moments of two checkpoints."""
    assert a["step"] == b["step"] and a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert (a["model"][name] - b["model"][name]).abs().max() <= tolerance, name
    if tolerance == 0:
        for i, moments in a["optimizer"]["state"].items():
            assert all(torch.equal(x, b["optimizer"]["state"][i][key]) for key, x in moments.items())


# Data


def test_batch_is_a_function_of_data_seed_and_step():
    """One process with 4 micro-steps sees what 2 × 2 and one large batch see; other steps and seeds see other data."""
    tokens = np.memmap(Path("tokens"), dtype=np.uint16, mode="w+", shape=1000)
    tokens[:] = np.arange(1000)
    model_config = ModelConfig(vocab_size=1000, block_size=8)

    def batch(step, seed=3, batch_size=2, grad_accum=4):
        config = TrainConfig(seed=seed, batch_size=batch_size, grad_accum=grad_accum)
        parts = [train.get_batch(tokens, model_config, config, step, m) for m in range(grad_accum)]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    x, y = batch(step=5)
    assert x.shape == (8, 8) and torch.equal(y, x + 1), "tokens are their own positions here"
    assert torch.equal(x, batch(step=5)[0])
    assert torch.equal(x, batch(step=5, batch_size=8, grad_accum=1)[0])
    assert not torch.equal(x, batch(step=6)[0]) and not torch.equal(x, batch(step=5, seed=4)[0])
    starts = torch.cat([batch(step)[0][:, 0] for step in range(400)])
    assert starts.min() == 0 and starts.max() == 991, "the first and the last window are drawn, too"


def test_evaluation_equals_a_plain_loop(corpus):
    """Validation loss is the mean cross-entropy over evenly spaced windows; nothing depends on the batch size."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    data = train.open_dataset("tiny")
    tokens = data.val
    windows = np.linspace(0, len(tokens) - 17, 30).astype(int)
    losses = []
    for i in windows:
        window = torch.from_numpy(tokens[i : i + 17].astype(np.int64))[None]
        losses.append(F.cross_entropy(model(window[:, :-1]).logits[0], window[0, 1:]).item())
    results = []
    for batch_size in (1, 7, 100):
        config = TrainConfig(eval_tokens=30 * 16 + 5, batch_size=batch_size)
        results.append(train.evaluate(model, data, config, train.nullcontext()))
        assert results[-1]["val_loss"] == pytest.approx(sum(losses) / 30, abs=1e-5)
        assert results[-1] == pytest.approx(results[0], rel=1e-5) and model.training
    all_tokens = TrainConfig(eval_tokens=10**9, batch_size=64)
    assert train.evaluate(model, data, all_tokens, train.nullcontext())["dead_experts"] == 0


def test_evaluation_reports_routing_and_graph(corpus):
    """Balance, largest logit, load, mean gates and updates are those of one forward pass over all windows."""
    torch.manual_seed(0)
    model = randomize(GPT(ModelConfig(block_size=16, n_layer=2, n_embd=32)))
    data = train.open_dataset("tiny")
    result = train.evaluate(model, data, TrainConfig(eval_tokens=20 * 16, batch_size=3), train.nullcontext())
    offsets = np.linspace(0, len(data.val) - 17, 20).astype(int)
    records = []
    out = model(*train.cut_windows(data.val, offsets, model.config), records)
    share = out.router.load / out.router.load.sum(dim=1, keepdim=True)
    expected = {
        "val_loss": out.loss.item(),
        "z": sum(z.item() for z in out.router.z) / 2,
        "balance": sum(16 * (share[i] * out.router.prob[i]).sum().item() for i in range(2)) / 2,
        "max_logit": max(x.item() for x in out.router.max_logit),
        "max_expert_share": share.max().item(),
    }
    for depth in range(2):
        gates = [record.depths[depth].edge_gate.mean().item() for record in records]
        updates = [(r.depths[depth].update / r.depths[depth].node).mean().item() for r in records]
        expected |= {f"dag_gate_{depth + 1}": sum(gates) / 2, f"dag_update_{depth + 1}": sum(updates) / 2}
    assert expected["dag_gate_1"] != pytest.approx(expected["dag_gate_2"], rel=1e-3)
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("balance_coef", [0.0, 1.0])
def test_accumulation_gives_the_gradient_of_the_whole_batch(corpus, balance_coef):
    """Four micro-steps add up to the mean loss and the mean gradient of one large batch, balance loss included."""
    torch.manual_seed(0)
    model = randomize(GPT(ModelConfig(block_size=16, n_layer=2)), std=0.05)
    tokens = prepare.load_tokens("tiny", "train")
    results = []
    for batch_size, grad_accum in ((8, 1), (2, 4)):
        config = TrainConfig(batch_size=batch_size, grad_accum=grad_accum, balance_coef=balance_coef)
        model.zero_grad()
        loss = train.accumulate_gradients(model, model, tokens, config, 3, train.nullcontext())
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    for whole, parts in zip(*results, strict=True):
        assert (whole - parts).abs().max() <= 1e-5 * max(1.0, whole.abs().max().item())


def test_what_is_minimised(corpus):
    """Cross-entropy + balance_coef · balance + z_coef · z, each weighted once; the loss reported is the first alone."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    tokens = prepare.load_tokens("tiny", "train")
    config = TrainConfig(batch_size=4, balance_coef=0.5, z_coef=0.25)
    loss = train.accumulate_gradients(model, model, tokens, config, 0, train.nullcontext())
    got = [p.grad.clone() for p in model.parameters()]
    out = model(*train.get_batch(tokens, model.config, config, 0, 0))
    balance = balance_loss(out.router.load, out.router.prob)
    expected = torch.autograd.grad(out.loss + 0.5 * balance + 0.25 * out.router.z.mean(), list(model.parameters()))
    assert loss.item() == pytest.approx(out.loss.item(), abs=1e-6)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 1e-6


# Optimizer and schedule


def test_decay_is_for_matrices_only():
    """Every parameter is in exactly one group; norms' scales are not decayed."""
    model = GPT(ModelConfig(n_layer=2))
    decayed, others = train.make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert {id(p) for p in others["params"]} == {id(p) for n, p in model.named_parameters() if "norm" in n}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_learning_rate():
    """Linear warm-up to the highest rate, cosine to the lowest at the last step."""
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.learning_rate(step, config) for step in range(13)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.6) and rates[12] == pytest.approx(0.2)
    assert train.learning_rate(0, TrainConfig(warmup_steps=0, learning_rate=0.5)) == 0.5


# A run


def test_run_logs_and_saves(corpus, call):
    """log.csv has a row per evaluation; the checkpoint holds all that sampling and resuming need; loss falls."""
    status, out, error = call(train, *TINY_RUN, "--max_steps=40", "--eval_interval=20")
    assert status == 0, error
    rows = read_log()
    columns = (
        "step,tokens,train_loss,val_loss,val_bpb,balance,z,lr,grad_norm,tokens_per_s,max_logit,max_expert_share,"
        "dead_experts,dag_gate_1,dag_update_1,dag_gate_2,dag_update_2"
    )
    assert Path("out/tiny/log.csv").read_text().splitlines()[0] == columns
    assert [int(row["step"]) for row in rows] == [0, 20, 40]
    assert int(rows[1]["tokens"]) == 20 * 4 * 16
    assert float(rows[0]["val_loss"]) == pytest.approx(math.log(257), abs=0.5)
    assert float(rows[2]["val_loss"]) < float(rows[1]["val_loss"]) < float(rows[0]["val_loss"])
    assert rows[0]["train_loss"] == "" and 2 < float(rows[1]["train_loss"]) < 6
    val = prepare.load_meta("tiny")["splits"]["val"]
    bits = float(rows[2]["val_loss"]) / math.log(2) * val["tokens"] / val["bytes"]
    assert float(rows[2]["val_bpb"]) == pytest.approx(bits, rel=1e-4)
    assert 0.9 < float(rows[2]["balance"]) < 2 and 0.25 <= float(rows[2]["max_expert_share"]) <= 0.5
    assert float(rows[0]["dag_update_1"]) == 0 < float(rows[2]["dag_update_1"]), "W_up starts at zero"
    assert float(rows[0]["dag_gate_1"]) == pytest.approx(0.5, abs=0.01)
    checkpoint = load("out/tiny/ckpt.pt")
    assert checkpoint["step"] == 40 and checkpoint["encoding"] == "bytes"
    assert load("out/tiny/previous.pt")["step"] == 20 and load("out/tiny/best.pt")["step"] == 40
    assert ModelConfig(**checkpoint["model_config"]).n_embd == 16 and checkpoint["train_config"]["max_steps"] == 40
    assert set(checkpoint["model"]) == set(GPT(ModelConfig(**checkpoint["model_config"])).state_dict())
    assert out.count("--- sample") == 2 and "python sample.py out/tiny" in out
    assert not list(Path("out").rglob("*.tmp"))


@pytest.mark.parametrize("stop_at", [3, 4], ids=["at an evaluation", "between evaluations"])
def test_resuming_is_exact(corpus, call, monkeypatch, stop_at):
    """Interrupted and resumed: weights, moments and log rows equal an undisturbed run's, bit for bit."""
    run = (*TINY_RUN, "--grad_accum=2")
    assert call(train, *run)[0] == 0
    undisturbed, rows = load("out/tiny/ckpt.pt"), read_log()

    get_batch = train.get_batch

    def interrupted(*arguments):
        if arguments[3] == stop_at - 1:
            stops[-1].notice(signal.SIGINT, None)
        return get_batch(*arguments)

    stops = []

    class Recorded(train.StopRequest):
        def __init__(self):
            super().__init__()
            stops.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", Recorded)
        patch.setattr(train, "get_batch", interrupted)
        status, out, _ = call(train, *run, "--out_dir=out/again")
    assert status == 0 and f"stopped after step {stop_at} and saved" in out
    assert "--out_dir=out/again --resume" in out
    assert load("out/again/ckpt.pt")["step"] == stop_at
    assert call(train, *run, "--out_dir=out/again", "--resume")[0] == 0
    assert_equal_runs(load("out/again/ckpt.pt"), undisturbed)
    timeless = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]
    again = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_log("out/again/log.csv")]
    assert again == timeless


def test_more_steps_after_the_end(corpus, call):
    """--resume with a larger max_steps goes on from where the run ended."""
    assert call(train, *TINY_RUN)[0] == 0
    assert call(train, *TINY_RUN, "--resume", "--max_steps=9")[0] == 0
    assert [int(row["step"]) for row in read_log()] == [0, 3, 6, 9]


def test_decay_rates_are_those_of_the_resumed_command(corpus, call):
    """weight_decay and betas changed with --resume take effect, instead of those in the checkpoint."""
    assert call(train, *TINY_RUN)[0] == 0
    assert call(train, *TINY_RUN, "--resume", "--max_steps=9", "--weight_decay=0.5", "--beta1=0.8")[0] == 0
    decayed, others = load("out/tiny/ckpt.pt")["optimizer"]["param_groups"]
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0.0
    assert decayed["betas"] == others["betas"] == (0.8, 0.95)


def test_ctrl_c_and_sigterm_are_noticed():
    """The real signal handlers: the first signal is noted, a second one ends the process."""
    code = (
        "import signal, train\n"
        "stop = train.StopRequest(); signal.raise_signal(signal.SIGTERM); assert stop.seen\n"
        "print('noticed', flush=True); signal.raise_signal(signal.SIGTERM); print('still alive')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout == "noticed\n" and result.returncode == -signal.SIGTERM


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(corpus, call, refused):
    """A non-finite loss ends the run with the step; the last evaluation's checkpoint is still good."""
    diverging = (*TINY_RUN, "--learning_rate=1e30", "--warmup_steps=0", "--grad_clip=1e30", "--max_steps=50")
    refused("The checkpoint of the last evaluation is kept in out/tiny", train, *diverging, "--eval_interval=1000")
    checkpoint = load("out/tiny/ckpt.pt")
    assert checkpoint["step"] == 0 and all(x.isfinite().all() for x in checkpoint["model"].values())


def test_a_failed_save_keeps_the_old_checkpoint(corpus, call, refused, monkeypatch):
    """A full disk in the middle of a save: an error, and the previous checkpoint is still there and whole."""
    assert call(train, *TINY_RUN)[0] == 0
    before = Path("out/tiny/ckpt.pt").read_bytes()

    def full(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.torch, "save", full)
    refused("No space left on device", train, *TINY_RUN, "--resume", "--max_steps=9")
    assert Path("out/tiny/ckpt.pt").read_bytes() == before and not list(Path("out").rglob("*.tmp"))


def test_two_ranks_equal_one(corpus, workdir):
    """torchrun with two processes (gloo) gives the weights and the log of one process with the same global batch.

    The balance loss is large here: its statistics must be those of both ranks' tokens.
    """
    run = (*TINY_RUN, "--balance_coef=1", "--max_steps=20", "--eval_interval=10")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def execute(*command):
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=workdir)
        assert result.returncode == 0, result.stderr
        return result.stdout

    script = str(REPOSITORY / "train.py")
    execute(sys.executable, script, *run, "--batch_size=8", "--out_dir=out/one")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    out = execute(*torchrun, script, *run, "--batch_size=4", "--grad_accum=2", "--out_dir=out/two")
    assert out.count("--- sample 1 ---") == 1, "only rank 0 speaks"
    assert_equal_runs(load("out/one/ckpt.pt"), load("out/two/ckpt.pt"), tolerance=1e-5)
    for one, two in zip(read_log("out/one/log.csv"), read_log("out/two/log.csv"), strict=True):
        for column in ("train_loss", "val_loss", "z", "max_expert_share", "grad_norm"):
            if one[column]:
                assert float(one[column]) == pytest.approx(float(two[column]), rel=1e-4), column


def test_known_dataset_is_prepared_on_the_spot(call, workdir, monkeypatch):
    """Training on stdlib without its data prepares it first and says so."""
    (workdir / "Lib").mkdir()
    for i in range(20):
        (workdir / "Lib" / f"module{i}.py").write_text(f"def function{i}():\n    return {i}\n" * 10)
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(workdir / "Lib"))
    status, out, error = call(train, *TINY_RUN, "--dataset=stdlib", "--max_steps=1")
    assert status == 0, error
    assert "not there yet: python prepare.py stdlib" in out and (prepare.DATA / "stdlib/meta.json").exists()


# Settings


def test_settings_come_from_defaults_config_and_command_line(workdir):
    """Defaults, then the config file, then --key=value; a bare flag is true."""
    Path("small.toml").write_text("n_layer = 3\nlearning_rate = 1\ncompile = true\nn_embd = 64\n")
    settings = train.read_settings(["--resume", "small.toml", "--n_layer=5", "--compile=false", "--dag_gate", "silu"])
    config, model_config = train.make_config(TrainConfig, settings), train.make_config(ModelConfig, settings)
    assert (model_config.n_layer, model_config.n_embd, model_config.dag_gate, model_config.n_head) == (5, 64, "silu", 4)
    assert train.read_settings(["small.toml", "--out_dir="])["out_dir"] == "out/small"
    assert (config.learning_rate, config.compile, config.resume, config.out_dir) == (1, False, True, "out/small")


def test_help_explains_every_key(call):
    """Every field of both configurations has its comment in --help."""
    status, out, _ = call(train, "--help")
    assert status == 0
    for field in (*fields(TrainConfig), *fields(ModelConfig)):
        assert f"--{field.name} " in out
    assert "K, experts selected per token (default: 4)" in out


def test_bad_settings_are_refused(corpus, refused, workdir):
    """One line that names key, value and the nearest key; status 2; nothing is written."""
    Path("bad.toml").write_text("n_layr = 3\n")
    Path("type.toml").write_text('n_layer = "3"\n')
    Path("broken.toml").write_text("n_layer = \n")
    Path("nested.toml").write_text("[model]\nn_layer = 3\n")
    refused("unknown setting --n_layr=3; the nearest key is n_layer", train, *TINY_RUN, "--n_layr=3")
    refused("the nearest key is dag_depth", train, *TINY_RUN, "--dag-depth=3")
    refused("unknown setting n_layr = 3 in bad.toml; the nearest key is n_layer", train, "bad.toml")
    refused("n_layer in type.toml must be of type int, got '3'", train, "type.toml", "--dataset=tiny")
    refused("broken.toml is not valid TOML", train, "broken.toml")
    refused("unknown setting model", train, "nested.toml")
    refused("config none.toml does not exist", train, "none.toml")
    refused("argument --n_layer: invalid int value: 'two'", train, *TINY_RUN, "--n_layer=two")
    refused("argument --compile: must be true or false, got 'maybe'", train, *TINY_RUN, "--compile=maybe")
    refused("top_k (9) must not exceed n_expert (4)", train, *TINY_RUN, "--top_k=9")
    refused("max_steps must be at least 1, got 0", train, *TINY_RUN, "--max_steps=0")
    refused("learning_rate must be above 0 and finite, got nan", train, *TINY_RUN, "--learning_rate=nan")
    refused("min_lr (0.5) must not exceed learning_rate", train, *TINY_RUN, "--min_lr=0.5")
    refused("beta2 must be at least 0 and below 1, got 1.0", train, *TINY_RUN, "--beta2=1")
    refused("dtype must be auto, float32 or bfloat16, got 'float16'", train, *TINY_RUN, "--dtype=float16")
    refused("seed must be below 2**63", train, *TINY_RUN, "--seed=99999999999999999999")
    refused("can't be built on cpu", train, *TINY_RUN, "--expert_dim=10000000000")
    refused("device 'gpu' can't be used here", train, *TINY_RUN, "--device=gpu")
    assert not Path("out").exists()


def test_bad_data_is_refused(corpus, refused, workdir):
    """Missing, truncated, too short, and with ids beyond the vocabulary."""
    refused("run: python prepare.py FILE_OR_FOLDER --name nothing", train, *TINY_RUN, "--dataset=nothing")
    refused("too few for block_size 5000", train, *TINY_RUN, "--block_size=5000")
    refused("dataset 'tiny' has 257 token ids, more than vocab_size 100", train, *TINY_RUN, "--vocab_size=100")
    path = prepare.DATA / "tiny/train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    refused("meta.json promises", train, *TINY_RUN)
    path.write_bytes(b"\xff" * len(whole))
    refused("train.bin holds token id 65535, beyond vocab_size 257", train, *TINY_RUN)


def test_bad_checkpoints_are_refused_and_a_run_is_never_overwritten(corpus, call, refused):
    """Resuming from nothing, from a truncated file, or with another model; starting where a run already is."""
    refused("no run to go on with: start without --resume", train, *TINY_RUN, "--resume")
    assert call(train, *TINY_RUN)[0] == 0
    path = Path("out/tiny/ckpt.pt")
    whole = path.read_bytes()
    refused("out/tiny holds a run already: add --resume", train, *TINY_RUN)
    refused("another n_layer (was 2, now 3)", train, *TINY_RUN, "--resume", "--n_layer=3")
    refused("another seed (was 1337, now 1)", train, *TINY_RUN, "--resume", "--seed=1")
    assert path.read_bytes() == whole
    refused("is at step 6 already, beyond max_steps 5", train, *TINY_RUN, "--resume", "--max_steps=5")
    path.rename("elsewhere.pt")
    refused("out/tiny holds a run already", train, *TINY_RUN)
    checkpoint = load("elsewhere.pt")
    for key, value in (("optimizer", {}), ("model", {}), ("step", "6"), ("log", None), ("train_config", None)):
        torch.save(checkpoint | {key: value}, path)
        refused("out/tiny/ckpt.pt is", train, *TINY_RUN, "--resume")
    path.write_bytes(whole[: len(whole) // 2])
    refused("out/tiny/ckpt.pt is damaged or not a checkpoint", train, *TINY_RUN, "--resume")


# The configurations that ship


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_every_config_is_valid(path):
    """Each file in configs/ gives a model and a run, and says in a comment what it is for."""
    assert path.read_text().startswith("# ")
    settings = train.read_settings([str(path)])
    train.make_config(TrainConfig, settings)
    assert train.make_config(ModelConfig, settings).aggregator == "dag"


def test_large_config_has_the_papers_699_million_parameters():
    """dag_moe_l counts 699M with the 128,256-word vocabulary, by formula and by its tensors."""
    settings = train.read_settings([str(REPOSITORY / "configs/dag_moe_l.toml")])
    config = train.make_config(ModelConfig, settings)
    assert config.vocab_size == 128_256
    with torch.device("meta"):
        model = GPT(config)
    assert round(model.count_parameters().total / 1e6) == 699
    assert sum(p.numel() for p in model.parameters()) == model.count_parameters().total
