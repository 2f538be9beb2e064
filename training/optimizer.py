"""The loss, optimisers, and learning-rate schedules, which count batches."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR

from errors import UserError
from training.loop import classification_loss


def make_loss(args, dataset, device):
    """The classification_loss that the flags ask for.

    With --class-weights balanced, an image counts N / (classes x images of its class), of the N training images.
    """
    if args.class_weights == "none":
        criterion = partial(cross_entropy, label_smoothing=args.smoothing)
        return partial(classification_loss, criterion=criterion)
    labels = dataset.train.labels
    counts = labels.bincount(minlength=len(dataset.classes)).clamp(min=1)  # --overfit may leave a class out
    weights = (len(labels) / (len(counts) * counts)).to(device)
    criterion = partial(weighted_cross_entropy, weights=weights, smoothing=args.smoothing)
    return partial(classification_loss, criterion=criterion)


def weighted_cross_entropy(logits, labels, *, weights, smoothing):
    """The sum of the weighted losses of B images, divided by B; of a mixed image, each label has its class's weight.

    torch's own mean divides by the sum of the weights, so that the losses of parts of a batch do not add up to its own.
    """
    shares = weights * (one_hot(labels, len(weights)) if labels.ndim == 1 else labels)  # (B, classes)
    return cross_entropy(logits, shares.lerp(shares.mean(1, keepdim=True), smoothing))


def parameter_groups(model, weight_decay, *, decay_all, leave_out=()):
    """Two groups of the trained parameters for an optimiser: with weight decay, and without.

    leave_out are parameters of another optimiser. Unless decay_all, vectors (biases, normalisation) and the parameters
    named in model.no_weight_decay are not decayed, as is usual since Vaswani et al.'s code; the report decays all.
    """
    left_out = {id(parameter) for parameter in leave_out}
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out or not parameter.requires_grad:
            continue
        skip = not decay_all and (parameter.ndim < 2 or name in model.no_weight_decay)
        (free if skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the weights of a model's blocks, AdamW on all the rest, as one optimiser.

    Blocks are the modules in `blocks`, or in `layer1` to `layer4` of a ResNet; a convolution counts as the matrix from
    a patch to the channels. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that one learning
    rate serves both. Raises UserError if nothing in a block is trained.
    """

    def __init__(self, model, *, lr, weight_decay, decay_all):
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        inner = [p for name, p in trained if p.ndim in (2, 4) and name.startswith(("blocks.", "layer"))]
        if not inner:
            raise UserError("--opt muon: no weight matrix of a block is trained here; use --opt adamw")
        self.matrices = {p: nn.Parameter(p.detach().flatten(1)) for p in inner}  # the same memory
        options = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        muon = torch.optim.Muon(self.matrices.values(), **options)
        groups = parameter_groups(model, weight_decay, decay_all=decay_all, leave_out=inner)
        self.parts = {"muon": muon, "adamw": torch.optim.AdamW(groups, lr=lr, fused=True)}
        super().__init__(self.outer_groups(), {})

    def outer_groups(self):
        """What a schedule and a gradient scaler see: the parts' own groups, Muon's with weights in their own shape."""
        muon, adamw = (part.param_groups for part in self.parts.values())
        return [muon[0] | {"params": list(self.matrices)}, *adamw]

    def pass_on(self):
        """Copy to Muon what a schedule has written to the outer groups; AdamW's groups are its own."""
        inner = self.parts["muon"].param_groups[0]
        inner.update(self.param_groups[0] | {"params": inner["params"]})

    def step(self):
        self.pass_on()
        for weight, matrix in self.matrices.items():
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts.values():
            part.step()

    def state_dict(self):
        self.pass_on()
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.param_groups = self.outer_groups()


def make_optimizer(args, model):
    """The optimiser that the flags ask for (--opt, --lr, --weight-decay, --decay-all, --momentum, --opt-betas,
    --opt-eps), of the parameters that are to be trained.

    adam adds weight decay to the gradient, adamw subtracts it from the weights (Loshchilov & Hutter 2019). All except
    muon are torch's fused forms: one pass over the weights per step.
    """
    if args.opt == "muon":
        return MuonWithAdamW(model, lr=args.lr, weight_decay=args.weight_decay, decay_all=args.decay_all)
    groups = parameter_groups(model, args.weight_decay, decay_all=args.decay_all)
    if args.opt == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)
        # if a gradient scaler skips the first step, torch would leave these uninitialised
        for group in groups if args.momentum else ():
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.opt]
    return kind(groups, lr=args.lr, betas=tuple(args.opt_betas), eps=args.opt_eps, fused=True)


