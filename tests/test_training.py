"""A training run does what its settings say: it equals a plain loop, and logs what happened."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import train
from model import GPT, ModelConfig
from tests.conftest import TINY_RUN
from train import TrainConfig, make_config, read_settings

CPU = torch.device("cpu")
FLOAT32 = train.autocast(CPU)


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def read_log(path="out/tiny/log.csv") -> list[dict]:
    """Return the rows of a log, with numbers for texts, and None where there is nothing."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(text) if text else None for key, text in row.items()} for row in rows]


def read_batch(tokens: np.ndarray, config: TrainConfig, block_size: int, step: int) -> torch.Tensor:
    """Return all windows of a step, (grad_accum, batch_size, block_size + 1)."""
    generator = np.random.default_rng((config.seed, step))
    shape = (config.grad_accum, config.batch_size)
    starts = generator.integers(0, len(tokens) - block_size, size=shape)
    windows = [tokens[start : start + block_size + 1].astype(np.int64) for start in starts.flat]
    return torch.from_numpy(np.stack(windows)).view(*shape, -1)


def plain_training(settings: list[str]) -> tuple[GPT, list[float], list[float]]:
    """Train as documented, without accumulation, precision contexts or fused kernels.

    Returns the model, and of each step the loss and the norm of the gradient.
    """
    settings = read_settings(settings)
    config = make_config(TrainConfig, settings)
    _, tokens, _ = prepare.open_dataset(config.dataset)
    torch.manual_seed(config.seed)
    model = GPT(make_config(ModelConfig, settings))
    parameters = list(model.parameters())
    decays = [config.weight_decay if p.dim() > 1 else 0.0 for p in parameters]
    groups = [
        {"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
    losses = []
    norms = []
    for step in range(config.max_steps):
        outs = []
        for part in read_batch(tokens, config, model.config.block_size, step):
            outs.append(model(part[:, :-1], part[:, 1:]))
        balance_loss = sum(out.balance_loss for out in outs) / len(outs)
        z_loss = sum(out.z_loss for out in outs) / len(outs)
        loss = sum(out.loss for out in outs) / len(outs)
        total = loss + config.balance_coef * balance_loss + config.z_coef * z_loss
        gradients = torch.autograd.grad(total, parameters)
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * min(1.0, config.grad_clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(step, config)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return model, losses, norms


def plain_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: a line up, then a cosine down."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    fallen = (1 - math.cos(math.pi * share)) / 2
    return config.learning_rate - fallen * (config.learning_rate - config.min_lr)


@pytest.mark.parametrize("grad_accum", [1, 3])
@pytest.mark.parametrize("aggregator", ["sum", "dag"])
def test_a_run_equals_a_plain_loop(corpus, call, aggregator, grad_accum):
    """After eight steps all weights, losses and norms are those of the plain loop."""
    settings = [*TINY_RUN, f"--aggregator={aggregator}", f"--grad_accum={grad_accum}"]
    settings += ["--max_steps=8", "--eval_interval=1", "--warmup_steps=3", "--min_lr=0.001"]
    settings += ["--grad_clip=0.3", "--balance_coef=0.5", "--z_coef=0.25", "--weight_decay=3"]
    status, _, error = call(train, *settings)
    assert status == 0, error
    model, losses, norms = plain_training(settings)
    assert max(norms) > 0.6, "else nothing is clipped"
    for name, weight in load("out/tiny/ckpt.pt")["model"].items():
        assert (weight - model.state_dict()[name]).abs().max() < 2e-5, name
    rows = read_log()[1:]
    assert [row["train_loss"] for row in rows] == pytest.approx(losses, abs=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)


def test_the_learning_rate_rises_and_falls_as_documented():
    """A linear warm-up to the peak, half a cosine to the lowest rate."""
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.get_learning_rate(step, config) for step in range(13)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.6)
    assert rates[12] == pytest.approx(0.2)


def test_without_a_warm_up_the_first_rate_is_the_peak():
    """warmup_steps=0 divides by nothing."""
    assert train.get_learning_rate(0, TrainConfig(warmup_steps=0, learning_rate=0.5)) == 0.5


def test_each_parameter_is_in_one_group_of_the_optimizer():
    """Matrices decay, the scales of norms do not."""
    model = GPT(ModelConfig(n_layer=2))
    decayed, others = train.make_optimizer(model, weight_decay=0.3).param_groups
    assert decayed["weight_decay"] == 0.3
    assert others["weight_decay"] == 0.0
    scales = {id(weight) for name, weight in model.named_parameters() if "norm" in name}
    assert {id(weight) for weight in others["params"]} == scales
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def first_ids(step: int, rank=0, ranks=1, seed=3, batch_size=2, grad_accum=4) -> list[int]:
    """Return where the windows of a batch begin, in data whose ids are their own places."""
    tokens = np.arange(1000, dtype=np.uint16)
    config = TrainConfig(seed=seed, batch_size=batch_size, grad_accum=grad_accum)
    model_config = ModelConfig(vocab_size=1000, block_size=8, n_layer=1)
    parts = train.get_batch(tokens, config, model_config, CPU, step, rank, ranks)
    batch = torch.cat(parts)
    assert batch.shape == (len(parts) * batch_size, 9)
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)
    return batch[:, 0].tolist()


def test_batches_depend_on_the_seed_and_the_step_alone():
    """The same ones give the same batch, however it is divided into micro-batches."""
    batch = first_ids(step=5)
    assert batch == first_ids(step=5)
    assert batch == first_ids(step=5, batch_size=8, grad_accum=1)
    assert batch != first_ids(step=6)
    assert batch != first_ids(step=5, seed=4)


def test_ranks_share_out_the_micro_batches():
    """Two ranks see every other one of four, and together all."""
    batch = first_ids(step=5)
    assert first_ids(step=5, rank=0, ranks=2) == batch[0:2] + batch[4:6]
    assert first_ids(step=5, rank=1, ranks=2) == batch[2:4] + batch[6:8]


def test_batches_come_from_all_of_the_data():
    """The first and the last window are drawn, too."""
    starts = []
    for step in range(600):
        starts += first_ids(step)
    assert min(starts) == 0
    assert max(starts) == 991


def test_a_batch_goes_to_a_gpu_without_waiting(monkeypatch):
    """It is pinned, and then copied with non_blocking."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: calls.append(non_blocking) or self
    )
    gpu = SimpleNamespace(type="cuda")
    train.read_windows(np.arange(50), np.array([0]), ModelConfig(block_size=8), gpu)
    assert calls == ["pin", True]


def test_the_next_batch_is_loaded_while_the_device_computes(corpus, call, monkeypatch):
    """It is loaded after the backward pass has begun, and before anything waits for its result."""
    calls = []
    get_batch = train.get_batch
    clip = torch.nn.utils.clip_grad_norm_
    backward = torch.Tensor.backward

    def note(name, function):
        return lambda *arguments: calls.append(name) or function(*arguments)

    monkeypatch.setattr(train, "get_batch", note("load", get_batch))
    monkeypatch.setattr(torch.Tensor, "backward", note("backward", backward))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note("clip", clip))
    assert call(train, *TINY_RUN, "--max_steps=2", "--eval_interval=9")[0] == 0
    assert calls == ["load", "backward", "load", "clip", "backward", "load", "clip"]


def plain_evaluation(model: GPT, tokens: np.ndarray, count: int) -> list[float]:
    """Return the mean loss and auxiliary losses over `count` windows, one after the other."""
    results = []
    for start in np.linspace(0, len(tokens) - 17, count).astype(int):
        window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))[None]
        out = model(window[:, :-1])
        loss = F.cross_entropy(out.logits[0], window[0, 1:])
        results.append([loss.item(), out.balance_loss.item(), out.z_loss.item()])
    return np.mean(results, axis=0).tolist()


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_evaluation_equals_a_plain_loop(corpus, batch_size):
    """The loss is a mean over evenly spaced windows, however many are read at a time."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    _, _, tokens = prepare.open_dataset("tiny")
    config = TrainConfig(eval_tokens=30 * 16 + 5, batch_size=batch_size)
    loss, balance_loss, z_loss = train.evaluate(model, tokens, config, FLOAT32)
    expected = plain_evaluation(model, tokens, 30)
    assert loss == pytest.approx(expected[0], abs=1e-5)
    assert z_loss == pytest.approx(expected[2], abs=1e-4)
    if batch_size == 1:  # the balance loss is that of a batch
        assert balance_loss == pytest.approx(expected[1], abs=1e-5)


def test_the_log_has_a_row_per_evaluation(corpus, call):
    """It tells tokens, rates and means; all micro-batches count."""
    settings = [*TINY_RUN, "--max_steps=40", "--eval_interval=20", "--grad_accum=2"]
    assert call(train, *settings)[0] == 0
    rows = read_log()
    columns = "step,tokens,train_loss,val_loss,val_bpb,balance_loss,z_loss,lr,grad_norm"
    assert ",".join(rows[0]) == f"{columns},tokens_per_s"
    assert [row["step"] for row in rows] == [0, 20, 40]
    assert [row["tokens"] for row in rows] == [0, 20 * 2 * 4 * 16, 40 * 2 * 4 * 16]
    config = make_config(TrainConfig, read_settings(settings))
    assert [row["lr"] for row in rows] == pytest.approx(
        [plain_rate(step, config) for step in (0, 20, 40)]
    )
    _, losses, norms = plain_training(settings)
    assert rows[0]["train_loss"] is None
    assert rows[1]["train_loss"] == pytest.approx(np.mean(losses[:20]), abs=1e-3)
    assert rows[2]["train_loss"] == pytest.approx(np.mean(losses[20:]), abs=1e-3)
    assert rows[0]["val_loss"] == pytest.approx(math.log(257), abs=0.5)
    assert rows[2]["val_loss"] < rows[0]["val_loss"] - 1


def test_bits_per_byte_follow_from_the_size_of_the_text(corpus, call):
    """They are nats per token, over ln 2, times tokens per byte of the validation split."""
    assert call(train, *TINY_RUN)[0] == 0
    val = prepare.open_dataset("tiny")[0]["splits"]["val"]
    for row in read_log():
        expected = row["val_loss"] / math.log(2) * val["tokens"] / val["bytes"]
        assert row["val_bpb"] == pytest.approx(expected)


def test_tokens_per_second_are_tokens_over_seconds(corpus, call, monkeypatch):
    """By a clock that goes half a second a look, three steps of 2 · 4 · 16 tokens are 768 a second.

    The evaluations between them are not counted: they take a look each, too.
    """
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert call(train, *TINY_RUN, "--grad_accum=2")[0] == 0
    assert [row["tokens_per_s"] for row in read_log()] == [0.0, 768.0, 768.0]


def test_an_evaluation_is_told_in_one_line(corpus, call):
    """It has loss, bits per byte, tokens per second and the time that has passed."""
    status, out, error = call(train, *TINY_RUN)
    assert status == 0
    lines = [line.strip("\r ") for line in out.splitlines() if "validation loss" in line]
    val_losses = [f"{row['val_loss']:.4f}" for row in read_log()]
    assert [line.split()[4].rstrip(",") for line in lines] == val_losses
    for line in lines:
        assert "bits/byte" in line
        assert "tokens/s, 00:" in line


def test_it_begins_with_the_sizes(corpus, call):
    """Parameters, those that are active for a token, and tokens per step, counted by hand."""
    model = GPT(make_config(ModelConfig, read_settings(TINY_RUN)))
    total = sum(weight.numel() for weight in model.parameters())
    idle = sum(2 * 3 * 8 * 16 for _ in model.blocks)  # two of four experts, each of three matrices
    out = call(train, *TINY_RUN, "--grad_accum=2")[1]
    assert f"{total:,} parameters, {total - idle:,} active per token, 128 tokens per step" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_the_precision_of_the_products(corpus, call, monkeypatch, dtype):
    """Logits have it in training and in evaluation, while weights stay float32."""
    seen = set()
    forward = GPT.forward

    def noted(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        seen.add((out.loss is not None, out.logits.dtype))
        return out

    monkeypatch.setattr(GPT, "forward", noted)
    monkeypatch.setattr("sample.main", lambda arguments: None)
    assert call(train, *TINY_RUN, f"--dtype={dtype}")[0] == 0
    assert seen == {(True, getattr(torch, dtype))}
    assert load("out/tiny/ckpt.pt")["model"]["embed.weight"].dtype == torch.float32


def test_a_checkpoint_holds_all_that_is_needed(corpus, call):
    """Both configurations, the data's description with its encoding, the weights, the step."""
    assert call(train, *TINY_RUN)[0] == 0
    checkpoint = load("out/tiny/ckpt.pt")
    assert checkpoint["step"] == 6
    assert checkpoint["data"] == prepare.open_dataset("tiny")[0]
    assert checkpoint["train_config"]["max_steps"] == 6
    model = GPT(ModelConfig(**checkpoint["model_config"]))
    assert checkpoint["model"].keys() == model.state_dict().keys()
    assert not list(Path("out").rglob("*.tmp"))


def test_the_best_checkpoint_has_the_lowest_loss(corpus, call, monkeypatch):
    """best.pt is that of the second evaluation after the start, ckpt.pt the last one."""
    val_losses = iter([1.0, 5.0, 3.0, 4.0])  # that of the untrained model does not count
    monkeypatch.setattr(train, "evaluate", lambda *arguments: [next(val_losses), 1.0, 1.0])
    assert call(train, *TINY_RUN, "--eval_interval=2")[0] == 0
    assert load("out/tiny/best.pt")["step"] == 4
    assert load("out/tiny/ckpt.pt")["step"] == 6


def test_a_run_that_diverges_ends_before_it_saves(corpus, refused, monkeypatch):
    """One line says at which step, and the last checkpoint is still good."""
    rates = [0.01, 0.01, 0.01, math.inf, 0.01]
    monkeypatch.setattr(train, "get_learning_rate", lambda step, config: rates[step])
    refused("step 4: loss nan", train, *TINY_RUN, "--eval_interval=100")
    checkpoint = load("out/tiny/ckpt.pt")
    assert checkpoint["step"] == 1
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_a_validation_loss_that_is_not_finite_ends_a_run(corpus, refused, monkeypatch):
    """Nothing is saved over."""
    losses = iter([5.0, 4.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: [next(losses), 1.0, 1.0])
    refused("step 6: the validation loss is nan", train, *TINY_RUN)
    assert load("out/tiny/ckpt.pt")["step"] == 3


def test_new_weights_come_from_another_run(corpus, call):
    """With --init_from the first loss is the last one of the other run; all else is new."""
    assert call(train, *TINY_RUN)[0] == 0
    tuned = [*TINY_RUN, "--init_from=out/tiny", "--out_dir=out/tuned"]
    assert call(train, *tuned)[0] == 0
    rows = read_log("out/tuned/log.csv")
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert rows[0]["val_loss"] == read_log()[-1]["val_loss"]
    moments = load("out/tuned/ckpt.pt")["optimizer"]["state"].values()
    assert {moment["step"].item() for moment in moments} == {6}, "AdamW counts anew"


@pytest.mark.parametrize("change", ["--n_layer=3", "--aggregator=sum"])
def test_weights_that_do_not_fit_are_refused(corpus, call, refused, change):
    """One line, and no folder is made."""
    assert call(train, *TINY_RUN)[0] == 0
    tuned = [*TINY_RUN, "--init_from=out/tiny", "--out_dir=out/tuned", change]
    refused("the weights of out/tiny do not fit", train, *tuned)
    assert not Path("out/tuned").exists()


@pytest.mark.parametrize("gate", ["sigmoid", "silu"])
def test_a_trained_sum_can_get_a_graph(corpus, call, gate):
    """The first validation loss is the old model's; then the graph learns."""
    assert call(train, *TINY_RUN, "--aggregator=sum")[0] == 0
    graph = ["--aggregator=dag", f"--dag_gate={gate}", "--dag_depth=1", "--dag_dim=8"]
    tuned = ["--init_from=out/tiny/ckpt.pt", "--out_dir=out/dag"]
    assert call(train, *TINY_RUN, *tuned, *graph)[0] == 0
    before = read_log()[-1]["val_loss"]
    assert read_log("out/dag/log.csv")[0]["val_loss"] == pytest.approx(before, abs=1e-5)
    weights = load("out/dag/ckpt.pt")["model"]
    assert weights["blocks.1.moe.aggregate.layers.0.w_up.weight"].abs().max() > 0


def test_a_compiled_run_saves_plain_names(corpus, call, monkeypatch):
    """What it saves, an uncompiled run can resume."""
    compile = torch.compile
    monkeypatch.setattr(train.torch, "compile", lambda model: compile(model, backend="eager"))
    assert call(train, *TINY_RUN, "--compile", "--max_steps=3")[0] == 0
    resumed = ["--resume", "--out_dir=out/tiny", "--compile=false", "--max_steps=6"]
    status, _, error = call(train, *resumed)
    assert status == 0, error
    assert load("out/tiny/ckpt.pt")["step"] == 6
    assert not any("_orig_mod" in name for name in load("out/tiny/ckpt.pt")["model"])
