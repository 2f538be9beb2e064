"""Train a ResNet or xResNet with an attention block in it: from scratch, or after a trained trunk.

    python train_resnet_attn.py --device cuda                             the survey's ResNet18 on CIFAR-10, the trunk
    python train_resnet_attn.py --attention graph --init-from checkpoints/resnet18 --epochs 5 --freeze trunk
    python train_resnet_attn.py --recipe woof --attention simple          SimpleSelfAttention's xresnet50 on Imagewoof
    python train_resnet_attn.py --dataset shapes                          drawn shapes, three minutes on two CPU cores

What a run writes to checkpoints/resnet18/ is listed in README.md.
"""

import argparse
import time
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from data import DATASETS, count_classes, dataset_of, describe
from errors import UserError, run_script
from models import build_model
from models.attention2d import ATTENTIONS2D
from models.pretrained import imagenet_statistics
from models.resnet import RESNETS, STAGES, load_imagenet_trunk, load_trunk
from models.summary import summarize
from models.xresnet import XRESNETS
from pipeline.batches import evaluation_batches, training_batches
from pipeline.imagenette import IMAGENETTES, warn_of_seen_images
from pipeline.policies import POLICIES
from seeding import seed_for
from training.arguments import (
    at_least,
    check_model_flags,
    complete_arguments,
    given_arguments,
    make_parser,
    resumed_arguments,
)
from training.checkpoint import evaluated_weights, load_checkpoint
from training.device import Precision, compiled_forward, device_name, memory_watched, pick_device
from training.interrupt import StopRequests, Watch
from training.loop import train_one_epoch, validate
from training.optimizer import make_average, make_optimizer, make_schedule
from training.outputs import count_parameters, write_split
from training.run import Run, choose_folder, finished_result, prepare_folder

SURVEY = {
    "dataset": "cifar10",  # the survey
    "model": "resnet18",  # the survey
    "attention": "none",  # the trunk comes first
    "image_size": 32,  # the survey
    "crop_padding": 4,  # the survey crops; so much in the tutorial of its trainer library, PyTorch Lightning
    "hflip": 0.5,  # the survey
    "rotate": 15.0,  # the survey turns; how far is ours
    "epochs": 30,  # the tutorial, as all below
    "batch_size": 64,
    "opt": "sgd",
    "momentum": 0.9,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "decay_all": True,
    "sched": "onecycle",
    "div_factor": 25.0,
}
WOOF = {  # SimpleSelfAttention's runs of May 2019, and the fastai example that they start from
    "dataset": "imagewoof",
    "model": "xresnet50",
    "attention": "none",
    "image_size": 128,
    "hflip": 0.5,
    "scale": [0.35, 1.0],
    "ratio": [0.75, 4 / 3],
    "crop_pct": 0.8,  # fastai's presize: 32 pixels more than 128
    "crop_padding": 0,
    "rotate": 0.0,
    "epochs": 5,
    "batch_size": 64,
    "drop_last": True,  # fastai; else an epoch of Imagewoof ends in a batch of one image
    "opt": "adamw",  # Adam with decoupled weight decay
    "opt_betas": [0.9, 0.99],
    "opt_eps": 1e-6,
    "lr": 3e-3,
    "weight_decay": 1e-2,
    "decay_all": False,
    "sched": "onecycle",
    "div_factor": 10.0,
    "smoothing": 0.1,
}
STRONG = SURVEY | {  # ours: the same models
    "rotate": 0.0,
    "cutout": 12,
    "epochs": 50,
    "batch_size": 128,
    "drop_last": True,
    "opt": "muon",
    "lr": 3e-3,
    "weight_decay": 0.05,
    "decay_all": False,
    "sched": "cosine",
    "smoothing": 0.1,
}
LIGHT = {"cutout": 0}  # of strong, in runs too short for more
LARGE = {  # of strong, on the images of woof
    **{name: WOOF[name] for name in ("model", "image_size", "scale", "ratio", "crop_padding", "epochs", "batch_size")},
    "cutout": 0,
}
RECIPES = {
    "survey": SURVEY,
    "woof": WOOF,
    "strong": STRONG,
    "quick": SURVEY | {"dataset": "shapes", "epochs": 3, "width": 16, "rotate": 0.0, "attention": "graph"},  # ours
}
SHORT = 30  # below so many epochs strong takes what is in LIGHT
MODEL_FLAGS = dict.fromkeys(
    RESNETS,
    (
        *("image_size", "stem", "width", "attention", "attention_after", "patch_size", "num_heads"),
        *("attention_gamma", "symmetric"),
    ),
) | dict.fromkeys(
    XRESNETS, ("image_size", "stem_widths", "attention", "attention_in", "attention_kernel_size", "symmetric")
)


