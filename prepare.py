"""Turn text into the token files that train.py reads.

    python prepare.py stdlib         # the source code of Python's standard library, no download
    python prepare.py shakespeare    # downloads 1 MB
    python prepare.py tinystories    # downloads 2.3 GB of short stories
    python prepare.py openwebtext    # downloads 13 GB of web pages
    python prepare.py notes.txt novels/ --name mine    # your own files, and folders of *.txt

Each makes a folder data/NAME. In it, train.bin and val.bin hold token ids and nothing else, with
<|endoftext|> after every document; meta.json says how to read them. A tenth of your own text is
held out for validation: about every tenth document or, with fewer than 100 documents, the end.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sysconfig
import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import tiktoken
from tqdm import tqdm

DATA = Path("data")  # relative to the folder you are in
END_OF_TEXT = "<|endoftext|>"
Documents = Iterator[tuple[str, str]]  # of ("train" or "val", text)

# Fixed revisions, so that everyone gets the same text.
GITHUB = "https://raw.githubusercontent.com"
CHAR_RNN = f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
HUB = "https://huggingface.co/datasets"
TINYSTORIES = f"{HUB}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
OPENWEBTEXT = f"{HUB}/Skylion007/openwebtext/resolve/f3808c30e817981b845ec549c43e82bb467d8144"
OPENWEBTEXT_PAGES = 8_013_769
OPENWEBTEXT_VAL_PAGES = 4_007


def read_stdlib() -> Documents:
    """Read the standard library of the Python that runs this, without its tests."""
    print(f"the standard library is that of Python {platform.python_version()}")
    skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages")
    files = find_files([sysconfig.get_path("stdlib")], "*.py", skipped)
    return split_documents(files, None, val_fraction=0.1)


def read_shakespeare() -> Documents:
    """Read tiny Shakespeare, a single text, and split it where nanoGPT does."""
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    path = download(f"{CHAR_RNN}/data/tinyshakespeare/input.txt", sha256)
    return split_documents([path], None, val_fraction=0.1)


def read_tinystories() -> Documents:
    """Read the stories of TinyStories V2, in the two splits that were published."""
    train_sha256 = "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"
    val_sha256 = "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"
    train_file = download(f"{TINYSTORIES}/TinyStoriesV2-GPT4-train.txt", train_sha256)
    val_file = download(f"{TINYSTORIES}/TinyStoriesV2-GPT4-valid.txt", val_sha256)
    return read_splits([train_file], [val_file], END_OF_TEXT)


def read_openwebtext() -> Documents:
    """Read the pages of OpenWebText: .txt files in .tar.xz archives in 21 .tar archives."""
    rng = np.random.default_rng(2357)  # nanoGPT's seed, so the same pages are held out
    val_pages = set(rng.permutation(OPENWEBTEXT_PAGES)[:OPENWEBTEXT_VAL_PAGES].tolist())
    count = 0
    for i in range(21):
        # No checksum is needed: the archives inside have their own.
        path = download(f"{OPENWEBTEXT}/subsets/urlsf_subset{i:02}.tar")
        with open(path, "rb") as file:
            for archive in read_archive(file, ".xz"):
                for page in read_archive(archive, ".txt"):
                    text = re.sub(r"\n{3,}", "\n\n", page.read().decode()).strip()
                    yield "val" if count in val_pages else "train", text
                    count += 1


def read_archive(file, suffix: str) -> Iterator:
    """Yield the files in a tar archive (compressed or not) whose names end in suffix."""
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(suffix):
                yield archive.extractfile(member)


DATASETS = {  # the reader, and the encoding unless --encoding names another
    "stdlib": (read_stdlib, "bytes"),
    "shakespeare": (read_shakespeare, "bytes"),
    "tinystories": (read_tinystories, "gpt2"),
    "openwebtext": (read_openwebtext, "gpt2"),
}


def read_own_files(args: argparse.Namespace) -> Documents:
    """Read the files and folders that the command line names."""
    pattern = args.pattern or "*.txt"
    val_fraction = 0.1 if args.val_fraction is None else args.val_fraction
    if not 0 < val_fraction < 1:
        raise SystemExit(f"error: --val_fraction must be between 0 and 1, got {val_fraction}")
    files = find_files(args.what, pattern)
    if args.val is None:
        return split_documents(files, args.separator, val_fraction)
    val_files = find_files(args.val, pattern)
    held_out = set(val_files)
    files = [path for path in files if path not in held_out]
    return read_splits(files, val_files, args.separator)


def find_files(paths: list, pattern: str, skipped: tuple = ()) -> list[Path]:
    """List the given files, and the files in the given folders that match the pattern.

    In folders, skip whatever is hidden or below a folder with one of the skipped names.
    """
    files = set()  # a file that is named twice counts once
    for path in paths:
        path = Path(path).expanduser()
        found = [path] if path.is_file() else []
        for file in path.rglob(pattern):
            names = file.relative_to(path).parts
            is_skipped = any(name.startswith(".") or name in skipped for name in names)
            if file.is_file() and not is_skipped:
                found.append(file)
        if not found:
            raise SystemExit(f"error: {path} does not exist, or has no {pattern} in it")
        files.update(file.resolve() for file in found)
    # A folder's own files come before those of its subfolders.
    return sorted(files, key=lambda path: (path.parent, path.name))


def read_documents(files: list[Path], separator: str | None) -> Iterator[str]:
    """Yield the documents in files: one per file, or one per part between separator lines."""
    for path in files:
        try:
            # utf-8-sig drops the byte-order mark that Windows may put first; newline="\n" keeps
            # every "\r".
            with open(path, encoding="utf-8-sig", newline="\n") as file:
                if separator is None:
                    yield file.read()
                    continue
                lines = []
                for line in file:  # by line, since the whole file may not fit in memory
                    if line.rstrip("\r\n") == separator:
                        yield "".join(lines).strip()
                        lines = []
                    else:
                        lines.append(line)
                yield "".join(lines).strip()
        except (OSError, UnicodeError) as error:
            raise SystemExit(f"error: cannot read {path} as UTF-8 text: {error}") from None


def read_splits(train_files: list[Path], val_files: list[Path], separator: str | None) -> Documents:
    """Read files that are all for training or all for validation."""
    for text in read_documents(train_files, separator):
        yield "train", text
    for text in read_documents(val_files, separator):
        yield "val", text


def split_documents(files: list[Path], separator: str | None, val_fraction: float) -> Documents:
    """Hold out a fraction of the documents or, if there are fewer than 100, the end of the text."""
    lengths = [len(text) for text in read_documents(files, separator) if text]
    if len(lengths) >= 100:
        for text in read_documents(files, separator):
            # A checksum of the text decides, so copies of a document land in the same split. Only
            # its first 65,536 characters count, plus the rest of their last line: that keeps the
            # split, and so the published losses, of earlier versions.
            end = text.find("\n", 65_536) + 1
            beginning = text[:end] if end > 0 else text
            checksum = hashlib.blake2b(beginning.encode(), digest_size=8, key=b"1337").digest()
            is_val = int.from_bytes(checksum) / 2**64 < val_fraction
            yield "val" if is_val else "train", text
        return
    room = int((1 - val_fraction) * sum(lengths))  # characters that train still takes
    for text in read_documents(files, separator):
        yield "train", text[:room]
        yield "val", text[room:]
        room = max(0, room - len(text))


def download(url: str, sha256: str | None = None) -> Path:
    """Download a file to data/downloads/, unless it is there, continuing an earlier attempt."""
    path = DATA / "downloads" / url.split("/")[-1]
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    try:
        with open(partial, "ab") as file:
            start = max(0, file.tell() - 1)  # one byte back, as a server refuses an empty range
            request = Request(url, headers={"Range": f"bytes={start}-"})
            with urlopen(request, timeout=60) as response:
                if response.status != 206:  # it sends the whole file
                    start = 0
                file.truncate(start)
                length = response.headers["Content-Length"]  # not every server sends it
                size = start + int(length) if length else None
                with tqdm.wrapattr(response, "read", size, initial=start, desc=path.name) as body:
                    shutil.copyfileobj(body, file)
        if size and partial.stat().st_size < size:
            raise ConnectionError("the connection was lost")
    except (OSError, HTTPException) as error:
        advice = f"run the command again to continue, or delete {partial} to start over"
        raise SystemExit(f"error: {url}: {error}; {advice}") from None
    if sha256 and file_sha256(partial) != sha256:
        partial.unlink()
        raise SystemExit(f"error: {url} came with a wrong checksum; run the command again")
    return partial.rename(path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get_encoding(name: str) -> tiktoken.Encoding:
    """Return one of tiktoken's tokenizers or, for "bytes", one in which every byte is a token."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        end = {END_OF_TEXT: 256}
        return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=end)
    try:
        return tiktoken.get_encoding(name)  # downloads the vocabulary when first used
    except OSError as error:
        raise SystemExit(f"error: cannot load the encoding {name}: {error}") from None


