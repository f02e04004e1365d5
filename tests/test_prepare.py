"""prepare.py: nothing lost, nothing in both splits, nothing half-written, and clear answers to bad input."""

import errno
import hashlib
import http.server
import io
import itertools
import os
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiktoken

import prepare
from tests.conftest import make_corpus

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(prepare.__file__).parent), "PYTHONIOENCODING": "ascii"}


def read(name: str, encoding: str = "bytes") -> dict[str, list[bytes]]:
    encoding, dataset, documents = prepare.get_encoding(encoding), prepare.open_dataset(name), {}
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        *parts, rest = np.split(tokens, np.flatnonzero(tokens == encoding.eot_token) + 1)
        assert len(rest) == 0, "<|endoftext|> comes last"
        documents[split] = [encoding.decode_bytes(part[:-1].tolist()) for part in parts]
    return documents


def snapshot(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["bytes", "gpt2"])
def encoding(request):
    """The byte encoding, and gpt2's where its vocabulary can be had: in tiktoken's cache, or over the network."""
    try:
        return prepare.get_encoding(request.param)
    except ValueError as error:
        pytest.skip(str(error))


def test_every_document_comes_back_exactly_once(corpus, monkeypatch):
    """Each is in one split, whole; meta.json counts them; nothing depends on the threads, or on how much they get."""
    documents, meta, before = read("tiny"), prepare.open_dataset("tiny").meta, snapshot(prepare.DATA)
    assert sorted(documents["train"] + documents["val"]) == sorted(text.encode() for text in corpus)
    assert 4 <= len(documents["val"]) <= 24, "about a tenth of 120"
    for split, texts in documents.items():
        n, size = len(texts), sum(map(len, texts))
        checksum = hashlib.sha256(Path(f"data/tiny/{split}.bin").read_bytes()).hexdigest()
        assert meta["splits"][split] == {"documents": n, "bytes": size, "tokens": size + n, "sha256": checksum}
    assert (meta["encoding"], meta["vocab_size"], meta["dtype"]) == ("bytes", 257, "uint16")
    assert (meta["name"], meta["source"], meta["seed"], meta["val_fraction"]) == ("tiny", "text", 1337, 0.1)
    for workers, group in itertools.product((1, 2, 4), (1, 7, 1000)):
        monkeypatch.setattr(prepare, "GROUP", group)
        prepare.prepare(["text"], name="tiny", encoding="bytes", workers=workers)
        assert snapshot(prepare.DATA) == before


def test_split_depends_on_seed_and_contents_only(workdir):
    """The same seed gives the same split wherever a document lies, of a copy too; another seed another one."""
    for i, text in enumerate(make_corpus(workdir / "text")):
        (workdir / "text" / f"copy-{200 - i}.txt").write_bytes(text.encode())
    make_corpus(workdir / "other")
    for name, folder, seed in (("a", "text", 1), ("b", "other", 1), ("c", "other", 2)):
        prepare.prepare([folder], name=name, encoding="bytes", seed=seed)
    assert sorted(read("a")["val"]) == sorted(2 * read("b")["val"])
    assert set(read("b")["val"]) != set(read("c")["val"])


def test_fewer_than_100_documents_are_cut_once(workdir, monkeypatch):
    """Val is val_fraction of the bytes and begins at a line; every byte is there, in order; nothing else is cut."""
    parts = ["".join(f"línea {i:03}\n" for i in range(100 * part, 100 * part + 100)) for part in range(4)]
    for name, text in (*zip("0123", parts, strict=True), ("all", "".join(parts)), ("line", "日" * 1000)):
        Path(f"{name}.txt").write_bytes(text.encode())
    for names, fraction in itertools.product((["0", "1", "2", "3"], ["all"]), (0.01, 0.1, 0.3, 0.75, 0.99)):
        prepare.prepare([f"{name}.txt" for name in names], name="few", encoding="bytes", val_fraction=fraction)
        documents = read("few")
        whole, val = b"".join(documents["train"] + documents["val"]), b"".join(documents["val"])
        assert whole == "".join(parts).encode() and len(val) == pytest.approx(fraction * len(whole), abs=11)
        assert len(documents["train"] + documents["val"]) <= len(names) + 1
        assert all(text.endswith(b"\n") for text in documents["train"])
    monkeypatch.setattr(prepare, "BLOCK", 50)  # 300 bytes in a block of a long line, 2,701 bytes for train
    prepare.prepare(["line.txt"], name="line", encoding="bytes", val_fraction=0.0996)
    assert [len(text.decode()) for (text,) in read("line").values()] == [901, 99], "no line end: after a character"


