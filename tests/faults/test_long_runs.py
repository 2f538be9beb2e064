"""Long runs: memory, open files and the time of an epoch stay as they were, and the curves cost no more."""

import re
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import TINY, write_images

from training.outputs import COLUMNS, draw_curves

pytest.importorskip("fcntl")
from harmed import started  # noqa: E402

CLOCK = 100  # ticks of /proc/PID/stat per second


class Usage:
    """What a process has used when it has come so far: epochs, seconds of the CPU, bytes of memory, open files."""

    def __init__(self, process, output):
        place = Path("/proc", str(process.pid))
        self.epochs = int(re.findall(r"^epoch +(\d+)/", output.read_text(), re.M)[-1])
        self.seconds = sum(map(int, (place / "stat").read_text().rpartition(")")[2].split()[11:13])) / CLOCK
        self.memory = 1024 * int(re.search(r"VmRSS:\s+(\d+)", (place / "status").read_text())[1])
        self.files = len([*(place / "fd").iterdir()])


def usage_of_run(folder, *more, epochs, size):
    """The Usage of a run of train_vit.py after a quarter, a half and almost all of its epochs."""
    write_images(folder / "pets", count=20, size=(size, size))
    flags = ["--dataset", "folder", "--data-dir", folder / "pets", "--cache-dir", folder / "cache", *TINY, *more]
    output = folder / "output.txt"
    process = started("train_vit", [*flags, "--epochs", epochs, "--out-dir", folder / "runs"], output)
    found = []
    try:
        for share in (0.25, 0.5, 0.75, 0.98):
            while f"\nepoch {round(share * epochs):{len(str(epochs))}}/" not in output.read_text():
                assert process.is_alive(), output.read_text()[-1000:]
                time.sleep(0.1)
            found.append(Usage(process, output))
        process.join()
    finally:
        process.kill()
    assert process.exitcode == 0 and len(output.read_text().splitlines()) < epochs + 30
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "epochs", "more"),
    [
        ("2,000 epochs", 2000, ["--image-size", "16", "--patch-size", "8", "--batch-size", "16"]),
        (
            "10,000 steps through workers",
            625,
            [*("--image-size", "72", "--patch-size", "24", "--batch-size", "2"), "--cache-gib", "0", "--workers", "2"],
        ),
    ],
)
def test_a_long_run_uses_no_more_in_the_end(tmp_path, what, epochs, more, tried):
    first, second, third, last = usage_of_run(tmp_path, *more, epochs=epochs, size=72 if "workers" in what else 16)
    before, after = ((b.seconds - a.seconds) / (b.epochs - a.epochs) for a, b in ((first, second), (third, last)))
    drift = {"time of an epoch (%)": 100 * (after / before - 1), "memory (%)": 100 * (last.memory / second.memory - 1)}
    tried(what, **{name: round(value, 1) for name, value in drift.items()}, open_files=last.files - second.files)
    assert max(drift.values()) < 5 and last.files == second.files, drift


def test_curves_of_many_epochs_cost_no_more_than_twice(tmp_path):
    args = Namespace(sched="cosine", mixup=0, cutmix=0, smoothing=0, class_weights="none")

    def seconds(epochs):
        row = dict.fromkeys(COLUMNS, 0.5)
        history, began = [row | {"epoch": n + 1} for n in range(epochs)], time.process_time()
        draw_curves(tmp_path / "curves.png", history, args)
        return time.process_time() - began

    seconds(10)  # what is loaded and made only once
    assert seconds(5000) < 2 * seconds(20)
