"""Turn text into the token files that train.py reads: data/NAME/train.bin, val.bin and meta.json.

    python prepare.py stdlib                        # Python's own standard library: on every machine, no download
    python prepare.py tinystories                   # downloads 2.3 GB of short stories
    python prepare.py notes.txt novels/             # your own text: files, and folders searched for --pattern
    python prepare.py ~/src --pattern '*.py' --name source --encoding bytes

A .bin is a flat array of token ids (uint16, or uint32 where the vocabulary needs it), every document followed by
<|endoftext|>. Text flows in one direction: a source yields documents, each goes to one split by a hash of its contents,
an encoding turns it into ids, and the ids are appended to that split's file.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

DATA = Path("data")  # under the folder in which the command is run
SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"  # written between documents; inside a document these characters are ordinary text
BATCH_CHARACTERS = 4_000_000  # encoded at once: enough to keep all cores busy, little enough to hold in memory

# Version 2 (written by GPT-4), licence CDLA-Sharing-1.0
TINYSTORIES_REVISION = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
TINYSTORIES_URL = f"https://huggingface.co/datasets/roneneldan/TinyStories/resolve/{TINYSTORIES_REVISION}/"
TINYSTORIES_TRAIN_SHA256 = "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"
TINYSTORIES_VAL_SHA256 = "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"
TINYSTORIES_FILES = {  # split: (file, bytes, checksum)
    "train": ("TinyStoriesV2-GPT4-train.txt", 2_227_753_162, TINYSTORIES_TRAIN_SHA256),
    "val": ("TinyStoriesV2-GPT4-valid.txt", 22_502_601, TINYSTORIES_VAL_SHA256),
}
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
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
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


def encode(encoding: tiktoken.Encoding, texts: list[str], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Token ids of each text, <|endoftext|> appended."""
    if encoding.name == "bytes":  # the bytes are the ids: thousands of times faster than asking tiktoken
        batches = (np.frombuffer(text.encode(), dtype=np.uint8) for text in texts)
    else:
        batches = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
    for ids in batches:
        yield np.append(np.asarray(ids, dtype=dtype), dtype.type(encoding.eot_token))


# Sources of documents


class Document(NamedTuple):
    """A text that is never cut in two between the splits."""

    text: str
    split: str | None = None  # "train" or "val" where the publisher decides it


class Source(NamedTuple):
    """Where documents come from. `documents()` can be called again and yields the same ones in the same order."""

    description: str  # for meta.json
    size: int  # bytes to read, for the progress bar
    documents: Callable[[], Iterable[Document]]


def read_text(path: Path) -> str:
    """Contents of a UTF-8 file, line ends untouched. Raises UserError for any other encoding."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at offset {error.start}; "
            f"convert it first, for example with iconv -f latin1 -t utf-8"
        ) from error


def files_source(description: str, paths: list[Path]) -> Source:
    """Every file a document."""
    size = sum(path.stat().st_size for path in paths)
    return Source(description, size, lambda: (Document(read_text(path)) for path in paths))


def stdlib_source() -> Source:
    """The .py files of the running interpreter's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out.intersection(path.relative_to(root).parts)]
    if not paths:
        raise UserError(
            f"this Python has no standard library sources under {root}; use any folder of source code instead: "
            "python prepare.py FOLDER --pattern '*.py' --name stdlib --encoding bytes"
        )
    return files_source(f"standard library of {platform.python_implementation()} {platform.python_version()}", paths)


def local_source(arguments: list[str], pattern: str) -> Source:
    """Files as given, folders searched for `pattern`, each file once."""
    paths = []
    for path in map(Path, arguments):
        if path.is_dir():
            found = sorted(p for p in path.rglob(pattern) if p.is_file())
            if not found:
                raise UserError(f"no file in {path} matches {pattern!r}; choose another --pattern, such as '*.md'")
            paths += found
        elif path.exists():
            paths.append(path)
        else:
            known = ", ".join(KNOWN)
            raise UserError(f"{path} does not exist; give a file, a folder or one of the known datasets: {known}")
    return files_source(" ".join(arguments), list(dict.fromkeys(paths)))


