"""The images to explain: from the dataset of the checkpoint, or photographs."""

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import SHAPES, Split, dataset_of, is_large
from errors import UserError
from pipeline.augment import normalize
from pipeline.decoding import both_sides, decode_image, decode_images
from pipeline.large import CROP_PCT, centre_crop
from pipeline.shapes import make_shapes


class Explained(NamedTuple):
    name: str  # begins the names of the files that are written
    shown: np.ndarray  # (H, W, C) uint8, for figures
    pixels: torch.Tensor  # (C, H, W) uint8, for the model
    label: int | None  # None for a photograph


def checkpoint_dataset(checkpoint, *, data_dir=None, cache_dir=None):
    """The dataset that a checkpoint was trained on, with the same splits."""
    places = {"data_dir": data_dir, "cache_dir": cache_dir}
    places = {name: path for name, path in places.items() if path} | {"extra_data": None}
    return dataset_of(SimpleNamespace(**checkpoint["args"] | places))


def find_split(dataset, name):
    """The dataset's Split of this name. Raises UserError if there is none."""
    if not isinstance(getattr(dataset, name), Split):  # None, or in shards
        kind = "validation" if name == "val" else "training"
        raise UserError(f"--split {name}: {dataset.name} has no {kind} images here")
    return getattr(dataset, name)


def images_at(images, indices):
    """A split's images at these indices, (N, C, H, W) uint8; large training images are cropped as test images are."""
    if torch.is_tensor(images):
        return images[indices]
    crop = partial(centre_crop, crop_pct=images.crop_pct)
    return torch.from_numpy(decode_images(images.files[indices, 0], images.image_size, crop, channels=images.channels))


def chosen_images(dataset, split="test", *, indices=None, class_name=None, count=4):
    """The Explained images of a split at these indices; without any, the first `count`, of one class if it is named.

    Raises UserError for an index out of range, and for a class that is unknown or has no images.
    """
    images, labels, _ = find_split(dataset, split)
    if indices is None:
        label = None if class_name is None else find_class(class_name, dataset.classes, flag="--class")
        fits = torch.ones_like(labels) if label is None else labels == label
        indices = fits.nonzero()[:count, 0].tolist()
        if not indices:
            raise UserError(f"--class {class_name}: the {split} images have none of this class")
    for index in indices:
        if not 0 <= index < len(labels):
            raise UserError(f"--index {index}: there are {len(labels)} {split} images, 0 to {len(labels) - 1}")
    prefix = "" if split == "test" else f"{split}-"
    return [
        Explained(f"{prefix}{index}", pixels.permute(1, 2, 0).numpy(), pixels, labels[index].item())
        for index, pixels in zip(indices, images_at(images, indices), strict=True)
    ]


def photographs(paths, checkpoint):
    """The Explained images in files of any size, cropped as the checkpoint's test images are.

    Raises UserError if a file cannot be read, or if two have the same name, since their maps would be one file.
    """
    if repeated := [name for name, count in Counter(path.stem for path in paths).items() if count > 1]:
        raise UserError(f"--image: several files are named {repeated[0]}, and their maps would be one file; rename one")
    shown, pixels = (pixels_of(paths, checkpoint, least=size) for size in (256, 1))
    files = zip(paths, shown.permute(0, 2, 3, 1).numpy(), pixels, strict=True)
    return [Explained(path.stem, *both, None) for path, *both in files]


def pixels_of(paths, checkpoint, *, least=1):
    """The images in files (N, C, H, W) uint8, cropped as the checkpoint's test images are.

    If the longer side has fewer pixels than `least`, they are enlarged to that, for figures.
    """
    args, size = checkpoint["args"], checkpoint["image_size"]
    large = is_large(args["dataset"], size)
    crop = partial(centre_crop, crop_pct=args.get("crop_pct", CROP_PCT)) if large else decode_image
    sides = both_sides(size)
    sides = [round(side * max(1, least / max(sides))) for side in sides]
    side = sides[0] if large else sides  # large images are square
    return torch.from_numpy(decode_images(paths, side, crop, channels=len(checkpoint["mean"])))


def normalised(pixels, checkpoint, device="cpu"):
    """Images (B, C, H, W) uint8 on the device, normalised by the checkpoint's mean and std."""
    mean, std = (torch.tensor(checkpoint[key], device=device) for key in ("mean", "std"))
    return normalize(pixels.to(device), mean, std)


def object_masks(checkpoint, dataset, indices, split="test"):
    """{"masks", "outlines", "others" if there are any: (N, H, W) bool} of drawn images; empty for other datasets."""
    name, size = checkpoint["args"]["dataset"], dataset.test.images.shape[2:]
    drawn = make_shapes(split, name)._asdict() if name in SHAPES else {}
    return {
        key: F.interpolate(drawn[key][indices, None].float(), size, mode="nearest")[:, 0].bool()
        for key in ("masks", "outlines", "others")
        if drawn.get(key) is not None
    }


def find_class(text, classes, *, flag="--target"):
    """The index of a class given by its name, by its index, or by a beginning or end that no other class has.

    Raises UserError that lists the classes.
    """
    found = [index for index, name in enumerate(classes) if name == text]
    if not found and text.isdecimal() and int(text) < len(classes):
        return int(text)
    found = found or [i for i, name in enumerate(classes) if text and (name.startswith(text) or name.endswith(text))]
    if len(found) == 1:
        return found[0]
    problem = f" fits {len(found)} of them" if found else ""
    raise UserError(f"{flag} {text}{problem}: the classes are {', '.join(classes)}, or 0 to {len(classes) - 1}")


def caption_of(explained, probabilities, classes):
    """The predicted and the true class, with probabilities."""
    best = int(probabilities.argmax())
    caption = f"predicted {classes[best]} ({probabilities[best]:.0%})"
    if explained.label is not None:
        caption += f"\ntrue {classes[explained.label]} ({probabilities[explained.label]:.0%})"
    return caption
