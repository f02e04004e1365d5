"""sample.py's graphs: what is recorded, the page in a real browser, the tables, and the statistics."""

import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import sample
from model import GPT, ModelConfig
from tests.reference import randomize

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def save(trained):
    """save(model) writes the checkpoint model.pt of a byte model."""
    checkpoint = torch.load(io.BytesIO(trained), weights_only=True)

    def save(model: GPT) -> Path:
        torch.save(checkpoint | {"model": model.state_dict(), "model_config": vars(model.config)}, "model.pt")
        return Path("model.pt")

    return save


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    tiny = dict(
        block_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_expert=6, top_k=3, expert_dim=8, dag_dim=4
    )
    return randomize(GPT(ModelConfig(**tiny | changes)))


def one_open_edge() -> GPT:
    """Every token has experts 0 and 1, and of the four edges only the one from expert 1 to expert 0 is open.

    The residual stream is always 4 along channel 2; expert 0 writes +, expert 1 - into channel 0. W_down reads these
    channels, z_0 = (a, c) and z_1 = (-b, d), and W_edge makes of them a gate that is open for z_0 receiving from z_1.
    """
    model = make_model(n_layer=1, n_expert=4, top_k=2, dag_depth=1, dag_dim=2, norm_topk=False)
    block = model.blocks[0]
    moe, layer = block.moe, block.moe.aggregate.layers[0]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0 if p.dim() == 1 else 0.0)
        model.embed.weight[:, 2] = 4.0  # so RMSNorm(h) = h for 16 channels
        moe.router.weight[:, 2] = torch.tensor([1.1, 1.0, -9.0, -9.0])
        for expert, sign in ((0, 1.0), (1, -1.0)):
            moe.experts.gate_proj[expert, 0, 2] = moe.experts.up_proj[expert, 0, 2] = 1.0
            moe.experts.down_proj[expert, 0, 0] = sign
        layer.w_down.weight[0, 0] = layer.w_down.weight[1, 2] = 1.0
        layer.w_node.weight[:] = 1.0
        layer.w_up.weight[:] = 0.1
        records = []
        model(torch.zeros(1, 3, dtype=torch.long), records=records)
        node = torch.zeros(2, 16)
        node[:, 2] = 4.0 / 2
        node[:, 0] = records[0].gate[0] * torch.tensor([1.0, -1.0]) * 16 / (1 + math.exp(-4.0))  # silu(4) · 4
        (a, c), (b, d) = (node / node.square().mean(dim=1, keepdim=True).sqrt())[:, [0, 2]].tolist()
        # W₁ z_0 = 10, W₁ z_1 = -30, W₂ z_0 = -30, W₂ z_1 = 10: the edge to 0 from 1 gets 20, the others at most -20
        z = torch.tensor([[a, c], [b, d]])
        layer.w_edge.weight[:, :2] = torch.linalg.solve(z, torch.tensor([10.0, -30.0]))
        layer.w_edge.weight[:, 2:] = torch.linalg.solve(z, torch.tensor([-30.0, 10.0]))
    return model


def open_page(path: Path):
    """A headless Chromium that shows the page. Skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--window-size=1100,1200",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(path.absolute().as_uri())
    return driver


def requests_of(driver) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def edges_of(driver) -> dict[str, tuple[float, float]]:
    """Opacity and width of each edge that is drawn, by its tooltip's 'E1 → E0'."""
    lines = driver.find_elements("css selector", "#graph line.edge")
    titles = [line.find_element("css selector", "title").get_attribute("textContent") for line in lines]
    numbers = [[float(line.get_attribute(f"stroke-{what}")) for what in ("opacity", "width")] for line in lines]
    return {title.split(":")[0]: tuple(pair) for title, pair in zip(titles, numbers, strict=True)}


def test_page_in_a_browser(save, call):
    """A page made from a checkpoint opens without errors or requests; clicking and arrow keys change the graph."""
    prompt = 'naïve </script><script>document.title="broken"</script>'
    status, out, error = call(sample, save(make_model()), "--prompt", prompt, "--max-new-tokens=5", "--dag=page.html")
    assert status == 0 and out.startswith(prompt) and "wrote page.html" in error, error
    driver = open_page(Path("page.html"))
    try:
        tokens = driver.find_elements("css selector", "#strip button")
        assert len(tokens) == len(prompt.encode()) + 5
        assert len(driver.find_elements("css selector", "#strip button.prompt")) == len(prompt.encode())
        assert len(driver.find_elements("css selector", "#graph line.edge")) == 2 * 3 * 3

        def state() -> tuple[str, str]:
            ids = "graph", "tables"
            return tuple(driver.find_element("id", i).get_attribute("innerHTML") for i in ids)

        seen = [state()]
        tokens[7].click()
        seen.append(state())
        assert "Layer 1, token 7" in driver.find_element("id", "title").text
        for key, title in (
            ("\ue014", "Layer 1, token 8"),
            ("\ue015", "Layer 2, token 8"),
            ("\ue012", "Layer 2, token 7"),
        ):
            driver.find_element("tag name", "body").send_keys(key)
            seen.append(state())
            assert title in driver.find_element("id", "title").text
        driver.find_elements("css selector", "#layers button")[0].click()
        assert state() == seen[1] and len(set(seen)) == 5, "every choice has its own graph"
        assert "broken" not in driver.title
        assert driver.get_log("browser") == [] and requests_of(driver) == [Path("page.html").absolute().as_uri()]
    finally:
        driver.quit()


