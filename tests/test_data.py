"""prepare.py loses no text, keeps the splits apart, and leaves nothing half-written."""

import os
import platform
import signal
from pathlib import Path

import pytest
import tiktoken

import prepare
from tests.helpers import assert_refused, make_corpus, read_dataset, start

MERGES = {b" t": 256, b"he": 257, b" the": 258, b"\n\n": 259}
# Arguments of prepare.py, and why it cannot do what they say.
BAD_INPUT = [
    ("empty.txt", "there is no text for train"),
    ("--val=text", "there is no text for train"),
    ("--val=empty.txt", "there is no text for val"),
    ("--val_fraction=1e-9", "there is no text for val"),
    ("latin.txt", "latin.txt as UTF-8 text"),
    ("--val=latin.txt", "latin.txt as UTF-8 text"),
    ("nowhere", "nowhere does not exist, or has no *.txt in it"),
    ("--val=nothing", "nothing does not exist, or has no *.txt in it"),
    ("--val_fraction=0", "--val_fraction must be between 0 and 1, got 0.0"),
    ("--val_fraction=1", "--val_fraction must be between 0 and 1, got 1.0"),
    ("--val_fraction=nan", "--val_fraction must be between 0 and 1, got nan"),
    ("--name=../tiny", "give the dataset a --name of letters"),
]
# What a run that is killed was about to do: a function, and which of its calls.
MOMENTS = [
    ("prepare.read_documents", 1),  # to read text
    ("prepare.np.array", 2),  # to write tokens of val
    ("pathlib.Path.unlink", 1),  # to remove the old meta.json
    ("pathlib.Path.replace", 1),  # to put train.bin in its place
    ("pathlib.Path.replace", 2),  # to put val.bin in its place
    ("pathlib.Path.write_text", 1),  # to write meta.json
    ("pathlib.Path.replace", 3),  # to put meta.json in its place
]


@pytest.fixture
def merging(monkeypatch) -> tiktoken.Encoding:
    """An encoding with merges and large ids, which needs no network, in the place of gpt2."""
    encoding = tiktoken.Encoding(
        "merging",
        pat_str=r" ?\w+| ?[^\s\w]+|\s+",
        mergeable_ranks={bytes([i]): i for i in range(256)} | MERGES,
        special_tokens={"<|endoftext|>": 70_000, "<|fim_prefix|>": 70_001},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


def write_files(texts: list[str], folder: str = ".") -> list[bytes]:
    """Write texts into files 000.txt, 001.txt ..., and return what is in them."""
    contents = [text.encode() for text in texts]
    for i in range(len(texts)):
        Path(folder, f"{i:03}.txt").write_bytes(contents[i])
    return contents


def make_dataset(*arguments: str, encoding: str = "bytes") -> list[list[bytes]]:
    """Prepare the dataset `own`, and return its documents of train and of val."""
    prepare.main([*arguments, "--name=own", f"--encoding={encoding}"])
    return read_dataset("own")


def snapshot(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("encoding", ["bytes", "gpt2"])
def test_every_document_comes_back_exactly_once_and_whole(corpus, merging, encoding):
    """Together, train and val hold what is in the files."""
    train, val = make_dataset("text", encoding=encoding)
    assert sorted(train + val) == sorted(text.encode() for text in corpus)


def test_meta_json_counts_what_is_in_each_split(corpus, merging):
    """It counts documents, bytes of text, and tokens, which include those of <|endoftext|>."""
    splits = make_dataset("text", encoding="gpt2")
    meta, *ids = prepare.open_dataset("own")
    for i, counts in enumerate(meta["splits"].values()):
        assert counts["documents"] == len(splits[i])
        assert counts["bytes"] == sum(map(len, splits[i]))
        assert counts["tokens"] == len(ids[i])


def test_tokens_are_those_of_tiktoken(workdir, merging):
    """A text becomes the ids that tiktoken has for ordinary text, and then <|endoftext|>."""
    text = "\n it's  the\t\n\n the 日 😀é\r\n<|fim_prefix|>\n<|endoftext|>\n"
    write_files([text, "the val"])
    make_dataset("000.txt", "--val=001.txt", encoding="gpt2")
    meta, train, val = prepare.open_dataset("own")
    assert meta["vocab_size"] == 70_002
    assert train.tolist() == [*merging.encode_ordinary(text), 70_000]
    assert val.tolist() == [*merging.encode_ordinary("the val"), 70_000]


@pytest.mark.parametrize("options", [[], ["--separator=---"]], ids=str)
def test_a_byte_order_mark_is_not_text(workdir, options):
    """The mark that Windows may write is left out, even in front of a separator."""
    write_files(["\ufeff---\nText", "val"])
    train, _ = make_dataset("000.txt", "--val=001.txt", *options)
    assert train == [b"Text" if options else b"---\nText"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=repr)
@pytest.mark.parametrize("separator", ["<|endoftext|>", "* * *", ""])
def test_separator_lines_part_documents(workdir, separator, line_end):
    """A line that is the separator, and no other, ends a document, which is stripped."""
    documents = [f" Story {i}\n with {separator} inside\n{separator} \n{i}." for i in range(20)]
    text = f"\n{separator}\n\n".join(documents)
    write_files([text.replace("\n", line_end), "val"])
    train, _ = make_dataset("000.txt", "--val=001.txt", f"--separator={separator}")
    assert train == [text.strip().replace("\n", line_end).encode() for text in documents]


@pytest.mark.parametrize(("separator", "count"), [("***", 3), ("---", 1)])
def test_the_number_of_documents_is_printed(workdir, capsys, separator, count):
    """If a separator never occurs, it shows that the file is one document."""
    write_files(["one\n***\ntwo\n***\nthree", "val"])
    make_dataset("000.txt", "--val=001.txt", f"--separator={separator}")
    printed = capsys.readouterr().out
    assert f"data/own/train.bin: {count} documents" in printed
    assert "data/own/val.bin: 1 documents" in printed


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_document_never_ends_up_in_both_splits(workdir, fraction):
    """Copies stay together, and about val_fraction of all documents is in val."""
    contents = write_files([f"Document {i % 250}.\n" for i in range(500)])
    train, val = make_dataset(".", f"--val_fraction={fraction}")
    assert sorted(train + val) == sorted(contents)
    assert set(train).isdisjoint(val)
    assert len(val) == pytest.approx(500 * fraction, abs=25)


def test_documents_are_split_as_in_earlier_versions(workdir):
    """New losses can be compared with published ones, because the split is the same."""
    long_text = "2\n" * 40_000 + "end"
    contents = write_files([*[f"Document {i}.\n" for i in range(99)], long_text])
    _, val = make_dataset(".")
    assert val == [contents[i] for i in (11, 14, 24, 30, 36, 43, 57, 86, 98, 99)]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.99])
