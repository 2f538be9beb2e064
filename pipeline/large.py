"""Images of any shape: training images get new crops in every epoch (see crops.py), test images one."""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Resampling
from torchvision.transforms.functional import center_crop, resize

from pipeline.decoding import by_all_cores, channels_first, decode_images, open_image, upright_image
from pipeline.folders import GREY, cached_array, list_folder

CROP_PCT = 0.875  # side of a test image's centre crop, as a fraction of the image's short side
MAX_SIDE = 2  # largest short side of a training image in memory, in sides of a crop: few crops lose detail


@dataclass
class LargeImages:
    """Files of images of any shape. sizes (N, 2) are the upright heights and widths to which they are decoded."""

    root: Path
    files: np.ndarray  # (N, 3), from list_images
    sizes: torch.Tensor
    image_size: int  # side of a crop
    crop_pct: float  # see CROP_PCT
    cache_dir: Path | None
    channels: int = 3

    def __len__(self):
        return len(self.files)

    def __getitem__(self, indices):
        """The LargeImages at `indices`."""
        return replace(self, files=self.files[indices], sizes=self.sizes[indices])

    @property
    def num_bytes(self):
        return self.channels * self.sizes.prod(1).sum().item()

    def cached(self, name, make):
        name = f"{self.image_size}px-{name}{GREY[self.channels]}"
        return cached_array(self.root, name, self.files.tolist(), make, self.cache_dir)

    def decode(self, index):
        """One image, (H, W, C) uint8."""
        height, width = self.sizes[index].tolist()
        image = upright_image(self.files[index, 0], min(height, width), self.channels)
        if image.size != (width, height):
            image = image.resize((width, height), Resampling.BILINEAR)
        return np.array(image).reshape(height, width, self.channels)

    def decode_all(self):
        """The bytes of all images (H, W, C), one after the other, and space for one more line (see cut_together)."""

        def pixels():
            buffer, end = np.empty(self.num_bytes + self.channels * self.sizes[:, 1].max().item(), np.uint8), 0
            for image in by_all_cores(self.decode, range(len(self))):
                start, end = end, end + image.size
                buffer[start:end] = image.ravel()
            return buffer

        return torch.from_numpy(self.cached("whole", pixels))

    def centre_crops(self, split):
        """centre_crop of each image, (N, C, S, S) uint8, cached under the name `split`."""
        crop = partial(centre_crop, crop_pct=self.crop_pct)
        decode = partial(decode_images, self.files[:, 0], self.image_size, crop, channels=self.channels)
        return torch.from_numpy(self.cached(f"{split}-{self.crop_pct:g}", decode))


def centre_crop(path, size, *, crop_pct=CROP_PCT, channels=3):
    """A test image, (C, size, size) uint8: the short side resized to size / crop_pct, then the centre square."""
    short_side = round(size / crop_pct)
    image = resize(upright_image(path, short_side, channels), short_side)
    return channels_first(center_crop(image, size))


def upright_size(path):
    """(height, width) of an image after its EXIF rotation. Decodes no pixel if the format allows that."""
    with open_image(path) as image:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # the orientations with sides swapped
        return image.size if turned else image.size[::-1]


def read_large_folder(root, image_size, cache_dir=None, *, crop_pct=CROP_PCT, channels=3):
    """(class names, {split: (LargeImages, labels, file names)}) for the splits of find_splits and crops of image_size.

    Warns on stderr if some images are smaller. Raises UserError if the folder cannot be used or a file is not an image.
    """
    names, files, splits = list_folder(root)
    paths = [path for path, _, _ in files]
    sizes = cached_array(root, "sizes", files, lambda: np.array([*by_all_cores(upright_size, paths)]), cache_dir)
    short_sides = sizes.min(1, keepdims=True)
    if small := (short_sides < image_size).sum():
        reach = f"smaller than --image-size {image_size} (the smallest: {short_sides.min()} pixels)"
        print(f"warning: {small:,} of {len(sizes):,} images are {reach} and are enlarged", file=sys.stderr)
    largest = MAX_SIDE * image_size
    sizes = torch.from_numpy(np.where(short_sides > largest, sizes * largest // short_sides, sizes))
    images = LargeImages(root, np.array(files, dtype=object), sizes, image_size, crop_pct, cache_dir, channels)
    parts = torch.arange(len(files)).split([len(labels) for labels, _ in splits.values()])
    return names, {split: (images[part], *splits[split]) for split, part in zip(splits, parts)}