def test_hand_made_graph_shows_exactly_its_open_edge(save, call):
    """One gate forced open, three shut: the numbers, the terminal's table and the page show just that edge."""
    model = one_open_edge()
    graph = sample.describe_graph(model, sample.Text(prepare.get_encoding("bytes"), "ab"))
    layer = graph["layers"][0]
    for s in range(2):
        assert layer["expert"][s] == [0, 1]
        assert layer["depths"][0]["gate"][s] == [0.0, 1.0, 0.0, 0.0], "[to 0 from 0, to 0 from 1, to 1 from 0, ...]"
        assert layer["depths"][0]["share"][s][:2] == [0.0, 1.0]
    arguments = (save(model), "--prompt=ab", "--max-new-tokens=0", "--dag=page.html", "--dag-text=1")
    status, out, error = call(sample, *arguments)
    assert status == 0, error
    table = [line.split() for line in out.splitlines() if line.strip().startswith("to E")]
    assert [row[:2] + row[2::2] for row in table] == [["to", "E0", "0.000", "1.000"], ["to", "E1", "0.000", "0.000"]]
    driver = open_page(Path("page.html"))
    try:
        edges = edges_of(driver)
        assert edges.pop("E1 → E0") == (1.0, 15.5)
        assert sorted(edges) == ["E0 → E0", "E0 → E1", "E1 → E1"]
        assert max(opacity for opacity, _ in edges.values()) <= 0.02
    finally:
        driver.quit()


@pytest.mark.parametrize(("top_k", "depth", "gate"), [(1, 1, "sigmoid"), (4, 3, "silu")])
def test_any_k_and_depth(save, call, top_k, depth, gate):
    """The page's numbers are those of the model's records, for one expert and for several, and for both gates."""
    model = make_model(top_k=top_k, dag_depth=depth, dag_gate=gate)
    status, out, error = call(sample, save(model), "--prompt=Hello", "--max-new-tokens=0", "--dag=g.html", "--dag-text")
    assert status == 0 and "token 4 of 5, 'o'" in out, error
    page = Path("g.html").read_text()
    graph = json.loads(re.search(r"const data = (\{.*\});", page)[1])
    assert graph["tokens"] == list("Hello") and graph["prompt"] == 5
    records = []
    with torch.no_grad():
        model(torch.tensor([list(b"Hello")]), records=records)
    for layer, record in zip(graph["layers"], records, strict=True):
        assert layer["expert"] == record.expert.tolist() and len(layer["depths"]) == depth
        assert np.abs(np.array(layer["weight"]) - record.gate.numpy()).max() <= 6e-4
        for edges, expected in zip(layer["depths"], record.depths, strict=True):
            gates = np.array(edges["gate"]).reshape(5, top_k, top_k)
            share = np.array(edges["share"]).reshape(5, top_k, top_k)
            message = expected.message.numpy()
            assert np.abs(gates - expected.edge_gate.numpy()).max() <= 6e-4
            assert np.abs(share - message / message.sum(axis=2, keepdims=True)).max() <= 6e-4


@pytest.mark.slow
def test_large_page_is_small_and_quick(save, call):
    """200 tokens, 8 layers, 8 experts a token: less than 5 MB, and another token is drawn within a frame or two."""
    model = make_model(block_size=256, n_layer=8, n_expert=16, top_k=8)
    prompt = "x = 1\n" * 33 + "ab"
    status, _, error = call(sample, save(model), "--prompt", prompt, "--max-new-tokens=0", "--dag=page.html")
    assert status == 0, error
    assert Path("page.html").stat().st_size < 5_000_000
    driver = open_page(Path("page.html"))
    try:
        assert len(driver.find_elements("css selector", "#strip button")) == 200
        script = "const t = performance.now(); for (let i = 0; i < 20; i++) { token = i; draw(); } "
        assert driver.execute_script(script + "return (performance.now() - t) / 20") < 100
        timing = "const [n] = performance.getEntriesByType('navigation'); return n.loadEventEnd - n.startTime"
        assert driver.execute_script(timing) < 3000
    finally:
        driver.quit()


