"""Turn text into the token files that train.py reads: data/NAME/train.bin, val.bin and meta.json.

    python prepare.py stdlib               # Python's own standard library: on every machine, no download
    python prepare.py tinystories          # downloads 2.3 GB of short stories
    python prepare.py openwebtext          # downloads 13 GB of web pages
    python prepare.py notes.txt novels/ --name mine    # your own text: files, and folders searched for --pattern

A .bin is a flat array of token ids, <|endoftext|> after every document. Text flows in one direction and is never held
whole: a source yields pieces of documents, threads turn them into ids, one writer appends the ids to their split.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import tiktoken
from tqdm import tqdm

DATA = Path("data")  # below the folder in which a command is run
KNOWN = ("stdlib", "tinystories", "openwebtext")
SPLITS = ("train", "val")
END_OF_TEXT = "<|endoftext|>"  # written after every document; inside of one these characters are ordinary text
BLOCK = 1 << 16  # characters read at a time, and the rest of the line
GROUP = 64  # pieces of text in memory at a time
FEW = 100  # documents; fewer are not split by their hashes, but cut once
RETRY_AFTER = (1, 2, 4, 8, 16, 32)  # seconds until a download is tried again
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HUGGING_FACE = "https://huggingface.co/datasets"
TINYSTORIES_URL = f"{HUGGING_FACE}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
TINYSTORIES = {  # version 2, licence CDLA-Sharing-1.0: file, sha256
    "train": ("TinyStoriesV2-GPT4-train.txt", "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "val": ("TinyStoriesV2-GPT4-valid.txt", "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
}
OPENWEBTEXT_URL = f"{HUGGING_FACE}/Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144/subsets"
OPENWEBTEXT = [f"urlsf_subset{i:02}.tar" for i in range(21)]  # licence cc0-1.0
OPENWEBTEXT_DOCUMENTS, OPENWEBTEXT_VAL = 8_013_769, 4_007  # nanoGPT's split
Piece = tuple[str, str, bool]  # "train" or "val"; some text; whether its document ends there


def require(good: object, message: str) -> None:
    """Raise ValueError if what a person typed, or what a file contained, is not good."""
    if not good:
        raise ValueError(message)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Raise ValueError, one line, instead of printing the whole usage."""
        raise ValueError(f"{message} (see python {self.prog} --help)")


