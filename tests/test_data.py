"""prepare.py loses no text, keeps the splits apart, and leaves nothing half-written."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare
from tests.conftest import REPOSITORY, make_corpus

BYTES = {bytes([i]): i for i in range(256)}
MERGES = BYTES | {b" t": 256, b"he": 257, b" the": 258, b"\n\n": 259}
SPECIAL = {"<|endoftext|>": 70_000, "<|fim_prefix|>": 70_001}


def make_encoding(ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    pattern = r" ?\p{L}+| ?[^\s\p{L}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


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
    encoding = make_encoding(MERGES, SPECIAL)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


@pytest.mark.parametrize("block", [13, 100, 1 << 16])
def test_every_document_comes_back_exactly_once_and_whole(corpus, merging, monkeypatch, block):
    """Train and val together are the documents that were given, in one block or in many."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    train, val = make_dataset("text", encoding="gpt2")
    assert sorted(train + val) == sorted(text.encode() for text in corpus)


def test_meta_json_says_what_is_in_the_bins(corpus):
    """It has the encoding, and the documents, bytes, tokens and checksum of each split."""
    meta, _, _ = prepare.open_dataset("tiny")
    splits = meta.pop("splits")
    assert meta == {"name": "tiny", "encoding": "bytes", "vocab_size": 257, "dtype": "uint16"}
    for split, documents in zip(("train", "val"), read_dataset("tiny"), strict=True):
        size = sum(map(len, documents))
        bin_file = Path(f"data/tiny/{split}.bin").read_bytes()
        assert splits[split] == {
            "documents": len(documents),
            "bytes": size,
            "tokens": size + len(documents),
            "sha256": hashlib.sha256(bin_file).hexdigest(),
        }


@pytest.mark.parametrize("block", [30, 333, 1 << 16])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("separator", [[], ["--separator=---"]], ids=str)
def test_bins_depend_on_the_text_only(workdir, monkeypatch, block, workers, separator):
    """They are the same for any number of threads, and however much is read at a time."""
    Path("long.txt").write_text("".join(f"línea {i}\n---\n" for i in range(500)))
    make_dataset("long.txt", *separator)
    expected = snapshot("data")
    monkeypatch.setattr(prepare, "BLOCK", block)
    make_dataset("long.txt", *separator, f"--workers={workers}")
    assert snapshot("data") == expected


@pytest.mark.parametrize(
    "text", ["it's  the\t\n\n\n the", "日 😀é\r\n", "<|fim_prefix|>\n<|endoftext|>"]
)
def test_tokens_are_those_of_tiktoken(workdir, merging, text):
    """They may exceed 65,535. A file is one document, whatever special tokens are in it."""
    Path("train.txt").write_bytes(text.encode())
    Path("val.txt").write_text("the text")
    make_dataset("train.txt", "--val=val.txt", encoding="gpt2")
    _, train, val = prepare.open_dataset("own")
    assert train.tolist() == [*merging.encode_ordinary(text), 70_000]
    assert val.tolist() == [*merging.encode_ordinary("the text"), 70_000]


def test_empty_documents_are_left_out(workdir):
    """Neither an empty file nor what is between two separators in a row is a document."""
    Path("empty.txt").touch()
    Path("a.txt").write_text("---\n---\none\n---\n \n---\n")
    Path("b.txt").write_text("two\n---")
    documents = make_dataset("empty.txt", "a.txt", "--val=b.txt", "--separator=---")
    assert documents == [[b"one"], [b"two"]]


@pytest.mark.parametrize("again", ["extra.md", "./extra.md", "src/../extra.md", "{}/extra.md"])
def test_files_are_taken_and_folders_searched(workdir, again):
    """A pattern chooses the files of folders; a file counts once, however it is spelled."""
    make_corpus(workdir / "src")
    Path("src/deep").mkdir()
    Path("src/deep/code.py").write_text("print()\n")
    Path("extra.md").write_text("# extra\n")
    paths = ["src", "extra.md", "src/deep", again.format(workdir)]
    train, _ = make_dataset(*paths, "--pattern=*.py", "--val=src/000.txt")
    assert train == [b"print()\n", b"# extra\n"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=repr)
