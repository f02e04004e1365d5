"""prepare.py: nothing lost, nothing in both splits, nothing half-written, and clear answers to bad input."""

import errno
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import regex  # tiktoken needs it, so it is there
import tiktoken

import prepare
from tests.conftest import make_corpus
from tests.kill_prepare import kill_prepare

EOT = 256


def read_documents(name: str) -> dict[str, list[bytes]]:
    """The documents of a dataset in the byte encoding, by split."""
    documents = {}
    for split in prepare.SPLITS:
        tokens = np.asarray(prepare.load_tokens(name, split))
        assert tokens[-1] == EOT
        ends = np.flatnonzero(tokens == EOT)
        starts = np.concatenate([[0], ends[:-1] + 1])
        documents[split] = [tokens[a:b].astype(np.uint8).tobytes() for a, b in zip(starts, ends, strict=True)]
    return documents


def all_documents(name: str) -> list[bytes]:
    """Those of train, then those of val."""
    documents = read_documents(name)
    return documents["train"] + documents["val"]


def snapshot(folder) -> dict:
    """Every file below a folder and its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# What is written


def test_every_document_comes_back_exactly_once(corpus):
    """The splits together decode to the documents, each whole, once and in one split only; meta.json counts them."""
    documents = read_documents("tiny")
    assert sorted(documents["train"] + documents["val"]) == sorted(text.encode() for text in corpus)
    assert documents["train"] and documents["val"]
    meta = json.loads((prepare.DATA / "tiny/meta.json").read_text())
    for split in prepare.SPLITS:
        n = len(documents[split])
        size = sum(map(len, documents[split]))
        checksum = hashlib.sha256((prepare.DATA / f"tiny/{split}.bin").read_bytes()).hexdigest()
        assert meta["splits"][split] == {"documents": n, "bytes": size, "tokens": size + n, "sha256": checksum}
    assert (meta["encoding"], meta["vocab_size"], meta["dtype"]) == ("bytes", 257, "uint16")
    assert (meta["source"], meta["seed"], meta["val_fraction"]) == ("text", 1337, 0.1)


def test_no_document_is_in_both_splits_not_even_a_copy(workdir):
    """Copies of a document, under any name, end up in the split of the original."""
    texts = make_corpus(workdir / "text", 60)
    for i, text in enumerate(texts):
        (workdir / "text" / f"copy-{i}.txt").write_bytes(text.encode())
    prepare.prepare(["text"], name="twice", encoding="bytes", val_fraction=0.4)
    documents = read_documents("twice")
    assert len(documents["train"]) + len(documents["val"]) == 120
    assert not set(documents["train"]) & set(documents["val"])
    assert 24 <= len(documents["val"]) <= 72, "about 0.4 of 120"


def test_split_depends_on_seed_and_contents_only(workdir):
    """The same seed gives the same split wherever the files lie; another seed another one."""
    make_corpus(workdir / "text")
    make_corpus(workdir / "moved")
    for i in range(40):  # other names, other order
        (workdir / "moved" / f"{i:03}.txt").rename(workdir / "moved" / f"x{40 - i:03}.txt")
    for name, folder, seed in (("a", "text", 1), ("b", "moved", 1), ("c", "text", 2)):
        prepare.prepare([folder], name=name, encoding="bytes", seed=seed)
    val = {name: set(read_documents(name)["val"]) for name in "abc"}
    assert val["a"] == val["b"] != val["c"]


def test_end_of_text_inside_a_document_is_text(workdir, gpt2):
    """The characters <|endoftext|> in a document are not the separator."""
    text = "before <|endoftext|> after"
    (workdir / "a.txt").write_text(text)
    (workdir / "b.txt").write_text("another")
    for encoding in ("bytes", *gpt2):
        prepare.prepare(["a.txt", "b.txt"], name="eot", encoding=encoding, val_fraction=0.5)
        encoding = prepare.get_encoding(encoding)
        both = [prepare.load_tokens("eot", split).tolist() for split in prepare.SPLITS]
        assert sum(tokens.count(encoding.eot_token) for tokens in both) == 2
        assert sorted(encoding.decode(tokens[:-1]) for tokens in both) == ["another", text]


@pytest.fixture
def gpt2():
    """("gpt2",) where its vocabulary can be had: in tiktoken's cache, or over the network."""
    try:
        prepare.get_encoding("gpt2")
    except prepare.UserError:
        return ()
    return ("gpt2",)


