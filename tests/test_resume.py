"""A run that was stopped or killed goes on, and ends as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import prepare
import train
from tests.conftest import REPOSITORY, TINY_RUN

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
RESUMED = ["--resume", "--out_dir=out/tiny"]


def load(path="out/tiny/ckpt.pt") -> dict:
    return torch.load(path, weights_only=True)


def without_speed(log: list[dict]) -> list[dict]:
    return [row | {"tokens_per_s": None} for row in log]


def assert_equal_runs(a: str, b: str) -> None:
    """Compare weights, moments of AdamW, and log of two runs: bit for bit."""
    one = load(f"out/{a}/ckpt.pt")
    two = load(f"out/{b}/ckpt.pt")
    assert one["step"] == two["step"]
    assert one["model"].keys() == two["model"].keys()
    for name, weight in one["model"].items():
        assert torch.equal(weight, two["model"][name]), name
    for i, moments in one["optimizer"]["state"].items():
        for name, moment in moments.items():
            assert torch.equal(moment, two["optimizer"]["state"][i][name]), name
    assert without_speed(one["log"]) == without_speed(two["log"])


def start(*arguments: str, code: str = "") -> subprocess.Popen:
    """Start a real train.py, or such code as imports it, in a process of its own."""
    command = ["-c", code] if code else [str(REPOSITORY / "train.py")]
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: str, process: subprocess.Popen) -> None:
    while not Path(path).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def interrupt_at(step: int, monkeypatch) -> None:
    """Let Ctrl-C arrive while this step is under way."""
    handlers = []
    get_batch = train.get_batch

    def noted(tokens, config, model_config, device, loaded_step, rank, ranks):
        # The batch of the step after it is loaded meanwhile.
        if loaded_step == step:
            handlers[0](signal.SIGINT, None)
        return get_batch(tokens, config, model_config, device, loaded_step, rank, ranks)

    monkeypatch.setattr(train.signal, "signal", lambda number, handler: handlers.append(handler))
    monkeypatch.setattr(train, "get_batch", noted)


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 3, 4], ids=["at once", "at an evaluation", "between two"])
def test_a_resumed_run_ends_as_an_undisturbed_one(corpus, call, monkeypatch, stop_at, grad_accum):
    """Weights, moments and log are the same, bit for bit; settings need not be given again."""
    settings = [*TINY_RUN, f"--grad_accum={grad_accum}"]
    assert call(train, *settings, "--out_dir=out/whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(stop_at, patch)
        status, out, _ = call(train, *settings)
    assert status == 0
    assert f"stopped at step {stop_at}; go on with --resume --out_dir=out/tiny\n" in out
    assert load()["step"] == stop_at
    assert call(train, *RESUMED)[0] == 0
    assert_equal_runs("tiny", "whole")


def test_a_stop_in_the_last_step_only_ends_the_run(corpus, call, monkeypatch):
    """It is evaluated and told like any other."""
    interrupt_at(6, monkeypatch)
    status, out, _ = call(train, *TINY_RUN)
    assert status == 0
    assert "stopped" not in out
    assert load()["log"][-1]["step"] == 6


def test_a_finished_run_can_go_on_longer(corpus, call):
    """A larger --max_steps adds steps, and other rates may be given."""
    assert call(train, *TINY_RUN)[0] == 0
    more = ["--max_steps=9", "--learning_rate=9e-5", "--min_lr=0"]
    assert call(train, *RESUMED, *more)[0] == 0
    assert [row["step"] for row in load()["log"]] == [0, 3, 6, 9]


KILLED = """
import os, sys, torch, train
save = torch.save
saves = []
def save_or_die(contents, file):
    saves.append(contents["step"])
    if len(saves) == {number}:
        file.write(b"half of a checkpoint")
        file.flush()
        os.kill(os.getpid(), 9)
    save(contents, file)
