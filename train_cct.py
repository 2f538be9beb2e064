"""Train a compact transformer (ViT-Lite, CVT, CCT) on small images.

    python train_cct.py --device cuda                  the CCT report's run: CCT-6/3x1, CIFAR-100, 200 epochs
    python train_cct.py --recipe strong --device cuda  the same model, trained better
    python train_cct.py --dataset shapes               drawn shapes, three minutes on two CPU cores

What a run writes to checkpoints/cct_6_3x1/ is listed in README.md.
"""

import time
from functools import partial

import torch
from torch.nn.functional import cross_entropy

from data import DATASETS, count_classes, dataset_of, describe
from errors import UserError, run_script
from models import build_model
from models.attention import ATTENTIONS
from models.cct import COMPACT_MODELS
from models.nano import NANO_MODELS
from models.pretrained import load_published
from models.summary import summarize
from pipeline.batches import evaluation_batches, training_batches
from pipeline.policies import POLICIES
from seeding import seed_for
from training.arguments import (
    check_model_flags,
    complete_arguments,
    fraction,
    given_arguments,
    make_parser,
    resumed_arguments,
)
from training.checkpoint import load_checkpoint, open_weights
from training.device import Precision, compiled_forward, device_name, memory_watched, pick_device
from training.interrupt import StopRequests, Watch
from training.loop import train_one_epoch, validate
from training.optimizer import make_average, make_optimizer, make_schedule
from training.outputs import count_parameters, write_split
from training.run import Run, choose_folder, finished_result, prepare_folder

REPORT = {
    "dataset": "cifar100",  # the report
    "model": "cct_6_3x1",  # the report
    "positional_embedding": "learnable",  # the authors' code
    "image_size": 32,  # the report
    "epochs": 200,  # the report
    "batch_size": 128,  # the authors' training script
    "lr": 5e-4,  # the authors' training script
    "weight_decay": 3e-2,  # the authors' training script
    "decay_all": True,  # so does it there
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
    "weight_decay": 0.05,
    "decay_all": False,
    "attn_drop": 0.0,
    "mixup": 0.8,  # this and cutmix: the authors' configuration for 300 epochs
    "cutmix": 1.0,
}
LIGHT = {"aa": "none", "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}  # of strong, in runs too short for more
RECIPES = {
    "report": REPORT,
    "strong": STRONG,
    "quick": STRONG | LIGHT | {"dataset": "shapes", "model": "cct_2_3x2", "epochs": 6},  # ours
}
SHORT = 50  # below so many epochs strong takes what is in LIGHT
MODEL_FLAGS = dict.fromkeys(
    COMPACT_MODELS, ("image_size", "positional_embedding", "attention", "drop", "attn_drop", "drop_path")
) | dict.fromkeys(NANO_MODELS, ("image_size", "attention", "attn_drop", "drop_path"))


def cct_parser():
    parser = make_parser(__doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODEL_FLAGS, metavar="NAME", help="%(choices)s (%(default)s)")
    model.add_argument(
        "--positional-embedding", choices=("learnable", "sine", "none"), help="what says where (%(default)s)"
    )
    model.add_argument("--init-from", metavar="FILE", help="start from the authors' weights, a state dict")
    model.add_argument("--attention", choices=ATTENTIONS, help="what mixes the tokens (%(default)s)")
    model.add_argument("--drop", type=fraction, metavar="P", help="dropout (%(default)s)")
    model.add_argument("--attn-drop", type=fraction, metavar="P", help="dropout of attention weights (%(default)s)")
    model.add_argument("--drop-path", type=fraction, metavar="P", help="of the last block, less before (%(default)s)")
    parser.set_defaults(attention="softmax", **REPORT)
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
    parser = cct_parser()
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
        if args.init_from and args.model not in COMPACT_MODELS:
            raise UserError(f"--init-from: there are no published weights of {args.model}")
    device = pick_device(args.device)
    precision = Precision(args.amp, device)
    print(f"recipe {args.recipe}: {args.dataset}, {args.epochs} epochs, batch {args.batch_size}, lr {args.lr:g}")
    print(f"{device_name(device)}, {precision.dtype}, torch {torch.__version__}")

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model_args = {name: getattr(args, name) for name in MODEL_FLAGS[args.model]}
    model_args["num_classes"] = count_classes(args.dataset, args.data_dir)
    model = build_model(args.model, **model_args).to(device)
    print(f"{args.model}, {count_parameters(model):,} parameters, {model.grid[0]} x {model.grid[1]} tokens")
    if args.init_from and not resuming:
        left = load_published(model, open_weights(args.init_from))
        print(f"weights of {args.init_from}, without {', '.join(left) or 'exception'}")
    if args.summary:
        print(summarize(model, (3, args.image_size, args.image_size)))
        return None

    # Data
    dataset = dataset_of(args)
    print(describe(dataset))
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
        script="train_cct.py",
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