def test_encoding_equals_tiktokens_own(gpt2):
    """The shortcuts (bytes through numpy, documents joined by their separator) give the ids tiktoken itself gives."""
    texts = ["naïve 日本 😀\r\n\x00", "", "two  spaces \n", "x <|endoftext|> y", " leading", "end"]
    for name in ("bytes", *gpt2):
        encoding = prepare.get_encoding(name)
        plain = [[*encoding.encode_ordinary(text), encoding.eot_token] for text in texts]
        for count in range(1, len(texts) + 1):  # with and without the document that contains the separator
            batch = [("train", text, True) for text in texts[:count]]
            ids, documents, size = prepare.encode(encoding, batch)["train"]
            assert ids.tolist() == [i for ids in plain[:count] for i in ids] and ids.dtype == np.uint16
            assert documents == count and size == sum(len(text.encode()) for text in texts[:count])
        unfinished = prepare.encode(encoding, [("val", "to be continued", False)])
        assert unfinished["val"][0].tolist() == encoding.encode_ordinary("to be continued")
        assert unfinished["val"][1] == 0 and len(unfinished["train"][0]) == 0
    assert prepare.get_encoding("bytes").n_vocab == 257


def test_long_documents_are_read_in_pieces_without_a_trace(workdir, monkeypatch, gpt2):
    """Cut into pieces, a long document gives the tokens of the whole, in one split, with one separator."""
    words = ["word", "it's", "123", "  two", "\n\n", "日本。", " 😀", "end.\n", "x" * 40, "\t", "don't\n    indented"]
    rng = np.random.default_rng(0)
    text = " ".join(words[i] for i in rng.integers(0, len(words), 3000))
    (workdir / "long.txt").write_bytes(text.encode())
    (workdir / "short.txt").write_text("short")
    for name in ("bytes", *gpt2):
        for piece in (50, 333, 1 << 20):
            monkeypatch.setattr(prepare, "PIECE", piece)
            prepare.prepare(["long.txt", "short.txt"], name="long", encoding=name)
            both = {tuple(prepare.load_tokens("long", split).tolist()) for split in prepare.SPLITS}
            encoding = prepare.get_encoding(name)
            assert both == {tuple([*encoding.encode_ordinary(t), encoding.eot_token]) for t in (text, "short")}
    assert prepare.find_cut("。" * 50) == 50, "a text without a good place is cut at its end"


def wide_encoding() -> tiktoken.Encoding:
    """An encoding that takes tiktoken's way, not the shortcut for bytes, and needs uint32; no download."""
    ranks = {bytes([i]): i for i in range(256)}
    return tiktoken.Encoding("wide", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000})


def test_end_of_text_is_text_even_where_a_cut_goes_through_it():
    """Two pieces of a document that only together spell the separator do not become one."""
    batch = [("train", "<|endof", False), ("train", "text|>", True)]
    ids, documents, _ = prepare.encode(wide_encoding(), batch)["train"]
    assert ids.tolist() == [*b"<|endoftext|>", 70_000] and documents == 1


def test_large_vocabulary_gets_uint32(workdir, monkeypatch):
    """Ids beyond 65,535 are not cut off."""
    wide = wide_encoding()
    monkeypatch.setattr(prepare, "get_encoding", lambda name: wide)
    make_corpus(workdir / "text")
    assert prepare.prepare(["text"], name="wide", encoding="wide")["dtype"] == "uint32"
    assert prepare.load_tokens("wide", "train")[-1] == 70_000


