"""The images that a checkpoint is asked about: of its test set, or photographs."""

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import dataset_of, is_large
from errors import UserError
from pipeline.folders import decode_image
from pipeline.large import centre_crop
from pipeline.shapes import make_shapes


class Explained(NamedTuple):
    name: str  # of the files that are written
    shown: np.ndarray  # (H, W, 3) uint8, as large as there is
    pixels: torch.Tensor  # (3, S, S) uint8, as the model gets it
    label: int | None  # None for a photograph, whose class nobody said


def checkpoint_dataset(checkpoint, *, data_dir=None, cache_dir=None):
    """The dataset that a checkpoint was trained on, split as it was then."""
    here = {"data_dir": data_dir, "cache_dir": cache_dir}
    return dataset_of(SimpleNamespace(**checkpoint["args"] | {name: path for name, path in here.items() if path}))


def chosen_images(dataset, indices):
    """Explained images of the test set. Raises UserError for an index that is not there."""
    test = dataset.test
    for index in indices:
        if not 0 <= index < len(test.labels):
            raise UserError(f"--index {index}: there are {len(test.labels)} test images, 0 to {len(test.labels) - 1}")
    return [
        Explained(
            str(index), test.images[index].permute(1, 2, 0).numpy(), test.images[index], test.labels[index].item()
        )
        for index in indices
    ]


def photographs(paths, checkpoint):
    """Explained images of files of any size, cut as the checkpoint's test images are.

    Raises UserError for one that cannot be read, and for two of one name, whose maps would be one file.
    """
    if repeated := [name for name, count in Counter(path.stem for path in paths).items() if count > 1]:
        raise UserError(f"--image: several files are named {repeated[0]}, and so would be their maps")
    args, image_size = checkpoint["args"], checkpoint["image_size"]
    large = is_large(args["dataset"], image_size)
    cut = partial(centre_crop, crop_pct=args["crop_pct"]) if large else decode_image
    return [
        Explained(
            path.stem, cut(path, max(256, image_size)).transpose(1, 2, 0), torch.tensor(cut(path, image_size)), None
        )
        for path in paths
    ]


def normalised(pixels, checkpoint, device="cpu"):
    """Images (B, 3, S, S) uint8 as the checkpoint's model expects them, by the mean and std that it came with."""
    mean, std = (torch.tensor(checkpoint[key], device=device)[:, None, None] for key in ("mean", "std"))
    return (pixels.to(device).float() / 255 - mean) / std


def object_masks(checkpoint, dataset, indices):
    """(masks, outlines), (N, S, S) bool each, of chosen test images of `shapes`; (None, None) for other datasets."""
    if checkpoint["args"]["dataset"] != "shapes":
        return None, None
    shapes = make_shapes("test")
    size = dataset.test.images.shape[2:]
    return tuple(
        F.interpolate(m[indices, None].float(), size, mode="nearest")[:, 0].bool()
        for m in (shapes.masks, shapes.outlines)
    )


def find_class(text, classes):
    """The number of a class that is given by its name or number. Raises UserError that lists them."""
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise UserError(f"--target {text}: the classes are {', '.join(classes)}, or 0 to {len(classes) - 1}")


def caption_of(explained, probabilities, classes):
    """What is predicted and what is true, with probabilities."""
    best = int(probabilities.argmax())
    caption = f"predicted {classes[best]} ({probabilities[best]:.0%})"
    if explained.label is not None:
        caption += f"\ntrue {classes[explained.label]} ({probabilities[explained.label]:.0%})"
    return caption
