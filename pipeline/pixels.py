"""What all pixels of a dataset say: their statistics, and which images stand in two splits."""

from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.functional import resize

from errors import UserError
from pipeline.decoding import both_sides, by_all_cores

SAMPLE = 2000  # the number of large images from which mean and standard deviation are computed
TESTED = {"val": "validation", "test": "test"}  # {split: what its images are called}


def resized(images, size):
    """Images (N, C, H, W) uint8 resized to size, as both_sides knows it, with antialiasing."""
    sides = both_sides(size)
    if images.shape[2:] == sides:
        return images
    return torch.cat([resize(chunk, list(sides), antialias=True) for chunk in images.split(1000)])


def channel_statistics(images):
    """Mean and standard deviation of each channel over all pixels, as fractions of 255.

    For large images they are computed from a sample, the same whether the images are kept in memory or not.
    """
    if torch.is_tensor(images):
        return statistics_of_chunks(images.split(1000))
    some = images[:: -(-len(images) // SAMPLE)]
    chunks = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in by_all_cores(some.decode, range(len(some))))
    return some.cached("statistics", lambda: np.array(statistics_of_chunks(chunks))).tolist()


def statistics_of_chunks(chunks):
    """channel_statistics of all images in the chunks, each (N, C, H, W) uint8."""
    count, total, squares = 0, 0, 0
    for chunk in chunks:
        chunk = chunk.transpose(0, 1).flatten(1).to(torch.int64)
        count += chunk.shape[1]
        total += chunk.sum(1)
        squares += (chunk * chunk).sum(1)
    mean = total.double() / count
    std = (squares.double() / count - mean**2).sqrt().clamp(min=1)  # a channel of one value is not scaled
    return (mean / 255).tolist(), (std / 255).tolist()


def repeated_images(splits, seen="train", name="training"):
    """How many validation and test images the split `seen` has as well, as text; empty if there are none.

    Images of one size are compared by their pixels, LargeImages by the bytes of their files.
    """
    learnt, found = splits[seen].images, []
    tested = {key: splits[key].images for key in TESTED if key in splits}
    sizes = set()
    if not torch.is_tensor(learnt):
        sizes = {*learnt.files[:, 1]} & {size for images in tested.values() for size in images.files[:, 1]}
    known = {*contents(learnt, sizes)}
    for key, images in tested.items():
        if count := sum(content in known for content in contents(images, sizes)):
            found.append(f"{count:,} of {len(images):,} {TESTED[key]} images")
    return f"{' and '.join(found)} are {name} images as well" if found else ""


def contents(images, sizes):
    """A number for the content of each image, 64 bits; of LargeImages, for that of each file whose size is in sizes."""
    if torch.is_tensor(images):
        yield from (hash(image.tobytes()) for image in images.numpy())
        return
    for path in (path for path, size, _ in images.files if size in sizes):
        try:
            yield hash(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
