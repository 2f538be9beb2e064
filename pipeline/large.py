"""Images of any shape: those to train on are cut anew in every epoch (see crops.py), those to judge by once."""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Resampling
from torchvision.transforms.functional import center_crop, resize

from pipeline.folders import by_all_cores, cached_array, decode_images, list_folder, opened, upright_image

CROP_PCT = 0.875  # the square cut from the centre of an image to judge by, as a share of the image's short side
HELD = 2  # the short side of an image to train on, at most, over that of a crop: few crops are coarser than the file


@dataclass
class LargeImages:
    """Files of images of any shape. sizes (N, 2) are the heights and widths at which they are held, upright."""

    root: Path
    files: np.ndarray  # (N, 3), as images_in has them
    sizes: torch.Tensor
    image_size: int  # of a crop
    crop_pct: float  # see CROP_PCT
    cache_dir: Path | None

    def __len__(self):
        return len(self.files)

    def __getitem__(self, indices):
        """Those at `indices`, as LargeImages."""
        return replace(self, files=self.files[indices], sizes=self.sizes[indices])

    @property
    def num_bytes(self):
        return 3 * self.sizes.prod(1).sum().item()

    def cached(self, what, make):
        return cached_array(self.root, f"{self.image_size}px-{what}", self.files.tolist(), make, self.cache_dir)

    def decode(self, index):
        """One image, (H, W, 3) uint8."""
        height, width = self.sizes[index].tolist()
        image = upright_image(self.files[index, 0], min(height, width))
        if image.size != (width, height):
            image = image.resize((width, height), Resampling.BILINEAR)
        return np.array(image)

    def decode_all(self):
        """The bytes of all images, one after the other, and room for a line of an image after the last."""

        def pixels():
            buffer, end = np.empty(self.num_bytes + 3 * self.sizes[:, 1].max().item(), np.uint8), 0
            for image in by_all_cores(self.decode, range(len(self))):
                start, end = end, end + image.size
                buffer[start:end] = image.ravel()
            return buffer

        return torch.from_numpy(self.cached("whole", pixels))

    def centre_crops(self, split):
        """Their centre_crop, (N, 3, S, S) uint8; split is the name under which these are cached."""
        paths, cut = self.files[:, 0], partial(centre_crop, crop_pct=self.crop_pct)
        what = f"{split}-{self.crop_pct:g}"
        return torch.from_numpy(self.cached(what, lambda: decode_images(paths, self.image_size, cut)))


def centre_crop(path, size, *, crop_pct=CROP_PCT):
    """An image to judge by, (3, size, size) uint8: the short side resized to size / crop_pct, then the centre."""
    short_side = round(size / crop_pct)
    image = resize(upright_image(path, short_side), short_side)
    return np.asarray(center_crop(image, size)).transpose(2, 0, 1)


def upright_size(path):
    """(height, width) of an image, turned by its EXIF tag; no pixel is decoded where its format allows that."""
    with opened(path) as image:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]


def read_large_folder(root, image_size, cache_dir=None, *, crop_pct=CROP_PCT):
    """(class names, {split: (LargeImages, labels, file names)}), split as find_splits says, for crops of image_size.

    Says on stderr where some are smaller than that. Raises UserError for a folder that cannot be used and a file that
    is no image.
    """
    names, splits = list_folder(root)
    files = [file for files, _, _ in splits.values() for file in files]
    paths = [path for path, _, _ in files]
    sizes = cached_array(root, "sizes", files, lambda: np.array([*by_all_cores(upright_size, paths)]), cache_dir)
    short_sides = sizes.min(1, keepdims=True)
    if small := (short_sides < image_size).sum():
        print(
            f"warning: {small:,} of {len(sizes):,} images are smaller than --image-size {image_size} "
            f"(the smallest: {short_sides.min()} pixels): they are enlarged",
            file=sys.stderr,
        )
    held = np.where(short_sides > HELD * image_size, sizes * HELD * image_size // short_sides, sizes)
    images = LargeImages(root, np.array(files, dtype=object), torch.from_numpy(held), image_size, crop_pct, cache_dir)
    ends = np.cumsum([len(labels) for _, labels, _ in splits.values()])
    return names, {
        split: (images[end - len(labels) : end], labels, paths)
        for end, (split, (_, labels, paths)) in zip(ends, splits.items())
    }
