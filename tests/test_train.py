"""train.py: the data order, exact resuming, ranks, evaluation, what is logged and saved, and bad input."""

import csv
import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import train
from model import GPT, ModelConfig, WeightedSum
from tests.conftest import REPOSITORY, TINY_RUN
from tests.reference import randomize
from train import TrainConfig

CPU = train.autocast(torch.device("cpu"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def read_log(path="out/tiny/log.csv") -> list[dict]:
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in csv.DictReader(file)]


def start(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.Popen:
    """A real train.py."""
    return subprocess.Popen((sys.executable, *python, REPOSITORY / "train.py", *arguments), env=ENVIRONMENT, **PIPES)


def wait_for(path: str, process: subprocess.Popen) -> None:
    while not Path(path).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.0005)


def assert_equal_runs(a: str, b: str, tolerance: float = 0.0) -> None:
    """Weights, AdamW's moments and the log of two runs."""
    one, two = load(f"out/{a}/ckpt.pt"), load(f"out/{b}/ckpt.pt")
    assert one["step"] == two["step"] and one["model"].keys() == two["model"].keys()
    for name in one["model"]:
        assert (one["model"][name] - two["model"][name]).abs().max() <= tolerance, name
    if tolerance == 0:
        for i, moments in one["optimizer"].items():
            assert all(torch.equal(x, two["optimizer"][i][key]) for key, x in moments.items())
        assert read_log(f"out/{a}/log.csv") == read_log(f"out/{b}/log.csv")


def test_batch_is_a_function_of_data_seed_and_step(monkeypatch):
    """4 micro-steps see what one large batch sees, rank 1 of 2 every other; other steps and seeds see other data."""
    tokens = np.memmap(Path("tokens"), dtype=np.uint16, mode="w+", shape=1000)
    tokens[:] = np.arange(1000)
    model = GPT(ModelConfig(vocab_size=1000, block_size=8, n_layer=1))

    def batch(step, seed=3, batch_size=2, grad_accum=4):
        config = TrainConfig(seed=seed, batch_size=batch_size, grad_accum=grad_accum)
        return torch.cat(train.get_batch(tokens, model, config, step))

    x = batch(step=5)
    assert x.shape == (8, 9) and torch.equal(x[:, 1:], x[:, :-1] + 1), "tokens are their own positions here"
    assert torch.equal(x, batch(step=5)) and torch.equal(x, batch(step=5, batch_size=8, grad_accum=1))
    assert not torch.equal(x, batch(step=6)) and not torch.equal(x, batch(step=5, seed=4))
    starts = torch.cat([batch(step)[:, 0] for step in range(400)])
    assert starts.min() == 0 and starts.max() == 991, "the first and the last window are drawn, too"
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "RANKS", 2)
    assert torch.equal(batch(step=5), x[[2, 3, 6, 7]])


