"""Images from another source, such as generate.py, that take the place of some training images."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from errors import UserError
from pipeline.batches import Batches
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


class MixedBatches(Batches):
    """Batches of a Split in which `extra`, another one, takes the place of a share of the images of each batch.

    Which images are replaced, and by which, follows from (seed, epoch); an epoch has as many steps as without.
    """

    def __init__(self, split, extra, *, share, **options):
        images, labels = (torch.cat(pair) for pair in zip(split[:2], extra[:2]))  # the real ones first
        super().__init__(split._replace(images=images, labels=labels), length=len(split.labels), **options)
        self.share = share

    def order(self, epoch, generator):
        """(N,) indices: those of the real images, of which a share, evenly spread, is replaced."""
        order, extra = super().order(epoch, generator), len(self.labels) - self.length
        replaced = (torch.arange(self.length + 1, dtype=torch.float64) * self.share).floor().diff() > 0  # (N,)
        drawn = torch.randperm(extra, generator=generator.manual_seed(seed_for("extra", self.seed, epoch)))
        order[replaced] = self.length + drawn[torch.arange(int(replaced.sum())) % extra]
        return order
