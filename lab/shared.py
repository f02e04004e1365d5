"""What several files of lab/ need: intervals, rows of CSV files, pictures."""

import csv
import importlib.util
import math
from pathlib import Path
from statistics import stdev

# Student's t: the 97.5 % quantiles for 1, 2, ... degrees of freedom.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
STUDENT_T += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064)


def half_width(values: list[float]) -> float:
    """Return half the width of the 95 % interval around the mean of the values (Student's t).

    A single value has no interval: nan. Beyond 25 values the interval is a bit too wide.
    """
    if len(values) < 2:
        return math.nan
    degrees_of_freedom = min(len(values) - 1, len(STUDENT_T))
    return STUDENT_T[degrees_of_freedom - 1] * stdev(values) / len(values) ** 0.5


def paired_differences(ours: dict, theirs: dict) -> dict:
    """Return ours less theirs by key, such as a seed, for every key that both have."""
    return {key: ours[key] - theirs[key] for key in ours if key in theirs}


def read_rows(path: Path, row_class: type) -> list:
    """Read a CSV file, whose first line names the columns, into rows of a NamedTuple's class."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("the last line is cut off")
        for words in csv.DictReader(text.splitlines()):
            types = row_class.__annotations__.items()
            rows.append(row_class(**{name: kind(words[name]) for name, kind in types}))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        place = f"{path}, line {len(rows) + 2}"
        raise SystemExit(f"error: {place}: not a row of {row_class.__name__} ({error!r})") from None
    return rows


def check_target(path: Path, suffix: str) -> None:
    """Exit, before the work, if the path is not one for such a file in a folder that exists."""
    if path.suffix != suffix or path.is_dir() or not path.parent.is_dir():
        raise SystemExit(f"error: {path} must be a {suffix} file in a folder that exists")


def new_figure(width: float, height: float):
    """Make an empty figure of matplotlib's, with sizes in inches."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("error: the picture needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_png(path: Path, figure) -> None:
    """Write a figure to a file."""
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")
