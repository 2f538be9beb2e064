"""Predict the classes of photographs, or measure how good a model's predictions are.

python predict.py checkpoints/vit photo.jpg photos/
python predict.py checkpoints/vit photos/ --csv predictions.csv --sheet sheet.png
python predict.py checkpoints/vit --evaluate
python predict.py checkpoints/vit --evaluate elsewhere/ --tta flip
"""

import csv
import io
from functools import cache, partial
from itertools import chain
from pathlib import Path

from errors import UserError, aligned, command_line, run_script
from files import make_folder, write_atomically, write_json
from maps.commands import checkpoint_parser, open_model
from maps.draw import draw_evaluation, draw_sheet
from maps.images import checkpoint_dataset, normalised, pixels_of
from maps.methods import attention_maps
from maps.predictions import evaluation, image_files, predict_logits, split_of_folder
from pipeline.folders import printable
from training.checkpoint import checkpoint_file


def predict_parser():
    parser = checkpoint_parser(__doc__)
    help_text = "image files, and folders that are searched for images; with --evaluate one folder of class folders"
    parser.add_argument("images", type=Path, nargs="*", help=help_text)
    add = parser.add_argument_group("predictions").add_argument
    add("--csv", type=Path, metavar="FILE", help="also write them as a table")
    add("--json", type=Path, metavar="FILE", help="also write them as JSON")
    add("--sheet", type=Path, metavar="FILE.png", help="also draw the first 64 images, and where the model looks")
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="measure on the run's test images, or on a folder of class folders")
    add("--tta", choices=("flip",), help="also measure the mean over each image and its mirror image")
    add("--corruptions", action="store_true", help="also measure on up to 1,000 images with noise, blur, weather ...")
    return parser


def predict_files(args, checkpoint, model):
    """Print the five likeliest classes of each image, and write what the flags ask for; returns the paths."""
    written = [make_folder(path.parent) / path.name for path in (args.csv, args.json, args.sheet) if path]
    files = [*dict.fromkeys(file for path in args.images for file in image_files(path))]
    images, classes = pixels_of(files, checkpoint), checkpoint["classes"]
    likeliest = predict_logits(model, checkpoint, images).softmax(1).topk(min(5, len(classes)))
    header = ["image", *(f"{what}_{i + 1}" for i in range(min(5, len(classes))) for what in ("class", "probability"))]
    best = zip(files, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    rows = [[printable(f), *chain(*((classes[i], p) for i, p in zip(*some)))] for f, *some in best]
    found = [[row[0], *(f"{name} {p:.1%}" for name, p in zip(row[1::2], row[2::2]))] for row in rows]
    print(aligned([header[:1] + header[1::2], *found]))
    if args.csv:
        csv.writer(table := io.StringIO(newline=""), lineterminator="\n").writerows([header, *rows])
        write_atomically(args.csv, lambda file: file.write(table.getvalue().encode()))
    if args.json:
        write_json(args.json, [dict(zip(header, row)) for row in rows])
    if args.sheet:
        captions, maps = [f"{file.name[:24]}\n{row[1]}" for file, row in zip(files[:64], found)], []
        try:
            for inputs in normalised(images[:64], checkpoint, next(model.parameters()).device).split(8):
                maps += [*attention_maps(model, inputs, ["rollout"])[0]["rollout"].cpu().numpy()]
        except UserError as error:
            print(f"{args.sheet} is without maps: {error}")
        draw_sheet(args.sheet, pixels_of(files[:64], checkpoint, least=128), captions, maps)
    return written


def evaluate_predictions(args, checkpoint, model):
    """Measure on the run's test images, or on a folder; prints, and writes a JSON and a page of figures to predict/."""
    load = cache(partial(checkpoint_dataset, checkpoint, data_dir=args.data_dir, cache_dir=args.cache_dir))
    file = checkpoint_file(args.checkpoint, args.which)
    name = "-".join([file.name.removesuffix(".pt"), *(root.resolve().name for root in args.images)])
    path = make_folder(file.parent / "predict") / f"{name}.json"
    split, left_out = split_of_folder(args.images[0], checkpoint) if args.images else (load().test, {})
    if not args.images and (checkpoint.get("data_hashes") or {}).get("test") not in (None, split.hash()):
        print("warning: the test images are not those that were left out of training: an image has changed")
    val, reason = None, "the run has no validation images"
    if any(row["val_accuracy"] is not None for row in checkpoint["history"]):
        try:
            val = load().val
        except UserError as error:
            reason = error
    if not val:
        print(f"no temperature: {reason}")
    logits_of = partial(predict_logits, model, checkpoint)
    wrong, found = evaluation(logits_of, split, val, checkpoint["classes"], flip=args.tta, corruptions=args.corruptions)
    table = [["", "accuracy", "95 % interval", "images"]]
    for key, row in found["accuracies"].items():
        table.append([key, f"{row['accuracy']:.2%}", "{:.2%} to {:.2%}".format(*row["interval"]), f"{row['images']:,}"])
    print(aligned(table))
    if len(checkpoint["classes"]) > 5:  # else it is always 100 %
        print(f"top-5 accuracy {found['top5']:.2%}")
    for how, (error, _) in found["calibrations"].items():
        print(f"expected calibration error {error:.4f}, {how}")
    about = {"checkpoint": str(file), "images": str(args.images[0]) if args.images else "test", "left_out": left_out}
    write_json(path, about | found)
    title = f"{checkpoint['model']} after {checkpoint['epoch']} epochs: accuracy {table[1][1]} on {table[1][3]} images"
    draw_evaluation(path.with_suffix(".png"), title, found, split.images[wrong])
    return [path, path.with_suffix(".png")]


def main(argv=None):
    """Predict or evaluate as the command line (or argv) says; returns the paths of the files written."""
    args = predict_parser().parse_intermixed_args(command_line() if argv is None else argv)
    if args.csv or args.json or args.sheet if args.evaluate else args.tta or args.corruptions:
        raise UserError("--tta and --corruptions need --evaluate; --csv, --json and --sheet are without it")
    if len(args.images) > 1 if args.evaluate else not args.images:
        raise UserError("name images or folders to predict, or use --evaluate with one folder or none")
    if args.sheet and args.sheet.suffix != ".png":
        raise UserError(f"--sheet {args.sheet}: the name must end in .png")
    checkpoint, model = open_model(args)
    written = (evaluate_predictions if args.evaluate else predict_files)(args, checkpoint, model)
    for path in written:
        print(f"  {path}")
    return written


if __name__ == "__main__":
    run_script(main)