def test_tokens_are_tiktokens_own(workdir, encoding, monkeypatch):
    """Documents, read in one block or in many, decode to their text; in one block their ids are those of tiktoken."""
    words = ["it's", "  two", "\n\n", "日本。", " 😀", "end.\n", "x" * 40, "\t", "don't\n    indented", "<|endoftext|>"]
    long = " ".join(np.random.default_rng(0).choice(words, 3000)) + "é😀" * 999 + "\r\n\n"
    texts = [long, "\ufeff", "x <|endoftext|>", *(f"short {i}" for i in range(100)), *[""] * 50]
    for i, text in enumerate(texts):
        Path(f"{i}.txt").write_bytes(text.encode())
    for block in (1, 50, 333, 1 << 20):
        monkeypatch.setattr(prepare, "BLOCK", block)
        blocks = [text for text, _ in prepare.read_blocks(Path("0.txt"))]
        assert all(len(text) == 2 * block or (len(text) < 2 * block and text[-1] == "\n") for text in blocks)
        meta = prepare.prepare(["."], name="own", encoding=encoding.name, val_fraction=0.5)
        documents = read("own", encoding.name)
        assert sorted(documents["train"] + documents["val"]) == sorted(text.encode() for text in texts if text)
        assert [meta["splits"][split]["documents"] for split in prepare.SPLITS] == list(map(len, documents.values()))
    for split, tokens in (("train", prepare.open_dataset("own").train), ("val", prepare.open_dataset("own").val)):
        own = ([*encoding.encode_ordinary(text.decode()), encoding.eot_token] for text in documents[split])
        assert tokens.tolist() == list(itertools.chain(*own)) and tokens.dtype == np.uint16


