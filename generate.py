"""Write images made by a model of train_generator.py, as folders of PNG files, one per class.

    python generate.py checkpoints/ddpm --per-class 100 --out datasets/generated
    python generate.py checkpoints/ddpm --animate noise.gif
    python generate.py checkpoints/ddpm --per-class 100 --out datasets/generated --classifier checkpoints/cct_2_3x2

The last command also evaluates the images with a classifier that was trained on real ones. A second call with the same
flags writes only what is missing. Mix the images into training with --extra-data datasets/generated.
"""

import itertools
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from errors import UserError, bar_disabled, run_script
from files import make_folder, write_atomically, write_json
from maps.commands import checkpoint_parser, open_model
from maps.images import find_class
from maps.quality import EVALUATION, measure_quality, open_classifier, quality_text
from training.checkpoint import checkpoint_file
from training.device import Precision
from training.generating import RECORD, as_sheet, generated_images, leave_out, read_record
from training.values import at_least, seed
from training.weights import weights_hash

FRAMES = 20  # of an animation


def generate_parser():
    parser = checkpoint_parser(__doc__)
    leave_out(parser, "attention")
    add = parser.add_argument
    add("--per-class", type=at_least(1), metavar="N", help="images per class (default: 100)")
    add("--class", dest="classes", nargs="+", metavar="CLASS", help="write only these classes (default: all)")
    add("--out", type=Path, metavar="DIR", help="where to write (default: generated in the run's folder)")
    add("--seed", type=seed, default=0, metavar="N", help="change it for other images")
    add("--batch-size", type=at_least(1), default=100, metavar="N", help="lower it if memory runs out")
    add("--animate", type=Path, metavar="FILE.gif", help="draw four images of each class as they emerge from noise")
    add("--classifier", type=Path, metavar="RUN", help="evaluate the images with this run, of the same classes")
    add = parser.add_argument_group("sampling, for a ddpm").add_argument
    help_text = "ddim (default); or ddpm, which adds noise on the way"
    add("--sampler", choices=("ddim", "ddpm"), help=help_text)
    add("--steps", type=at_least(1), metavar="N", help="more are slower and better (default: 50, or all with ddpm)")
    help_text = "above 1, images are clearer and vary less; 1 turns it off (default: 2)"
    add("--guidance", type=at_least(0, float), metavar="G", help=help_text)
    return parser


def generate_options(args, name, model):
    """The keyword arguments of the model's generate. Raises UserError for flags that it does not take."""
    if name != "ddpm":
        for flag in ("sampler", "steps", "guidance", "animate"):
            if (value := getattr(args, flag)) is not None:
                raise UserError(f"--{flag} {value}: this is for a ddpm; {name} makes images in one step")
        return {}
    total, ancestral = len(model.shares), args.sampler == "ddpm"
    steps = args.steps or (total if ancestral else min(50, total))
    if steps > total:
        raise UserError(f"--steps {steps}: the model was trained with {total}")
    return {"steps": steps, "eta": float(ancestral), "guidance": 2.0 if args.guidance is None else args.guidance}


def begin_folder(out, record):
    """Make the folder, with its record. Raises UserError if it holds anything but images of this record."""
    before = read_record(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and before != record)):
        other = [key for key, value in record.items() if before and before.get(key) != value]
        reason = f"its images have another {other[0].replace('_', ' ')}" if other else "it is not empty"
        raise UserError(f"--out {out}: {reason}; name another folder")
    make_folder(out)
    write_json(out / RECORD, record)


def write_images(out, model, names, labels, *, per_class, batch_size, **options):
    """Write the images of labels that are missing in out, by whole batches, and print how many there are."""
    pairs = [(label, index) for label in labels for index in range(per_class)]
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    for name in (names[label] for label in labels):  # they are a checkpoint's, which may be anybody's
        if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
            raise UserError(f"the class {name!r} cannot be the name of a folder in {out}")
    for label in labels:
        make_folder(out / names[label])
    paths = {(label, index): out / names[label] / f"{index:06}.png" for label, index in pairs}
    missing = [batch for batch in batches if not all(paths[pair].exists() for pair in batch)]
    for name in EVALUATION * bool(missing):  # it does not cover the new images
        (out / name).unlink(missing_ok=True)
    for batch in tqdm(missing, "generating", disable=bar_disabled(), unit="batch"):
        images = generated_images(model, *torch.tensor(batch).T, **options)[0]
        for pair, pixels in zip(batch, images.permute(0, 2, 3, 1).numpy(), strict=True):
            image = Image.fromarray(pixels)
            write_atomically(paths[pair], partial(image.save, format="png"))
    print(f"{out}: {len(pairs):,} images, {sum(map(len, missing)):,} of them written now")


def animate(path, model, labels, **options):
    """Write a GIF of four images of each label, from noise to image, and print its name."""
    indices, labels = torch.tensor([*itertools.product(range(4), labels)]).T
    frames = generated_images(model, labels, indices, frames=None, **options)  # (frames, N, 3, S, S)
    some = torch.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().long()
    sheets = [as_sheet(frame, columns=len(frame) // 4) for frame in frames[some]]
    first, *others = [sheet.quantize(64, dither=Image.Dither.NONE) for sheet in sheets]  # a fifth of the bytes
    times = [80] * len(others) + [2000]  # milliseconds
    write_atomically(path, lambda file: first.save(file, "gif", save_all=True, append_images=others, duration=times))
    print(path)


def main(argv=None):
    """Generate as the command line (or argv) says; returns the folder, None if there is only an animation."""
    args = generate_parser().parse_args(argv)
    if args.animate and args.animate.suffix.lower() != ".gif":
        raise UserError(f"--animate {args.animate}: its name must end in .gif")
    checkpoint, model = open_model(args, generates=True)
    precision = Precision("auto", next(model.parameters()).device)
    options = generate_options(args, checkpoint["model"], model)
    classes = checkpoint["classes"]
    labels = list(dict.fromkeys(find_class(name, classes, flag="--class") for name in args.classes or classes))
    per_class = args.per_class or 100
    count = len(labels) * per_class
    classifier = open_classifier(args, classes, precision.device, count=count) if args.classifier else None
    drawing = options | {"seed": args.seed, "precision": precision}
    if args.animate:
        animate(make_folder(args.animate.parent) / args.animate.name, model, labels, **drawing)
        if args.per_class is None and args.out is None and not classifier:
            return None
    file = checkpoint_file(args.checkpoint, args.which)
    out = args.out or file.parent / "generated"
    record = {
        "model": checkpoint["model"],
        "checkpoint": f"{file.resolve().parent.name} {file.stem}",
        "weights_hash": weights_hash(model),
        "trained_on": checkpoint["data_hashes"]["train"],
        "seed": args.seed,
        **options,
    }
    begin_folder(out, record)
    write_images(out, model, classes, labels, per_class=per_class, batch_size=args.batch_size, **drawing)
    if classifier:
        print(quality_text(measure_quality(out, *classifier)))
    return out


if __name__ == "__main__":
    run_script(main)
