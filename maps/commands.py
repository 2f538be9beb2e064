"""What rollout.py and attribute.py share (predict.py, too): flags, what to open, the evaluation of a checkpoint."""

from pathlib import Path

import torch
from tqdm.auto import tqdm

from errors import UserError, aligned, bar_disabled, is_memory_error
from files import make_folder, write_json
from maps.draw import draw_deletion_curves, draw_redrawn
from maps.evaluate import baselines, evaluate, mean_and_error
from maps.images import checkpoint_dataset, chosen_images, find_split, images_at, normalised, object_masks, photographs
from maps.randomise import NOTE, layers_from_the_head, learnt_nothing
from models import build_model
from training.checkpoint import checkpoint_file, is_of_kind, load_checkpoint, rebuild_model
from training.device import Precision, pick_device
from training.flags import Parser
from training.records import read_json
from training.values import at_least, number
from training.weights import weights_hash

ROWS = {"scores": dict[str, dict[str, list[float | int]]], "curves": dict[str, dict], "values": dict[str, list]}
SAME_EVALUATION = ("weights_hash", "data_hash", "split", "images")  # if these agree, tables are merged


def checkpoint_parser(description, name="checkpoint", *, help="a run's folder or a checkpoint file", **positional):
    """A parser with the flags of all commands that open a checkpoint, whose first argument is `name`."""
    parser = Parser(description)
    add = parser.add_argument
    add(name, type=Path, help=help, **positional)
    add("--which", help="a checkpoint of the folder: last, best, best_on_test, epoch-10 (default: last)")
    help_text = "the class of the run's attention again, if it is your own: its file is run"
    add("--attention", metavar="FILE.py:Class", help=help_text)
    add("--data-dir", metavar="DIR", help="where the run's images are, if they have moved since training")
    add("--cache-dir", metavar="DIR", help="where decoded folders are kept (default: where training kept them)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first available)")
    return parser


def maps_parser(description, methods, *, default):
    """A parser with the flags of rollout.py and attribute.py; --method is one of methods, or all."""
    parser = checkpoint_parser(description)
    add = parser.add_argument
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--index", type=int, nargs="+", metavar="N", help="images to explain (default: 0 1 2 3)")
    add_one("--class", dest="class_name", metavar="CLASS", help="explain the first images of this class instead")
    add_one("--image", type=Path, nargs="+", metavar="FILE", help="explain photographs, of any size, instead")
    add_one("--evaluate", action="store_true", help="measure the methods on many images instead of drawing maps")
    add("--split", choices=("train", "val", "test"), default="test", help="where the images are from")
    help_text = "images to evaluate (default: 1000; more give smaller standard errors), or to draw (default: 4)"
    add("--num-images", type=at_least(1), metavar="N", help=help_text)
    add("--method", choices=(*methods, "all"), help=f"(default: {default}; all with --evaluate)")

    add = parser.add_argument_group("figures").add_argument
    add("--out", type=Path, metavar="DIR", help="where to write (default: maps/ in the run's folder)")
    add("--interpolation", choices=("bilinear", "nearest"), default="bilinear", help="nearest shows the patches")
    add("--format", choices=("png", "pdf"), default="png", help="pdf is sharp at any size, for a paper")
    add("--dpi", type=number(int, low=20, high=1200), default=150, help="resolution, from 20 to 1200")

    add = parser.add_argument_group("evaluation").add_argument
    help_text = "also compare the maps with those of redrawn weights, layer by layer from the head down"
    add("--randomise", action="store_true", help=help_text)
    add("--batch-size", type=at_least(1), default=100, help="images per forward pass; lower it if memory runs out")
    return parser


def chosen_methods(args, methods, *, default):
    """The names of the methods to use, out of all `methods`."""
    name = args.method or ("all" if args.evaluate else default)
    return tuple(methods) if name == "all" else (name,)


def open_model(args, *, generates=False):
    """(checkpoint, its model on the device), as the flags of checkpoint_parser say; one that `generates`, or not."""
    device = pick_device(args.device)
    if args.which and args.checkpoint.is_file():
        raise UserError(f"--which {args.which} needs a run's folder, and {args.checkpoint} is a file")
    checkpoint = load_checkpoint(args.checkpoint, which=args.which, device=device)
    return checkpoint, rebuild_model(checkpoint, build_model, attention=args.attention, generates=generates).to(device)


def open_for_maps(args):
    """(checkpoint, model, chosen images, None) to draw, or (checkpoint, model, None, dataset) to evaluate."""
    if args.randomise and not args.evaluate:
        raise UserError("--randomise needs --evaluate")
    checkpoint, model = open_model(args)
    if args.image:
        return checkpoint, model, photographs(args.image, checkpoint), None
    dataset = checkpoint_dataset(checkpoint, data_dir=args.data_dir, cache_dir=args.cache_dir)
    if args.evaluate:
        return checkpoint, model, None, dataset
    choice = {"indices": args.index, "class_name": args.class_name, "count": args.num_images or 4}
    return checkpoint, model, chosen_images(dataset, args.split, **choice), None