def test_a_single_document_is_cut_and_few_still_fill_both_splits(workdir, call, monkeypatch):
    """One document is cut after a line, its end becomes val; with a few documents neither split stays empty."""
    text = "".join(f"line {i}\n" for i in range(100))
    (workdir / "one.txt").write_text(text)
    status, out, _ = call(prepare, "one.txt", "--encoding=bytes")
    assert status == 0 and "only one document" in out
    documents = read_documents("one")
    (head,), (tail,) = documents["train"], documents["val"]
    assert head + tail == text.encode() and head.endswith(b"\n") and 0.85 < len(head) / len(text) <= 0.9
    monkeypatch.setattr(prepare, "PIECE", 20)
    assert call(prepare, "one.txt", "--encoding=bytes")[0] == 0
    (head,), (tail,) = read_documents("one").values()
    assert head + tail == text.encode() and 0.85 < len(head) / len(text) <= 0.9
    for count in (2, 3):
        for fraction in (0.01, 0.99):
            folder = workdir / f"few-{count}-{fraction}"
            make_corpus(folder, count)
            prepare.prepare([str(folder)], name="few", encoding="bytes", val_fraction=fraction)
            documents = read_documents("few")
            assert documents["train"] and documents["val"]
            assert len(documents["train"] + documents["val"]) == count


# How gpt2 and cl100k_base split text into words before they encode them
WORDS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_long_documents_are_cut_between_words(name):
    """Where find_cut cuts, the words of the two parts are the words of the whole."""
    rng = np.random.default_rng(1)
    alphabet = np.array(["a", "Z", "7", "'s", ".", " ", "\n", "\r\n", "é", "日", "。"])
    for length in (8, 30, 200) * 100:
        text = "".join(rng.choice(alphabet, length))
        cut = prepare.find_cut(text)
        if cut < len(text):
            assert cut >= len(text) // 2
            parts = regex.findall(WORDS[name], text[:cut]) + regex.findall(WORDS[name], text[cut:])
            assert parts == regex.findall(WORDS[name], text)


def test_nothing_depends_on_workers_or_batches(corpus, monkeypatch):
    """1, 2 and 4 threads, small batches and large ones: the same bytes."""
    before = snapshot(prepare.DATA / "tiny")
    for workers in (1, 2, 4):
        for batch in (1, 1000, 1 << 20):
            monkeypatch.setattr(prepare, "BATCH", batch)
            prepare.prepare(["text"], name="tiny", encoding="bytes", workers=workers)
            assert snapshot(prepare.DATA / "tiny") == before


def test_files_folders_and_patterns(workdir, call):
    """Folders are searched for --pattern, files are taken as they are, none twice; the name is the first path's."""
    make_corpus(workdir / "src", 3)
    (workdir / "src" / "sub").mkdir()
    (workdir / "src" / "sub" / "code.py").write_text("print('hello')\n")
    (workdir / "extra.md").write_text("# extra\n")
    assert call(prepare, "src", "--encoding=bytes", "--pattern=*.py", "--name=py")[0] == 0
    assert sum(map(len, read_documents("py").values())) == 2  # one document, cut
    assert call(prepare, "src", "extra.md", "src/000.txt", "--encoding=bytes")[0] == 0
    assert sum(map(len, read_documents("src").values())) == 4


def test_json_lines_compressed_files_and_standard_input(workdir, call, monkeypatch):
    """.jsonl with --field, .gz and .xz of everything, and - give the documents that plain files give."""
    texts = make_corpus(workdir / "text", 12)
    lines = "\n".join(json.dumps({"body": text, "id": i}) for i, text in enumerate(texts)) + "\n\n"
    (workdir / "posts.jsonl").write_text(lines)
    (workdir / "posts.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (workdir / "posts.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (workdir / "packed").mkdir()
    for i, text in enumerate(texts):
        (workdir / "packed" / f"{i:03}.txt.gz").write_bytes(gzip.compress(text.encode()))
    prepare.prepare(["text"], name="plain", encoding="bytes")
    plain = read_documents("plain")
    common = ("--encoding=bytes", "--name=other")
    for arguments in (
        ("posts.jsonl", "--field=body"),
        ("posts.jsonl.gz", "--field=body"),
        ("posts.jsonl.xz", "--field=body"),
        ("packed", "--pattern=*.gz"),
    ):
        status, _, error = call(prepare, *arguments, *common)
        assert status == 0, error
        assert read_documents("other") == plain
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert call(prepare, "-", "--field=body", "--encoding=bytes")[0] == 0
    assert read_documents("stdin") == plain
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts[0].encode())))
    assert call(prepare, "-", "posts.jsonl", "--field=body", *common)[0] == 2, "standard input is .jsonl with --field"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts[0].encode())))
    assert call(prepare, "-", *common)[0] == 0
    assert b"".join(all_documents("other")) == texts[0].encode()


