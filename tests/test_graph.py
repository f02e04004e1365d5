"""lab/graph.py: pages and statistics show what the model computes."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from lab import graph
from model import GPT, rope_table
from tests.helpers import assert_refused, tiny_model


def make_model(encoding: str = "bytes", **changes) -> GPT:
    """Make a model whose weights are so large that every part matters, and save it in model.pt."""
    model = tiny_model(vocab_size=257, block_size=32, **changes)
    rest = {"version": train.VERSION, "data": {"encoding": encoding}}
    torch.save(rest | {"model": model.state_dict(), "model_config": vars(model.config)}, "model.pt")
    return model


def make_page(prompt: str, n_new: int = 0) -> dict:
    """Write page.html for a prompt and n_new more tokens, and return the data in it."""
    graph.main(["page", "model.pt", "page.html", "--prompt", prompt, f"--max_new_tokens={n_new}"])
    data = Path("page.html").read_text().split("const data = ")[1].split(";\n")[0]
    assert "<" not in data  # so that no token can end the script
    return json.loads(data)


@pytest.mark.parametrize(("top_k", "kind"), [(1, "dag"), (2, "dag_self"), (4, "dag")])
@torch.no_grad()
def test_the_numbers_of_a_page_equal_a_plain_loop(top_k, kind):
    """They are those of the last block_size tokens of a text, to three decimals."""
    model = make_model(top_k=top_k, dag_depth=3, aggregator=kind)
    text = "The quick brown fox jumps over the lazy <b>dog</b>."
    assert make_page("")["tokens"] == ["<|endoftext|>"]
    data = make_page(text)
    assert (data["tokens"], data["prompt"]) == (list(text[-32:]), 32)
    assert_close = partial(np.testing.assert_allclose, rtol=0, atol=6e-4)
    rope = rope_table(torch.arange(32), 8, 10000.0)  # 8 channels a head
    h = model.embed(torch.tensor([list(text[-32:].encode())]))
    for block, shown in zip(model.blocks, data["layers"], strict=True):
        moe = block.moe
        h = h + block.attention(block.norm(h), rope, None)
        x = moe.norm(h[0])
        weight, expert, _, _ = moe.router(x)
        assert shown["expert"] == expert.tolist()
        assert_close(shown["weight"], weight)
        terms = weight[..., None] * moe.experts(x, expert)
        nodes = terms + h[0, :, None] / top_k
        for layer, edges in zip(moe.aggregate.layers, shown["depths"], strict=True):
            e, m = layer.edges(nodes)
            assert kind == "dag" or not e[:, 0, 1].any()  # a node of dag_self hears only itself
            size = m.square().sum(dim=-1).sqrt()
            assert_close(edges["gate"], e.abs().mean(dim=-1))
            assert_close(edges["share"], size / size.sum(dim=2, keepdim=True))
            nodes = layer(nodes)
        added = nodes.sum(dim=1) - h[0]
        beyond = (added - terms.sum(dim=1)).norm(dim=-1) / added.norm(dim=-1)
        assert_close(shown["beyond"], beyond)
        h = h + added


def test_a_prompt_is_continued(monkeypatch):
    """The seed decides the text, which ends with an <|endoftext|> that is not in the prompt."""
    make_model()
    assert make_page("a", n_new=5) == make_page("a", n_new=5)
    monkeypatch.setattr(GPT, "generate", lambda *_: torch.tensor([[65], [256], [66]]))
    assert make_page("a<|endoftext|>", n_new=3)["tokens"] == ["a", "<|endoftext|>", "A"]


def test_statistics_are_means_over_all_windows(corpus, monkeypatch, capsys):
    """They equal those of all windows observed at once, and are printed."""
    monkeypatch.setattr(graph, "BATCH", 7 * 32)  # the last batch is smaller
    model = make_model()
    tokens = np.fromfile("data/tiny/val.bin", "uint16")
    table = graph.compute_statistics(model, tokens, 40 * 32)
    starts = np.linspace(0, len(tokens) - 33, 40).astype(int)
    windows = train.read_windows(tokens, starts, 32, torch.device("cpu"))
    first, depth = graph.observe(model, windows[:, :-1])[1]
    assert torch.equal(first.after, depth.before)
    assert not model.blocks[1].moe.router._forward_hooks
    cosine = torch.cosine_similarity(depth.before[:, :, None], depth.before[:, None], dim=-1)
    cosine = cosine[:, ~torch.eye(3, dtype=torch.bool)]
    means = [depth.gate.mean(), depth.gate.std(), cosine.mean(), depth.beyond.mean()]
    assert table[1, 1].tolist() == pytest.approx(torch.stack(means).tolist(), rel=1e-4)
    graph.main(["stats", "model.pt", "--dataset=tiny", "--tokens=1280"])
    last_row = "2 2 {:.3f} ± {:.3f} {:.2f} {:.3f}".format(*means)
    assert capsys.readouterr().out.splitlines()[-1].split() == last_row.split()


def test_refusals(corpus):
    """What cannot be shown is refused in one line."""
    make_model(aggregator="sum")
    assert_refused(graph.main, ["page", "model.pt", "x.html"], "model.pt has no graph")
    assert_refused(graph.main, ["page", "model.pt", "model.pt"], "must be a .html file")
    assert_refused(graph.main, ["page", "model.pt", "no/x.html"], "a folder that exists")
    make_model(encoding="gpt2")
    assert_refused(graph.main, ["stats", "model.pt", "--dataset=tiny"], "the model cannot read")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium-driver")
def test_a_page_in_a_browser():
    """Clicks and keys choose what is shown, and there are no errors."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    make_model(n_expert=5)
    data = make_page("ï </script><script>", n_new=2)
    depths = [[depth["gate"] for depth in layer["depths"]] for layer in data["layers"]]
    gates = np.array(depths)  # (layers, depths, tokens, K, K)
    with webdriver.Chrome(options, service) as browser:
        find = partial(browser.find_elements, "css selector")
        browser.get(Path("page.html").absolute().as_uri())
        assert len(find("#strip .prompt")) == 20
        find("#layers button:last-child")[0].click()
        find("#strip button:nth-child(8)")[0].click()
        titles = find("#title")[0].text.split('"')[0]  # Layer 2, token 8
        for key in "\ue012\ue010\ue014\ue013\ue011\ue015":  # left, end, right, up, home, down
            browser.switch_to.active_element.send_keys(key)
            titles += find("#title")[0].text.split('"')[0]
        assert re.sub(r"\D+", " ", titles) == " 2 8 2 7 2 22 2 22 1 22 1 1 2 1 "
        cells = [float(cell.text.split()[0]) for cell in find("#tables td")]
        assert cells == gates[1, :, 0].ravel().tolist()
        opacity = [float(edge.get_attribute("stroke-opacity")) for edge in find("line.edge")]
        assert opacity == pytest.approx([max(0.02, cell / gates.max()) for cell in cells])
        assert browser.get_log("browser") == []
