"""The text that sample.py writes, byte by byte, and what it refuses."""

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
from tests.conftest import TINY_RUN

END = 256  # <|endoftext|> among bytes
ALL_BYTES = bytes(range(256))
ENDING = {prepare.END_OF_TEXT: 9}  # the last id that ONLY_AB has
ONLY_AB = tiktoken.Encoding("ab", pat_str=".", mergeable_ranks={b"ab": 7}, special_tokens=ENDING)
SAID = [(ALL_BYTES, ALL_BYTES), ([97, END, 98], b"a"), (b"STSTOP", b"ST"), (b"STO", b"STO")]
CHOICES = [("top_p", 1, 4), ("top_p", 0.8, 3), ("top_p", 0.4, 1), ("top_k", 3, 3)]
CHOICES += [("temperature", 1, 4), ("temperature", 0.05, 1), ("temperature", 1e-45, 1)]
BAD = ["--num_samples=0", "--top_p=0", "--top_p=1.5", "--temperature=nan", f"--seed={10**20}"]


class Harmful:
    def __reduce__(self):
        return Path("executed").touch, ()


@pytest.fixture(autouse=True)
def tiny_model(workdir, trained):
    """Every test finds the checkpoint of a tiny trained model, tiny.pt."""
    Path("tiny.pt").write_bytes(trained)


def write_text(*options, terminal=False) -> bytes:
    """Run sample.py with a file for its standard output, and return what is in it."""
    with open("stdout", "w", encoding="utf-8") as file, redirect_stdout(file):
        file.isatty = lambda: terminal
        sample.main(["tiny.pt", *options])
    return Path("stdout").read_bytes()


def script(monkeypatch, text) -> list:
    """Make the model say this text, and return a list of its calls: rows, prompt and seed."""
    calls = []

    def generate(self, rows, *arguments, generator, **sampling):
        calls.append((len(rows), rows[0].tolist(), generator.initial_seed()))
        return [torch.full([len(rows)], token) for token in text]

    monkeypatch.setattr(GPT, "generate", generate)
    return calls


def test_prompts_in_batches(monkeypatch):
    """At most 64 texts grow together; <|endoftext|> is the token with which a document begins."""
    calls = script(monkeypatch, b"x")
    text = write_text("--num_samples=130", "--seed=5", "--prompt=", "--prompt=a<|endoftext|>")
    assert text.count(b"--- sample 130 of 130 ---\n") == 2
    assert calls == [(n, ids, 5) for ids in ([END], [97, END]) for n in (64, 64, 2)]


@pytest.mark.parametrize("number", ["--num_samples=1", "--num_samples=2"])
@pytest.mark.parametrize(("said", "written"), SAID)
def test_what_a_file_gets(said, written, number, monkeypatch):
    """The bytes of the prompt and of all tokens, up to <|endoftext|> or to what --stop names."""
    Path("prompt").write_bytes(b"STOP\r\n\f\x1b")
    script(monkeypatch, said)
    text = write_text("--prompt_file=prompt", "--stop=STOP", number)
    assert text.split(b" of 2 ---\n")[-1] == b"STOP\r\n\f\x1b" + written + b"\n"


def test_what_a_terminal_gets(monkeypatch):
    """White space passes, a code that could steer it becomes "?", and half a character nothing."""
    codes = ALL_BYTES[:0x20].decode() + ALL_BYTES[0x7F:0xA0].decode("latin-1")
    script(monkeypatch, codes.encode() + "é".encode()[:1])
    texts = write_text("--prompt", codes, "--num_samples=2", terminal=True).decode()
    last = texts.split(" of 2 ---\n")[-1]
    assert len(last) == 2 * len(codes) + 1
    assert set(last) == set("\t\n\r\f?")


@pytest.mark.parametrize("option", ["--top_k=999", "--top_p=0.5", "--temperature=0"])
def test_ids_without_a_token_are_never_drawn(option, monkeypatch):
    """The model prefers all ids alike to <|endoftext|>, and of these 257 the encoding has one."""
    logits = torch.full((1, 1, 257), 99.0)
    logits[:, :, 9] = 0.0
    monkeypatch.setattr(GPT, "forward", lambda *arguments, **cache: Mock(logits=logits))
    monkeypatch.setattr(sample, "get_encoding", lambda name: ONLY_AB)
    assert write_text(option) == b"ab" * 200 + b"\n"


def test_a_training_ends_without_a_vocabulary(corpus, call, monkeypatch):
    """A run that cannot write samples is finished all the same."""
    monkeypatch.setattr(sample, "get_encoding", Mock(side_effect=prepare.UserError("no net")))
    status, out, _ = call(train, *TINY_RUN)
    assert status == 0
    assert "no samples: no net\n" in out


@pytest.mark.parametrize(("name", "value", "count"), CHOICES)
def test_what_can_be_chosen(name, value, count, monkeypatch):
    """Each option leaves so many of four ids, the likeliest ones. Only top_p has to sort them."""
    monkeypatch.setattr(torch.Tensor, "sort", torch.Tensor.sort if name == "top_p" else None)
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().expand(300, 4)
    generator = torch.Generator().manual_seed(0)
    chosen = choose(logits, generator=generator, **{name: value})
    assert set(chosen.tolist()) == set(range(count))


@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_refused(option, refused):
    """An impossible value is named in one line."""
    refused(option.partition("=")[0], sample, "tiny.pt", option)


@pytest.mark.parametrize("value", [3, {"version": "0.2.0"}, {"version": Harmful()}])
def test_a_foreign_checkpoint_is_refused(value, refused):
    """What others have saved is named in one line, and code in it is not executed."""
    torch.save(value, "bad.pt")
    refused("bad.pt is ", sample, "bad.pt")
    assert not Path("executed").exists()