@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "日" * 60_531), (1, "no end " * 30_000), (4, "日本\n" * 999), (99, "ab\n")],
)
def test_fewer_than_100_documents_are_cut_once(workdir, count, text, fraction):
    """Val has the last val_fraction of the characters, wherever that begins; nothing is lost."""
    write_files([text] * count)
    train, val = make_dataset(".", f"--val_fraction={fraction}")
    assert b"".join(train + val) == text.encode() * count
    assert len(train + val) <= count + 1
    val_characters = len(b"".join(val).decode())
    assert val_characters == pytest.approx(fraction * len(text) * count, abs=1)


def test_empty_documents_do_not_count(workdir):
    """Two paragraphs with many blank lines between them are only two documents."""
    write_files(["First." + "\n" * 150 + "Second"])
    assert make_dataset(".", "--separator=", "--val_fraction=0.5") == [[b"First."], [b"Second"]]


@pytest.mark.parametrize(
    "val", [["val"], ["text/../val/"], ["./val/000.txt", "val/001.txt"], ["val/001.txt", "val"]]
)
def test_val_is_what_is_named_as_such(workdir, val):
    """--val takes files and folders, however they are spelled, and leaves them out of train."""
    texts = make_corpus("text")
    Path("val").mkdir()
    contents = write_files(["one", "two"], "val")
    splits = make_dataset(".", *[f"--val={path}" for path in val])
    assert splits == [[text.encode() for text in texts], contents]


@pytest.mark.parametrize("again", ["extra.md", "src", "./src/deep", "src/../extra.md", "link.py"])
def test_a_pattern_chooses_the_files_of_folders(workdir, again):
    """Files that are named are read anyway, and every file once, however it is spelled."""
    make_corpus("src")
    Path("src/deep").mkdir()
    Path("src/deep/code.py").write_text("print()\n")
    Path("link.py").symlink_to("src/deep/code.py")
    Path("extra.md").write_text("# extra\n")
    train, _ = make_dataset("src", "extra.md", again, "--pattern=*.py", "--val=src/000.txt")
    assert sorted(train) == [b"# extra\n", b"print()\n"]


@pytest.mark.parametrize("hidden", [".#a.txt", ".ipynb_checkpoints/a.txt", "__MACOSX/._000.txt"])
def test_hidden_files_are_skipped(workdir, hidden):
    """In a folder, hidden files and the files of hidden folders are not read."""
    texts = make_corpus("text")
    path = Path("text", hidden)
    path.parent.mkdir(exist_ok=True)
    path.write_text("hidden")
    train, val = make_dataset("text")
    assert sorted(train + val) == sorted(text.encode() for text in texts)


