"""lab/: baselines equal plain loops, costs are counted, tables are right, pages show the model."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from lab import compare, cost, graph
from model import FEED_FORWARD, GPT, ModelConfig, rope_table
from prepare import open_dataset
from tests import reference
from tests.conftest import REPOSITORY, TINY_RUN
from tests.reference import assert_same, plain_dag, randomize, rms_norm, tiny_config

ABLATION = REPOSITORY / "lab/configs/ablation"
TEXT = REPOSITORY / "lab/results/text.csv"
GRAPHS = ["dag", "mlp", "dag_ungated", "dag_self"]  # begin as sum
ALL = ["sum", "coe", "series", "dense", *GRAPHS]
SMALL = [word for word in TINY_RUN if "out_dir" not in word]


def plain_outputs(moe, router, h, top_k):
    """Compute the outputs of each token's experts, times their weights: (S, C) → (S, K, C)."""
    x = rms_norm(h, moe.norm.weight)
    weight, expert = reference.plain_router(router.weight, x, top_k)
    return weight.unsqueeze(-1) * reference.plain_experts(moe.experts, x, expert)


def plain_half(name, moe, h):
    """Compute the feed-forward half of a block, K = 4 and a shared expert, for h (S, C)."""
    if name == "series":
        return plain_half("sum", moe.second, plain_half("sum", moe, h))
    everyones = moe.network if name == "dense" else moe.shared
    matrices = (everyones.gate_proj[0], everyones.up_proj[0], everyones.down_proj[0])
    shared = reference.plain_swiglu(*matrices, rms_norm(h, moe.norm.weight))
    if name == "dense":
        return h + shared
    if name == "coe":
        h = h + shared + plain_outputs(moe, moe.router, h, 2).sum(dim=1)
        return h + plain_outputs(moe, moe.second.router, h, 2).sum(dim=1)
    out = plain_outputs(moe, moe.router, h, 4)
    one = torch.ones(len(h), 4)  # in place of weights, which `out` has already
    aggregate = moe.aggregate
    if name == "sum":
        return h + shared + out.sum(dim=1)
    if name == "mlp":
        nodes = [o + h / 4 for o in out.unbind(dim=1)]
        w_down = aggregate.layers["w_down"].weight
        z = [rms_norm(node, aggregate.norm.weight) @ w_down.T for node in nodes]
        x = torch.cat(z, dim=-1) @ aggregate.w_mix.weight.T
        return shared + sum(nodes) + F.gelu(x) @ aggregate.w_up.weight.T
    if name == "dag_self":  # four graphs of a node each
        for i in range(4):
            shared = shared + plain_dag(aggregate, "silu", h / 4, out[:, [i]], one)
        return shared
    if name == "dag_ungated":
        layers = [Namespace(w_edge=layer.w_node, **layer._modules) for layer in aggregate.layers]
        return shared + plain_dag(Namespace(layers=layers), "open", h, out, one)
    return shared + plain_dag(aggregate, "silu", h, out, one)


@pytest.mark.parametrize("name", ALL)
def test_feed_forward_halves_equal_plain_loops(name):
    """Router, norm and shared expert included, and every gradient (float64, 1e-10)."""
    config = tiny_config(aggregator=name, top_k=4, shared_dim=20)
    moe = randomize(FEED_FORWARD[name](config)).double()
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    ours = reference.results_and_gradients(lambda h: moe(h[None])[0][0], {"h": h}, moe)
    theirs = reference.results_and_gradients(lambda h: plain_half(name, moe, h), {"h": h}, moe)
    assert min(x.abs().max() for x in ours.values()) > 1e-3
    assert_same(ours, theirs, 1e-10)


