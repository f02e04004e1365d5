"""prepare.py loses no text, keeps the splits apart, and leaves nothing half-written."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare
from tests.conftest import make_corpus
from tests.test_resume import start

MERGES = {bytes([i]): i for i in range(256)}
MERGES |= {b" t": 256, b"he": 257, b" the": 258, b"\n\n": 259}
SPECIAL = {"<|endoftext|>": 70_000, "<|fim_prefix|>": 70_001}
PATTERN = r" ?\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+"
KILLED = """
import itertools, os, pathlib, shutil, prepare
calls = itertools.count(1)
function = {name}
def kill(*arguments, **options):
    if next(calls) == {call}:
        os.kill(os.getpid(), 9)
    return function(*arguments, **options)
{name} = kill
prepare.main(["new", "--name=own", "--encoding=bytes"])
"""


def read_dataset(name: str) -> list[list[bytes]]:
    """Decode the documents of train and of val, each of which ends with <|endoftext|>."""
    meta, train, val = prepare.open_dataset(name)
    encoding = prepare.get_encoding(meta["encoding"])
    documents = []
    for tokens in (train, val):
        ends = np.flatnonzero(tokens == encoding.eot_token)
        *parts, rest = np.split(tokens, ends + 1)
        assert len(rest) == 0
        documents.append([encoding.decode_bytes(part[:-1].tolist()) for part in parts])
    return documents


def make_dataset(*arguments: str, encoding: str = "bytes") -> list[list[bytes]]:
    """Prepare the dataset `own`, and return its documents of train and of val."""
    prepare.main([*arguments, "--name=own", f"--encoding={encoding}"])
    return read_dataset("own")


def snapshot(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def no_network(name: str) -> tiktoken.Encoding:
    raise ConnectionError("no network")


@pytest.fixture
def merging(monkeypatch) -> tiktoken.Encoding:
    """An encoding with merges and large ids, which needs no network, in the place of gpt2."""
    encoding = tiktoken.Encoding(
        "own", pat_str=PATTERN, mergeable_ranks=MERGES, special_tokens=SPECIAL
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.mark.parametrize("block", [13, 100, 1 << 16])
def test_every_document_comes_back_exactly_once_and_whole(corpus, merging, monkeypatch, block):
    """In one block or in many, and meta.json has the sizes of train and of val."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    train, val = make_dataset("text", encoding="gpt2")
    assert sorted(train + val) == sorted(text.encode() for text in corpus)
    meta, _, _ = prepare.open_dataset("own")
    for documents, sizes in zip((train, val), meta["splits"].values(), strict=True):
        assert sizes["documents"] == len(documents)
        assert sizes["bytes"] == sum(map(len, documents))


@pytest.mark.parametrize(("block", "workers"), [(30, 5), (333, 1), (1 << 16, 2)])
@pytest.mark.parametrize("separator", [[], ["--separator=---"]], ids=str)
def test_bins_depend_on_the_text_only(workdir, monkeypatch, block, workers, separator):
    """They are the same for any number of threads, and however much is read at a time."""
    Path("long.txt").write_text("".join(f"línea {i}\n---\n" for i in range(500)))
    make_dataset("long.txt", *separator)
    expected = snapshot("data")
    monkeypatch.setattr(prepare, "BLOCK", block)
    make_dataset("long.txt", *separator, f"--workers={workers}")
    assert snapshot("data") == expected


