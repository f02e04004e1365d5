"""A page like sample.py's, for a model that works off trees (lab/trees.py): the graph at "=", and the tree beside it.

    python -m lab.tree_page tree.html    # trains dag2_silu first: two to four minutes on one core

Smaller trees show what a linear map reads off the graph's nodes, before the graph and after each depth.
"""

import argparse
from pathlib import Path

import torch

from lab.graph import shares_right
from lab.trees import RATES, Trial, train_trial
from prepare import Parser, require, run
from sample import write_page


def main() -> None:
    """Show the first of the trees that read_off reads whose root is read wrong before the graph, and right after it."""
    parser = Parser(prog="-m lab.tree_page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, metavar="FILE.html", help="written when the training is done")
    page = parser.parse_args().page
    require(page.parent.is_dir() and not page.is_dir(), f"{page} must be a file in a folder that exists")
    torch.set_num_threads(1)
    _, model, (tokens, levels, rows) = train_trial(Trial("dag2_silu", rate=RATES[0]))
    before, after = rows[1][-1], rows[-1][-1]  # the roots that are read
    root = levels[-1][-len(after) :]
    i = ((before != root) & (after == root)).flatten().tolist().index(True) - len(root)  # counted from the end
    tree = {
        "values": [values[i].tolist() for values in levels],  # at each level, leaves first
        "read": [[read[i].tolist() for read in row] for row in rows[1:]],  # off the nodes, by depth
        "right": [shares_right(row, levels[1:]) for row in rows[1:]],  # over all trees, by depth and level
    }
    texts = [*map(str, tree["values"][0]), "="]
    write_page(page, model, tokens[i].tolist(), texts, len(texts), tree=tree)


if __name__ == "__main__":
    run(main)
