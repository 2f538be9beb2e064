"""Several processes for one run: real ones, started by torchrun, on the CPU."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import REPOSITORY, TINY, write_images

from training.ranks import own_rows, shared_steps

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MODELS = {
    "train_vit.py": [*TINY, "--drop", "0"],
    "train_cct.py": ["--model", "cct_2_3x2", "--attn-drop", "0", "--drop-path", "0", "--aa", "none", "--device", "cpu"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """51 images of 3 classes, 17 each; 3 of each are test images, so that 42 are left to train on."""
    return write_images(tmp_path_factory.mktemp("ranks") / "pets", classes=("ant", "bee", "cat"), count=17)


def start(script, images, folder, *flags, ranks=2):
    """A process that trains 2 epochs of 6 batches of 8, the last of them with 1 or 2 images."""
    command = [*TORCHRUN[: None if ranks == 2 else 1], script, *MODELS[script], "--dataset", "folder"]
    command += ["--data-dir", str(images), "--cache-dir", str(images.parent / "cache"), "--out-dir", str(folder)]
    command += ["--epochs", "2", "--batch-size", "8", "--amp", "off", "--run-name", "run", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def train(*arguments, **options):
    """(stdout, stderr) of a run that succeeds."""
    process = start(*arguments, **options)
    output = process.communicate(timeout=200)
    assert process.returncode == 0, output[1]
    return output


def assert_same_run(folder, other):
    """Loss curves, results and last weights of two runs are equal to 1e-4."""
    logs = [list(csv.DictReader((path / "run" / "log.csv").open())) for path in (folder, other)]
    for row, expected in zip(*logs, strict=True):
        names = [name for name in row if row[name] and name.endswith(("lr", "loss", "accuracy"))]
        assert len(names) == 5
        for name in names:
            assert float(row[name]) == pytest.approx(float(expected[name]), abs=1e-4)
    a, b = (torch.load(path / "run" / "last.pt", weights_only=True) for path in (folder, other))
    for checkpoint in (a, b):  # a softmax does not see it: its gradient is rounding, which AdamW enlarges
        checkpoint["weights"].pop("pool.score.bias", None)
    torch.testing.assert_close(a["weights"], b["weights"], rtol=0, atol=1e-4)
    accuracies = [json.loads((path / "run" / "result.json").read_text())["test_accuracy"] for path in (folder, other)]
    assert accuracies[0] == pytest.approx(accuracies[1])


@pytest.mark.parametrize(("ranks", "count"), [(1, 5), (2, 8), (3, 8), (4, 3)])
def test_the_parts_of_all_ranks_are_the_batch(ranks, count, monkeypatch):
    """Weighted by their sizes, the means over the parts add up to the mean over the images of the step."""
    values, labels = torch.rand(2, count, dtype=torch.float64)
    first = torch.rand(6, dtype=torch.float64)
    seen, mean = [], 0.0
    for rank in range(ranks):
        monkeypatch.setattr("training.ranks.rank_and_ranks", lambda rank=rank: (rank, ranks))
        two = Namespace(whole=True, batches=lambda epoch, step: iter([(first, first), (values, labels)]))
        (parts,) = shared_steps(two, 0, 0, accumulate=2)
        mean += sum(part.mean() * weight for part, _, weight in parts) / ranks
        seen += range(count)[own_rows(count)] if parts[1][2] else []
        assert len(parts[1][0]) >= 1 and torch.equal(parts[1][1], labels[own_rows(count)])
    assert seen == list(range(count))
    torch.testing.assert_close(mean, torch.cat([first, values]).mean())


def test_two_processes_train_as_one(images, tmp_path):
    """With accumulated batches too, the last of which has two images."""
    flags = ["--accumulate", "4", "--val-fraction", "0", "--test-fraction", "0.18"]
    for name, ranks in (("one", 1), ("two", 2)):
        output, _ = train("train_vit.py", images, tmp_path / name, *flags, ranks=ranks)
        assert output.count("test accuracy") == 1 and "42 images" in output
    assert_same_run(tmp_path / "two", tmp_path / "one")
    result = json.loads((tmp_path / "two/run/result.json").read_text())
    assert result["ranks"] == 2 and not list(tmp_path.glob("two/run-*"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--fsdp", "--opt", "adamw"]], ids=["DDP", "FSDP"])
def test_a_last_batch_of_one_image_and_runs_that_change_hands(images, tmp_path, flags):
    """CCT, 41 images: in the last step one rank has none. Stopped, resumed by another number of ranks."""
    model = ["--opt", "adamw", "--batch-size", "10", "--save-minutes", "1000"]
    images41 = tmp_path / "pets"
    write_images(images41 / "train", classes=("ant",), count=21)
    write_images(images41 / "train", classes=("bee",), count=20)
    write_images(images41 / "test", classes=("ant", "bee"), count=3)
    train("train_cct.py", images41, tmp_path / "one", *model, ranks=1)
    train("train_cct.py", images41, tmp_path / "two", *model, *flags)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    for first, second in ((2, 1), (1, 2)):
        folder = tmp_path / f"{first}-{second}"
        for ranks, limit in ((first, ["--minutes", "1e-4"]), (second, [])):
            output, _ = train(
                "train_cct.py",
                *(images41, folder, *model, *limit, *(flags if ranks == 2 else []), "--resume", "auto"),
                ranks=ranks,
            )
            assert ("stopped" in output) == bool(limit)
        assert_same_run(folder, tmp_path / "one")


def test_a_batch_that_the_ranks_cannot_share(images, tmp_path):
    process = start("train_vit.py", images, tmp_path, "--batch-size", "7")
    assert "error: --batch-size 7: 2 processes cannot share it equally" in process.communicate(timeout=200)[1]
    assert process.returncode != 0 and not (tmp_path / "run" / "last.pt").exists()


def test_a_mistake_that_the_first_rank_finds_is_a_line_of_each(images, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    process = start("train_vit.py", images, tmp_path)
    errors = process.communicate(timeout=200)[1]
    assert errors.count("error: --run-name run:") == 2 and "gloo" not in errors and process.returncode != 0


def children(process):
    """The ids of the ranks that a torchrun started."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in listing.stdout.split()]