DEFAULT_MILESTONES = (100 / 160, 150 / 160)  # of the run's length: the report's epochs 100 and 150 of 160


def multistep_schedule(optimizer, *, epochs, steps_per_epoch, milestones=None, gamma=0.1):
    """MultiStepLR that multiplies the learning rate by gamma after each of the milestones, in epochs.

    The default milestones are those of the report, scaled to the length of the run.
    """
    if milestones is None:
        milestones = [max(1, round(share * epochs)) for share in DEFAULT_MILESTONES]
    return MultiStepLR(optimizer, [round(m * steps_per_epoch) for m in milestones], gamma=gamma)


def cosine_factor(step, *, warmup_steps, total_steps):
    """The learning rate after `step` steps, as a share of its peak: linear from zero, then half a cosine to zero."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


def cosine_schedule(optimizer, *, epochs, steps_per_epoch, warmup_epochs):
    """Cosine decay to zero (Loshchilov & Hutter 2017, eq. 5, one cycle) after a linear warm-up from zero."""
    factor = partial(cosine_factor, warmup_steps=warmup_epochs * steps_per_epoch, total_steps=epochs * steps_per_epoch)
    return LambdaLR(optimizer, factor)


def onecycle_schedule(optimizer, *, epochs, steps_per_epoch, peak, div_factor):
    """One cycle (Smith 2018), as in torch and fastai: from peak / div_factor to the peak in 30 % of the steps, then to
    nearly zero, both along a cosine; momentum, or Adam's first beta, goes from 0.95 to 0.85 and back.
    """
    return OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=epochs * steps_per_epoch,
        div_factor=div_factor,
        cycle_momentum=bool(optimizer.defaults.keys() & {"momentum", "betas"}),
    )


class ThenConstant:
    """A schedule whose learning rate is constant from step `start` on: lr, or if that is None the schedule's own."""

    def __init__(self, schedule, *, start, lr):
        self.schedule, self.start, self.lr = schedule, start, lr
        self.get_last_lr = schedule.get_last_lr
        self.state_dict, self.load_state_dict = schedule.state_dict, schedule.load_state_dict

    @property
    def last_epoch(self):
        """The number of steps, as torch's schedules call it."""
        return self.schedule.last_epoch

    def step(self):
        if self.schedule.last_epoch < self.start:
            self.schedule.step()
        else:
            self.schedule.last_epoch += 1
        if self.schedule.last_epoch >= self.start and self.lr:
            for group in self.schedule.optimizer.param_groups:
                group["lr"] = self.lr
            self.schedule._last_lr = [self.lr] * len(self.schedule.optimizer.param_groups)


def swa_epoch(args):
    """The epoch, counted from 0, after which --swa-start averages the weights for the first time."""
    return min(round(args.swa_start * args.epochs), args.epochs - 1)


def make_schedule(args, optimizer, *, steps_per_epoch):
    """The decaying_schedule, and with --swa-start the constant learning rate that follows it (--swa-lr)."""
    schedule = decaying_schedule(args, optimizer, steps_per_epoch=steps_per_epoch)
    if not args.swa_start:
        return schedule
    return ThenConstant(schedule, start=swa_epoch(args) * steps_per_epoch, lr=args.swa_lr)


def decaying_schedule(args, optimizer, *, steps_per_epoch):
    """The schedule that the flags ask for (--sched, --epochs, --milestones, --gamma, --warmup-epochs, --div-factor)."""
    length = {"epochs": args.epochs, "steps_per_epoch": steps_per_epoch}
    if args.sched == "multistep":
        return multistep_schedule(optimizer, **length, milestones=args.milestones, gamma=args.gamma)
    if args.sched == "onecycle":
        return onecycle_schedule(optimizer, **length, peak=args.lr, div_factor=args.div_factor)
    warmup_epochs = 0.1 * args.epochs if args.warmup_epochs is None else args.warmup_epochs
    return cosine_schedule(optimizer, **length, warmup_epochs=warmup_epochs)
