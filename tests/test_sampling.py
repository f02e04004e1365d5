"""The text that sample.py writes, byte by byte, and what it refuses."""

from contextlib import redirect_stdout
from itertools import zip_longest
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
ENDING = {prepare.END_OF_TEXT: END}
RANKS = {bytes([i]): i for i in ALL_BYTES}
MADE_UP = tiktoken.Encoding("other", pat_str=".", mergeable_ranks=RANKS, special_tokens=ENDING)
ONLY_AB = tiktoken.Encoding("ab", pat_str=".", mergeable_ranks={b"ab": 7}, special_tokens=ENDING)
SAID = [(ALL_BYTES, ALL_BYTES), ([97, END, 98], b"a"), ([END], b"")]
STOPPED = [(b"a STOP b", b"a "), (b"STSTOP", b"ST"), (b"STO P", b"STO P"), (b"STO", b"STO")]
TOP_P = [("top_p", 1, 4), ("top_p", 0.8, 3), ("top_p", 0.4, 1)]
OTHER = [("top_k", 3, 3), ("top_k", 1, 1), ("temperature", 1, 4), ("temperature", 0.05, 1)]
TOO_SMALL = ["--num_samples=0", "--temperature=-1", "--top_k=0", "--top_p=0", "--seed=-1"]
TOO_LARGE = ["--temperature=inf", "--temperature=nan", "--top_p=1.5", f"--seed={10**20}"]


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


def script(monkeypatch, *texts) -> tuple[list, list]:
    """Make the model say these texts; return its prompts, and what is written after each byte."""
    prompts = []
    written = []

    def generate(self, rows, *arguments, **sampling):
        prompts.append(rows.tolist())
        for ids in zip_longest(*texts, fillvalue=END):
            yield torch.tensor(ids).expand(len(rows))
            written.append(Path("stdout").read_bytes())

    monkeypatch.setattr(GPT, "generate", generate)
    return prompts, written


def test_the_seed_decides_the_text():
    """One seed gives one text, and another seed another text."""
    assert write_text() == write_text("--seed=1337")
    assert write_text() != write_text("--seed=1338")


@pytest.mark.parametrize("option", ["--top_k=1", "--top_p=1e-9", "--temperature=1e-45"])
def test_without_a_choice_the_text_is_greedy(option):
    """The text is the likeliest one, as with temperature 0, for any seed."""
    assert write_text(option) == write_text("--temperature=0", "--seed=2")


def test_prompts_are_independent():
    """Two prompts give what each of them gives alone."""
    alone = write_text("--prompt=a") + write_text("--prompt=b")
    assert write_text("--prompt=a", "--prompt=b") == alone


def test_many_samples_are_made_in_batches(monkeypatch):
    """130 texts are numbered from 1 to 130, and no more than 64 of them grow together."""
    prompts, _ = script(monkeypatch, b"x")
    texts = write_text("--num_samples=130").split(b" of 130 ---\nx\n")
    assert texts == [*[b"--- sample %d" % (i + 1) for i in range(130)], b""]
    assert [len(rows) for rows in prompts] == [64, 64, 2]


@pytest.mark.parametrize("number", ["--num_samples=1", "--num_samples=2"])
@pytest.mark.parametrize(("said", "written"), SAID + STOPPED)
def test_what_a_file_gets(said, written, number, workdir, monkeypatch):
    """The bytes of the prompt and of all tokens, up to <|endoftext|> or to what --stop names."""
    monkeypatch.setenv("HOME", str(workdir))
    Path("prompt").write_bytes(b"STOP\r\n\f\x1b")
    script(monkeypatch, said)
    text = write_text("--prompt_file=~/prompt", "--stop=STOP", number)
    assert text.split(b" of 2 ---\n")[-1] == b"STOP\r\n\f\x1b" + written + b"\n"


def test_what_a_terminal_gets(monkeypatch):
    """White space passes, and each code that could steer it becomes a question mark."""
    codes = ALL_BYTES[:0x20].decode() + ALL_BYTES[0x7F:0xA0].decode("latin-1")
    script(monkeypatch, codes.encode())
    text = write_text("--prompt", codes, terminal=True).decode()
    assert len(text) == 2 * len(codes) + 1
    assert set(text) == set("\t\n\r\f?")


