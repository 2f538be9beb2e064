"""The flags that all training scripts share, the types of their values, and the parser that explains them."""

import argparse
import difflib
import os
import re
from functools import partial

from errors import UserError, command_line
from training.values import at_least, epoch_and_count, fraction, number, pixels, positive, probability, seed

# what --help shows; --help-all shows every flag
ESSENTIAL = {
    *("help", "help_all", "recipe", "summary", "dataset", "data_dir", "image_size", "val_fraction", "aa"),
    *("epochs", "batch_size", "lr", "opt", "seed", "device", "run_name", "out_dir", "resume", "overwrite", "minutes"),
    *("model", "pretrained", "init_from", "patch_size", "embed_dim", "depth", "num_heads"),  # of the models
    *("attention", "freeze"),
}

# What a flag is; if not listed, a part of the run: a resumed run must agree with it, and so must results of one group
FLAG_KINDS = {
    # kept when a run is resumed, unless given again; left out of results
    **dict.fromkeys(("data_dir", "cache_dir", "device", "save_minutes", "save_epochs", "init_from"), "place"),
    **dict.fromkeys(("log", "log_steps", "sample_epochs", "on_nan"), "place"),
    # not kept when a run is resumed; left out of results
    **dict.fromkeys(("cache_gib", "workers", "profile", "fsdp", "sync_bn"), "machine"),
    # the same, and not allowed in a plan: they belong to one start
    **dict.fromkeys(("out_dir", "run_name", "resume", "overwrite", "minutes", "skip_test"), "start"),
    **dict.fromkeys(("summary", "help", "help_all"), "start"),
}


