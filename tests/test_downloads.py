"""prepare.py downloads published texts whole, and splits them as they were published."""

import hashlib
import http.server
import io
import os
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

import prepare
from tests.conftest import REPOSITORY
from tests.test_data import read_dataset

SHAKESPEARE = REPOSITORY.parent / "shared/data/shakespeare/input.txt"
BODY = b"0123456789abcdef" * 20_000
TINYSTORIES = b"""
Once.

The end.
<|endoftext|>

  Tom <|endoftext|> ran.
<|endoftext|>
<|endoftext|>
A cut st"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves the server's files; its mishaps are what goes wrong with the next requests."""

    def do_GET(self):
        server = self.server
        body = server.files.get(self.path.split("/")[-1])
        mishap = server.mishaps.pop(0) if server.mishaps else ""
        requested = self.headers["Range"] or "bytes=0-"
        start = int(re.sub(r"\D", "", requested)) if server.knows_ranges else 0
        server.requests.append(start)
        if body is None or mishap.isdigit():
            return self.send_error(int(mishap or 404))
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if server.knows_ranges else 200)
        if mishap != "unsized":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:].swapcase() if mishap == "wrong" else body[start:]
        self.wfile.write(rest[: len(rest) // 2] if mishap == "cut" else rest)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def publisher(monkeypatch):
    """A local server in the place of those from which texts are downloaded."""
    monkeypatch.setattr(prepare, "PAUSES", [0.001] * 7)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        server.files = {"f": BODY}
        server.mishaps = []
        server.requests = []
        server.knows_ranges = True
        server.url = f"http://127.0.0.1:{server.server_port}"
        for name in ("SHAKESPEARE_URL", "TINYSTORIES_URL", "OPENWEBTEXT_URL"):
            monkeypatch.setattr(prepare, name, server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("left", [0, 1000, len(BODY), len(BODY) + 1])
@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("mishaps", ["", "unsized " * 7, "cut cut cut", "503 cut 429 cut"])
def test_downloads_survive(publisher, left, knows_ranges, mishaps):
    """The file is whole in the end, whatever an earlier run left; it is not fetched again."""
    publisher.mishaps = mishaps.split()
    publisher.knows_ranges = knows_ranges
    Path("data/downloads").mkdir(parents=True)
    Path("data/downloads/f.partial").write_bytes((BODY + b"!")[:left])
    for _ in range(2):
        path = prepare.download(f"{publisher.url}/f")
        publisher.files.clear()
        assert path.read_bytes() == BODY
        assert os.listdir("data/downloads") == ["f"]


def test_a_download_goes_on_where_it_was_cut(publisher):
    """What has come is not asked for again."""
    publisher.mishaps = ["cut", "503", "cut"]
    prepare.download(f"{publisher.url}/f", sha256(BODY))
    assert publisher.requests == [0, 160_000, 160_000, 240_000]


@pytest.mark.parametrize("mishaps", ["wrong", "cut wrong"])
def test_a_wrong_file_is_fetched_afresh(publisher, mishaps):
    """Where the checksum is not that of the published file, nothing of it is kept."""
    publisher.mishaps = mishaps.split()
    path = prepare.download(f"{publisher.url}/f", sha256(BODY))
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("body", [None, BODY, BODY[:-1] + b"!"], ids=["none", "cut", "wrong"])
def test_a_download_that_cannot_succeed_is_refused(publisher, body):
    """After seven attempts it says how to fetch the file by hand, and accepts no other."""
    publisher.files = {"f": body}
    publisher.mishaps = ["cut"] * 7 if body == BODY else []
    with pytest.raises(prepare.UserError, match=r"by hand, as data/downloads/f$"):
        prepare.download(f"{publisher.url}/f", sha256(BODY))
    assert len(publisher.requests) == 7
    assert not Path("data/downloads/f").exists()


def test_shakespeare_is_split_as_in_nanogpt(publisher, monkeypatch):
    """Train is int(0.9 * n) characters, val the rest; a public clone lacks the real text."""
    text = (b"First Citizen:\n" * 80_000)[:1_115_394]
    if SHAKESPEARE.exists():
        text = SHAKESPEARE.read_bytes()
    else:
        monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", sha256(text))
    publisher.files = {"input.txt": text}
    prepare.main(["shakespeare"])
    assert read_dataset("shakespeare") == [[text[:1_003_854]], [text[1_003_854:]]]


@pytest.mark.parametrize("block", [20, 1 << 16])
def test_tinystories_have_their_published_split(publisher, monkeypatch, block):
    """Stories are what is between separator lines, stripped."""
    monkeypatch.setattr(prepare, "BLOCK", block)
    monkeypatch.setattr(prepare, "TINYSTORIES_TRAIN_SHA256", sha256(TINYSTORIES))
    monkeypatch.setattr(prepare, "TINYSTORIES_VAL_SHA256", sha256(b"Val.\n<|endoftext|>"))
    publisher.files["TinyStoriesV2-GPT4-train.txt"] = TINYSTORIES
    publisher.files["TinyStoriesV2-GPT4-valid.txt"] = b"Val.\n<|endoftext|>"
    prepare.main(["tinystories", "--encoding=bytes"])
    train, val = read_dataset("tinystories")
    assert train == [b"Once.\n\nThe end.", b"Tom <|endoftext|> ran.", b"A cut st"]
    assert val == [b"Val."]


def make_archive(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        archive.add(".", recursive=False)  # a folder
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()


@pytest.fixture
def openwebtext(publisher, workdir, monkeypatch):
    """21 archives with two archives of a page each; all names in them are dangerous."""
    Path("deep/folder").mkdir(parents=True)
    monkeypatch.chdir("deep/folder")
    monkeypatch.setattr(prepare, "OPENWEBTEXT_DOCUMENTS", 42)
    monkeypatch.setattr(prepare, "OPENWEBTEXT_VAL", 5)
    for i in range(21):
        subsets = {}
        for j in (2 * i, 2 * i + 1):
            page = f"\n\nPage {j}\n\n\n\n日本 \n".encode()
            files = {f"../../escape-{j}.txt": page, "README": b"no page"}
            subsets[f"../../escape-{j}.xz"] = make_archive(files, "w:xz")
        publisher.files[f"urlsf_subset{i:02}.tar"] = make_archive(subsets, "w")


def test_openwebtext_has_the_split_of_nanogpt(openwebtext, workdir):
    """Its pages come back in order, and the names in its archives are never used as paths."""
    prepare.main(["openwebtext", "--encoding=bytes"])
    order = np.random.default_rng(2357).permutation(42)
    pages = [f"Page {i}\n\n日本".encode() for i in range(42)]
    train = [pages[i] for i in sorted(order[5:])]
    val = [pages[i] for i in sorted(order[:5])]
    assert read_dataset("openwebtext") == [train, val]
    assert not list(workdir.rglob("escape*"))


def test_an_incomplete_openwebtext_is_refused(openwebtext, refused, monkeypatch):
    """Where documents are missing, the split would not be the published one."""
    monkeypatch.setattr(prepare, "OPENWEBTEXT_DOCUMENTS", 43)
    message = "42 documents came, not 43"
    refused(message, prepare, "openwebtext", "--encoding=bytes")
