"""What rollout.py and attribute.py share: flags, the checkpoint and images to open, the evaluation of a checkpoint."""

import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from errors import UserError, bar_disabled
from files import make_folder, write_atomically
from maps.draw import draw_deletion_curves
from maps.evaluate import baselines, evaluate
from maps.images import checkpoint_dataset, chosen_images, normalised, object_masks, photographs
from models import build_model
from training.checkpoint import load_checkpoint, rebuild_model
from training.device import Precision, is_memory_error, pick_device
from training.flags import Parser, at_least, number

SAME_EVALUATION = ("checkpoint", "model", "epoch", "data_hash", "images")  # if these agree, tables are merged


def maps_parser(description, methods, *, default):
    """A parser with the flags of both commands; --method is one of methods, or all."""
    parser = Parser(description)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run's folder or a checkpoint file")
    add("--which", help="a checkpoint of the folder: last, best, best_on_test, epoch-10 (default: last)")
    add("--index", type=int, nargs="+", metavar="N", help="test images to explain (default: 0 1 2 3)")
    add("--image", type=Path, nargs="+", metavar="FILE", help="explain photographs, of any size, instead")
    add("--method", choices=(*methods, "all"), help=f"(default: {default}; all with --evaluate)")
    add("--data-dir", metavar="DIR", help="where the images are, if they have moved since training")
    add("--cache-dir", metavar="DIR", help="where decoded folders are kept (default: the user's cache folder)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first available)")

    add = parser.add_argument_group("figures").add_argument
    add("--out", type=Path, metavar="DIR", help="where to write (default: maps/ in the run's folder)")
    help_text = "how maps are enlarged; nearest shows the patches"
    add("--interpolation", choices=("bilinear", "nearest"), default="bilinear", help=help_text)
    add("--format", choices=("png", "pdf"), default="png", help="pdf is sharp at any size, for a paper")
    add("--dpi", type=number(int, low=20, high=1200), default=150, help="resolution, from 20 to 1200")

    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="measure the methods on test images instead of drawing maps")
    help_text = "test images to evaluate; more give smaller standard errors"
    add("--num-images", type=at_least(2), default=1000, metavar="N", help=help_text)
    add("--batch-size", type=at_least(1), default=100, help="images per forward pass; lower it if memory runs out")
    return parser


def chosen_methods(args, methods, *, default):
    """The names of the methods to use, out of all `methods`."""
    name = args.method or ("all" if args.evaluate else default)
    return tuple(methods) if name == "all" else (name,)


def open_for_maps(args):
    """(checkpoint, model, chosen images, None) to draw, or (checkpoint, model, None, dataset) to evaluate."""
    device = pick_device(args.device)
    if args.which and args.checkpoint.is_file():
        raise UserError(f"--which {args.which} needs a run's folder, and {args.checkpoint} is a file")
    checkpoint = load_checkpoint(args.checkpoint, which=args.which or "last", device=device)
    model = rebuild_model(checkpoint, build_model).to(device)
    if args.image and not args.evaluate:
        return checkpoint, model, photographs(args.image, checkpoint), None
    dataset = checkpoint_dataset(checkpoint, data_dir=args.data_dir, cache_dir=args.cache_dir)
    if args.evaluate:
        return checkpoint, model, None, dataset
    return checkpoint, model, chosen_images(dataset, args.index or range(min(4, len(dataset.test.labels)))), None


def output_folder(args):
    """--out, or maps/ beside the checkpoint. Raises UserError if it cannot be written."""
    folder = args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent
    return make_folder(args.out or folder / "maps")


def scores_text(table):
    """A table of evaluate as aligned text: mean ± standard error."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row))
    lines = [["", *measures]]
    for name, row in table.items():
        lines.append([name, *("{:.3f} ± {:.3f}".format(*row[m]) if m in row else "-" for m in measures)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def evaluate_checkpoint(args, checkpoint, model, dataset, explainers, out):
    """Evaluate explainers (see evaluate) and the baselines on --num-images images, evenly spread over the test set.

    Prints the table and writes evaluation.json and deletion.png to out; their paths are returned. Rows of an earlier
    evaluation of the same checkpoint on the same images are kept.
    """
    total = len(dataset.test.labels)
    indices = torch.linspace(0, total - 1, min(args.num_images, total)).round().long()
    masks, outlines = object_masks(checkpoint, dataset, indices)
    device = next(model.parameters()).device

    def batches():
        for chunk in tqdm(indices.split(args.batch_size), "evaluating", disable=bar_disabled(), unit="batch"):
            yield normalised(dataset.test.images[chunk], checkpoint, device)

    torch.manual_seed(0)  # for methods with random numbers
    explainers = explainers | baselines(model.grid)
    precision = Precision("auto", device)
    try:
        table, curves = evaluate(model, batches(), explainers, precision, masks=masks, outlines=outlines)
    except Exception as error:
        if is_memory_error(error):
            raise UserError(f"--batch-size {args.batch_size} does not fit into memory; try a smaller one") from error
        raise
    record = {
        "checkpoint": f"{args.checkpoint.name} {args.which or 'last'}",
        "model": checkpoint["model"],
        "epoch": checkpoint["epoch"],
        "dataset_name": dataset.name,
        "data_hash": dataset.data_hash(),
        "images": len(indices),
        "patches": list(model.grid),
    }
    path = out / "evaluation.json"
    if path.exists():
        before = json.loads(path.read_text())
        if all(before.get(key) == record[key] for key in SAME_EVALUATION):
            table, curves = before["scores"] | table, before["curves"] | curves
    record |= {"scores": table, "curves": curves}
    print(scores_text(table))
    write_atomically(path, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
    caption = f"{len(indices)} test images of {dataset.name}, epoch {checkpoint['epoch']}"
    draw_deletion_curves(out / "deletion.png", curves, caption, dpi=args.dpi)
    return [path, out / "deletion.png"]
