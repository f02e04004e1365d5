"""prepare.py: nothing lost, nothing in both splits, nothing half-written, and clear answers to bad input."""

import hashlib
import http.server
import json
import threading

import numpy as np
import pytest
import tiktoken

import prepare
from tests.conftest import make_corpus

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
        assert meta["splits"][split] == {"documents": n, "bytes": size, "tokens": size + n}
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


def test_byte_encoding_equals_tiktokens_own():
    """The shortcut through numpy gives the ids that the tiktoken encoding itself gives, and they decode."""
    encoding = prepare.get_encoding("bytes")
    text = "naïve 日本 😀\r\n\x00 <|endoftext|>"
    (ids,) = prepare.encode(encoding, [text], np.dtype(np.uint16))
    assert ids.tolist() == [*encoding.encode_ordinary(text), EOT]
    assert encoding.decode(ids[:-1].tolist()) == text
    assert encoding.n_vocab == 257


def test_large_vocabulary_gets_uint32(workdir, monkeypatch):
    """Ids beyond 65,535 are not cut off."""
    ranks = {bytes([i]): i for i in range(256)}
    wide = tiktoken.Encoding("wide", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000})
    monkeypatch.setattr(prepare, "get_encoding", lambda name: wide)
    make_corpus(workdir / "text")
    assert prepare.prepare(["text"], name="wide", encoding="wide")["dtype"] == "uint32"
    assert prepare.load_tokens("wide", "train")[-1] == 70_000


def test_a_single_document_is_cut_and_few_still_fill_both_splits(workdir, call):
    """One document is cut after a line, its end becomes val; with a few documents neither split stays empty."""
    text = "".join(f"line {i}\n" for i in range(100))
    (workdir / "one.txt").write_text(text)
    status, out, _ = call(prepare, "one.txt", "--encoding=bytes")
    assert status == 0 and "only one document" in out
    documents = read_documents("one")
    (head,), (tail,) = documents["train"], documents["val"]
    assert head + tail == text.encode() and head.endswith(b"\n") and 0.85 < len(head) / len(text) <= 0.9
    for count in (2, 3):
        for fraction in (0.01, 0.99):
            folder = workdir / f"few-{count}-{fraction}"
            make_corpus(folder, count)
            prepare.prepare([str(folder)], name="few", encoding="bytes", val_fraction=fraction)
            documents = read_documents("few")
            assert documents["train"] and documents["val"]
            assert len(documents["train"] + documents["val"]) == count


def test_small_batches_change_nothing(corpus, monkeypatch):
    """The result does not depend on how many documents are encoded at once."""
    before = snapshot(prepare.DATA / "tiny")
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1)
    prepare.prepare(["text"], name="tiny", encoding="bytes")
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


# Known datasets


def test_stdlib_is_the_running_interpreters_own(call):
    """Real Python text without tests and installed packages."""
    source = prepare.stdlib_source()
    texts = [document.text for document in source.documents()]
    assert any("class ArgumentParser" in text for text in texts)
    assert not any("import pytest\n" in text for text in texts)
    assert not any(text.startswith("import unittest\nfrom test import") for text in texts)
    assert sum(len(text.encode()) for text in texts) == source.size > 5_000_000


def test_stdlib_without_sources_names_the_alternative(workdir, monkeypatch, refused):
    """An interpreter that ships no .py files."""
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(workdir))
    refused("python prepare.py FOLDER --pattern '*.py' --name stdlib", prepare, "stdlib")


STORIES = {
    "train": "\nOnce upon a time.\n\nThe end.\n<|endoftext|>\n\n  Tom ran.\n<|endoftext|>\n<|endoftext|>\nA cut st",
    "val": "Lily <|endoftext|> smiled.\n<|endoftext|>\nBen ran.\n<|endoftext|>",
}


