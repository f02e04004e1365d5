"""Turn text into the token files that train.py reads.

    python prepare.py stdlib         # Python's own standard library, which every machine has
    python prepare.py shakespeare    # downloads 1 MB
    python prepare.py tinystories    # downloads 2.3 GB of short stories
    python prepare.py openwebtext    # downloads 13 GB of web pages
    python prepare.py notes.txt novels/ --name mine    # your own files, and folders of *.txt

It writes data/NAME/train.bin and val.bin, arrays of token ids, and meta.json, their sizes.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from itertools import chain, islice
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import tiktoken
from tqdm import tqdm

DATA = Path("data")  # below the folder in which a command is run
KNOWN = ("stdlib", "shakespeare", "tinystories", "openwebtext")
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
END_OF_TEXT = "<|endoftext|>"
BLOCK = 1 << 16  # characters to read at a time, because a file may be larger than the memory
PAUSES = [0, 1, 2, 4, 8, 16, 32]  # seconds before each attempt to download a file
# Where texts are published, at fixed revisions, so that everyone gets the same.
GITHUB = "https://raw.githubusercontent.com/karpathy/char-rnn"
SHAKESPEARE_URL = f"{GITHUB}/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUB = "https://huggingface.co/datasets"
TINYSTORIES_URL = f"{HUB}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
TINYSTORIES_TRAIN_SHA256 = "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"
TINYSTORIES_VAL_SHA256 = "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"
OPENWEBTEXT_URL = f"{HUB}/Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144"
OPENWEBTEXT_DOCUMENTS = 8_013_769
OPENWEBTEXT_VAL = 4_007  # of them, in nanoGPT's split
Pieces = Iterator[tuple[str, str, bool]]  # train or val, a text, whether a document ends with it


class UserError(Exception):
    """Something that the person at the keyboard can mend: what was typed, or what a file holds."""


def run(main: Callable[[], None]) -> None:
    """Run a script, and report a UserError in one line; any other error keeps its traceback."""
    sys.stdout.reconfigure(errors="replace")  # for terminals that lack a character
    try:
        main()
        return
    except UserError as error:
        message = " ".join(str(error).split())
    print("error:", message, file=sys.stderr)  # main() is over, and so are its progress bars
    sys.exit(2)


@contextmanager
def atomic_write(path: Path, mode: str = "wb"):
    """Open a new file that takes the place of `path` only when all of it is on the disk."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the checksum of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, sha256: str = "") -> Path:
    """Download a file to data/downloads/, unless it is there, and return its path."""
    path = DATA / "downloads" / url.split("/")[-1]
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    for pause in PAUSES:
        time.sleep(pause)
        try:
            if not path.exists():
                fetch_rest(url, partial)
                if sha256 and file_sha256(partial) != sha256:
                    partial.unlink()
                    raise OSError("a wrong checksum")
                os.replace(partial, path)
            return path
        except (OSError, HTTPException) as error:
            print(f"{url}: {error}")
            if getattr(error, "code", None) == 416:  # no such rest: what we have is too long
                partial.unlink()
    raise UserError(f"cannot download {url}: start again, or fetch it by hand, as {path}")


def fetch_rest(url: str, path: Path) -> None:
    """Append to a file what earlier attempts to download it left out."""
    with open(path, "ab") as file:
        request = Request(url, headers={"Range": f"bytes={file.tell()}-"})
        with urlopen(request, timeout=60) as response:
            if response.status != 206:  # not the rest, but the whole file
                file.truncate(file.seek(0))
            length = response.headers["Content-Length"]  # some servers do not announce it
            size = file.tell() + int(length) if length else None
            with tqdm.wrapattr(response, "read", size, initial=file.tell()) as body:
                shutil.copyfileobj(body, file)
        if size not in (None, file.tell()):
            raise OSError(f"{file.tell():,} of {size:,} bytes came")


def find_files(names: list[str], pattern: str, left_out: set[str] = frozenset()) -> list[Path]:
    """Return the files that are named, and those in named folders that match the pattern."""
    files = {}  # that is, its keys, so that each file counts once
    for name in names:
        path = Path(name).expanduser()
        found = [path] if path.is_file() else []
        for folder, subfolders, file_names in os.walk(path):
            subfolders[:] = sorted(set(subfolders) - left_out)  # where os.walk goes next
            found += [Path(folder, x) for x in sorted(file_names) if Path(x).match(pattern)]
        if not found:
            raise UserError(f"{path} does not exist, or has no {pattern} in it")
        files |= dict.fromkeys(file.resolve() for file in found)
    return list(files)


def read_blocks(path: Path) -> Iterator[str]:
    """Yield the text of a file in blocks that end where a line ends."""
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            # The rest of a line is limited, too, because a whole file may be one line.
            while block := file.read(BLOCK) + file.readline(BLOCK):
                yield block
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error


