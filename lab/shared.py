"""What several files of lab/ need: a trained model, intervals, CSV rows, pictures."""

import csv
import importlib.util
import math
import sys
from pathlib import Path
from statistics import stdev

import torch

import lab.baselines  # noqa: F401  a checkpoint may hold one of them
from model import GPT, ModelConfig
from prepare import UserError, atomic_write
from train import load_checkpoint, make_config

# Student's t: the 97.5 % quantiles for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
STUDENT_T += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064)


def load_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """Return the model of a checkpoint, or of a run's folder, and all else that is stored."""
    checkpoint = load_checkpoint(path)
    model = GPT(make_config(ModelConfig, checkpoint["model_config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model, checkpoint


def half_width(values: list[float]) -> float:
    """Return half the width of the 95 % interval around the mean of the values (Student's t).

    A single value has no interval (nan), and beyond 25 values it comes out a bit too wide.
    """
    n = len(values)
    if n == 1:
        return math.nan
    quantile = STUDENT_T[min(n - 1, len(STUDENT_T)) - 1]
    return quantile * stdev(values) / n**0.5


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, whose first line names the columns."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_target(path: Path) -> None:
    """Raise a UserError if no file can be written there: before the work, not after it."""
    is_something_else = path.exists() and not path.is_file()  # a folder, a device
    if is_something_else or not path.parent.is_dir():
        raise UserError(f"{path} must be a file in a folder that exists")


def new_figure(width: float, height: float):
    """Make an empty figure of matplotlib's, with sizes in inches."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the picture needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(path: Path, figure) -> None:
    """Write a figure to a file."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    print(f"wrote {path}", file=sys.stderr)
