"""The flags that all training scripts share, in groups, and how recipes, a resumed run and the command line combine."""

import argparse

from errors import UserError

# what may differ between a run and its resumption; every other flag is part of what the run is
FREE_FLAGS = (
    "data_dir",
    "cache_dir",
    "cache_gib",
    "workers",
    "out_dir",
    "run_name",
    "resume",
    "overwrite",
    "device",
    "minutes",
    "save_minutes",
    "save_epochs",
    "patience",
    "summary",
    "profile",
)
NOT_GIVEN = object()


def make_parser(description, *, recipes, datasets, policies):
    """A parser with the flags of every training script; the script adds those of its model.

    recipes, datasets and policies (of augmentation) are the names that --recipe, --dataset and --aa take.
    """
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=recipes, help="which defaults to take; any flag overrides them")
    parser.add_argument("--summary", action="store_true", help="print the model layer by layer, and train nothing")

    data = parser.add_argument_group("images")
    data.add_argument(
        "--dataset", choices=datasets, help="shapes needs no download; folder is a folder of class folders"
    )
    data.add_argument("--data-dir", help="where the images are, or are downloaded to (datasets)")
    data.add_argument("--dataset-name", help="what results call a folder (its own name)")
    data.add_argument(
        "--image-size",
        type=at_least(1),
        metavar="PIXELS",
        help="resize images to this; above 64 cut a folder's (%(default)s)",
    )
    data.add_argument(
        "--crop-pct",
        type=share,
        metavar="F",
        help="what the square cut from a large test image is of its short side (%(default)s)",
    )
    data.add_argument(
        "--val-fraction", type=fraction, metavar="F", help="split F of the training images off, to choose by"
    )
    data.add_argument(
        "--test-fraction", type=positive_fraction, metavar="F", help="of a folder without test/ (%(default)s)"
    )
    data.add_argument("--split-seed", type=at_least(0), help="decides both splits (%(default)s)")
    data.add_argument("--cache-dir", help="where decoded folders are kept (the user's cache folder)")
    data.add_argument(
        "--cache-gib",
        type=at_least(0, float),
        metavar="GIB",
        help="of large images in memory (a quarter of the free)",
    )
    data.add_argument(
        "--workers", type=at_least(0), metavar="N", help="processes that decode larger sets (one a core, 16 at most)"
    )

    augment = parser.add_argument_group("augmentation, another draw for every image")
    augment.add_argument(
        "--hflip", type=probability, metavar="P", help="mirror an image; 0 where left and right matter (%(default)s)"
    )
    augment.add_argument(
        "--crop-padding", type=at_least(0), metavar="PIXELS", help="shift by up to so many pixels (%(default)s)"
    )
    augment.add_argument(
        "--scale", type=positive, nargs=2, metavar=("MIN", "MAX"), help="area of a random resized crop (%(default)s)"
    )
    augment.add_argument(
        "--ratio", type=positive, nargs=2, metavar=("MIN", "MAX"), help="its width / height (%(default)s)"
    )
    augment.add_argument(
        "--rotate", type=at_least(0, float), metavar="DEGREES", help="turn by up to so many (%(default)s)"
    )
    augment.add_argument(
        "--aa",
        choices=("none", *policies),
        help="AutoAugment's policy for CIFAR-10, RandAugment or TrivialAugment (%(default)s)",
    )
    augment.add_argument("--fill", type=between(0, 255), help="the grey that --aa and --rotate uncover (%(default)s)")
    augment.add_argument("--reprob", type=probability, metavar="P", help="erase a random rectangle (%(default)s)")
    augment.add_argument("--cutout", type=at_least(0), metavar="PIXELS", help="erase a random square (%(default)s)")
    augment.add_argument(
        "--mixup", type=at_least(0, float), metavar="ALPHA", help="blend pairs of images, for long runs (%(default)s)"
    )
    augment.add_argument(
        "--cutmix",
        type=at_least(0, float),
        metavar="ALPHA",
        help="paste a box of another image; with --mixup, either for every second batch (%(default)s)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=at_least(1), help="(%(default)s)")
    training.add_argument("--batch-size", type=at_least(1), help="(%(default)s)")
    training.add_argument(
        "--drop-last",
        action=argparse.BooleanOptionalAction,
        help="leave out an epoch's last batch where it is not full: BatchNorm suffers from a small one (%(default)s)",
    )
    training.add_argument(
        "--lr", type=positive, help="peak learning rate; lower it if the loss is not finite (%(default)s)"
    )
    training.add_argument(
        "--opt",
        choices=("sgd", "adam", "adamw", "muon"),
        help="muon learns more in few epochs, and costs more a step (%(default)s)",
    )
    training.add_argument("--momentum", type=fraction, help="of sgd (%(default)s)")
    training.add_argument("--opt-betas", type=fraction, nargs=2, metavar="B", help="of adam and adamw (%(default)s)")
    training.add_argument("--opt-eps", type=positive, metavar="E", help="of adam and adamw (%(default)s)")
    training.add_argument("--weight-decay", type=at_least(0, float), help="(%(default)s)")
    training.add_argument(
        "--decay-all", action=argparse.BooleanOptionalAction, help="decay biases, norms and embeddings too"
    )
    training.add_argument("--sched", choices=("multistep", "cosine", "onecycle"), help="(%(default)s)")
    training.add_argument(
        "--milestones", type=at_least(1), nargs="+", metavar="EPOCH", help="where multistep falls (5/8 and 15/16)"
    )
    training.add_argument("--gamma", type=positive, help="by how much it falls (%(default)s)")
    training.add_argument(
        "--warmup-epochs", type=at_least(0, float), metavar="EPOCHS", help="of cosine (a tenth of all)"
    )
    training.add_argument(
        "--div-factor", type=positive, metavar="F", help="onecycle starts from the peak over F (%(default)s)"
    )
    training.add_argument("--smoothing", type=fraction, help="of the labels (%(default)s)")
    training.add_argument(
        "--model-ema-decay", type=fraction, metavar="D", help="judge an average of the weights, say 0.999 (%(default)s)"
    )
    training.add_argument("--clip-grad", type=positive, metavar="NORM", help="limit the gradient's norm, say to 1")
    training.add_argument(
        "--patience", type=at_least(1), metavar="N", help="stop after N epochs without a better validation accuracy"
    )
    training.add_argument(
        "--compile", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU, in long runs (%(default)s)"
    )
    training.add_argument("--seed", type=at_least(0), help="of weights, order, augmentation and dropout (%(default)s)")
    training.add_argument("--device", help="cuda, cuda:1, mps or cpu (the first there is)")
    training.add_argument(
        "--amp", choices=("auto", "bf16", "fp16", "off"), help="mixed precision; off is float32 or TF32 (%(default)s)"
    )

    run = parser.add_argument_group("the run's folder")
    run.add_argument("--run-name", metavar="NAME", help="write to OUT_DIR/NAME (the model's name)")
    run.add_argument("--out-dir", help="where runs are written, say a mounted drive (%(default)s)")
    run.add_argument(
        "--resume", metavar="RUN", help="a run's folder to go on with; auto: if it is there, else start it"
    )
    run.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    run.add_argument(
        "--save-epochs", type=at_least(1), nargs="*", metavar="EPOCH", help="keep the checkpoints after these epochs"
    )
    run.add_argument(
        "--save-minutes", type=positive, metavar="M", help="save within an epoch every M minutes (%(default)s)"
    )
    run.add_argument("--profile", action="store_true", help="also write where the time of ten steps goes")
    run.add_argument("--minutes", type=positive, metavar="M", help="save and stop after M minutes; --resume goes on")
    parser.set_defaults(
        crop_pct=0.875,
        test_fraction=0.2,
        split_seed=0,
        val_fraction=0.0,
        hflip=0.5,
        crop_padding=0,
        rotate=0.0,
        aa="none",
        fill=0,
        reprob=0.0,
        cutout=0,
        mixup=0.0,
        cutmix=0.0,
        opt="adamw",
        momentum=0.9,
        opt_betas=[0.9, 0.999],
        opt_eps=1e-8,
        div_factor=25.0,
        drop_last=False,
        smoothing=0.0,
        model_ema_decay=0.0,
        seed=0,
        amp="auto",
        compile="auto",
        out_dir="checkpoints",
        save_minutes=10.0,
        save_epochs=[],
    )
    return parser


def given_arguments(parser, argv):
    """The flags on the command line alone, as a dict, without any default."""
    everything = parser.parse_args([])
    blank = argparse.Namespace(**dict.fromkeys(vars(everything), NOT_GIVEN))
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not NOT_GIVEN}