@pytest.mark.parametrize("name", ALL)
def test_seeds_are_paired(name):
    """All begin with the weights that sum has, but for dense's MoE, and graphs with its logits."""
    model = GPT(tiny_config(aggregator=name, top_k=4))
    of_sum = GPT(tiny_config(aggregator="sum", top_k=4))
    for key, weight in of_sum.state_dict().items():
        if name != "dense" or ".moe." not in key:
            assert torch.equal(weight, model.state_dict()[key]), key
    if name in GRAPHS:
        tokens = torch.arange(12)[None]
        assert (model(tokens).logits - of_sum(tokens).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("changes", [{}, {"shared_dim": 12}, {"tie_embeddings": False}])
@pytest.mark.parametrize("name", ALL)
def test_cost_is_what_is_counted(name, changes):
    """Parameters are those that are there, multiply-adds those that torch counts."""
    model = GPT(tiny_config(aggregator=name, top_k=4, **changes))
    costs = cost.cost(model)
    assert costs["parameters"] == sum(weight.numel() for weight in model.parameters())
    stacked = [w.numel() for key, w in model.named_parameters() if ".experts." in key]
    assert costs["active"] == costs["parameters"] - sum(stacked) // 2  # 4 of 8 experts
    counted = cost.count_multiply_adds(model, torch.zeros(1, 16, dtype=torch.long))
    assert costs["multiply_adds"] == counted
    if name in GRAPHS:
        of_sum = cost.cost(GPT(tiny_config(aggregator="sum", top_k=4, **changes)))
        assert costs["aggregator"] == counted - of_sum["multiply_adds"]


@pytest.mark.parametrize("folder", [ABLATION, ABLATION.with_name("ablation_s")])
def test_arms_are_fair(folder):
    """shared has the weights of dag2's matrices, *_compute its multiply-adds."""
    costs = {}
    for path in folder.glob("*.toml"):
        settings = train.read_settings([str(folder / "base.toml"), str(path), "--n_layer=1"])
        config = train.make_config(ModelConfig, settings)
        costs[path.stem] = cost.cost(GPT(config))
    dag = costs["dag2_silu"]
    assert costs["shared"]["parameters"] == dag["parameters"] - 2 * config.n_embd  # norms
    for arm in costs.keys() & {"shared_compute", "sum_compute"}:
        assert costs[arm]["multiply_adds"] == dag["multiply_adds"]


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.toml")))
def test_readme_has_the_costs_of_every_config(path):
    """A row of README's table has a config's sizes, what it costs, and the graph's share of it."""
    settings = train.read_settings([str(path)])
    in_bytes = settings["dataset"] in ("stdlib", "shakespeare")
    vocab = {"vocab_size": 257 if in_bytes else 50257}
    config = train.make_config(ModelConfig, vocab | settings)
    with torch.device("meta"):
        costs = cost.cost(GPT(config))
    sizes = [config.n_layer, config.n_embd, config.top_k, config.n_expert]
    sizes += [config.dag_dim, config.dag_depth]
    counts = [f"{costs[key]:,}" for key in ("parameters", "active", "multiply_adds")]
    share = f"{costs['aggregator'] / costs['multiply_adds']:.0%}"
    row = " | ".join(map(str, [path.stem, *sizes, *counts, share]))
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert f"\n| {row} |\n" in readme


def test_costs_are_printed(corpus, call):
    """There is a row per aggregator."""
    out = call(cost, "step", "--repeats=1", *SMALL)[1]
    names = [line[:16].strip() for line in out.splitlines()[2:]]
    assert names == ["sum", "series", "mlp", "dense", "coe", "shared", "dag L=1", "dag L=2"]


def test_tables_have_the_published_figures(call, refused):
    """A row is what earlier versions printed; pairs without end and runs given twice are named."""
    row = "1.2406  -0.0024 (-0.0178 to +0.0129)     1.4003     3,623  0.57"
    assert row in call(compare, "table", TEXT, "--csv=b.csv")[1]
    assert Path("b.csv").read_bytes() == TEXT.read_bytes()
    assert call(compare, "plot", "b.csv", "c.png")[0] == 0
    refused("dag1_sigmoid-1 is there twice", compare, "table", TEXT, "b.csv")
    more = TEXT.with_name("text_seeds.csv")
    assert "+0.0018 (-0.0067 to +0.0103)" in call(compare, "table", TEXT, more)[1]
    rows = compare.evaluations_in(TEXT)
    compare.write_csv(Path("a.csv"), {"": rows[:-1]})
    assert "Left out: shared-5, at 2,048,000 tokens;" in call(compare, "table", "a.csv")[1]


@pytest.mark.parametrize("column", compare.COLUMNS_THAT_MUST_AGREE + compare.COLUMNS_OF_AN_ARM)
def test_runs_that_differ_are_not_compared(column, refused):
    """The column that differs is named."""
    rows = compare.evaluations_in(TEXT)
    rows[0] = rows[0]._replace(**{column: "7"})
    compare.write_csv(Path("a.csv"), {"": rows})
    refused(f" differ in {column} (", compare, "table", "a.csv")


def test_a_sweep_goes_on_where_it_was_stopped(corpus, call, monkeypatch):
    """After SIGTERM it finishes, names what fails, and skips what is done."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    settings = [*SMALL, "--max_steps=400", "--eval_interval=200", "--top_k=3"]  # odd, so coe fails
    sweep = ["sweep", str(ABLATION), "--seeds=1", "--jobs=2", *settings, "--arms", "mlp"]
    command = [sys.executable, "-m", "lab.compare", *sweep]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not Path("out/ablation/mlp-1/ckpt.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "stopped; the same command goes on" in process.communicate(timeout=60)[0]
    error = call(compare, *sweep, "coe")[2]
    assert "error: 1 of 2 runs failed: out/ablation/coe-1; see" in error
    assert "1 runs, 1 of them finished already" in call(compare, *sweep)[1]


def make_model(**changes) -> GPT:
    """Make a model of bytes with weights so large that every term matters."""
    return randomize(GPT(tiny_config(vocab_size=257, block_size=32, **changes)))


def save(model: GPT) -> None:
    """Write the model to model.pt, as far as lab/ reads it."""
    contents = {"version": train.VERSION, "data": {"encoding": "bytes"}}
    contents |= {"model": model.state_dict(), "model_config": vars(model.config)}
    torch.save(contents, "model.pt")


def make_page(call, model: GPT, prompt: str, new: int = 0) -> dict:
    """Write page.html for a prompt and `new` more tokens, and return the numbers in it."""
    save(model)
    options = ["--prompt", prompt, f"--max_new_tokens={new}"]
    assert call(graph, "page", "model.pt", *options, "page.html")[0] == 0
    text = Path("page.html").read_text()
    return json.loads(re.search(r"^const data = (\{[^<\n]*\});$", text, re.MULTILINE)[1])


@torch.no_grad()
def plain_graphs(model: GPT, tokens: torch.Tensor) -> list[tuple]:
    """Compute without hooks what each layer does with tokens (B, T), which are S = B·T in a row."""
    rope = rope_table(torch.arange(tokens.shape[1]), 8, 10000.0)  # 8 channels a head
    h = model.embed(tokens)
    layers = []
    for block in model.blocks:
        h = h + block.attention(block.norm(h), rope)
        flat_h = h.flatten(0, 1)
        x = block.moe.norm(flat_h)
        weight, expert, _ = block.moe.router(x)
        terms = weight[..., None] * block.moe.experts(x, expert)
        nodes = [terms + flat_h[:, None] / model.config.top_k]
        depths = []
        for layer in block.moe.aggregate.layers:
            e, m = layer.edges(nodes[-1])
            gate = e.abs().mean(dim=-1)
            size = m.square().sum(dim=-1).sqrt()
            depths.append((gate, size / size.sum(dim=2, keepdim=True)))
            nodes.append(layer(nodes[-1]))
        added = nodes[-1].sum(dim=1) - flat_h
        beyond = (added - terms.sum(dim=1)).norm(dim=-1) / added.norm(dim=-1)
        layers.append((expert, weight, beyond, depths, nodes, size))
        h = h + added.view_as(h)
    return layers


@pytest.mark.parametrize(("top_k", "depth"), [(1, 1), (2, 3), (4, 2)])
def test_page_numbers_equal_a_plain_loop(call, top_k, depth):
    """They are those of the END of a long text, to three decimals."""
    model = make_model(top_k=top_k, dag_depth=depth, dag_gate="silu")
    text = "The quick brown fox jumps over the lazy dog."
    data = make_page(call, model, text)
    assert data["tokens"] == list(text[-32:])
    layers = plain_graphs(model, torch.tensor([list(text[-32:].encode())]))
    for shown, (*expected, depths, _, _) in zip(data["layers"], layers, strict=True):
        numbers = [shown["expert"], shown["weight"], shown["beyond"]]
        for edges, gate_and_share in zip(shown["depths"], depths, strict=True):
            numbers += [edges["gate"], edges["share"]]
            expected += gate_and_share
        for ours, theirs in zip(numbers, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=6e-4)


def test_statistics_equal_plain_means(corpus, call, monkeypatch):
    """They are the means over all windows, computed at once and without hooks, and are printed."""
    monkeypatch.setattr(graph, "MIN_TOKENS", 1)
    monkeypatch.setattr(graph, "BATCH", 7 * 32)  # the last batch is smaller
    model = make_model(dag_gate="silu")
    _, _, tokens = open_dataset("tiny")
    row = graph.graph_statistics(model, tokens, 1280)[1][1]
    save(model)
    out = call(graph, "stats", "model.pt", "--dataset=tiny", "--tokens=1280")[1]
    assert f"{row.gate:.3f} ± {row.spread:.3f}" in out
    receiver_and_sender = torch.tensor([[5.0, 2.0], [1.0, 0.0]])
    assert graph.strongest_pairs(receiver_and_sender) == ["E1→E0 1.0", "E0→E1 0.5"]
    offsets = np.linspace(0, len(tokens) - 33, 40).astype(int)
    windows = train.read_windows(tokens, offsets, model.config, torch.device("cpu"))
    expert, _, beyond, depths, nodes, size = plain_graphs(model, windows[:, :-1])[1]
    gate, share = depths[1]
    _, before, after = nodes
    itself = torch.eye(3, dtype=torch.bool)
    cosine = torch.cosine_similarity(before[:, :, None], before[:, None], dim=-1)
    expected = {"gate": gate, "beyond": beyond}
    expected["self_gate"] = gate[:, itself]
    expected["other_gate"] = gate[:, ~itself]
    expected["self_share"] = share[:, itself]
    expected["alike"] = cosine[:, ~itself]
    expected["incoming"] = 1 / share.square().sum(dim=-1)
    expected["update"] = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert row.spread == pytest.approx(gate.std(correction=0).item(), rel=1e-3)
    pair = (expert[:, :, None] == 2) & (expert[:, None] == 4)
    assert row.strength[2, 4].item() == pytest.approx(size[pair].mean().item(), rel=1e-4)
    for name, values in expected.items():
        assert getattr(row, name) == pytest.approx(values.mean().item(), rel=1e-4), name


@pytest.fixture
def browser():
    """A headless Chromium; browser.find(selector) lists elements."""
    if not shutil.which("chromium"):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as browser:
        browser.find = lambda selector: browser.find_elements("css selector", selector)
        yield browser


def test_page_in_a_browser(call, browser):
    """Clicks and keys choose what is shown, and there are no errors."""
    model = make_model(dag_gate="silu", n_expert=5)
    data = make_page(call, model, "ï </script><script>", new=2)
    depths = [[depth["gate"] for depth in layer["depths"]] for layer in data["layers"]]
    gates = np.array(depths)  # (layers, depths, tokens, K, K)
    browser.get(Path("page.html").absolute().as_uri())
    browser.find("#layers button:last-child")[0].click()
    browser.find("#strip button:nth-child(8)")[0].click()
    titles = browser.find("#title")[0].text.split('"')[0]
    for key in "\ue012\ue010\ue014\ue013\ue011\ue015":  # left, end, right, up, home, down
        browser.switch_to.active_element.send_keys(key)
        titles += browser.find("#title")[0].text.split('"')[0]
    places = re.sub(r"\D+", " ", titles)  # layer and token each time
    assert places == " 2 8 2 7 2 22 2 22 1 22 1 1 2 1 "
    cells = [float(cell.text.split()[0]) for cell in browser.find("#tables td")]
    assert cells == gates[1, :, 0].ravel().tolist()
    edges = browser.find("#graph line.edge")
    opacity = [float(edge.get_attribute("stroke-opacity")) for edge in edges]
    assert opacity == pytest.approx([max(0.02, cell / gates.max()) for cell in cells])
    assert browser.get_log("browser") == []