def test_large_vocabulary(workdir, monkeypatch):
    """Ids beyond 65,535 are not cut off, and no special token (cl100k_base has more) is taken for more than text."""
    special, ranks = {"<|endoftext|>": 70_000, "<|fim_prefix|>": 70_001}, {bytes([i]): i for i in range(256)}
    wide = tiktoken.Encoding("wide", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(prepare, "get_encoding", lambda name: wide)
    Path("a.txt").write_text("<|fim_prefix|><|endoftext|>\n" * 9)
    assert prepare.prepare(["a.txt"], name="a")["dtype"] == "uint32"
    assert read("a")["train"] == [b"<|fim_prefix|><|endoftext|>\n" * 8]


def test_files_folders_and_patterns(workdir, call):
    """Folders are searched for --pattern, files are taken as they are, none twice."""
    make_corpus(workdir / "src", 3)
    (workdir / "src" / "code.py").write_text("print('hello')\n" * 20)
    (workdir / "extra.md").write_text("# extra\n")
    status, out, error = call(prepare, ".", "--encoding=bytes", "--pattern=*.py", "--name=py")
    assert status == 0 and re.search(r"train +1 +270 +90.0%.*\nval +1 +30 +10.0%", out), error
    assert call(prepare, "src", "extra.md", "src/000.txt", "--encoding=bytes", "--name=src")[0] == 0
    assert sum(map(len, read("src").values())) == 4 + 1


def test_streams(workdir):
    """A FIFO and a pipe are read once, to their end, and give what a file with the same text gives."""
    Path("plain.txt").write_text("".join(f"line {i}\n" for i in range(50_000)))
    prepare.prepare(["plain.txt"], name="plain", encoding="bytes")
    os.mkfifo("fifo")
    for path, writer in (("fifo", "cat plain.txt >fifo &"), ("<(cat plain.txt)", "")):
        command = f"{writer} {sys.executable} {prepare.__file__} {path} --name stream --encoding bytes"
        subprocess.run(["bash", "-c", command], check=True, capture_output=True)
        assert read("stream") == read("plain")
    assert Path("fifo").is_fifo() and sorted(os.listdir("data/stream")) == ["meta.json", "train.bin", "val.bin"]


def test_the_place_of_an_undecodable_byte(workdir, refused, monkeypatch):
    """The offset is that of the byte in the file, also far into it and where a character is cut by a block."""
    for size, block in ((9, 1), (8190, 4), (8191, 1 << 16), (8192, 100), (300_000, 1 << 16)):
        monkeypatch.setattr(prepare, "BLOCK", block)
        (workdir / "bad.txt").write_bytes("€".encode() + b"d" * size + b"\xe6\x97x" + b"e" * 9000)
        refused(f"bad.txt is not UTF-8 at offset {3 + size}", prepare, "bad.txt", "--name=bad", "--encoding=bytes")
    (workdir / "bad.txt").write_bytes("cut 日".encode()[:-1])
    refused("bad.txt is not UTF-8 at offset 4", prepare, "bad.txt", "--name=bad", "--encoding=bytes")


def test_stdlib_is_the_running_interpreters_own(call):
    """Real Python text without tests and installed packages, in bytes."""
    status, out, error = call(prepare, "stdlib")
    assert status == 0 and "standard library of Python 3." in out and "bytes encoding" in out, error
    texts = b"".join(itertools.chain(*read("stdlib").values()))
    assert 5e6 < len(texts) < 50e6 and b"class ArgumentParser" in texts
    assert b"class TestArgumentParser" not in texts and b"def parametrize" not in texts


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `mishaps` holds what goes wrong with the next requests for a path, in order."""

    def do_GET(self):
        server, body, mishap = self.server, self.server.files.get(self.path[1:]), next(self.server.mishaps, None)
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if server.ranges else 0
        server.requests.append(start)
        if body is None or isinstance(mishap, int):
            return self.send_error(mishap or 404)
        self.send_response(206 if server.ranges else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : (start + len(body)) // 2 if mishap == "cut" else None])

    log_message = mock.Mock()


@pytest.fixture
def publisher(monkeypatch):
    """A local HTTP server in the publisher's place."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        server.files, server.mishaps, server.requests, server.ranges = {}, iter(()), [], True
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(prepare, "RETRY_AFTER", [0.001] * 6)
        yield server
        server.shutdown()


BODY = bytes(range(256)) * 8000


@pytest.mark.parametrize("mishaps", [[], ["cut"] * 3, [503, "cut", 429, "cut"]], ids=str)
@pytest.mark.parametrize(("ranges", "left"), [(True, 0), (True, 1000), (True, len(BODY)), (False, 0), (False, 1000)])
def test_download_survives(publisher, workdir, mishaps, ranges, left):
    """The right bytes in the end, under their name only when whole; what had come, in earlier runs too, is kept."""
    publisher.files["f"], publisher.mishaps, publisher.ranges = BODY, iter(mishaps), ranges
    Path("f.tmp").write_bytes(BODY[:left])
    for _ in range(2):  # what is there is not fetched again
        prepare.download(f"{publisher.url}/f", Path("f"), hashlib.sha256(BODY).hexdigest())
        assert Path("f").read_bytes() == BODY and os.listdir() == ["f"] and len(publisher.requests) == len(mishaps) + 1
    expected = len(BODY) - (len(BODY) - left) * 0.5 ** mishaps.count("cut") if ranges else 0
    assert publisher.requests[-1] == pytest.approx(expected, abs=3)


def test_download_that_can_not_succeed(publisher, workdir):
    """A clear error that says how to do it by hand, at once where trying again can't help."""
    for body, mishaps, message, requests in (
        (None, [], "HTTP Error 404: ", 1),
        (BODY, [503] * 20, "HTTP Error 503: ", 7),
        (BODY, ["cut"] * 20, " bytes came; ", 7),
        (BODY[:-1] + b"!", [], "f has a wrong checksum: delete it", 1),
    ):
        publisher.files, publisher.mishaps, publisher.requests = {"f": body}, iter(mishaps), []
        with pytest.raises(ValueError, match=f"{message}.*start again, or fetch it by hand and save it as f"):
            prepare.download(f"{publisher.url}/f", Path("f"), hashlib.sha256(BODY).hexdigest())
        assert len(publisher.requests) == requests


def test_tinystories(publisher, refused, call, monkeypatch):
    """Stories are split at separator lines, stripped, and stay in their published split; no second download."""
    train = b"\nOnce upon a time.\n\nThe end.\n<|endoftext|>\n\n  Tom ran.\n<|endoftext|>\n<|endoftext|>\nA cut st"
    val = b"Lily <|endoftext|> smiled.\n<|endoftext|>\nBen ran.\n<|endoftext|>"
    publisher.files = {"t.txt": train, "v.txt": val}
    files = {"train": ("t.txt", hashlib.sha256(train).hexdigest()), "val": ("v.txt", hashlib.sha256(val).hexdigest())}
    monkeypatch.setattr(prepare, "TINYSTORIES", files)
    arguments = ("tinystories", "--encoding=bytes", f"--base_url={publisher.url}")
    for block in (1 << 16, 20, 1):
        monkeypatch.setattr(prepare, "BLOCK", block)
        assert call(prepare, *arguments)[0] == 0
        assert read("tinystories") == {
            "train": [b"Once upon a time.\n\nThe end.", b"Tom ran.", b"A cut st"],
            "val": [b"Lily <|endoftext|> smiled.", b"Ben ran."],
        }
        publisher.files.clear()
    Path("data/tinystories/raw/v.txt").unlink()
    message = "Connection refused>; start again, or fetch it by hand and save it as data/tinystories/raw/v.txt"
    refused(message, prepare, "tinystories", "--encoding=bytes", "--base_url=http://127.0.0.1:9")
    assert len(read("tinystories")["val"]) == 2, "the old dataset stays"


def tar(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        archive.add(".", recursive=False)  # a folder
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()


def test_openwebtext(publisher, refused, call, monkeypatch, workdir):
    """The archives' documents come back whole and in order, with nanoGPT's split; no path in them is written to."""
    for name, value in (("", ["0.tar", "1.tar"]), ("_DOCUMENTS", 8), ("_VAL", 2)):
        monkeypatch.setattr(prepare, f"OPENWEBTEXT{name}", value)
    pages = [{f"../../escape-{i}.txt": f"\n\nPage {i}\n\n\n\n日本 \n".encode()} for i in range(8)]
    subsets = [tar(pages[i] | pages[i + 1] | {"README": b""}, "w:xz") for i in range(0, 8, 2)]
    publisher.files = {f"{i}.tar": tar({"a.xz": subsets[2 * i], "b.xz": subsets[2 * i + 1]}, "w") for i in range(2)}
    arguments = ("openwebtext", "--encoding=bytes", f"--base_url={publisher.url}")
    with mock.patch.object(prepare.shutil, "disk_usage", return_value=mock.Mock(free=10**9)):
        refused("too little disk space for OpenWebText in data/", prepare, *arguments)
    status, out, error = call(prepare, *arguments)
    assert status == 0 and "OpenWebText needs 31.5 GB more" in out, error
    val = np.random.default_rng(2357).permutation(8)[:2]
    for split, numbers in (("train", [i for i in range(8) if i not in val]), ("val", sorted(val))):
        assert read("openwebtext")[split] == [f"Page {i}\n\n日本".encode() for i in numbers]
    assert not list(workdir.rglob("*escape*")) and not list(workdir.parent.glob("*escape*"))
    for contents, message in ((publisher.files["1.tar"][:1100], "is damaged"), (tar({}, "w"), "4 documents, not 8")):
        Path("data/openwebtext/raw/1.tar").write_bytes(contents)
        refused(message, prepare, *arguments)


def test_bad_input_is_refused_and_overwrites_nothing(corpus, refused, workdir, monkeypatch):
    """One line, status 2, and the dataset of that name that was there before stays as it was."""
    monkeypatch.setattr(prepare.tiktoken, "get_encoding", mock.Mock(side_effect=ConnectionError))  # no network
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    make_corpus(workdir / "stdlib", 1)
    before = snapshot(prepare.DATA)
    for message, *arguments in (
        ("there is no text for train", "/dev/null"),
        ("there is no text for val", "text", "--val_fraction=1e-9"),
        ("latin.txt is not UTF-8 at offset 3", "text", "latin.txt"),
        ("nowhere.txt does not exist", "nowhere.txt"),
        ("no file in data matches '*.txt'", "data"),
        ("no file in text matches '/abs*'", "text", "--pattern=/abs*"),
        ("--val_fraction must lie between 0 and 1, got nan", "text", "--val_fraction=nan"),
        ("invalid float value: 'x' (see python prepare.py --help)", "text", "--val_fraction=x"),
        ("unknown encoding 'byte'; choose bytes, gpt2", "text", "--encoding=byte"),
        ("(ConnectionError): use --encoding bytes, or set TIKTOKEN_CACHE_DIR", "text", "--encoding=cl100k_base"),
        ("invalid int value: '10**30'", "text", "--seed=10**30"),
        ("--workers must be at least 1, got 0", "text", "--workers=0"),
        ("--base_url is for tinystories and openwebtext", "text", "--base_url=http://x"),
        ("stdlib is a known dataset: prepare it alone, or take another --name", "text", "--name=stdlib"),
        ("not one of stdlib, tinystories, openwebtext; text of your own needs a --name", "tinystory", "--name="),
        ("'../up' can't be a --name", "text", "--name=../up"),
        ("arguments are required: NAME_OR_PATH",),
    ):
        refused(message, prepare, "--name=tiny", "--encoding=bytes", *arguments)
        assert snapshot(prepare.DATA) == before
    assert prepare.prepare(["text"], name="tiny", encoding="bytes", seed=10**300, workers=10**6)


def test_a_damaged_dataset_is_noticed(corpus):
    """Missing or truncated .bin, damaged or contradictory meta.json: each named, with the command that mends it."""
    path, bin = Path("data/tiny/meta.json"), Path("data/tiny/train.bin")
    meta, tokens = path.read_bytes(), bin.read_bytes()

    def noticed(message, name="tiny", mend="FILE_OR_FOLDER --name tiny"):
        with pytest.raises(ValueError, match=rf"'{name}' is not ready \(.*{message}.*\): run python prepare.py {mend}"):
            prepare.open_dataset(name)

    for contents in (b"", b"[]", b"{}", b"\xff", b"[" * 10**5, meta[:-40]):
        path.write_bytes(contents)
        noticed("")
    for old, new, message in (
        (b'"vocab_size": 257', b'"vocab_size": 300', "does not fit its encoding, bytes with .*257"),
        (b'"dtype": "uint16"', b'"dtype": "uint32"', "does not fit its encoding, bytes"),
        (b'"encoding": "bytes"', b'"encoding": "byte"', "unknown encoding 'byte'"),
        (b'"encoding": "bytes"', b'"encoding": ["bytes"]', "unhashable"),
        (b'"documents": ', b'"documents": -', "damaged"),
        (b'"bytes": ', b'"bytes": 1e', "damaged"),
        (b'"sha256": ', b'"sha256": 1, "x": ', "damaged"),
        (b'"sha256": ', b'"x": ', "sha256"),
    ):
        path.write_bytes(meta.replace(old, new))
        noticed(message)
    noticed("data/data/stdlib", name="data/stdlib", mend="stdlib")
    noticed("data/data/tiny", name="data/tiny")  # with the name that belongs into the command
    path.write_bytes(meta)
    bin.write_bytes(tokens[:-1])
    noticed(r"train.bin does not have [\d,]+ bytes")
    bin.unlink()
    noticed("No such file or directory: 'data/tiny/train.bin'")
    noticed("No such file or directory: 'data/stdlib/meta.json'", "stdlib", "stdlib$")


@pytest.mark.parametrize(("function", "moment"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("replace", 0)])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_full_disk_or_an_interruption(corpus, call, monkeypatch, function, moment, error):
    """One line that says what to do; the old dataset stays, nothing half-written is left."""
    before = snapshot(prepare.DATA)
    monkeypatch.setattr(prepare.os, function, mock.Mock(side_effect=[None] * moment + [error]))
    status, _, message = call(prepare, "text", "--name=tiny", "--encoding=bytes", "--seed=2")
    assert status == (2 if isinstance(error, OSError) else 130)
    assert re.search(r"\n(interrupted|error: no space left for .*data/tiny/.*: make room and start again)\n$", message)
    assert snapshot(prepare.DATA) == before and len(os.listdir("data/tiny")) == 3


def test_replacing(workdir):
    """A file is replaced when all is written; links stay links; what is no regular file is written to, not replaced."""
    path = Path("file").resolve()
    for contents in ("first", "zweite ✓"):
        with prepare.replacing(path, "w") as file:
            file.write(contents)
            assert not path.exists() or path.read_text() == "first"
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("torch.save's")):
        error.__context__ = OSError(errno.ENOSPC, "full")
        with pytest.raises(OSError, match=f"^no space left for {path}: make room"), prepare.replacing(path):
            raise error
    assert path.read_bytes() == "zweite ✓".encode() and os.listdir() == ["file"]
    os.symlink("file", "link")
    os.symlink("new", "dangling")
    os.mkfifo("fifo")
    with subprocess.Popen("cat fifo >received", shell=True):
        for name in ("link", "dangling", "fifo"):
            with prepare.replacing(Path(name)) as file:
                file.write(b"here")
    assert all(Path(name).read_bytes() == b"here" for name in ("file", "new", "received"))
    assert Path("link").is_symlink() and Path("dangling").is_symlink() and Path("fifo").is_fifo()
    assert sorted(os.listdir()) == ["dangling", "fifo", "file", "link", "new", "received"]


KILLED = """
import itertools, os, prepare
prepare.GROUP, moments = 1, itertools.count(1)
def before(function):
    def call(*arguments, **options):
        return os.kill(os.getpid(), 9) if next(moments) == {moment} else function(*arguments, **options)
    return call
prepare.hashlib.blake2b, os.replace = before(prepare.hashlib.blake2b), before(os.replace)
prepare.prepare(["text"], name="killed", encoding="bytes", seed=2)
"""


def test_killed_at_any_moment(workdir):
    """kill -9 between any two steps leaves the old dataset or none, and the next run finishes; leftovers are named."""
    make_corpus(workdir / "text")
    new, old = (prepare.prepare(["text"], name="killed", encoding="bytes", seed=seed) for seed in (2, 1))
    for moment in (os.urandom(1)[0] % 120 + 1, *range(121, 127)):  # 120 hashes, then six files are renamed
        code = KILLED.format(moment=moment)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT)
        assert result.returncode == -9
        assert Path("data/killed/meta.json").exists() == (moment < 124)  # the last three go to where the old ones were
        assert moment >= 124 or prepare.open_dataset("killed").meta == old
    assert b"was left by a run that was killed" in result.stdout
    assert prepare.prepare(["text"], name="killed", encoding="bytes", seed=2) == new


@pytest.mark.parametrize(("redirection", "status"), [("| false", 1), (">&-", 0), (">&- 2>&-", 0), ("2>&-", 0)])
def test_output_that_nobody_reads(workdir, redirection, status):
    """A closed stdout or stderr, a pipe without a reader, a terminal of ASCII only: no traceback, nor controls."""
    assert prepare.visible("a\x1b[1m\x07\r\x7f\x9b\x00\x0b") == r"a\x1b[1m\x07\x0d\x7f\x9b\x00\x0b"
    assert prepare.visible("tab\tnewline\n é 日 😀 \xa0") == "tab\tnewline\n é 日 😀 \xa0"
    make_corpus(workdir / "日本")
    command = f"PYTHONUNBUFFERED= {sys.executable} {prepare.__file__} 日本 --encoding=bytes --name=x {redirection}"
    command += "; exit ${PIPESTATUS[0]}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, env=ENVIRONMENT)
    assert result.returncode == status and b"Error" not in result.stderr, result.stderr
    assert prepare.open_dataset("x").meta["source"] == "日本"
