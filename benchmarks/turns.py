"""What all benchmarks share. The ways to do a job take turns, round after round; tables and figures show the median
and the quartiles of the rounds."""

import multiprocessing
import os
import statistics
import time
from contextlib import nullcontext

import torch
from matplotlib.figure import Figure

from files import write_atomically, write_json
from training.device import device_name, peak_memory_bytes
from training.flags import Parser
from training.values import at_least, positive


def speed_parser(description):
    """A parser with the flags of every benchmark."""
    parser = Parser(description)
    parser.add_argument("--device", help="cpu or cuda (default: the first available)")
    parser.add_argument("--rounds", type=at_least(2), default=5, help="turns of each way")
    parser.add_argument("--seconds", type=positive, default=1.0, metavar="S", help="least duration of a turn")
    parser.add_argument("--out", metavar="FILE", help="also write the speeds of all rounds to this JSON file")
    return parser


def images_per_second(run, device, seconds):
    """Call run(), which returns its number of images, for at least `seconds`."""
    start, count = time.perf_counter(), 0
    while True:
        count += run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (elapsed := time.perf_counter() - start) >= seconds:
            return count / elapsed


def take_turns(ways, device, *, rounds, seconds):
    """{way: images per second in each round} of {way: run}, after a short round that does not count.

    If a run has a method settings(), its turns take place in that context.
    """
    speeds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            with getattr(run, "settings", nullcontext)():
                speed = images_per_second(run, device, seconds if number else seconds / 5)
            speeds[name] += [speed] if number else []
    return speeds


def peak_of_run(run, device):
    """Call run() once; the most bytes in use: on the GPU during the call, on a CPU since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with getattr(run, "settings", nullcontext)():
        run()
    return peak_memory_bytes(device)


def in_fresh_process(function, *args):
    """function(*args), called in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def print_machine(device, *notes):
    print(", ".join([device_name(device), f"{os.cpu_count()} CPU cores", f"{torch.get_num_threads()} threads", *notes]))


def print_speeds(title, speeds):
    """The medians and quartiles of the rounds, and how many times as fast as each other way the first way is."""
    width = max(len(title), *map(len, speeds)) + 2
    ours = next(iter(speeds))
    print(f"\n{title:{width}}{'images/s':>12}{'quartiles':>24}   {ours} is")
    for name, values in speeds.items():
        low, middle, high = statistics.quantiles(values, method="inclusive")
        ratio = "" if name == ours else f"{statistics.median(speeds[ours]) / middle:6.1f} times as fast"
        print(f"{name:{width}}{middle:12,.0f}{f'{low:,.0f} - {high:,.0f}':>24}   {ratio}".rstrip())


def plot_speeds(path, tables, device):
    """Bars of {title: speeds}: the median images per second of each way, with the quartiles of its rounds."""
    counts = [len(speeds) for speeds in tables.values()]
    figure = Figure(figsize=(7, 0.5 + 0.35 * sum(counts) + 0.5 * len(counts)), layout="constrained")
    axes = figure.subplots(len(tables), squeeze=False, height_ratios=counts)[:, 0]
    for axis, (title, speeds) in zip(axes, tables.items(), strict=True):
        quartiles = [statistics.quantiles(values, method="inclusive") for values in speeds.values()]
        middles = [middle for _, middle, _ in quartiles]
        spread = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
        bars = axis.barh(list(speeds), middles, xerr=spread, color="tab:blue", capsize=2)
        axis.bar_label(bars, [f"{middle:,.0f}" for middle in middles], padding=8)
        axis.set(title=title, xlim=(0, 1.2 * max(middles)))
        axis.invert_yaxis()
    axes[-1].set_xlabel(f"images per second, {device_name(device)}")
    save_plot(path, figure)


def save_plot(path, figure):
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def write_speeds(path, device, results):
    """Write the results, and what they were measured on, as JSON."""
    machine = {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    write_json(path, {**machine, "torch": torch.__version__, **results})
