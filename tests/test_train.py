"""train.py: the data order, exact resuming, ranks, evaluation, what is logged and saved, and bad input."""

import csv
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
import sample
import train
from model import GPT, ModelConfig, balance_loss
from tests.conftest import TINY_RUN
from tests.kill_train import kill_train
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
    out = model(*train.inputs_and_targets(data.val, offsets, model.config), records)
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
        batch = train.load_micro_steps(tokens, model.config, config, 3, torch.device("cpu"))
        loss = train.accumulate_gradients(model, model, batch, config, train.nullcontext())
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    for whole, parts in zip(*results, strict=True):
        assert (whole - parts).abs().max() <= 1e-5 * max(1.0, whole.abs().max().item())


def test_what_is_minimised(corpus):
    """Cross-entropy + balance_coef · balance + z_coef · z, each weighted once; the loss reported is the first alone."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    tokens = prepare.load_tokens("tiny", "train")
    config = TrainConfig(batch_size=4, balance_coef=0.5, z_coef=0.25)
    batch = train.load_micro_steps(tokens, model.config, config, 0, torch.device("cpu"))
    loss = train.accumulate_gradients(model, model, batch, config, train.nullcontext())
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


def test_gradients_are_clipped(corpus, call):
    """After one step AdamW's first moment is a tenth of the clipped gradient; what is logged is the norm before."""
    assert call(train, *TINY_RUN, "--max_steps=1", "--grad_clip=0.01")[0] == 0
    moments = [state["exp_avg"] for state in load("out/tiny/ckpt.pt")["optimizer"]["state"].values()]
    norm = torch.stack([m.norm() for m in moments]).norm().item()
    assert norm / 0.1 == pytest.approx(0.01, rel=1e-3) and float(read_log()[-1]["grad_norm"]) > 0.1


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
@pytest.mark.parametrize("batch", [("--batch_size=4",), ("--batch_size=2", "--grad_accum=2")], ids=["whole", "parts"])
def test_resuming_is_exact(corpus, call, monkeypatch, stop_at, batch):
    """Interrupted and resumed: weights, moments and log rows equal an undisturbed run's, bit for bit."""
    run = (*TINY_RUN, *batch)
    assert call(train, *run)[0] == 0
    undisturbed, rows = load("out/tiny/ckpt.pt"), read_log()

    get_batch = train.get_batch

    def interrupted(*arguments):
        if arguments[3] == stop_at:  # is loaded while the step before it is computed
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


def test_what_resuming_takes_and_what_it_refuses(corpus, call, refused):
    """Without settings it takes the checkpoint's; a harmless change is reported; one of the mathematics is refused."""
    assert call(train, *TINY_RUN)[0] == 0
    whole = Path("out/tiny/ckpt.pt").read_bytes()
    again = ("--resume", "--out_dir=out/tiny")
    for change, message in (
        ("--n_layer=3", "can't resume out/tiny/ckpt.pt with another n_layer (was 2, now 3); start anew with another"),
        ("--seed=1", "another seed (was 1337, now 1)"),
        ("--dataset=other", "another dataset (was 'tiny', now 'other')"),
        ("--learning_rate=0.5", "another learning_rate (was 0.01, now 0.5)"),
        ("--beta2=0.5", "another beta2 (was 0.95, now 0.5)"),
        ("--balance_coef=0", "another balance_coef"),
        ("--eval_tokens=32", "another eval_tokens"),
        ("--init_from=out/x", "another init_from"),
        ("--batch_size=2", "another batch_size x grad_accum (was 4 x 1, now 2 x 1)"),
        ("--max_steps=5", "is at step 6 already, beyond max_steps 5"),
    ):
        if change == "--dataset=other":
            prepare.prepare(["text"], name="other", encoding="bytes")
        refused(message, train, *again, change)
    assert Path("out/tiny/ckpt.pt").read_bytes() == whole
    harmless = ("--max_steps=9", "--batch_size=2", "--grad_accum=2", "--eval_interval=4", "--dtype=float32")
    status, out, error = call(train, *again, *harmless)
    assert status == 0, error
    assert "going on after step 6 of 9; changed: max_steps (was 6, now 9), batch_size (was 4, now 2), " in out
    assert "grad_accum (was 1, now 2), eval_interval (was 3, now 4), dtype (was 'auto', now 'float32')" in out
    assert [int(row["step"]) for row in read_log()] == [0, 3, 6, 8, 9]
    assert load("out/tiny/ckpt.pt")["model_config"]["n_embd"] == 16, "settings not given are the checkpoint's"
    (Path("text") / "new.txt").write_text("another document")
    prepare.prepare(["text"], name="tiny", encoding="bytes")
    refused("dataset 'tiny' was prepared anew since", train, *again, "--max_steps=12")


