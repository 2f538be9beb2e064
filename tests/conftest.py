"""What several tests need: small folders of images, the scripts as a user runs them, and the real images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path.cwd()

# the smallest ViT that still has every part
TINY = ["--embed-dim", "16", "--depth", "2", "--num-heads", "2", "--device", "cpu"]


def write_images(root, *, classes=("cat", "dog"), count=6, size=(40, 32), suffix=".png"):
    """`count` random images a class, of one dominant colour a class, as class folders below root."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = rng.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
            pixels[..., number % 3] += 120
            Image.fromarray(pixels).save(root / name / f"{index:03}{suffix}")
    return root


@pytest.fixture(autouse=True)
def matmul_settings():
    """How float32 matrices are multiplied is a switch of the process: every test begins with torch's own, MKL."""
    settings = torch.backends.mkldnn.matmul
    settings.fp32_precision = "none"
    return settings


@pytest.fixture
def image_folder(tmp_path):
    """A folder of 3 classes of 20 images, without splits of its own."""
    return write_images(tmp_path / "pets", classes=("ant", "bee", "cat"), count=20)


@pytest.fixture
def folder_flags(image_folder, tmp_path):
    """The flags of a run of a second: a tiny model on image_folder, 2 epochs of 6 steps, written to tmp_path."""
    return [
        *("--dataset", "folder", "--data-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache")),
        *("--out-dir", str(tmp_path / "runs"), "--epochs", "2", "--batch-size", "8", *TINY),
    ]


def run_train_vit(*flags, env=None):
    """train_vit.py as a user runs it, to its end: a CompletedProcess with text output."""
    command = [sys.executable, "train_vit.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=env)


def error_line(process):
    """The one line that a user's mistake leaves on stderr; fails where there is more, or another exit code."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    return lines[0]


def same_weights(a, b):
    """Whether two checkpoints hold the same weights and optimiser state, bit for bit."""
    first, second = (torch.load(path, weights_only=True) for path in (a, b))
    weights = all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    states = zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True)
    return weights and all(torch.equal(x[key], y[key]) for x, y in states for key in x)


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory):
    """The folder with CIFAR-10's official files; skips where they are not at hand."""
    if (REPOSITORY / "datasets" / "cifar-10-batches-py" / "test_batch").exists():
        return REPOSITORY / "datasets"
    unpack = REPOSITORY / "../shared/data/unpack.py"
    if not unpack.exists():
        pytest.skip("the real CIFAR-10 is not in datasets/")
    folder = tmp_path_factory.mktemp("datasets")
    subprocess.run([sys.executable, unpack, folder, "cifar10"], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def tried():
    """tried(what, count=1, **more) notes it in the file that the environment variable FAULTS_LOG names, if any."""

    def note(what, count=1, **more):
        if path := os.environ.get("FAULTS_LOG"):
            with open(path, "a") as file:
                print(json.dumps({"what": what, "count": count, **more}), file=file)

    return note
