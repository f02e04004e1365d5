"""lab/: baselines equal plain loops, arms are fair, the table is right, a sweep goes on where it was stopped."""

import dataclasses
import itertools
import math
import re
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch

import train
from lab import compare, cost
from model import FEED_FORWARD, GPT, ModelConfig
from tests import reference
from tests.conftest import REPOSITORY, TINY_RUN
from tests.reference import assert_same, randomize, results_and_gradients, rms_norm, tiny_config

ABLATION = REPOSITORY / "lab/configs/ablation"
BASELINES = ["mlp", "coe", "series", "dense", "dag_ungated", "dag_self"]
SMALL = [setting for setting in TINY_RUN if "out_dir" not in setting]


def plain_mlp(mixing, h: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Σ_i n_i + W_up GELU(W_mix concat(z_1, ..., z_K)): h (S, C), out (S, K, C) with its gates."""
    nodes = [o + h / out.shape[1] for o in out.unbind(dim=1)]
    z = [rms_norm(n, mixing.norm.weight) @ mixing.layers["w_down"].weight.T for n in nodes]
    x = torch.cat(z, dim=-1) @ mixing.w_mix.weight.T
    return sum(nodes) + (0.5 * x * (1 + torch.erf(x / 2**0.5))) @ mixing.w_up.weight.T


def plain_half(name: str, moe, h: torch.Tensor) -> torch.Tensor:
    """The feed-forward half of a block with the aggregator `name`, K = 4 and a shared expert, for h (S, C)."""

    def everyones(network) -> torch.Tensor:
        x = rms_norm(h, moe.norm.weight)
        return reference.plain_swiglu(network.gate_proj[0], network.up_proj[0], network.down_proj[0], x)

    def outputs(router, h: torch.Tensor, top_k: int) -> torch.Tensor:
        x = rms_norm(h, moe.norm.weight)
        gate, expert = reference.plain_router(router.weight, x, top_k)
        return gate.unsqueeze(-1) * reference.plain_experts(moe.experts, x, expert)

    if name == "dense":
        return h + everyones(moe.network)
    if name == "coe":
        first = h + outputs(moe.router, h, 2).sum(dim=1) + everyones(moe.shared)
        return first + outputs(moe.second.router, first, 2).sum(dim=1)
    if name == "series":
        return plain_half("sum", moe.second, plain_half("sum", moe, h))
    out, aggregator = outputs(moe.router, h, 4), moe.aggregate
    if name == "sum":
        aggregator = Namespace(layers=[])
    if name == "mlp":
        return plain_mlp(aggregator, h, out) + everyones(moe.shared)
    if name == "dag_self":
        alone = [reference.plain_dag(aggregator, "silu", h / 4, out[:, [i]], torch.ones(6, 1)) for i in range(4)]
        return sum(alone) + everyones(moe.shared)
    gate_name = "silu"
    if name == "dag_ungated":  # which needs no w_edge
        layers = [Namespace(w_edge=layer.w_node, **dict(layer.named_children())) for layer in aggregator.layers]
        aggregator, gate_name = Namespace(layers=layers), "open"
    return reference.plain_dag(aggregator, gate_name, h, out, torch.ones(out.shape[:2])) + everyones(moe.shared)


@pytest.mark.parametrize("name", ["sum", "dag", *BASELINES])
def test_feed_forward_halves_equal_plain_loops(name):
    """The whole feed-forward half, router, norm and shared expert included, and every gradient (float64, 1e-10)."""
    moe = randomize(FEED_FORWARD[name](tiny_config(aggregator=name, top_k=4, shared_dim=20))).double()
    h = torch.randn(6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = results_and_gradients(lambda h: moe(h.unsqueeze(0))[0].squeeze(0), {"h": h}, moe)
    assert all(x.abs().max() > 1e-3 for x in ours.values()), "what vanishes tests nothing"
    assert_same(ours, results_and_gradients(lambda h: plain_half(name, moe, h), {"h": h}, moe), 1e-10)


def test_losses_of_routers():
    """coe, series: the mean of both losses, K even; dense: what a balanced router would say."""
    moe, seen = randomize(FEED_FORWARD["coe"](tiny_config(aggregator="coe", top_k=4))), []
    for router in (moe.router, moe.second.router):
        router.register_forward_hook(lambda router, arguments, result: seen.append(result[2]))
    _, (balance, z) = moe(torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)))
    (first_balance, first_z), (second_balance, second_z) = seen
    assert balance == (first_balance + second_balance) / 2 and z == (first_z + second_z) / 2
    with pytest.raises(ValueError, match="top_k must be even for coe"):
        GPT(tiny_config(aggregator="coe", top_k=3))
    out = GPT(tiny_config(aggregator="dense"))(torch.zeros(2, 8, dtype=torch.long))
    assert out.balance == 1 and out.z == 0


@pytest.mark.parametrize("name", ["dag", *(name for name in BASELINES if name != "dense")])
def test_seeds_are_paired(name):
    """For one seed all share what sum has; W_up is zero, and learns; some begin as the sum."""
    tokens = torch.randint(23, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    models = [GPT(tiny_config(aggregator=aggregator, top_k=4, n_embd=64)) for aggregator in ("sum", name)]
    weights, ours = (dict(model.named_parameters()) for model in models)
    assert len(ours) > len(weights) and all(torch.equal(weight, ours[key]) for key, weight in weights.items())
    w_up = [weight for key, weight in ours.items() if "w_up" in key]
    assert all(weight.abs().max() == 0 for weight in w_up)
    if name in ("dag", "mlp", "dag_ungated"):
        outputs = [model(tokens, tokens) for model in models]
        assert (outputs[0].logits - outputs[1].logits).abs().max() <= 1e-5
        outputs[1].loss.backward()
        assert all(weight.grad.abs().max() > 0 for weight in w_up), "it must not stay the sum"


@pytest.mark.parametrize("changes", [{}, {"shared_dim": 12}, {"dag_depth": 3}, {"tie_embeddings": False}], ids=str)
@pytest.mark.parametrize("name", ["sum", "dag", *BASELINES])
def test_cost_is_what_is_counted(name, changes):
    """Parameters are those that are there, multiply-adds what torch counts; the aggregator's are what sum has not."""
    config = tiny_config(aggregator=name, top_k=4, **changes)
    model, of_sum = GPT(config), GPT(dataclasses.replace(config, aggregator="sum")).cost()
    by_formula, counted = model.cost(), cost.count_multiply_adds(model, torch.zeros(1, 16, dtype=torch.long))
    assert by_formula["parameters"] == sum(p.numel() for p in model.parameters())
    stacked = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    assert by_formula["active"] == by_formula["parameters"] - stacked // 2
    assert by_formula["multiply_adds"] == counted
    beyond_sum = {"coe": 512, "dense": -512}.get(name, by_formula["aggregator"])  # a router more, a router less
    assert name == "series" or counted == of_sum["multiply_adds"] + beyond_sum
    assert (by_formula["aggregator"] > 0) == (name == "mlp" or name.startswith("dag"))


def config_of(*arguments) -> ModelConfig:
    return train.make_config(ModelConfig, train.read_settings(list(map(str, arguments))))


def test_arms_are_fair():
    """Arms differ in the aggregator only; shared has the weights of dag2's matrices, *_compute its multiply-adds."""
    for path in set(ABLATION.glob("*.toml")) - {ABLATION / "base.toml"}:
        keys = tomllib.loads(path.read_text()).keys() - {"shared_dim", "dag_depth", "dag_gate"}
        assert keys == ({"aggregator", "expert_dim"} if path.stem == "sum_compute" else {"aggregator"}), path
    large = ABLATION.with_name("ablation_s")
    for folder in (large, ABLATION):
        configs = {path.stem: config_of(folder / "base.toml", path, "--n_layer=1") for path in folder.glob("*.toml")}
        costs = {arm: GPT(config).cost() for arm, config in configs.items()}
        assert costs["dag2_silu"]["parameters"] - costs["shared"]["parameters"] == 2 * configs["sum"].n_embd  # norms
        for arm in costs.keys() & {"shared_compute", "sum_compute"}:
            assert costs[arm]["multiply_adds"] == costs["dag2_silu"]["multiply_adds"]
    for arm in ("dense", "coe"):
        assert costs[arm]["multiply_adds"] == pytest.approx(costs["sum"]["multiply_adds"], rel=0.01)
    small = config_of(REPOSITORY / "configs/dag_moe_s.toml", "--vocab_size=257")
    assert config_of(large / "base.toml", large / "dag2_silu.toml") == small, "the same shape"


def evaluation(arm: str, seed: int, at_token: int, val_loss: float, **changes) -> compare.Evaluation:
    """A row of a made-up run."""
    run = dict(data="d", evaluated_on="v", eval_tokens=100, tokens=1000, training="t", model="m", parameters=10)
    run |= dict(active=5, multiply_adds=20, learning_rate=0.1, tokens_per_s=100.0)
    return compare.Evaluation(**run, arm=arm, seed=seed, at_token=at_token, val_loss=val_loss)._replace(**changes)


def test_the_table_is_what_the_rows_say(call):
    """Mean losses, paired differences with Student's interval, equal time and speed, by hand; what is left out."""
    losses, rows = {"sum": [1.0, 1.2, 1.1], "dag": [0.9, 1.15, 1.02]}, []
    for arm, seed in itertools.product(losses, (1, 2, 3)):
        changes = {} if arm == "sum" else {"tokens_per_s": 50.0, "multiply_adds": 30}
        rows.append(evaluation(arm, seed, 1000, losses[arm][seed - 1], **changes))  # the order of rows does not matter
        rows += [evaluation(arm, seed, 500, 2.0, **changes), evaluation(arm, seed, 0, 5.0, tokens_per_s=None)]
    rows += [evaluation("one", 2, 1000, 1.3, learning_rate=0.2), evaluation("one", 4, 1000, 0.1, learning_rate=0.2)]
    rows.append(evaluation("sum", 4, 500, 9.0))
    compare.write_csv(Path("a.csv"), {"": rows})
    out = call(compare, "table", "a.csv", "--csv=b.csv")[1]
    half = 4.303 * statistics.stdev([-0.1, -0.05, -0.08]) / math.sqrt(3)
    interval = f"-0.0767 ({-0.23 / 3 - half:+.4f} to {-0.23 / 3 + half:+.4f})"
    assert [" ".join(line.split()) for line in out.splitlines()][4:] == [
        f"dag 10 30 1.50 0.1 3 1.0233 {interval} 2.0000 50 0.50",
        "sum 10 20 1.00 0.1 3 1.1000 +0.0000 1.1000 100 1.00",
        "one 10 20 1.00 0.2 1 1.3000 +0.1000 1.3000 100 1.00",
        "Left out: one-4, at 1,000 tokens; it or sum-4 is not finished.",
        "Left out: sum-4, at 500 tokens; it or sum-4 is not finished.",
    ]
    assert call(compare, "table", "b.csv")[1] == out, "what was written is what was read"
    assert "-0.1000" in call(compare, "table", "a.csv", "--against=one")[1]
    assert "1.2406  -0.0024 (-0.0178 to +0.0129) " in call(compare, "table", REPOSITORY / "lab/results/text.csv")[1]
    assert f"2{'+0.0145':>30}\n" in call(compare, "table", REPOSITORY / "lab/results/ablation_s.csv")[1], "no speeds"
    assert call(compare, "plot", "a.csv", "c.png")[0] == 0 and Path("c.png").read_bytes().startswith(b"\x89PNG")


def test_what_can_not_be_compared_is_refused(refused, workdir):
    """Unequal data, tokens, evaluation or arms, runs given twice, and nonsense: one line each."""
    row = evaluation("sum", 1, 1000, 1.0)
    of_all = ("data", "evaluated_on", "eval_tokens", "tokens", "training")
    for arm, seed, names in (("dag", 1, of_all), ("sum", 2, ("model", "learning_rate"))):
        for name in names:
            compare.write_csv(Path("a.csv"), {"": [row, row._replace(arm=arm, seed=seed, **{name: "7"})]})
            refused(f"-1 differ in {name} (", compare, "table", "a.csv")
    compare.write_csv(Path("a.csv"), {"": [row]})
    refused("sum-1 is there twice", compare, "table", "a.csv", "a.csv")
    if Path("/dev/full").exists():
        refused("no space left for /dev/full: make room", compare, "table", "a.csv", "--csv=/dev/full")
    refused("no run of 'dag' is finished; there are runs of sum", compare, "table", "a.csv", "--against=dag")
    refused("nowhere holds no runs: python -m lab.compare sweep", compare, "table", "nowhere")
    for column, value in (("val_loss", ""), ("val_loss", "nan"), ("arm", ""), ("seed", "x"), ("arm", "a" * 200_000)):
        compare.write_csv(Path("bad.csv"), {"": [evaluation("sum", 2, 1000, 1.0)._replace(**{column: value})]})
        refused("bad.csv is not a file that lab.compare table --csv wrote", compare, "table", "bad.csv")
    refused("must hold base.toml, and beside it a file per arm", compare, "sweep", workdir)
    refused("--seeds must be a number, for seeds 1 to that, or", compare, "sweep", ABLATION, "--seeds=5-4")
    refused("--jobs must be at least 1", compare, "sweep", ABLATION, "--jobs=0")
    refused("has no arm dag3; there are: coe, dag1_sigmoid,", compare, "sweep", ABLATION, "--arms=dag3")
    refused("--seed=3: the sweep sets that itself", compare, "sweep", ABLATION, "--seed=3")
    refused("the nearest key is n_layer", compare, "sweep", ABLATION, "--n_layers=3")
    refused("must be at least 1", cost, "layer", "--repeats=0")
    refused("give a run's folder, and", cost, "sample", "out/none", "--x=3")


def test_runs_are_read_from_their_folders(corpus, call, refused):
    """Rows are those of the log, with the model's size."""
    for arm in ("sum", "mlp"):
        assert call(train, *SMALL, f"--aggregator={arm}", "--seed=1", f"--out_dir=out/all/{arm}-1")[0] == 0
    Path("out/all/mlp-1/best.pt").unlink()  # it is the last checkpoint that counts
    rows = compare.evaluations_of(Path("out/all/mlp-1"))
    model, checkpoint = train.load_checkpoint(Path("out/all/mlp-1/ckpt.pt"))
    log = [(row["tokens"], row["val_loss"]) for row in checkpoint["log"]]
    assert [(row.at_token, row.val_loss) for row in rows] == log and [tokens for tokens, _ in log] == [0, 192, 384]
    assert rows[0].parameters == model.cost()["parameters"] and rows[0].tokens == 384
    Path("out/all/mlp-1").rename("out/all/mlp-7")
    refused("out/all/mlp-7 should be called ARM-1, for that is its seed", compare, "table", "out/all")
    out = call(cost, "sample", "out/all/sum-1", "--new_tokens=20", "--repeats=1")[1]
    assert re.findall(r"^(\w.*?)  +[\d,]+ tokens/s", out, re.MULTILINE) == ["uncached", "cached", "cached, 16 texts"]


def test_a_sweep_goes_on_where_it_was_stopped(corpus, call, refused, monkeypatch):
    """Stopped by SIGTERM it saves; started again it ends as if undisturbed, names what fails, skips what is done."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    settings = [setting for setting in SMALL if not re.match("--(max_steps|eval_interval|top_k)", setting)]
    sweep, mlp = ["sweep", "arms", "--seeds=1", "--jobs=2", *settings], ["--arms", "mlp"]
    Path("arms").mkdir()
    Path("arms/base.toml").write_text("max_steps = 150\neval_interval = 50\n")
    Path("arms/mlp.toml").write_text('aggregator = "mlp"\n')
    Path("arms/odd.toml").write_text('aggregator = "coe"\ntop_k = 3\n')
    process = subprocess.Popen([sys.executable, "-m", "lab.compare", *sweep, *mlp], stdout=subprocess.PIPE, text=True)
    while not Path("out/arms/mlp-1/ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "stopped; the same command goes on" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert "stopped after step" in Path("out/arms/mlp-1.log").read_text()
    Path("out/arms/odd-1.log").write_text("said earlier\n")
    status, out, error = call(compare, *sweep)
    assert status == 2 and "2 runs, 0 of them finished already, 2 at a time" in out
    assert "error: 1 of 2 runs failed: out/arms/odd-1; see the .log beside each" in error
    assert "odd-1 ended with status 2, and said: error: top_k must be even for coe" in out + error
    assert call(train, "arms/base.toml", "arms/mlp.toml", *settings, "--seed=1", "--out_dir=out/x")[0] == 0
    ours, theirs = (compare.read_rows(Path(f"out/{name}/log.csv"))[-1] for name in ("arms/mlp-1", "x"))
    assert ours | {"tokens_per_s": ""} == theirs | {"tokens_per_s": ""}
    assert "1 runs, 1 of them finished already" in call(compare, *sweep, *mlp)[1]
    refused("another learning_rate (0.01, now 0.1): choose", compare, *sweep, *mlp, "--learning_rate=0.1")


def test_costs_are_printed(corpus, call):
    """A row per aggregator with the numbers of GPT.cost(); ratios are of neighbours, sum's to itself is 1; memory."""
    assert cost.ratio([1.0, 8.0, 9.0], [1.0, 4.0, 3.0]) == "2.00 (1.00-3.00)"
    peaks = [cost.peak_megabytes(lambda n=n: torch.ones(n).sum(), torch.device("cpu")) for n in (2**26, 25_000_000)]
    assert math.isnan(peaks[1]) or 90 < peaks[1] < 130, "the second must not see the first one's"
    out = call(cost, "step", "--repeats=1", *SMALL)[1]
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()[2:]}
    assert list(rows) == ["sum", "series", "mlp", "dense", "coe", "shared", "dag L=1", "dag L=2"]
    shared = GPT(config_of(*SMALL, "--aggregator=sum", "--shared_dim=8")).cost()
    assert rows["shared"][:2] == [f"{shared['parameters']:,}", f"{shared['multiply_adds']:,}"]
    assert rows["sum"][2] == rows["sum"][4] == "1.00" and rows["sum"][5] == "(1.00-1.00)"
    assert "dag D=64" in call(cost, "layer", "--repeats=1", *SMALL)[1]
