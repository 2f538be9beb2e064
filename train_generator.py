"""Train a model that generates images of a class: a denoising diffusion model (DDPM) or an ACGAN.

    python train_generator.py --dataset shapes                 drawn shapes, by a small model
    python train_generator.py --dataset shapes --model acgan   the same by an ACGAN
    python train_generator.py --device cuda                    a DDPM of CIFAR-10

Recipes: paper has the values of the model's paper, but for the number of steps and the width; quick is smaller, for
--dataset shapes. python generate.py checkpoints/ddpm then writes images as class folders.

What a run writes to checkpoints/ddpm/ is what train_vit.py writes, without predictions, and samples.png: images of the
evaluated weights, from the same noise every --sample-epochs.
"""

from functools import partial

import torch

from data import DATASETS, SHAPES, count_classes, dataset_of, describe
from errors import run_script
from models import build_model
from models.acgan import acgan_loss
from models.diffusion import diffusion_loss
from pipeline.batches import evaluation_batches, training_batches
from pipeline.policies import POLICIES
from pipeline.proposals import implied_dataset
from seeding import seed_for
from training.arguments import start_run
from training.device import Precision, compiled_forward, memory_watched, pick_device
from training.flags import make_parser
from training.generating import draw_samples, finish_generator, leave_out, validate_loss
from training.interrupt import StopRequests, Watch
from training.loop import train_one_epoch
from training.optimizer import make_optimizer, make_schedule
from training.outputs import count_parameters, print_header
from training.ranks import first_rank_first
from training.run import Run
from training.values import at_least, fraction, number

DDPM = {
    "dataset": "cifar10",  # Ho et al. 2020, as all below unless it says otherwise
    "model": "ddpm",
    "image_size": 32,
    "hflip": 0.5,
    "epochs": 500,  # ours: 195,000 steps, where the paper took 800,000
    "batch_size": 128,
    "opt": "adam",
    "lr": 2e-4,
    "weight_decay": 0.0,
    "sched": "cosine",  # ours, the paper has a constant rate after a warm-up of 5,000 steps
    "clip_grad": 1.0,
    "model_ema_decay": 0.999,  # ours: the paper's 0.9999 needs 100,000 steps
    "amp": "auto",  # ours
    "width": 64,  # ours, half of the paper's
    "depth": 2,
    "drop": 0.1,
    "noise_schedule": "cosine",  # Nichol & Dhariwal 2021: better for small images
    "noise_steps": 1000,
    "label_drop": 0.1,  # Ho & Salimans 2022
}
ACGAN = DDPM | {
    "model": "acgan",
    "epochs": 200,  # ours
    "batch_size": 100,  # Odena et al. 2017, as the betas
    "opt_betas": [0.5, 0.999],
    "clip_grad": None,
    "drop": 0.0,  # with spectral normalisation (Miyato et al. 2018); Odena et al. have 0.5 without it
    "noise_dim": 128,  # Miyato et al. 2018, as the loss
    "gan_loss": "hinge",
}
PAPERS = {"ddpm": DDPM, "acgan": ACGAN}
QUICK = {  # ours, for shapes
    "ddpm": DDPM
    | {"epochs": 15, "batch_size": 64, "opt": "adamw", "lr": 1e-3, "model_ema_decay": 0.998}
    | {"width": 32, "depth": 1, "drop": 0.0},
    "acgan": ACGAN | {"epochs": 30, "batch_size": 64, "lr": 5e-4, "width": 32},
}
RECIPES = {"paper": PAPERS, "quick": QUICK}  # {name: {model: defaults}}
MODEL_FLAGS = {
    "ddpm": ("image_size", "width", "depth", "drop", "noise_schedule", "noise_steps"),
    "acgan": ("image_size", "width", "drop", "noise_dim"),
}
CLASSIFIERS_FLAGS = (  # without effect here
    *("smoothing", "mixup", "cutmix", "class_weights", "patience", "skip_test", "overfit", "summary", "channels"),
    *("swa_start", "swa_lr", "extra_data", "extra_fraction", "fsdp"),
)
MINUS_ONE_TO_ONE = ([0.5] * 3, [0.5] * 3)  # mean and standard deviation that scale pixels to -1 ... 1


