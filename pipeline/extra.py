"""Images from another source, such as generate.py, that take the place of some training images."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from errors import UserError
from pipeline.decoding import decode_images
from pipeline.folders import list_images, subfolders
from seeding import seed_for


def read_extra(root, classes, like):
    """(images (N, C, H, W) uint8, labels (N,), files (N,)) in folders named after some of the classes.

    They are resized to the size of the images `like`. Raises UserError for a folder of another name, and if these are
    large ones, which training crops.
    """
    if not torch.is_tensor(like):
        raise UserError(f"{root}: generated images can only be mixed with images of up to 64 pixels")
    names = subfolders(Path(root))
    if not names or set(names) - set(classes):
        raise UserError(f"{root} must hold folders named after classes of the dataset: {', '.join(classes)}")
    files = [[file for file, *_ in list_images(Path(root, name), defaultdict(list))] for name in names]
    labels = [classes.index(name) for name, some in zip(names, files, strict=True) for _ in some]
    files, (_, channels, *sides) = sum(files, []), like.shape
    return torch.from_numpy(decode_images(files, sides, channels=channels)), torch.tensor(labels), np.array(files)


def mix_in(split, extra, *, share, seed):
    """(a Split of both, options of Batches) so that extra images replace a share of the images of each batch.

    Which are replaced, and by which, follows from (seed, epoch); an epoch has as many steps as without.
    """
    images, labels = (torch.cat(pair) for pair in zip(split[:2], extra[:2]))  # the real ones first
    real, count = len(split.labels), len(extra.labels)

    def reorder(order, epoch):
        generator = torch.Generator().manual_seed(seed_for("extra", seed, epoch))
        replaced = (torch.arange(real + 1, dtype=torch.float64) * share).floor().diff() > 0  # (real,), evenly spread
        drawn = torch.randperm(count, generator=generator)[torch.arange(int(replaced.sum())) % count]
        return order.masked_scatter(replaced, real + drawn)

    return split._replace(images=images, labels=labels), {"length": real, "reorder": reorder}
