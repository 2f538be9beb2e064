"""Train a Vision Transformer on small images.

    python train_vit.py --epochs 160 --device cuda    the ViT report's run on CIFAR-10
    python train_vit.py --dataset shapes              drawn shapes, three minutes on two CPU cores

What a run writes to checkpoints/vit/ is listed in README.md.
"""

import time
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from data import DATASETS, count_classes, dataset_of, describe
from errors import UserError, run_script
from models import build_model
from models.attention import ATTENTIONS
from models.pretrained import imagenet_statistics, load_imagenet_weights
from models.summary import summarize
from pipeline.batches import evaluation_batches, training_batches
from pipeline.imagenette import warn_of_seen_images
from pipeline.policies import POLICIES
from seeding import seed_for
from training.arguments import (
    at_least,
    check_model_flags,
    complete_arguments,
    fraction,
    given_arguments,
    make_parser,
    resumed_arguments,
)
from training.checkpoint import load_checkpoint
from training.device import Precision, compiled_forward, device_name, memory_watched, pick_device
from training.interrupt import StopRequests, Watch
from training.loop import train_one_epoch, validate
from training.optimizer import make_average, make_optimizer, make_schedule
from training.outputs import count_parameters, write_split
from training.run import Run, choose_folder, finished_result, prepare_folder

REPORT = {
    "dataset": "cifar10",  # the report
    "model": "vit",  # the report
    "image_size": 32,  # the report
    "hflip": 0.5,  # the report
    "scale": [0.8, 1.0],  # the report
    "ratio": [0.9, 1.1],  # the report
    "epochs": 160,  # the report
    "batch_size": 64,  # the report
    "lr": 5e-4,  # the report
    "weight_decay": 0.01,  # AdamW's default in torch, which the report leaves as it is
    "decay_all": True,  # so does it here
    "sched": "multistep",  # the report
    "gamma": 0.1,  # the report
    "save_epochs": [10, 25, 50, 100, 125],  # the report
    "patch_size": 4,  # the report, as all below
    "embed_dim": 256,
    "depth": 6,
    "num_heads": 8,
    "mlp_ratio": 2.0,
    "drop": 0.2,
}
STRONG = REPORT | {  # ours: the report's model, and as many epochs
    "opt": "muon",
    "batch_size": 128,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "decay_all": False,
    "sched": "cosine",
    "smoothing": 0.1,
    "drop": 0.0,
    "drop_path": 0.1,
    "scale": None,
    "crop_padding": 4,
    "aa": "auto",
    "fill": 128,
    "mixup": 0.8,  # this and cutmix: the CCT authors' configuration for 300 epochs
    "cutmix": 1.0,
    "save_epochs": [],
}
LIGHT = {"aa": "none", "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}  # of strong, in runs too short for more
RECIPES = {
    "report": REPORT,
    "strong": STRONG,
    "finetune": {  # ours, for --model vit_b_16 --pretrained
        "model": "vit_b_16",
        "epochs": 5,
        "lr": 3e-5,
        "sched": "cosine",
        "drop": 0.0,
        "clip_grad": 1.0,
        "save_epochs": [],
    },
    "quick": REPORT  # ours: the same architecture, small enough for three minutes on two CPU cores
    | {
        "dataset": "shapes",
        "epochs": 10,
        "lr": 2e-3,
        "weight_decay": 0.05,
        "decay_all": False,
        "sched": "cosine",
        "save_epochs": [],
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 4,
        "drop": 0.0,
    },
}
SHORT = 50  # below so many epochs strong takes what is in LIGHT
MODEL_FLAGS = {
    "vit": (
        *("image_size", "patch_size", "pad", "embed_dim", "depth", "num_heads"),
        *("mlp_ratio", "drop", "drop_path", "attention"),
    ),
    "vit_b_16": ("drop",),
}


def vit_parser():
    parser = make_parser(__doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODEL_FLAGS, help="vit_b_16 is torchvision's, 224 px (%(default)s)")
    model.add_argument("--pretrained", action="store_true", help="start vit_b_16 from its ImageNet weights")
    model.add_argument(
        "--patch-size", type=at_least(1), metavar="PIXELS", help="smaller: more tokens, slower (%(default)s)"
    )
    model.add_argument("--pad", action="store_true", help="fill images that patches do not divide with zeros")
    model.add_argument("--embed-dim", type=at_least(1), help="width of a token (%(default)s)")
    model.add_argument("--depth", type=at_least(1), help="number of blocks (%(default)s)")
    model.add_argument("--num-heads", type=at_least(1), help="must divide the width (%(default)s)")
    model.add_argument(
        "--mlp-ratio", type=at_least(0.1, float), help="width of the MLP over that of a token (%(default)s)"
    )
    model.add_argument("--drop", type=fraction, metavar="P", help="dropout (%(default)s)")
    model.add_argument("--drop-path", type=fraction, metavar="P", help="of the last block, less before (%(default)s)")
    model.add_argument("--attention", choices=ATTENTIONS, help="what mixes the tokens (%(default)s)")
    parser.set_defaults(drop_path=0.0, attention="softmax", **REPORT)
    return parser


def chosen_recipe(given):
    """(the name, the defaults) of the recipe that the flags on the command line ask for."""
    name = given.get("recipe", "quick" if given.get("dataset") == "shapes" else "report")
    short = name == "strong" and given.get("epochs", SHORT) < SHORT
    return name, RECIPES[name] | (LIGHT if short else {})


def main(argv=None):
    """Train as argv (or the command line) says; return what result.json holds, None where the run is not finished."""
    began = time.monotonic()
    # Arguments
    parser = vit_parser()
    given = given_arguments(parser, argv)
    recipe, defaults = chosen_recipe(given)
    model_name = given.get("model", defaults.get("model", "vit"))
    folder, resuming = choose_folder(given, default_name=model_name, default_dir=parser.get_default("out_dir"))
    if resuming:
        checkpoint = load_checkpoint(folder)
        args = resumed_arguments(given, checkpoint, folder, models=MODEL_FLAGS)
        if result := finished_result(folder):
            return result
    else:
        args = complete_arguments(parser, given | {"recipe": recipe}, defaults)
        check_model_flags(given, MODEL_FLAGS, args.model)
        if args.pretrained and args.model != "vit_b_16":
            raise UserError(f"--pretrained: there are no weights for {args.model}, only for vit_b_16")
    device = pick_device(args.device)
    precision = Precision(args.amp, device)
    print(f"recipe {args.recipe}: {args.dataset}, {args.epochs} epochs, batch {args.batch_size}, lr {args.lr:g}")
    print(f"{device_name(device)}, {precision.dtype}, torch {torch.__version__}")

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model_args = {name: getattr(args, name) for name in MODEL_FLAGS[args.model]}
    model_args["num_classes"] = count_classes(args.dataset, args.data_dir)
    model = build_model(args.model, **model_args).to(device)
    print(f"{args.model}, {count_parameters(model):,} parameters, {model.grid[0]} x {model.grid[1]} patches")
    if args.pretrained and not resuming:
        load_imagenet_weights(model)
    if args.summary:
        print(summarize(model, (3, args.image_size, args.image_size)))
        return None

    # Data
    dataset = dataset_of(args)
    print(describe(dataset))
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
        script="train_vit.py",
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
