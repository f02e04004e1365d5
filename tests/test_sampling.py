"""sample.py writes the text that the model says, and refuses what it cannot use."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiktoken
import torch

import prepare
import sample
import train
from model import GPT, choose
from tests.helpers import TINY_RUN, assert_refused, random_tokens, tiny_model

END = 256  # <|endoftext|> among bytes
CHOICES = [("top_p", 1, 4), ("top_p", 0.8, 3), ("top_p", 0.4, 1), ("top_k", 3, 3), ("top_k", 9, 4)]
CHOICES += [("temperature", 1, 4), ("temperature", 0.05, 1), ("temperature", 1e-45, 1)]


class Harmful:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return Path("executed").touch, ()


@pytest.fixture(autouse=True)
def tiny_checkpoint(workdir, trained):
    """Every test finds the checkpoint of a tiny trained model, tiny.pt."""
    Path("tiny.pt").write_bytes(trained)


def say(monkeypatch, ids) -> list:
    """Make the model say these ids; return a list to which each call adds its prompt."""
    prompts = []

    def generate(self, tokens, max_new_tokens, **sampling):
        prompts.append(tokens.tolist())
        return (torch.tensor([token]) for token in ids)

    monkeypatch.setattr(GPT, "generate", generate)
    return prompts


@pytest.mark.parametrize("kind", [{"aggregator": "sum"}, {}, {"shared_dim": 8}], ids=str)
@pytest.mark.parametrize("length", [1, 5, 16, 40])
def test_generation_with_caches_equals_generation_without(kind, length):
    """Greedy tokens are those of uncached passes over the window, far beyond block_size."""
    model = tiny_model(**kind)
    tokens = random_tokens(2, length)
    cached = list(model.generate(tokens, 40, temperature=0))
    window = tokens[:, -16:]
    for next_token in cached:
        expected = model(window).logits[:, -1].argmax(-1)
        assert torch.equal(next_token, expected)
        window = torch.cat([window, expected[:, None]], dim=1)
        if window.shape[1] > 16:
            window = window[:, -8:]
    assert len(torch.stack(cached).unique()) > 5, "a model that repeats itself would test little"


def test_generation_with_the_shortest_context():
    """With a block_size of 1 each token depends on the one before it only."""
    model = tiny_model(block_size=1)
    tokens = random_tokens(1, 1)
    for next_token in model.generate(tokens, 5, temperature=0):
        assert torch.equal(next_token, model(tokens).logits[:, -1].argmax(-1))
        tokens = next_token[:, None]


@pytest.mark.parametrize(("option", "value", "count"), CHOICES)
def test_what_can_be_chosen(option, value, count):
    """Each option leaves so many of four ids, the likeliest ones."""
    torch.manual_seed(0)
    logits = torch.tensor([[0.19, 0.5, 0.1, 0.21]]).log().expand(300, 4)
    chosen = choose(logits, **{option: value})
    likeliest_first = [1, 3, 0, 2]
    assert set(chosen.tolist()) == set(likeliest_first[:count])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.85}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ids_are_drawn_with_their_probabilities(options, temperature):
    """Frequencies of 20,000 draws are the softmax over the ids that are left."""
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    chosen = choose(logits.expand(20_000, 4), temperature, **options)
    allowed = torch.tensor([False, True, True, True]) if options else torch.ones(4).bool()
    if options == {"top_p": 0.85} and temperature == 0.5:
        allowed = torch.tensor([False, True, False, True])  # whose probabilities have become 0.91
    expected = (logits / temperature).masked_fill(~allowed, -torch.inf).softmax(dim=0)
    frequency = chosen.bincount(minlength=4) / 20_000
    assert (frequency - expected).abs().max() < 0.02


def test_a_seed_decides_the_text(capsys):
    """The same seed gives the same text, and another seed another one."""
    texts = []
    for seed in (1, 1, 2):
        sample.main(["tiny.pt", "--prompt=Doc", f"--seed={seed}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("Doc")


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("", [END]), ("ab", [97, 98]), ("a<|endoftext|>", [97, END])],
)
def test_prompts(monkeypatch, capsys, prompt, ids):
    """Without a prompt a text starts a document; <|endoftext|> in a prompt is the token."""
    prompts = say(monkeypatch, b"x")
    sample.main(["tiny.pt", "--prompt", prompt, "--num_samples=2"])
    assert prompts == [[ids], [ids]]
    out = capsys.readouterr().out
    assert out == f"--- sample 1 of 2 ---\n{prompt}x\n--- sample 2 of 2 ---\n{prompt}x\n"


def test_a_prompt_that_is_not_utf8_gets_a_replacement_character(monkeypatch, capsys):
    """Python hands bytes that are not UTF-8 to a script as lone surrogates."""
    prompts = say(monkeypatch, b"x")
    sample.main(["tiny.pt", "--prompt", "caf\udce9"])
    assert capsys.readouterr().out == "caf\ufffdx\n"
    assert bytes(prompts[0][0]) == "caf\ufffd".encode()


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ("naïve 日本 😀".encode(), "naïve 日本 😀"),
        ([97, END, 98], "a"),
        ([*b"a", 0xF0, 0x9F], "a\ufffd"),
        ([0xFF, *b"b"], "\ufffdb"),
    ],
)
def test_tokens_become_text(monkeypatch, capsys, ids, text):
    """A character of several tokens is written whole, half of one as a replacement character."""
    say(monkeypatch, ids)
    sample.main(["tiny.pt"])
    assert capsys.readouterr().out == text + "\n"


def test_an_id_without_a_text_ends_a_sample(monkeypatch, capsys):
    """Some encodings have ids that stand for nothing, and a model may draw one."""
    end = {prepare.END_OF_TEXT: 9}
    ab = tiktoken.Encoding("ab", pat_str=".", mergeable_ranks={b"ab": 7}, special_tokens=end)
    monkeypatch.setattr(sample, "get_encoding", lambda name: ab)
    say(monkeypatch, [7, 8, 7])
    sample.main(["tiny.pt"])
    assert capsys.readouterr().out == "ab\n"


def test_scripts_run_in_a_notebook(corpus):
    """They write to a stream that has neither a buffer nor a file, as a notebook's has."""
    with redirect_stdout(io.StringIO()) as stream:
        prepare.main(["text", "--name=again", "--encoding=bytes"])
        train.main(TINY_RUN)
        sample.main(["out/tiny", "--prompt=naïve"])
    assert "step      6: validation loss" in stream.getvalue()
    assert "\nnaïve" in stream.getvalue()


@pytest.mark.parametrize("option", ["--top_k=0", "--top_p=0", "--top_p=1.5"])
def test_a_bad_option_is_refused(option):
    """The error has its name and its value."""
    name, _, value = option.partition("=")
    assert_refused(sample.main, ["tiny.pt", option], f"got {value}")
    assert_refused(sample.main, ["tiny.pt", option], name)


@pytest.mark.parametrize("value", [3, {"version": "0.3"}, {"version": Harmful()}])
def test_a_foreign_checkpoint_is_refused(value):
    """The error names the file, and code in it is not executed."""
    torch.save(value, "bad.pt")
    assert_refused(sample.main, ["bad.pt"], "bad.pt is ")
    assert not Path("executed").exists()


def test_an_unusable_device_is_refused_with_the_reason(monkeypatch):
    """A GPU that is there but does not work is not called absent."""
    assert_refused(sample.main, ["tiny.pt", "--device=cuda"], "cannot compute on device cuda:0: ")
    assert_refused(sample.main, ["tiny.pt", "--device=gpu"], "cannot compute on device gpu: ")
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("driver too old\nmore")))
    assert_refused(sample.main, ["tiny.pt", "--device=cuda"], "device cuda:0: driver too old")
