"""sample.py: what a checkpoint gives, streaming, and bad input."""

import io
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prepare
import sample
from model import GPT, ModelConfig


@pytest.fixture
def run_folder(trained):
    """out/tiny/best.pt of a tiny trained run, and nothing else: no data, no config."""
    folder = Path("out/tiny")
    folder.mkdir(parents=True)
    (folder / "best.pt").write_bytes(trained)
    return folder


def test_sampling_needs_only_the_checkpoint(run_folder, call):
    """Text after the prompt; one seed one text; greedy at temperature 0; several samples differ."""
    arguments = (run_folder, "--prompt=Line 7", "--max-new-tokens=40")
    status, first, error = call(sample, *arguments)
    assert status == 0, error
    assert first.startswith("Line 7") and len(first) > 20
    assert call(sample, *arguments)[1] == first == call(sample, run_folder / "best.pt", *arguments[1:])[1]
    assert call(sample, *arguments, "--seed=2")[1] != first
    greedy = call(sample, *arguments, "--temperature=0")[1]
    assert (
        greedy == call(sample, *arguments, "--temperature=0", "--seed=2")[1] == call(sample, *arguments, "--top-k=1")[1]
    )
    assert call(sample, *arguments, "--temperature=1e-45")[1] == greedy == call(sample, *arguments, "--top-p=1e-50")[1]
    Path("prompt.txt").write_text("Line 7")
    assert call(sample, run_folder, "--prompt-file=prompt.txt", "--max-new-tokens=40")[1] == first
    texts = call(sample, *arguments, "--num-samples=2")[1].split("--- sample")
    assert len(texts) == 3 and texts[1][10:] != texts[2][10:]


class Fixed:
    """A model that generates given tokens, one row per text."""

    embed = torch.nn.Embedding(1, 1)

    def __init__(self, *rows):
        self.rows = rows

    def generate(self, tokens, max_new_tokens, n_token, pad):
        self.tokens, self.pad = tokens.tolist(), pad
        assert n_token == 257
        yield from (torch.tensor(ids) for ids in zip(*self.rows, strict=True))


def pieces_of(tokens, stop=None) -> list[str]:
    text = sample.Text(prepare.get_encoding("bytes"), "hi", stop)
    model = Fixed(tokens)
    pieces = [piece for (piece,) in sample.continue_texts(model, [text], 9)]
    assert model.tokens == [[104, 105]] and model.pad == [0]
    return pieces


def test_text_streams_as_it_is_generated_in_whole_characters():
    """A character that spans tokens comes out whole; a cut one at the end is replaced; <|endoftext|> ends the text."""
    assert pieces_of([*"é😀x".encode(), 256, 65]) == ["", "é", "", "", "", "😀", "x", ""]
    assert "".join(pieces_of("日".encode()[:2])) == "\ufffd"


def test_a_stop_string_ends_the_text_and_is_never_shown():
    """Not even its beginning; what looks like it and is something else appears; it may span characters and tokens."""
    assert pieces_of(b"ab\nclass x", stop="\nclass") == ["a", "b", "", "", "", "", "", ""]
    assert pieces_of(b"ab\nclaim", stop="\nclass") == ["a", "b", "", "", "", "", "\nclai", "m", ""]
    assert "".join(pieces_of(b"aaab!", stop="aab")) == "a"
    assert "".join(pieces_of("1é2".encode(), stop="é")) == "1"
    assert "".join(pieces_of(b"ab\ncla", stop="\nclass")) == "ab\ncla", "the end releases what was held"
    assert "".join(pieces_of([*b"ab\ncla", 256, 65], stop="\nclass")) == "ab\ncla"


def test_texts_of_a_batch_end_on_their_own():
    """Rows are padded at the left; a text that has ended gets nothing more, and the last one ends it all."""
    encoding = prepare.get_encoding("bytes")
    texts = [sample.Text(encoding, prompt, "!") for prompt in ("abc", "", "x")]
    model = Fixed([*b"12!4567"], [*b"abcdef", 256], [256, *b"abcdef"])
    pieces = list(sample.continue_texts(model, texts, 50))
    assert ["".join(part) for part in zip(*pieces, strict=True)] == ["12", "abcdef", ""]
    assert model.tokens == [[97, 98, 99], [256, 256, 256], [256, 256, 120]] and model.pad == [0, 2, 2]
    assert [len(text.tokens) - text.n_prompt for text in texts] == [3, 6, 0]


def test_prompts_of_one_batch_give_what_each_gives_alone(run_folder, call):
    """Several prompts of different lengths, greedily, and beyond the window; the speed is reported."""
    prompts = ["Line 7", "Document 12: naïve", "é"]
    fixed = ("--temperature=0", "--max-new-tokens=40")
    alone = [call(sample, run_folder, "--prompt", prompt, *fixed)[1] for prompt in prompts]
    together = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    status, out, error = call(sample, run_folder, *together, *fixed)
    assert status == 0 and error.endswith(" tokens/s, from out/tiny/best.pt (step 6)\n"), error
    assert re.fullmatch(r"[\d,]+ tokens in [\d.]+ s, [\d,]+ tokens/s", error.split(", from")[0])
    assert out == "".join(f"--- sample {i + 1} of 3 ---\n{text}" for i, text in enumerate(alone))


