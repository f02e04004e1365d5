"""Turn text into the token files that train.py reads: data/NAME/train.bin, val.bin and meta.json.

    python prepare.py stdlib                        # Python's own standard library: on every machine, no download
    python prepare.py tinystories                   # downloads 2.3 GB of short stories
    python prepare.py openwebtext                   # downloads 13 GB of web pages
    python prepare.py notes.txt novels/             # your own text: files, and folders searched for --pattern
    python prepare.py posts.jsonl.gz --field body   # a document a line
    cat *.md | python prepare.py - --name notes     # standard input
    python prepare.py --check stdlib                # are the files still what was written?

A .bin is a flat array of token ids (uint16, or uint32 where the vocabulary needs it), every document followed by
<|endoftext|>. Text flows in one direction: a source yields documents, each goes to one split by a hash of its contents,
threads turn them into ids, and one writer appends the ids to that split's file. Memory does not grow with the corpus,
and a run that was interrupted goes on where it was when it is started again.
"""

import argparse
import codecs
import collections
import contextlib
import errno
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import lzma
import os
import platform
import re
import shutil
import socket
import sys
import sysconfig
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

DATA = Path("data")  # under the folder in which the command is run
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a dataset
SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"  # written between documents; inside a document these characters are ordinary text
PIECE = 1 << 16  # characters; of longer documents one piece of about this size after the other is read and encoded
BATCH = 1 << 16  # characters encoded by one thread at a time; small blocks keep memory from fragmenting
SHARD = 1024  # batches after which the state is saved: an interrupted run redoes at most so many