def complete_arguments(parser, given, recipe):
    """All arguments: the parser's defaults, overridden by the recipe's, overridden by those given. Raises UserError."""
    args = argparse.Namespace(**{**vars(parser.parse_args([])), **recipe, **given})
    for name in ("scale", "ratio"):
        low, high = getattr(args, name) or (0, 1)
        if low > high:
            raise UserError(f"--{name} {low} {high}: the first must not be above the second")
    if args.scale and args.scale[1] > 1:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: a crop cannot be larger than the image (1)")
    if args.dataset == "folder" and not args.data_dir:
        raise UserError("--dataset folder needs --data-dir, the folder of class folders")
    args.data_dir = args.data_dir or "datasets"
    return args


def check_model_flags(given, model_flags, model):
    """Raises UserError for a flag given that only other models take; model_flags is {model: the flags that it takes}.

    --image-size is one of the images, too, and fits every model.
    """
    for name in given.keys() - {"image_size"}:
        takers = [other for other, flags in model_flags.items() if name in flags]
        if takers and model not in takers:
            raise UserError(f"--{name.replace('_', '-')}: {model} does not take it")


def resumed_arguments(given, checkpoint, folder, *, models):
    """The arguments of a checkpoint, with those of `given` that may change. Raises UserError that names what may not.

    models are the names of those that the script can train.
    """
    if checkpoint["model"] not in models:
        raise UserError(
            f"--resume {folder}: the model there is {checkpoint['model']}, which this script does not train"
        )
    saved = checkpoint["args"]
    different = [
        f"--{name.replace('_', '-')} is {saved.get(name)} there and {value} here"
        for name, value in given.items()
        if name not in FREE_FLAGS and saved.get(name) != value
    ]
    if different:
        raise UserError(f"--resume {folder} is another run: {'; '.join(different)}")
    changed = {name: value for name, value in given.items() if name in FREE_FLAGS}
    limits = dict.fromkeys(("minutes", "cache_gib", "workers"))  # they are a sitting's and a machine's, not the run's
    return argparse.Namespace(**{**saved, **limits, **changed})


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, and no exit from a notebook."""

    def error(self, message):
        raise UserError(message)


def at_least(low, kind=int):
    """A flag's type: a number not below low."""

    def convert(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type by it
    return convert


def between(low, high):
    """A flag's type: a whole number from low to high."""

    def convert(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    convert.__name__ = "int"
    return convert


def fraction(text):
    """A flag's type: a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def positive(text):
    """A flag's type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def positive_fraction(text):
    positive(text)
    return fraction(text)


def share(text):
    """A flag's type: a number above 0, up to 1."""
    positive(text)
    return probability(text)


def probability(text):
    """A flag's type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value