def test_standard_input_and_closed_pipes(run_folder):
    """--prompt - reads standard input; text that is not UTF-8 is refused; | head ends without a traceback."""
    script = [sys.executable, str(Path(sample.__file__)), str(run_folder), "--prompt", "-", "--max-new-tokens=30"]
    result = subprocess.run(script, input="Line 8é".encode(), capture_output=True)
    assert result.returncode == 0 and result.stdout.decode().startswith("Line 8é"), result.stderr
    result = subprocess.run(script, input=b"\xff", capture_output=True)
    assert result.returncode == 2 and result.stderr.startswith(b"error: standard input is not UTF-8")
    many = shlex.join([*script[:3], "--num-samples=40", "--max-new-tokens=60"])
    result = subprocess.run(f"{many} | head -n 1", shell=True, capture_output=True, text=True)
    assert result.stdout == "--- sample 1 of 40 ---\n" and "Traceback" not in result.stderr


def test_padded_vocabulary_never_crashes_the_decoder(workdir, call, trained):
    """A model may have more ids than its encoding; those are never chosen."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=4096, block_size=16, n_layer=1))
    checkpoint = torch.load(io.BytesIO(trained), weights_only=True)
    checkpoint |= {"model": model.state_dict(), "model_config": vars(model.config), "encoding": "bytes"}
    torch.save(checkpoint, "padded.pt")
    status, out, error = call(sample, "padded.pt", "--prompt=x", "--max-new-tokens=60", "--temperature=5")
    assert status == 0 and len(out) > 20, error


def test_bad_input_is_refused(run_folder, refused, call):
    """One line, status 2."""
    refused("nowhere does not exist", sample, "nowhere")
    refused("--temperature must be at least 0, got -1.0", sample, run_folder, "--temperature=-1")
    refused("--temperature must be at least 0, got nan", sample, run_folder, "--temperature=nan")
    refused("--top-k must be at least 1, got 0", sample, run_folder, "--top-k=0")
    refused("--top-p must lie above 0", sample, run_folder, "--top-p=0")
    refused("--max-new-tokens must be at least 1, got 0", sample, run_folder, "--max-new-tokens=0")
    refused("invalid int value: 'x'", sample, run_folder, "--seed=x")
    refused("not allowed with argument", sample, run_folder, "--prompt=a", "--prompt-file=b")
    refused("--stop must not be empty", sample, run_folder, "--stop=")
    refused("--prompt - can be given once only", sample, run_folder, "--prompt=-", "--prompt=-")
    refused("none.txt", sample, run_folder, "--prompt-file=none.txt")
    refused("device 'gpu' can't be used here", sample, run_folder, "--device=gpu")
    refused("device 'meta' can't be used here", sample, run_folder, "--device=meta")
    refused("--seed must be below 2**63", sample, run_folder, "--seed=99999999999999999999")
    Path("latin.txt").write_bytes(b"\xe9")
    refused("latin.txt is not UTF-8 text", sample, run_folder, "--prompt-file=latin.txt")


def test_bad_checkpoints_are_refused(run_folder, refused, trained):
    """Truncated, empty, foreign, or holding code: named, and never executed."""
    path = run_folder / "best.pt"
    for damaged in (b"", b"not a checkpoint", trained[:-100], trained[: len(trained) // 2], bytes(len(trained))):
        path.write_bytes(damaged)
        refused("best.pt is damaged or not a checkpoint", sample, run_folder)
    torch.save({"model": {}}, path)
    refused("is not a checkpoint of train.py: 'optimizer' is missing or of another type", sample, run_folder)
    torch.save([1, 2], path)
    refused("is not a checkpoint of train.py", sample, run_folder)
    Path("text.csv").write_text("a,b\n1,2\n")
    refused("text.csv is damaged or not a checkpoint", sample, "text.csv")

    class Harmful:
        def __reduce__(self):
            return (Path("executed").touch, ())

    for save in (torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))):
        save({"model": Harmful()}, path)
        refused("best.pt is damaged or not a checkpoint", sample, run_folder)
        assert not Path("executed").exists()

    path.write_bytes(trained)
    checkpoint = torch.load(path, weights_only=True)
    for key, value in (("n_layer", 3), ("n_layer", "2"), ("colour", "blue")):
        torch.save(checkpoint | {"model_config": checkpoint["model_config"] | {key: value}}, path)
        refused("does not fit this version of model.py", sample, run_folder)
    torch.save(checkpoint | {"model": {name: x * float("nan") for name, x in checkpoint["model"].items()}}, path)
    refused("holds weights that are not finite", sample, run_folder)
    torch.save(checkpoint | {"encoding": 3}, path)
    refused("'encoding' is missing or of another type", sample, run_folder)
    path.unlink()
    refused("best.pt does not exist; train a model first", sample, run_folder)


def test_device_and_precision():
    """auto on a machine without accelerator is float32 on the CPU; what can't be used is refused."""
    cpu = torch.device("cpu")
    assert sample.choose_device("cpu") == cpu
    assert sample.choose_dtype("auto", cpu) == torch.float32 and sample.choose_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(prepare.UserError, match="float16"):
        sample.choose_dtype("float16", cpu)