HUGGING_FACE = "https://huggingface.co/datasets/"
TINYSTORIES_URL = HUGGING_FACE + "roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
TINYSTORIES_FILES = {  # licence CDLA-Sharing-1.0; version 2 was written by GPT-4 alone: split, file, bytes, sha256
    2: [
        ("train", "TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
         "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
        ("val", "TinyStoriesV2-GPT4-valid.txt", 22_502_601,
         "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    ],
    1: [
        ("train", "TinyStories-train.txt", 1_924_281_556,
         "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
        ("val", "TinyStories-valid.txt", 19_447_282,
         "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4"),
    ],
}  # fmt: skip
OPENWEBTEXT_URL = HUGGING_FACE + "Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144/subsets/"
OPENWEBTEXT_ARCHIVES = 21  # of about 630 MB each, licence cc0-1.0
OPENWEBTEXT_DOCUMENTS = 8_013_769
OPENWEBTEXT_VAL_DOCUMENTS = 4_007  # nanoGPT's split: a share of 0.0005, seed 2357
OPENWEBTEXT_TOKENS = {"train": 9_035_582_198, "val": 4_434_897}  # gpt2, as nanoGPT counts them
OPENWEBTEXT_BYTES = (13_300_000_000, 18_100_000_000)  # disk space: archives, .bin files in the gpt2 encoding
OPENWEBTEXT_TEXT = 40_000_000_000  # bytes, about
MEGABYTES_PER_SECOND = 11  # of text per thread, gpt2, as `python bench.py prepare` measured it on two cores
GPT2_CACHE_FILES = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"


# Errors and commands: used by train.py and sample.py too


class UserError(Exception):
    """What a person typed or a file contained can't be used. The message says what, where and how to mend it."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, one line, instead of printing its whole usage."""

    def error(self, message: str):
        raise UserError(f"{message} (see python {self.prog} --help)")


def run(main: Callable[[], None]) -> None:
    """Run a script's main(). UserError and operating system errors become one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character must not end a run
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# Encodings


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """The tiktoken encoding called `name`, or "bytes": one token per UTF-8 byte, no download. Raises UserError."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        special = {END_OF_TEXT: 256}
        return tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=257
        )
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"unknown encoding {name!r}; choose bytes, {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        files = f" with {GPT2_CACHE_FILES}" if name == "gpt2" else ""
        raise UserError(
            f"the {name} vocabulary can't be fetched ({type(error).__name__}): set TIKTOKEN_CACHE_DIR "
            f"to a folder{files} from a machine that has it, or use --encoding bytes"
        ) from error


# Reading: bytes → text, whatever the size of the file


class Reader:
    """Decompresses and decodes files, drives the progress bar, and counts what had to be replaced."""

    def __init__(self, errors: str, progress: tqdm):
        self.replaced = 0  # undecodable places
        self.progress = progress
        self.decoder = codecs.getincrementaldecoder("utf-8")
        self.errors = "strict"
        if errors == "replace":
            self.errors = "replace-and-count"
            codecs.register_error(self.errors, self.replace)

    def replace(self, error: UnicodeDecodeError) -> tuple[str, int]:
        """Error handler of the decoder: one replacement character per undecodable place."""
        self.replaced += 1
        return "\ufffd", error.end

    def chunks(self, path: Path) -> Iterator[str]:
        """The text of a file, .gz and .xz decompressed, in chunks; line ends untouched."""
        with path.open("rb") as raw:
            opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix)
            stream, position = opener(raw) if opener else raw, 0
            try:
                for chunk in self.decode(stream, str(path)):
                    self.progress.update(raw.tell() - position)
                    position = raw.tell()
                    yield chunk
            except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
                raise UserError(f"{path} is damaged ({error}): get it again, or leave it out") from error

    def decode(self, stream: IO, name: str) -> Iterator[str]:
        """Decode a stream of UTF-8 bytes chunk by chunk. Raises UserError with the offset of what can't be decoded."""
        decoder, offset, chunk = self.decoder(self.errors), 0, b"start"
        while chunk:
            chunk = stream.read(PIECE)
            start = offset - len(decoder.getstate()[0])  # of the bytes that this call decodes
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise UserError(
                    f"{name} is not UTF-8 text: byte {byte:#04x} at offset {start + error.start}; convert it first "
                    "(iconv -f ITS_ENCODING -t utf-8), or use --errors replace"
                ) from error
            offset += len(chunk)

    def lines(self, path: Path) -> Iterator[str]:
        """The lines of a file, without their ends, one at a time."""
        rest = ""
        for chunk in self.chunks(path):
            *lines, rest = (rest + chunk).split("\n")
            yield from lines
        yield rest


def read_text(path: Path) -> str:
    """The whole text of a UTF-8 file. Raises UserError."""
    with tqdm(disable=True) as progress:
        return "".join(Reader("strict", progress).chunks(path))


class Piece(NamedTuple):
    """A document, or the next part of one too long to be held in memory."""

    text: str
    last: bool  # ends its document
    split: str | None  # "train" or "val" where the publisher decides it


def document(chunks: Iterable[str], split: str | None = None) -> Iterator[Piece]:
    """The pieces of the document whose text comes in `chunks`."""
    text = ""
    for chunk in chunks:
        text += chunk
        while len(text) > 2 * PIECE:
            cut = find_cut(text[: 2 * PIECE])
            yield Piece(text[:cut], False, split)
            text = text[cut:]
    yield Piece(text, True, split)


def find_cut(text: str) -> int:
    """Where a long text can be cut such that its parts encode to the tokens of the whole.

    Every tiktoken encoding begins a new word between a letter or digit and white space. A text that never has one after
    the other is cut at its end, where one token may come out as two.
    """
    for end in (" ", "\n"):
        at = len(text)
        while (at := text.rfind(end, len(text) // 2, at)) > 0:
            if text[at - 1].isascii() and text[at - 1].isalnum():
                return at
    return len(text)


# Sources of documents


class Source(NamedTuple):
    """Where documents come from. Reading them again gives the same ones in the same order."""

    description: str  # for meta.json
    files: list[Path]  # what is read: their sizes and dates tell whether an interrupted run can go on
    documents: Callable[[Reader], Iterator[Piece]]
    published_split: bool = False  # pieces say which split they belong to


def files_source(description: str, files: list[Path], field: str | None = None) -> Source:
    """Every file a document, or every line of a .jsonl the text of one, in `field`."""

    def documents(reader: Reader) -> Iterator[Piece]:
        for path in files:
            plain_name = path.name.removesuffix(".gz").removesuffix(".xz")
            if plain_name.endswith(".jsonl") or (field and plain_name == "stdin"):
                yield from read_jsonl(reader, path, field or "text")
            else:
                yield from document(reader.chunks(path))

    return Source(description, files, documents)


def read_jsonl(reader: Reader, path: Path, field: str) -> Iterator[Piece]:
    """The documents of a file that holds a JSON object per line."""
    for number, line in enumerate(reader.lines(path), start=1):
        if line.strip():
            try:
                text = json.loads(line.removeprefix("\ufeff"))[field]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise UserError(
                    f"line {number} of {path} is not a JSON object with a text {field!r}; choose another --field"
                )
            # A lone surrogate can be written in JSON, but not in UTF-8.
            as_bytes = io.BytesIO(text.encode(errors="surrogatepass"))
            yield from document(reader.decode(as_bytes, f"line {number} of {path}"))


def stdlib_source() -> Source:
    """The .py files of the running interpreter's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - left_out  # os.walk does not go into what is taken out here
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    paths.sort()
    if not paths:
        raise UserError(
            f"this Python has no standard library sources under {root}; use any folder of source code instead: "
            "python prepare.py FOLDER --pattern '*.py' --name stdlib --encoding bytes"
        )
    return files_source(f"standard library of {platform.python_implementation()} {platform.python_version()}", paths)


def local_source(arguments: list[str], pattern: str, field: str | None) -> Source:
    """Files as given, folders searched for `pattern`, each file once."""
    paths = []
    for path in map(Path, arguments):
        if path.is_dir():
            try:
                found = sorted(p for p in path.rglob(pattern) if p.is_file())
            except (ValueError, NotImplementedError) as error:
                raise UserError(
                    f"--pattern {pattern!r} can't be searched for ({error}); use one such as '*.md'"
                ) from error
            if not found:
                raise UserError(f"no file in {path} matches {pattern!r}; choose another --pattern, such as '*.md'")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            known = ", ".join(KNOWN)
            raise UserError(f"{path} does not exist; give a file, a folder or one of the known datasets: {known}")
    description = " ".join(arguments) + (f", field {field!r}" if field else "")
    return files_source(description, list(dict.fromkeys(paths)), field)


def tinystories_source(base_url: str | None, version: int) -> Source:
    """TinyStories with its published split: stories between lines that hold only <|endoftext|>, stripped."""
    folder = DATA / ("tinystories" if version == 2 else "tinystories-v1") / "raw"
    url, paths = base_url or TINYSTORIES_URL, {}
    for split, name, size, sha256 in TINYSTORIES_FILES[version]:
        paths[split] = folder / name
        download(url + name, paths[split], size, sha256)

    def documents(reader: Reader) -> Iterator[Piece]:
        for split, path in paths.items():
            story = []
            for line in reader.lines(path):
                if line.strip() == END_OF_TEXT:
                    yield from document(["\n".join(story).strip()], split)
                    story = []
                else:
                    story.append(line)
            yield from document(["\n".join(story).strip()], split)

    return Source(f"TinyStories version {version}, {url}", list(paths.values()), documents, published_split=True)


def openwebtext_source(base_url: str | None, workers: int) -> Source:
    """OpenWebText with nanoGPT's split. 21 archives, each a tar of tar.xz files of documents, read as one stream."""
    url, folder = base_url or OPENWEBTEXT_URL, DATA / "openwebtext" / "raw"
    paths = [folder / f"urlsf_subset{i:02}.tar" for i in range(OPENWEBTEXT_ARCHIVES)]
    archives, tokens = OPENWEBTEXT_BYTES
    missing = archives * sum(not path.exists() for path in paths) // len(paths)
    DATA.mkdir(exist_ok=True)
    free = shutil.disk_usage(DATA).free
    hours = OPENWEBTEXT_TEXT / (MEGABYTES_PER_SECOND * 1e6 * workers) / 3600
    print(
        f"OpenWebText needs {archives / 1e9:.0f} GB for the archives ({missing / 1e9:.1f} GB still to download), "
        f"{tokens / 1e9:.0f} GB for the tokens ({free / 1e9:.0f} GB are free in {DATA}/), less than 1 GB of memory, "
        f"and after the download about {hours:.1f} hours with {workers} threads"
    )
    if free < missing + tokens:
        raise UserError(
            f"{DATA}/ has {free / 1e9:.0f} GB free, OpenWebText needs {(missing + tokens) / 1e9:.0f} GB more"
        )
    for path in paths:
        download(url + path.name, path)
    order = np.random.default_rng(2357).permutation(OPENWEBTEXT_DOCUMENTS)
    val = set(order[:OPENWEBTEXT_VAL_DOCUMENTS].tolist())

    def documents(reader: Reader) -> Iterator[Piece]:
        index = -1
        for index, text in enumerate(read_openwebtext(reader, paths)):
            yield from document([text], "val" if index in val else "train")
        if index + 1 != OPENWEBTEXT_DOCUMENTS:
            raise UserError(
                f"the archives in {folder} hold {index + 1:,} documents instead of the published "
                f"{OPENWEBTEXT_DOCUMENTS:,}: delete them to download them again"
            )

    return Source(f"OpenWebText, {url}", paths, documents, published_split=True)


def read_openwebtext(reader: Reader, paths: list[Path]) -> Iterator[str]:
    """The documents of the archives, as nanoGPT's users know them: three or more line ends become two, stripped."""
    for path in paths:
        with path.open("rb") as raw:
            try:
                with tarfile.open(fileobj=raw, mode="r|") as archive:
                    for member in archive:  # members are read and never extracted: their names reach no file system
                        if not member.name.endswith(".xz"):
                            continue
                        with tarfile.open(fileobj=archive.extractfile(member), mode="r|xz") as subset:
                            for entry in subset:
                                if entry.isfile() and entry.name.endswith(".txt"):
                                    stream = subset.extractfile(entry)
                                    text = "".join(reader.decode(stream, f"{path}:{member.name}:{entry.name}"))
                                    yield re.sub("\n\n\n+", "\n\n", text).strip()
                        reader.progress.update(member.size)
            except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
                raise UserError(f"{path} is damaged ({error}): delete it to download it again") from error


KNOWN = ("stdlib", "tinystories", "openwebtext")  # datasets that train.py can prepare by itself


# Downloads

RETRIES = 6  # after failures in a row, without a byte in between
RETRY_SECONDS = 1.0  # before the first retry; doubled for each further one


def download(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Fetch url to path unless it is there: resumed where it broke off, retried, under a temporary name until whole.

    Length and checksum are verified where they are known. Raises UserError, which says how to do it by hand.
    """
    if path.exists():
        if size not in (None, path.stat().st_size):
            raise UserError(f"{path} has {path.stat().st_size:,} bytes instead of the published {size:,}: delete it")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    by_hand = f"or fetch {url} by hand and save it as {path}"
    with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as progress:
        failures = 0
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                total = fetch(url, part, progress)
                if part.stat().st_size == total:
                    break
                problem = "connection cut"
            except urllib.error.HTTPError as error:
                problem = f"HTTP status {error.code}"
                if error.code not in (408, 416, 425, 429) and error.code < 500:
                    raise UserError(
                        f"{url} can't be downloaded ({problem}); try another --base-url, {by_hand}"
                    ) from error
            except ValueError as error:
                raise UserError(f"{url} is no address to download from ({error}); mend --base-url") from error
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                problem = str(getattr(error, "reason", error))
                if isinstance(getattr(error, "reason", None), socket.gaierror | ConnectionRefusedError) and not before:
                    raise UserError(
                        f"no network: {url} can't be reached ({problem}); try again later, {by_hand}"
                    ) from error
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > before else failures + 1
            if failures > RETRIES:
                raise UserError(f"{url} can't be downloaded ({problem}); start again to go on, {by_hand}")
            time.sleep(RETRY_SECONDS * 2 ** max(0, failures - 1))
    got = part.stat().st_size
    if size is not None and got != size:
        part.unlink()
        raise UserError(f"{url} has {got:,} bytes instead of the published {size:,}; try again, {by_hand}")
    if sha256 is not None and file_sha256(part) != sha256:
        part.unlink()
        raise UserError(f"{url} has another checksum than the published one; try again, {by_hand}")
    os.replace(part, path)


def fetch(url: str, part: Path, progress: tqdm) -> int:
    """One attempt: append to `part` what is missing, or start anew where the server can't. Returns the whole length."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond what is there: it is whole, or not the file we thought
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return have
            part.unlink()
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        progress.total = start + int(length) if length else None
        progress.n = start
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                progress.update(len(chunk))
            sync(file)
            return start + int(length) if length else file.tell()


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Splits: by contents, so that equal documents (and a document that moved) end up on the same side


class Splitter:
    """Sends each document to train or val: a hash of its text, uniform in [0, 2**64), is compared with a threshold.

    Of a document in several pieces the first one decides.
    """

    def __init__(self, val_fraction: float, seed: int):
        self.key = str(seed).encode()
        self.val_fraction = val_fraction
        self.threshold = int(val_fraction * 2**64)
        self.cut_at = None  # cut every document there instead: the only way to split a single one
        self.reset()

    def reset(self) -> None:
        """Begin a pass over all documents."""
        self.split, self.position = None, 0  # of the document under way
        self.documents, self.empty, self.characters = 0, 0, 0
        self.smallest, self.largest = 2**64, -1  # hashes

    def __call__(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, str, bool]]:
        """Yield (split, text, whether a document ends there). Empty documents are left out and counted."""
        for text, last, published in pieces:
            self.characters += len(text)
            if self.position == 0:
                if last and not text:
                    self.empty += 1
                    continue
                self.documents += 1
                self.split = published or self.by_hash(text)
            if self.cut_at is None:
                yield self.split, text, last
            else:
                yield from self.cut(text, last)
            self.position = 0 if last else self.position + len(text)

    def by_hash(self, text: str) -> str:
        """The split of the document that begins with `text`."""
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=self.key).digest())
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)
        return "val" if value < self.threshold else "train"

    def cut(self, text: str, last: bool) -> Iterator[tuple[str, str, bool]]:
        """Up to character cut_at, or the line end before it, a document goes to train; the rest goes to val."""
        at = self.cut_at - self.position
        if at >= len(text) and not last:
            yield "train", text, False
        elif at <= 0:
            yield "val", text, last
        else:
            at = text.rfind("\n", 0, at) + 1 or min(at, len(text) - 1)
            yield "train", text[:at], True
            yield "val", text[at:], last

    def settle(self, pieces: Iterable[Piece]) -> None:
        """Read on until both splits have a document. If one would stay empty, make sure that it gets something."""
        seen = set()
        for split, _, _ in self(pieces):
            seen.add(split)
            if len(seen) == len(SPLITS):
                return
        if self.documents and self.smallest == self.largest:
            self.cut_at = int(self.characters / self.documents * (1 - self.val_fraction))
            print("only one document, or copies of one: its beginning becomes train, its end val")
        elif self.documents:
            self.threshold = self.largest if seen == {"val"} else self.smallest + 1
            print(f"{self.documents} documents, by chance all in {seen.pop()}: the nearest one goes to the other split")


# Writing


def sync(file: IO) -> None:
    """Make sure that what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file beside `path` that takes its name when the block ends; after an error the old file stays."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open(mode) as file:
            yield file
            sync(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


Batch = list[tuple[str, str, bool]]  # (split, text, whether a document ends there)


def batches(parts: Iterable[tuple[str, str, bool]]) -> Iterator[Batch]:
    """Group texts into lists of about BATCH characters."""
    batch, characters = [], 0
    for part in parts:
        batch.append(part)
        characters += len(part[1])
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode(encoding: tiktoken.Encoding, batch: Batch) -> dict[str, tuple[np.ndarray, int, int]]:
    """For each split of a batch: token ids with <|endoftext|> after every document, documents, bytes of text."""
    dtype = token_dtype(encoding.n_vocab)
    result = {}
    for split in SPLITS:
        parts = [(text, last) for where, text, last in batch if where == split]
        size = sum(len(text.encode()) for text, _ in parts)
        if encoding.name == "bytes":  # the bytes are the ids: a hundred times faster than asking tiktoken
            ids = [np.frombuffer(text.encode() + b"\0" * last, dtype=np.uint8).astype(dtype) for text, last in parts]
            for piece, (_, last) in zip(ids, parts, strict=True):
                piece[len(piece) - last :] = encoding.eot_token
        elif END_OF_TEXT in "".join(text for text, _ in parts):  # as ordinary text, even where a cut goes through it
            ids = []
            for text, last in parts:
                ids += [encoding.encode_to_numpy(text, disallowed_special=()), [encoding.eot_token] * last]
        else:  # documents joined by the separator itself: twice as fast as one by one where they are short
            joined = "".join(text + END_OF_TEXT * last for text, last in parts)
            ids = [encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT})]
        ids = np.concatenate([np.zeros(0, dtype), *(np.asarray(piece, dtype=dtype) for piece in ids)])
        result[split] = ids, sum(last for _, last in parts), size
    return result


def encode_all(encoding: tiktoken.Encoding, todo: Iterator[Batch], workers: int) -> Iterator[dict]:
    """encode(batch) for every batch, in order, by several threads (tiktoken works outside Python's lock)."""
    with ThreadPoolExecutor(workers) as pool:
        pending = collections.deque()
        for batch in todo:
            pending.append(pool.submit(encode, encoding, batch))
            if len(pending) > 2 * workers:  # enough to keep all threads busy, little enough to hold in memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def load_state(path: Path, identity: list) -> dict:
    """What an interrupted run with the same settings and files had written when it last saved, or a fresh start."""
    try:
        state = json.loads(path.read_text())
        whole = all(path.with_name(f"{split}.bin").stat().st_size >= state["file_size"][split] for split in SPLITS)
        if state["identity"] == identity and whole and state["done"] > 0:
            tqdm.write(f"going on after {state['done']} batches of an interrupted run")
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing usable: not an error, only more work
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    return {"identity": identity, "done": 0, "file_size": dict.fromkeys(SPLITS, 0), "counts": counts}


def write_bins(
    source: Source, folder: Path, encoding: tiktoken.Encoding, splitter: Splitter, errors: str, workers: int
) -> tuple[dict, dict]:
    """Read all documents once and write folder/{train,val}.bin. Returns what was written per split, and what was not.

    Every SHARD batches the state is saved. A run that was interrupted reads its documents again, but encodes and writes
    only what comes after that.
    """
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    settings = [source.description, encoding.name, errors, PIECE, BATCH]
    split = [splitter.key.decode(), splitter.threshold, splitter.cut_at]
    state = load_state(folder / "state.json", [*settings, *split, hashlib.sha256(repr(files).encode()).hexdigest()])
    done, counts = state["done"], state["counts"]
    size = sum(size for _, size, _ in files)
    with (
        (folder / "train.bin").open("ab") as train,
        (folder / "val.bin").open("ab") as val,
        tqdm(desc="tokenizing", total=size, unit="B", unit_scale=True) as progress,
    ):
        bins = {"train": train, "val": val}
        for split, file in bins.items():
            file.truncate(state["file_size"][split])
            file.seek(0, os.SEEK_END)

        def save() -> None:
            for split, file in bins.items():
                sync(file)
                state["file_size"][split] = file.tell()
            state["done"] = done
            with replacing(folder / "state.json", "w") as file:
                json.dump(state, file)

        reader = Reader(errors, progress)
        splitter.reset()
        todo = itertools.islice(batches(splitter(source.documents(reader))), done, None)
        for result in encode_all(encoding, todo, workers):
            for split, (ids, documents, text_bytes) in result.items():
                bins[split].write(ids.tobytes())
                counts[split]["documents"] += documents
                counts[split]["bytes"] += text_bytes
                counts[split]["tokens"] += len(ids)
            done += 1
            if done % SHARD == 0:
                save()
        save()
    return counts, {"empty": splitter.empty, "replaced": reader.replaced}


def write_dataset(
    source: Source, name: str, encoding: tiktoken.Encoding, val_fraction: float, seed: int, errors: str, workers: int
) -> dict:
    """Prepare data/NAME from a source; returns what meta.json holds. An older one stays until the new one is whole."""
    splitter = Splitter(val_fraction, seed)
    if not source.published_split:
        with tqdm(desc="looking at the documents", unit="B", unit_scale=True, leave=False) as progress:
            splitter.settle(source.documents(Reader(errors, progress)))
    unfinished = DATA / f".{name}.unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        counts, left_out = write_bins(source, unfinished, encoding, splitter, errors, workers)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left in {DATA}/: make room and start again, it will go on") from error
        raise
    for split in SPLITS:
        if not counts[split]["tokens"]:
            shutil.rmtree(unfinished)
            raise UserError(f"{source.description} contains no text for {split}: nothing was written")
    for split in SPLITS:
        counts[split]["sha256"] = file_sha256(unfinished / f"{split}.bin")
    meta = {
        "name": name,
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "dtype": token_dtype(encoding.n_vocab).name,
        "splits": counts,
        **left_out,
        "source": source.description,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    with replacing(unfinished / "meta.json", "w") as file:
        json.dump(meta, file, indent=2)
    folder = DATA / name
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # from here until it is back, data/NAME counts as not prepared
    for file in ("train.bin", "val.bin", "meta.json"):
        os.replace(unfinished / file, folder / file)
    shutil.rmtree(unfinished)
    return meta


def prepare(
    what: list[str],
    name: str | None = None,
    encoding: str | None = None,
    pattern: str = "*.txt",
    field: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 1337,
    errors: str = "strict",
    workers: int | None = None,
    base_url: str | None = None,
    v1: bool = False,
) -> dict:
    """Prepare a known dataset (one name) or local files and folders; returns what meta.json holds. Raises UserError."""
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must lie between 0 and 1, got {val_fraction}")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed must be at least 0 and below 2**63, got {seed}")
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    known = [w for w in what if w in KNOWN]
    if known and len(what) > 1:
        raise UserError(f"{known[0]} is prepared alone: python prepare.py {known[0]}")
    if what.count("-") > 1:
        raise UserError("standard input (-) can be read only once")
    for option, given, where in (
        ("--v1", v1, ("tinystories",)),
        ("--base-url", base_url, ("tinystories", "openwebtext")),
    ):
        if given and what[0] not in where:
            raise UserError(f"{option} is for {' and '.join(where)} only")
    if field and known:
        raise UserError(f"--field is for .jsonl files, not for {known[0]}")
    if name is None:
        plain = re.sub(r"(\.(txt|jsonl))?(\.(gz|xz))?$", "", Path(what[0]).resolve().name)
        name = known[0] + "-v1" * v1 if known else "stdin" if what[0] == "-" else plain
        if name in KNOWN and not known:
            raise UserError(
                f"{what[0]} would be prepared under the name of a known dataset; choose another with --name"
            )
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} can't be the name of a dataset (letters, digits, _ . -); choose one with --name")
    if encoding is None:
        encoding = "bytes" if what == ["stdlib"] else "gpt2"
    loaded = get_encoding(encoding)  # before any download or long reading
    base_url = base_url.rstrip("/") + "/" if base_url else None
    if what == ["stdlib"]:
        source = stdlib_source()
    elif what == ["tinystories"]:
        source = tinystories_source(base_url, version=1 if v1 else 2)
    elif what == ["openwebtext"]:
        source = openwebtext_source(base_url, workers)
    else:
        source = local_source([save_stdin(name) if w == "-" else w for w in what], pattern, field)
    meta = write_dataset(source, name, loaded, val_fraction, seed, errors, workers)
    print_table(meta)
    if what == ["openwebtext"] and encoding == "gpt2":
        agree = all(meta["splits"][split]["tokens"] == tokens for split, tokens in OPENWEBTEXT_TOKENS.items())
        print(f"the numbers of tokens {'equal' if agree else 'differ from'} nanoGPT's: {OPENWEBTEXT_TOKENS}")
    return meta


