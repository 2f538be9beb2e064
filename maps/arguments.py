"""What rollout.py and attribute.py ask alike: which checkpoint, which images, how to draw, what to measure."""

import argparse
from pathlib import Path

from errors import UserError
from files import make_folder
from maps.images import checkpoint_dataset, chosen_images, photographs
from models import build_model
from training.arguments import Parser, at_least, between
from training.checkpoint import load_checkpoint, rebuild_model
from training.device import pick_device


def explaining_parser(description, methods, *, default):
    """A parser with the flags of both scripts, --method being one of methods, default or all; each adds its own."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run's folder, or a checkpoint in it")
    parser.add_argument("--which", help="which of the folder's checkpoints: last, best, epoch-10 (last)")
    parser.add_argument("--index", type=int, nargs="+", metavar="N", help="images of the test set (0 1 2 3)")
    parser.add_argument("--image", type=Path, nargs="+", metavar="FILE", help="photographs, of any size")
    parser.add_argument("--method", choices=(*methods, "all"), help=f"({default}; with --evaluate all)")
    parser.add_argument("--data-dir", help="where the images are now (where they were)")
    parser.add_argument("--cache-dir", help="where decoded folders are kept (the user's cache folder)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (the first there is)")

    drawing = parser.add_argument_group("the drawing")
    drawing.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (maps/ in the run's folder)")
    drawing.add_argument("--interpolation", choices=("bilinear", "nearest"), default="bilinear", help="(bilinear)")
    drawing.add_argument("--format", choices=("png", "pdf"), default="png", help="(png)")
    drawing.add_argument("--dpi", type=between(20, 1200), default=150, help="from 20 to 1200 (150)")

    measuring = parser.add_argument_group("the measure")
    measuring.add_argument("--evaluate", action="store_true", help="score the methods on test images, draw none")
    measuring.add_argument("--num-images", type=at_least(2), default=1000, metavar="N", help="how many of them (1000)")
    measuring.add_argument("--batch-size", type=at_least(1), default=100, help="of them at once (100)")
    return parser


def chosen_methods(args, methods, *, default):
    """The names of the methods to use, of all `methods`."""
    name = args.method or ("all" if args.evaluate else default)
    return tuple(methods) if name == "all" else (name,)


def open_for_explaining(args):
    """(checkpoint, model, the chosen images, None) to draw, or (checkpoint, model, None, the dataset) to evaluate."""
    device = pick_device(args.device)
    if args.which and args.checkpoint.is_file():
        raise UserError(f"--which {args.which} is for a run's folder, and {args.checkpoint} is a checkpoint")
    checkpoint = load_checkpoint(args.checkpoint, which=args.which or "last", device=device)
    model = rebuild_model(checkpoint, build_model).to(device)
    if args.image and not args.evaluate:
        return checkpoint, model, photographs(args.image, checkpoint), None
    dataset = checkpoint_dataset(checkpoint, data_dir=args.data_dir, cache_dir=args.cache_dir)
    if args.evaluate:
        return checkpoint, model, None, dataset
    return checkpoint, model, chosen_images(dataset, args.index or range(min(4, len(dataset.test.labels)))), None


def output_folder(args):
    """--out, or maps/ beside the checkpoint. Raises UserError where it cannot be written."""
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    return make_folder(args.out or folder / "maps")