def test_evaluation_equals_a_plain_loop(corpus):
    """Loss and auxiliary losses are means over evenly spaced windows; the loss does not depend on the batch size."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    data = train.open_dataset("tiny")
    losses, others = [], []
    for i in np.linspace(0, len(data.val) - 17, 30).astype(int):
        window = torch.from_numpy(data.val[i : i + 17].astype(np.int64))[None]
        out = model(window[:, :-1])
        losses.append(F.cross_entropy(out.logits[0], window[0, 1:]).item())
        others.append([out.balance.item(), out.z.item()])
    for batch_size in (1, 7, 100):
        result = train.evaluate(model, data, TrainConfig(eval_tokens=30 * 16 + 5, batch_size=batch_size), CPU)
        assert result["val_loss"] == pytest.approx(sum(losses) / 30, abs=1e-5)
        assert result["z"] == pytest.approx(np.mean(others, axis=0)[1], abs=1e-5)
        if batch_size == 1:
            assert result["balance"] == pytest.approx(np.mean(others, axis=0)[0], abs=1e-5)
    val = data.meta["splits"]["val"]
    assert result["val_bpb"] == pytest.approx(sum(losses) / 30 / math.log(2) * val["tokens"] / val["bytes"], rel=1e-5)


def test_what_is_minimised(corpus):
    """The mean over micro-steps of cross-entropy + balance_coef · balance + z_coef · z; reported is the first alone."""
    torch.manual_seed(0)
    model = randomize(GPT(ModelConfig(block_size=16, n_layer=2)), std=0.05)
    config = TrainConfig(batch_size=2, grad_accum=3, balance_coef=0.5, z_coef=0.25)
    batch = train.get_batch(train.open_dataset("tiny").train, model, config, 3)
    loss = train.accumulate_gradients(model, batch, config, CPU)
    outs = [model(tokens[:, :-1], tokens[:, 1:]) for tokens in batch]
    expected = sum(out.loss + 0.5 * out.balance + 0.25 * out.z for out in outs) / 3
    assert loss.item() == pytest.approx(sum(out.loss.item() for out in outs) / 3, abs=1e-6)
    for p, gradient in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters())), strict=True):
        assert (p.grad - gradient).abs().max() <= 1e-6


def test_optimizer_and_learning_rate():
    """Each parameter is in one group, norms' scales are not decayed; linear warm-up, cosine to the lowest rate."""
    model = GPT(ModelConfig(n_layer=2))
    decayed, others = train.make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert {id(p) for p in others["params"]} == {id(p) for n, p in model.named_parameters() if "norm" in n}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.learning_rate(step, config) for step in range(13)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.6) and rates[12] == pytest.approx(0.2)
    assert train.learning_rate(0, TrainConfig(warmup_steps=0, learning_rate=0.5)) == 0.5


def test_run_logs_and_saves(corpus, call):
    """log.csv has a row per evaluation; the checkpoint holds all that sampling and resuming need; loss falls."""
    status, out, error = call(train, *TINY_RUN, "--max_steps=40", "--eval_interval=20", "--grad_accum=2")
    assert status == 0, error
    header = "step,tokens,train_loss,val_loss,val_bpb,balance,z,lr,grad_norm,tokens_per_s"
    assert Path("out/tiny/log.csv").read_text().splitlines()[0] == header
    rows = read_log()
    assert [int(row["step"]) for row in rows] == [0, 20, 40]
    assert [int(row["tokens"]) for row in rows] == [0, 20 * 2 * 4 * 16, 40 * 2 * 4 * 16], "all micro-steps count"
    assert float(rows[0]["val_loss"]) == pytest.approx(math.log(257), abs=0.5)
    assert float(rows[2]["val_loss"]) < float(rows[1]["val_loss"]) < float(rows[0]["val_loss"])
    assert rows[0]["train_loss"] == "" and 2 < float(rows[1]["train_loss"]) < 6
    assert 0.9 < float(rows[2]["balance"]) < 2
    checkpoint = load("out/tiny/ckpt.pt")
    assert checkpoint["step"] == 40 and checkpoint["encoding"] == "bytes"
    assert ModelConfig(**checkpoint["model_config"]).n_embd == 16 and checkpoint["train_config"]["max_steps"] == 40
    assert set(checkpoint["model"]) == set(GPT(ModelConfig(**checkpoint["model_config"])).state_dict())
    assert out.count("--- sample") == 2 and "python sample.py out/tiny" in out
    assert not list(Path("out").rglob("*.tmp"))


def test_gradients_are_clipped(corpus, call, monkeypatch):
    """After one step AdamW's first moment is a tenth of the clipped gradient; what is logged is the norm before."""
    monkeypatch.setattr("model.DAGAggregator.forward", WeightedSum.forward)  # weights without a gradient do no harm
    assert call(train, *TINY_RUN, "--max_steps=1", "--grad_clip=0.01")[0] == 0
    moments = [state["exp_avg"] for state in load("out/tiny/ckpt.pt")["optimizer"].values()]
    norm = torch.stack([m.norm() for m in moments]).norm().item()
    assert norm / 0.1 == pytest.approx(0.01, rel=1e-3) and float(read_log()[-1]["grad_norm"]) > 0.1


