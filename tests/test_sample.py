"""sample.py and lab/graph.py: the text, the page of the learned graph in a real browser, the statistics, bad input."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
import sample
from lab import graph, tree_page, trees
from model import GATES, GPT, ModelConfig, rope_table
from tests.reference import randomize
from train import spaced_offsets


@pytest.fixture
def save(trained):
    """save() writes the checkpoint of a tiny trained run to model.pt, with another model or other contents."""
    checkpoint = torch.load(io.BytesIO(trained), weights_only=True)

    def save(other: GPT | None = None, **changes) -> Path:
        of_model = {"model": other.state_dict(), "model_config": vars(other.config)} if other else {}
        torch.save(checkpoint | of_model | changes, "model.pt")
        return Path("model.pt")

    return save


def make_model(**changes) -> GPT:
    """A small byte model whose weights are large enough for every term to matter."""
    tiny = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "n_expert": 6, "top_k": 3}
    return randomize(GPT(ModelConfig(**tiny | {"expert_dim": 8, "dag_dim": 4} | changes)))


@torch.no_grad()
def plain_graphs(model: GPT, ids: list[int]) -> list[tuple]:
    """What each layer does with a text, without hooks: expert, weight, beyond, and (e, m, before, after) per depth."""
    layers, c = [], model.config
    rope = rope_table(torch.arange(len(ids)), c.n_embd // c.n_head, c.rope_theta)
    h = model.embed(torch.tensor([ids]))
    for block in model.blocks:
        h = h + block.attention(block.norm(h), rope)
        x, depths = block.moe.norm(h)[0], []
        weight, expert, _ = block.moe.router(x)
        terms = weight[..., None] * block.moe.experts(x, expert)
        nodes = terms + h[0, :, None] / c.top_k
        for layer in block.moe.aggregate.layers:
            depths.append((*layer.edges(nodes), nodes, nodes := layer(nodes)))
        change = nodes.sum(dim=1) - h[0]
        beyond = (change - terms.sum(dim=1)).norm(dim=-1) / change.norm(dim=-1)
        layers.append((expert, weight, beyond, depths))
        h = h + change
    return layers


def test_sampling_needs_only_the_checkpoint(save, call):
    """Text after the prompt; one seed one text; greedy = top_k 1; prompts give what each gives alone; its speed."""
    arguments = (sample, save().rename("best.pt"), "--max_new_tokens=40", "--prompt=Line 7")
    _, first, error = call(*arguments)
    assert first.startswith("Line 7") and len(first) > 20
    assert re.fullmatch(r"40 tokens in [\d.]+ s, [\d,]+ tokens/s, from best.pt \(step \d\)\n", error), error
    assert call(sample, ".", *arguments[2:])[1] == first == call(*arguments)[1] != call(*arguments, "--seed=2")[1]
    greedy = call(*arguments, "--temperature=0", "--seed=2")[1]
    choices = "--top_k=1", "--top_p=1e-9", "--temperature=1e-45"
    assert {call(*arguments, choice)[1] for choice in choices} == {greedy} != {first}
    assert make_page(call, arguments[1], "")["tokens"] == ["<|endoftext|>"], "a new document"
    _, one, two = call(*arguments, "--num_samples=2")[1].split("--- sample ")
    assert one.startswith("1 of 2 ---\nLine 7") and two.startswith("2 of 2 ---\nLine 7") and one[1:] != two[1:]
    second = call(*arguments[:3], "--prompt=é")[1]
    assert call(*arguments, "--prompt=é")[1] == f"--- prompt 1 of 2 ---\n{first}--- prompt 2 of 2 ---\n{second}"


def test_text_streams_in_whole_characters_to_its_end(capsys):
    """Characters come out whole, controls escaped; <|endoftext|> ends a text, each of several, and at last all."""
    encoding, text, printed = prepare.get_encoding("bytes"), "é😀\x1b\t".encode(), []

    def steps(*rows):
        for ids in zip(*rows, strict=True):
            yield torch.tensor(ids)
            printed.append(Path("stdout").read_text().removeprefix("".join(printed)))  # what has been flushed

    with Path("stdout").open("w") as file, redirect_stdout(file):
        assert sample.print_samples(encoding, "\a", steps([*text, 256, 65]), 1, 9) == [list(text)]
    assert printed == ["\\x07", "é", "", "", "", "😀", "\\x1b", "\t"]
    assert sample.print_samples(encoding, "", steps("日".encode()[:2]), 1, 9) and capsys.readouterr().out == "\ufffd\n"
    rows = [*b"1\x1b", 256, *b"456"], [*b"abcd", 256, 101], [256, *b"!!!!!"]
    assert sample.print_samples(encoding, ">", steps(*rows), 3, 9) == [[*b"1\x1b"], [*b"abcd"], []]
    texts = [f"--- sample {i + 1} of 3 ---\n>{text}\n" for i, text in enumerate(("1\\x1b", "abcd", ""))]
    assert capsys.readouterr().out == "".join(texts) and len(printed) == 8 + 2 + 4


def test_prompts_are_read_as_streams(save, call, refused, monkeypatch):
    """Standard input and a file: the same text from the same bytes. What is empty or not UTF-8 is refused."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        Path("file").write_bytes(data)

    fixed = (sample, save(), "--max_new_tokens=9")
    give("Line 8é\r\n".encode())
    expected = call(*fixed, "--prompt=Line 8é\r\n")[1]
    assert call(*fixed, "--prompt=-")[1] == call(*fixed, "--prompt_file=file")[1] == expected
    refused("standard input is empty, or was read already", *fixed, "--prompt=-")
    give(b"12345\xe9")
    why = "is not UTF-8 text: convert it with iconv ('utf-8' codec can't decode byte 0xe9 in position 5"
    refused(f"standard input {why}", *fixed, "--prompt=-")
    refused(f"file {why}", *fixed, "--prompt_file=file")
    monkeypatch.setattr(sys, "stdin", None)  # <&-
    refused("standard input is empty", *fixed, "--prompt=-")


