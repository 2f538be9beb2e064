"""Train a compact transformer (ViT-Lite, CVT, CCT) on small images.

    python train_cct.py --device cuda                  the CCT report's run: CCT-6/3x1, CIFAR-100, 200 epochs
    python train_cct.py --recipe strong --device cuda  the same model by our own recipe
    python train_cct.py --dataset shapes               drawn shapes, three minutes on two CPU cores
    python train_cct.py --data-dir photos              your own images, one folder per class

Recipes: report has the CCT report's values; strong is ours for the same models; quick is for --dataset shapes, photos
for a few hundred images of your own.

What a run writes to checkpoints/cct_6_3x1/ is listed in README.md.
"""

from functools import partial

import torch

from data import DATASETS, SHAPES, count_classes, dataset_of, describe
from errors import run_script
from models import build_model
from models.attention import ATTENTIONS
from models.cct import COMPACT_MODELS
from models.nano import NANO_MODELS
from models.pretrained import load_published
from pipeline.batches import evaluation_batches, training_batches
from pipeline.policies import POLICIES
from pipeline.proposals import implied_dataset, proposals_of_images
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
from training.values import fraction, name_or_class
from training.weights import start_from_weights

REPORT = {
    "dataset": "cifar100",  # the report
    "model": "cct_6_3x1",  # the report
    "positional_embedding": "learnable",  # the authors' code
    "image_size": 32,  # the report
    "epochs": 200,  # the report
    "batch_size": 128,  # the authors' training script
    "lr": 5e-4,  # the authors' training script
    "amp": "off",  # the authors' training script
    "weight_decay": 3e-2,  # the authors' training script
    "decay_all": True,  # as there
    "sched": "cosine",  # the report, with a tenth of the epochs to warm up
    "smoothing": 0.1,  # the report, and the authors' training script
    "aa": "auto",  # the report
    "fill": 128,  # the policy that it used
    "crop_padding": 4,  # the authors' training script
    "hflip": 0.5,  # the authors' training script
    "drop": 0.0,  # the authors' code, as the two below
    "attn_drop": 0.1,
    "drop_path": 0.1,
}
STRONG = REPORT | {  # ours: the same models, and as many epochs
    "opt": "muon",
    "lr": 3e-3,
    "amp": "auto",
    "weight_decay": 0.05,
    "decay_all": False,
    "attn_drop": 0.0,
    "mixup": 0.8,  # this and cutmix: the authors' configuration for 300 epochs
    "cutmix": 1.0,
}
SHORT = 50  # below so many epochs, strong leaves out what only helps in long runs
LIGHT = {"aa": "none", "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
RECIPES = {
    "report": REPORT,
    "strong": STRONG,
    "quick": STRONG | LIGHT | {"dataset": "shapes", "model": "cct_2_3x2", "epochs": 6},  # ours
    "photos": STRONG  # its learning rate was kept for the table in docs/your-images.md, where the values below are from
    | LIGHT  # augmentation was not shown to help
    | {
        "dataset": "folder",
        "model": "cct_2_3x2",  # the smallest: no other was shown to be better
        "image_size": 32,  # that table's; of a folder, see pipeline/proposals.py
        "epochs": 40,  # val 42.3 after 40 epochs, 40.3 after 20
        "batch_size": 32,  # of 300 images, ten steps per epoch
        "val_fraction": 0.2,  # to choose on; not if the folder has validation images
    },
}
MODEL_FLAGS = dict.fromkeys(
    COMPACT_MODELS, ("image_size", "positional_embedding", "attention", "drop", "attn_drop", "drop_path")
) | dict.fromkeys(NANO_MODELS, ("image_size", "attention", "attn_drop", "drop_path"))


def cct_parser():
    parser = make_parser("train_cct.py", __doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODEL_FLAGS, metavar="NAME", help=", ".join(MODEL_FLAGS))
    add("--init-from", metavar="RUN", help="start from a run's weights, or a file of the authors' released ones")
    help_text = f"what mixes the tokens: {', '.join(ATTENTIONS)}, or your own FILE.py:Class"
    add("--attention", type=name_or_class(ATTENTIONS), metavar="NAME", help=help_text)
    add("--positional-embedding", choices=("learnable", "sine", "none"), help="how a token knows its place")
    add("--drop", type=fraction, metavar="P", help="dropout; raise it if the model overfits")
    add("--attn-drop", type=fraction, metavar="P", help="dropout of attention weights")
    add("--drop-path", type=fraction, metavar="P", help="share of branches left out in the last block, fewer before")
    parser.set_defaults(attention="softmax", **REPORT)
    return parser


def chosen_recipe(given):
    """(name, defaults) of the recipe that the flags on the command line ask for."""
    dataset = implied_dataset(given)
    name = given.get("recipe", "quick" if dataset in SHAPES else "photos" if dataset == "folder" else "report")
    short = name == "strong" and given.get("epochs", SHORT) < SHORT
    changes = proposals_of_images(given) if name == "photos" else LIGHT if short else {}
    return name, RECIPES[name] | changes | ({"dataset": dataset} if dataset else {})


def main(argv=None):
    """Train as argv (or the command line) says; returns what result.json holds, None if the run is not finished."""
    start = start_run(cct_parser(), argv, chosen_recipe=chosen_recipe, model_flags=MODEL_FLAGS)
    args, checkpoint = start.args, start.checkpoint
    if args is None:  # nothing to train: --help, or the run is finished
        return start.result
    precision = Precision(args.amp, pick_device(args.device), deterministic=args.deterministic)
    device = precision.device
    print_header(args, precision)

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model = build_model(args.model, **start.model_args(count_classes(args.dataset, args.data_dir))).to(device)
    print_model(args.model, model, "tokens")
    load = partial(load_published, model)
    statistics = start_from_weights(args.init_from, load, checkpoint) if args.init_from else None
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