def test_best_checkpoint(corpus, call, monkeypatch):
    """best.pt has the weights of the lowest validation loss, ckpt.pt the last ones."""
    val_losses, evaluate = iter([5.0, 3.0, 4.0]), train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) | {"val_loss": next(val_losses)})
    assert call(train, *TINY_RUN)[0] == 0
    assert (load("out/tiny/best.pt")["step"], load("out/tiny/ckpt.pt")["step"]) == (3, 6)


@pytest.mark.parametrize(
    ("stop_at", "grad_accum"), [(3, 1), (4, 2), (6, 1)], ids=["at an evaluation", "between two", "at the end"]
)
def test_resuming_is_exact(corpus, call, monkeypatch, stop_at, grad_accum):
    """Interrupted and resumed: weights, moments and log rows equal an undisturbed run's, bit for bit."""
    run = (*TINY_RUN, f"--grad_accum={grad_accum}")
    assert call(train, *run)[0] == 0
    get_batch, requests = train.get_batch, []

    class Recorded(train.StopRequest):
        def __init__(self):
            super().__init__()
            requests.append(self)

    def interrupted(*arguments):
        if arguments[3] == stop_at:  # is loaded while the step before it is computed
            requests[-1].notice(signal.SIGINT, None)
        return get_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", Recorded)
        patch.setattr(train, "get_batch", interrupted)
        status, out, _ = call(train, *run, "--out_dir=out/again")
    said = f"stopped after step {stop_at} and saved; go on with --resume --out_dir=out/again" in out
    assert status == 0 and said == (stop_at < 6), "a stop in the last step only ends the run"
    assert load("out/again/ckpt.pt")["step"] == stop_at
    assert call(train, "--out_dir=out/again", "--resume")[0] == 0, "settings not given are the checkpoint's"
    assert_equal_runs("again", "tiny")
    status, out, _ = call(train, *run, "--out_dir=out/again", "--resume")
    assert status == 0 and "nothing left to do: out/again is at step 6 of --max_steps=6" in out
    more = ("--max_steps=9", "--learning_rate=9e-5", "--min_lr=0")
    assert call(train, *run, "--out_dir=out/again", "--resume", *more)[0] == 0
    assert [row["step"] for row in read_log("out/again/log.csv")] == ["0", "3", "6", "9"]