def read_documents(paths: list[Path], separator: str | None) -> Iterator[tuple[str, bool]]:
    """Yield the texts of files, each a document, or several with separator lines between them."""
    for path in paths:
        if separator is None:
            for block in read_blocks(path):
                yield block, False
            yield "", True
            continue
        lines = []  # of the document so far
        for block in chain(read_blocks(path), [separator + "\n"]):
            for line in block.splitlines(keepends=True):
                if line.rstrip("\r\n") != separator:
                    lines.append(line)
                elif document := "".join(lines).strip():
                    yield document, True
                    lines = []


def read_shakespeare() -> Pieces:
    """Yield nanoGPT's hello world with its split: val is the last tenth of the text."""
    text = download(f"{SHAKESPEARE_URL}/input.txt", SHAKESPEARE_SHA256).read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    yield "train", text[:cut], True
    yield "val", text[cut:], True


def read_tinystories() -> Pieces:
    """Yield the stories of TinyStories, version 2, in the two splits that were published."""
    train = download(f"{TINYSTORIES_URL}/TinyStoriesV2-GPT4-train.txt", TINYSTORIES_TRAIN_SHA256)
    val = download(f"{TINYSTORIES_URL}/TinyStoriesV2-GPT4-valid.txt", TINYSTORIES_VAL_SHA256)
    for split, path in (("train", train), ("val", val)):
        for story, ends in read_documents([path], END_OF_TEXT):
            yield split, story, ends


def read_openwebtext() -> Pieces:
    """Yield the documents of OpenWebText, text files in archives in archives; split as nanoGPT."""
    permutation = np.random.default_rng(2357).permutation(OPENWEBTEXT_DOCUMENTS)
    val = set(permutation[:OPENWEBTEXT_VAL].tolist())
    count = 0
    for number in range(21):
        path = download(f"{OPENWEBTEXT_URL}/subsets/urlsf_subset{number:02}.tar")
        with open(path, "rb") as file:
            for subset in read_archive(file, ".xz"):
                for document in read_archive(subset, ".txt"):
                    text = re.sub(r"\n{3,}", "\n\n", document.read().decode()).strip()
                    yield "val" if count in val else "train", text, True
                    count += 1
    if count != OPENWEBTEXT_DOCUMENTS:
        raise UserError(f"{count:,} documents came, not {OPENWEBTEXT_DOCUMENTS:,}: start again")


def read_archive(file, suffix: str) -> Iterator:
    """Yield the files of a tar archive, packed or not, whose names end with the suffix."""
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(suffix):
                yield archive.extractfile(member)


def split_files(files: list[Path], separator: str | None, val_fraction: float) -> Pieces:
    """Split the documents of files, 100 or more by their checksums, fewer by a cut."""
    if sum(ends for _, ends in read_documents(files, separator)) >= 100:
        return split_by_checksum(read_documents(files, separator), val_fraction)
    size = sum(len(text.encode()) for text, _ in read_documents(files, separator))
    return split_at_end(read_documents(files, separator), int(size * (1 - val_fraction)))


def split_by_checksum(texts: Iterator, val_fraction: float) -> Pieces:
    """Send each document, and so its copies, where the checksum of its first block says."""
    split = None
    for text, ends in texts:
        if split is None:
            # By this checksum stdlib's val has 11.8 % of the bytes, and is that of version 0.2.
            checksum = hashlib.blake2b(text.encode(), digest_size=8, key=b"1337").digest()
            split = "val" if int.from_bytes(checksum) / 2**64 < val_fraction else "train"
        yield split, text, ends
        if ends:
            split = None


def split_at_end(texts: Iterator, room: int) -> Pieces:
    """Send the end of the joined texts to val, from the last line that begins in room bytes on."""
    split = "train"
    for text, ends in texts:
        data = text.encode()
        if split == "train" and len(data) > room:
            cut = data.rfind(b"\n", 0, room) + 1
            yield "train", data[:cut].decode(), True
            split = "val"
            text = data[cut:].decode()
        room -= len(data)
        yield split, text, ends


