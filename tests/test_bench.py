"""bench.py: what it measures is what it says, and every command runs."""

import re
import time

import pytest
import torch

import bench
import prepare
import sample
from model import GPT, ModelConfig
from tests.conftest import TINY_RUN
from tests.test_graph import make_model, save  # noqa: F401 (a fixture)

TINY = [s for s in TINY_RUN if re.match("--(block_size|n_|top_k|expert_dim|dag_dim|batch_size|device)", s)]
SAME = dict(block_size=16, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_expert=4, top_k=2, expert_dim=8, dag_dim=4)


def test_kept_bytes_counts_each_storage_once_and_no_parameter():
    """x·w keeps x; (x·w)² keeps that, too; a view of x is x."""
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(16, 8, requires_grad=True) * 1
    assert bench.kept_bytes(lambda: x @ weight) == 16 * 8 * 4
    assert bench.kept_bytes(lambda: (x @ weight).square()) == 2 * 16 * 8 * 4
    assert bench.kept_bytes(lambda: (x @ weight) + (x.view(4, 4, 8) @ weight).view(16, 8)) == 16 * 8 * 4


def test_ratios_are_of_pairs():
    """Median and spread of the quotients, not the quotient of medians."""
    assert bench.compare("a", [1.0, 8.0, 9.0], [1.0, 4.0, 3.0]) == "a: 2.00 x (1.00 to 3.00)"


def test_time_and_memory_are_measured():
    """Seconds of a call, and the memory that it needed for a while."""
    cpu = torch.device("cpu")
    assert 0.05 <= bench.seconds_of(lambda: time.sleep(0.05), cpu) < 0.5
    bench.keep_freed_memory()
    for _ in range(3):  # what the call before has freed counts anew
        peak = bench.peak_bytes(lambda: torch.ones(25_000_000).sum(), cpu)
        assert peak is None or 90e6 < peak < 130e6


def test_cost_and_layer(call):
    """A row per aggregator, with the formulas' numbers; the ratio of sum to itself is 1."""
    for command in (("cost", "configs/none.toml"), ("layer", "--tokens=0")):
        assert call(bench, *command)[0] == 2
    status, out, error = call(bench, "cost", "--repeats=1", *TINY)
    assert status == 2 and "configs/quickstart.toml does not exist" in error, "outside of the repository"
    open("tiny.toml", "w").close()
    status, out, error = call(bench, "cost", "tiny.toml", "--repeats=1", *TINY)
    assert status == 2 and "python prepare.py stdlib" in error and "or give --vocab_size=50257" in error
    status, out, error = call(bench, "cost", "tiny.toml", "--repeats=1", *TINY, "--vocab_size=257")
    assert status == 0, error
    lines = out.splitlines()
    assert lines[0].startswith("64 tokens, cpu, torch.float32, matmul peak ")
    plain = ["sum", "shared", "mlp", "coe", "dense"]
    assert [line[:18].strip() for line in lines[2:]] == [*plain, "dag L=1 D=4", "dag L=2 D=4"]
    variants = *({"aggregator": name} for name in plain), {"dag_depth": 1}, {}
    for line, changes in zip(lines[2:], variants, strict=True):
        model = GPT(ModelConfig(**SAME | changes))
        assert f"{model.count_parameters().total:,} (" in line
        assert f"{model.multiply_adds_per_token().total:,}" in line
    assert re.search(r" 1\.00 +[\d.]+ +1\.00 \(1\.00-1\.00\)", lines[2])
    status, out, error = call(bench, "layer", "--tokens=32", "--repeats=1", *TINY)
    assert status == 0 and len(out.splitlines()) == 6, error
    cost = GPT(ModelConfig(**SAME | {"aggregator": "sum", "n_layer": 1})).multiply_adds_per_token()
    assert f" {cost.experts:,} " in out.splitlines()[3]


def test_sample_and_loop(corpus, save, call):  # noqa: F811
    """Both print a ratio and the speeds behind it."""
    status, out, error = call(bench, "sample", save(make_model()), "--new-tokens=20", "--repeats=1", "--device=cpu")
    assert status == 0, error
    assert re.search(r"cached against uncached: [\d.]+ x", out)
    assert re.search(r"16 texts at once against one: [\d.]+ x", out)
    open("tiny.toml", "w").close()
    status, out, error = call(bench, "loop", "tiny.toml", *TINY_RUN[:1], *TINY, "--steps=3", "--repeats=1")
    assert status == 0 and re.search(r"speed of train.py against a bare loop, cpu: [\d.]+ x", out), error


@pytest.mark.parametrize("what", ["prepare", "memory"])
def test_prepare_and_memory(call, workdir, monkeypatch, what):
    """Measured on a small text; the folder in which they work is gone afterwards."""
    (workdir / "texts").mkdir()
    (workdir / "texts/a.txt").write_text("Some words. " * 1000)
    monkeypatch.setattr(bench, "stdlib_source", lambda: prepare.local_source(["texts"], "*.txt", None))
    options, message = {
        "prepare": (["texts", "--repeats=1"], "speed of prepare.py against tiktoken's own: "),
        "memory": (["--sizes", "1"], "1 MB of text: peak memory "),
    }[what]
    status, out, error = call(bench, what, *options, "--encoding=bytes")
    assert status == 0, error
    assert message in out
    assert [path.name for path in workdir.iterdir()] == ["texts"]


def test_keeping_freed_memory_is_harmless():
    """Where there is glibc it answers, elsewhere nothing happens."""
    sample.keep_freed_memory()
