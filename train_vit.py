"""Train a Vision Transformer on small images.

    python train_vit.py --epochs 160 --device cuda    the ViT report's run on CIFAR-10
    python train_vit.py --dataset shapes              drawn shapes, three minutes on two CPU cores

Recipes: report has the ViT report's values; strong is ours for the same model; finetune starts --model vit_b_16 from
its ImageNet weights (--pretrained); quick is a small model for --dataset shapes.

What a run writes to checkpoints/vit/ is listed in README.md.
"""
# What the second command prints, on two cores of an AMD EPYC:
# recipe quick: shapes, 10 epochs, batch 64, lr 0.002
# ...
# vit, 311,338 parameters, a grid of 8 x 8 patches
# ...
# epoch  1/10   lr 1.99e-03   train 1.9595  21.20%   val 1.6490  30.15%      15.9 s   1,303 images/s
# ...
# epoch 10/10   lr 6.22e-10   train 0.1269  95.75%   val 0.1988  93.15%      13.6 s   1,520 images/s
# test accuracy 93.75% after epoch 10

from functools import partial

import torch

from data import DATASETS, SHAPES, count_classes, dataset_of, describe
from errors import UserError, run_script
from models import build_model
from models.attention import ATTENTIONS
from pipeline.batches import evaluation_batches, training_batches
from pipeline.imagenette import IMAGENETTES, warn_of_seen_images
from pipeline.policies import POLICIES
from pipeline.proposals import implied_dataset
from seeding import seed_for
from training.arguments import start_run
from training.device import Precision, compiled_forward, memory_watched, pick_device
from training.flags import make_parser
from training.interrupt import StopRequests, Watch
from training.loop import train_one_epoch, validate
from training.optimizer import make_loss, make_optimizer, make_schedule
from training.outputs import print_header, print_model, print_summary
from training.ranks import first_rank_first
from training.run import Run
from training.values import at_least, fraction, name_or_class, number

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
    "amp": "off",  # the report
    "weight_decay": 0.01,  # AdamW's default in torch, which the report does not change
    "decay_all": True,  # as torch's default for all parameters
    "sched": "multistep",  # the report
    "gamma": 0.1,  # the report
    "save_epochs": [11, 26, 51, 101, 126],  # the report's 10, 25, 50, 100 and 125, which it counts from 0
    "patch_size": 4,  # the report, as all below
    "embed_dim": 256,
    "depth": 6,
    "num_heads": 8,
    "mlp_ratio": 2.0,
    "drop": 0.2,
}
STRONG = REPORT | {  # ours: the report's model, and as many epochs
    "opt": "muon",
    "amp": "auto",
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
SHORT = 50  # below so many epochs, strong leaves out what only helps in long runs
LIGHT = {"aa": "none", "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
RECIPES = {
    "report": REPORT,
    "strong": STRONG,
    "finetune": {  # ours, for --model vit_b_16 --pretrained
        **{"model": "vit_b_16", "epochs": 5, "lr": 3e-5, "amp": "auto", "sched": "cosine"},
        **{"drop": 0.0, "clip_grad": 1.0, "save_epochs": []},
    },
    "quick": REPORT  # ours: the same architecture, small enough for a CPU
    | {
        **{"dataset": "shapes", "epochs": 10, "lr": 2e-3, "amp": "auto", "weight_decay": 0.05, "decay_all": False},
        **{"sched": "cosine", "save_epochs": [], "embed_dim": 96, "depth": 4, "num_heads": 4, "drop": 0.0},
    },
}
MODEL_FLAGS = {  # {model: the flags that it accepts}
    "vit": (
        *("image_size", "patch_size", "pad", "embed_dim", "depth", "num_heads"),
        *("mlp_ratio", "drop", "drop_path", "attention"),
    ),
    "vit_b_16": ("drop",),
    "timm": ("drop_path",),  # timm:NAME
}


def vit_parser():
    parser = make_parser("train_vit.py", __doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="vit; vit_b_16, torchvision's, at 224 pixels; or timm:NAME, a ViT of timm's")
    add("--pretrained", action="store_true", help="start vit_b_16 or timm:NAME from its published weights")
    add("--init-from", metavar="RUN", help="start from the weights of a run, or of a file (docs/export.md)")
    add("--patch-size", type=at_least(1), metavar="PIXELS", help="smaller patches: more tokens, slower, often better")
    add("--pad", action="store_true", help="add zeros to images that the patch size does not divide")
    add("--embed-dim", type=at_least(1), metavar="N", help="width of a token")
    add("--depth", type=number(int, low=1, high=1000), metavar="N", help="number of blocks")
    add("--num-heads", type=at_least(1), metavar="N", help="must divide the width")
    add("--mlp-ratio", type=at_least(0.1, float), metavar="R", help="width of the MLP over that of a token")
    add("--drop", type=fraction, metavar="P", help="dropout; raise it if the model overfits")
    add("--drop-path", type=fraction, metavar="P", help="share of branches left out in the last block, fewer before")
    help_text = f"what mixes the tokens: {', '.join(ATTENTIONS)}, or your own FILE.py:Class"
    add("--attention", type=name_or_class(ATTENTIONS), metavar="NAME", help=help_text)
    parser.set_defaults(drop_path=0.0, attention="softmax", **REPORT)
    return parser


def chosen_recipe(given):
    """(name, defaults) of the recipe that the flags on the command line ask for."""
    dataset = implied_dataset(given)
    name = given.get("recipe", "quick" if dataset in SHAPES else "report")
    changes = LIGHT if name == "strong" and given.get("epochs", SHORT) < SHORT else {}
    model = given.get("model", RECIPES[name]["model"])
    if dataset in ("folder", *IMAGENETTES) and model != "vit":
        from models.pretrained import pretrained_side

        changes = changes | {"image_size": pretrained_side(model)}  # the model's own: it would enlarge smaller images
    return name, RECIPES[name] | changes | ({"dataset": dataset} if dataset else {})


def start_from(model, args, checkpoint):
    """Load the weights of --pretrained or --init-from, unless the run is resumed.

    Returns (mean, std) of the images that they were trained on; None if they are a state dict.
    """
    from models.pretrained import load_published  # only if it is asked for
    from training.weights import print_taken, start_from_weights

    if args.pretrained and args.init_from:
        raise UserError("--init-from and --pretrained exclude each other")
    if args.pretrained and args.model == "vit":
        raise UserError("--pretrained: there are no weights for vit, only for vit_b_16 and timm:NAME")
    if args.pretrained:
        warn_of_seen_images(args.dataset)
    if args.init_from or checkpoint:
        return start_from_weights(args.init_from, partial(load_published, model), checkpoint)
    weights, *statistics = model.pretrained()
    print_taken(args.model, weights, load_published(model, weights))
    return statistics


def main(argv=None):
    """Train as argv (or the command line) says; returns what result.json holds, None if the run is not finished."""
    start = start_run(vit_parser(), argv, chosen_recipe=chosen_recipe, model_flags=MODEL_FLAGS)
    args, checkpoint = start.args, start.checkpoint
    if args is None:  # nothing to train: --help, or the run is finished
        return start.result
    precision = Precision(args.amp, pick_device(args.device), deterministic=args.deterministic)
    device = precision.device
    print_header(args, precision)

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model = build_model(args.model, **start.model_args(count_classes(args.dataset, args.data_dir))).to(device)
    print_model(args.model, model, "patches")
    statistics = start_from(model, args, checkpoint) if args.pretrained or args.init_from else None
    if args.summary:
        from models.summary import summarize  # only if it is asked for

        return print_summary(summarize(model, start.input_shape(), batch_size=args.batch_size), args)

    # Data: with validation images, the test set is opened once, at the end
    dataset = first_rank_first(dataset_of, args, statistics)
    print(describe(dataset))
    train = training_batches(dataset, args, device)
    test = evaluation_batches(dataset, dataset.test, args, device)
    watched = {"val": evaluation_batches(dataset, dataset.val, args, device)} if dataset.val else {"test": test}

    # Optimiser
    forward = compiled_forward(model, args, device=device, num_images=len(dataset.train.labels))
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, steps_per_epoch=train.steps_per_epoch)
    run = Run(start, model, dataset, optimizer=optimizer, schedule=schedule, precision=precision)
    train_epoch = partial(
        train_one_epoch,
        model=model,
        forward=forward,
        batches=train,
        loss_function=make_loss(args, dataset, device),
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
            evaluate = partial(validate, model=run.model_to_evaluate(train), precision=precision)
            run.end_epoch({split: evaluate(batches=batches) for split, batches in watched.items()})
    return run.finish(test)


if __name__ == "__main__":
    run_script(main)