@pytest.mark.parametrize("separator", ["<|endoftext|>", "* * *", ""])
@pytest.mark.parametrize("block", [24, 40, 1 << 16])
def test_separator_lines_part_documents(workdir, monkeypatch, separator, line_end, block):
    """A line that is the separator, and no other, ends a document, which is stripped."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    documents = [f" Story {i}\n  with {separator} inside\n{i}." for i in range(20)]
    Path("a.txt").write_text(f"\n{separator}\n\n".join(documents), newline=line_end)
    Path("b.txt").write_text("val")
    train, _ = make_dataset("a.txt", "--val=b.txt", f"--separator={separator}")
    assert train == [text.strip().replace("\n", line_end).encode() for text in documents]


def test_copies_of_a_document_are_in_the_same_split(workdir):
    """No text that is trained on is validated on, whatever its file is called."""
    for i, text in enumerate(make_corpus(workdir / "text")):
        Path(f"text/copy-{200 - i}.txt").write_text(text)
    train, val = make_dataset("text")
    assert len(train + val) == 240
    assert set(train).isdisjoint(val)


def test_many_documents_in_one_file_are_split_by_checksum(workdir):
    """About a tenth of them is val, from anywhere in the file."""
    texts = [f"Document {i * 7919}.".encode() for i in range(100)]
    Path("a.txt").write_bytes(b"\n---\n".join(texts))
    train, val = make_dataset("a.txt", "--separator=---")
    assert sorted(train + val) == sorted(texts)
    assert 3 <= len(val) <= 20
    assert train + val != texts


def test_empty_documents_do_not_count_as_documents(workdir):
    """A few texts are cut, however many empty documents are between them."""
    Path("a.txt").write_text("---\n" * 200 + "one\ntwo\nthree\nfour\n")
    assert make_dataset("a.txt", "--separator=---") == [[b"one\ntwo\nthree\n"], [b"four"]]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.75, 0.99])
@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("block", [7, 1 << 16])
def test_fewer_than_100_documents_are_cut_once(workdir, monkeypatch, fraction, files, block):
    """Val begins at a line, val_fraction before the end; every byte is there, in order."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    names = [f"{i}.txt" for i in range(files)]
    for name in names:
        Path(name).write_text("".join(f"línea {i}\n" for i in range(400 // files)))
    text = b"".join(Path(name).read_bytes() for name in names)
    train, val = make_dataset(*names, f"--val_fraction={fraction}")
    assert b"".join(train + val) == text
    assert len(train + val) <= files + 1
    assert val[0].startswith("lí".encode())
    assert sum(map(len, val)) == pytest.approx(fraction * len(text) + 5.5, abs=6)


def test_text_without_line_ends_is_cut_between_blocks(workdir, monkeypatch):
    """Where no line ends, the cut is between two characters."""
    monkeypatch.setattr(prepare, "BLOCK", 50)
    Path("a.txt").write_text("日" * 1000)
    assert make_dataset("a.txt") == [["日".encode() * 900], ["日".encode() * 100]]


@pytest.mark.parametrize("val", ["val", "val/007.txt", "text/../val", "{}/val"])
@pytest.mark.parametrize("documents", [9, 150])
def test_val_is_what_is_named_as_such(workdir, val, documents):
    """--val takes a file or a folder, however it is spelled, and leaves it out of train."""
    texts = make_corpus(workdir / "text", documents)
    Path("val").mkdir()
    Path("val/007.txt").write_text("val\n")
    train, documents_of_val = make_dataset(".", "--val", val.format(workdir))
    assert train == [text.encode() for text in texts]
    assert documents_of_val == [b"val\n"]


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
        ("text does not exist, or has no *.md in it", ["text", "--pattern=*.md"]),
        ("--val_fraction must lie between 0 and 1, got nan", ["text", "--val_fraction=nan"]),
        ("encoding 'byte'", ["text", "--encoding=byte"]),
        ("give your text a --name", ["text", "--name=../up"]),
    ],
    ids=str,
)
def test_bad_input_is_refused_and_overwrites_nothing(corpus, refused, message, arguments):
    """It is answered in one line, and all that was in data/ stays as it was."""
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    before = snapshot("data")
    refused(message, prepare, "--name=tiny", "--encoding=bytes", *arguments)
    assert snapshot("data") == before


@pytest.mark.parametrize(
    ("message", "get_encoding"),
    [
        ("'gpt2' has no <|endoftext|>", lambda name: make_encoding(BYTES, {})),
        ("'gpt2' (no network): is TIKTOKEN_CACHE_DIR set?", no_network),
    ],
)
def test_an_encoding_that_is_of_no_use_is_refused(
    corpus, refused, monkeypatch, message, get_encoding
):
    """It must be there, and have a token for the end of a document."""
    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    refused(message, prepare, "text", "--name=own")


def test_opening_a_dataset_needs_neither_encoding_nor_network(corpus, merging, monkeypatch):
    """Its meta.json says all that there is to know."""
    make_dataset("text", encoding="gpt2")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    meta, train, val = prepare.open_dataset("own")
    assert meta["vocab_size"] == 70_002
    assert train[-1] == val[-1] == 70_000


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("meta.json", Path.unlink),
        ("meta.json", lambda path: path.write_bytes(b"[]")),
        ("meta.json", lambda path: path.write_bytes(b"\xff")),
        ("meta.json", lambda path: path.write_text(path.read_text().replace("int16", "int32"))),
        ("meta.json", lambda path: path.write_text(path.read_text().replace("int16", "inch"))),
        ("meta.json", lambda path: path.write_text(path.read_text().replace("token", "taken"))),
        ("train.bin", Path.unlink),
        ("train.bin", lambda path: os.truncate(path, 0)),
        ("train.bin", lambda path: os.truncate(path, 1000)),
        ("val.bin", lambda path: os.truncate(path, 999)),
        ("val.bin", lambda path: os.truncate(path, 1000)),
    ],
)
@pytest.mark.parametrize(("dataset", "what"), [("own", "FILES --name own"), ("stdlib", "stdlib")])
def test_a_damaged_dataset_is_noticed(corpus, name, damage, dataset, what):
    """The message has the command that makes it anew."""
    Path("data/tiny").rename(f"data/{dataset}")
    damage(Path("data", dataset, name))
    with pytest.raises(prepare.UserError, match=rf"data/{dataset} .*: python prepare.py {what}$"):
        prepare.open_dataset(dataset)


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=repr)
def test_the_old_dataset_is_complete_until_the_new_one_is(corpus, monkeypatch, error):
    """An error after the last token was written leaves data/ as it was."""
    write_bins = prepare.write_bins

    def write_and_fail(*arguments):
        write_bins(*arguments)
        raise error

    before = snapshot("data")
    monkeypatch.setattr(prepare, "write_bins", write_and_fail)
    with pytest.raises(type(error)):
        prepare.main(["text", "--name=tiny", "--encoding=bytes", "--val_fraction=0.5"])
    assert snapshot("data") == before