def test_text_is_written_as_it_comes(monkeypatch):
    """A terminal gets a character as soon as the last of its tokens is there, and not before."""
    _, written = script(monkeypatch, "é!".encode())
    write_text("--prompt=>", terminal=True)
    assert written == [b">", ">é".encode(), ">é!".encode()]


def test_an_unfinished_character_stays_in_its_text(monkeypatch):
    """A text may end within a character, of which a terminal gets nothing in the next text."""
    script(monkeypatch, "é".encode()[:1], b"next")
    text = write_text("--num_samples=2", terminal=True)
    assert text.split(b" of 2 ---\n")[-1] == b"next\n"


@pytest.mark.parametrize(("prompt", "ids"), [("", [END]), ("a<|endoftext|>", [97, END])])
def test_the_ids_of_a_prompt(prompt, ids, monkeypatch):
    """<|endoftext|> in a prompt is the token itself, with which a document begins, too."""
    prompts, _ = script(monkeypatch, b"x")
    write_text("--prompt", prompt)
    assert prompts == [[ids]]


@pytest.mark.parametrize("option", ["--top_k=999", "--top_p=0.5", "--temperature=0"])
def test_ids_without_a_token_are_never_drawn(option, monkeypatch):
    """The model prefers all ids alike to <|endoftext|>, and of these the encoding has one."""
    logits = torch.full((1, 1, 257), 99.0)
    logits[:, :, END] = 0.0
    monkeypatch.setattr(GPT, "forward", lambda *arguments, **cache: Mock(logits=logits))
    monkeypatch.setattr(sample, "get_encoding", lambda name: ONLY_AB)
    assert write_text(option) == b"ab" * 200 + b"\n"


@pytest.mark.parametrize("answer", [MADE_UP, ConnectionError("no net")])
def test_the_end_of_a_training(answer, corpus, call, monkeypatch):
    """Samples hold known ids only, and if the vocabulary is not there, a run ends without them."""
    monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=[MADE_UP, answer]))
    prepare.main(["text", "--name=tiny", "--encoding=other"])
    status, out, error = call(train, *TINY_RUN, "--max_steps=1", "--vocab_size=2048")
    assert status == 0, error
    assert ("no samples: " in out) == (answer is not MADE_UP)


@pytest.mark.parametrize(("name", "value", "count"), TOP_P + OTHER)
def test_what_can_be_chosen(name, value, count, monkeypatch):
    """Each option leaves so many of four ids, the likeliest ones. Only top_p has to sort them."""
    monkeypatch.setattr(torch.Tensor, "sort", torch.Tensor.sort if name == "top_p" else None)
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().expand(300, 4)
    generator = torch.Generator().manual_seed(0)
    chosen = choose(logits, generator=generator, **{name: value})
    assert set(chosen.tolist()) == set(range(count))


@pytest.mark.parametrize("option", [*TOO_SMALL, *TOO_LARGE])
def test_a_bad_option_is_refused(option, refused):
    """An impossible value, or a prompt that is not UTF-8, is named in one line."""
    refused(option.partition("=")[0], sample, "tiny.pt", option)


@pytest.mark.parametrize(
    "words", ["none", "tiny.pt --prompt_file=none", "tiny.pt --prompt_file=tiny.pt"]
)
def test_a_bad_path_is_refused(words, refused):
    """A checkpoint or a prompt that is missing, or that is not UTF-8, is named in one line."""
    refused(words.replace("=", " ").split()[-1], sample, *words.split())


@pytest.mark.parametrize("part", [slice(0), slice(999), slice(-100), slice(4, None)])
def test_a_damaged_checkpoint_is_refused(part, trained, refused):
    """A file that is empty, or only a part of a checkpoint, is named in one line."""
    Path("bad.pt").write_bytes(trained[part])
    refused("bad.pt is not a checkpoint of train.py", sample, "bad.pt")


@pytest.mark.parametrize("value", [3, [], {"version": "0.2.0"}, {"version": Harmful()}])
def test_a_foreign_checkpoint_is_refused(value, refused):
    """What others have saved is named in one line, and code in it is not executed."""
    torch.save(value, "bad.pt")
    refused("bad.pt is ", sample, "bad.pt")
    assert not Path("executed").exists()
