"""Train a ResNet or xResNet with an attention block in it: from scratch, or after a trained trunk.

    python train_resnet_attn.py --device cuda                             the survey's ResNet18 on CIFAR-10, the trunk
    python train_resnet_attn.py --attention graph --init-from checkpoints/resnet18 --epochs 5 --lr 0.01
    python train_resnet_attn.py --recipe woof --attention simple          SimpleSelfAttention's xresnet50 on Imagewoof
    python train_resnet_attn.py --dataset shapes                          drawn shapes, three minutes on two CPU cores

Recipes: survey and woof have these documents' values; strong is ours for the same models; quick is for --dataset
shapes. What a run writes to checkpoints/resnet18/ is listed in README.md.
"""

import argparse
from functools import partial

import torch

from data import DATASETS, SHAPES, count_classes, dataset_of, describe
from errors import UserError, run_script
from models import build_model
from models.attention2d import ATTENTIONS2D
from models.pretrained import imagenet_statistics
from models.resnet import RESNETS, STAGES, load_imagenet_trunk, load_trunk
from models.xresnet import XRESNETS
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
from training.values import at_least, name_or_class
from training.weights import start_from_weights

SURVEY = {
    "dataset": "cifar10",  # the survey
    "model": "resnet18",  # the survey
    "attention": "none",  # the trunk comes first
    "attention_gamma": False,  # the survey's block has none
    "num_heads": 1,  # the survey
    "image_size": 32,  # the survey
    "crop_padding": 4,  # the survey crops; the padding is that of PyTorch Lightning's tutorial
    "hflip": 0.5,  # the survey
    "rotate": 15.0,  # the survey rotates; the angle is ours
    "epochs": 50,  # the survey, for a whole model; 5 for a block on a trained trunk
    "clip_grad": 0.5,  # the survey
    "seed": 42,  # the survey
    "amp": "off",  # the survey
    "batch_size": 64,  # the tutorial, as all below
    "opt": "sgd",
    "momentum": 0.9,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "decay_all": True,
    "sched": "onecycle",
    "div_factor": 25.0,
}
OURS = SURVEY | {"attention_gamma": True, "num_heads": 4, "clip_grad": None, "seed": 0, "amp": "auto"}
WOOF = {  # SimpleSelfAttention's runs of May 2019, and the fastai example that they start from
    "dataset": "imagewoof",
    "model": "xresnet50",
    "attention": "none",
    "image_size": 128,
    "hflip": 0.5,
    "scale": [0.35, 1.0],
    "ratio": [0.75, 4 / 3],
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
STRONG = OURS | {  # ours: the same models
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
SHORT = 30  # below so many epochs, strong leaves out what only helps in long runs
LIGHT = {"cutout": 0}
LARGE = {  # strong on the images of woof
    **{name: WOOF[name] for name in ("model", "image_size", "scale", "ratio", "crop_padding", "epochs", "batch_size")},
    "cutout": 0,
}
RECIPES = {
    "survey": SURVEY,
    "woof": WOOF,
    "strong": STRONG,
    "quick": OURS | {"dataset": "shapes", "epochs": 3, "width": 16, "rotate": 0.0, "attention": "graph"},  # ours
}
RESNET_FLAGS = "image_size stem width attention attention_after patch_size num_heads attention_gamma symmetric"
XRESNET_FLAGS = "image_size stem_widths attention attention_in attention_kernel_size symmetric"
MODEL_FLAGS = dict.fromkeys(RESNETS, RESNET_FLAGS.split()) | dict.fromkeys(XRESNETS, XRESNET_FLAGS.split())


def resnet_parser():
    parser = make_parser("train_resnet_attn.py", __doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODEL_FLAGS, metavar="NAME", help=", ".join(MODEL_FLAGS))
    help_text = f"the block: {', '.join(ATTENTIONS2D)}, or your own FILE.py:Class"
    add("--attention", type=name_or_class(ATTENTIONS2D), metavar="NAME", help=help_text)
    add("--attention-after", choices=STAGES, help="the stage that a ResNet's block follows")
    add("--attention-in", choices=STAGES, nargs="+", help="the stages whose last block has it in an xResNet")
    add("--attention-kernel-size", type=at_least(1), metavar="PIXELS", help="of simple, an odd number")
    add("--symmetric", action="store_true", help="make simple's matrix symmetric")
    help_text = "scale a ResNet's block by a weight that starts at 0; the survey's own has none"
    add("--attention-gamma", action=argparse.BooleanOptionalAction, help=help_text)
    add("--patch-size", type=at_least(1), metavar="PIXELS", help="side of a node, in pixels of the feature map")
    add("--num-heads", type=at_least(1), metavar="N", help="must divide the map's width")
    add("--stem", choices=("cifar", "imagenet"), help="the first layers (default: cifar up to 64 pixels)")
    add("--width", type=at_least(1), metavar="N", help="channels of a ResNet's first stage; fewer are faster")
    add("--stem-widths", type=at_least(1), nargs=3, metavar="N", help="channels in the stem of an xResNet")
    add = parser.add_argument_group("what a run starts from").add_argument
    add("--init-from", metavar="RUN", help="take the trunk's weights from a run's folder")
    add("--pretrained", action="store_true", help="take them from torchvision's weights for ImageNet")
    add("--freeze", choices=("trunk",), metavar="trunk", help="train the block and the head alone")
    own = {"attention_after": "layer4", "attention_in": ["layer1"], "attention_kernel_size": 1, "patch_size": 1}
    parser.set_defaults(**own, width=64, stem_widths=[32, 64, 64], **OURS)
    return parser


def chosen_recipe(given):
    """(name, defaults) of the recipe that the flags on the command line ask for."""
    dataset = implied_dataset(given)
    name = given.get("recipe", "quick" if dataset in SHAPES else "survey")
    changes, size = {}, given.get("image_size", WOOF["image_size"])
    if name == "woof" and isinstance(size, int):  # fastai's presize: 32 pixels more than the image size
        changes = {"crop_pct": size / (size + 32)}
    if name == "strong" and (dataset in IMAGENETTES or given.get("epochs", SHORT) < SHORT):
        changes = LARGE if dataset in IMAGENETTES else LIGHT
    return name, RECIPES[name] | changes | ({"dataset": dataset} if dataset else {})


def check_start(args):
    """Raises UserError for flags of what a run starts from that contradict each other or the model."""
    if args.freeze and not args.init_from and not args.pretrained:
        raise UserError("--freeze trunk needs a trained trunk: --init-from RUN or --pretrained")
    if args.init_from and args.pretrained:
        raise UserError("--init-from and --pretrained exclude each other: a run starts from one trunk")
    if args.pretrained and args.model not in RESNETS:
        raise UserError(f"--pretrained: there are no weights for {args.model}, only for {', '.join(RESNETS)}")


def start_from_trunk(model, args, checkpoint):
    """Load the trunk of --init-from or --pretrained, unless the run is resumed, and freeze it if --freeze says so.

    Returns (mean, std) of the images that the trunk was trained on; None if they are not known.
    """
    statistics = None
    if args.init_from:
        statistics = start_from_weights(args.init_from, partial(load_trunk, model), checkpoint)
    if args.pretrained:
        warn_of_seen_images(args.dataset)
        statistics = imagenet_statistics()
        if not checkpoint:
            print(f"weights of ImageNet; left out: {', '.join(load_imagenet_trunk(model))}")
    if args.freeze:
        model.freeze_trunk()
    return statistics


def main(argv=None):
    """Train as argv (or the command line) says; returns what result.json holds, None if the run is not finished."""
    start = start_run(resnet_parser(), argv, chosen_recipe=chosen_recipe, model_flags=MODEL_FLAGS)
    args, checkpoint = start.args, start.checkpoint
    if args is None:  # nothing to train: --help, or the run is finished
        return start.result
    check_start(args)
    precision = Precision(args.amp, pick_device(args.device), deterministic=args.deterministic)
    device = precision.device
    print_header(args, precision)

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model = build_model(args.model, **start.model_args(count_classes(args.dataset, args.data_dir))).to(device)
    print_model(args.model, model, "positions")
    statistics = start_from_trunk(model, args, checkpoint)
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
