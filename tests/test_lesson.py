"""lesson/vit.py is the model and the training step of train_vit.py, in 150 lines that need torch alone; and the Python
lines in docs/reading.md run."""

import ast
import inspect
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_images

import lesson.vit
import train_vit
from data import load_dataset
from lesson.vit import ViT, draw_images, to_patches, train_one_epoch
from maps.recorder import AttentionRecorder
from models.vit import VisionTransformer
from pipeline.batches import Batches
from seeding import seed_for

FILE = Path("lesson/vit.py")
SIZES = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "drop": 0.0}
SEED, BATCH_SIZE, LR = 3, 8, 1e-3


@pytest.fixture
def losses(monkeypatch):
    """The values of all tensors whose backward() is called, in order: one loss per step of whatever trains."""
    values = []
    backward = torch.Tensor.backward

    def keep_and_go_backward(loss, *args, **options):
        values.append(loss.item())
        return backward(loss, *args, **options)

    monkeypatch.setattr(torch.Tensor, "backward", keep_and_go_backward)
    return values


def test_the_same_seed_gives_the_weights_of_the_project(seed=0):
    torch.manual_seed(seed)
    project = VisionTransformer(num_classes=3, **SIZES).state_dict()
    torch.manual_seed(seed)
    own = ViT(num_classes=3, **SIZES).state_dict()
    assert own.keys() == project.keys()
    assert all(torch.equal(own[name], project[name]) for name in project)


def test_twenty_losses_are_those_of_train_vit(losses, tmp_path):
    """One epoch of 20 steps of each, in float32, with the same seed and no augmentation: each loss agrees."""
    images, cache = tmp_path / "pets", tmp_path / "cache"
    write_images(images / "train", classes=("ant", "bee", "cat", "dog"), count=40)
    write_images(images / "test", classes=("ant", "bee", "cat", "dog"), count=2)
    sizes = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    train_vit.main(
        [
            *("--dataset", "folder", "--data-dir", str(images), "--cache-dir", str(cache)),
            *("--out-dir", str(tmp_path / "runs"), "--device", "cpu", "--amp", "off", "--seed", str(SEED)),
            *("--opt", "adamw", "--lr", str(LR), "--sched", "multistep", "--epochs", "1"),
            *("--batch-size", str(BATCH_SIZE), "--hflip", "0", "--scale", "1", "1", "--ratio", "1", "1", *sizes),
        ]
    )
    expected = losses.copy()
    losses.clear()

    dataset = load_dataset("folder", data_dir=images, image_size=32, cache_dir=cache)
    batches = Batches(
        dataset.train, batch_size=BATCH_SIZE, mean=dataset.mean, std=dataset.std, device=torch.device("cpu"), seed=SEED
    )
    torch.manual_seed(seed_for("weights", SEED))
    model = ViT(num_classes=4, **SIZES)
    train_one_epoch(model, torch.optim.AdamW(model.parameters(), lr=LR), batches.batches(epoch=0))

    assert len(losses) == len(expected) == 20
    assert losses == pytest.approx(expected, rel=1e-4)
    assert min(expected[1:]) < 0.9 * expected[0]  # they moved


def test_it_learns_its_own_images(monkeypatch):
    """By the command's own way, with larger patches and fewer images; guessing would give 25 %."""
    monkeypatch.setattr(lesson.vit, "ViT", partial(ViT, patch_size=8))
    torch.manual_seed(0)
    assert lesson.vit.main(*draw_images(5000), epochs=2) > 0.5


def test_it_draws_four_shapes_as_often():
    images, labels = draw_images(400)
    assert images.shape == (400, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    assert (labels.bincount() > 50).all() and len(labels.bincount()) == 4


def test_it_can_be_pasted_into_an_empty_folder(tmp_path):
    text = FILE.read_text().replace("draw_images(9000)", "draw_images(1100)").replace("epochs=5", "epochs=1")
    done = subprocess.run(
        [sys.executable, "-"],
        input=text,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("epoch 1: training accuracy ")
    assert not list(tmp_path.iterdir())


def test_it_is_short_and_imports_torch_alone():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 150
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
    assert imported == {"torch"}


def test_patches_hold_the_pixels_of_their_square():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    patches = to_patches(images, 4)
    assert torch.equal(patches[1, 2], images[1, :, 4:8, 0:4].flatten())  # the third: second row, first column


def test_its_attention_is_recorded_as_it_is():
    torch.manual_seed(0)
    model, project = ViT(num_classes=3, **SIZES), VisionTransformer(num_classes=3, **SIZES)
    project.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    recorded = []
    for each in (model, project):
        with torch.no_grad(), AttentionRecorder(each) as recorder:
            each(images)
        recorded.append(torch.stack(recorder.attentions))  # (layers, B, heads, N, N)
    assert recorded[0].shape == (2, 2, 4, 65, 65)
    torch.testing.assert_close(*recorded)


def test_python_lines_of_the_reading_guide_run(folder_flags, tmp_path):
    """In one session, with a checkpoint of a run that takes a second; all but the minutes on CIFAR-10."""
    train_vit.main([*folder_flags, "--run-name", "tiny"])
    blocks = re.findall(r"(?:^    .*\n)+", Path("docs/reading.md").read_text(), re.M)
    blocks = [block for block in blocks if not block.startswith("    python ") and "cifar10" not in block]
    assert len(blocks) == 9
    session = {}
    for block in blocks:
        for name, there in (("checkpoints/tiny", "runs/tiny"), ("vit.pt2", "vit.pt2")):
            block = block.replace(name, str(tmp_path / there))
        exec(inspect.cleandoc(block), session)
    torch.testing.assert_close(session["recorder"].attentions[0].sum(-1), torch.ones(1, 4, 65))
    assert [round(session["share"](step), 2) for step in (0, 2, 8)] == [0, 1, 0]
