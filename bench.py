"""Measure, side by side in one run.

python bench.py prepare posts.jsonl --encoding gpt2    # prepare.py against tiktoken alone, on the same text
"""

import argparse
import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import prepare
from prepare import Parser, Reader, UserError, get_encoding, local_source, run


def bench_prepare(paths: list[str], encoding_name: str, workers: int, repeats: int) -> None:
    """Print MB/s of encode_ordinary_batch on documents in memory, and of prepare.py from files to finished bins."""
    encoding = get_encoding(encoding_name)
    files = [Path(path).resolve() for path in paths]
    with prepare.tqdm(disable=True) as progress:
        pieces = local_source([str(path) for path in files], "*.txt", None).documents(Reader("strict", progress))
        texts = [piece.text for piece in pieces if piece.text]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{len(texts):,} documents (or megabyte pieces of longer ones), {megabytes:.1f} MB, {workers} threads")

    def tiktoken_alone() -> None:
        encoding.encode_ordinary_batch(texts, num_threads=workers)

    def whole_preparation() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepare.prepare([str(path) for path in files], name="bench", encoding=encoding_name, workers=workers)

    here = Path.cwd()
    folder = tempfile.mkdtemp(dir=here)  # on the disk where data/ would be
    try:
        os.chdir(folder)
        seconds = {"encode_ordinary_batch": [], "prepare.py": []}
        for _ in range(repeats):  # in turn, because machines are noisy
            for name, function in (("encode_ordinary_batch", tiktoken_alone), ("prepare.py", whole_preparation)):
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    finally:
        os.chdir(here)
        shutil.rmtree(folder)
    ratios = [alone / whole for alone, whole in zip(*seconds.values(), strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"prepare.py reaches {statistics.median(ratios):.2f} ({spread}) of tiktoken's own speed")
    for name, values in seconds.items():
        speeds = [megabytes / s for s in values]
        print(f"{name:24}{statistics.median(speeds):7.1f} MB/s ({min(speeds):.1f} to {max(speeds):.1f})")


def main() -> None:
    parser = Parser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT", parser_class=Parser)
    command = what.add_parser("prepare", help="tokenizing against tiktoken alone")
    command.add_argument("paths", nargs="+", metavar="PATH", help="files or folders of text")
    command.add_argument("--encoding", default="gpt2", help="as in prepare.py (default: gpt2)")
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: one per core)")
    command.add_argument("--repeats", type=int, default=5, help="how often each is timed (default: 5)")
    args = parser.parse_args()
    if min(args.workers, args.repeats) < 1:
        raise UserError("--workers and --repeats must be at least 1")
    bench_prepare(args.paths, args.encoding, args.workers, args.repeats)


if __name__ == "__main__":
    run(main)