KILLED = """
import itertools, os, pathlib, shutil, sys
import prepare

def kill(*arguments, **options):
    if next(calls) == int(moment):
        os.kill(os.getpid(), 9)
    return function(*arguments, **options)

calls = itertools.count(1)
module, name, moment = sys.argv[1].split()
owner = {"prepare": prepare, "Path": pathlib.Path, "shutil": shutil}[module]
function = getattr(owner, name)
setattr(owner, name, kill)
prepare.main(["new", "--name=own", "--encoding=bytes"])
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("prepare read_blocks 200", "old"),
        ("prepare file_sha256 2", "old"),
        ("Path write_text 1", "old"),
        ("Path rename 1", "old"),
        ("Path rename 2", "nothing"),
        ("shutil rmtree 1", "new"),
    ],
)
def test_killed_at_any_moment(workdir, moment, left):
    """kill -9 leaves the old dataset, or none, or the new one; the next run finishes."""
    make_corpus(workdir / "old", 99)
    make_corpus(workdir / "new", 120)
    datasets = {"nothing": {}}
    for folder in ("new", "old"):
        make_dataset(folder)
        datasets[folder] = snapshot("data/own")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLED, moment]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    assert snapshot("data/own") == datasets[left]
    make_dataset("new")
    assert snapshot("data/own") == datasets["new"]


def test_atomic_write_replaces_a_file_when_all_is_written(workdir):
    """Until then, whoever reads the file reads what was there before."""
    path = Path("file")
    path.write_text("old")
    with prepare.atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert snapshot(".") == {path: b"new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_after_an_error(workdir, error):
    """Nor does it leave another file."""
    path = Path("file")
    path.write_text("old")
    with pytest.raises(error), prepare.atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert snapshot(".") == {path: b"old"}