def test_killed_and_resumed(corpus, call):
    """kill -9 in the middle of a save leaves a run that can go on, and the result is that of an undisturbed one."""
    run, beside = (*TINY_RUN, "--max_steps=240", "--eval_interval=3"), Path("out/killed/ckpt.pt.tmp")
    assert call(train, *run)[0] == 0
    for killed in range(2):
        beside.unlink(missing_ok=True)
        process = start(*run, "--out_dir=out/killed", *(["--resume"] if killed else []))
        wait_for("out/killed/ckpt.pt", process)
        wait_for(beside, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert call(train, *run, "--out_dir=out/killed", "--resume")[0] == 0
    assert_equal_runs("killed", "tiny")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_running_training(corpus, number):
    """A real process finishes the step, saves, and says how to go on."""
    process = start(*TINY_RUN, "--max_steps=4000", "--eval_interval=20", "--out_dir=out/stopped")
    wait_for("out/stopped/ckpt.pt", process)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and load("out/stopped/ckpt.pt")["step"] < 4000, error
    assert "stopped after step" in out
    assert re.search("finishing this (step|evaluation), then saving .once more: stop at once", error)


def test_a_second_signal_ends_it():
    """The real handlers: the first signal is noted, a second one ends the process."""
    code = "import signal, train; stop = train.StopRequest(); signal.raise_signal(signal.SIGTERM); assert stop.seen; "
    code += "print('noticed', flush=True); signal.raise_signal(signal.SIGTERM); print('still alive')"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout == "noticed\n" and result.returncode == -signal.SIGTERM


@pytest.mark.parametrize("reader", ["2>&1 | head -n 1", ">&- 2>&-", ">/dev/full 2>&1"])
def test_printing_ends_nothing(corpus, reader):
    """A reader that goes away, closed streams and a full disk behind stdout: the run is whole, with status 0."""
    run = " ".join(TINY_RUN)
    command = f"set -o pipefail; '{sys.executable}' '{REPOSITORY / 'train.py'}' {run} {reader}"
    result = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert load("out/tiny/ckpt.pt")["step"] == 6 and result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_what_is_not_finite_is_named(where):
    """The message names the step, the numbers, and the tensor that went wrong first."""
    model = GPT(ModelConfig(n_layer=2, block_size=16))
    tokens = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    if where == "weight":
        with torch.no_grad():
            model.blocks[1].moe.experts.up_proj[3, 2, 1] = math.inf
    if where == "gradient":
        for block in model.blocks:
            block.attention.o_proj.weight.register_hook(lambda g: g.fill_(math.nan))
    model(tokens, tokens).loss.backward()
    expected = {
        "loss": "step 7: not finite: {'loss': nan}, first no tensor",
        "gradient": "first gradient of blocks.1.attention.o_proj.weight",
        "weight": "first weight blocks.1.moe.experts.up_proj",
    }
    with pytest.raises(ValueError, match=re.escape(expected[where])):
        train.check_finite(model, 7, loss=math.nan)


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(corpus, refused):
    """A non-finite loss ends the run; the last evaluation's checkpoint is still good."""
    diverging = ("--learning_rate=1e30", "--warmup_steps=0", "--grad_clip=1e30", "--max_steps=50")
    refused("step 1: not finite: {'loss'", train, *TINY_RUN, *diverging, "--eval_interval=1000")
    checkpoint = load("out/tiny/ckpt.pt")
    assert checkpoint["step"] == 0 and all(x.isfinite().all() for x in checkpoint["model"].values())


def test_a_failed_save_keeps_the_old_checkpoint(corpus, call, refused, monkeypatch):
    """A full disk in the middle of a save: one line that names the file, and the checkpoint is still whole."""
    assert call(train, *TINY_RUN)[0] == 0
    before, save = Path("out/tiny/ckpt.pt").read_bytes(), torch.save

    class Full:
        """A file on a disk with room for 5,000 more bytes."""

        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, data) -> int:
            if self.file.tell() + len(data) > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    monkeypatch.setattr(train.torch, "save", lambda contents, file: save(contents, Full(file)))
    refused(".pt", train, *TINY_RUN, "--resume", "--max_steps=9")
    refused("make room", train, *TINY_RUN, "--out_dir=out/new")
    assert before == Path("out/tiny/ckpt.pt").read_bytes() and not list(Path("out").rglob("*.tmp"))


