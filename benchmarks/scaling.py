"""Does the cost of training grow as the work does? Of a ViT on more images, larger ones, in larger batches, deeper.

    python -m benchmarks.scaling --out results/speed/scaling-cpu.json

Random images, whole training steps by the report's recipe. The values of one axis take turns; the table shows the
median of the rounds in images a second, and in GFLOP a second, which stays where it is as long as the cost grows as
the work. Nothing is compiled, unless --compile on says so. For the numbers of images also the most memory that a
process of its own held, and what the images take.
"""

import multiprocessing
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.ours import Ours
from benchmarks.turns import save_plot, speed_parser, take_turns, write_speeds
from data import Dataset, Split
from errors import run_script
from training.arguments import at_least
from training.device import device_name, peak_memory_bytes, pick_device

AXES = {  # the flag that each axis varies, and its values
    "images": (None, (1000, 5000, 20000, 50000)),
    "batch size": ("--batch-size", (16, 64, 256, 1024)),
    "image size": ("--image-size", (16, 32, 48, 64)),
    "depth": ("--depth", (2, 6, 12, 24)),
}


def random_dataset(count, image_size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(10, (count,), generator=generator), np.arange(count))
    return Dataset("random", [str(label) for label in range(10)], split, None, split, [0.5] * 3, [0.25] * 3)


def one_value(axis, value, device, *, count, steps, flags):
    """The Ours of one value of an axis."""
    flag, _ = AXES[axis]
    image_size = value if axis == "image size" else 32
    dataset = random_dataset(value if axis == "images" else count, image_size)
    flags = ["--compile", "off", *flags]
    return Ours("train_vit", [*flags, *([flag, str(value)] if flag else [])], dataset, device, steps)


def peak_of(value, kind, flags):
    """The most bytes that were held in training a few steps on so many images, in a fresh process."""
    device = torch.device(kind)
    ours = one_value("images", value, device, count=value, steps=3, flags=flags)
    with ours.settings():
        ours()
    return peak_memory_bytes(device)


def plot_scaling(path, tables, device):
    """A panel an axis: GFLOP a second over its values."""
    figure = Figure(figsize=(3.2 * len(tables), 3), layout="constrained")
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        values = [int(value) for value in table]
        axis.plot(values, [row["gflop_a_second"] for row in table.values()], marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0)
    axes[0].set_ylabel(f"GFLOP a second, {device_name(device)}")
    save_plot(path, figure)


def main(argv=None):
    parser = speed_parser(__doc__.splitlines()[0])
    parser.add_argument("--axes", choices=AXES, nargs="+", default=list(AXES), help="(all)")
    parser.add_argument("--num-images", type=at_least(1), default=5000, help="where they do not vary (%(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=2, help="at a time (%(default)s)")
    args, flags = parser.parse_known_args(argv)
    device = pick_device(args.device)
    print(f"{device_name(device)}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
    tables = {}
    for axis in args.axes:
        options = {"count": args.num_images, "steps": args.steps, "flags": flags}
        ours = {value: one_value(axis, value, device, **options) for value in AXES[axis][1]}
        speeds = take_turns(ours, device, rounds=args.rounds, seconds=args.seconds)
        tables[axis] = {}
        print(f"\n{axis:>12}{'images/s':>12}{'GFLOP/s':>10}")
        for value, one in ours.items():
            speed, work = statistics.median(speeds[value]), one.gflop_per_image()
            row = {"images_per_second": speeds[value], "gflop_per_image": work, "gflop_a_second": speed * work}
            tables[axis][value] = row
            print(f"{value:12,}{speed:12,.0f}{speed * work:10,.0f}")
        del ours
    if "images" in args.axes:
        print(f"\n{'images':>12}{'MiB of them':>14}{'MiB at most':>14}")
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for value, row in tables["images"].items():
                row["bytes"], row["peak_bytes"] = 3 * 32 * 32 * value, pool.apply(peak_of, (value, device.type, flags))
                print(f"{value:12,}{row['bytes'] / 2**20:14,.0f}{row['peak_bytes'] / 2**20:14,.0f}")
    if args.out:
        write_speeds(args.out, device, {"axes": tables})
        plot_scaling(Path(args.out).with_suffix(".png"), tables, device)


if __name__ == "__main__":
    run_script(main)
