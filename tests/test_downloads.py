"""prepare.py downloads published texts whole, and splits them as they were published."""

import http.server
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import prepare
from tests.test_data import read_dataset

BODY = b"0123456789abcdef" * 20_000
STORIES = b"\nOnce.\n\nThe end.\n<|endoftext|>\n\n  Tom <|endoftext|> ran.\n<|endoftext|>\nA cut st"


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves the server's files; its mishaps are what goes wrong with the next requests."""

    def do_GET(self):
        body = self.server.files.get(self.path.split("/")[-1])
        mishap = next(self.server.mishaps, "")
        start = 0 if "whole" in mishap else int(self.headers["Range"][len("bytes=") : -len("-")])
        self.server.requests.append(start)
        if body is None or mishap == "503":
            return self.send_error(503)
        if start >= len(body):
            return self.send_error(416)
        self.send_response(200 if "whole" in mishap else 206)
        if mishap != "unsized":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:].swapcase() if mishap == "wrong" else body[start:]
        self.wfile.write(rest[: len(rest) // 2] if "cut" in mishap else rest)

    log_message = print


@pytest.fixture
def publisher(monkeypatch):
    """A local server in the place of those from which texts are downloaded."""
    monkeypatch.setattr(prepare, "PAUSES", [0.001] * 7)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        server.files = {"f": BODY}
        server.mishaps = iter([])
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        for name in ("SHAKESPEARE_URL", "TINYSTORIES_URL", "OPENWEBTEXT_URL"):
            monkeypatch.setattr(prepare, name, server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("left", [0, 1000, len(BODY), len(BODY) + 1])
@pytest.mark.parametrize("mishaps", ["503 cut 503 cut", "whole-cut 503 whole", "unsized " * 7])
def test_downloads_survive(publisher, left, mishaps):
    """The file is whole in the end, whatever an earlier run left; it is not fetched again."""
    publisher.mishaps = iter(mishaps.split())
    Path("data/downloads").mkdir(parents=True)
    Path("data/downloads/f.partial").write_bytes((BODY + b"!")[:left])
    for _ in range(2):
        path = prepare.download(f"{publisher.url}/f")
        publisher.files.clear()
        assert path.read_bytes() == BODY
        assert list(Path("data/downloads").iterdir()) == [path]


def test_a_download_goes_on_where_it_was_cut_and_a_wrong_one_begins_afresh(publisher):
    """What has come is asked for again only if the checksum is not the published one."""
    publisher.mishaps = iter(["cut", "503", "cut", "wrong"])
    assert prepare.download(f"{publisher.url}/f", sha256(BODY).hexdigest()).read_bytes() == BODY
    assert publisher.requests == [0, 160_000, 160_000, 240_000, 0]


@pytest.mark.parametrize("mishap", ["503", "cut", "wrong"])
def test_a_download_that_cannot_succeed_is_refused(publisher, mishap):
    """After seven attempts it says how to fetch the file by hand, and accepts no other."""
    publisher.mishaps = iter([mishap] * 7)
    with pytest.raises(prepare.UserError, match=r"by hand, as data/downloads/f$"):
        prepare.download(f"{publisher.url}/f", sha256(BODY).hexdigest())
    assert len(publisher.requests) == 7
    assert not Path("data/downloads/f").exists()


def test_shakespeare_is_split_as_in_nanogpt(publisher, monkeypatch):
    """Train is int(0.9 * n) characters, as many as these are for the n of the real text."""
    text = (b"First Citizen:\n" * 80_000)[:1_115_394]
    monkeypatch.setattr(prepare, "SHAKESPEARE_SHA256", sha256(text).hexdigest())
    publisher.files = {"input.txt": text}
    prepare.main(["shakespeare"])
    assert read_dataset("shakespeare") == [[text[:1_003_854]], [text[1_003_854:]]]


def test_tinystories_have_their_published_split(publisher, monkeypatch):
    """Stories are what is between separator lines, stripped."""
    monkeypatch.setattr(prepare, "TINYSTORIES_TRAIN_SHA256", sha256(STORIES).hexdigest())
    monkeypatch.setattr(prepare, "TINYSTORIES_VAL_SHA256", sha256(b"Val.").hexdigest())
    publisher.files["TinyStoriesV2-GPT4-train.txt"] = STORIES
    publisher.files["TinyStoriesV2-GPT4-valid.txt"] = b"Val."
    prepare.main(["tinystories", "--encoding=bytes"])
    train = [b"Once.\n\nThe end.", b"Tom <|endoftext|> ran.", b"A cut st"]
    assert read_dataset("tinystories") == [train, [b"Val."]]


def test_openwebtext_has_the_split_of_nanogpt(publisher, refused, monkeypatch):
    """Pages in archives in 21 archives come back in order, unless one is missing."""
    Path("pages").mkdir()
    for i in range(21):
        Path("pages/a.txt").write_text(f"\n\nPage {2 * i}\n\n\n\n日本 \n")
        Path("pages/b.txt").write_text(f"\n\nPage {2 * i + 1}\n\n\n\n日本 \n")
        shutil.make_archive("subsets/subset", "xztar", "pages")
        archive = shutil.make_archive("archive", "tar", "subsets")
        publisher.files[f"urlsf_subset{i:02}.tar"] = Path(archive).read_bytes()
    refused("42 documents came, not 8,013,769", prepare, "openwebtext", "--encoding=bytes")
    monkeypatch.setattr(prepare, "OPENWEBTEXT_VAL", 5)
    monkeypatch.setattr(prepare, "OPENWEBTEXT_DOCUMENTS", 42)
    prepare.main(["openwebtext", "--encoding=bytes"])
    order = np.random.default_rng(2357).permutation(42)
    pages = [f"Page {i}\n\n日本".encode() for i in range(42)]
    train = [pages[i] for i in sorted(order[5:])]
    val = [pages[i] for i in sorted(order[:5])]
    assert read_dataset("openwebtext") == [train, val]