def flag_kind(name):
    """ "place", "machine" or "start" (see FLAG_KINDS), or "run" for a part of the run."""
    return FLAG_KINDS.get(name, "run")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Appends each flag's default to its help."""

    def _get_help_string(self, action):
        default = action.default
        if default in (None, argparse.SUPPRESS) or isinstance(action, argparse._StoreTrueAction):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {shown.replace('%', '%%') or 'none'})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, and no exit from a notebook."""

    def __init__(self, description=None, **options):
        formatter = partial(HelpFormatter, max_help_position=30)
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter, **options)

    def parse_known_args(self, args=None, namespace=None):  # parse_intermixed_args calls it, too
        argv = list(command_line() if args is None else args)
        for text in argv:
            if re.fullmatch("--[^=]+=--", text):  # argparse would make an empty list of it
                self.error(f"argument {text[:-3]}: expected a value, not --")
            value = text.partition("=")[2] if text.startswith("--") else text
            longest = max(len(os.fsencode(part)) for part in value.split("/"))
            if longest > 255 or set(text) & set("\n\r\0"):  # no name of a file
                self.error(f"argument {text[:40]!r} is too long, or holds a line break")
        return super().parse_known_args(argv, namespace)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        raise UserError(message + (f"; did you mean {close[0]}?" if close else ""))

    def check_values(self, values):
        """Raises UserError for a value, by its flag, that the command line would not have taken."""
        argv = []
        for action in self._actions:
            value, needed = values.get(action.dest), action.nargs is None and action.default is not None
            if isinstance(value, list) and action.nargs:
                argv += [action.option_strings[0], *map(str, value)]
            elif action.nargs != 0 and (value is not None or needed):
                text = "x".join(map(str, value)) if isinstance(value, list) else value  # --image-size 32x64
                text = "none" if text is None else text  # --clip-grad none
                argv.append(f"{action.option_strings[0]}={text}")
        self.parse_args(argv)


class TrainingParser(Parser):
    """A parser of many flags whose help shows the ESSENTIAL ones."""

    def __init__(self, script, description):
        super().__init__(description, prog=script, add_help=False, usage="python %(prog)s [FLAGS]")

    def help_text(self, *, everything):
        """The help as text, of all flags or of the ESSENTIAL ones."""
        left_out = [action for action in self._actions if not everything and action.dest not in ESSENTIAL]
        for action in left_out:
            action.help = argparse.SUPPRESS
        return self.format_help() + (f"\n{len(left_out)} more flags: --help-all\n" if left_out else "")


def make_parser(script, description, *, recipes, datasets, policies):
    """A TrainingParser with the flags of every training script; the script (its file) adds those of its model.

    recipes, datasets and policies (of augmentation) are the names that --recipe, --dataset and --aa accept.
    """
    parser = TrainingParser(script, description)
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show the flags that most users set")
    add("--help-all", action="store_true", help="show all flags")
    add("--recipe", choices=recipes, metavar="NAME", help=f"a set of defaults: {', '.join(recipes)}")
    add("--summary", action="store_true", help="print the model, draw the schedule, and stop")
    add_data_flags(parser.add_argument_group("images"), datasets)
    add_augmentation_flags(parser.add_argument_group("augmentation, random for every image"), policies)
    add_optimizer_flags(parser.add_argument_group("training"))
    add_schedule_flags(parser.add_argument_group("schedule and regularisation"))
    add_run_flags(parser.add_argument_group("the run and its folder"))
    return parser


def add_data_flags(group, datasets):
    add = group.add_argument
    add("--dataset", choices=datasets, metavar="NAME", help=", ".join(datasets))
    add("--data-dir", metavar="DIR", help="where the images are, or are downloaded to (default: datasets)")
    add("--dataset-name", metavar="NAME", help="what results call your folder (default: the folder's name)")
    help_text = "resize images, to a square or to HEIGHTxWIDTH; above 64, squares of folders are cropped"
    add("--image-size", type=pixels, metavar="PIXELS", help=help_text)
    add("--channels", type=int, choices=(1, 3), default=3, metavar="N", help="1 reads a folder in grey, 3 in colour")
    help_text = "side of the square cut from the centre of a large test image, as a share of its short side"
    add("--crop-pct", type=number(above=0, high=1), metavar="F", default=0.875, help=help_text)
    help_text = "validate on this share of training images; test at the end"
    add("--val-fraction", type=fraction, metavar="F", default=0.0, help=help_text)
    help_text = "share of the images that become the test set, if a folder has no test/"
    add("--test-fraction", type=number(above=0, below=1), metavar="F", default=0.2, help=help_text)
    add("--train-per-class", type=at_least(1), metavar="N", help="train on only N images per class")
    add("--group-by", metavar="REGEX", help="files in which it finds the same text are kept in one split")
    add("--folds", type=at_least(2), metavar="K", help="cross-validate: test on fold number SEED mod K of a folder")
    add("--split-seed", type=seed, metavar="N", default=0, help="change it to draw other splits")
    add("--cache-dir", metavar="DIR", help="where decoded folders are kept (default: the user's cache folder)")
    help_text = "memory for large images; less if the machine swaps (default: a quarter of what is free)"
    add("--cache-gib", type=at_least(0, float), metavar="GIB", help=help_text)
    help_text = "processes that decode images if memory does not hold them (default: one per core, 16 at most)"
    add("--workers", type=at_least(0), metavar="N", help=help_text)


def add_augmentation_flags(group, policies):
    add = group.add_argument
    add("--hflip", type=probability, metavar="P", default=0.5, help="mirror; 0 if left and right matter, as in digits")
    add("--crop-padding", type=at_least(0), metavar="PIXELS", default=0, help="shift by up to this many pixels")
    help_text = "area of a random resized crop; narrow it if objects are small"
    add("--scale", type=positive, nargs=2, metavar=("MIN", "MAX"), help=help_text)
    add("--ratio", type=positive, nargs=2, metavar=("MIN", "MAX"), help="width / height of that crop")
    add("--rotate", type=at_least(0, float), metavar="DEGREES", default=0.0, help="rotate by up to this angle")
    help_text = f"none, {', '.join(policies)}: a policy of augmentation, for long runs that overfit"
    add("--aa", choices=("none", *policies), default="none", metavar="NAME", help=help_text)
    add("--fill", type=number(int, low=0, high=255), default=0, help="grey level that --aa and --rotate uncover")
    add("--reprob", type=probability, metavar="P", default=0.0, help="erase a random rectangle, in long runs")
    add("--cutout", type=at_least(0), metavar="PIXELS", default=0, help="erase a random square of this side")
    add("--mixup", type=at_least(0, float), metavar="ALPHA", default=0.0, help="blend pairs of images, in long runs")
    help_text = "paste a box of another image; with --mixup, one or the other for each batch"
    add("--cutmix", type=at_least(0, float), metavar="ALPHA", default=0.0, help=help_text)
    add("--extra-data", metavar="DIR", help="class folders of generated images (see generate.py) to mix in")
    add("--extra-fraction", type=number(above=0, high=1), metavar="F", default=0.5, help="their share of each batch")


def add_optimizer_flags(group):
    add = group.add_argument
    add("--epoch-images", type=at_least(1), metavar="N", help="images of an epoch of webdataset's shards")
    add("--epochs", type=at_least(1), metavar="N", help="more are slower and better; 2 give a first look")
    add("--batch-size", type=at_least(1), metavar="N", help="halve it, and --lr with it, if memory runs out")
    add("--lr", type=positive, help="peak learning rate; lower it if the loss explodes")
    help_text = "sgd, adam, adamw or muon, which learns most in few epochs"
    add("--opt", choices=("sgd", "adam", "adamw", "muon"), default="adamw", metavar="NAME", help=help_text)
    help_text = "check a new block: can it learn N training images by heart? Without augmentation and dropout"
    add("--overfit", type=at_least(1), metavar="N", help=help_text)
    add("--seed", type=seed, metavar="N", default=0, help="seed of weights, order, augmentation and dropout")
    add("--device", metavar="NAME", help="cuda, cuda:1, mps or cpu (default: the first available)")
    help_text = "mixed precision; auto takes the type that the device is fast at, off is float32"
    add("--amp", choices=("auto", "bf16", "fp16", "tf32", "off"), default="auto", help=help_text)
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on a GPU, in long runs")
    add("--momentum", type=fraction, default=0.9, help="momentum of sgd")
    add("--opt-betas", type=fraction, nargs=2, metavar="B", default=[0.9, 0.999], help="of adam and adamw")
    add("--opt-eps", type=positive, metavar="E", default=1e-8, help="of adam and adamw")
    add("--weight-decay", type=at_least(0, float), metavar="W", help="raise it if the model overfits")
    add("--decay-all", action=argparse.BooleanOptionalAction, help="also decay biases, normalisation and embeddings")
    help_text = "batches per update of the weights: K, or by epoch from 0, as 0:8 10:4; saves memory"
    add("--accumulate", type=epoch_and_count, nargs="+", metavar="K", default=["1"], help=help_text)
    help_text = "auto scales the recipe's --lr to the batch: linearly for sgd, by the square root for the others"
    add("--lr-scale", choices=("none", "auto"), default="none", help=help_text)
    help_text = "skip an epoch's last batch if it is not full: BatchNorm suffers from a small one"
    add("--drop-last", action=argparse.BooleanOptionalAction, default=False, help=help_text)


def add_schedule_flags(group):
    add = group.add_argument
    add("--sched", choices=("multistep", "cosine", "onecycle"), help="steps down, warm-up and cosine, or one cycle")
    help_text = "epochs after which multistep lowers the learning rate (default: 5/8 and 15/16 of all)"
    add("--milestones", type=at_least(1), nargs="+", metavar="EPOCH", help=help_text)
    add("--gamma", type=positive, default=0.1, help="factor by which multistep lowers it")
    help_text = "length of cosine's warm-up; raise it if the first epochs diverge (default: a tenth)"
    add("--warmup-epochs", type=at_least(0, float), metavar="EPOCHS", help=help_text)
    add("--div-factor", type=positive, metavar="F", default=25.0, help="onecycle starts at the peak divided by this")
    add("--smoothing", type=fraction, default=0.0, help="label smoothing")
    add("--class-weights", choices=("none", "balanced"), default="none", help="balanced: rare classes weigh more")
    add("--model-ema-decay", type=fraction, metavar="D", default=0.0, help="evaluate averaged weights, say 0.999")
    help_text = "after this share of the epochs, evaluate the mean of the weights after each epoch (SWA)"
    add("--swa-start", type=fraction, metavar="F", default=0.0, help=help_text)
    help_text = "constant learning rate from --swa-start on (default: the schedule's at that time)"
    add("--swa-lr", type=positive, metavar="LR", help=help_text)
    help_text = "limit the gradient's norm, say to 1, if the loss jumps; none: do not"
    add("--clip-grad", type=number(above=0, optional=True), metavar="NORM", help=help_text)
    add("--clip-value", type=positive, metavar="V", help="limit each element of the gradient")
    add("--on-nan", choices=("stop", "skip", "rollback"), default="stop", help="what to do if the loss is not finite")
    add("--patience", type=at_least(1), metavar="N", help="stop after N epochs without a better validation accuracy")


def add_run_flags(group):
    add = group.add_argument
    add("--run-name", metavar="NAME", help="write to OUT_DIR/NAME (default: the model's name)")
    add("--out-dir", metavar="DIR", default="checkpoints", help="where runs are written, say a mounted drive")
    add("--resume", metavar="RUN", help="a run's folder to resume; auto: resume if it exists, else start it")
    add("--overwrite", action="store_true", help="replace a run of the same name")
    add("--minutes", type=positive, metavar="M", help="save and stop after M minutes, say before Colab ends")
    add("--skip-test", action="store_true", help="leave the test set shut: choose on validation images first")
    add("--save-minutes", type=positive, metavar="M", default=10.0, help="save within an epoch every M minutes")
    add("--save-epochs", type=at_least(1), nargs="*", metavar="N", default=[], help="keep these epochs' checkpoints")
    add("--deterministic", action="store_true", help="the same bits in each run on a GPU, too; slower")
    add("--fsdp", action="store_true", help="with torchrun: divide weights and optimiser among GPUs (FSDP2)")
    add("--sync-bn", action="store_true", help="with torchrun: BatchNorm sees the whole batch")
    add("--log", choices=("tensorboard", "wandb", "trackio"), nargs="*", default=[], help="log to these as well")
    add("--log-steps", action="store_true", help="log each step as well, to steps.csv and to those of --log")
    add("--profile", action="store_true", help="also write where the time of ten steps goes")