def write_bins(pieces: Pieces, folder: Path, encoding, dtype: np.dtype, workers: int) -> dict:
    """Write train.bin and val.bin, with <|endoftext|> after every document, and return sizes."""
    counts = {split: dict(documents=0, bytes=0, tokens=0) for split in ("train", "val")}
    is_open = dict(train=False, val=False)  # whether there is text since the last end
    bar = tqdm(desc="tokenizing", unit="B", unit_scale=True)
    with open(folder / "train.bin", "wb") as train_file, open(folder / "val.bin", "wb") as val_file:
        while group := list(islice(pieces, 256)):
            # Threads tokenize the texts of a group. An <|endoftext|> in them is ordinary text.
            texts = [text for _, text, _ in group]
            encoded = encoding.encode_ordinary_batch(texts, num_threads=workers)
            for (split, text, ends), ids in zip(group, encoded, strict=True):
                is_open[split] |= text != ""
                if ends and is_open[split]:
                    ids.append(encoding.eot_token)
                    counts[split]["documents"] += 1
                    is_open[split] = False
                file = train_file if split == "train" else val_file
                file.write(np.array(ids, dtype))
                counts[split]["bytes"] += len(text.encode())
                counts[split]["tokens"] += len(ids)
            bar.update(counts["train"]["bytes"] + counts["val"]["bytes"] - bar.n)
    for split, count in counts.items():
        if count["bytes"] == 0:
            raise UserError(f"no text is left for {split}: give more text")
        count["sha256"] = file_sha256(folder / f"{split}.bin")
    return counts


def get_encoding(name: str) -> tiktoken.Encoding:
    """Return a tiktoken encoding, or for "bytes" one in which every byte is a token."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        end = {END_OF_TEXT: 256}
        return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=end)
    try:
        encoding = tiktoken.get_encoding(name)  # fetches the vocabulary when first used
    except (OSError, ValueError) as error:
        raise UserError(f"no encoding {name!r} ({error}): is TIKTOKEN_CACHE_DIR set?") from error
    if END_OF_TEXT not in encoding.special_tokens_set:
        raise UserError(f"the encoding {name!r} has no {END_OF_TEXT}, choose another")
    return encoding


def open_dataset(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return meta.json and the ids of train and val, which are read when they are needed."""
    folder = DATA / name
    what = name if name in KNOWN else f"FILES --name {name}"
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        train = np.memmap(folder / "train.bin", meta["dtype"], "r")
        val = np.memmap(folder / "val.bin", meta["dtype"], "r")
        splits = meta["splits"]
        if splits["train"]["tokens"] != len(train) or splits["val"]["tokens"] != len(val):
            raise ValueError("a file has another length than meta.json says")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no dataset in {folder} ({error}): python prepare.py {what}") from error
    return meta, train, val


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", nargs="+", help=f"{', '.join(KNOWN)}; or files and folders")
    parser.add_argument("--name", help="what to call your own text; data/NAME is replaced")
    parser.add_argument("--encoding", help="bytes, gpt2, cl100k_base ... (default: see README)")
    parser.add_argument("--pattern", default="*.txt", help="files of a folder to take")
    parser.add_argument("--separator", help="a line between documents, as <|endoftext|>")
    parser.add_argument("--val", nargs=1, default=[], help="file or folder to validate on")
    parser.add_argument("--val_fraction", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--workers", type=int, help="threads that tokenize")
    args = parser.parse_args(arguments)
    is_known = len(args.what) == 1 and args.what[0] in KNOWN and not args.val
    known = args.what[0] if is_known else None
    name = args.name or known or ""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise UserError("give your text a --name, of letters, digits, '_', '.' and '-'")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, got {args.val_fraction}")
    default = "bytes" if known in ("stdlib", "shakespeare") else "gpt2"
    encoding = get_encoding(args.encoding or default)
    if known == "shakespeare":
        pieces = read_shakespeare()
    elif known == "tinystories":
        pieces = read_tinystories()
    elif known == "openwebtext":
        pieces = read_openwebtext()
    elif known == "stdlib":
        print(f"the standard library is that of Python {sys.version.split()[0]}")
        files = find_files([sysconfig.get_path("stdlib")], "*.py", NOT_STDLIB)
        pieces = split_files(files, None, args.val_fraction)
    else:
        val_files = find_files(args.val, args.pattern)
        files = [file for file in find_files(args.what, args.pattern) if file not in val_files]
        pieces = split_files(files, args.separator, 0 if val_files else args.val_fraction)
        val = (("val", *text) for text in read_documents(val_files, args.separator))
        pieces = chain(pieces, val)
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=DATA) as unfinished:
        new = Path(unfinished, "new")
        new.mkdir()
        dtype = np.min_scalar_type(encoding.n_vocab - 1)
        splits = write_bins(pieces, new, encoding, dtype, args.workers or os.cpu_count())
        meta = {"name": name, "encoding": encoding.name, "vocab_size": encoding.n_vocab}
        meta |= {"dtype": dtype.name, "splits": splits}
        (new / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        # All is written, so data/NAME is never half a dataset.
        if (DATA / name).exists():
            (DATA / name).rename(Path(unfinished, "old"))
        new.rename(DATA / name)
    print(f"{DATA / name}: {splits['train']['tokens']:,} and {splits['val']['tokens']:,} tokens")


if __name__ == "__main__":
    run(main)
