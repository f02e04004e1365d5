"""sample.py: what a checkpoint gives, streaming, and bad input."""

import io
import pickle
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


def test_text_streams_as_it_is_generated_in_whole_characters():
    """A character that spans tokens comes out whole; a cut one at the end is replaced; <|endoftext|> ends the text."""

    class Fixed:
        """Generates given bytes."""

        embed = torch.nn.Embedding(1, 1)

        def __init__(self, tokens):
            self.tokens = tokens

        def generate(self, tokens, max_new_tokens, n_token):
            assert tokens.tolist() == [[104, 105]] and n_token == 257
            yield from (torch.tensor([token]) for token in self.tokens)

    pieces = list(sample.continue_text(Fixed([*"é😀x".encode(), 256, 65]), "bytes", "hi", 9))
    assert pieces == ["", "é", "", "", "", "😀", "x", ""]
    assert "".join(sample.continue_text(Fixed("日".encode()[:2]), "bytes", "hi", 9)) == "\ufffd"


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