def test_the_standard_library_is_that_of_this_python(workdir, capsys):
    """Its version is printed, and its tests are left out."""
    prepare.main(["stdlib"])
    assert f"Python {platform.python_version()}\n" in capsys.readouterr().out
    train, val = read_dataset("stdlib")
    assert Path(os.__file__).read_bytes() in train + val
    assert b"class TestArgumentParser" not in b"".join(train + val)


@pytest.mark.parametrize("name", ["own", "downloads"])
@pytest.mark.parametrize("source", ["data/own", "data", "link"])
def test_other_files_are_left_alone(workdir, source, name):
    """prepare.py writes its three files into data/NAME, and changes nothing else in data/."""
    Path("data/downloads").mkdir(parents=True)
    Path("data/downloads/half.partial").write_text("half")
    make_corpus("data/own")
    Path("link").symlink_to("data/own")
    before = snapshot("data")
    for _ in range(2):
        prepare.main([source, f"--name={name}", "--encoding=bytes"])
    after = snapshot("data")
    assert before.items() <= after.items()
    written = sorted(path.name for path in after.keys() - before.keys())
    assert written == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize(("argument", "message"), BAD_INPUT)
def test_a_run_that_fails_leaves_the_old_dataset(corpus, argument, message):
    """Bad input is refused in one line, and the dataset of that name stays as it was."""
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Path("nothing").mkdir()
    before = snapshot(".")
    sources = ["text"] if argument.startswith("--") else []
    arguments = ["--name=tiny", "--encoding=bytes", *sources, argument]
    assert_refused(prepare.main, arguments, message)
    assert before.items() <= snapshot(".").items()


@pytest.mark.parametrize(("function", "number"), MOMENTS)
def test_killed_at_any_moment(workdir, function, number):
    """kill -9 leaves the old dataset, or none, or the new one, and the next run finishes."""
    datasets = {}
    for version in ("new", "old"):
        Path(version).mkdir()
        write_files([f"{version} train", f"{version} val"], version)
        make_dataset(version, f"--val={version}/001.txt")
        datasets[version] = snapshot("data")
    arguments = ["new", "--val=new/001.txt", "--name=own", "--encoding=bytes"]
    process = start("-m", "tests.kill", function, number, "prepare", *arguments)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    left = snapshot("data")
    if Path("data/own/meta.json") in left:  # without it, there is no dataset
        assert any(files.items() <= left.items() for files in datasets.values())
    prepare.main(arguments)
    assert snapshot("data") == datasets["new"]


@pytest.mark.parametrize("option", ["separator=", "pattern=*.md", "val=text", "val_fraction=0"])
def test_a_published_dataset_has_no_options_of_your_own_text(workdir, option):
    """Such options are refused in one line, and nothing is written."""
    message = f"--{option.partition('=')[0]} is for your own text, not for stdlib"
    assert_refused(prepare.main, ["stdlib", f"--{option}"], message)
    assert not Path("data").exists()


@pytest.mark.parametrize("options", [["--val=text", "--val_fraction=0.2"], ["--encoding=byte"]])
def test_options_that_make_no_sense_are_refused(corpus, options):
    """The exit status is 2, and nothing is written."""
    before = snapshot(".")
    with pytest.raises(SystemExit) as exit:
        prepare.main(["text", "--name=tiny", *options])
    assert exit.value.code == 2
    assert snapshot(".") == before


@pytest.mark.parametrize(
    ("name", "what"), [("mine", "FILES --name mine"), ("tinystories", "tinystories")]
)
def test_a_missing_dataset_comes_with_the_command_that_makes_it(workdir, name, what):
    """The error has the --name of your own text."""
    message = f"there is no dataset in data/{name}: run python prepare.py {what}"
    assert_refused(lambda names: prepare.open_dataset(*names), [name], message)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
@pytest.mark.parametrize("lost", [1, 2, 1000])
def test_a_dataset_that_is_cut_short_is_refused(corpus, name, lost):
    """The error has the command that makes it anew."""
    path = Path("data/tiny", name)
    path.write_bytes(path.read_bytes()[:-lost])
    message = f"{path} is damaged: run python prepare.py FILES --name tiny"
    assert_refused(lambda names: prepare.open_dataset(*names), ["tiny"], message)


def test_several_sources_need_a_name(corpus):
    """They do not take the name of the first one, which may be that of a published dataset."""
    assert_refused(prepare.main, ["tiny", "text"], "give the dataset a --name")
