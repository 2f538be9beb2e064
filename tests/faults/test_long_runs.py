"""Long runs: memory, open files and the time of an epoch stay as they were, and the curves cost no more."""

import csv
import re
import statistics
import time
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import TINY, write_images

from training.outputs import COLUMNS, draw_curves

pytest.importorskip("fcntl")
from harmed import started  # noqa: E402


def usage(pid):
    """(bytes of memory, number of open files) of a process."""
    place = Path("/proc", str(pid))
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", (place / "status").read_text())[1]), len([*(place / "fd").iterdir()])


def long_run(folder, *more, epochs, size):
    """A run of train_vit.py: its usage after half of its epochs and at the end, and the seconds of each epoch."""
    write_images(folder / "pets", count=20, size=(size, size))
    flags = ["--dataset", "folder", "--data-dir", folder / "pets", "--cache-dir", folder / "cache", *TINY, *more]
    output, found = folder / "output.txt", []
    output.touch()
    process = started("train_vit", [*flags, "--epochs", epochs, "--out-dir", folder / "runs"], output)
    try:
        for epoch in (epochs // 2, epochs * 49 // 50):
            while f"\nepoch {epoch:{len(str(epochs))}}/" not in output.read_text():
                assert process.is_alive(), output.read_text()[-1000:]
                time.sleep(0.05)
            found.append(usage(process.pid))
        process.join()
    finally:
        process.kill()
    assert process.exitcode == 0 and len(output.read_text().splitlines()) < epochs + 30
    with open(folder / "runs" / "vit" / "log.csv", newline="") as file:
        return *found, [float(row["seconds"]) for row in csv.DictReader(file)]


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
    """The median of five runs: the speed of the machine itself changes by some 10 % within a minute."""
    drifts, more_open = {"time of an epoch (%)": [], "memory (%)": []}, []
    for number in range(5):
        size = 72 if "workers" in what else 16
        (memory, files), (last_memory, last_files), seconds = long_run(
            tmp_path / f"{number}", *more, epochs=epochs, size=size
        )
        second, fourth = (statistics.median(seconds[i * epochs // 4 : (i + 1) * epochs // 4]) for i in (1, 3))
        for name, ratio in zip(drifts, (fourth / second, last_memory / memory)):
            drifts[name].append(100 * (ratio - 1))
        more_open.append(last_files - files)
    drift = {name: round(statistics.median(values), 1) for name, values in drifts.items()}
    tried(what, 5, **drift, **{"open files more": max(more_open)})
    assert max(drift.values()) < 5 and max(more_open) <= 2, (drifts, more_open)  # a file that is being written


def test_curves_of_many_epochs_cost_no_more_than_twice(tmp_path):
    args = Namespace(sched="cosine", mixup=0, cutmix=0, smoothing=0, class_weights="none")

    def seconds(epochs):
        row = dict.fromkeys(COLUMNS, 0.5)
        history, began = [row | {"epoch": n + 1} for n in range(epochs)], time.process_time()
        draw_curves(tmp_path / "curves.png", history, args)
        return time.process_time() - began

    seconds(10)  # what is loaded and made only once
    assert seconds(5000) < 2 * seconds(20)
