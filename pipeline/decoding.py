"""From files to pixels: one image, or many on all cores."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import parent_process
from threading import Lock

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from errors import UserError, bar_disabled, regular_file

ONE_SPEAKER = Lock()


@contextmanager
def open_image(path):
    """A PIL image, not decoded yet. Raises UserError if it cannot be opened, or decoded in the block."""
    try:
        with Image.open(path if hasattr(path, "read") else regular_file(path)) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            yield image
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file raises is open-ended
        raise UserError(f"{path} cannot be decoded as an image ({str(error) or type(error).__name__})") from error


@cache
def warn_once(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def eight_bits(image, file_format):
    """An image, with 8 bits if it has 16 (PIL makes all above 255 white). Raises ValueError for one of 32 bits."""
    if image.mode == "F" or (image.mode == "I" and file_format not in ("PNG", "PPM")):  # in these two, I has 16 bits
        raise ValueError("its pixels have 32 bits, and what is white is unknown: save it with 8 or 16")
    if not image.mode.startswith("I"):
        return image
    if not parent_process():  # not in each of the workers
        with ONE_SPEAKER:
            warn_once("grey images of 16 bits are scaled to 8: 65,535 is white, and 12-bit values come out dark")
    return Image.fromarray(((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8))


def both_sides(size):
    """(height, width) of an image size, which is a number of pixels or [height, width]."""
    return (size, size) if isinstance(size, int) else tuple(size)


def channels_first(image):
    """A PIL image as an array (C, H, W) uint8."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def upright_image(path, size, channels=3):
    """A PIL image in RGB, or in grey if channels is 1, turned by its EXIF tag.

    A large JPEG is decoded smaller, but no side is shorter than size.
    """
    with open_image(path) as image:
        short, long = sorted(image.size)
        if size * size * long // short > Image.MAX_IMAGE_PIXELS:  # once its short side has this size
            raise ValueError(f"one of its sides is {long // short:,} times as long as the other")
        image.draft("RGB", (size, size))
        return eight_bits(ImageOps.exif_transpose(image), image.format).convert("L" if channels == 1 else "RGB")


def decode_image(path, size, channels=3):
    """One image, (C, H, W) uint8, of a size that both_sides knows."""
    height, width = both_sides(size)
    image = upright_image(path, max(height, width), channels)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return channels_first(image)


def decode_images(paths, size, decode=decode_image, *, channels=3):
    """decode(path, size, channels=channels) of each path, as one array (N, C, H, W) uint8."""
    images = np.empty((len(paths), channels, *both_sides(size)), np.uint8)
    for row, image in enumerate(by_all_cores(partial(decode, size=size, channels=channels), paths)):
        images[row] = image
    return images


def by_all_cores(decode, paths):
    """decode(path) of each path, in order, on all cores, with a progress bar.

    Paths for which it raises UserError are left out, and named together in one UserError at the end.
    """

    def attempt(path):
        try:
            return decode(path)
        except UserError as error:
            return error

    errors = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for result in tqdm(pool.map(attempt, paths), "decoding", len(paths), disable=bar_disabled()):
                if isinstance(result, UserError):
                    errors.append(str(result))
                else:
                    yield result
        finally:
            pool.shutdown(cancel_futures=True)
    if errors:
        more = f"; and {len(errors) - 3:,} more files" if len(errors) > 3 else ""
        raise UserError("; ".join(errors[:3]) + more)