def make_page(call, path: Path, prompt: str, new: int = 0) -> dict:
    """Write page.html for a prompt and `new` more tokens; returns the numbers in it."""
    status, _, error = call(sample, path, "--prompt", prompt, f"--max_new_tokens={new}", "--dag=page.html")
    assert status == 0 and "wrote page.html" in error
    return page_data()


def page_data() -> dict:
    """The numbers in page.html."""
    return json.loads(re.search(r"^const data = (\{[^<\n]*\});$", Path("page.html").read_text(), re.MULTILINE)[1])


def test_readers_that_go_away(save):
    """| head ends quietly, of a <(…) prompt; >&- ends nothing; no id beyond the encoding's, which can't be decoded."""
    script = f"{sys.executable} {sample.__file__} {save(make_model(vocab_size=2048))} --temperature=9"
    head = f"{script} --prompt_file <(printf 'Line 8é\n') --num_samples=99 --max_new_tokens=60 | head -n 2"
    closed = f"{script} --prompt - --dag page.html <<< hello >&-; echo $?"
    both = subprocess.run(["bash", "-c", f"{head}; {closed}"], capture_output=True, text=True)
    assert both.stdout == "--- sample 1 of 99 ---\nLine 8é\n0\n" and "Traceback" not in both.stderr, both.stderr
    assert both.stderr.splitlines()[-1].startswith("wrote page.html") and Path("page.html").exists()


@pytest.mark.parametrize(("top_k", "depth", "gate"), [(k, d, g) for k in (1, 2, 3, 4) for d in (1, 3) for g in GATES])
def test_page_numbers_are_the_models(save, call, top_k, depth, gate):
    """Experts, weights, gates, shares and what the sum lacks, to three decimals, of the END of a long text."""
    model = make_model(top_k=top_k, dag_depth=depth, dag_gate=gate)
    text = "".join(chr(32 + 3 * i % 90) for i in range(40))
    data = make_page(call, save(model), text)
    assert data["tokens"] == list(text[-32:]) and data["prompt"] == 32 and data["gate"] == gate
    for layer, (*expected, depths) in zip(data["layers"], plain_graphs(model, list(text[-32:].encode())), strict=True):
        numbers = [layer["expert"], layer["weight"], layer["beyond"]]
        for edges, (e, m, _, _) in zip(layer["depths"], depths, strict=True):
            numbers += [edges["gate"], edges["share"]]
            size = m.square().sum(dim=-1).sqrt()
            expected += [e.abs().mean(dim=-1), size / size.sum(dim=2, keepdim=True)]
        for ours, theirs in zip(numbers, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=6e-4)