def test_init_from_takes_weights_and_nothing_else(corpus, call, refused):
    """The first validation loss is the last one of the old weights; optimizer, step and log are new."""
    assert call(train, *TINY_RUN, "--max_steps=30", "--eval_interval=15")[0] == 0
    tuned = (*TINY_RUN, "--init_from=out/tiny", "--out_dir=out/tuned")
    refused("the weights do not fit the settings: leave out those that differ", train, *tuned, "--n_layer=3")
    refused("the weights do not fit", train, *tuned, "--aggregator=sum")
    assert not Path("out/tuned").exists()
    assert call(train, *tuned, "--max_steps=4", "--eval_interval=2", "--block_size=12")[0] == 0
    assert [row["step"] for row in read_log("out/tuned/log.csv")] == ["0", "2", "4"]
    steps = {state["step"].item() for state in load("out/tuned/ckpt.pt")["optimizer"].values()}
    assert steps == {4}, "AdamW's own count began anew"
    assert call(train, *tuned[:-1], "--out_dir=out/same")[0] == 0
    assert read_log("out/same/log.csv")[0]["val_loss"] == read_log()[-1]["val_loss"]


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
def test_upcycling_a_sum_gives_a_dag_of_the_same_loss(corpus, call, gate):
    """A trained sum as a dag: the first validation loss is the old one; then the graph learns."""
    assert call(train, *TINY_RUN, "--aggregator=sum", "--max_steps=30")[0] == 0
    dag = ("--init_from=out/tiny/ckpt.pt", "--aggregator=dag", f"--dag_gate={gate}", "--dag_depth=1", "--dag_dim=8")
    status, _, error = call(train, *TINY_RUN, *dag, "--out_dir=out/dag")
    assert status == 0, error
    before, after = float(read_log()[-1]["val_loss"]), float(read_log("out/dag/log.csv")[0]["val_loss"])
    assert after == pytest.approx(before, abs=1e-5)
    assert load("out/dag/ckpt.pt")["model"]["blocks.1.moe.aggregate.layers.0.w_up.weight"].abs().max() > 0
    assert call(train, *TINY_RUN, "--init_from=out/tiny", "--out_dir=out/sum")[0] == 0
    assert load("out/sum/ckpt.pt")["model_config"]["aggregator"] == "sum", "not asked for, it stays what it was"