def resnet_parser():
    parser = make_parser(__doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODEL_FLAGS, metavar="NAME", help="%(choices)s (%(default)s)")
    model.add_argument("--attention", choices=ATTENTIONS2D, help="the block (%(default)s)")
    model.add_argument("--attention-after", choices=STAGES, help="where a ResNet has it (%(default)s)")
    model.add_argument("--attention-in", choices=STAGES, nargs="+", help="where an xResNet has it (%(default)s)")
    model.add_argument("--attention-kernel-size", type=at_least(1), metavar="PIXELS", help="of simple (%(default)s)")
    model.add_argument("--symmetric", action="store_true", help="let simple's matrix be symmetric")
    model.add_argument(
        "--attention-gamma",
        action=argparse.BooleanOptionalAction,
        help="scale a ResNet's block by a weight that starts at 0; the survey's own has none",
    )
    model.add_argument("--patch-size", type=at_least(1), metavar="PIXELS", help="of the map, a node (%(default)s)")
    model.add_argument("--num-heads", type=at_least(1), help="must divide the map's width (%(default)s)")
    model.add_argument("--stem", choices=("cifar", "imagenet"), help="(cifar up to 64 pixels)")
    model.add_argument("--width", type=at_least(1), help="channels of a ResNet's first stage (%(default)s)")
    model.add_argument("--stem-widths", type=at_least(1), nargs=3, metavar="N", help="of an xResNet (%(default)s)")
    start = parser.add_argument_group("what a run starts from")
    start.add_argument("--init-from", metavar="RUN", help="take the trunk's weights from a run's folder")
    start.add_argument("--pretrained", action="store_true", help="take them from torchvision's, of ImageNet")
    start.add_argument("--freeze", choices=("trunk",), help="train the block and the head alone")
    parser.set_defaults(
        attention_after="layer4",
        attention_in=["layer1"],
        attention_kernel_size=1,
        attention_gamma=True,
        patch_size=1,
        num_heads=4,
        width=64,
        stem_widths=[32, 64, 64],
        **SURVEY,
    )
    return parser


def chosen_recipe(given):
    """(the name, the defaults) of the recipe that the flags on the command line ask for."""
    name = given.get("recipe", "quick" if given.get("dataset") == "shapes" else "survey")
    changes = {}
    if name == "strong" and given.get("epochs", SHORT) < SHORT:
        changes = LIGHT
    if name == "strong" and given.get("dataset") in IMAGENETTES:
        changes = LARGE
    return name, RECIPES[name] | changes


