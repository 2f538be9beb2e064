"""Speed of loading large images from memory and by workers that decode files, beside torchvision's.

    python -m benchmarks.loading --data-dir datasets --out results/speed/loading-cpu.json

Each way gives batches of random resized crops, flipped and normalised, on the device; nothing is trained. The peer is
what a user would write: ImageFolder, v2 transforms of PIL images, and as many workers. The time to the first batch is
measured with an empty cache.
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

from benchmarks.turns import print_machine, print_speeds, speed_parser, take_turns, write_speeds
from data import load_dataset
from errors import run_script
from pipeline.augment import random_flip
from pipeline.batches import RATIO, Batches
from pipeline.crops import crop_batches
from pipeline.imagenette import IMAGENETTES
from training.device import pick_device
from training.values import at_least

SCALE = (0.35, 1.0)


def our_loading(dataset, args, device, cache_gib):
    """Batches of one epoch after another, without end."""
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
    crop = v2.RandomResizedCrop(args.image_size, scale=SCALE, ratio=RATIO)
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(dataset.mean, dataset.std)]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *to_float])
    images = ImageFolder(dataset.train.images.root / "train", transform)
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    loader = DataLoader(images, args.batch_size, shuffle=True, pin_memory=device.type == "cuda", **workers)
    while True:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def stepped(batches):
    return lambda: len(next(batches)[1])


def main(argv=None):
    parser = speed_parser(__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=IMAGENETTES, default="imagewoof", help=" or ".join(IMAGENETTES))
    parser.add_argument("--data-dir", default="datasets", help="folder of the dataset or its archive")
    parser.add_argument("--image-size", type=at_least(1), default=128, metavar="PIXELS", help="side of a crop")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="images per batch")
    parser.add_argument("--workers", type=at_least(0), default=min(os.cpu_count(), 16), help="processes that decode")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as cache:
        dataset = load_dataset(args.dataset, data_dir=args.data_dir, image_size=args.image_size, cache_dir=cache)
        needed = dataset.train.images.num_bytes / 2**30
        memory, streamed = f"memory, {needed:.2f} GiB", f"{args.workers} workers"
        ways = {
            memory: our_loading(dataset, args, device, cache_gib=float("inf")),
            streamed: our_loading(dataset, args, device, cache_gib=0),
            f"torchvision, {streamed}": torchvision_loading(dataset, args, device),
        }
        print_machine(device, dataset.name)
        first = {}
        for name, batches in ways.items():
            start = time.perf_counter()
            next(batches)
            first[name] = time.perf_counter() - start
            print(f"{name}: {first[name]:.1f} s to the first batch")
        steps = {name: stepped(batches) for name, batches in ways.items()}
        ready = 2 * args.workers + 1  # batches that the workers have prepared during the others' turns
        speeds = take_turns(steps, device, rounds=args.rounds, seconds=args.seconds, settle=ready)
    print_speeds(f"{args.image_size} pixels, batches of {args.batch_size}", speeds)
    if args.out:
        results = {name: getattr(args, name) for name in ("dataset", "image_size", "batch_size", "workers")}
        results |= {"held_gib": needed, "seconds_to_first": first, "images_per_second": {"random crops": speeds}}
        write_speeds(args.out, device, results)


if __name__ == "__main__":
    run_script(main)
