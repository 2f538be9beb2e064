"""What it costs to train on large images from memory, or from files by workers, beside torchvision's way.

    python -m benchmarks.loading --data-dir datasets --out results/speed/loading-cpu.json

Each gives batches of random resized crops, flipped and normalised, on the device, and trains nothing. The peer is what
a user would write: ImageFolder, v2 transforms on PIL images, and as many workers. They take turns, round after round;
the median is shown, and the quartiles of the rounds as the spread. The seconds are those to the first batch, with
nothing decoded before.
"""

import itertools
import os
import tempfile
import time
from functools import partial

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.turns import print_speeds, speed_parser, take_turns, write_speeds
from data import load_dataset
from errors import run_script
from pipeline.augment import random_flip
from pipeline.batches import RATIO, Batches
from pipeline.crops import crop_batches
from pipeline.imagenette import IMAGENETTES
from training.arguments import at_least
from training.device import device_name, pick_device

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
        crops=crop_batches(dataset.train.images, cache_gib=cache_gib, workers=args.workers, **options),
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
        ImageFolder(dataset.train.images.root / "train", transform),
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def stepped(batches):
    return lambda: len(next(batches)[1])


def main(argv=None):
    parser = speed_parser(__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=IMAGENETTES, default="imagewoof", help="(%(default)s)")
    parser.add_argument("--data-dir", default="datasets", help="(%(default)s)")
    parser.add_argument("--image-size", type=at_least(1), default=128, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="(%(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=min(os.cpu_count(), 16), help="(%(default)s)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as cache:
        dataset = load_dataset(args.dataset, data_dir=args.data_dir, image_size=args.image_size, cache_dir=cache)
        held = dataset.train.images.num_bytes / 2**30
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
        print(f"{device_name(device)}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {dataset.name}")
        for name, seconds in starts.items():
            print(f"{name}: {seconds:.1f} s to the first batch")
        steps = {name: stepped(batches) for name, batches in ways.items()}
        waiting = 2 * args.workers + 1  # batches that the workers have got ready meanwhile
        speeds = take_turns(steps, device, rounds=args.rounds, seconds=args.seconds, settle=waiting)
    print_speeds(f"{args.image_size} pixels, batches of {args.batch_size}", speeds)
    if args.out:
        options = {name: getattr(args, name) for name in ("dataset", "image_size", "batch_size", "workers")}
        results = {
            **options,
            "held_gib": held,
            "seconds_to_first": starts,
            "images_per_second": {"random crops": speeds},
        }
        write_speeds(args.out, device, results)


if __name__ == "__main__":
    run_script(main)