def test_statistics_equal_a_plain_loop(workdir, call, save):
    """The table's numbers, token by token and edge by edge; and a picture, or how to get one."""
    make_text = [f"def f{i}():\n    return {i} * {i}\n" * 20 for i in range(30)]
    Path("text").mkdir()
    for i, text in enumerate(make_text):
        Path("text", f"{i}.txt").write_text(text)
    prepare.prepare(["text"], name="code", encoding="bytes")
    model = make_model()
    tokens = prepare.open_dataset("code").val
    statistics = sample.graph_statistics(model, tokens)
    offsets = prepare.spaced_offsets(tokens, 64, sample.STATISTICS_TOKENS)
    gates, self_gates, incoming, updates, beyond, pairs, cosines = ([] for _ in range(7))
    for offset in offsets:
        records = []
        with torch.no_grad():
            model(torch.from_numpy(tokens[offset : offset + 64].astype(np.int64))[None], records=records)
        layer, depth = records[1], records[1].depths[1]
        for s in range(64):
            for i in range(3):
                share = depth.message[s, i] / depth.message[s, i].sum()
                incoming.append(1 / share.square().sum().item())
                updates.append((depth.update[s, i] / depth.node[s, i]).item())
                for j in range(3):
                    gates.append(depth.edge_gate[s, i, j].item())
                    if i != j:
                        cosines.append(depth.cosine[s, i, j].item())
                    if i == j:
                        self_gates.append(gates[-1])
                    if layer.expert[s, i] == 2 and layer.expert[s, j] == 4:
                        pairs.append(depth.message[s, i, j].item())
            beyond.append((layer.beyond_sum[s] / layer.update[s]).item())
    row = statistics[1][1]
    assert row.gate == pytest.approx(np.mean(gates), rel=1e-4) and row.spread == pytest.approx(np.std(gates), rel=1e-2)
    assert row.self_gate == pytest.approx(np.mean(self_gates), rel=1e-4)
    assert row.cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    assert row.incoming == pytest.approx(np.mean(incoming), rel=1e-4)
    assert row.update == pytest.approx(np.mean(updates), rel=1e-4)
    assert row.beyond == pytest.approx(np.mean(beyond), rel=1e-4)
    expected = (
        pytest.approx(np.mean(pairs), rel=1e-4) if len(pairs) >= sample.PAIRS else pytest.approx(math.nan, nan_ok=True)
    )
    assert len(pairs) > 0 and row.strength[2, 4].item() == expected

    status, out, error = call(sample, save(model), "--dag-stats=code")
    assert status == 0, error
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["layer", "depth"] and len(lines) == 7
    assert lines[4].split()[:5] == ["2", "2", f"{row.gate:.3f}", "±", f"{row.spread:.3f}"]
    assert Path("dag-code.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_without_matplotlib(workdir, capsys, monkeypatch):
    """One line names the command that installs it."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    sample.draw_statistics(Path("x.png"), [])
    assert capsys.readouterr().err == "no picture: pip install matplotlib\n" and not Path("x.png").exists()


def test_what_has_no_graph_and_what_can_not_be_shown(save, refused):
    """Another aggregator, several texts, a token that is not there, a dataset in another encoding."""
    path = save(make_model(aggregator="sum"))
    refused("combines its experts by 'sum': there is no graph to show", sample, path, "--prompt=a", "--dag=g.html")
    refused("there is no graph to show", sample, path, "--dag-stats=code")
    path = save(make_model())
    refused("show one text: give one --prompt", sample, path, "--prompt=a", "--prompt=b", "--dag=g.html")
    refused("show one text", sample, path, "--prompt=a", "--num-samples=2", "--dag-text")
    refused(
        "must lie between -3 and 2: there are 3", sample, path, "--prompt=abc", "--max-new-tokens=0", "--dag-text=3"
    )
    refused("dataset 'code' is not prepared", sample, path, "--dag-stats=code")
    for name in ("nowhere/g.html", ".", ""):
        message = "--dag must name a file in a folder that exists, got"
        refused(message, sample, path, "--prompt=abc", "--max-new-tokens=0", f"--dag={name}")
    for more in ("--prompt=a", "--num-samples=2", "--stop=x", "--temperature=0.8"):
        refused("--dag-stats reads a dataset: it goes with --device only", sample, path, more, "--dag-stats=code")
    refused("'' can't be the name of a dataset", sample, path, "--dag-stats=")
    assert not Path("g.html").exists()
