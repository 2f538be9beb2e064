"""How the defaults, a recipe, the command line and a resumed run combine to the arguments of a run."""

import argparse
import math
import time
from typing import NamedTuple

from errors import UserError
from training.checkpoint import image_shape, load_checkpoint
from training.flags import flag_kind
from training.folder import choose_folder, finished_result
from training.loop import batches_per_step
from training.ranks import from_first_rank, join_ranks
from training.values import is_own_class

HEADLESS = ("none", "identity", "depthwise", "sagan", "simple")  # --attention without heads
# {flag: (when it has an effect, what it needs)}; given without that, it is refused
EFFECT_CONDITIONS = {
    **dict.fromkeys(("milestones", "gamma"), (lambda args: args.sched == "multistep", "--sched multistep")),
    "warmup_epochs": (lambda args: args.sched == "cosine", "--sched cosine"),
    "div_factor": (lambda args: args.sched == "onecycle", "--sched onecycle"),
    "momentum": (lambda args: args.opt == "sgd" and args.sched != "onecycle", "--opt sgd, without --sched onecycle"),
    **dict.fromkeys(("opt_betas", "opt_eps"), (lambda args: args.opt in ("adam", "adamw"), "--opt adam or adamw")),
    "ratio": (lambda args: args.scale, "--scale"),
    "swa_lr": (lambda args: args.swa_start, "--swa-start"),
    "fill": (lambda args: args.aa != "none" or args.rotate, "--aa or --rotate"),
    "test_fraction": (lambda args: args.dataset == "folder" and not args.folds, "--dataset folder, without --folds"),
    **dict.fromkeys(("folds", "group_by"), (lambda args: args.dataset == "folder", "--dataset folder")),
    "channels": (lambda args: args.dataset in ("folder", "webdataset") or args.channels == 3, "--dataset folder"),
    "extra_fraction": (lambda args: args.extra_data, "--extra-data"),
    "label_drop": (lambda args: args.model == "ddpm", "--model ddpm"),
    "gan_loss": (lambda args: args.model == "acgan", "--model acgan"),
    "epoch_images": (lambda args: args.dataset == "webdataset", "--dataset webdataset"),
    **dict.fromkeys(
        ("overfit", "val_fraction", "class_weights", "extra_data", "train_per_class"),
        (lambda args: args.dataset != "webdataset", "images that are not in shards"),
    ),
    **dict.fromkeys(("attention_after", "attention_in"), (lambda args: args.attention != "none", "--attention")),
    "attention_gamma": (lambda args: args.attention not in HEADLESS, "--attention graph, graph_v2 or classic"),
    "num_heads": (lambda args: args.attention not in HEADLESS, "an --attention with heads"),
    "attn_drop": (lambda args: args.attention not in ("identity", "depthwise"), "an --attention with weights"),
}
# what --overfit leaves out, unless it is given: what makes it harder to learn images by heart
WITH_OVERFIT = {
    **dict.fromkeys(("hflip", "rotate", "crop_padding", "reprob", "cutout", "mixup", "cutmix", "smoothing"), 0),
    **dict.fromkeys(("drop", "attn_drop", "drop_path", "weight_decay", "model_ema_decay", "swa_start"), 0),
    "val_fraction": 0,
    **{"aa": "none", "scale": None},
}


class Start(NamedTuple):
    """What start_run found out. `args` is None if there is nothing to train; then `result` is what main returns."""

    script: str
    model_flags: dict
    args: argparse.Namespace | None = None
    folder: object = None
    checkpoint: dict | None = None  # of the run to resume
    result: dict | None = None
    began: float = 0.0  # time.monotonic() when the script began, from which --minutes count

    def model_args(self, num_classes, *, plain=False):
        """The keyword arguments of the model that the flags ask for; plain ones are those that a checkpoint holds."""
        names = self.model_flags[self.args.model.partition(":")[0]]  # timm:NAME is of the family timm
        grey = {"in_channels": self.args.channels} if self.args.channels != 3 else {}
        model_args = {name: getattr(self.args, name) for name in names} | grey | {"num_classes": num_classes}
        if plain or not is_own_class(model_args.get("attention")):
            return model_args
        from training.own import with_own_class  # only if it is asked for

        return with_own_class(model_args, model_args["attention"])

    def input_shape(self):
        """(C, H, W) of an image."""
        return image_shape(self.args.channels, self.args.image_size)


def start_run(parser, argv, *, chosen_recipe, model_flags):
    """Read the command line (argv, or the process's own): a Start, with all arguments of a new or a resumed run.

    chosen_recipe(given) gives a recipe's name and its defaults; model_flags is {model: the flags that it accepts}.
    Raises UserError for a mistake on the command line, before anything is written.
    """
    began = time.monotonic()
    given = given_arguments(parser, argv)
    recipe, defaults = chosen_recipe(given)
    start = Start(parser.prog, model_flags, began=began)
    if given.get("help") or given.get("help_all"):
        parser.set_defaults(**defaults, recipe=recipe)
        print(parser.help_text(everything="help_all" in given))
        return start
    model = given.get("model", defaults["model"])
    if model.partition(":")[0] not in model_flags:
        raise UserError(f"--model {model}: choose from {', '.join(model_flags)}")
    names = {"default_name": model.replace(":", "-"), "default_dir": parser.get_default("out_dir")}
    join_ranks()
    folder, resuming = from_first_rank(choose_folder, given, **names)
    if not resuming:
        args = complete_arguments(parser, given | {"recipe": recipe}, defaults)
        check_effects(given, args)
        check_model_flags(given, model_flags, args.model)
        return start._replace(args=args, folder=folder)
    checkpoint = load_checkpoint(folder)
    if checkpoint["model"].partition(":")[0] not in model_flags:
        raise UserError(f"--resume {folder}: {start.script} does not train the model there, {checkpoint['model']}")
    args = resumed_arguments(parser, given, checkpoint, folder)
    if result := finished_result(folder, checkpoint["epoch"], skip_test=given.get("skip_test")):
        return start._replace(result=result)
    return start._replace(args=args, folder=folder, checkpoint=checkpoint)