def test_tokens_are_those_of_tiktoken(workdir, merging, monkeypatch):
    """Special tokens in a file are ordinary text, and who opens a dataset needs no encoding."""
    text = "it's  the\t\n\n\n the 日 😀é\r\n<|fim_prefix|>\n<|endoftext|>"
    Path("train.txt").write_bytes(text.encode())
    Path("val.txt").write_text("the text")
    make_dataset("train.txt", "--val=val.txt", encoding="gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    meta, train, val = prepare.open_dataset("own")
    assert meta["vocab_size"] == 70_002
    assert train.tolist() == [*merging.encode_ordinary(text), 70_000]
    assert val.tolist() == [*merging.encode_ordinary("the text"), 70_000]


def test_files_are_taken_and_folders_searched(workdir):
    """A pattern chooses the files of folders; a file counts once, however it is spelled."""
    make_corpus(workdir / "src")
    Path("src/deep").mkdir()
    Path("src/deep/code.py").write_text("print()\n")
    Path("src/deep/empty.py").touch()
    Path("extra.md").write_text("# extra\n")
    again = ["src/deep", "./extra.md", "src/../extra.md", f"{workdir}/extra.md"]
    train, _ = make_dataset("src", "extra.md", *again, "--pattern=*.py", "--val=src/000.txt")
    assert train == [b"print()\n", b"# extra\n"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=repr)
@pytest.mark.parametrize("separator", ["<|endoftext|>", "* * *", ""])
def test_separator_lines_part_documents(workdir, monkeypatch, separator, line_end):
    """A line that is the separator, and no other, ends a document, which is stripped."""
    monkeypatch.setattr(prepare, "BLOCK", 24)
    documents = [f" Story {i}\n  with {separator} inside\n{i}." for i in range(20)]
    Path("a.txt").write_text(f"\n{separator}\n\n".join(documents), newline=line_end)
    Path("b.txt").write_text("val")
    train, _ = make_dataset("a.txt", "--val=b.txt", f"--separator={separator}")
    assert train == [text.strip().replace("\n", line_end).encode() for text in documents]


def test_many_documents_are_split_by_checksum(workdir):
    """About a tenth of them is val, from anywhere in a file, and copies are in the same split."""
    texts = [f"Document {i * 7919}.".encode() for i in range(100)]
    Path("a.txt").write_bytes(b"\n---\n".join(texts))
    Path("b.txt").write_bytes(b"\n---\n".join(reversed(texts)))
    train, val = make_dataset("a.txt", "b.txt", "--separator=---")
    assert sorted(train + val) == sorted(texts * 2)
    assert set(train).isdisjoint(val)
    assert 6 <= len(val) <= 40
    assert val[0] != texts[90]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("files", [1, 4])
def test_fewer_than_100_documents_are_cut_once(workdir, monkeypatch, fraction, files):
    """Val begins at a line, val_fraction before the end; every byte is there, in order."""
    monkeypatch.setattr(prepare, "BLOCK", 7)
    part = "".join(f"línea {i}\n" for i in range(400 // files))
    for i in range(files):
        Path(f"{i}.txt").write_text(part)
    text = part.encode() * files
    train, val = make_dataset(".", f"--val_fraction={fraction}")
    assert b"".join(train + val) == text
    assert len(train + val) <= files + 1
    assert val[0].startswith("lí".encode())
    assert sum(map(len, val)) == pytest.approx(fraction * len(text) + 5.5, abs=6)


def test_text_without_line_ends_is_cut_between_blocks(workdir, monkeypatch):
    """Where no line ends, the cut is between two characters."""
    monkeypatch.setattr(prepare, "BLOCK", 50)
    Path("a.txt").write_text("日" * 1000)
    assert make_dataset("a.txt") == [["日".encode() * 900], ["日".encode() * 100]]


@pytest.mark.parametrize(("val", "documents"), [("text/../val", 9), ("val/007.txt", 150)])
def test_val_is_what_is_named_as_such(workdir, val, documents):
    """--val takes a file or a folder, however it is spelled, and leaves it out of train."""
    texts = make_corpus(workdir / "text", documents)
    Path("val").mkdir()
    Path("val/007.txt").write_text("val\n")
    assert make_dataset(".", "--val", val) == [[text.encode() for text in texts], [b"val\n"]]


def test_stdlib_is_that_of_the_running_interpreter(call):
    """It says which Python's it is; it has no tests; val has about a tenth of the bytes."""
    _, printed, error = call(prepare, "stdlib")
    assert f"Python {sys.version.split()[0]}" in printed, error
    train, val = map(b"".join, read_dataset("stdlib"))
    assert Path(os.__file__).read_bytes() in train + val
    assert b"class TestArgumentParser" not in train + val
    assert 0.09 < len(val) / len(train + val) < 0.12


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("no text is left for train", ["empty.txt"]),
        ("no text is left for val", ["text", "--val_fraction=1e-9"]),
        ("latin.txt as UTF-8 text", ["text", "latin.txt"]),
        ("nowhere does not exist", ["text", "nowhere"]),
        ("--val_fraction must lie between 0 and 1, got nan", ["text", "--val_fraction=nan"]),
        ("encoding 'byte'", ["text", "--encoding=byte"]),
        ("give your text a --name", ["text", "--name=../up"]),
    ],
)
def test_bad_input_is_refused_and_overwrites_nothing(corpus, refused, message, arguments):
    """It is answered in one line, and all that was in data/ stays as it was."""
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    before = snapshot("data")
    refused(message, prepare, "--name=tiny", "--encoding=bytes", *arguments)
    assert snapshot("data") == before


def test_an_encoding_that_is_of_no_use_is_refused(corpus, refused, monkeypatch, merging):
    """It must be there, and have a token for the end of a document."""
    monkeypatch.setattr(prepare, "END_OF_TEXT", "<|end|>")
    refused("'gpt2' has no <|end|>", prepare, "text", "--name=own")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    refused("'gpt2' (no network): is TIKTOKEN_CACHE_DIR set?", prepare, "text", "--name=own")


@pytest.mark.parametrize("damage", ["meta.json=[]", "meta.json={}", "val.bin=", "val.bin=even"])
def test_a_damaged_dataset_is_noticed(corpus, damage):
    """The message has the command that makes it anew."""
    name, contents = damage.split("=")
    Path("data/tiny", name).write_text(contents)
    with pytest.raises(prepare.UserError, match=r"data/tiny .*: python prepare.py FILES --name"):
        prepare.open_dataset("tiny")


@pytest.mark.parametrize(
    ("name", "call", "left"),
    [
        ("prepare.read_blocks", 200, "old"),
        ("pathlib.Path.rename", 1, "old"),
        ("pathlib.Path.rename", 2, "nothing"),
        ("shutil.rmtree", 1, "new"),
    ],
)
def test_killed_at_any_moment(workdir, name, call, left):
    """kill -9 leaves the old dataset, or none, or the new one; the next run finishes."""
    make_corpus(workdir / "old", 99)
    make_corpus(workdir / "new", 120)
    datasets = {"nothing": {}}
    for folder in ("new", "old"):
        make_dataset(folder)
        datasets[folder] = snapshot("data/own")
    process = start("-c", KILLED.format(name=name, call=call))
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert snapshot("data/own") == datasets[left]
    make_dataset("new")
    assert snapshot("data/own") == datasets["new"]
