"""Kill a training with SIGKILL at random moments, resume it, and compare with an undisturbed one.

python -m tests.kill_train 50
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import prepare
from tests.conftest import TINY_RUN, make_corpus

TRAIN = Path(prepare.__file__).with_name("train.py")
STEPS_PER_KILL = 60  # with an evaluation, and so a save, every third step


def kill_train(rounds: int, folder: Path, seed: int) -> None:
    """Kill `rounds` processes of one run, each a random time after it has begun to train; assert equal results."""
    os.chdir(folder)
    make_corpus(folder / "text")
    prepare.prepare(["text"], name="tiny", encoding="bytes")
    rng = random.Random(seed)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = (*TINY_RUN, f"--max_steps={STEPS_PER_KILL * rounds}", "--eval_interval=3", "--grad_accum=2")

    def start(name: str, *more: str) -> subprocess.Popen:
        command = (sys.executable, TRAIN, *run, f"--out_dir=out/{name}", *more)
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.perf_counter()
    assert start("undisturbed").wait() == 0
    seconds = time.perf_counter() - began
    checkpoint = folder / "out/killed/ckpt.pt"
    reached = []
    while len(reached) < rounds:
        process = start("killed", *(["--resume"] if checkpoint.exists() else []))
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.001)  # until it has written a checkpoint of its own
        time.sleep(rng.uniform(0, seconds / rounds / 2))  # half: the machine may be faster now than it was
        process.kill()
        if process.wait() == 0:  # it was at its end before the kill came: begin the run anew
            shutil.rmtree(checkpoint.parent)
            continue
        assert process.returncode == -signal.SIGKILL, f"ended with status {process.returncode} (seed {seed})"
        reached.append(torch.load(checkpoint, weights_only=True)["step"])
    assert start("killed", "--resume").wait() == 0
    whole, other = (torch.load(folder / f"out/{name}/ckpt.pt", weights_only=True) for name in ("undisturbed", "killed"))
    for name, weight in whole["model"].items():
        assert torch.equal(weight, other["model"][name]), f"{name} differs (seed {seed})"
    for i, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(x, other["optimizer"]["state"][i][key]) for key, x in moments.items())
    print(
        f"{len(reached)} processes killed, the last at step {reached[-1]} of {STEPS_PER_KILL * rounds}, and every "
        f"checkpoint loaded; weights and moments equal those of an undisturbed run of {seconds:.1f} s, bit for bit"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_train(rounds=int(sys.argv[1]), folder=Path(folder), seed=int(time.time()))