def save_stdin(name: str) -> str:
    """Copy standard input to data/NAME/raw/stdin, because documents may have to be read twice. Returns the path."""
    if sys.stdin is None:
        raise UserError("standard input is closed; pipe text into python prepare.py -")
    path = DATA / name / "raw" / "stdin"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return str(path)


def print_table(meta: dict) -> None:
    """What meta.json holds, for people."""
    vocabulary = f"{meta['encoding']} encoding, {meta['vocab_size']} ids as {meta['dtype']}"
    print(f"{DATA / meta['name']}: {meta['source']}, {vocabulary}")
    print(f"{'':8}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>14}")
    for split, n in meta["splits"].items():
        ratio = n["bytes"] / n["tokens"]
        print(f"{split:8}{n['documents']:>12,}{n['bytes']:>16,}{n['tokens']:>16,}{ratio:>14.2f}")
    if meta["empty"] or meta["replaced"]:
        print(f"{meta['empty']:,} empty documents left out, {meta['replaced']:,} undecodable places replaced")


# Reading a prepared dataset


def load_meta(name: str) -> dict:
    """Contents of data/NAME/meta.json. Raises UserError where the dataset is missing or damaged."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} can't be the name of a dataset (letters, digits, _ . -)")
    path = DATA / name / "meta.json"
    how = f"python prepare.py {name}" if name in KNOWN else f"python prepare.py FILE_OR_FOLDER --name {name}"
    if not path.exists():
        raise UserError(f"dataset {name!r} is not prepared ({path} is missing); run: {how}")
    try:
        meta = json.loads(path.read_text())
        usable = meta["vocab_size"] > 0 and np.dtype(meta["dtype"]) == token_dtype(meta["vocab_size"])
        usable = usable and all(meta["splits"][split][key] > 0 for split in SPLITS for key in ("tokens", "bytes"))
        usable = usable and isinstance(meta["encoding"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        usable = False
    if not usable:
        raise UserError(f"{path} is damaged; run again: {how}")
    return meta


def load_tokens(name: str, split: str) -> np.ndarray:
    """Token ids of one split, memory-mapped read-only. Raises UserError if the file does not match meta.json."""
    meta = load_meta(name)
    path = DATA / name / f"{split}.bin"
    expected = meta["splits"][split]["tokens"] * np.dtype(meta["dtype"]).itemsize
    if not path.exists() or path.stat().st_size != expected:
        found = f"{path.stat().st_size:,} bytes" if path.exists() else "missing"
        raise UserError(
            f"{path} is {found}, meta.json promises {expected:,} bytes: prepare {name} again with python prepare.py"
        )
    return np.memmap(path, dtype=meta["dtype"], mode="r")


class Dataset(NamedTuple):
    """What is in data/NAME."""

    name: str
    meta: dict  # contents of meta.json
    train: np.ndarray  # token ids
    val: np.ndarray

    @property
    def bytes_per_token(self) -> float:
        """Length of the validation split's text in bytes, over its tokens."""
        val = self.meta["splits"]["val"]
        return val["bytes"] / val["tokens"]

    @property
    def fingerprint(self) -> dict:
        """Checksums of the tokens, which change when a dataset is prepared anew with another result."""
        return {split: self.meta["splits"][split].get("sha256") for split in SPLITS}

    def check_fits(self, encoding: str, vocab_size: int, block_size: int) -> None:
        """Raise UserError unless a model that reads `encoding` can be trained and evaluated on these tokens."""
        if self.meta["encoding"] != encoding:
            raise UserError(
                f"dataset {self.name!r} is in the {self.meta['encoding']} encoding, the model reads {encoding}: "
                f"prepare the text once more with --encoding {encoding} and another --name"
            )
        if self.meta["vocab_size"] > vocab_size:
            raise UserError(
                f"dataset {self.name!r} has {self.meta['vocab_size']} token ids, more than vocab_size {vocab_size}: "
                "raise vocab_size, or leave it out to take the dataset's"
            )
        for split, tokens in (("train", self.train), ("val", self.val)):
            if len(tokens) <= block_size:
                raise UserError(
                    f"the {split} split of {self.name!r} has {len(tokens)} tokens, too few for block_size "
                    f"{block_size}: prepare more text, or choose a smaller block_size"
                )


