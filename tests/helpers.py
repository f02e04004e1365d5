"""What several test files need."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
from model import GPT, ModelConfig

REPOSITORY = Path(__file__).parent.parent

TINY_MODEL = {
    "vocab_size": 23,
    "block_size": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "n_expert": 8,
    "top_k": 3,
    "expert_dim": 16,
    "dag_depth": 2,
    "dag_dim": 8,
}

TINY_RUN = [  # arguments of train.py: six steps on the dataset `tiny`, in half a second
    "--dataset=tiny",
    "--out_dir=out/tiny",
    "--device=cpu",
    "--block_size=16",
    "--n_layer=2",
    "--n_head=2",
    "--n_kv_head=1",
    "--n_embd=16",
    "--n_expert=4",
    "--top_k=2",
    "--expert_dim=8",
    "--dag_dim=4",
    "--batch_size=4",
    "--max_steps=6",
    "--eval_interval=3",
    "--eval_tokens=64",
    "--warmup_steps=2",
    "--learning_rate=0.01",
]


def tiny_config(**changes) -> ModelConfig:
    """Return the config of a model that computes in milliseconds."""
    return ModelConfig(**TINY_MODEL | changes)


def tiny_model(**changes) -> GPT:
    """Make a model whose weights are so large that every part of it matters."""
    return randomize(GPT(tiny_config(**changes)))


def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Draw all weights anew, and large: also W_up, which starts at zero, and the norms' scales."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
    return module


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw ids of the tiny model's vocabulary: (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY_MODEL["vocab_size"], (batch, length), generator=generator)


def results_and_gradients(function, inputs: dict[str, torch.Tensor], module: torch.nn.Module):
    """Return function(**inputs), and the gradients of a random projection of it, by name.

    There is a gradient for every floating-point input and for every parameter of the module.
    """
    inputs = {name: x.detach().clone() for name, x in inputs.items()}
    for x in inputs.values():
        x.requires_grad_(x.is_floating_point())
    module.zero_grad()
    value = function(**inputs)
    generator = torch.Generator().manual_seed(1)
    value.backward(torch.randn(value.shape, generator=generator, dtype=value.dtype))
    results = {"value": value.detach()}
    for name, x in inputs.items():
        if x.requires_grad:
            results[f"grad {name}"] = x.grad
    for name, parameter in module.named_parameters():
        results[f"grad {name}"] = parameter.grad.clone()
    return results


def assert_same(ours: dict, theirs: dict, tolerance: float) -> None:
    """Compare tensors by name. Errors are relative to the largest value, or to 1 if it is less."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = max(1.0, theirs[name].abs().max().item())
        error = (ours[name] - theirs[name]).abs().max().item() / scale
        assert error <= tolerance, f"{name}: off by {error:.2e}, allowed {tolerance:.0e}"


def make_corpus(folder: str, documents: int = 120) -> list[str]:
    """Write .txt files with characters of one to four bytes into a new folder: return the texts."""
    Path(folder).mkdir()
    texts = []
    for i in range(documents):
        text = f"Document {i}: naïve café, 日本 😀.\n" + f"Line {i * 7919} of text.\n" * 3
        Path(folder, f"{i:03}.txt").write_bytes(text.encode())
        texts.append(text)
    return texts


def load(path: str = "out/tiny/ckpt.pt") -> dict:
    """Load a checkpoint."""
    return torch.load(path, weights_only=True)


def start(*arguments: str) -> subprocess.Popen:
    """Start a Python process that can import our scripts, and that keeps what it prints."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def assert_refused(main, arguments: list[str], message: str) -> None:
    """Call main(arguments), and check that it exits with an error of one line."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    error = str(exit.value)  # Python prints it, and exits with status 1
    assert error.startswith("error: ")
    assert "\n" not in error
    assert message in error


def read_dataset(name: str) -> list[list[bytes]]:
    """Decode the documents of train and of val, each of which ends with <|endoftext|>."""
    meta, train_tokens, val_tokens = prepare.open_dataset(name)
    encoding = prepare.get_encoding(meta["encoding"])
    splits = []
    for tokens in (train_tokens, val_tokens):
        ends = np.flatnonzero(tokens == encoding.eot_token)
        *documents, rest = np.split(tokens, ends + 1)
        assert len(rest) == 0
        splits.append([encoding.decode_bytes(ids[:-1].tolist()) for ids in documents])
    return splits