def output_folder(args):
    """--out, or maps/ beside the checkpoint. Raises UserError if it cannot be written."""
    return make_folder(args.out or checkpoint_file(args.checkpoint).parent / "maps")


def scores_text(table):
    """A table of evaluate as aligned text: mean ± standard error, with a star at the methods of learnt_nothing."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row))
    lines, starred = [["", *measures]], learnt_nothing(table)
    for name, row in table.items():
        cells = ["{:.3f} ± {:.3f}".format(*row[m]) if m in row else "-" for m in measures]
        lines.append([name + " *" * (name in starred), *cells])
    return aligned(lines) + f"\n{NOTE}" * bool(starred)


def read_table(path):
    """What an evaluation.json holds; None if there is none, or a damaged one, which is then replaced."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    whole = is_of_kind(record, dict[str, object]) and "scores" in record
    return record if whole and all(is_of_kind(record.get(name, {}), kind) for name, kind in ROWS.items()) else None


def with_earlier_rows(path, record):
    """The record with the rows that an evaluation.json holds, if they are of the same weights and images."""
    before = read_table(path)
    if not before:
        return record
    if different := [key for key in SAME_EVALUATION if before.get(key) != record[key]]:
        print(f"{path}: its rows have another {' and '.join(different).replace('_', ' ')} and are dropped")
        return record
    return record | {rows: before.get(rows, {}) | record[rows] for rows in ROWS}


def evaluate_checkpoint(args, checkpoint, model, dataset, explainers, out):
    """Evaluate explainers (see evaluate) and the baselines on --num-images images, evenly spread over --split.

    Prints the table and writes evaluation.json and deletion.png to out; their paths are returned. Rows of an earlier
    evaluation of the same weights on the same images are kept.
    """
    split = find_split(dataset, args.split)
    total, wanted = len(split.labels), args.num_images or 1000
    if min(wanted, total) < 2:
        raise UserError(f"--num-images {wanted}: of {total} {args.split} images; a standard error needs two")
    indices = torch.linspace(0, total - 1, min(wanted, total)).round().long()
    masks = object_masks(checkpoint, dataset, indices, args.split)
    device = next(model.parameters()).device

    def batches():
        for chunk in tqdm(indices.split(args.batch_size), "evaluating", disable=bar_disabled(), unit="batch"):
            yield normalised(images_at(split.images, chunk), checkpoint, device)

    torch.manual_seed(0)  # for methods with random numbers
    explainers = explainers | baselines(model.grid)

    def fresh():
        return rebuild_model(checkpoint, build_model, attention=args.attention, trained=False).to(device).state_dict()

    precision = Precision("auto", device)
    try:
        scores, curves = evaluate(
            model, batches(), explainers, precision, masks=masks, fresh=fresh if args.randomise else None
        )
    except Exception as error:
        if is_memory_error(error):
            raise UserError(f"--batch-size {args.batch_size} does not fit into memory; try a smaller one") from error
        raise
    file, ranked_by = checkpoint_file(args.checkpoint, args.which), "pointing" if masks else "saco"
    record = {
        "checkpoint": f"{file.resolve().parent.name} {file.stem}",
        "weights_hash": weights_hash(model),
        "model": checkpoint["model"],
        "epoch": checkpoint["epoch"],
        "dataset_name": dataset.name,
        "data_hash": dataset.train.hash(),
        "split": args.split,
        "images": len(indices),
        "patches": list(model.grid),
        "ranked_by": ranked_by,
        "scores": {name: {m: mean_and_error(of_each) for m, of_each in row.items()} for name, row in scores.items()},
        "curves": curves,
        "values": {name: row[ranked_by].round(decimals=3).tolist() for name, row in scores.items() if ranked_by in row},
    }
    path = out / "evaluation.json"
    record = with_earlier_rows(path, record)
    curves = record["curves"]
    print(scores_text(record["scores"]))
    write_json(path, record)
    caption = f"{len(indices)} {args.split} images of {dataset.name}, epoch {checkpoint['epoch']}"
    draw_deletion_curves(out / "deletion.png", curves, caption, dpi=args.dpi)
    if not any("redrawn" in values for values in curves.values()):
        return [path, out / "deletion.png"]
    draw_redrawn(out / "randomise.png", curves, layers_from_the_head(model.state_dict()), caption, dpi=args.dpi)
    return [path, out / "deletion.png", out / "randomise.png"]
