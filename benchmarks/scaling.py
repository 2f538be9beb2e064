"""Does the cost of training grow in proportion to the work? For a ViT with more or larger images, batches or depth.

    python -m benchmarks.scaling --out results/speed/scaling-cpu.json

Random images, whole training steps by the report's recipe. The values of one axis take turns. The table shows the
median of the rounds, in images and in GFLOP per second; the latter is constant as long as the cost is proportional to
the work. Nothing is compiled, except with --compile on. For the numbers of images the table also shows the size of the
images and the peak memory of a process of its own. Flags that are not listed below go to train_vit.py.
"""

import statistics
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.ours import Ours
from benchmarks.turns import (
    in_fresh_process,
    peak_of_run,
    print_machine,
    save_plot,
    speed_parser,
    take_turns,
    write_speeds,
)
from data import Dataset, Split
from errors import run_script
from training.device import device_name, pick_device
from training.values import at_least

AXES = {  # axis: (its flag, its values)
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
    """The training steps, an Ours, for one value of an axis."""
    flag, _ = AXES[axis]
    image_size = value if axis == "image size" else 32
    dataset = random_dataset(value if axis == "images" else count, image_size)
    flags = ["--compile", "off", *flags]
    return Ours("train_vit", [*flags, *([flag, str(value)] if flag else [])], dataset, device, steps)


def peak_of(value, device, flags):
    """The most bytes in use in a few training steps on that number of images."""
    return peak_of_run(one_value("images", value, device, count=value, steps=3, flags=flags), device)


def plot_scaling(path, tables, device):
    """One panel per axis: GFLOP per second over its values."""
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
    axes[0].set_ylabel(f"GFLOP per second, {device_name(device)}")
    save_plot(path, figure)


def main(argv=None):
    parser = speed_parser(__doc__.splitlines()[0])
    parser.add_argument("--axes", choices=AXES, nargs="+", default=list(AXES), help="what to vary")
    parser.add_argument("--num-images", type=at_least(1), default=5000, help="in the axes other than images")
    parser.add_argument("--steps", type=at_least(1), default=2, help="training steps per measurement")
    args, flags = parser.parse_known_args(argv)
    device = pick_device(args.device)
    print_machine(device)
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
        print(f"\n{'images':>12}{'MiB of images':>15}{'peak MiB':>12}")
        for value, row in tables["images"].items():
            row["bytes"], row["peak_bytes"] = 3 * 32 * 32 * value, in_fresh_process(peak_of, value, device, flags)
            print(f"{value:12,}{row['bytes'] / 2**20:15,.0f}{row['peak_bytes'] / 2**20:12,.0f}")
    if args.out:
        write_speeds(args.out, device, {"axes": tables})
        plot_scaling(Path(args.out).with_suffix(".png"), tables, device)


if __name__ == "__main__":
    run_script(main)
