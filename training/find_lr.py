"""--find-lr: a learning rate from short sweeps, on the steepest part of the loss (Smith 2017; fastai's "steepest")."""

import copy
import math
import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import LambdaLR

from errors import UserError
from files import make_folder, write_atomically
from training.device import memory_watched
from training.loop import new_sums
from training.ranks import rank_and_ranks

LOWEST, DECADES, DECADE = 1e-7, 8, 12  # a sweep's first learning rate, its decades, and the steps of each
SWEEP, SWEEPS = DECADES * DECADE + 1, 3  # steps of a sweep; sweeps


def smooth(losses, share=0.9):
    """Exponential means of a list of losses, corrected for their start at zero as in Adam."""
    mean, means = 0.0, []
    for count, loss in enumerate(losses, 1):
        mean = share * mean + (1 - share) * loss
        means.append(mean / (1 - share**count))
    return means


def sweep(run, train_epoch, *, first_epoch):
    """(learning rates, smoothed losses) of steps with growing rates, until the smoothed loss is four times its best."""
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = LOWEST
    schedule = LambdaLR(run.optimizer, lambda step: 10 ** (step / DECADE))
    rates, losses, ended = [], [], False

    def after_step(sums):
        nonlocal ended
        rates.append(sums["lr"])
        losses.append(sums["last_loss"].item())
        means = smooth(losses)
        ended = len(losses) == SWEEP or not means[-1] <= 4 * min(means)  # also if it is not a number
        return ended

    while not ended:
        train_epoch(epoch=first_epoch, sums=new_sums(run.device), schedule=schedule, after_step=after_step)
        first_epoch += 1
    finite = sum(map(math.isfinite, losses))
    return rates[:finite], smooth(losses[:finite])


def steepest(rates, losses):
    """The middle of the decade of learning rates over which smoothed losses fall most.

    The first decade is left out, as its means are of few losses, and so is what falls from above its losses: the way
    back after a jump. Raises UserError if the losses do not fall.
    """
    level = max(losses[: DECADE + 1])
    starts = [step for step in range(DECADE, len(losses) - DECADE) if losses[step] <= level]
    falls = {losses[step] - losses[step + DECADE]: step for step in starts}
    if max(falls, default=0) <= 0:
        raise UserError(f"--find-lr: no learning rate from {LOWEST:g} to {rates[-1]:.1g} lowers the loss")
    return rates[falls[max(falls)] + DECADE // 2]


def find_lr(run, train_epoch):
    """(learning rates, sweeps): what each sweep suggests, and its curve as (rates, smoothed losses).

    train_epoch is train_one_epoch with what stays the same in all epochs. Order, augmentation and dropout follow from
    (seed, epoch), so each sweep has epochs of its own. The run is afterwards as it was before, to the bit.
    """
    parts = run.model, run.optimizer, run.precision.scaler
    states = copy.deepcopy([part.state_dict() for part in parts])
    sweeps = []
    with memory_watched(run), torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        for number in range(SWEEPS):
            sweeps.append(sweep(run, train_epoch, first_epoch=number * SWEEP))
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(copy.deepcopy(state))
            run.optimizer.zero_grad()
    return [steepest(*curve) for curve in sweeps], sweeps


def draw_sweeps(path, rates, sweeps):
    """Draw the curves of sweeps to a file, with the rate that each suggests; returns the path."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for number, (rate, (swept, losses)) in enumerate(zip(rates, sweeps, strict=True)):
        axes.semilogx(swept, losses, f"C{number}")
        axes.plot(rate, losses[swept.index(rate)], f"C{number}o", label=f"{rate:.1e}")
    low, level = min(min(losses) for _, losses in sweeps), max(max(losses[:DECADE]) for _, losses in sweeps)
    axes.set(xlabel="learning rate", ylabel="smoothed training loss", ylim=(1.1 * low - 0.1 * level, 2 * level - low))
    axes.grid(alpha=0.3)
    axes.legend()
    make_folder(path.parent)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path


def print_suggestion(run, train_epoch):
    """Print the learning rate that find_lr suggests, and draw its curves to OUT_DIR/lr-finder.png."""
    if rank_and_ranks()[1] > 1:
        raise UserError("--find-lr needs a single process, without torchrun")
    rates, sweeps = find_lr(run, train_epoch)
    seeds = ", ".join(f"{rate:.1e}" for rate in sorted(rates))
    print(f"--lr {statistics.median(rates):.1e} ({len(rates)} seeds: {seeds})")
    print(f"its curves: {draw_sweeps(Path(run.args.out_dir, 'lr-finder.png'), rates, sweeps)}")