def open_dataset(name: str) -> Dataset:
    """The dataset data/NAME, memory-mapped. Raises UserError."""
    return Dataset(name, load_meta(name), *(load_tokens(name, split) for split in SPLITS))


def cut_windows(tokens: np.ndarray, offsets: np.ndarray, length: int, vocab_size: int) -> np.ndarray:
    """Windows of `length` tokens that start at `offsets`, (offsets, length) as int64. Raises UserError for a bad id."""
    windows = np.stack([tokens[i : i + length] for i in offsets]).astype(np.int64)
    if windows.max() >= vocab_size:
        raise UserError(
            f"{tokens.filename} holds token id {windows.max()}, beyond vocab_size {vocab_size}: "
            "prepare the dataset again with python prepare.py"
        )
    return windows


def spaced_offsets(tokens: np.ndarray, block_size: int, wanted: int) -> np.ndarray:
    """Where evenly spaced windows begin that hold about `wanted` tokens together, each with a target for its last."""
    count = max(1, min(wanted, len(tokens) - 1) // block_size)
    return np.linspace(0, len(tokens) - block_size - 1, count).astype(np.int64)


def check(name: str) -> None:
    """Compare data/NAME with its meta.json and show the first document. Raises UserError if anything differs."""
    meta = load_meta(name)
    encoding = get_encoding(meta["encoding"])
    for split in SPLITS:
        load_tokens(name, split)  # checks the length
        if file_sha256(DATA / name / f"{split}.bin") != meta["splits"][split].get("sha256"):
            raise UserError(f"{DATA / name / split}.bin is not what was written (checksum); prepare {name} again")
    print_table(meta)
    first = load_tokens(name, "train")[:2000].tolist()
    if encoding.eot_token in first:
        first = first[: first.index(encoding.eot_token)]
    print(f"checksums agree; the first training document begins:\n\n{encoding.decode(first)}")


def main() -> None:
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="NAME_OR_PATH", help=f"{', '.join(KNOWN)}; or files, folders, - for standard input")
    add("--check", metavar="NAME", help="verify a prepared dataset and show its first document")
    add("--name", help="the dataset's name (default: the known dataset's, or the first path's)")
    add("--encoding", help="bytes, or a tiktoken encoding (default: bytes for stdlib, else gpt2)")
    add("--pattern", default="*.txt", help="which files of a folder are documents (default: *.txt)")
    add("--field", help="which field of a .jsonl line is the text; makes standard input .jsonl (default: text)")
    add("--val-fraction", type=float, default=0.1, help="share of documents for val (default: 0.1)")
    add("--seed", type=int, default=1337, help="another seed, another split (default: 1337)")
    add(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="undecodable bytes: refuse, or replace and count",
    )
    add("--workers", type=int, help="threads that tokenize (default: one per core)")
    add("--base-url", help="where to download from instead: a mirror with the publisher's file names")
    add("--v1", action="store_true", help="tinystories: version 1, written by GPT-3.5 and GPT-4")
    arguments = vars(parser.parse_args())
    name = arguments.pop("check")
    if bool(name) == bool(arguments["what"]):
        raise UserError("give either what to prepare or --check NAME (see python prepare.py --help)")
    if name:
        check(name)
    else:
        prepare(**arguments)


if __name__ == "__main__":
    run(main)