def test_hooks_change_nothing_and_are_gone_afterwards():
    """The same logits, bit for bit, before, during and after; no module keeps a hook, not even after an error."""
    model, tokens, logits = make_model(), torch.arange(20)[None], []
    model.register_forward_hook(lambda module, arguments, output: logits.append(output.logits))
    model(tokens), sample.observe(model, tokens), model(tokens)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    with pytest.raises(ValueError, match="do not fit block_size"):
        sample.observe(model, torch.zeros(1, 33, dtype=torch.long))
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1, "the one above"


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium. browser.find(selector) lists the elements."""
    if not shutil.which("chromium"):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.find = lambda selector: browser.find_elements("css selector", selector)
        yield browser


@pytest.mark.parametrize("silu", [False, True])
def test_page_in_a_browser(save, call, browser, silu):
    """No errors, no requests; opens at the widest gate; clicks and keys choose what is shown, and the focus stays."""
    model = make_model(dag_gate="silu" if silu else "sigmoid", n_expert=5)  # whose widest gate is in layer 2
    data = make_page(call, save(model), "ï </script><script>", 2)
    browser.get(url := Path("page.html").absolute().as_uri())
    assert len(browser.find("#strip button")) == 22 and len(browser.find("#strip button.prompt")) == 20
    assert ("SiLU" in browser.find("#legend")[0].get_attribute("textContent")) == silu
    layers = data["layers"]
    gates, shares = (np.array([[d[key] for d in layer["depths"]] for layer in layers]) for key in ("gate", "share"))
    black, width = gates.max() if silu else 1.0, gates.max(axis=(1, 3, 4)).T  # (tokens, layers)
    assert f"gates (black: {black:g}{', the widest of this text' if silu else ''})" in browser.find("p")[0].text
    places = [tuple(place) for place in np.argwhere(width >= (black / 2 if silu else 0.1))]
    widest = divmod(width.T.argmax(), len(width))[::-1]
    again, (near, far) = places[0], ([place for place in places if place > widest] + places)[:2]
    strip, two = "#strip button:nth-child(8)", "#layers button:nth-child(2)"
    left, right, up, down, end, home = "\ue012", "\ue014", "\ue013", "\ue015", "\ue010", "\ue011"
    for press, (token, layer) in (
        ("", widest), ("n", near), ("#next", far), (two, (far[0], 1)), (strip, (7, 1)), (left, (6, 1)), (end, (21, 1)),
        (right, (21, 1)), ("n", again), (down, (again[0], 1)), (home, (0, 1)), (up, (0, 0)), (right, (1, 0)),
    ):  # fmt: skip
        browser.find(press)[0].click() if press[:1] == "#" else browser.switch_to.active_element.send_keys(press)
        assert browser.find("#title")[0].text.startswith(f"Layer {layer + 1}, token {token + 1} ")
        assert f" {100 * layers[layer]['beyond'][token]:.0f} % is not in" in (says := browser.find("#says")[0].text)
        assert (("narrow" if silu else "nearly shut") in says) == ((token, layer) not in places)
        assert [float(cell.text.split()[0]) for cell in browser.find("#tables td")] == [*gates[layer, :, token].flat]
        for name, drawn in (("opacity", np.maximum(0.02, gates / black)), ("width", 0.5 + 15 * shares)):
            lines = [float(line.get_attribute(f"stroke-{name}")) for line in browser.find("#graph line.edge")]
            assert lines == pytest.approx(drawn[layer, :, token].ravel())
    assert browser.switch_to.active_element == browser.find("#strip [aria-pressed=true]")[0], "the focus has gone along"
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [address for address in sent if not address.startswith("data:")] == [url] and not browser.get_log("browser")


def test_hand_made_graph_shows_exactly_its_open_edge(save, call, browser, corpus):
    """Experts 0 and 1 for every token, only the edge from 1 to 0 open: on the page, and in the table as E1→E0."""
    model = randomize(make_model(n_layer=1, n_expert=4, top_k=2, dag_depth=1, dag_dim=2, dag_gate="sigmoid"), std=0.0)
    moe, layer = model.blocks[0].moe, model.blocks[0].moe.aggregate.layers[0]
    model.embed.weight.data[:, 2] = 4.0  # all of h
    moe.router.weight.data[:, 2] = torch.tensor([1.1, 1.0, -9.0, -9.0])
    moe.experts.gate_proj.data[:, :, 2] = moe.experts.up_proj.data[:, :, 2] = 1.0
    for i in range(2):  # expert i writes into channel i, so much that node i has next to nothing else: z_0 = (40, 0)
        moe.experts.down_proj.data[i, i] = layer.w_down.weight.data[i, i] = 10.0
    layer.w_edge.weight.data[:] = torch.tensor([1.0, -3.0, -3.0, 1.0])  # to 0, to 1, from 0, from 1
    layer.w_node.weight.data[:] = 1.0
    assert make_page(call, save(model), "ab")["layers"][0]["depths"][0]["gate"] == [[[0.0, 1.0], [0.0, 0.0]]] * 2
    browser.get(Path("page.html").absolute().as_uri())
    drawn = {line.get_attribute("textContent").split(":")[0]: line for line in browser.find("#graph line.edge")}
    opacity = {pair: float(line.get_attribute("stroke-opacity")) for pair, line in drawn.items()}
    assert opacity == {"E0 → E0": 0.02, "E1 → E0": 1.0, "E0 → E1": 0.02, "E1 → E1": 0.02}
    assert [drawn["E1 → E0"].get_attribute(end) for end in ("y1", "y2")] == ["124", "40"], "from the lower node"
    assert call(graph, "model.pt", "--dataset=tiny")[1].splitlines()[1].split()[-2] == "E1→E0"
    assert graph.strongest_pairs(torch.tensor([[9.0, 2.0], [4.0, 1.0]])) == ["E0→E1 1.0", "E1→E0 0.5"]


def test_page_of_a_tree(call, browser, refused, monkeypatch):
    """Opens at "=": the tree with its values, and what is read at each depth, right and wrong told apart."""
    refused("must be a file in a folder that exists", tree_page, "a/b.html")
    monkeypatch.setattr(trees, "PROBED", 900)
    monkeypatch.setattr(tree_page, "train_trial", lambda trial: trees.train_trial(trial._replace(steps=200)))
    assert call(tree_page, "page.html")[0] == 0
    tree = page_data()["tree"]
    leaves, *inner = tree["values"][0], *chain(*tree["values"][1:])
    browser.get(Path("page.html").absolute().as_uri())
    assert browser.find("#title")[0].text == 'Layer 1, token 9 "="'
    assert [text.text for text in browser.find("#tree text")] == [str(value) for value in leaves + inner]
    for figure, levels, shares in zip(browser.find("#read figure"), tree["read"], tree["right"], strict=True):
        read = [*chain(*levels)]
        assert [text.text for text in figure.find_elements("css selector", "text")] == [str(x) for x in leaves + read]
        marks = [circle.get_attribute("class") for circle in figure.find_elements("css selector", "circle")]
        assert marks == 8 * ["leaf"] + ["right" if x == y else "wrong" for x, y in zip(read, inner, strict=True)]
        assert len({*marks}) > 1 and ", ".join(f"{100 * share:.0f} %" for share in shares) in figure.text
    assert tree["read"][0][-1] != tree["values"][-1] == tree["read"][-1][-1] and not browser.get_log("browser")


def test_statistics_equal_a_plain_loop(save, call, refused, corpus, monkeypatch):
    """Token by token and edge by edge; the table shows them; and there is a picture, or how to get one."""
    model, tokens = make_model(dag_gate="silu"), prepare.open_dataset("tiny").val
    found = {name: [] for name in graph.Statistics._fields if name != "spread"}
    for offset in spaced_offsets(tokens, 32, 1600):
        expert, _, beyond, depths = plain_graphs(model, tokens[offset : offset + 32].tolist())[1]
        e, m, before, after = depths[1]
        found["beyond"] += beyond
        for s, i, j in np.ndindex(32, 3, 3):
            size = m[s, i].norm(dim=-1)
            found["gate"].append(e[s, i, j].abs().mean())
            found["self_gate" if i == j else "other_gate"].append(e[s, i, j].abs().mean())
            if i == j:
                found["self_share"].append(size[i] / size.sum())
                found["incoming"].append(size.sum().square() / size.square().sum())
                found["update"].append((after - before)[s, i].norm() / before[s, i].norm())
            else:
                found["alike"].append(torch.cosine_similarity(before[s, i], before[s, j], dim=0))
            if expert[s, i] == 2 and expert[s, j] == 4:
                found["strength"].append(size[j])
    monkeypatch.setattr(graph, "MIN_TOKENS", len(found["strength"]))
    monkeypatch.setattr(graph, "BATCH", 7 * 32)  # several batches, the last of which is smaller
    row = graph.graph_statistics(model, tokens, 1600)[1][1]
    assert row.spread == pytest.approx(np.std(found["gate"]), rel=1e-3)
    for name, values in found.items():
        ours = row.strength[2, 4] if name == "strength" else getattr(row, name)
        assert float(ours) == pytest.approx(np.mean(values), rel=1e-4), name
    assert f"{row.gate:6.3f} ± {row.spread:.3f}" in call(graph, save(model), "--dataset=tiny", "--tokens=1600")[1]
    assert Path("dag-tiny.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("the picture needs matplotlib: pip install matplotlib", graph, "model.pt", "--dataset=tiny")


def test_bad_input_is_refused(save, refused, corpus):
    """One line, status 2, and nothing is written."""
    for option in (
        "--temperature=nan", "--temperature=-1", "--top_k=0", "--top_p=0", "--top_p=1.5", "--num_samples=0",
        *(f"--{name}={10**30}" for name in ("num_samples", "max_new_tokens", "top_k")), f"--seed={2**63}",
    ):  # fmt: skip
        refused(f"argument {option.split('=')[0]}: must lie between ", sample, save(), option)
    Path("d.html").mkdir()
    for message, *arguments in (
        ("--seed: invalid number value: 'x'", "--seed=x"), ("'gpu' can't be used here", "--device=gpu"),
        ("none.txt", "--prompt_file=none.txt"), ("exists, got 'a/b.html'", "--dag=a/b.html"), ("b.md", "--dag=b.md"),
        ("--dag shows one text: give one --prompt", "--prompt=a", "--prompt=b", "--dag=g.html"),
        ("--dag shows one text", "--num_samples=2", "--dag=g.html"), ("exists, got 'd.html'", "--dag=d.html"),
    ):  # fmt: skip
        refused(message, sample, "model.pt", *arguments)
    refused("dataset 'code'", graph, "model.pt", "--dataset=code", "--tokens=1")
    refused("'tiny' is encoded as bytes, the model reads gpt2", graph, save(encoding="gpt2"), "--dataset=tiny")
    refused("--tokens: must lie between", graph, "model.pt", "--dataset=code", "--tokens=0")
    refused("experts by 'sum': there is no graph", sample, save(make_model(aggregator="sum")), "--dag=g.html")
    refused("experts by 'sum': there is no graph", graph, "model.pt", "--dataset=code")
    assert not Path("g.html").exists()


def test_bad_checkpoints_are_refused(save, refused, trained):
    """Truncated, empty, foreign, not finite, of another model, or holding code: named, and the code never executed."""

    class Harmful:
        def __reduce__(self):
            return Path("executed").touch, ()

    for contents in (b"", b"no checkpoint", trained[:-100], trained[: len(trained) // 2], bytes(9999)):
        Path("bad.pt").write_bytes(contents)
        refused("bad.pt is damaged", sample, "bad.pt")
    model, not_finite = torch.load(save(), weights_only=True)["model"], torch.full((16,), torch.nan)
    for changes in (
        {"encoding": 3}, {"model": {}}, {"model": Harmful()}, {"model": model | {"norm.weight": not_finite}},
        {"model": make_model().state_dict()}, {"model_config": {"n_layer": "2"}}, {"model_config": {"colour": 1}},
    ):  # fmt: skip
        refused("model.pt ", sample, save(**changes))
    refused("nowhere does not exist", sample, "nowhere")
    assert not Path("executed").exists()
