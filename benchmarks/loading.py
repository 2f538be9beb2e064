"""What it costs to train on large pictures from memory, or from files by workers, beside torchvision's way.

    python -m benchmarks.loading --data-dir datasets --out results/speed/loading-cpu.json

Each gives batches of random resized crops, flipped and normalised, on the device, and trains nothing. The peer is what
a user would write: ImageFolder, v2 transforms on PIL pictures, and as many workers. They take turns, round after round;
the median is shown, and the quartiles of the rounds as the spread. The seconds are those to the first batch, with
nothing decoded before.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from functools import partial

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from augment import random_flip
from batches import RATIO, Batches
from crops import crop_batches
from data import load_dataset
from errors import run_script
from files import write_atomically
from imagenette import IMAGENETTES
from training.device import device_name, pick_device
from training.flag_types import Parser, at_least

SCALE = (0.35, 1.0)


def our_loading(dataset, args, device, cache_gib):
    """Epoch after epoch of batches."""
    options = {"scale": SCALE, "ratio": RATIO, "seed": 0, "device": device}
    batches = Batches(
        dataset.train,
        batch_size=args.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        seed=0,
        crops=crop_batches(dataset.train.pictures, cache_gib=cache_gib, workers=args.workers, **options),
        transforms=[partial(random_flip, p=0.5)],
    )
    for epoch in itertools.count():
        yield from batches.batches(epoch)


def torchvision_loading(dataset, args, device):
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(args.image_size, scale=SCALE, ratio=RATIO),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(dataset.mean, dataset.std),
        ]
    )
    loader = DataLoader(
        ImageFolder(dataset.train.pictures.root / "train", transform),
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for pictures, labels in loader:
            yield pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def loading_speed(batches, device, *, waiting, seconds):
    """Pictures a second, for at least so many seconds, after the batches that may be waiting ready."""
    for _ in range(waiting):
        next(batches)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        count += len(next(batches)[1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count / elapsed


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=IMAGENETTES, default="imagewoof", help="(%(default)s)")
    parser.add_argument("--data-dir", default="datasets", help="(%(default)s)")
    parser.add_argument("--image-size", type=at_least(1), default=128, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="(%(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=min(os.cpu_count(), 16), help="(%(default)s)")
    parser.add_argument("--rounds", type=at_least(2), default=5, help="(%(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: the best there is)")
    parser.add_argument("--out", help="also write the speeds of all rounds to this JSON")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as cache:
        dataset = load_dataset(args.dataset, data_dir=args.data_dir, image_size=args.image_size, cache_dir=cache)
        held = dataset.train.pictures.num_bytes / 2**30
        memory, streamed = f"memory, {held:.2f} GiB", f"{args.workers} workers"
        ways = {
            memory: our_loading(dataset, args, device, cache_gib=float("inf")),
            streamed: our_loading(dataset, args, device, cache_gib=0),
            f"torchvision, {streamed}": torchvision_loading(dataset, args, device),
        }
        starts = {}
        for name, batches in ways.items():
            begun = time.perf_counter()
            next(batches)
            starts[name] = time.perf_counter() - begun
    speeds = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, batches in ways.items():
            speeds[name].append(loading_speed(batches, device, waiting=2 * args.workers + 1, seconds=2))
    print(f"{device_name(device)}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {dataset.name}")
    print(f"\n{'':24}{'start':>9}{'pictures/s':>12}{'quartiles':>20}")
    for name, values in speeds.items():
        low, _, high = statistics.quantiles(values, method="inclusive")
        spread = f"{low:,.0f} - {high:,.0f}"
        print(f"{name:24}{starts[name]:7.1f} s{statistics.median(values):12,.0f}{spread:>20}")
    if args.out:
        about = {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        options = {name: getattr(args, name) for name in ("dataset", "image_size", "batch_size", "workers")}
        results = {**about, **options, "held_gib": held, "seconds_to_first": starts, "pictures_per_second": speeds}
        write_atomically(args.out, lambda file: file.write(f"{json.dumps(results, indent=1)}\n".encode()))


if __name__ == "__main__":
    run_script(main)
