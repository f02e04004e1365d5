"""Run a script of ours until kill -9 ends it, in a certain call of a function.

python -m tests.kill torch.save 2 train --dataset=tiny    # in the second call of torch.save
"""

import importlib
import itertools
import os
import pkgutil
import signal
import sys
from pathlib import Path

name, number, script, *arguments = sys.argv[1:]
owner_name, _, attribute = name.rpartition(".")
owner = pkgutil.resolve_name(owner_name)
function = getattr(owner, attribute)
calls = itertools.count(1)


def call_or_die(*values, **options):
    """Call the function, or die. A call of torch.save leaves half a file."""
    if next(calls) == int(number):
        if name == "torch.save":
            Path(values[1]).write_bytes(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*values, **options)


setattr(owner, attribute, call_or_die)
importlib.import_module(script).main(arguments)
