"""Scripts that are killed, or whose disk fails, at any moment: nothing that was saved is lost."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import TINY, same_weights, write_images

from training.checkpoint import has_checkpoint, load_checkpoint

pytest.importorskip("fcntl")  # Windows has neither fork nor these signals
from harmed import Fault, children, started  # noqa: E402

SCRIPTS = {
    "train_vit": TINY,
    "train_generator": [*("--noise-steps", "4", "--width", "8", "--depth", "1"), "--device", "cpu"],
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
SAVE_MINUTES = 0.001  # so each step saves


class Runs:
    """Runs of a script that differ in what happens to them; the first one is left alone."""

    def __init__(self, script, folder):
        self.script, self.folder = script, folder
        images = write_images(folder / "pets", classes=("ant", "bee"), count=20)
        self.flags = ["--dataset", "folder", "--data-dir", images, "--image-size", "16", "--epochs", "2"]
        self.flags += ["--batch-size", "16", "--save-minutes", SAVE_MINUTES, *SCRIPTS[script]]
        began = time.monotonic()
        self.run("alone", Fault(str(folder / "alone"), log=str(folder / "operations")))
        self.seconds = time.monotonic() - began
        self.operations = (folder / "operations").read_text().splitlines()

    def start(self, name, fault=None):
        place = self.folder / name
        flags = [*self.flags, "--out-dir", place, "--cache-dir", place / "cache", "--run-name", "run"]
        return started(self.script, [*flags, "--resume", "auto"], place.with_suffix(".txt"), fault)

    def run(self, name, fault=None):
        """(exit code, output) of a run that is resumed, if it is there."""
        process = self.start(name, fault)
        process.join(120)
        return process.exitcode, (self.folder / f"{name}.txt").read_text()

    def is_whole(self, name):
        """Whether a run that was harmed can be resumed and then has the weights of the one that was left alone."""
        run = self.folder / name / "run"
        if has_checkpoint(run):
            load_checkpoint(run)
        code, output = self.run(name)
        whole = code == 0 and same_weights(self.folder / "alone" / "run" / "last.pt", run / "last.pt")
        shutil.rmtree(run.parent)
        (self.folder / f"{name}.txt").unlink()
        return whole or output

    def fault(self, name, number, **options):
        return Fault(str(self.folder / name), at=number, **options)


@pytest.fixture(scope="module", params=["train_vit", pytest.param("train_generator", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    return Runs(request.param, tmp_path_factory.mktemp("harmed"))


def spread(runs, count):
    """The numbers of `count` operations, evenly spread over all."""
    return [round((i + 0.5) * len(runs.operations) / count) for i in range(count)]


def killed_at_operations(runs, count, tried):
    for number in spread(runs, count):
        assert runs.run("killed", runs.fault("killed", number))[0] == -signal.SIGKILL, runs.operations[number]
        assert runs.is_whole("killed") is True, runs.operations[number]
        tried("kill -9 at an open, write, fsync or rename")


def killed_at_random_moments(runs, count, tried):
    moments = random.Random(0)
    for _ in range(count):
        process = runs.start("killed")
        process.join(moments.uniform(0, runs.seconds))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        saved = [path.stat().st_mtime for path in (runs.folder / "killed" / "run").glob("last*.pt")]
        lost = {"seconds of work lost": round(time.time() - max(saved), 2)} if saved and process.exitcode else {}
        assert runs.is_whole("killed") is True
        if process.exitcode:
            tried("kill -9 at a random moment", **lost)


def failing_at_operations(runs, count, tried):
    for i, number in enumerate(spread(runs, count)):
        error, lasting = ERRORS[i % len(ERRORS)], i % 8 >= len(ERRORS)
        code, output = runs.run("failing", runs.fault("failing", number, error=error, lasting=lasting))
        case = (runs.operations[number], errno.errorcode[error], lasting, output)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)) and "Traceback" not in output, case
        assert runs.is_whole("failing") is True, case
        tried("a failing open, write, fsync or rename")


def stopped_by_signals(runs, count, tried):
    moments = random.Random(0)
    for i in range(count):
        process = runs.start("stopped")
        process.join(moments.uniform(0.2, 1) * runs.seconds)
        signum = (signal.SIGINT, signal.SIGTERM)[i % 2]
        for _ in range(1 + i // 2 % 2):
            if process.is_alive():
                os.kill(process.pid, signum)
                time.sleep(0.1)  # else the two are one
        process.join(60)
        output = (runs.folder / "stopped.txt").read_text()
        assert process.exitcode in (0, 128 + signum, -signum) and "error" not in output, output
        assert runs.is_whole("stopped") is True
        tried("Ctrl-C or SIGTERM, once or twice")


@pytest.mark.slow
def test_two_ranks_that_are_killed(tmp_path, tried):
    images, moments = write_images(tmp_path / "pets", count=20), random.Random(0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_vit.py"]
    command += [*TINY, "--dataset", "folder", "--data-dir", images, "--cache-dir", tmp_path / "cache", "--epochs", "60"]
    command += ["--image-size", "16", "--batch-size", "16", "--save-minutes", "0.001", "--resume", "auto", "--run-name"]

    def ranks(name):
        flags = ["run", "--out-dir", tmp_path / name]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*map(str, [*command, *flags])], env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)

    assert ranks("alone").wait(300) == 0
    for _ in range(5):
        process = ranks("killed")
        time.sleep(moments.uniform(10, 25))
        started_ranks = children(process.pid)
        assert process.poll() is None and len(started_ranks) == 2
        for pid in (process.pid, *started_ranks):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        tried("kill -9 of two ranks of torchrun")
    assert ranks("killed").wait(300) == 0
    assert same_weights(*(tmp_path / name / "run" / "last.pt" for name in ("alone", "killed")))


def test_killed_or_failing_at_some_operations(runs, tried):
    killed_at_operations(runs, 2, tried)
    failing_at_operations(runs, 2, tried)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "count"),
    [
        (killed_at_operations, 40),
        (killed_at_random_moments, 20),
        (failing_at_operations, 48),
        (stopped_by_signals, 12),
    ],
)
def test_at_all_kinds_of_moments(runs, harm, count, tried):
    harm(runs, count, tried)
