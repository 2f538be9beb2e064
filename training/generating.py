"""Where training a generator differs from training a classifier, and images from it."""

import sys
from collections import deque
from pathlib import Path

import torch
from PIL import Image
from torchvision.utils import make_grid

from errors import UserError
from files import is_first_rank, write_atomically
from seeding import seed_for
from training.outputs import accuracy_text, write_result
from training.ranks import same_buffers
from training.records import read_json

RECORD = "generated.json"
SHEET = (10, 8)  # at most so many classes, and images of each


def leave_out(parser, *names):
    """Take flags away from a parser that have no effect in its script; their defaults remain."""
    for action in [action for action in parser._actions if action.dest in names]:
        parser.set_defaults(**{action.dest: action.default})
        action.container._remove_action(action)
        for option in action.option_strings:
            del parser._option_string_actions[option]


def generated_images(model, labels, indices, *, seed, precision, frames=1, **options):
    """Images (frames, B, 3, S, S) uint8 of labels (B,): the last `frames` on the way from noise, None for all.

    Their noise follows from the seed, the class and the index (B,) of each image within its class, and not from the
    batch. options are those of the model's generate.
    """
    device = precision.device
    seeds = [seed_for("samples", seed, *pair) for pair in zip(labels.tolist(), indices.tolist(), strict=True)]
    generators = [torch.Generator().manual_seed(number) for number in seeds]

    def draw(shape):
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)

    with torch.inference_mode(), precision.autocast():
        kept = deque(model.generate(labels.to(device), draw, **options), frames)
    return torch.stack([as_pixels(images) for images in kept])


def as_pixels(images):
    """Images in -1 ... 1 as uint8 on the CPU."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def as_sheet(images, columns):
    """A PIL image of images (N, 3, S, S) uint8 in rows, each pixel enlarged to 2 x 2."""
    sheet = make_grid(images, columns, padding=1, pad_value=255).permute(1, 2, 0).numpy()
    return Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST)


def draw_samples(run):
    """Write samples.png: a row of images for each of the first classes, by the evaluated model."""
    if not is_first_rank():
        return
    count, each = min(SHEET[0], len(run.dataset.classes)), SHEET[1]
    labels, indices = torch.arange(count).repeat_interleave(each), torch.arange(each).repeat(count)
    model = run.evaluated_model.eval()
    images = generated_images(model, labels, indices, seed=run.args.seed, precision=run.precision)[0]
    model.train(model is run.model)
    sheet = as_sheet(images, each)
    write_atomically(run.folder / "samples.png", lambda file: sheet.save(file, "png"))


@torch.inference_mode()
def validate_loss(*, model, batches, loss_function, precision, seed):
    """(the mean per image of a loss with random numbers, as a generator's is, None): the same numbers each time.

    The model is in evaluation mode meanwhile. Every rank takes all images.
    """
    training = model.training
    same_buffers(model)
    model.eval()
    total = images_seen = 0
    for step, (images, labels) in enumerate(batches.batches()):
        torch.manual_seed(seed_for("validation", seed, step))
        with precision.autocast():
            total += loss_function(model, images, labels)[0] * len(labels)
        images_seen += len(labels)
    model.train(training)
    return total.item() / images_seen, None


def finish_generator(run):
    """Write result.json of a run that ends without a test; prints what its folder holds, and returns its result."""
    losses = {name: run.history[-1][name] for name in ("train_loss", "val_loss")}
    result = write_result(run, **losses)
    print(accuracy_text(result))
    print(*(f"  {path}" for path in sorted(run.folder.iterdir())), sep="\n")
    print(f"write images: python generate.py {run.folder} --per-class 100 --out datasets/generated")
    run.close()
    return result


def read_record(folder):
    """What generate.py noted of the images in a folder, as a dict; empty if they are from elsewhere."""
    path = Path(folder, RECORD)
    try:
        return {**read_json(path)} if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


def generator_record(folder, data_hashes):
    """read_record of a folder of --extra-data, with the hash of its images.

    A warning on stderr says if the generator has seen other images than those that this run is trained on.
    """
    record = read_record(folder)
    if record.get("trained_on", data_hashes["train"]) != data_hashes["train"]:
        flags = "give both the same --val-fraction, --split-seed, --train-per-class and --image-size"
        print(f"warning: {folder}: its generator was trained on other images than this run; {flags}", file=sys.stderr)
    return record | {"hash": data_hashes["extra"]}
