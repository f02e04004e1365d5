"""A training run does what its settings say: it equals a plain loop, and logs what happened."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import train
from model import GPT, ModelConfig
from tests.helpers import TINY_RUN, assert_refused, load
from train import TrainConfig, make_config, parse_settings

TUNED = [*TINY_RUN, "--init_from=out/tiny", "--out_dir=out/tuned"]
COLUMNS = "step tokens train_loss val_loss val_bpb balance_loss z_loss lr grad_norm tokens_per_s"


def read_log(path: str = "out/tiny/log.csv") -> np.ndarray:
    """Return a log's columns by name."""
    return np.genfromtxt(path, delimiter=",", names=True)


def read_batch(tokens, config: TrainConfig, step: int) -> torch.Tensor:
    """Return all windows of a step: (grad_accum, batch_size, block_size + 1)."""
    generator = np.random.default_rng((config.seed, step))
    shape = (config.grad_accum, config.batch_size)
    starts = generator.integers(0, len(tokens) - 16, size=shape)
    windows = [tokens[start : start + 17] for start in starts.flat]
    batch = np.stack(windows).astype(np.int64)
    return torch.from_numpy(batch).view(*shape, 17)


def plain_learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: a line up, then a cosine down."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    fallen = (1 - math.cos(math.pi * share)) / 2
    return config.learning_rate - fallen * (config.learning_rate - config.min_lr)


def plain_training(arguments: list[str]) -> tuple[GPT, list[float], list[float]]:
    """Train as documented: return the model, and each step's loss and norm of the gradient."""
    settings = parse_settings(arguments)
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
            group["lr"] = plain_learning_rate(step, config)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return model, losses, norms


@pytest.mark.parametrize(
    ("aggregator", "grad_accum", "warmup_steps"), [("sum", 1, 0), ("dag", 3, 3)]
)
def test_a_run_equals_a_plain_loop(corpus, aggregator, grad_accum, warmup_steps):
    """Weights, losses, gradient norms and learning rates of eight steps are a plain loop's."""
    settings = [*TINY_RUN, f"--aggregator={aggregator}", f"--grad_accum={grad_accum}"]
    settings += [f"--warmup_steps={warmup_steps}", "--min_lr=0.001", "--weight_decay=3"]
    settings += ["--max_steps=8", "--eval_interval=2", "--grad_clip=0.6"]
    settings += ["--balance_coef=0.5", "--z_coef=0.3"]
    train.main(settings)
    model, losses, norms = plain_training(settings)
    assert max(norms) > 0.6, "or nothing would be clipped"
    for name, weight in load()["model"].items():
        assert (weight - model.state_dict()[name]).abs().max() < 2e-5, name
    log = read_log()
    mean_losses = np.array(losses).reshape(4, 2).mean(axis=1)
    assert log["train_loss"][1:] == pytest.approx(mean_losses, abs=1e-5)
    assert log["grad_norm"][1:] == pytest.approx(norms[1::2], rel=1e-3)
    config = make_config(TrainConfig, parse_settings(settings))
    learning_rates = [plain_learning_rate(step, config) for step in range(1, 9, 2)]
    assert log["lr"][1:] == pytest.approx(learning_rates)


