"""Averages of the weights, which are evaluated in place of the weights themselves."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from errors import UserError
from seeding import seed_for
from training.optimizer import swa_epoch


class WeightAverage:
    """An average of a model's weights; `model` is the averaged model, None before there is any.

    "ema" (--model-ema-decay) follows each step: an exponential moving average of weights and of buffers; without these,
    the statistics of BatchNorm would belong to other weights. "swa" (--swa-start, Izmailov et al. 2018) is the mean of
    the weights after each of the last epochs; BatchNorm's statistics are computed anew from the training images.
    """

    def __init__(self, model, args):
        self.kind, self.first_epoch = "swa" if args.swa_start else "ema", swa_epoch(args)
        ema = {"multi_avg_fn": get_ema_multi_avg_fn(args.model_ema_decay), "use_buffers": True}
        self.averaged = AveragedModel(model, **(ema if self.kind == "ema" else {})).eval()

    @property
    def model(self):
        return self.averaged.module if self.averaged.n_averaged.item() else None

    def after_step(self, model):
        if self.kind == "ema":
            self.averaged.update_parameters(model)

    def after_epoch(self, model, batches, *, epoch, seed, precision):
        """Add the weights after an epoch, counted from 0; batches are those of training, for BatchNorm's statistics."""
        if self.kind == "swa" and epoch >= self.first_epoch:
            self.averaged.update_parameters(model)
            torch.manual_seed(seed_for("dropout", seed, epoch, batches.steps_per_epoch))
            with precision.autocast():
                update_bn((images for images, _ in batches.batches(epoch)), self.averaged.module)

    def load(self, weights, *, epoch, step):
        """Go back to an average's weights (a state dict) after `epoch` epochs and `step` steps."""
        self.averaged.module.load_state_dict(weights)
        # of an EMA, only whether the count is 0 matters
        self.averaged.n_averaged.fill_(epoch - self.first_epoch if self.kind == "swa" else epoch + step)


def make_average(model, args):
    """The WeightAverage that the flags ask for, or None. Raises UserError if they ask for two."""
    if args.model_ema_decay and args.swa_start:
        raise UserError("--model-ema-decay and --swa-start exclude each other: one average is evaluated")
    return WeightAverage(model, args) if args.model_ema_decay or args.swa_start else None