def generator_parser():
    parser = make_parser("train_generator.py", __doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODEL_FLAGS, metavar="NAME", help="ddpm: makes an image in many steps; acgan: in one")
    add("--width", type=at_least(8), metavar="N", help="channels at full resolution; fewer are faster")
    add("--depth", type=number(int, low=1, high=1000), metavar="N", help="blocks per level of the U-Net")
    add("--drop", type=fraction, metavar="P", help="dropout")
    add("--noise-schedule", choices=("linear", "cosine"), help="how the noise grows over the steps")
    add("--noise-steps", type=number(int, low=2, high=10_000), metavar="N", help="steps from image to noise")
    help_text = "share of images that are trained without their class, for generate.py --guidance"
    add("--label-drop", type=number(above=0, below=1), metavar="P", help=help_text)
    add("--noise-dim", type=at_least(1), metavar="N", help="length of an ACGAN's noise vector")
    add("--gan-loss", choices=("hinge", "paper"), help="hinge, or as in the ACGAN paper (see models/acgan.py)")
    add("--sample-epochs", type=at_least(1), metavar="N", default=10, help="draw samples.png every N epochs")
    leave_out(parser, *CLASSIFIERS_FLAGS)
    parser.set_defaults(noise_dim=128, gan_loss="hinge", **DDPM)
    return parser


def chosen_recipe(given):
    """(name, defaults) of the recipe that the flags on the command line ask for."""
    dataset, model = implied_dataset(given), given.get("model", "ddpm")
    name = given.get("recipe", "quick" if dataset in SHAPES else "paper")
    dataset = dataset or ("shapes" if name == "quick" else "cifar10")
    return name, RECIPES[name][model] | {"dataset": dataset}


def generator_loss(args, model):
    """The loss of the generator that the flags ask for, called as classification_loss is."""
    if args.model == "ddpm":
        return partial(diffusion_loss, shares=model.shares, label_drop=args.label_drop)
    return partial(acgan_loss, noise_dim=args.noise_dim, kind=args.gan_loss)


def main(argv=None):
    """Train as argv (or the command line) says; returns what result.json holds, None if the run is not finished."""
    start = start_run(generator_parser(), argv, chosen_recipe=chosen_recipe, model_flags=MODEL_FLAGS)
    args, checkpoint = start.args, start.checkpoint
    if args is None:  # nothing to train: --help, or the run is finished
        return start.result
    precision = Precision(args.amp, pick_device(args.device), deterministic=args.deterministic)
    device = precision.device
    print_header(args, precision)

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model = build_model(args.model, **start.model_args(count_classes(args.dataset, args.data_dir))).to(device)
    print(f"{args.model}, {count_parameters(model):,} parameters")

    # Data: the test set stays shut; the losses of an ACGAN depend on each other, and say nothing of its images
    dataset = first_rank_first(dataset_of, args, MINUS_ONE_TO_ONE)
    print(describe(dataset))
    train = training_batches(dataset, args, device)
    validated = dataset.val and args.model == "ddpm"
    watched = {"val": evaluation_batches(dataset, dataset.val, args, device)} if validated else {}

    # Optimiser
    forward = compiled_forward(model, args, device=device, num_images=len(dataset.train.labels))
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, steps_per_epoch=train.steps_per_epoch)
    run = Run(start, model, dataset, optimizer=optimizer, schedule=schedule, precision=precision)
    loss_function = generator_loss(args, model)
    train_epoch = partial(
        train_one_epoch,
        model=model,
        forward=forward,
        batches=train,
        loss_function=loss_function,
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        seed=args.seed,
        accumulate=args.accumulate,
        clip_grad=args.clip_grad,
        clip_value=args.clip_value,
        average=run.average,
    )
    run.begin(checkpoint)

    # Epochs
    with StopRequests(args.minutes, since=start.began) as stop, memory_watched(run):
        for epoch in run.remaining_epochs():
            with Watch(run, train.steps_per_epoch, stop) as watch:
                train_epoch(epoch=epoch, sums=run.sums, after_step=watch)
            if stop.wanted():
                return run.stop(stop)
            evaluate = partial(
                validate_loss, model=run.evaluated_model, loss_function=loss_function, precision=precision
            )
            run.end_epoch({split: evaluate(batches=batches, seed=args.seed) for split, batches in watched.items()})
            if run.epoch % args.sample_epochs == 0 or run.epoch == args.epochs:
                draw_samples(run)
    return finish_generator(run)


if __name__ == "__main__":
    run_script(main)