def run(main: Callable[[], None]) -> None:
    """Run a script's main(). What a person can mend becomes one line on stderr and exit status 2."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115  None where the shell closed it: >&-
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character must not end a run
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, MemoryError) as error:
        print("error:", visible(str(error)).replace("\n", " ") or "out of memory", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def visible(text: str) -> str:
    """The text with control characters other than newline and tab escaped, so that it can't steer a terminal."""
    return text.translate({c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"})


@contextlib.contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that takes the name `path` when the block ends; after an error the old one stays. Raises OSError."""
    regular = path.is_file() or not path.exists()  # anything else, a pipe or a device, is written to, never replaced
    path = path.resolve() if regular else path  # a symbolic link stays one
    beside = path.with_name(path.name + ".tmp") if regular else path
    try:
        with beside.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if regular:
                os.fsync(file.fileno())
        if regular:
            os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError in the context of the OSError
        if {getattr(e, "errno", None) for e in (error, error.__context__)} & {errno.ENOSPC, errno.EDQUOT}:
            raise OSError(f"no space left for {path}: make room and start again") from error
        raise
    finally:
        if regular and mode != "ab":  # which goes on with what an earlier attempt has written
            beside.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """The tiktoken encoding called `name`, or "bytes": one token per UTF-8 byte, no download. Raises ValueError."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    require(name in tiktoken.list_encoding_names(), f"unknown encoding {name!r}; choose bytes, gpt2 or cl100k_base")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # requests' errors are OSErrors
        mend = "use --encoding bytes, or set TIKTOKEN_CACHE_DIR to a copy of tiktoken's cache on a machine that has it"
        raise ValueError(f"the {name} vocabulary can't be fetched ({type(error).__name__}): {mend}") from error


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Fetch url to path unless it is there: resumed, retried, renamed when whole. Returns path; raises ValueError."""
    by_hand = f"start again, or fetch it by hand and save it as {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    pauses = list(RETRY_AFTER)
    while not path.exists():
        try:
            fetch(url, path)
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            require(pauses and getattr(error, "code", None) not in (401, 403, 404), f"{url}: {error}; {by_hand}")
            print(f"{url}: {error}; trying again")
            time.sleep(pauses.pop(0))
    require(not sha256 or file_sha256(path) == sha256, f"{path} has a wrong checksum: delete it, {by_hand}")
    return path


def fetch(url: str, path: Path) -> None:
    """One attempt: go on where an earlier one broke off if the server can. Raises unless the file is whole then."""
    with replacing(path, "ab") as file:
        start = max(file.tell() - 1, 0)  # there is a byte to ask for even if only the renaming is missing
        with urlopen(Request(url, headers={"Range": f"bytes={start}-"}), timeout=60) as response:
            start = start if response.status == 206 else 0
            file.seek(start)
            file.truncate()
            size = start + int(response.headers.get("Content-Length", 0))
            with tqdm.wrapattr(response, "read", desc=path.name, initial=start, total=size) as body:
                shutil.copyfileobj(body, file, 1 << 20)
        if file.tell() != size:
            raise ConnectionError(f"{file.tell():,} of {size:,} bytes came")


def read_blocks(path: Path) -> Iterator[tuple[str, bool]]:
    """The text of a UTF-8 file in blocks, each with whether it is the last. Raises ValueError."""
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            text = file.read(BLOCK) + file.readline(BLOCK)  # up to a line end, or as much again of a long line
            while text:
                following = file.read(BLOCK) + file.readline(BLOCK)
                yield text, not following
                text = following
        except UnicodeDecodeError as error:
            offset = file.buffer.tell() - len(error.object) + error.start
            raise ValueError(f"{path} is not UTF-8 at offset {offset}: leave it out, or convert it") from error


def find_files(arguments: list[str], pattern: str) -> list[Path]:
    """Files as given, folders searched for `pattern`, each once. Raises ValueError."""
    paths = []
    for path in map(Path, arguments):
        require(path.exists(), f"{path} does not exist; give files and folders, or one of {', '.join(KNOWN)}")
        found = sorted(p for p in path.rglob("*") if p.match(pattern) and p.is_file()) if path.is_dir() else [path]
        require(found, f"no file in {path} matches {pattern!r}; choose another --pattern, such as '*.md'")
        paths += found
    return list(dict.fromkeys(paths))


def split_by_hash(paths: list[Path], val_fraction: float, seed: int) -> Iterator[Piece]:
    """A document goes to val if the hash of its first block is low: equal documents always go the same way."""
    for path in paths:
        split = None
        for text, last in read_blocks(path):
            if split is None:
                digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()[:64]).digest()
                split = "val" if int.from_bytes(digest) < val_fraction * 2**64 else "train"
            yield split, text, last


def cut_once(paths: list[Path], train_bytes: int) -> Iterator[Piece]:
    """The text up to the last line end within `train_bytes` goes to train, what follows to val."""
    split, done = "train", 0
    for text, last in itertools.chain.from_iterable(map(read_blocks, paths)):
        size = len(text.encode())
        if split == "train" and done + size >= train_bytes:
            head = text.encode()[: train_bytes - done].decode(errors="ignore")
            cut = head.rfind("\n") + 1 or max(len(head), 1)
            yield "train", text[:cut], True
            split, text = "val", text[cut:]
        yield split, text, last
        done += size


def read_local(what: list[str], pattern: str, folder: Path, val_fraction: float, seed: int):
    """Description, size in bytes and pieces of files, a document each; streams are first copied to `folder`."""
    if what == ["stdlib"]:  # of the running interpreter
        source, paths = f"standard library of Python {sys.version.split()[0]}", []
        for root, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
            subfolders[:] = sorted(set(subfolders) - NOT_STDLIB)  # where os.walk goes next
            paths += [Path(root, name) for name in sorted(names) if name.endswith(".py")]
    else:
        source, paths = " ".join(what), find_files(what, pattern)
    for i, path in enumerate(paths):
        if not path.is_file():  # it does not tell its size
            print(f"copying {path}")
            paths[i] = folder / f"{i}-{path.name}"
            with path.open("rb") as stream, replacing(paths[i]) as file:
                shutil.copyfileobj(stream, file)
    size = sum(path.stat().st_size for path in paths)
    if len(paths) < FEW:
        return source, size, cut_once(paths, int(size * (1 - val_fraction)))
    return source, size, split_by_hash(paths, val_fraction, seed)


def read_tinystories(url: str) -> Iterator[Piece]:
    """The stories with their published split: what stands between lines that hold only <|endoftext|>, stripped."""
    raw, separator = DATA / "tinystories" / "raw", re.compile(f"^{re.escape(END_OF_TEXT)}$", re.MULTILINE)
    files = {split: download(f"{url}/{name}", raw / name, sha256) for split, (name, sha256) in TINYSTORIES.items()}
    for split, path in files.items():
        rest = ""  # of a story that may go on in the next block
        for text, _ in read_blocks(path):
            *stories, rest = separator.split(rest + text)
            for story in stories:
                yield split, story.strip(), True
        yield split, rest.strip(), True


def read_archive(path: Path) -> Iterator[str]:
    """The documents of a tar of tar.xz files, three or more line ends made two, stripped. Raises ValueError."""
    try:
        with tarfile.open(path, "r|") as archive:
            for member in (m for m in archive if m.isfile() and m.name.endswith(".xz")):
                with tarfile.open(fileobj=archive.extractfile(member), mode="r|xz") as subset:
                    for entry in (e for e in subset if e.isfile() and e.name.endswith(".txt")):  # reaches no disk
                        text = subset.extractfile(entry).read().decode()
                        yield re.sub("\n\n\n+", "\n\n", text).strip()
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it to download it again") from error


def read_openwebtext(url: str) -> Iterator[Piece]:
    """The documents with nanoGPT's split. Raises ValueError unless they are as many as were published."""
    raw, free = DATA / "openwebtext" / "raw", shutil.disk_usage(DATA).free
    needed = 31.5e9 - sum(path.stat().st_size for path in raw.glob("*"))  # 13.4 GB of archives, 18.1 of gpt2 tokens
    print(f"OpenWebText needs {needed / 1e9:.1f} GB more in {DATA}/, {free / 1e9:.1f} GB are free")
    require(free > needed, f"too little disk space for OpenWebText in {DATA}/: make room and start again")
    paths = [download(f"{url}/{name}", raw / name) for name in OPENWEBTEXT]
    val = set(np.random.default_rng(2357).permutation(OPENWEBTEXT_DOCUMENTS)[:OPENWEBTEXT_VAL].tolist())
    count = 0
    for count, text in enumerate(itertools.chain.from_iterable(map(read_archive, paths)), start=1):
        yield "val" if count - 1 in val else "train", text, True
    require(count == OPENWEBTEXT_DOCUMENTS, f"{count:,} documents, not {OPENWEBTEXT_DOCUMENTS:,}: delete {raw}")


def write_bins(pieces: Iterator[Piece], size: int, folder: Path, encoding: tiktoken.Encoding, workers: int) -> dict:
    """Write folder/train.bin and val.bin from about `size` bytes of text; returns what meta.json says about each."""

    def encode(split: str, text: str, last: bool) -> np.ndarray:
        if encoding.name == "bytes":  # the bytes are the ids: a hundred times faster than asking tiktoken
            ids = np.frombuffer(text.encode(), np.uint8)
        else:
            ids = encoding.encode_to_numpy(text, disallowed_special=())
        ids = ids.astype(np.min_scalar_type(encoding.n_vocab - 1))
        return np.append(ids, ids.dtype.type(encoding.eot_token)) if last else ids

    group = list(itertools.islice(pieces, GROUP))  # a source that downloads does so here
    counts = {split: Counter() for split in SPLITS}
    with (
        ThreadPoolExecutor(workers) as pool,
        replacing(folder / "train.bin") as train,
        replacing(folder / "val.bin") as val,
        tqdm(desc="tokenizing", total=size, unit="B", unit_scale=True) as progress,
    ):
        while group:
            encoded = pool.map(encode, *zip(*group, strict=True))
            following = list(itertools.islice(pieces, GROUP))  # is read meanwhile
            for (split, text, last), ids in zip(group, encoded, strict=True):
                if text:  # empty documents are left out
                    (train if split == "train" else val).write(ids)
                    counts[split].update(documents=int(last), bytes=len(text.encode()), tokens=len(ids))
                    progress.update(len(text.encode()))
            group = following
    for split, count in counts.items():
        require(count["tokens"], f"there is no text for {split}: choose another --val_fraction, or give more text")
        count["sha256"] = file_sha256(folder / f"{split}.bin")
    return counts


def prepare(
    what: list[str], name=None, encoding=None, pattern="*.txt", val_fraction=0.1, seed=1337, workers=None, base_url=None
) -> dict:
    """Prepare a known dataset (one name) or files and folders; returns meta.json. Raises ValueError and OSError."""
    require(0 < val_fraction < 1, f"--val_fraction must lie between 0 and 1, got {val_fraction}")
    require(workers is None or workers > 0, f"--workers must be at least 1, got {workers}")
    require(name or what[0] in KNOWN, f"{what[0]} is not one of {', '.join(KNOWN)}; text of your own needs a --name")
    name = name or what[0]
    require(what == [name] or name not in KNOWN, f"{name} is a known dataset: prepare it alone, or take another --name")
    require(re.fullmatch(r"\w[\w.-]*", name, re.ASCII), f"{name!r} can't be a --name (letters, digits, _ . -)")
    require(what[0] in KNOWN[1:] or not base_url, "--base_url is for tinystories and openwebtext")
    encoding = get_encoding(encoding or ("bytes" if what == ["stdlib"] else "gpt2"))
    folder = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("unfinished-*"):
        print(f"{left} was left by a run that was killed, unless one is at work; you can delete it")
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as made:
        if what == ["tinystories"]:
            source = base_url or TINYSTORIES_URL
            size, pieces = 2.25e9, read_tinystories(source)
        elif what == ["openwebtext"]:
            source = base_url or OPENWEBTEXT_URL
            size, pieces = 40e9, read_openwebtext(source)
        else:
            source, size, pieces = read_local(what, pattern, Path(made), val_fraction, seed)
        meta = {"name": name, "source": source, "val_fraction": val_fraction, "seed": seed, "encoding": encoding.name}
        meta |= {"vocab_size": encoding.n_vocab, "dtype": np.min_scalar_type(encoding.n_vocab - 1).name}
        meta["splits"] = write_bins(pieces, size, Path(made), encoding, workers or os.cpu_count())
        with replacing(Path(made) / "meta.json", "w") as file:
            json.dump(meta, file, indent=2)
        (folder / "meta.json").unlink(missing_ok=True)  # until it is back, data/NAME counts as not prepared
        for file_name in ("train.bin", "val.bin", "meta.json"):
            os.replace(f"{made}/{file_name}", folder / file_name)
    print(f"{folder}: {visible(source)}, {encoding.name} encoding, {meta['dtype']}")
    print(f"{'':8}{'documents':>12}{'bytes':>16}{'share':>8}{'tokens':>16}{'bytes/token':>14}")
    total = sum(count["bytes"] for count in meta["splits"].values())
    for split, n in meta["splits"].items():
        share, ratio = n["bytes"] / total, n["bytes"] / n["tokens"]
        print(f"{split:8}{n['documents']:>12,}{n['bytes']:>16,}{share:>8.1%}{n['tokens']:>16,}{ratio:>14.2f}")
    return meta


class Dataset(NamedTuple):
    """What is in data/NAME."""

    name: str
    meta: dict  # contents of meta.json
    train: np.ndarray  # token ids
    val: np.ndarray

    @property
    def bytes_per_token(self) -> float:
        """Length of the validation split's text in bytes, over its tokens."""
        return self.meta["splits"]["val"]["bytes"] / self.meta["splits"]["val"]["tokens"]

    @property
    def fingerprint(self) -> dict[str, str]:
        """Checksum of each split's tokens."""
        return {split: self.meta["splits"][split]["sha256"] for split in SPLITS}

    def check_fits(self, encoding: str, vocab_size: int, block_size: int) -> None:
        """Raise ValueError unless a model that reads `encoding` can be trained and evaluated on these tokens."""
        name, ours, ids = self.name, self.meta["encoding"], self.meta["vocab_size"]
        require(ours == encoding, f"dataset {name!r} is encoded as {ours}, the model reads {encoding}: prepare another")
        require(ids <= vocab_size, f"dataset {name!r} has {ids} token ids, vocab_size is {vocab_size}: leave it out")
        for split, tokens in (("train", self.train), ("val", self.val)):
            require(len(tokens) > block_size, f"{name!r} has {len(tokens)} {split} tokens, block_size is {block_size}")


def open_dataset(name: str) -> Dataset:
    """The dataset data/NAME, memory-mapped. Raises ValueError, which names the command that mends it."""
    path, base, tokens = DATA / name / "meta.json", Path(name).name, []
    mend = f"run python prepare.py {base if base in KNOWN else f'FILE_OR_FOLDER --name {base}'}"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        encoding = get_encoding(meta["encoding"])
        real = {"vocab_size": encoding.n_vocab, "dtype": np.min_scalar_type(encoding.n_vocab - 1).name}
        require(meta == meta | real, f"{path} does not fit its encoding, {encoding.name} with {real}")
        for split in SPLITS:
            counts, file = meta["splits"][split], path.with_name(f"{split}.bin")
            good = all(type(counts[key]) is int and counts[key] > 0 for key in ("documents", "bytes", "tokens"))
            require(good and type(counts["sha256"]) is str, f"{path} is damaged")
            size = counts["tokens"] * np.dtype(meta["dtype"]).itemsize
            require(file.stat().st_size == size, f"{file} does not have {size:,} bytes")
            tokens.append(np.memmap(file, meta["dtype"], "r"))
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise ValueError(f"dataset {name!r} is not ready ({error}): {mend}") from error
    return Dataset(name, meta, *tokens)


def main() -> None:
    parser = Parser(prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", metavar="NAME_OR_PATH", help=f"{', '.join(KNOWN)}; or files and folders")
    parser.add_argument("--name", help="what to call your own text; data/NAME is replaced if it is there")
    parser.add_argument("--encoding", help="bytes, or a tiktoken encoding (default: bytes for stdlib, else gpt2)")
    parser.add_argument("--pattern", default="*.txt", help="which files of a folder are documents (default: *.txt)")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="share for val unless published (default: 0.1)")
    parser.add_argument("--seed", type=int, default=1337, help="another seed, another split (default: 1337)")
    parser.add_argument("--workers", type=int, help="threads that tokenize (default: one per core)")
    parser.add_argument("--base_url", help="where to download from instead: a mirror with the publisher's file names")
    prepare(**vars(parser.parse_args()))


if __name__ == "__main__":
    run(main)
