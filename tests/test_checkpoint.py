"""The checkpoint that comes with the repository still says what it said when it was saved."""

import pytest
import torch

import sample
from tests.helpers import REPOSITORY

CHECKPOINT = REPOSITORY / "checkpoints/stdlib.pt"
LOSS = 1.621  # nats per byte of LICENSE


def test_its_loss_on_a_fixed_text():
    """A change of the format or of the arithmetic would show in the loss on our LICENSE."""
    model, encoding = sample.load_model(CHECKPOINT, torch.device("cpu"))
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    ids = torch.tensor(encoding.encode_ordinary(text)[:1025])
    tokens = ids[:-1].view(4, 256)
    targets = ids[1:].view(4, 256)
    with torch.no_grad():
        loss = model(tokens, targets).loss.item()
    assert loss == pytest.approx(LOSS, abs=5e-4)


def test_it_writes_python(capsys):
    """A text that continues "class Node:" looks like the body of a class."""
    sample.main([str(CHECKPOINT), "--prompt=class Node:", "--device=cpu"])
    out = capsys.readouterr().out
    assert out.startswith("class Node:\n    ")
    assert "def " in out
    assert "return" in out


def test_it_is_small():
    """It has the weights only, in 4 MB at most."""
    assert CHECKPOINT.stat().st_size <= 4_000_000