torch.save = save_or_die
train.main()
"""


@pytest.mark.parametrize("number", [2, 3, 4], ids=["in best.pt", "in ckpt.pt", "in a later one"])
def test_a_run_killed_while_it_saves_goes_on(corpus, call, number):
    """kill -9 with half a file on the disk: the result is that of an undisturbed run."""
    assert call(train, *TINY_RUN, "--out_dir=out/whole")[0] == 0
    process = start(*TINY_RUN, code=KILLED.format(number=number))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert call(train, *RESUMED)[0] == 0
    assert_equal_runs("tiny", "whole")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_stops_a_real_process_after_its_step(corpus, name):
    """It saves, says how to go on, and ends with status 0."""
    reset = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # pytest under nohup
    code = reset + "import train; train.main()"
    process = start(*TINY_RUN, "--max_steps=100000", "--eval_interval=100000", code=code)
    wait_for("out/tiny/ckpt.pt", process)
    process.send_signal(getattr(signal, name))
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    step = re.search(r"stopped at step (\d+); go on with --resume", out)[1]
    assert load()["step"] == int(step)
    assert error.count("finishing this step, then saving; once more to end at once") == 1


def test_a_second_signal_ends_a_process_at_once(corpus):
    """It dies of it, without saving."""
    code = (
        "import os, signal, train; get_batch = train.get_batch\n"
        "def twice(*arguments):\n"
        "    if arguments[4] == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return get_batch(*arguments)\n"
        "train.get_batch = twice; train.main()"
    )
    process = start(*TINY_RUN, code=code)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert load()["step"] == 1


@pytest.mark.parametrize(
    "change",
    ["n_layer=3", "seed=1", "dataset=other", "batch_size=2", "grad_accum=2", "aggregator=sum"],
)
def test_a_run_cannot_become_another_one(corpus, call, refused, change):
    """What decides its course must stay, and the line says what it was."""
    assert call(train, *TINY_RUN, "--max_steps=1")[0] == 0
    key = change.split("=")[0]
    refused(f"out/tiny was begun with {key}=", train, *RESUMED, "--max_steps=9", f"--{change}")


def test_a_run_whose_data_have_changed_is_refused(corpus, call, refused):
    """Preparing the same name again with more text is noticed."""
    assert call(train, *TINY_RUN, "--max_steps=1")[0] == 0
    Path("text/new.txt").write_text("another document")
    prepare.main(["text", "--name=tiny", "--encoding=bytes"])
    refused("tiny has changed since out/tiny was saved", train, *RESUMED, "--max_steps=9")


def test_a_run_is_never_overwritten(corpus, call, refused):
    """The same command again is refused, and says how to go on."""
    assert call(train, *TINY_RUN, "--max_steps=1")[0] == 0
    refused("out/tiny exists: --resume it, or choose another --out_dir", train, *TINY_RUN)


@pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "short", "cut"])
def test_a_damaged_checkpoint_is_named(corpus, call, refused, size):
    """One line, and nothing is written."""
    assert call(train, *TINY_RUN, "--max_steps=1")[0] == 0
    path = Path("out/tiny/ckpt.pt")
    path.write_bytes(path.read_bytes()[:size])
    refused("out/tiny/ckpt.pt is not a checkpoint", train, *RESUMED, "--max_steps=9")


def test_a_checkpoint_of_version_0_2_is_refused_in_one_line(corpus, call, refused):
    """It says which version wrote it."""
    assert call(train, *TINY_RUN, "--max_steps=1")[0] == 0
    torch.save(load() | {"version": "0.2.0"}, "out/tiny/ckpt.pt")
    refused("out/tiny/ckpt.pt is of version 0.2.0", train, *RESUMED)


def fail_to_save(contents, file) -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_keeps_the_old_checkpoint(corpus, call, monkeypatch):
    """A full disk is a traceback; nothing half-written stays, and the old file is whole."""
    assert call(train, *TINY_RUN)[0] == 0
    before = Path("out/tiny/ckpt.pt").read_bytes()
    monkeypatch.setattr(train.torch, "save", fail_to_save)
    with pytest.raises(OSError, match="No space left"):
        call(train, *RESUMED, "--max_steps=9")
    assert Path("out/tiny/ckpt.pt").read_bytes() == before
    assert not list(Path("out").rglob("*.tmp"))


def test_a_run_whose_first_save_failed_can_be_begun_again(corpus, call, monkeypatch):
    """There is a folder without ckpt.pt, which is no obstacle."""
    with monkeypatch.context() as patch:
        patch.setattr(train.torch, "save", fail_to_save)
        with pytest.raises(OSError, match="No space left"):
            call(train, *TINY_RUN)
    assert Path("out/tiny").exists()
    assert call(train, *TINY_RUN)[0] == 0


def test_a_run_that_never_made_a_step_leaves_no_folder(corpus, call, monkeypatch):
    """So the same command with a smaller batch begins afresh."""

    def too_large(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(train.torch.nn.utils, "clip_grad_norm_", too_large)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(train, *TINY_RUN)
    assert not Path("out").exists()
    assert call(train, *TINY_RUN, "--batch_size=2")[0] == 0


def test_two_runs_in_one_folder_do_not_share_temporary_files(corpus, call, monkeypatch):
    """The file that is written beside ckpt.pt carries the number of its process."""
    names = set()
    save = torch.save

    def noted(contents, file):
        names.add(Path(file.name).name)
        save(contents, file)

    monkeypatch.setattr(train.torch, "save", noted)
    assert call(train, *TINY_RUN)[0] == 0
    assert names == {f"ckpt.pt.{os.getpid()}.tmp", f"best.pt.{os.getpid()}.tmp"}
