"""A page like that of lab.graph, for a model that works off trees (lab/trees.py).

    python -m lab.tree_page tree.html    # trains dag2_silu first: two to four minutes on one core

It shows the graph at "=", and the tree beside it. Smaller trees show what a linear map reads off
the graph's nodes, before the graph and after each depth.
"""

import argparse
from pathlib import Path

import torch

from lab.graph import shares_right, write_page
from lab.shared import check_target
from lab.trees import RATES, Trial, train_trial
from prepare import run


def main() -> None:
    """Show the first tree whose root is read wrong before the graph, and right after it."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("page", type=Path, help="written when the training is done")
    path = parser.parse_args().page
    check_target(path)
    torch.set_num_threads(1)
    _, model, (tokens, levels, rows) = train_trial(Trial("dag2_silu", rate=RATES[0]))
    before = rows[1][-1]  # the roots that are read
    after = rows[-1][-1]
    root = levels[-1][-len(after) :]
    is_example = (before != root) & (after == root)
    i = is_example.flatten().tolist().index(True) - len(root)  # counted from the end
    tree = {
        # The values at each level, leaves first.
        "values": [values[i].tolist() for values in levels],
        # What is read off the nodes, by depth.
        "read": [[read[i].tolist() for read in row] for row in rows[1:]],
        # How much of that is right over all trees, by depth and level.
        "right": [shares_right(row, levels[1:]) for row in rows[1:]],
    }
    texts = [*map(str, tree["values"][0]), "="]
    write_page(path, model, tokens[i].tolist(), texts, len(texts), tree=tree)


if __name__ == "__main__":
    run(main)