def test_the_place_of_an_undecodable_byte(workdir, refused, monkeypatch):
    """The offset is that of the byte in the file, also where a character is cut by a chunk."""
    (workdir / "bad.txt").write_bytes("abc€".encode() + b"d" * 9 + b"\xe6\x97x")
    for piece in (1, 4, 5, 16, 100):
        monkeypatch.setattr(prepare, "PIECE", piece)
        refused("bad.txt is not UTF-8 text: byte 0xe6 at offset 15", prepare, "bad.txt", "--encoding=bytes")


def test_undecodable_bytes_are_replaced_by_choice_and_counted(workdir, call, monkeypatch):
    """--errors replace puts U+FFFD, says how often, and notes it; a character cut by a chunk is no error."""
    (workdir / "a.txt").write_bytes("日本語".encode() * 50 + b"caf\xe9 \xff\xfe")
    (workdir / "b.txt").write_text("fine")
    (workdir / "empty.txt").write_text("")
    monkeypatch.setattr(prepare, "PIECE", 7)
    status, out, _ = call(prepare, "a.txt", "b.txt", "empty.txt", "--errors=replace", "--encoding=bytes", "--name=r")
    assert status == 0 and "1 empty documents left out, 3 undecodable places replaced" in out
    assert sorted(all_documents("r")) == sorted(["日本語".encode() * 50 + "caf\ufffd \ufffd\ufffd".encode(), b"fine"])
    meta = prepare.load_meta("r")
    assert (meta["empty"], meta["replaced"]) == (1, 3)


# Known datasets


def test_stdlib_is_the_running_interpreters_own(call):
    """Real Python text without tests and installed packages."""
    names = [str(path) for path in prepare.stdlib_source().files]
    assert any(name.endswith("argparse.py") for name in names) and any("/json/" in name for name in names)
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in names)
    assert sum(path.stat().st_size for path in prepare.stdlib_source().files) > 5_000_000


def test_stdlib_without_sources_names_the_alternative(workdir, monkeypatch, refused):
    """An interpreter that ships no .py files."""
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(workdir))
    refused("python prepare.py FOLDER --pattern '*.py' --name stdlib", prepare, "stdlib")


class Publisher(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `mishaps` holds what goes wrong with the next requests for a path, in order."""

    def do_GET(self):
        server, name = self.server, self.path.strip("/")
        mishaps = server.mishaps.get(name, [])
        mishap = mishaps.pop(0) if mishaps else None
        server.requests.append((name, self.headers.get("Range")))
        body = server.files.get(name)
        if body is None or isinstance(mishap, int):
            self.send_error(mishap or 404)
            return
        start, total = 0, len(body)
        if self.headers.get("Range") and server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        part = body[start:]
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if mishap == "cut" else part)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def publisher(monkeypatch):
    """A local HTTP server in the publisher's place."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    server.files, server.mishaps, server.requests, server.ranges = {}, {}, [], True
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare, "RETRY_SECONDS", 0.001)
    yield server
    server.shutdown()
    server.server_close()


BODY = bytes(range(256)) * 8000