def test_help_lists_what_resuming_takes_and_refuses(call):
    """Every setting is in exactly one of the two lists of --help."""
    text = " ".join(call(train, "--help")[1].split())
    _, taken, refused = re.split("another value is taken, and reported, for:|It is refused, because", text)
    for f in (*fields(TrainConfig), *fields(ModelConfig)):
        in_lists = [bool(re.search(rf"\b{f.name}\b", part)) for part in (taken.split("(")[0], refused)]
        assert in_lists == ([True, False] if f.name in train.RESUME_MAY_CHANGE else [False, True]), f.name


def test_ctrl_c_and_sigterm_are_noticed():
    """The real signal handlers: the first signal is noted, a second one ends the process."""
    code = (
        "import signal, train\n"
        "stop = train.StopRequest(); signal.raise_signal(signal.SIGTERM); assert stop.seen\n"
        "print('noticed', flush=True); signal.raise_signal(signal.SIGTERM); print('still alive')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout == "noticed\n" and result.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_sigterm_to_a_running_training(corpus, call, workdir):
    """A real process gets a real SIGTERM: it finishes the step, saves, says how to go on, and the rest is the same."""
    run = (*TINY_RUN, "--max_steps=300", "--eval_interval=20")
    assert call(train, *run)[0] == 0
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = (sys.executable, str(REPOSITORY / "train.py"), *run, "--out_dir=out/stopped")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path("out/stopped/previous.pt").exists():  # two evaluations are done
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    step = load("out/stopped/ckpt.pt")["step"]
    assert process.returncode == 0 and 20 <= step < 300, error
    assert f"stopped after step {step} and saved; go on with: python " in out and "--resume\n" in out
    assert "python sample.py out/stopped/ckpt.pt" in out
    assert "finishing this step, then saving (once more: stop at once)" in error
    assert call(train, *run, "--out_dir=out/stopped", "--resume")[0] == 0
    assert_equal_runs(load("out/tiny/ckpt.pt"), load("out/stopped/ckpt.pt"))


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(corpus, refused):
    """A non-finite loss ends the run with the step and a tensor; the last evaluation's checkpoint is still good."""
    diverging = (*TINY_RUN, "--learning_rate=1e30", "--warmup_steps=0", "--grad_clip=1e30", "--max_steps=50")
    message = "error: step 1: loss nan, gradient norm nan; not finite: the gradient of"
    refused(message, train, *diverging, "--eval_interval=1000")
    checkpoint = load("out/tiny/ckpt.pt")
    assert checkpoint["step"] == 0 and all(x.isfinite().all() for x in checkpoint["model"].values())
    Path("out/tiny").rename("out/elsewhere")
    refused("step 1: validation loss", train, *diverging, "--eval_interval=1")


@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "nothing"])
def test_what_is_not_finite_is_named(where):
    """The message names the step, the numbers, and the tensor that went wrong first."""
    model = GPT(ModelConfig(n_layer=2, block_size=16))
    tokens = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))
    if where == "weight":
        with torch.no_grad():
            model.blocks[1].moe.experts.up_proj[3, 2, 1] = math.inf
    if where == "gradient":
        for attention in (model.blocks[0].attention, model.blocks[1].attention):
            attention.o_proj.weight.register_hook(lambda g: g.fill_(math.nan))
    loss = model(tokens, tokens).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    value = {"loss": math.nan}.get(where, loss.item())
    if where == "nothing":
        return train.check_finite(model, 7, Path("out/x"), loss=value, gradient_norm=norm)
    with pytest.raises(prepare.UserError) as raised:
        train.check_finite(model, 7, Path("out/x"), loss=value, gradient_norm=norm)
    expected = {
        "loss": "step 7: loss nan, gradient norm 11.",
        "gradient": "not finite: the gradient of blocks.1.attention.o_proj.weight, and 1 more",
        "weight": "not finite: weight blocks.1.moe.experts.up_proj, and 0 more",
    }
    assert expected[where] in str(raised.value)