def test_compiled_checkpoints_have_plain_names(corpus, call, monkeypatch):
    """A compiled run (dynamo's own back end) saves what an eager one can resume, and says that it compiles."""
    assert call(train, *TINY_RUN)[0] == 0
    compile = torch.compile
    monkeypatch.setattr(train.torch, "compile", lambda model: compile(model, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own deprecations
        status, out, _ = call(train, *TINY_RUN, "--compile", "--out_dir=out/compiled", "--max_steps=3")
    assert status == 0 and "compiling takes a minute" in out
    assert load("out/compiled/ckpt.pt")["model"].keys() == load("out/tiny/ckpt.pt")["model"].keys()
    assert call(train, "--compile", "false", "--out_dir=out/compiled", "--max_steps=6", "--resume")[0] == 0


@pytest.mark.parametrize(("aggregator", "grad_accum"), [("sum", 2), ("dag", 4)])
def test_two_ranks_equal_one(corpus, call, aggregator, grad_accum):
    """torchrun with two processes (gloo) gives the weights of one process with the same micro-steps.

    64 experts and 32 slots a micro-step: on each rank most experts get no token. The balance loss is large.
    """
    run = (*TINY_RUN, f"--aggregator={aggregator}", "--n_expert=64", "--batch_size=1", "--balance_coef=1")
    run = (*run, "--learning_rate=1e-3", "--max_steps=10", "--eval_interval=5", f"--grad_accum={grad_accum}")
    process = start(*run, "--out_dir=out/two", python=TORCHRUN)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count("--- sample") == 2 and out.count("step     10: validation loss") == 1, "only rank 0 speaks"
    assert call(train, *run, "--out_dir=out/one")[0] == 0
    assert_equal_runs("one", "two", tolerance=1e-5)
    for one, two in zip(read_log("out/one/log.csv"), read_log("out/two/log.csv"), strict=True):
        for column in set(one) - {"balance"}:  # a mean over other batches in the evaluation
            same = one[column] == two[column] or float(one[column]) == pytest.approx(float(two[column]), rel=1e-4)
            assert same, column


def test_a_dead_rank_ends_the_job_and_one_process_goes_on(corpus, call):
    """A killed rank ends the job, one process goes on with the run; an error of all ranks is printed once."""
    run = (*TINY_RUN, "--max_steps=2000", "--eval_interval=20", "--grad_accum=2", "--out_dir=out/two")
    process = start(*run, python=TORCHRUN)
    wait_for("out/two/ckpt.pt", process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and re.search("SIGKILL", error), error
    step = load("out/two/ckpt.pt")["step"]
    assert call(train, "--resume", "--out_dir=out/two", f"--max_steps={step + 2}")[0] == 0

    process = start(*TINY_RUN, "--grad_accum=3", "--out_dir=out/three", python=TORCHRUN)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and error.count("error: grad_accum (3) must be a multiple of the 2") == 1, error


def test_settings_come_from_defaults_config_and_command_line():
    """Defaults, then the config files, then --key=value; a bare flag is true; a value may follow with a space."""
    Path("small.toml").write_text("n_layer = 3\nlearning_rate = 1\ncompile = true\nn_embd = 64\n")
    settings = train.read_settings(["small.toml", "--n_layer=5", "--compile", "false", "--dag_gate=silu", "--resume"])
    config, model_config = train.make_config(TrainConfig, settings), train.make_config(ModelConfig, settings)
    assert (model_config.n_layer, model_config.n_embd, model_config.dag_gate, model_config.n_head) == (5, 64, "silu", 4)
    assert (config.learning_rate, config.compile, config.resume, config.out_dir) == (1, False, True, "out/small")
    assert train.read_settings(["small.toml", "--out_dir="])["out_dir"] == "out/small"
    Path("other.toml").write_text("n_layer = 2\n")
    both = {"n_layer": 2, "learning_rate": 1, "compile": True, "n_embd": 64, "seed": 3, "out_dir": "out/other"}
    for argv in (["small.toml", "other.toml", "--seed=3"], ["small.toml", "--seed=3", "other.toml"]):
        assert train.read_settings(argv) == both, "the last file wins, wherever it stands"


def test_help_and_configs(call):
    """Every field has its comment in --help, and every file in configs/ is valid and says what it is for."""
    status, out, _ = call(train, "--help")
    assert status == 0 and all(f"--{field.name} " in out for field in (*fields(TrainConfig), *fields(ModelConfig)))
    assert "K, experts selected per token (default: 4)" in " ".join(out.split())
    for path in REPOSITORY.glob("configs/*.toml"):
        settings = train.read_settings([str(path)])
        train.make_config(TrainConfig, settings)
        config = train.make_config(ModelConfig, settings)
        assert path.read_text().startswith("# ") and config.aggregator == "dag", path
        with torch.device("meta"):
            assert path.stem != "dag_moe_l" or round(GPT(config).cost()["parameters"] / 1e6) == 699


def test_bad_settings_are_refused(corpus, refused):
    """One line that names key, value and the nearest key; status 2; nothing is written."""
    Path("bad.toml").write_text("n_layr = 3\n")
    Path("type.toml").write_text('n_layer = "3"\n')
    Path("broken.toml").write_text("n_layer = \n")
    size = len(prepare.open_dataset("tiny").val)
    prepare.open_dataset("tiny").check_fits("bytes", 257, size - 1)  # the longest block_size
    Path("nested.toml").write_text("[model]\nn_layer = 3\n")
    for message, *arguments in (
        ("bad.toml: unknown setting --n_layr=3; the nearest key is n_layer", "bad.toml"),
        ("type.toml: argument --n_layer: invalid int value", "type.toml"),
        ("broken.toml: Invalid value", "broken.toml"),
        ("nested.toml: unknown setting --model", "nested.toml"),
        ("there is no config file none.toml", "none.toml"),
        ("argument --n_layer: invalid int value: 'two'", "--n_layer=two"),
        ("unknown setting --n_layr=3; the nearest key is n_layer", "--n_layr=3"),
        ("max_steps must be at least 1 and below 2**31", "--max_steps=0"),
        ("argument --compile: invalid choice: 'maybe'", "--compile=maybe"),
        ("top_k must not exceed n_expert", "--top_k=9"),
        ("n_embd must be at least 1 and below 2**31", f"--n_embd={10**30}"),
        ("learning_rate must be 0 or more and finite, got nan", "--learning_rate=nan"),
        ("min_lr (0.5) must not exceed learning_rate", "--min_lr=0.5"),
        ("dtype must be auto, float32 or bfloat16, got 'float16'", "--dtype=float16"),
        ("seed must be at least 0 and below 2**31", "--seed=99999999999999999999"),
        ("too large for the memory", "--expert_dim=2000000000", "--n_expert=2000000"),  # more than any address space
        ("device 'gpu' can't be used here", "--device=gpu"),
        ("run python prepare.py FILE_OR_FOLDER --name nothing", "--dataset=nothing"),
        (f"'tiny' has {size} val tokens, block_size is {size}", f"--block_size={size}"),
        ("has 257 token ids, vocab_size is 256", "--vocab_size=256"),
        ("out/none/ckpt.pt does not exist", "--resume", "--out_dir=out/none"),
    ):
        refused(message, train, *TINY_RUN, *arguments)
    assert not Path("out").exists()
    path = prepare.DATA / "tiny/train.bin"
    whole = path.read_bytes()
    path.write_bytes(b"\xff" * len(whole))
    refused("has ids beyond the vocabulary: prepare it again", train, *TINY_RUN)
    path.write_bytes(whole[:-2])
    refused("train.bin", train, *TINY_RUN)


def test_what_resuming_refuses_and_a_run_is_never_overwritten(corpus, call, refused):
    """Another model, data, seed or batch by name; changed data; damaged checkpoints; a folder that is there."""
    assert call(train, *TINY_RUN)[0] == 0
    path = Path("out/tiny/ckpt.pt")
    whole = path.read_bytes()
    refused("out/tiny exists: --resume it, or take another --out_dir", train, *TINY_RUN)
    for change, message in (
        ("--n_layer=3", "n_layer is 2 in out/tiny/ckpt.pt, not 3: leave it"),
        ("--seed=1", "seed is 1337 in"),
        ("--dataset=other", "dataset is 'tiny' in"),
        ("--batch_size=2", "batch_size is 4 in"),
        ("--grad_accum=2", "grad_accum is 1 in"),
        ("--aggregator=sum", "aggregator is 'dag' in"),
    ):
        refused(message, train, "--resume", "--out_dir=out/tiny", "--max_steps=9", change)
    middle, checkpoint = len(whole) // 2, load(path)
    moments = checkpoint["optimizer"] | {0: {key: torch.ones(3) for key in checkpoint["optimizer"][0]}}
    weights = {name: x * math.nan for name, x in checkpoint["model"].items()}
    for damage in (
        {"optimizer": moments}, {"optimizer": {0: 5}}, {"model": {}}, {"model": weights}, {"step": "6"}, {"log": None},
        {"log": [{"step": math.nan}]}, {"grad_norm": math.inf}, {"train_config": None}, {"encoding": 3},
        {"model_config": checkpoint["model_config"] | {"n_layer": "2"}},
        {"model_config": checkpoint["model_config"] | {"colour": 1}},
    ):  # fmt: skip
        torch.save(checkpoint | damage, path)
        refused("out/tiny/ckpt.pt is damaged, or not a checkpoint", train, *TINY_RUN, "--resume", "--max_steps=9")
    for damaged in (whole[:middle], b"", whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
        path.write_bytes(damaged)
        refused("out/tiny/ckpt.pt is damaged", train, *TINY_RUN, "--resume", "--max_steps=9")
    path.write_bytes(whole)
    (Path("text") / "new.txt").write_text("another document")
    prepare.prepare(["text"], name="tiny", encoding="bytes")
    refused("tiny has changed since out/tiny/ckpt.pt", train, "--resume", "--out_dir=out/tiny", "--max_steps=9")


def test_two_runs_started_at_once(corpus):
    """Only one of two simultaneous starts gets the folder; the other ends with one line and status 2."""
    processes = [start(*TINY_RUN) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert sum("error:" in error and "out/tiny" in error for error in errors) == 1
    assert load("out/tiny/ckpt.pt")["step"] == 6
