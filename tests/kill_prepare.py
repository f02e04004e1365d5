"""Kill a preparation with SIGKILL at random moments, start it again, and compare with an undisturbed run.

python -m tests.kill_prepare 30
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# prepare.py with small shards, so that a moment between any two writes can be hit
CODE = """
import sys
sys.path.insert(0, {repository!r})
import prepare
prepare.BATCH, prepare.SHARD = 3000, 2
prepare.prepare(["text"], name={name!r}, encoding="bytes", workers=2)
"""


def kill_prepare(rounds: int, folder: Path, seed: int) -> None:
    """Kill `rounds` runs, each after a random share of the time that an undisturbed one takes; assert equal bins."""
    (folder / "text").mkdir()
    rng = random.Random(seed)
    for i in range(1500):
        (folder / "text" / f"{i:04}.txt").write_text(f"{i} " * rng.randrange(1, 2000))
    repository = str(Path(__file__).parent.parent)

    def start(name: str) -> subprocess.Popen:
        code = CODE.format(repository=repository, name=name)
        with (folder / "output").open("a") as output:
            return subprocess.Popen([sys.executable, "-c", code], cwd=folder, stdout=output, stderr=subprocess.DEVNULL)

    began = time.perf_counter()
    assert start("undisturbed").wait() == 0
    seconds = time.perf_counter() - began
    killed, fresh = 0, True
    while killed < rounds:
        process, began = start("killed"), time.perf_counter()
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * seconds)
            if fresh:  # finished from start to end within the time: the machine has become faster
                seconds = min(seconds, time.perf_counter() - began)
            fresh = True
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed, fresh = killed + 1, False
    assert start("killed").wait() == 0
    for name in ("train.bin", "val.bin"):
        whole, other = ((folder / "data" / run / name).read_bytes() for run in ("undisturbed", "killed"))
        assert whole == other, f"{name} differs (seed {seed})"
    went_on = (folder / "output").read_text().count("going on after")
    print(
        f"{killed} runs killed, {went_on} went on where another was killed; "
        f"the bins equal those of an undisturbed run of {seconds:.1f} s"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        kill_prepare(rounds=int(sys.argv[1]), folder=Path(folder), seed=int(time.time()))