@pytest.fixture
def publisher(workdir, monkeypatch):
    """A local HTTP server in the place of the publisher; files can be changed by the test."""
    files = {prepare.TINYSTORIES_FILES[split][0]: text.encode() for split, text in STORIES.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = files.get(self.path.strip("/"))
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare, "TINYSTORIES_URL", f"http://127.0.0.1:{server.server_port}/")
    published = {}
    for split, (file, _, _) in prepare.TINYSTORIES_FILES.items():
        body = STORIES[split].encode()
        published[split] = (file, len(body), hashlib.sha256(body).hexdigest())
    monkeypatch.setattr(prepare, "TINYSTORIES_FILES", published)
    yield files
    server.shutdown()
    server.server_close()


def test_tinystories(publisher, call):
    """Stories are split at separator lines, stripped, and stay in their published split; no second download."""
    assert call(prepare, "tinystories", "--encoding=bytes")[0] == 0
    documents = read_documents("tinystories")
    assert documents["train"] == [b"Once upon a time.\n\nThe end.", b"Tom ran.", b"A cut st"]
    assert documents["val"] == [b"Lily <|endoftext|> smiled.", b"Ben ran."]
    publisher.clear()
    assert call(prepare, "tinystories", "--encoding=bytes")[0] == 0


@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: body[:-1] + b"!"], ids=["length", "checksum"])
def test_a_download_that_is_not_the_published_file_is_refused(publisher, refused, change, workdir):
    """Wrong length or wrong contents: an error, no file that looks whole, no dataset."""
    for name in publisher:
        publisher[name] = change(publisher[name])
    refused("is not the published file", prepare, "tinystories", "--encoding=bytes")
    assert not list(workdir.glob("data/tinystories/raw/*")) and not list(workdir.rglob("*.bin"))


def test_a_failed_download_says_what_to_do_by_hand(publisher, refused, monkeypatch):
    """404 and no network: the address, and where to put the file."""
    publisher.clear()
    refused("save it as data/tinystories/raw/TinyStoriesV2-GPT4-train.txt", prepare, "tinystories", "--encoding=bytes")
    monkeypatch.setattr(prepare, "TINYSTORIES_URL", "http://127.0.0.1:9/")
    refused("can't download http://127.0.0.1:9/", prepare, "tinystories", "--encoding=bytes")


# Bad input


def test_bad_input_is_refused_and_overwrites_nothing(corpus, refused, workdir):
    """One line, status 2, and the dataset of that name that was there before stays as it was."""
    (workdir / "empty.txt").write_text("")
    (workdir / "latin.txt").write_bytes(b"caf\xe9\n")
    (workdir / "folder").mkdir()
    before = snapshot(prepare.DATA)
    again = ("--name=tiny", "--encoding=bytes")
    refused("empty.txt contains no text", prepare, "empty.txt", *again)
    refused("latin.txt is not UTF-8 text: byte 0xe9 at offset 3", prepare, "text", "latin.txt", *again)
    refused("nowhere.txt does not exist", prepare, "nowhere.txt", *again)
    refused("no file in folder matches '*.txt'", prepare, "folder", *again)
    refused("--val-fraction must lie between 0 and 1, got 1.0", prepare, "text", *again, "--val-fraction=1")
    refused("invalid float value: 'x'", prepare, "text", *again, "--val-fraction=x")
    refused("unknown encoding 'byte'", prepare, "text", "--name=tiny", "--encoding=byte")
    refused("'../up' can't be the name of a dataset", prepare, "text", "--encoding=bytes", "--name=../up")
    refused("stdlib is prepared alone", prepare, "text", "stdlib", *again)
    refused("unrecognized arguments: --nmae", prepare, "text", "--nmae=x")
    refused("arguments are required", prepare)
    assert snapshot(prepare.DATA) == before


def test_an_interrupt_leaves_the_old_dataset(corpus, workdir, call, monkeypatch):
    """Ctrl-C in the middle: the old dataset stays whole, nothing half-written stays behind."""
    before = snapshot(prepare.DATA)
    read_text = prepare.read_text

    def interrupted(path):
        if path.name == "020.txt":
            raise KeyboardInterrupt
        return read_text(path)

    monkeypatch.setattr(prepare, "read_text", interrupted)
    assert call(prepare, "text", "--name=tiny", "--encoding=bytes")[0] == 130
    assert snapshot(prepare.DATA) == before and [p.name for p in prepare.DATA.iterdir()] == ["tiny"]


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
