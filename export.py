"""Write a trained model as a file that runs without this project: docs/export.md says how to use it.

    python export.py checkpoints/vit                         ONNX: checkpoints/vit/model.onnx
    python export.py checkpoints/vit --format torch          torch.export's program: model.pt2
    python export.py checkpoints/vit --format safetensors    the weights alone: model.safetensors

The file also holds the classes, image size, mean and std. Before it is written, its logits are compared with the
model's.
"""

import json
from pathlib import Path

import torch

from errors import UserError, run_script
from files import write_atomically
from models import build_model
from models.portable import PORTABLE
from training.archives import read_from_outside
from training.checkpoint import image_shape, load_checkpoint, rebuild_model
from training.flags import Parser

NOTES = ("model", "model_args", "classes", "image_size", "mean", "std")  # of the checkpoint, as JSON in the file
TOLERANCE = 1e-4  # of the largest logit, or of 1 if all are smaller


def export_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a run's folder or a checkpoint file")
    add("--format", choices=PORTABLE, default="onnx", help=", ".join(PORTABLE))
    help_text = "the class of the run's attention again, if it is your own: its file is run"
    add("--attention", metavar="FILE.py:Class", help=help_text)
    add("--out", type=Path, metavar="FILE", help="where to write (default: model.onnx in the run's folder)")
    return parser


@torch.no_grad()
def check_logits(model, run, shape):
    """Compare run(images) with the model's logits at three batch sizes. Raises UserError if they differ."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7):
        images = torch.randn(count, *shape, generator=generator)
        expected = model(images)  # (count, classes)
        difference = (run(images) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise UserError(f"a batch of {count} has other logits, by {difference:.1e}: nothing was written")


def main(argv=None):
    """Export as the command line (or argv) says; returns the path of the file written."""
    args = export_parser().parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    model = rebuild_model(checkpoint, build_model, attention=args.attention)
    shape = image_shape(len(checkpoint["mean"]), checkpoint["image_size"])
    suffix, convert, runner = PORTABLE[args.format]
    images = torch.zeros(2, *shape)
    with read_from_outside(f"--format {args.format}: {checkpoint['model']} cannot be exported"):
        data = convert(model, images, {name: json.dumps(checkpoint[name]) for name in NOTES})
    checked = "checked at batch sizes 1, 2 and 7"
    try:
        run = runner(model, data)
    except UserError as error:  # a package is missing
        checked = f"not checked: {error}"
    else:
        check_logits(model, run, shape)
    in_folder = args.checkpoint / "model" if args.checkpoint.is_dir() else args.checkpoint
    path = args.out or in_folder.with_suffix(f".{suffix}")
    write_atomically(path, lambda file: file.write(data))
    print(f"{path}, {len(data) / 1e3:,.0f} kB, {checked}")
    return path


if __name__ == "__main__":
    run_script(main)
