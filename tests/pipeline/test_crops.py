"""Random crops: their boxes, their pixels, and that memory and workers give the same."""

import os
import signal
import subprocess
import sys
from multiprocessing import get_start_method, set_start_method

import pytest
import torch
from test_batches import flags
from test_large import load_large, write_large_images
from torchvision.transforms import RandomResizedCrop, v2

from errors import UserError
from pipeline.batches import training_batches
from pipeline.crops import Crops, centre_boxes, cut_together, random_crops

CPU = torch.device("cpu")
STOPPED_BY_A_SIGNAL = """
import signal, sys, time
from pathlib import Path
from test_crops import CPU, large_flags, load_large, training_batches

stopped = []
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda signum, frame: stopped.append(signum))
dataset = load_large(sys.argv[1], Path(sys.argv[2]))
batches = training_batches(dataset, large_flags(cache_gib=0, workers=2, batch_size=1), CPU).batches()
next(batches)
print("ready", flush=True)
while len(stopped) < 2:
    time.sleep(0.01)
print(len(list(batches)))  # it ends with workers that wait for more
"""


@pytest.fixture
def dataset(tmp_path):
    return load_large(write_large_images(tmp_path / "pets"), tmp_path)


def boxes_in(size, *, count=5000, scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3)):
    generator = torch.Generator().manual_seed(0)
    return random_crops(torch.tensor([size] * count), generator, scale=scale, ratio=ratio)


@pytest.mark.parametrize("size", [(100, 150), (144, 256), (150, 100), (80, 80), (40, 400), (3, 5), (1, 900)])
def test_boxes_lie_in_their_image_and_reach_all_four_corners(size):
    top, left, height, width = boxes_in(size).unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
    for vertical in (top == 0, top + height == size[0]):
        for horizontal in (left == 0, left + width == size[1]):
            assert (vertical & horizontal).any()


def test_boxes_have_the_shares_and_ratios_of_torchvisions():
    top, left, height, width = boxes_in((300, 400), scale=(0.2, 0.6)).double().unbind(1)
    share, ratio = height * width / 120_000, (width / height).log()
    assert share.min() > 0.197 and share.max() < 0.603 and (ratio.exp() - 1).abs().max() < 0.35
    torch.manual_seed(0)
    image = torch.empty(1, 300, 400)
    drawn = [RandomResizedCrop.get_params(image, [0.2, 0.6], [3 / 4, 4 / 3]) for _ in range(5000)]
    drawn = torch.tensor(drawn).double()
    for ours, theirs in ((share, drawn[:, 2] * drawn[:, 3] / 120_000), (ratio, (drawn[:, 3] / drawn[:, 2]).log())):
        assert (ours.mean() - theirs.mean()).abs() < 0.01 and (ours.std() / theirs.std() - 1).abs() < 0.05


def test_a_image_that_no_draw_fits_is_cut_as_wide_as_the_ratio_allows():
    top, left, height, width = boxes_in((40, 400), scale=(0.9, 1.0), ratio=(0.5, 2.0)).unbind(1)
    assert (height == 40).all() and (width == 80).all() and 0 <= left.min() < 5 and 315 < left.max() <= 320
    assert centre_boxes(torch.tensor([[100, 157], [114, 114]]), 0.875).tolist() == [[6, 34, 88, 88], [7, 7, 100, 100]]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_torchvision(channels, tmp_path):
    images = load_large(write_large_images(tmp_path / "pets"), tmp_path, channels=channels).train.images
    crops = Crops(images, scale=(0.1, 1.0), ratio=(0.5, 2.0), seed=5, buffer=images.decode_all())
    boxes = random_crops(images.sizes, torch.Generator().manual_seed(1), scale=(0.1, 1.0), ratio=(0.5, 2.0))
    expected = torch.stack(
        [
            v2.functional.resized_crop(crops.image(index), *box, [72, 72], antialias=True)
            for index, box in enumerate(boxes.tolist())
        ]
    )
    together = cut_together(crops.buffer, crops.starts, images.sizes[:, 1], boxes, 72, channels)
    assert together.dtype == torch.uint8 and together.shape == (12, channels, 72, 72)
    assert (together.int() - expected.int()).abs().max() <= 1
    last = torch.tensor([11])
    alone = cut_together(crops.buffer, crops.starts[last], images.sizes[last, 1], boxes[last], 72, channels)
    assert (alone.int() - expected[last].int()).abs().max() <= 1  # the end of the buffer


def large_flags(**others):
    machine = {"image_size": 72, "cache_gib": None, "workers": None}
    return flags(**machine | {"hflip": 0.5, "scale": [0.35, 1.0], "batch_size": 5, "seed": 3} | others)


def epoch_of(dataset, *, epoch=1, start_step=0, **others):
    batches = training_batches(dataset, large_flags(**others), CPU)
    assert batches.steps_per_epoch == 3
    return list(batches.batches(epoch, start_step))


def same_batches(first, second):
    return all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True))


@pytest.mark.parametrize("scale", [[0.35, 1.0], None])
def test_memory_and_workers_give_the_same_images(dataset, scale, capsys):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    from_memory = epoch_of(dataset, scale=scale)
    assert not capsys.readouterr().out
    assert sum(len(labels) for _, labels in from_memory) == 12 and from_memory[0][0].shape == (5, 3, 72, 72)
    for workers in (0, 2):
        assert same_batches(from_memory, epoch_of(dataset, scale=scale, cache_gib=0, workers=workers))
        assert f"exceed --cache-gib 0.00: {workers} workers decode them every epoch" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)
    others = (epoch_of(dataset, scale=scale, epoch=0), epoch_of(dataset, scale=scale, seed=4))
    assert not any(same_batches(from_memory, other) for other in others)


def test_going_on_inside_an_epoch_gives_the_rest_of_it_either_way(dataset):
    whole = epoch_of(dataset, reprob=0.5, crop_padding=4)
    for machine in ({}, {"cache_gib": 0, "workers": 1}):
        assert same_batches(whole[1:], epoch_of(dataset, start_step=1, reprob=0.5, crop_padding=4, **machine))
    streamed = training_batches(dataset, large_flags(cache_gib=0, workers=2), CPU)
    for _ in streamed.batches(0):
        break  # the next epoch does not see what was under way
    assert same_batches(epoch_of(dataset), streamed.batches(1))


def test_workers_may_be_spawned(dataset):
    method = get_start_method()
    set_start_method("spawn", force=True)
    try:
        spawned = epoch_of(dataset, cache_gib=0, workers=1)
    finally:
        set_start_method(method, force=True)
    assert same_batches(epoch_of(dataset), spawned)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line(dataset, workers):
    path = dataset.train.images.files[4, 0]
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=r"4-400x320.png cannot be decoded as an image \(.*\)$") as caught:
        epoch_of(dataset, cache_gib=0, workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no groups of processes")
def test_signals_to_all_processes_leave_the_workers_to_training(dataset, tmp_path):
    """As Ctrl-C in a terminal and timeout(1) send them; and the process ends by itself, though workers are left."""
    command = [sys.executable, "-c", STOPPED_BY_A_SIGNAL, str(dataset.train.images.root), str(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join((".", "tests", "tests/pipeline"))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, env=os.environ | paths, **pipes) as process:
        try:
            while process.poll() is None and process.stdout.readline() != "ready\n":
                pass
            for signum in (signal.SIGINT, signal.SIGTERM):
                os.killpg(process.pid, signum)
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (output, process.returncode) == ("11\n", 0), errors