def test_a_failed_save_keeps_the_old_checkpoint(corpus, call, refused, monkeypatch):
    """A full disk in the middle of a save: an error that says so, and the checkpoint is still there and whole."""
    assert call(train, *TINY_RUN)[0] == 0
    before = {name: Path("out/tiny", name).read_bytes() for name in ("ckpt.pt", "previous.pt", "best.pt")}

    class Full:
        """A file on a disk with room for 5,000 more bytes."""

        def __init__(self, file):
            self.file = file

        def write(self, data) -> int:
            if self.file.tell() + len(data) > 5000:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    save = torch.save
    monkeypatch.setattr(train.torch, "save", lambda contents, file: save(contents, Full(file)))
    message = "out/tiny/ckpt.pt can't be written ([Errno 28] No space left on device); the one made before is kept"
    refused(message, train, *TINY_RUN, "--resume", "--max_steps=9")
    assert before == {name: Path("out/tiny", name).read_bytes() for name in before}
    assert not list(Path("out").rglob("*.tmp"))
    refused("none is kept", train, *TINY_RUN, "--out_dir=out/new")


def test_the_checkpoint_before_and_the_best(corpus, call, monkeypatch):
    """previous.pt is the one before ckpt.pt, best.pt that of the lowest loss, also where there are no hard links."""
    val_losses = iter([5.0, 3.0, 4.0, 3.5])
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) | {"val_loss": next(val_losses)})
    assert call(train, *TINY_RUN, "--max_steps=6")[0] == 0

    def steps() -> list[int]:
        return [load(f"out/tiny/{name}.pt")["step"] for name in ("previous", "best", "ckpt")]

    assert steps() == [3, 3, 6]
    assert os.path.samefile("out/tiny/previous.pt", "out/tiny/best.pt"), "two names of one file"

    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patch:
        patch.setattr(train.os, "link", no_links)
        assert call(train, *TINY_RUN, "--max_steps=9", "--resume")[0] == 0
    assert steps() == [6, 3, 9] and not list(Path("out").rglob("*.tmp"))
    train.also_call(Path("out/tiny/best.pt"), Path("out/tiny/other.pt"))
    train.also_call(Path("out/tiny/best.pt"), Path("out/tiny/other.pt"))
    assert load("out/tiny/other.pt")["step"] == 3 and not list(Path("out").rglob("*.tmp"))


def test_killed_between_saving_and_naming_the_best(corpus, call, monkeypatch):
    """What was lost between writing ckpt.pt and the files that follow is made up for by resuming."""
    assert call(train, *TINY_RUN)[0] == 0
    expected = Path("out/tiny/log.csv").read_text()
    Path("out/tiny/best.pt").unlink()
    Path("out/tiny/log.csv").write_text(expected[: expected.index("\n6,")])
    assert call(train, *TINY_RUN, "--resume")[0] == 0
    assert load("out/tiny/best.pt")["step"] == 6 and Path("out/tiny/log.csv").read_text() == expected


# Starting from another run, and evaluating it


def prepare_other(name: str = "other", encoding: str = "bytes", text: str = "Other words. ") -> None:
    Path(name).mkdir()
    for i in range(30):
        (Path(name) / f"{i}.txt").write_text(f"{i} {text}" * 20)
    prepare.prepare([name], name=name, encoding=encoding)