def wait_for(path, process):
    deadline = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_dies_ends_the_others_with_a_message(images, tmp_path, number):
    process = start("train_vit.py", images, tmp_path, "--epochs", "9999", "--save-minutes", "0.01")
    wait_for(tmp_path / "run" / "last.pt", process)
    os.kill(children(process)[number], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30 and process.returncode != 0
    assert "SIGKILL" in errors or "another process of this run" in errors
    train("train_vit.py", images, tmp_path, "--epochs", "9999", "--minutes", "1e-4", "--resume", "auto", ranks=1)


@pytest.mark.slow
def test_a_stopped_torchrun_saves(images, tmp_path):
    flags = ["--epochs", "9999", "--save-minutes", "1000"]
    process = start("train_vit.py", images, tmp_path, *flags)
    wait_for(tmp_path / "run" / "last.pt", process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "; to resume: python train_vit.py --resume" in output, errors
    assert "epoch" in train("train_vit.py", images, tmp_path, *flags, "--minutes", "1e-4", "--resume", "auto")[0]


def test_the_table_of_what_ranks_send_is_its_formula():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (REPOSITORY / "docs" / "machines.md").read_text().splitlines()
        if line.startswith("| ViT")
    ]
    sizes = {  # torchvision's, and the report's
        "ViT of the report, 32 px": (3_195_146, 65),
        "ViT-B/16, 224 px": (86_567_656, 197),
        "ViT-L/16, 224 px": (304_326_632, 197),
        "ViT-H/14, 224 px": (632_045_800, 257),
    }
    assert len(rows) == 12
    for name, images, step, gpus, sent, *links in rows:
        (parameters, tokens), gpus = sizes[name], int(gpus)
        seconds = 6 * parameters * tokens * int(images) / 400e12
        moved = 2 * (gpus - 1) / gpus * 4 * parameters
        assert (step, sent) == (f"{1e3 * seconds:.1f} ms", f"{moved / 1e6:,.0f} MB")
        for cell, speed in zip(links, (450e9, 12.5e9), strict=True):
            assert cell == f"{1e3 * moved / speed:.2f} ms, {100 * moved / speed / seconds:.0f} %"