def tinystories_source() -> Source:
    """TinyStories V2 with its published split, downloaded to data/tinystories/raw unless it is there already."""
    paths = {split: DATA / "tinystories" / "raw" / file for split, (file, _, _) in TINYSTORIES_FILES.items()}
    for split, (file, size, sha256) in TINYSTORIES_FILES.items():
        download(TINYSTORIES_URL + file, paths[split], size, sha256)

    def documents() -> Iterator[Document]:
        for split, path in paths.items():
            for story in read_separated(path):
                yield Document(story, split)

    return Source(TINYSTORIES_URL, sum(path.stat().st_size for path in paths.values()), documents)


def read_separated(path: Path) -> Iterator[str]:
    """Stripped documents of a file in which lines holding only <|endoftext|> stand between them, one at a time."""
    lines = []
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            for line in file:
                if line.strip() == END_OF_TEXT:
                    yield "".join(lines).strip()
                    lines = []
                else:
                    lines.append(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error.reason}; delete it to download it again") from error
    yield "".join(lines).strip()


def download(url: str, path: Path, size: int, sha256: str) -> None:
    """Fetch url to path unless it is there. Under a temporary name until length and checksum are right. UserError."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, replacing(path) as file:
            with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as progress:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    progress.update(len(chunk))
            if file.tell() != size or digest.hexdigest() != sha256:
                got = f"{file.tell():,} bytes instead of {size:,}" if file.tell() != size else "another checksum"
                raise UserError(f"{url} is not the published file ({got}); try again")
    except OSError as error:  # urllib's errors are OSErrors
        raise UserError(f"can't download {url} ({error}); fetch it by hand and save it as {path}") from error


KNOWN = {"stdlib": stdlib_source, "tinystories": tinystories_source}  # datasets that train.py can prepare by itself


# Splits: by contents, so that equal documents (and a document that moved) end up on the same side


class Splitter:
    """Sends each document to train or val: a hash of its text, uniform in [0, 2**64), is compared with a threshold."""

    def __init__(self, val_fraction: float, seed: int):
        self.key = str(seed).encode()
        self.val_fraction = val_fraction
        self.threshold = int(val_fraction * 2**64)
        self.cut = False  # cut every document in two instead: the only way to split a single one
        self.smallest, self.largest = 2**64, -1  # hashes seen

    def __call__(self, document: Document) -> Iterator[tuple[str, str]]:
        """Yield (split, text): one pair, or two of a document that has to be cut."""
        if document.split:
            yield document.split, document.text
            return
        if self.cut:
            at = int(len(document.text) * (1 - self.val_fraction))
            at = document.text.rfind("\n", 0, at) + 1 or at  # after a whole line, if there is one
            yield "train", document.text[:at]
            yield "val", document.text[at:]
            return
        digest = hashlib.blake2b(document.text.encode(), digest_size=8, key=self.key).digest()
        value = int.from_bytes(digest)
        self.smallest, self.largest = min(self.smallest, value), max(self.largest, value)
        yield ("val" if value < self.threshold else "train"), document.text

    def relax(self, empty: str) -> None:
        """Make sure that the split which came out empty gets something when all documents are read again."""
        if self.smallest >= self.largest:
            self.cut = True
            tqdm.write("only one document: its beginning becomes train, its end val")
        else:
            self.threshold = self.smallest + 1 if empty == "val" else self.largest
            tqdm.write(f"by chance no document fell into {empty}: the one whose hash comes closest goes there")


# Writing and reading a prepared dataset


def sync(file: IO) -> None:
    """Make sure that what was written is on the disk before the file gets its final name."""
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


def write_bins(source: Source, folder: Path, encoding: tiktoken.Encoding, splitter: Splitter) -> dict[str, dict]:
    """Read all documents once and write folder/{train,val}.bin. Returns documents, bytes and tokens per split."""
    dtype = token_dtype(encoding.n_vocab)
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "val.bin").open("wb") as val,
        tqdm(desc="tokenizing", total=source.size, unit="B", unit_scale=True) as progress,
    ):
        files = {"train": train, "val": val}
        for batch in batches(pair for document in source.documents() for pair in splitter(document)):
            for (split, text), ids in zip(batch, encode(encoding, [text for _, text in batch], dtype), strict=True):
                files[split].write(ids.tobytes())
                counts[split]["documents"] += 1
                counts[split]["bytes"] += len(text.encode())
                counts[split]["tokens"] += len(ids)
            progress.update(sum(len(text.encode()) for _, text in batch))
        for file in files.values():
            sync(file)
    return counts


def batches(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group (split, text) into lists of about BATCH_CHARACTERS, leaving out empty texts: they teach nothing."""
    batch, characters = [], 0
    for split, text in pairs:
        if text:
            batch.append((split, text))
            characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_dataset(source: Source, name: str, encoding: tiktoken.Encoding, val_fraction: float, seed: int) -> dict:
    """Prepare data/NAME from a source; returns what meta.json holds. An older one stays until the new one is whole."""
    unfinished = DATA / f".{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        splitter = Splitter(val_fraction, seed)
        counts = write_bins(source, unfinished, encoding, splitter)
        if not any(split["tokens"] for split in counts.values()):
            raise UserError(f"{source.description} contains no text: nothing was written")
        for split in SPLITS:
            if not counts[split]["tokens"]:
                splitter.relax(split)
                counts = write_bins(source, unfinished, encoding, splitter)
        meta = {
            "name": name,
            "encoding": encoding.name,
            "vocab_size": encoding.n_vocab,
            "dtype": token_dtype(encoding.n_vocab).name,
            "splits": counts,
            "source": source.description,
            "val_fraction": val_fraction,
            "seed": seed,
        }
        with (unfinished / "meta.json").open("w") as file:
            json.dump(meta, file, indent=2)
            sync(file)
        folder = DATA / name
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)  # from here until it is back, data/NAME counts as not prepared
        for file in ("train.bin", "val.bin", "meta.json"):
            os.replace(unfinished / file, folder / file)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return meta