def test_init_from_takes_weights_and_nothing_else(corpus, call):
    """The first validation loss is that of the weights on the new data; optimizer, step and log are new."""
    prepare_other()
    assert call(train, *TINY_RUN, "--max_steps=30", "--eval_interval=15")[0] == 0
    status, out, error = call(train, "--eval_only=tiny,other", "--out_dir=out/tiny")  # with the run's eval_tokens
    assert status == 0, error
    losses = dict(re.findall(r"(\w+) +validation loss ([\d.]+), perplexity", out))
    last = read_log()[-1]
    assert losses["tiny"] == f"{float(last['val_loss']):.4f}" and float(losses["other"]) > float(losses["tiny"])

    tuned = ("--init_from=out/tiny", "--dataset=other", "--out_dir=out/tuned", "--max_steps=4", "--eval_interval=2")
    status, out, error = call(train, *tuned, "--eval_tokens=64", "--batch_size=3")
    assert status == 0, error
    assert "starting from the weights of out/tiny/best.pt, step 30" in out
    rows = read_log("out/tuned/log.csv")
    assert [row["step"] for row in rows] == ["0", "2", "4"] and f"{float(rows[0]['val_loss']):.4f}" == losses["other"]
    steps = {state["step"].item() for state in load("out/tuned/ckpt.pt")["optimizer"]["state"].values()}
    assert steps == {4}, "AdamW's own count began anew"
    assert load("out/tuned/ckpt.pt")["model_config"] == load("out/tiny/ckpt.pt")["model_config"]
    assert call(train, *tuned, "--resume", "--max_steps=6", "--eval_tokens=64", "--batch_size=3")[0] == 0


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
def test_upcycling_a_sum_gives_a_dag_of_the_same_loss(corpus, call, gate):
    """A trained sum as a dag: the first validation loss is the old one, exactly; then the DAG learns."""
    assert call(train, *TINY_RUN, "--aggregator=sum", "--max_steps=30")[0] == 0
    dag = ("--init_from=out/tiny/ckpt.pt", "--aggregator=dag", f"--dag_gate={gate}", "--dag_depth=1", "--dag_dim=8")
    status, _, error = call(train, *TINY_RUN, *dag, "--out_dir=out/dag")
    assert status == 0, error
    before, after = read_log()[-1], read_log("out/dag/log.csv")
    assert after[0]["val_loss"] == before["val_loss"] and after[0]["balance"] == before["balance"]
    assert float(after[0]["dag_update_1"]) == 0 < float(after[-1]["dag_update_1"])
    assert load("out/dag/ckpt.pt")["model_config"]["dag_dim"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", ["shared", "mlp", "coe", "dense"])
def test_baselines_train_stop_resume_and_sample(corpus, call, aggregator):
    """The whole way from data to text, with the same log after a stop as without; every router is in the log."""
    settings = (*TINY_RUN, f"--aggregator={aggregator}")
    assert call(train, *settings, "--out_dir=out/whole")[0] == 0
    assert call(train, *settings, "--max_steps=3")[0] == 0
    assert call(train, "--resume", "--out_dir=out/tiny", "--max_steps=6")[0] == 0
    last = load("out/tiny/ckpt.pt")
    assert last["log"][-1]["step"] == 6 and last["log"][-1]["tokens_per_s"] > 0
    assert float(read_log("out/whole/log.csv")[-1]["val_loss"]) < float(read_log("out/whole/log.csv")[0]["val_loss"])
    assert (aggregator == "dense") == (last["log"][-1]["z"] == 0)
    assert 1 / 4 <= last["log"][-1]["max_expert_share"] <= 1
    status, text, error = call(sample, "out/tiny", "--max-new-tokens=20", "--device=cpu")
    assert status == 0 and text, error


def test_what_init_from_refuses(corpus, call, refused):
    """Another shape, a dag as a sum, another encoding, no checkpoint, one whose weights do not fit."""
    tuned = (*TINY_RUN, "--out_dir=out/tuned", "--init_from=out/tiny")
    refused("out/tiny does not exist; train a model first", train, *tuned)
    assert call(train, *TINY_RUN)[0] == 0
    refused("out/tiny holds a run already", train, *TINY_RUN, "--init_from=out/tiny")
    refused(
        "from out/tiny/best.pt with another n_layer (there 2, here 3): leave the setting out",
        train,
        *tuned,
        "--n_layer=3",
    )
    refused("another n_head (there 2, here 1)", train, *tuned, "--n_head=1")
    refused("another aggregator (there 'dag', here 'sum')", train, *tuned, "--aggregator=sum")
    assert call(train, *TINY_RUN, "--aggregator=sum", "--out_dir=out/sum")[0] == 0
    for other in (
        "shared",
        "mlp",
        "coe",
        "dense",
    ):  # of these only mlp would begin with the same loss, and no one asked
        refused(
            f"another aggregator (there 'sum', here '{other}')",
            train,
            *(*TINY_RUN, "--out_dir=out/tuned", "--init_from=out/sum", f"--aggregator={other}"),
        )
    still_a_sum = (*TINY_RUN, "--out_dir=out/tuned", "--init_from=out/sum", "--dag_depth=3")  # which a sum ignores
    refused("another dag_depth (there 2, here 3): leave the setting out", train, *still_a_sum)
    refused("or add --aggregator=dag to go on with the sum as a dag", train, *still_a_sum)
    upcycled = (*TINY_RUN, "--out_dir=out/tuned", "--init_from=out/sum", "--aggregator=dag")
    for change, message in (
        ("--dag_zero_init=false", "another dag_zero_init (there True, here False)"),
        ("--dag_residual=full", "another dag_residual (there '1/K', here 'full')"),
    ):  # the old model's loss would not be the first one
        refused(message, train, *upcycled, change)
    refused("another vocab_size (there 257, here 300)", train, *tuned, "--vocab_size=300")
    meta = Path("data/tiny/meta.json")
    text = meta.read_text()
    meta.write_text(text.replace('"bytes"', '"gpt2"', 1))
    refused("dataset 'tiny' is in the gpt2 encoding, the model reads bytes: prepare the text", train, *tuned)
    meta.write_text(text)
    checkpoint = load("out/tiny/best.pt")
    for change in ({"norm.weight": torch.ones(3)}, {"surplus": torch.ones(3)}):
        torch.save(checkpoint | {"model": checkpoint["model"] | change}, "odd.pt")
        refused("odd.pt is damaged: its weights do not fit", train, *tuned, "--init_from=odd.pt")
    for lost in ("norm.weight", "blocks.0.moe.aggregate.layers.0.w_up.weight"):
        weights = {name: x for name, x in checkpoint["model"].items() if name != lost}
        torch.save(checkpoint | {"model": weights}, "odd.pt")
        refused("odd.pt is damaged", train, *tuned, "--init_from=odd.pt")
    assert not Path("out/tuned").exists()


def test_what_eval_only_refuses(corpus, call, refused):
    """No model, no dataset, --resume beside it; and it writes nothing."""
    refused("out/tiny does not exist; train a model first", train, "--eval_only=tiny", "--out_dir=out/tiny")
    assert call(train, *TINY_RUN)[0] == 0
    before = sorted(Path("out").rglob("*"))
    refused("dataset 'nothing' is not prepared", train, "--eval_only=tiny,nothing", "--out_dir=out/tiny")
    refused("resume and eval_only exclude each other", train, *TINY_RUN, "--eval_only=tiny", "--resume")
    refused(
        "best.pt has another n_layer, aggregator, and is",
        train,
        *TINY_RUN,
        "--eval_only=tiny",
        "--n_layer=3",
        "--aggregator=sum",
    )
    refused(
        "must be names of datasets with commas between, got 'tiny,'", train, "--eval_only=tiny,", "--out_dir=out/tiny"
    )
    assert sorted(Path("out").rglob("*")) == before


# Compiling


def test_without_a_compiler_training_goes_on(corpus, call, monkeypatch):
    """--compile where nothing can be compiled: one warning with the reason, and the same result as without."""
    assert call(train, *TINY_RUN)[0] == 0
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    status, _, error = call(train, *TINY_RUN, "--compile", "--out_dir=out/compiled")
    assert status == 0 and error.count("warning: going on without --compile, because nothing can be compiled") == 1
    assert_equal_runs(load("out/tiny/ckpt.pt"), load("out/compiled/ckpt.pt"))


@pytest.mark.slow
def test_compiled_checkpoints_have_plain_names(corpus, call, monkeypatch):
    """A compiled run (dynamo's own back end: no C++ here) saves what an eager one can resume, and computes the same."""
    assert call(train, *TINY_RUN)[0] == 0
    compile = torch.compile
    monkeypatch.setattr(train.torch, "compile", lambda model: compile(model, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own deprecations
        assert call(train, *TINY_RUN, "--compile", "--out_dir=out/compiled", "--max_steps=3")[0] == 0
    assert load("out/compiled/ckpt.pt")["model"].keys() == load("out/tiny/ckpt.pt")["model"].keys()
    assert call(train, *TINY_RUN, "--compile=false", "--out_dir=out/compiled", "--max_steps=6", "--resume")[0] == 0


# Several ranks


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start_ranks(script: Path, *arguments: str) -> subprocess.Popen:
    """Two processes (gloo) that run the script."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen((*TORCHRUN, str(script), *arguments), env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    """What a process printed, after it ended well."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


@pytest.mark.parametrize(("aggregator", "grad_accum"), [("sum", 4), pytest.param("dag", 2, marks=pytest.mark.slow)])
def test_two_ranks_equal_one(corpus, call, aggregator, grad_accum):
    """torchrun with two processes gives the weights and the log of one process with twice the micro-steps.

    64 experts and 32 slots a micro-step: on each rank most experts get no token. The balance loss is large: its
    statistics must be those of all parts of the batch together.
    """
    run = (*TINY_RUN, f"--aggregator={aggregator}", "--n_expert=64", "--batch_size=1", "--balance_coef=1")
    run = (*run, "--max_steps=20", "--eval_interval=10", f"--grad_accum={grad_accum}")
    out = finish(start_ranks(REPOSITORY / "train.py", *run, "--out_dir=out/two"))
    assert out.count("--- sample 1 ---") == out.count("step     10: validation loss") == 1, "only rank 0 speaks"
    assert call(train, *run, "--out_dir=out/one")[0] == 0
    assert_equal_runs(load("out/one/ckpt.pt"), load("out/two/ckpt.pt"), tolerance=1e-5)
    for one, two in zip(read_log("out/one/log.csv"), read_log("out/two/log.csv"), strict=True):
        for column in set(one) - {"tokens_per_s"}:
            if one[column]:
                assert float(one[column]) == pytest.approx(float(two[column]), rel=1e-4), column


EXCHANGES = """
import sys
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import train

counts = []

class Counting(train.DistributedDataParallel):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_comm_hook(None, count)

def count(state, bucket):
    counts.append(bucket.is_last())
    return allreduce_hook(state, bucket)

train.DistributedDataParallel = Counting
train.main()
assert sum(counts) == 6, counts
"""


@pytest.mark.slow
def test_gradients_are_exchanged_once_per_step(corpus, workdir):
    """Six steps of eight micro-steps on two ranks: the gradients' last bucket travels six times."""
    Path("exchanges.py").write_text(EXCHANGES)
    finish(start_ranks(Path("exchanges.py"), *TINY_RUN, "--batch_size=1", "--grad_accum=8"))


@pytest.mark.slow
def test_a_dead_rank_ends_the_job_and_one_process_goes_on(corpus, call):
    """Rank 1 is killed: the job ends, says which rank got which signal, and the run goes on with one process."""
    run = (*TINY_RUN, "--max_steps=400", "--eval_interval=20", "--grad_accum=2")
    process = start_ranks(REPOSITORY / "train.py", *run)
    while not Path("out/tiny/previous.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 .*\n.*\n +traceback : Signal 9 \(SIGKILL\)", error), error
    assert "rank 0 has lost another rank" in error
    step = load("out/tiny/ckpt.pt")["step"]
    assert 20 <= step < 400 and step % 20 == 0
    assert call(train, *run, "--resume")[0] == 0
    assert call(train, *run, "--out_dir=out/one")[0] == 0
    assert_equal_runs(load("out/one/ckpt.pt"), load("out/tiny/ckpt.pt"), tolerance=1e-3)


@pytest.mark.slow
def test_sigterm_to_torchrun(corpus):
    """All ranks stop after the same step; rank 0 saves and prints the command to go on with."""
    process = start_ranks(
        REPOSITORY / "train.py", *TINY_RUN, "--max_steps=4000", "--eval_interval=20", "--grad_accum=2"
    )
    while not Path("out/tiny/previous.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    step = load("out/tiny/ckpt.pt")["step"]
    assert f"stopped after step {step} and saved; go on with: torchrun --standalone --nproc_per_node=2 " in out, error


def test_two_trainings_never_share_a_folder(corpus, call, refused):
    """While one is at work in out/tiny another is refused, fresh or resuming; afterwards it may go on."""
    message = "another train.py is at work in out/tiny: wait for it, or stop it"
    Path("out/tiny").mkdir(parents=True)
    with train.hold(Path("out/tiny")):
        refused(message, train, *TINY_RUN)
    assert call(train, *TINY_RUN)[0] == 0
    before = Path("out/tiny/ckpt.pt").read_bytes()
    with train.hold(Path("out/tiny")):
        refused(message, train, *TINY_RUN, "--resume", "--max_steps=9")
    assert Path("out/tiny/ckpt.pt").read_bytes() == before
    assert call(train, *TINY_RUN, "--resume", "--max_steps=9")[0] == 0


@pytest.mark.slow
def test_killed_and_resumed(workdir):
    """kill -9 at random moments never leaves a run that can't go on, and the result is that of an undisturbed one."""
    kill_train(rounds=3, folder=workdir, seed=1)


def test_each_rank_loads_its_own_micro_steps(corpus, monkeypatch):
    """Rank 1 of 2 has the second and the fourth of four micro-steps, and no other."""
    config, model_config = TrainConfig(batch_size=2, grad_accum=4), ModelConfig(block_size=16)
    tokens = prepare.load_tokens("tiny", "train")
    monkeypatch.setattr(train, "this_rank", lambda: (1, 2))
    ours = train.load_micro_steps(tokens, model_config, config, 5, torch.device("cpu"))
    expected = [train.get_batch(tokens, model_config, config, 5, i) for i in (1, 3)]
    ours, expected = (torch.stack([torch.stack(batch) for batch in batches]) for batches in (ours, expected))
    assert torch.equal(ours, expected)


def test_each_rank_gets_a_device_of_its_own(monkeypatch):
    """A GPU per rank, one line where there are fewer GPUs; without GPUs the CPU, even where MPS would be at hand."""
    joined, chosen = [], []
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, timeout: joined.append(backend))
    monkeypatch.setattr(train.torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: False)
    assert train.join_ranks("auto") == "cpu" and joined == ["gloo"] and not chosen
    monkeypatch.setattr(train.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 2)
    assert train.join_ranks("auto") == "cuda:1" and joined == ["gloo", "nccl"] and chosen == ["cuda:1"]
    monkeypatch.setattr(train.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(prepare.UserError, match=r"more processes than GPUs \(1\) here: .* or add --device=cpu"):
        train.join_ranks("auto")
    assert train.join_ranks("cpu") == "cpu" and joined == ["gloo", "nccl", "gloo"] and chosen == ["cuda:1"]


def test_a_full_gpu_says_what_to_do(corpus, call, refused, monkeypatch):
    """Out of memory in the middle of training: a line with the remedy, and the remedy works."""
    compute = train.accumulate_gradients

    def out_of_memory(*arguments) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")

    monkeypatch.setattr(train, "accumulate_gradients", out_of_memory)
    message = "CUDA out of memory. Tried to allocate 2.00 GiB: once more with half the --batch_size and twice"
    refused(message, train, *TINY_RUN)
    monkeypatch.setattr(train, "accumulate_gradients", compute)
    assert call(train, *TINY_RUN, "--resume", "--batch_size=2", "--grad_accum=2")[0] == 0


def test_uneven_split_is_refused(corpus, call, refused, monkeypatch):
    """Three micro-steps can't be shared out over two ranks."""
    monkeypatch.setattr(train, "this_rank", lambda: (0, 2))
    refused("grad_accum (3) must be a multiple of the number of ranks (2)", train, *TINY_RUN, "--grad_accum=3")


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
    Path("other.toml").write_text("n_layer = 2\n")
    both = {"n_layer": 2, "learning_rate": 1, "compile": True, "n_embd": 64, "seed": 3, "out_dir": "out/other"}
    for argv in (["small.toml", "other.toml", "--seed=3"], ["small.toml", "--seed=3", "other.toml"]):
        assert train.read_settings(argv) == both, "the last file wins, wherever it stands"
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
    refused("config text is a folder", train, "text")
    refused("argument --n_layer: invalid int value: 'two'", train, *TINY_RUN, "--n_layer=two")
    refused("argument --compile: must be true or false, got 'maybe'", train, *TINY_RUN, "--compile=maybe")
    refused("top_k (9) must not exceed n_expert (4)", train, *TINY_RUN, "--top_k=9")
    refused("max_steps must be at least 1, got 0", train, *TINY_RUN, "--max_steps=0")
    refused("learning_rate must be above 0 and finite, got nan", train, *TINY_RUN, "--learning_rate=nan")
    refused("min_lr (0.5) must not exceed learning_rate", train, *TINY_RUN, "--min_lr=0.5")
    refused("beta2 must be at least 0 and below 1, got 1.0", train, *TINY_RUN, "--beta2=1")
    refused("dtype must be auto, float32 or bfloat16, got 'half'", train, *TINY_RUN, "--dtype=half")
    refused("float16 is refused: its gradients underflow", train, *TINY_RUN, "--dtype=float16")
    refused("seed must be below 2**63", train, *TINY_RUN, "--seed=99999999999999999999")
    refused("can't be built on cpu", train, *TINY_RUN, "--expert_dim=10000000000")
    refused("device 'gpu' can't be used here", train, *TINY_RUN, "--device=gpu")
    assert not Path("out").exists()


def test_bad_data_is_refused(corpus, refused, workdir):
    """Missing, truncated, too short, and with ids beyond the vocabulary."""
    refused("run: python prepare.py FILE_OR_FOLDER --name nothing", train, *TINY_RUN, "--dataset=nothing")
    refused("'../data/tiny' can't be the name of a dataset", train, *TINY_RUN, "--dataset=../data/tiny")
    refused("'' can't be the name of a dataset", train, *TINY_RUN, "--dataset=")
    refused("too few for block_size 5000", train, *TINY_RUN, "--block_size=5000")
    refused("dataset 'tiny' has 257 token ids, more than vocab_size 100", train, *TINY_RUN, "--vocab_size=100")
    path = prepare.DATA / "tiny/train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    refused("meta.json promises", train, *TINY_RUN)
    path.write_bytes(b"\xff" * len(whole))
    refused("train.bin holds token id 65535, beyond vocab_size 257", train, *TINY_RUN)


def test_bad_checkpoints_are_refused_and_a_run_is_never_overwritten(corpus, call, refused):
    """Resuming from nothing, from damaged files and odd ones; starting where a run already is."""
    refused("no run to go on with: start without --resume", train, *TINY_RUN, "--resume")
    assert call(train, *TINY_RUN)[0] == 0
    path = Path("out/tiny/ckpt.pt")
    refused("out/tiny holds a run already: add --resume", train, *TINY_RUN)
    path.rename("elsewhere.pt")
    refused("out/tiny holds a run already", train, *TINY_RUN)
    checkpoint = load("elsewhere.pt")
    for key, value in (("optimizer", {}), ("model", {}), ("step", "6"), ("log", None), ("train_config", None)):
        torch.save(checkpoint | {key: value}, path)
        refused("out/tiny/ckpt.pt is", train, *TINY_RUN, "--resume")


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(corpus, call, refused):
    """Cut short, emptied, or with a flipped bit; the offered command works; where nothing is whole, none is offered."""
    assert call(train, *TINY_RUN)[0] == 0
    path, previous, best = (Path(f"out/tiny/{name}.pt") for name in ("ckpt", "previous", "best"))
    whole = path.read_bytes()
    path.unlink()  # best.pt is another name of the same file
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (whole[:middle], b"", flipped):
        path.write_bytes(damaged)
        message = "out/tiny/ckpt.pt is damaged or not a checkpoint of train.py"
        offer = "out/tiny/previous.pt, of step 3, is whole: mv out/tiny/previous.pt out/tiny/ckpt.pt and --resume"
        refused(message, train, *TINY_RUN, "--resume")
        refused(offer, train, *TINY_RUN, "--resume")
    previous.rename(path)
    assert call(train, *TINY_RUN, "--resume")[0] == 0
    path.unlink()
    path.write_bytes(b"")
    previous.unlink()
    refused("mv out/tiny/best.pt out/tiny/ckpt.pt and --resume", train, *TINY_RUN, "--resume")
    best.unlink()
    with pytest.raises(AssertionError, match="mv "):
        refused("mv ", train, *TINY_RUN, "--resume")


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