def given_arguments(parser, argv):
    """The flags on the command line alone, as a dict, without any default."""
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), argparse.SUPPRESS))
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value != argparse.SUPPRESS}


def complete_arguments(parser, given, recipe):
    """All arguments: the parser's defaults, overridden by the recipe's, overridden by those given. Raises UserError."""
    defaults = vars(parser.parse_args([]))
    changes = {name: value for name, value in WITH_OVERFIT.items() if name in defaults and given.get("overfit")}
    args = argparse.Namespace(**{**defaults, **recipe, **changes, **given})
    for name in ("scale", "ratio"):
        low, high = getattr(args, name) or (0, 1)
        if low > high:
            raise UserError(f"--{name} {low} {high}: the first must not be above the second")
    if args.scale and args.scale[1] > 1:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: a crop cannot be larger than the image (1)")
    if args.dataset == "folder" and not args.data_dir:
        raise UserError("--dataset folder needs --data-dir, the folder of class folders")
    if args.dataset == "webdataset" and not (args.epoch_images and args.data_dir and isinstance(args.image_size, int)):
        raise UserError("--dataset webdataset needs --data-dir, --epoch-images and a square --image-size")
    if len({text.rpartition(":")[0] for text in args.accumulate}) < len(args.accumulate):
        raise UserError(f"--accumulate {' '.join(args.accumulate)}: two numbers of batches for one epoch")
    args.data_dir = args.data_dir or "datasets"
    if args.lr_scale == "auto":
        args.lr = scaled_rate(args, given, recipe)
    return args


def scaled_rate(args, given, recipe):
    """The recipe's learning rate for the batch size that the flags ask for. Raises UserError if they contradict it.

    Proportional to the batch for sgd (Goyal et al. 2017), to its square root for the others (Krizhevsky 2014).
    """
    if "lr" in given:
        raise UserError("--lr-scale auto and --lr exclude each other: the one computes what the other gives")
    if len(args.accumulate) > 1:
        raise UserError(f"--lr-scale auto needs one batch size; --accumulate {' '.join(args.accumulate)} has several")
    batch = args.batch_size * batches_per_step(args.accumulate, 0)
    ratio = batch / recipe["batch_size"]
    how, factor = ("", ratio) if args.opt == "sgd" else ("the square root of ", math.sqrt(ratio))
    rate = recipe["lr"] * factor
    print(f"lr {rate:.3g}: the recipe's {recipe['lr']:g} times {how}{batch}/{recipe['batch_size']}")
    return rate


def as_flag(name):
    return f"--{name.replace('_', '-')}"


def check_effects(given, args):
    """Raises UserError for a flag that has no effect with the other values."""
    for name in given:
        has_effect, needed = EFFECT_CONDITIONS.get(name, (None, None))
        if needed and not has_effect(args):
            raise UserError(f"{as_flag(name)} has no effect here: it needs {needed}")


def check_model_flags(given, model_flags, model):
    """Raises UserError for a flag given that only other models accept; model_flags is {model: the flags it accepts}.

    --image-size is a flag of the images as well, and fits every model.
    """
    for name in given:
        users = [other for other, flags in model_flags.items() if name in flags]
        if users and model.partition(":")[0] not in users and name != "image_size":
            raise UserError(f"{as_flag(name)}: {model} does not take it")


def resumed_arguments(parser, given, checkpoint, folder):
    """The arguments of a checkpoint, changed by those of `given` that may change.

    Arguments that are newer than the checkpoint take their defaults. Raises UserError for one that may not change.
    """

    def kind(name):
        in_order = name == "workers" and checkpoint["args"]["dataset"] == "webdataset"  # its order depends on them
        return "run" if in_order else flag_kind(name)

    saved = {name: value for name, value in checkpoint["args"].items() if kind(name) in ("run", "place")}
    saved = vars(parser.parse_args([])) | saved
    if is_own_class(saved.get("attention")):
        from training.own import confirmed_attention  # only if it is asked for

        saved["attention"] = confirmed_attention(saved["attention"], given.get("attention"), f"--resume {folder}")
    parser.check_values(saved)
    different = [
        f"{as_flag(name)} is {saved[name]} there and {value} here"
        for name, value in given.items()
        if kind(name) == "run" and saved[name] != value
    ]
    if different:
        if "epochs" in given and "init_from" in saved:
            different.append(f"to train its weights for longer, start a new run, its flags and --init-from {folder}")
        raise UserError(f"--resume {folder} is another run: {'; '.join(different)}")
    return argparse.Namespace(**saved | {name: value for name, value in given.items() if kind(name) != "run"})
