"""A training run does what its settings say: it equals a plain loop, and logs what happened."""

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

TUNED = [*TINY_RUN, "--init_from=out/tiny", "--out_dir=out/tuned"]
COLUMNS = "step tokens train_loss val_loss val_bpb balance_loss z_loss lr grad_norm tokens_per_s"


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def read_log(path="out/tiny/log.csv") -> np.ndarray:
    """Return a log's columns by name, with nan where there is nothing."""
    return np.genfromtxt(path, delimiter=",", names=True)


def read_batch(tokens, config: TrainConfig, step: int) -> torch.Tensor:
    """Return all windows of a step, (grad_accum, batch_size, block_size + 1)."""
    generator = np.random.default_rng((config.seed, step))
    shape = (config.grad_accum, config.batch_size)
    starts = generator.integers(0, len(tokens) - 16, size=shape)
    windows = [tokens[start : start + 17] for start in starts.flat]
    batch = np.stack(windows).astype(np.int64)
    return torch.from_numpy(batch).view(*shape, 17)


def plain_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: a line up, then a cosine down."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    fallen = (1 - math.cos(math.pi * share)) / 2
    return config.learning_rate - fallen * (config.learning_rate - config.min_lr)


def plain_training(settings: list[str]) -> tuple[GPT, list[float], list[float]]:
    """Train as documented: return the model, and each step's loss and norm of the gradient."""
    settings = read_settings(settings)
    config = make_config(TrainConfig, settings)
    _, tokens, _ = prepare.open_dataset("tiny")
    torch.manual_seed(config.seed)
    model = GPT(make_config(ModelConfig, settings))
    parameters = list(model.parameters())
    groups = []
    for weight in parameters:
        decay = config.weight_decay if weight.dim() > 1 else 0.0
        groups.append({"params": [weight], "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    losses = []
    norms = []
    for step in range(config.max_steps):
        loss = 0
        router_loss = 0
        for part in read_batch(tokens, config, step):
            out = model(part[:, :-1], part[:, 1:])
            loss += out.loss / config.grad_accum
            router_loss += config.balance_coef * out.balance_loss / config.grad_accum
            router_loss += config.z_coef * out.z_loss / config.grad_accum
        optimizer.zero_grad()
        (loss + router_loss).backward()
        norm = torch.stack([weight.grad.norm() for weight in parameters]).norm().item()
        for weight in parameters:
            weight.grad *= min(1.0, config.grad_clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(step, config)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return model, losses, norms


@pytest.mark.parametrize(
    ("aggregator", "grad_accum", "warmup_steps"), [("sum", 1, 0), ("dag", 3, 3)]
)
def test_a_run_equals_a_plain_loop(corpus, call, aggregator, grad_accum, warmup_steps):
    """Weights, losses, norms and rates of eight steps are those of the plain loop."""
    settings = [*TINY_RUN, f"--aggregator={aggregator}", f"--grad_accum={grad_accum}"]
    settings += [f"--warmup_steps={warmup_steps}", "--min_lr=0.001", "--weight_decay=3"]
    settings += ["--grad_clip=0.3", "--balance_coef=0.5", "--z_coef=0.25"]
    settings += ["--max_steps=8", "--eval_interval=2"]
    assert call(train, *settings)[0] == 0
    model, losses, norms = plain_training(settings)
    assert max(norms) > 0.6, "else nothing is clipped"
    for name, weight in load("out/tiny/ckpt.pt")["model"].items():
        assert (weight - model.state_dict()[name]).abs().max() < 2e-5, name
    log = read_log()
    mean_losses = np.array(losses).reshape(4, 2).mean(axis=1)
    assert log["train_loss"][1:] == pytest.approx(mean_losses, abs=1e-5)
    assert log["grad_norm"][1:] == pytest.approx(norms[1::2], rel=1e-3)
    config = make_config(TrainConfig, read_settings(settings))
    rates = [plain_rate(step, config) for step in range(0, 9, 2)]
    assert log["lr"] == pytest.approx(rates)


def test_a_batch_goes_to_a_gpu_without_waiting(monkeypatch):
    """It is pinned, and then copied with non_blocking."""
    calls = []

    def to(self, device, non_blocking):
        calls.append(non_blocking)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu = SimpleNamespace(type="cuda")
    train.read_windows(np.arange(50), np.array([0]), ModelConfig(block_size=8), gpu)
    assert calls == ["pin", True]


def test_the_next_batch_is_loaded_while_the_device_computes(corpus, call, monkeypatch):
    """It is loaded after the backward pass has begun, and before anything waits for its result."""
    calls = []

    def note(owner, name):
        function = getattr(owner, name)

        def noted(*arguments):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, noted)

    note(train, "get_batch")
    note(torch.Tensor, "backward")
    note(torch.nn.utils, "clip_grad_norm_")
    assert call(train, *TINY_RUN, "--max_steps=2", "--eval_interval=9")[0] == 0
    step = ["backward", "get_batch", "clip_grad_norm_"]
    assert calls == ["get_batch", *step, *step]


def test_evaluation_equals_a_plain_loop(corpus):
    """It gives means over thirty evenly spaced windows, however many are read at a time."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    _, _, tokens = prepare.open_dataset("tiny")
    cast = train.autocast(torch.device("cpu"))
    single = TrainConfig(eval_tokens=30 * 16 + 5, batch_size=1)
    several = TrainConfig(eval_tokens=30 * 16 + 5, batch_size=7)
    results = []
    for start in np.linspace(0, len(tokens) - 17, 30).astype(int):
        window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        out = model(window[None, :-1])
        loss = F.cross_entropy(out.logits[0], window[1:])
        results.append([loss.item(), out.balance_loss.item(), out.z_loss.item()])
    means = np.mean(results, axis=0)
    assert train.evaluate(model, tokens, single, cast) == pytest.approx(means, abs=1e-4)
    loss, _, z_loss = train.evaluate(model, tokens, several, cast)
    assert [loss, z_loss] == pytest.approx(means[[0, 2]], abs=1e-4)


def test_the_log_has_a_row_per_evaluation(corpus, call, monkeypatch):
    """By a clock of half a second a look, three steps of 2 · 4 · 16 tokens are 768 a second."""
    clock = iter(np.arange(0, 1000, 0.5))

    def evaluate(*arguments):
        next(clock)  # its time does not count
        return [2.0, 3.0, 4.0]

    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    _, out, _ = call(train, *TINY_RUN, "--grad_accum=2")
    assert "9,760 parameters, 8,224 active per token, 128 tokens per step" in out
    log = read_log()
    assert log.dtype.names == tuple(COLUMNS.split())
    assert log["step"].tolist() == [0, 3, 6]
    assert log["tokens"].tolist() == [0, 3 * 2 * 4 * 16, 6 * 2 * 4 * 16]
    assert log["tokens_per_s"].tolist() == [0, 768, 768]
    assert log[["val_loss", "balance_loss", "z_loss"]].tolist() == [(2.0, 3.0, 4.0)] * 3
    val = prepare.open_dataset("tiny")[0]["splits"]["val"]
    bits = 2.0 / math.log(2) * val["tokens"] / val["bytes"]
    assert log["val_bpb"] == pytest.approx(bits)
    assert f"step      6: validation loss 2.0000, bits/byte {bits:.4f}, 768 tokens/s, 00:" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_the_precision_of_the_products(corpus, call, monkeypatch, dtype):
    """Logits have it in training and in evaluation, while weights stay float32."""
    seen = set()
    forward = GPT.forward

    def noted(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        seen.add((self.training, torch.is_grad_enabled(), out.logits.dtype))
        return out

    monkeypatch.setattr(GPT, "forward", noted)
    monkeypatch.setattr("sample.main", lambda arguments: None)
    assert call(train, *TINY_RUN, f"--dtype={dtype}".replace("torch.", ""))[0] == 0
    assert seen == {(True, True, dtype), (True, False, dtype)}
    assert load("out/tiny/ckpt.pt")["model"]["embed.weight"].dtype == torch.float32


def test_the_best_and_the_last_good_model_are_kept(corpus, refused, monkeypatch):
    """The untrained model does not count, and a loss that is not finite ends the run."""
    val_losses = iter([1.0, 5.0, 3.0, 4.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: [next(val_losses), 1.0, 1.0])
    often = ["--eval_interval=2", "--max_steps=8"]
    refused("step 8: the validation loss is nan", train, *TINY_RUN, *often)
    assert load("out/tiny/best.pt")["step"] == 4
    assert load("out/tiny/ckpt.pt")["step"] == 6


def test_a_run_that_diverges_ends_before_it_saves(corpus, refused, monkeypatch):
    """One line says at which step, and the last checkpoint is still good."""
    rates = [0.01, 0.01, 0.01, math.inf, 0.01]
    monkeypatch.setattr(train, "get_learning_rate", lambda step, config: rates[step])
    refused("step 4: loss nan", train, *TINY_RUN, "--eval_interval=100")
    assert load("out/tiny/ckpt.pt")["step"] == 1


@pytest.mark.parametrize("aggregator", ["sum", "dag"])
def test_new_weights_come_from_another_run(corpus, call, aggregator):
    """The first loss is the other run's last, AdamW counts anew, and a sum gets a graph."""
    assert call(train, *TINY_RUN, f"--aggregator={aggregator}")[0] == 0
    assert call(train, *TUNED, "--aggregator=dag")[0] == 0
    log = read_log("out/tuned/log.csv")
    assert log["val_loss"][0] == pytest.approx(read_log()["val_loss"][-1], abs=1e-5)
    checkpoint = load("out/tuned/ckpt.pt")
    assert checkpoint["optimizer"]["state"][0]["step"] == 6
    assert checkpoint["model"]["blocks.1.moe.aggregate.layers.0.w_up.weight"].abs().max() > 0


@pytest.mark.parametrize("change", ["--n_layer=3", "--aggregator=sum"])
def test_weights_that_do_not_fit_are_refused(corpus, call, refused, change):
    """One line, and no folder is made."""
    assert call(train, *TINY_RUN)[0] == 0
    refused("the weights of out/tiny do not fit", train, *TUNED, change)
    assert not Path("out/tuned").exists()


def test_a_compiled_run_saves_plain_names(corpus, call, monkeypatch):
    """What it saves, an uncompiled run can resume."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    assert call(train, *TINY_RUN, "--compile", "--max_steps=3")[0] == 0
    assert call(train, *TINY_RUN, "--resume", "--compile=false")[0] == 0
    assert load("out/tiny/ckpt.pt")["step"] == 6