def main(argv=None):
    """Train as argv (or the command line) says; return what result.json holds, None where the run is not finished."""
    began = time.monotonic()
    # Arguments
    parser = resnet_parser()
    given = given_arguments(parser, argv)
    recipe, defaults = chosen_recipe(given)
    model_name = given.get("model", defaults["model"])
    folder, resuming = choose_folder(given, default_name=model_name, default_dir=parser.get_default("out_dir"))
    if resuming:
        checkpoint = load_checkpoint(folder)
        args = resumed_arguments(given, checkpoint, folder, models=MODEL_FLAGS)
        if result := finished_result(folder):
            return result
    else:
        args = complete_arguments(parser, given | {"recipe": recipe}, defaults)
        check_model_flags(given, MODEL_FLAGS, args.model)
        if args.freeze and not args.init_from and not args.pretrained:
            raise UserError("--freeze trunk needs a trained trunk: --init-from RUN or --pretrained")
        if args.init_from and args.pretrained:
            raise UserError("--init-from and --pretrained exclude each other: a run starts from one trunk")
        if args.pretrained and args.model not in RESNETS:
            raise UserError(f"--pretrained: there are no weights for {args.model}, only for {', '.join(RESNETS)}")
    device = pick_device(args.device)
    precision = Precision(args.amp, device)
    print(f"recipe {args.recipe}: {args.dataset}, {args.epochs} epochs, batch {args.batch_size}, lr {args.lr:g}")
    print(f"{device_name(device)}, {precision.dtype}, torch {torch.__version__}")

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model_args = {name: getattr(args, name) for name in MODEL_FLAGS[args.model]}
    model_args["num_classes"] = count_classes(args.dataset, args.data_dir)
    model = build_model(args.model, **model_args).to(device)
    print(f"{args.model}, {count_parameters(model):,} parameters, {model.grid[0]} x {model.grid[1]} positions")
    if args.init_from:
        start = checkpoint if resuming else load_checkpoint(args.init_from, device=device)
    if not resuming and (args.init_from or args.pretrained):
        left = load_trunk(model, evaluated_weights(start)) if args.init_from else load_imagenet_trunk(model)
        print(f"the trunk is that of {args.init_from or 'ImageNet'}; left there: {', '.join(left) or 'nothing'}")
    if args.freeze:
        model.freeze_trunk()
    if args.summary:
        print(summarize(model, (3, args.image_size, args.image_size)))
        return None

    # Data
    dataset = dataset_of(args)
    print(describe(dataset))
    if args.init_from:  # its weights know images normalised so
        dataset = dataset._replace(mean=start["mean"], std=start["std"])
    if args.pretrained:
        warn_of_seen_images(args.dataset)
        mean, std = imagenet_statistics()
        dataset = dataset._replace(mean=mean, std=std)
    if args.patience and not dataset.val:
        raise UserError(f"--patience {args.patience} needs validation images: --val-fraction 0.1 splits some off")
    train = training_batches(dataset, args, device)
    test = evaluation_batches(dataset, dataset.test, args, device)
    # with validation images the test set stays shut until the end
    watched = {"val": evaluation_batches(dataset, dataset.val, args, device)} if dataset.val else {"test": test}

    # Optimiser
    forward = compiled_forward(model, args, device=device, num_images=len(dataset.train.labels))
    optimizer = make_optimizer(args, model)
    average = make_average(model, args.model_ema_decay)
    schedule = make_schedule(args, optimizer, steps_per_epoch=train.steps_per_epoch)
    run = Run(
        folder,
        script="train_resnet_attn.py",
        args=args,
        model_name=args.model,
        model_args=model_args,
        model=model,
        average=average,
        dataset=dataset,
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        device=device,
    )
    if resuming:
        run.resume(checkpoint)
    prepare_folder(folder, resuming=resuming)
    if args.dataset == "folder" or args.val_fraction:
        write_split(folder / "split.csv", dataset)

    # Epochs
    with StopRequests(args.minutes, since=began) as stop, memory_watched(run):
        for epoch in range(run.epoch, args.epochs):
            if run.out_of_patience():
                break
            with Watch(run, train.steps_per_epoch, stop) as watch:
                train_one_epoch(
                    model=model,
                    forward=forward,
                    batches=train,
                    loss_function=partial(cross_entropy, label_smoothing=args.smoothing),
                    optimizer=optimizer,
                    schedule=schedule,
                    precision=precision,
                    seed=args.seed,
                    epoch=epoch,
                    start_step=run.step,
                    sums=run.sums,
                    clip_grad=args.clip_grad,
                    average=average,
                    after_step=watch,
                )
            if stop.wanted():
                return run.stop(stop)
            started = time.monotonic()
            judged = {}
            for split, batches in watched.items():
                loss, accuracy, _ = validate(model=run.evaluated_model, batches=batches, precision=precision)
                judged[split] = loss, accuracy
            run.end_epoch(judged, seconds=time.monotonic() - started)

    return run.finish(test)


if __name__ == "__main__":
    run_script(main)
