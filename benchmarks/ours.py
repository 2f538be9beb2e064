"""A training script's steps, to be timed beside those of others."""

import itertools
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.scripts import script_module, script_parser
from models import build_model
from pipeline.batches import training_batches
from training.arguments import Start, complete_arguments, given_arguments
from training.device import Precision, compiled_forward, keep_freed_memory
from training.loop import new_sums, train_one_epoch
from training.optimizer import make_loss, make_optimizer, make_schedule

PRODUCTS = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends.cudnn.conv


@contextmanager
def settings_of_training(precisions=None):
    """A context that restores the process-wide settings of training at its end, so that the peers run without them.

    precisions are those of float32 products during the context, one for each of PRODUCTS.
    """
    before = [products.fp32_precision for products in PRODUCTS]
    try:
        for products, precision in zip(PRODUCTS, precisions or before, strict=True):
            products.fp32_precision = precision
        keep_freed_memory()
        yield
    finally:
        for products, precision in zip(PRODUCTS, before, strict=True):
            products.fp32_precision = precision
        keep_freed_memory(block=2**25, most=2**26)  # glibc's defaults


class Ours:
    """`steps` training steps of a script with these flags. A call, in settings(), returns their number of images.

    run_batches() does the same without training: it only makes the batches.
    """

    def __init__(self, script, flags, dataset, device, steps):
        module, parser = script_module(f"{script}.py"), script_parser(f"{script}.py")
        given = given_arguments(parser, flags)
        recipe, defaults = module.chosen_recipe(given)
        self.args = args = complete_arguments(parser, given | {"recipe": recipe}, defaults)
        self.start = Start(parser.prog, module.MODEL_FLAGS, args)
        self.model = build_model(args.model, **self.start.model_args(len(dataset.classes))).to(device)
        self.device, self.steps, self.epochs = device, steps, itertools.count()
        self.forward = compiled_forward(self.model, args, device=device, num_images=len(dataset.train.labels))
        self.batches = training_batches(dataset, args, device)
        self.loss_function, self.optimizer = make_loss(args, dataset, device), make_optimizer(args, self.model)
        self.schedule = make_schedule(args, self.optimizer, steps_per_epoch=self.batches.steps_per_epoch)
        with settings_of_training():
            self.precision = Precision(args.amp, device)
            self.precisions = [products.fp32_precision for products in PRODUCTS]

    def settings(self):
        return settings_of_training(self.precisions)

    def __call__(self):
        sums = new_sums(self.device)
        train_one_epoch(
            model=self.model,
            forward=self.forward,
            batches=self.batches,
            loss_function=self.loss_function,
            optimizer=self.optimizer,
            schedule=self.schedule,
            precision=self.precision,
            seed=self.args.seed,
            epoch=next(self.epochs),
            sums=sums,
            clip_grad=self.args.clip_grad,
            after_step=lambda sums: sums["step"] == self.steps,
        )
        return sums["images"]

    def run_batches(self):
        return sum(len(labels) for _, labels in itertools.islice(self.batches.batches(next(self.epochs)), self.steps))

    def gflop_per_image(self):
        """GFLOP of the matrix products in a forward and backward pass."""
        with FlopCounterMode(display=False) as counter:
            self.model(torch.zeros(2, *self.start.input_shape(), device=self.device)).sum().backward()
        return counter.get_total_flops() / 2 / 1e9