@pytest.mark.parametrize(
    ("mishaps", "ranges"),
    [([], True), (["cut"] * 3, True), (["cut"] * 3, False), ([503, 503], True), ([503, "cut", 429, "cut"], True)],
    ids=["whole", "cut three times", "cut, no range support", "503 twice", "mixed"],
)
def test_download_survives(publisher, workdir, mishaps, ranges):
    """The right bytes in the end, under their name only when whole; what had arrived is not fetched again."""
    publisher.files["f"], publisher.mishaps["f"], publisher.ranges = BODY, list(mishaps), ranges
    path = workdir / "raw" / "f"
    prepare.download(publisher.url + "f", path, len(BODY), hashlib.sha256(BODY).hexdigest())
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["f"]
    assert len(publisher.requests) == len(mishaps) + 1
    if mishaps == ["cut"] * 3 and ranges:
        offsets = [int(r.removeprefix("bytes=").removesuffix("-")) for _, r in publisher.requests[1:]]
        assert offsets == [len(BODY) // 2, len(BODY) * 3 // 4, len(BODY) * 7 // 8]
    prepare.download(publisher.url + "f", path)
    assert len(publisher.requests) == len(mishaps) + 1, "what is there is not fetched again"


def test_download_goes_on_in_the_next_run(publisher, workdir):
    """A .part that an earlier run left is completed; one that is complete already, or too long, is dealt with."""
    publisher.files["f"] = BODY
    for left in (BODY[:1000], BODY, BODY + b"more"):
        path = workdir / f"f{len(left)}"
        path.with_name(path.name + ".part").write_bytes(left)
        prepare.download(publisher.url + "f", path, len(BODY), hashlib.sha256(BODY).hexdigest())
        assert path.read_bytes() == BODY


@pytest.mark.parametrize(
    ("body", "mishaps", "message"),
    [
        (BODY[:-1], [], "has 2,047,999 bytes instead of the published 2,048,000"),
        (BODY[:-1] + b"!", [], "has another checksum than the published one"),
        (None, [], "can't be downloaded (HTTP status 404)"),
        (BODY, [503] * 20, "can't be downloaded (HTTP status 503)"),
        (BODY, [401], "can't be downloaded (HTTP status 401)"),
    ],
    ids=["wrong length", "wrong checksum", "404", "503 for ever", "401"],
)
def test_download_that_can_not_succeed(publisher, workdir, body, mishaps, message):
    """A clear error that says how to do it by hand, and no file that looks whole."""
    publisher.files["f"], publisher.mishaps["f"] = body, mishaps
    path = workdir / "raw" / "f"
    with pytest.raises(prepare.UserError) as error:
        prepare.download(publisher.url + "f", path, len(BODY), hashlib.sha256(BODY).hexdigest())
    assert message in str(error.value) and f"by hand and save it as {path}" in str(error.value)
    assert not path.exists()


STORIES = {
    "train": "\nOnce upon a time.\n\nThe end.\n<|endoftext|>\n\n  Tom ran.\n<|endoftext|>\n<|endoftext|>\nA cut st",
    "val": "Lily <|endoftext|> smiled.\n<|endoftext|>\nBen ran.\n<|endoftext|>",
}


@pytest.mark.parametrize("version", [1, 2])
def test_tinystories(publisher, refused, call, monkeypatch, version):
    """Stories are split at separator lines, stripped, and stay in their published split; no second download."""
    name = "tinystories" + "-v1" * (version == 1)
    files = []
    for split, file, _, _ in prepare.TINYSTORIES_FILES[version]:
        body = STORIES[split].encode()
        publisher.files[file] = body
        files.append((split, file, len(body), hashlib.sha256(body).hexdigest()))
    monkeypatch.setattr(prepare, "TINYSTORIES_FILES", {version: files})
    arguments = ("tinystories", "--encoding=bytes", f"--base-url={publisher.url[:-1]}", *["--v1"] * (version == 1))
    status, out, error = call(prepare, *arguments)
    assert status == 0 and "2 empty documents left out" in out, error
    documents = read_documents(name)
    assert documents["train"] == [b"Once upon a time.\n\nThe end.", b"Tom ran.", b"A cut st"]
    assert documents["val"] == [b"Lily <|endoftext|> smiled.", b"Ben ran."]
    publisher.files.clear()
    assert call(prepare, *arguments)[0] == 0
    (prepare.DATA / name / "raw" / files[0][1]).unlink()
    refused(f"save it as data/{name}/raw/{files[0][1]}", prepare, *arguments)


def test_without_network_one_line_says_what_to_do(refused):
    """No server: at once, and how to do it by hand."""
    arguments = ("tinystories", "--encoding=bytes", "--base-url=http://127.0.0.1:9")
    refused("no network: http://127.0.0.1:9/TinyStoriesV2-GPT4-train.txt can't be reached", prepare, *arguments)
    refused("save it as data/tinystories/raw/TinyStoriesV2-GPT4-train.txt", prepare, *arguments)


def tar(files: dict[str, bytes], mode: str) -> bytes:
    """A tar archive in memory, of files and of one folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()


def test_openwebtext(publisher, refused, call, monkeypatch, workdir):
    """The nested archives come back whole and in order, with nanoGPT's split; no path in them is ever written to."""
    monkeypatch.setattr(prepare, "OPENWEBTEXT_ARCHIVES", 2)
    monkeypatch.setattr(prepare, "OPENWEBTEXT_DOCUMENTS", 8)
    monkeypatch.setattr(prepare, "OPENWEBTEXT_VAL_DOCUMENTS", 2)
    texts = [f"\n\nPage {i}\n\n\n\n日本 {'text ' * 50}\n" for i in range(8)]
    for a in range(2):
        subsets = {}
        for b in range(2):
            pages = {f"../../escape-{a}{b}{c}.txt": texts[4 * a + 2 * b + c].encode() for c in range(2)}
            subsets[f"openwebtext/subset-{b}_data.xz"] = tar(pages | {"README": b"not a document"}, "w:xz")
        publisher.files[f"urlsf_subset{a:02}.tar"] = tar(subsets | {"notes.md": b"not an archive"}, "w")
    arguments = ("openwebtext", "--encoding=bytes", f"--base-url={publisher.url}")
    monkeypatch.setattr(prepare, "OPENWEBTEXT_BYTES", (10**15, 10**15))
    refused("GB free, OpenWebText needs", prepare, *arguments)
    monkeypatch.setattr(prepare, "OPENWEBTEXT_BYTES", (10**6, 10**6))
    status, out, error = call(prepare, *arguments)
    assert status == 0 and "hours with" in out and "GB for the tokens" in out, error
    cleaned = [f"Page {i}\n\n日本 {'text ' * 50}".strip().encode() for i in range(8)]
    val = set(np.random.default_rng(2357).permutation(8)[:2].tolist())
    assert read_documents("openwebtext") == {
        "train": [text for i, text in enumerate(cleaned) if i not in val],
        "val": [text for i, text in enumerate(cleaned) if i in val],
    }
    assert not list(workdir.rglob("*escape*")) and not list(workdir.parent.glob("*escape*"))
    path = prepare.DATA / "openwebtext/raw/urlsf_subset01.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    refused("urlsf_subset01.tar is damaged", prepare, *arguments)
    path.write_bytes(tar({}, "w"))
    refused("hold 4 documents instead of the published 8", prepare, *arguments)


# Bad input


def test_bad_input_is_refused_and_overwrites_nothing(corpus, refused, workdir):
    """One line, status 2, and the dataset of that name that was there before stays as it was."""
    (workdir / "empty.txt").write_text("")
    (workdir / "latin.txt").write_bytes(b"caf\xe9\n")
    (workdir / "folder").mkdir()
    before = snapshot(prepare.DATA / "tiny")
    again = ("--name=tiny", "--encoding=bytes")
    refused("empty.txt contains no text", prepare, "empty.txt", *again)
    refused("latin.txt is not UTF-8 text: byte 0xe9 at offset 3", prepare, "text", "latin.txt", *again)
    refused("nowhere.txt does not exist", prepare, "nowhere.txt", *again)
    refused("no file in folder matches '*.txt'", prepare, "folder", *again)
    refused("--val-fraction must lie between 0 and 1, got 1.0", prepare, "text", *again, "--val-fraction=1")
    refused("invalid float value: 'x'", prepare, "text", *again, "--val-fraction=x")
    refused("unknown encoding 'byte'", prepare, "text", "--name=tiny", "--encoding=byte")
    refused("--seed must be at least 0", prepare, "text", *again, "--seed=" + "9" * 100)
    refused("--pattern '/abs*' can't be searched for", prepare, "text", *again, "--pattern=/abs*")
    refused("standard input (-) can be read only once", prepare, "-", "-", *again)
    refused("--v1 is for tinystories only", prepare, "stdlib", "--v1")
    refused("--base-url is for tinystories and openwebtext only", prepare, "text", *again, "--base-url=http://x")
    refused("--field is for .jsonl files", prepare, "stdlib", "--field=x")
    refused("is no address to download from", prepare, "tinystories", "--encoding=bytes", "--base-url=foo")
    (workdir / "stdlib").mkdir()
    (workdir / "stdlib" / "a.txt").write_text("not the standard library")
    refused("under the name of a known dataset", prepare, "./stdlib", "--encoding=bytes")
    refused("'../up' can't be the name of a dataset", prepare, "text", "--encoding=bytes", "--name=../up")
    refused("stdlib is prepared alone", prepare, "text", "stdlib", *again)
    refused("unrecognized arguments: --nmae", prepare, "text", "--nmae=x")
    refused("give either what to prepare or --check NAME", prepare)
    refused("give either what to prepare or --check NAME", prepare, "text", "--check=tiny")
    refused("--workers must be at least 1, got 0", prepare, "text", *again, "--workers=0")
    refused("invalid choice: 'ignore'", prepare, "text", *again, "--errors=ignore")
    (workdir / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    refused("line 2 of bad.jsonl is not a JSON object with a text 'text'", prepare, "bad.jsonl", *again)
    (workdir / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    refused("line 2 of bad.jsonl is not UTF-8 text", prepare, "bad.jsonl", *again)
    (workdir / "bad.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    refused("bad.txt.gz is damaged", prepare, "bad.txt.gz", *again)
    (workdir / "bad.txt.xz").write_bytes(b"not compressed")
    refused("bad.txt.xz is damaged", prepare, "bad.txt.xz", *again)
    assert snapshot(prepare.DATA / "tiny") == before


def test_an_interrupted_run_goes_on(corpus, workdir, call, monkeypatch):
    """Ctrl-C in the middle: the old dataset stays whole; started again, at most one shard is encoded again."""
    before = snapshot(prepare.DATA / "tiny")
    make_corpus(workdir / "more", 70)
    prepare.prepare(["more"], name="undisturbed", encoding="bytes")
    monkeypatch.setattr(prepare, "BATCH", 1)  # a batch per document
    monkeypatch.setattr(prepare, "SHARD", 4)
    chunks, encode, encoded = prepare.Reader.chunks, prepare.encode, []

    def interrupted(self, path):
        if path.name == "050.txt":
            raise KeyboardInterrupt
        return chunks(self, path)

    def recorded(encoding, batch):
        encoded.append(batch)
        return encode(encoding, batch)

    monkeypatch.setattr(prepare, "encode", recorded)
    arguments = ("more", "--name=tiny", "--encoding=bytes", "--workers=2")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Reader, "chunks", interrupted)
        assert call(prepare, *arguments)[0] == 130
    assert snapshot(prepare.DATA / "tiny") == before
    assert 40 < len(encoded) <= 50
    encoded.clear()
    status, out, _ = call(prepare, *arguments)
    assert status == 0 and "going on after 44 batches" in out
    assert len(encoded) == 70 - 44
    for split in prepare.SPLITS:
        assert np.array_equal(prepare.load_tokens("tiny", split), prepare.load_tokens("undisturbed", split))
    assert sorted(p.name for p in prepare.DATA.iterdir()) == ["tiny", "undisturbed"]


def test_an_interrupted_run_with_other_settings_starts_anew(workdir, call, monkeypatch):
    """What was written for another seed, or before a file changed, is not gone on with."""
    make_corpus(workdir / "text", 30)
    monkeypatch.setattr(prepare, "BATCH", 200)
    monkeypatch.setattr(prepare, "SHARD", 4)
    chunks = prepare.Reader.chunks

    def interrupted(self, path):
        if path.name == "020.txt":
            raise KeyboardInterrupt
        return chunks(self, path)

    for seed, change in (("--seed=2", False), ("--seed=1337", True)):
        with monkeypatch.context() as patch:
            patch.setattr(prepare.Reader, "chunks", interrupted)
            assert call(prepare, "text", "--encoding=bytes")[0] == 130
        if change:
            (workdir / "text" / "000.txt").write_text("changed")
        status, out, _ = call(prepare, "text", "--encoding=bytes", seed)
        assert status == 0 and "going on" not in out
        texts = sorted(path.read_bytes() for path in (workdir / "text").iterdir())
        assert sorted(all_documents("text")) == texts


@pytest.mark.slow
def test_killed_at_any_moment(workdir):
    """kill -9 a few times, then once in peace: the bins of an undisturbed run."""
    kill_prepare(rounds=4, folder=workdir, seed=int(time.time()))


def test_a_full_disk(workdir, call, refused, monkeypatch):
    """An error in one line, nothing that looks finished; with room again the run goes on."""
    make_corpus(workdir / "text", 30)
    monkeypatch.setattr(prepare, "BATCH", 200)
    monkeypatch.setattr(prepare, "SHARD", 4)
    sync, calls = prepare.sync, []

    def full(file):
        calls.append(file)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "sync", full)
        refused("no space left in data/: make room and start again, it will go on", prepare, "text", "--encoding=bytes")
    assert not (prepare.DATA / "text").exists()
    status, out, _ = call(prepare, "text", "--encoding=bytes")
    assert status == 0 and "going on after" in out
    assert len(all_documents("text")) == 30


def test_a_reader_that_has_seen_enough(corpus, workdir):
    """`python prepare.py --check tiny | head` ends without a word on stderr when head closes the pipe."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, prepare.__file__, "--check=tiny"]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=workdir)
    os.close(write_end)
    assert result.returncode == 1 and result.stderr == b""


def test_check(corpus, call, refused):
    """--check confirms the checksums and shows a document; a changed byte is noticed."""
    status, out, _ = call(prepare, "--check=tiny")
    assert status == 0 and "checksums agree" in out and "naïve café" in out and "sha256" not in out
    path = prepare.DATA / "tiny/val.bin"
    whole = path.read_bytes()
    path.write_bytes(b"x" + whole[1:])
    refused("val.bin is not what was written (checksum)", prepare, "--check=tiny")
    refused("not prepared", prepare, "--check=nothing")


def test_a_damaged_dataset_is_noticed(corpus):
    """Missing or truncated .bin, damaged meta.json: each named, with the command that mends it."""
    folder = prepare.DATA / "tiny"
    whole = snapshot(folder)
    (folder / "train.bin").write_bytes(whole["train.bin"][:-1])
    with pytest.raises(prepare.UserError, match=r"train.bin is [\d,]+ bytes, meta.json promises"):
        prepare.load_tokens("tiny", "train")
    (folder / "train.bin").unlink()
    with pytest.raises(prepare.UserError, match=r"train.bin is missing, meta.json promises"):
        prepare.load_tokens("tiny", "train")
    for damaged in (b"", b"[]", b"{}", whole["meta.json"][:-40], whole["meta.json"].replace(b"uint16", b"uint32")):
        (folder / "meta.json").write_bytes(damaged)
        with pytest.raises(prepare.UserError, match=r"meta.json is damaged; run again: python prepare.py"):
            prepare.load_meta("tiny")
    with pytest.raises(prepare.UserError, match=r"not prepared .* run: python prepare.py stdlib"):
        prepare.load_meta("stdlib")


def test_gpt2_without_network_names_the_files(monkeypatch, refused, corpus):
    """No vocabulary, no network: which files, which variable, or another encoding."""

    def offline(name):
        raise ConnectionError("no route to host")

    prepare.get_encoding.cache_clear()
    monkeypatch.setattr(prepare.tiktoken, "get_encoding", offline)
    refused("6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7", prepare, "text")
    refused("TIKTOKEN_CACHE_DIR", prepare, "text")
