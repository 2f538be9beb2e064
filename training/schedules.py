"""Learning-rate schedules, stepped once an optimiser step."""

import math
from functools import partial

from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR

DEFAULT_MILESTONES = (100 / 160, 150 / 160)  # of the run's length: the report's epochs 100 and 150 of 160


def multistep_schedule(optimizer, *, epochs, steps_per_epoch, milestones=None, gamma=0.1):
    """MultiStepLR that multiplies the learning rate by gamma after each of the milestones, which are numbers of epochs.

    Without milestones they are those of the report, scaled to the length of the run.
    """
    if milestones is None:
        milestones = [max(1, round(share * epochs)) for share in DEFAULT_MILESTONES]
    return MultiStepLR(optimizer, [round(m * steps_per_epoch) for m in milestones], gamma=gamma)


def cosine_factor(step, *, warmup_steps, total_steps):
    """The learning rate after `step` steps, as a share of its peak: a line from zero, then half a cosine to zero."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


def cosine_schedule(optimizer, *, epochs, steps_per_epoch, warmup_epochs):
    """Cosine decay to zero (Loshchilov & Hutter 2017, eq. 5, one cycle) after a linear warm-up from zero."""
    factor = partial(cosine_factor, warmup_steps=warmup_epochs * steps_per_epoch, total_steps=epochs * steps_per_epoch)
    return LambdaLR(optimizer, factor)


def onecycle_schedule(optimizer, *, epochs, steps_per_epoch, peak, div_factor):
    """One cycle (Smith 2018), as torch and fastai have it: from peak / div_factor to the peak in 30 % of the steps,
    then to nearly nothing, both along a cosine; momentum, or Adam's first beta, goes from 0.95 to 0.85 and back.
    """
    return OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=epochs * steps_per_epoch,
        div_factor=div_factor,
        cycle_momentum=bool(optimizer.defaults.keys() & {"momentum", "betas"}),
    )


def make_schedule(args, optimizer, *, steps_per_epoch):
    """The schedule that the flags ask for (--sched, --epochs, --milestones, --gamma, --warmup-epochs, --div-factor)."""
    length = {"epochs": args.epochs, "steps_per_epoch": steps_per_epoch}
    if args.sched == "multistep":
        return multistep_schedule(optimizer, **length, milestones=args.milestones, gamma=args.gamma)
    if args.sched == "onecycle":
        return onecycle_schedule(optimizer, **length, peak=args.lr, div_factor=args.div_factor)
    warmup_epochs = 0.1 * args.epochs if args.warmup_epochs is None else args.warmup_epochs
    return cosine_schedule(optimizer, **length, warmup_epochs=warmup_epochs)