def test_evaluation_equals_a_plain_loop(corpus):
    """It returns means over thirty evenly spaced windows, however many it reads at a time."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    _, _, tokens = prepare.open_dataset("tiny")
    amp = train.autocast(torch.device("cpu"), "float32")
    results = []
    for start in np.linspace(0, len(tokens) - 17, 30).astype(int):
        window = torch.from_numpy(tokens[start : start + 17].astype(np.int64))
        out = model(window[None, :-1])
        loss = F.cross_entropy(out.logits[0], window[1:])
        results.append([loss.item(), out.balance_loss.item(), out.z_loss.item()])
    means = np.mean(results, axis=0)
    single = TrainConfig(eval_tokens=30 * 16 + 5, batch_size=1)
    assert train.evaluate(model, tokens, single, amp) == pytest.approx(means, abs=1e-4)
    several = TrainConfig(eval_tokens=30 * 16 + 5, batch_size=7)
    loss, _, z_loss = train.evaluate(model, tokens, several, amp)
    assert [loss, z_loss] == pytest.approx(means[[0, 2]], abs=1e-4)


def test_evaluation_switches_dropout_off(corpus):
    """A model is evaluated in evaluation mode, and left in training mode."""
    modes = []
    model = GPT(ModelConfig(block_size=16, n_layer=1))
    model.register_forward_hook(lambda module, x, out: modes.append(module.training))
    _, _, tokens = prepare.open_dataset("tiny")
    amp = train.autocast(torch.device("cpu"), "float32")
    train.evaluate(model, tokens, TrainConfig(eval_tokens=64), amp)
    assert modes == [False]
    assert model.training


def test_what_a_run_prints_and_logs(corpus, monkeypatch, capsys):
    """With a fake clock that advances 0.5 s per reading, three steps of 128 tokens take 0.5 s."""
    clock = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(train, "evaluate", lambda *arguments: [2.0, 3.0, 4.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    train.main([*TINY_RUN, "--grad_accum=2"])
    out = capsys.readouterr().out
    meta, _, _ = prepare.open_dataset("tiny")
    epochs = 6 * 128 / meta["splits"]["train"]["tokens"]
    assert "cpu, float32; 9,760 parameters, 8,224 active per token" in out
    assert f"6 steps of 128 tokens: {epochs:.1f} epochs" in out
    log = read_log()
    assert log.dtype.names == tuple(COLUMNS.split())
    assert log["step"].tolist() == [0, 3, 6]
    assert log["tokens"].tolist() == [0, 3 * 128, 6 * 128]
    assert log["tokens_per_s"].tolist() == [0, 768, 768]
    assert log[["val_loss", "balance_loss", "z_loss"]].tolist() == [(2.0, 3.0, 4.0)] * 3
    val = meta["splits"]["val"]
    bits = 2.0 / math.log(2) * val["tokens"] / val["bytes"]
    assert log["val_bpb"] == pytest.approx(bits)
    losses = f"validation loss 2.0000, bits/byte {bits:.4f}, balance loss 3.00"
    assert f"step      6: {losses}, 768 tokens/s" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_the_precision_of_matrix_products(corpus, monkeypatch, dtype):
    """Logits have this dtype in training and in evaluation, while weights stay float32."""
    seen = set()
    forward = GPT.forward

    def noted(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        seen.add((torch.is_grad_enabled(), out.logits.dtype))
        return out

    monkeypatch.setattr(GPT, "forward", noted)
    train.main([*TINY_RUN, f"--dtype={str(dtype).removeprefix('torch.')}"])
    assert seen == {(True, dtype), (False, dtype)}
    assert load()["model"]["embed.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("val_losses", "best_step"), [([9.0, 5.0, 3.0, 4.0, 4.5], 4), ([1.0, 2.0, 3.0, 4.0, 5.0], 0)]
)
def test_the_best_model_is_kept(corpus, monkeypatch, val_losses, best_step):
    """best.pt is the model of the lowest validation loss, the untrained one included."""
    remaining = iter(val_losses)
    monkeypatch.setattr(train, "evaluate", lambda *arguments: [next(remaining), 1.0, 1.0])
    train.main([*TINY_RUN, "--eval_interval=2", "--max_steps=8"])
    assert load("out/tiny/best.pt")["step"] == best_step
    assert load("out/tiny/ckpt.pt")["step"] == 8


def test_a_validation_loss_that_is_not_finite_is_never_saved(corpus, monkeypatch):
    """The run ends with an error, and its last good checkpoint is still there."""
    val_losses = iter([5.0, 4.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *arguments: [next(val_losses), 1.0, 1.0])
    assert_refused(train.main, TINY_RUN, "the validation loss is nan at step 6")
    assert load("out/tiny/best.pt")["step"] == 3
    assert load("out/tiny/ckpt.pt")["step"] == 3


def test_a_run_that_diverges_ends(corpus, monkeypatch):
    """The error names the step, and the last good checkpoint is still there."""
    learning_rates = [0.01, 0.01, 0.01, math.inf, 0.01, 0.01]
    monkeypatch.setattr(train, "get_learning_rate", lambda step, config: learning_rates[step])
    assert_refused(train.main, TINY_RUN, "the loss is nan at step 5")
    assert load("out/tiny/ckpt.pt")["step"] == 3


@pytest.mark.parametrize("aggregator", ["sum", "dag"])
def test_a_run_starts_from_the_weights_of_another(corpus, aggregator):
    """The first loss is the other run's last, AdamW starts afresh, and a sum may gain a graph."""
    train.main([*TINY_RUN, f"--aggregator={aggregator}"])
    train.main([*TUNED, "--aggregator=dag"])
    tuned = read_log("out/tuned/log.csv")
    assert tuned["val_loss"][0] == pytest.approx(min(read_log()["val_loss"]), abs=1e-5)
    checkpoint = load("out/tuned/ckpt.pt")
    assert checkpoint["optimizer"]["state"][0]["step"] == 6
    assert checkpoint["model"]["blocks.1.moe.aggregate.layers.0.w_up.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ([], "--n_layer=3", 'Missing key(s) in state_dict: "blocks.2.norm.weight"'),
        (
            [],
            "--aggregator=sum",
            'Unexpected key(s) in state_dict: "blocks.0.moe.aggregate.layers.0',
        ),
        ([], "--expert_dim=4", "gate_proj: copying a param with shape torch.Size([4, 8, 16])"),
        (
            ["--tie_embeddings=false"],
            "--tie_embeddings=true",
            "tie_embeddings must be as in the checkpoint",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(corpus, arguments, change, message):
    """The error names a weight, with its shapes if they differ, and no folder is made."""
    train.main([*TINY_RUN, *arguments])
    assert_refused(train.main, [*TUNED, change], message)
    assert not Path("out/tuned").exists()


def test_a_compiled_run_saves_plain_names(corpus, monkeypatch):
    """A run that was compiled can be resumed without compiling."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    train.main([*TINY_RUN, "--compile=true", "--max_steps=3"])
    train.main(["--resume=out/tiny", "--compile=false", "--max_steps=6"])
    assert load()["step"] == 6