def prepare(
    what: list[str],
    name: str | None = None,
    encoding: str | None = None,
    pattern: str = "*.txt",
    val_fraction: float = 0.1,
    seed: int = 1337,
) -> dict:
    """Prepare a known dataset (one name) or local files and folders; returns what meta.json holds. Raises UserError."""
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction must lie between 0 and 1, got {val_fraction}")
    if name is None:
        name = what[0] if what[0] in KNOWN else Path(what[0]).resolve().stem
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"{name!r} can't be the name of a dataset (letters, digits, _ . -); choose one with --name")
    if encoding is None:
        encoding = "bytes" if what == ["stdlib"] else "gpt2"
    loaded = get_encoding(encoding)  # before any download or long reading
    if len(what) > 1 and (known := [w for w in what if w in KNOWN and not Path(w).exists()]):
        raise UserError(f"{known[0]} is prepared alone: python prepare.py {known[0]}")
    source = KNOWN[what[0]]() if what[0] in KNOWN else local_source(what, pattern)
    meta = write_dataset(source, name, loaded, val_fraction, seed)
    print(f"{DATA / name}: {meta['source']}, {meta['encoding']} encoding, {meta['vocab_size']} ids as {meta['dtype']}")
    print(f"{'':8}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>14}")
    for split, n in meta["splits"].items():
        ratio = n["bytes"] / n["tokens"]
        print(f"{split:8}{n['documents']:>12,}{n['bytes']:>16,}{n['tokens']:>16,}{ratio:>14.2f}")
    return meta


def load_meta(name: str) -> dict:
    """Contents of data/NAME/meta.json. Raises UserError where the dataset is missing or damaged."""
    path = DATA / name / "meta.json"
    how = f"python prepare.py {name}" if name in KNOWN else f"python prepare.py FILE_OR_FOLDER --name {name}"
    if not path.exists():
        raise UserError(f"dataset {name!r} is not prepared ({path} is missing); run: {how}")
    try:
        meta = json.loads(path.read_text())
        usable = meta["vocab_size"] > 0 and np.dtype(meta["dtype"]) == token_dtype(meta["vocab_size"])
        usable = usable and all(meta["splits"][split][key] > 0 for split in SPLITS for key in ("tokens", "bytes"))
        usable = usable and isinstance(meta["encoding"], str)
    except (ValueError, KeyError, TypeError):
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


def main() -> None:
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="+", metavar="NAME_OR_PATH", help=f"a known dataset ({', '.join(KNOWN)}), or files and folders"
    )
    parser.add_argument("--name", help="the dataset's name (default: the known dataset's, or the first path's stem)")
    parser.add_argument("--encoding", help="bytes, or a tiktoken encoding (default: bytes for stdlib, else gpt2)")
    parser.add_argument("--pattern", default="*.txt", help="which files of a folder are documents (default: *.txt)")
    parser.add_argument("--val-fraction", type=float, default=0.1, help="share of documents for val (default: 0.1)")
    parser.add_argument("--seed", type=int, default=1337, help="another seed, another split (default: 1337)")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    run(main)
