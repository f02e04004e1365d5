"""prepare.py downloads published texts whole, and splits them as they were published."""

import http.server
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import prepare
from tests.helpers import assert_refused, read_dataset

BODY = b"0123456789abcdef" * 20_000
SHA256 = sha256(BODY).hexdigest()
SHAKESPEARE = "input.txt"
TRAIN_STORIES = "TinyStoriesV2-GPT4-train.txt"
VAL_STORIES = "TinyStoriesV2-GPT4-valid.txt"
STORIES = b"\nOnce.\n\nThe end.\n<|endoftext|>\n\n  Tom <|endoftext|> ran.\n<|endoftext|>\nA cut st"


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves BODY, whatever is asked for; the server's mishap is what goes wrong."""

    log_message = print

    def do_GET(self):
        mishap = self.server.mishap
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.server.starts.append(start)
        if mishap == "503" or start >= len(BODY):
            return self.send_error(503 if mishap == "503" else 416)
        if mishap == "no HTTP":
            return self.wfile.write(b"What?")
        rest = BODY if mishap == "no ranges" else BODY[start:]
        self.send_response(200 if mishap == "no ranges" else 206)
        if mishap != "no length":
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if mishap == "cut":
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest.swapcase() if mishap == "wrong" else rest)


@pytest.fixture
def publisher(monkeypatch):
    """A server on this machine, in the place of those from which texts are downloaded."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        server.mishap = ""
        server.starts = []  # of the ranges that were asked for
        server.url = f"http://127.0.0.1:{server.server_port}/f"
        monkeypatch.setattr(prepare, "CHAR_RNN", server.url)
        monkeypatch.setattr(prepare, "TINYSTORIES", server.url)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def leave(files: dict[str, bytes]) -> None:
    """Write files to where earlier downloads are."""
    Path("data/downloads").mkdir(parents=True)
    for name, contents in files.items():
        Path("data/downloads", name).write_bytes(contents)


def fetch(arguments: list[str]) -> bytes:
    """Download a file, and check that there is nothing else in the folder afterwards."""
    path = prepare.download(*arguments)
    assert list(Path("data/downloads").iterdir()) == [path]
    return path.read_bytes()


@pytest.mark.parametrize("left", [0, 1, 1000, len(BODY)])
@pytest.mark.parametrize("mishap", ["", "no ranges", "no length"])
def test_a_download_continues_where_an_earlier_one_ended(publisher, mishap, left):
    """Only its last byte is asked for twice; the file is whole, whatever the server can do."""
    publisher.mishap = mishap
    leave({"f.partial": BODY[:left]})
    assert fetch([publisher.url, SHA256]) == BODY
    assert publisher.starts == [max(0, left - 1)]


@pytest.mark.parametrize(
    ("mishap", "start"), [("503", 0), ("no HTTP", 0), ("cut", len(BODY) // 2 - 1), ("wrong", 0)]
)
def test_a_download_that_fails_is_to_be_run_again(publisher, mishap, start):
    """The next run uses what has come, unless its checksum is wrong."""
    publisher.mishap = mishap
    assert_refused(fetch, [publisher.url, SHA256], "run the command again")
    assert not Path("data/downloads/f").exists()
    publisher.mishap = ""
    assert fetch([publisher.url, SHA256]) == BODY
    assert publisher.starts == [0, start]


def test_a_partial_file_that_is_too_long_is_named(publisher):
    """The error says which file to delete."""
    leave({"f.partial": BODY + b"!"})
    assert_refused(fetch, [publisher.url, SHA256], "delete data/downloads/f.partial")


def test_a_file_that_is_there_is_not_fetched_again(publisher):
    """It is used even when its server is down."""
    publisher.mishap = "503"
    leave({"f": b"here"})
    assert fetch([publisher.url, SHA256]) == b"here"


@pytest.mark.parametrize("file", [SHAKESPEARE, TRAIN_STORIES, VAL_STORIES])
def test_another_text_than_the_published_one_is_refused(publisher, file):
    """What comes in its place has a wrong checksum."""
    others = {SHAKESPEARE, TRAIN_STORIES, VAL_STORIES} - {file}
    leave(dict.fromkeys(others, b"text"))
    name = "shakespeare" if file == SHAKESPEARE else "tinystories"
    arguments = [name, "--encoding=bytes"]
    assert_refused(prepare.main, arguments, f"{file} came with a wrong checksum")


def test_an_encoding_that_cannot_be_downloaded_is_refused(workdir, monkeypatch):
    """Without a network, the error is one line, and not a traceback of tiktoken's."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(workdir))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    Path("a.txt").write_text("some text")
    arguments = ["a.txt", "--name=own", "--encoding=p50k_edit"]
    assert_refused(prepare.main, arguments, "cannot load the encoding p50k_edit: ")


def test_shakespeare_is_split_as_in_nanogpt(workdir):
    """Train is int(0.9 * n) characters, as many as these are for the n of the real text."""
    text = (b"First Citizen:\n" * 80_000)[:1_115_394]
    leave({SHAKESPEARE: text})
    prepare.main(["shakespeare"])
    assert read_dataset("shakespeare") == [[text[:1_003_854]], [text[1_003_854:]]]


def test_tinystories_has_its_published_split(workdir):
    """Stories are what is between separator lines, stripped."""
    leave({TRAIN_STORIES: STORIES, VAL_STORIES: b"Val."})
    prepare.main(["tinystories", "--encoding=bytes"])
    train = [b"Once.\n\nThe end.", b"Tom <|endoftext|> ran.", b"A cut st"]
    assert read_dataset("tinystories") == [train, [b"Val."]]


def test_openwebtext_has_the_split_of_nanogpt(workdir, monkeypatch):
    """A permutation chooses the pages of val, which come in archives in 21 archives, in order."""
    Path("pages").mkdir()
    archives = {}
    for i in range(21):
        Path("pages/a.txt").write_text(f"\n\nPage {2 * i}\n\n\n\n日本 \n")
        Path("pages/b.txt").write_text(f"\n\nPage {2 * i + 1}\n\n\n\n日本 \n")
        shutil.make_archive("subsets/subset", "xztar", "pages")
        archive = shutil.make_archive("archive", "tar", "subsets")
        archives[f"urlsf_subset{i:02}.tar"] = Path(archive).read_bytes()
    leave(archives)
    monkeypatch.setattr(prepare, "OPENWEBTEXT_PAGES", 42)
    monkeypatch.setattr(prepare, "OPENWEBTEXT_VAL_PAGES", 5)
    prepare.main(["openwebtext", "--encoding=bytes"])
    order = np.random.default_rng(2357).permutation(42)
    pages = [f"Page {i}\n\n日本".encode() for i in range(42)]
    train = [pages[i] for i in sorted(order[5:])]
    val = [pages[i] for i in sorted(order[:5])]
    assert read_dataset("openwebtext") == [train, val]