def write_dataset(folder: Path, documents: Documents, encoding: tiktoken.Encoding) -> None:
    """Tokenize documents into train.bin and val.bin, and describe the two in meta.json."""
    # The folder may also hold files of yours, such as the text: write only what is named here.
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = {split: folder / f"{split}.tmp" for split in ("train", "val")}
    splits = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in unfinished}
    dtype = np.min_scalar_type(encoding.n_vocab - 1)  # the smallest that holds every id
    bar = tqdm(desc="tokenizing", unit=" documents", delay=1)
    with open(unfinished["train"], "wb") as train, open(unfinished["val"], "wb") as val, bar:
        while group := list(islice(documents, 256)):  # enough to keep all cores busy
            texts = [text for _, text in group]
            # "Ordinary": <|endoftext|> inside a text is text like any other, not the token.
            encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
            for (split, text), ids in zip(group, encoded, strict=True):
                if text:
                    ids.append(encoding.eot_token)
                    file = train if split == "train" else val
                    file.write(np.array(ids, dtype))
                    splits[split]["documents"] += 1
                    splits[split]["bytes"] += len(text.encode())
                    splits[split]["tokens"] += len(ids)
            bar.update(len(group))
    for split, counts in splits.items():
        if counts["documents"] == 0:
            raise SystemExit(f"error: there is no text for {split}")
        counts["sha256"] = file_sha256(unfinished[split])
    meta = {
        "name": folder.name,
        "encoding": encoding.name,
        "vocab_size": encoding.n_vocab,
        "dtype": dtype.name,
        "splits": splits,
    }
    # meta.json goes first and comes back last: a folder without it is no dataset.
    (folder / "meta.json").unlink(missing_ok=True)
    for split, counts in splits.items():
        path = unfinished[split].replace(folder / f"{split}.bin")
        print(f"{path}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    (folder / "meta.tmp").write_text(json.dumps(meta, indent=2))
    (folder / "meta.tmp").replace(folder / "meta.json")


def open_dataset(name: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return meta.json and the ids of train and val, which are read from disk as needed."""
    folder = DATA / name
    what = name if name in DATASETS else f"FILES --name {name}"
    if not (folder / "meta.json").exists():
        raise SystemExit(f"error: there is no dataset in {folder}: run python prepare.py {what}")
    meta = json.loads((folder / "meta.json").read_text())
    splits = []
    for split, counts in meta["splits"].items():
        path = folder / f"{split}.bin"
        size = counts["tokens"] * np.dtype(meta["dtype"]).itemsize
        if not path.exists() or path.stat().st_size != size:
            raise SystemExit(f"error: {path} is damaged: run python prepare.py {what}")
        splits.append(np.memmap(path, meta["dtype"], "r"))
    train_tokens, val_tokens = splits
    return meta, train_tokens, val_tokens


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", nargs="+", help="one of the datasets above, or your own files and folders")
    add("--name", help="name of the dataset, which replaces one of the same name (default: WHAT)")
    names = ["bytes", *tiktoken.list_encoding_names()]
    add("--encoding", choices=names, help="default: gpt2, but bytes for stdlib and shakespeare")
    own = parser.add_argument_group("for your own text")
    own.add_argument("--pattern", help="files to read in folders (default: *.txt)")
    own.add_argument("--separator", help="line between documents (default: a file is a document)")
    held_out = own.add_mutually_exclusive_group()
    held_out.add_argument("--val", action="append", help="file or folder to hold out, or several")
    held_out.add_argument("--val_fraction", type=float, help="how much to hold out (default: 0.1)")
    args = parser.parse_args(arguments)
    what = args.what[0] if len(args.what) == 1 else ""
    name = args.name or what
    if not re.fullmatch(r"[\w-]+", name):
        raise SystemExit("error: give the dataset a --name of letters, digits, _ and -")

    if what in DATASETS:
        for option in ("pattern", "separator", "val", "val_fraction"):
            if getattr(args, option) is not None:
                raise SystemExit(f"error: --{option} is for your own text, not for {what}")
        read, default_encoding = DATASETS[what]
        encoding = get_encoding(args.encoding or default_encoding)
        documents = read()
    else:
        encoding = get_encoding(args.encoding or "gpt2")
        documents = read_own_files(args)
    write_dataset(DATA / name, documents, encoding)


if __name__ == "__main__":
    main()
