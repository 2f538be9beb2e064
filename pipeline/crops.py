"""Random crops of images of any shape, in batches: from memory, or by workers that decode the files."""

import math
import os
import signal
from contextlib import contextmanager, suppress
from functools import partial
from itertools import starmap
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from errors import UserError, is_memory_error
from pipeline.augment import place_boxes, random_sides, whole_sides
from seeding import seed_for


def random_crops(sizes, generator, *, scale, ratio):
    """Boxes (B, 4) of top, left, height, width in whole pixels, each inside an image of its own size, sizes (B, 2).

    Drawn as in torchvision. If none of ten draws fits, the largest box with the closest ratio to the image's, anywhere
    in it; torchvision centres that box, so that the ends of a wide image never appear.
    """
    height, width = sizes.split(1, dim=1)
    closest = (width / height).clamp(*ratio)
    area = torch.minimum(height, width / closest) ** 2 * closest
    fallback = whole_sides(area, closest)[:, 0]
    sides = random_sides(sizes, generator, scale=scale, ratio=ratio, largest=sizes, fallback=fallback)
    return place_boxes(sides, sizes, torch.rand(len(sizes), 2, generator=generator))


def centre_boxes(sizes, crop_pct):
    """Boxes (B, 4) of centred squares, whose side is crop_pct of the short side of images of sizes (B, 2)."""
    sides = (sizes.amin(1, keepdim=True) * crop_pct).round().long().expand(-1, 2)
    return torch.cat([(sizes - sides) // 2, sides], 1)


def antialiasing_matrices(lengths, size, longest):
    """Matrices (B, size, longest) that resize the first `lengths` (B,) pixels of a row to `size` pixels.

    Bilinear; when shrinking, the filter is as wide as a new pixel, as in PIL and torchvision.
    """
    step = (lengths / size)[:, None, None]
    pixels = torch.arange(longest, device=lengths.device)
    centres = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * step  # (B, size, 1)
    weights = (1 - (pixels + 0.5 - centres).abs() / step.clamp(min=1)).clamp(min=0) * (pixels < lengths[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def cut_together(buffer, starts, widths, boxes, size, channels=3):
    """Crop a box from each of B images and resize it: (B, C, size, size) uint8, without a loop over the images.

    buffer is that of LargeImages.decode_all; starts (B,) is where each image begins in it. starts, widths and boxes are
    on the host. The result differs from torchvision's resized_crop by at most one grey level.
    """
    top, left, height, width = boxes.unbind(1)
    tallest, widest = height.max().item(), width.max().item()
    rows = top[:, None] + torch.arange(tallest).minimum(height[:, None] - 1)  # (B, tallest)
    first = (starts[:, None] + channels * (rows * widths[:, None] + left[:, None])).to(buffer.device, non_blocking=True)
    lines = buffer.unfold(0, channels * widest, 1)  # a view: row i holds the bytes from byte i on
    pixels = lines.index_select(0, first.flatten()).view(*first.shape, -1).float()  # (B, tallest, C * widest)
    height, width = torch.stack([height, width]).to(buffer.device, non_blocking=True)
    pixels = antialiasing_matrices(height, size, tallest) @ pixels  # (B, size, C * widest)
    pixels = pixels.unflatten(2, (widest, channels)).permute(0, 3, 1, 2)  # (B, C, size, widest)
    return (pixels @ antialiasing_matrices(width, size, widest).mT[:, None]).round_().byte()  # (B, C, size, size)


class Crops:
    """Random crops of LargeImages, or centre crops without `scale`; from `buffer`, or else decoded for each crop.

    On the host each crop is torchvision's resized_crop, so that both ways give the same bits.
    """

    def __init__(self, images, *, scale, ratio, seed, buffer=None):
        self.images, self.scale, self.ratio, self.seed, self.buffer = images, scale, ratio, seed, buffer
        num_bytes = images.channels * images.sizes.prod(1)
        self.starts = num_bytes.cumsum(0) - num_bytes

    def cut(self, indices, epoch, step):
        """A batch (B, C, S, S) uint8; its boxes follow from (seed, epoch, step)."""
        sizes, size = self.images.sizes[indices], self.images.image_size
        if self.scale:
            generator = torch.Generator().manual_seed(seed_for("augmentation", self.seed, epoch, step, 1))  # 1: crops
            boxes = random_crops(sizes, generator, scale=self.scale, ratio=self.ratio)
        else:
            boxes = centre_boxes(sizes, self.images.crop_pct)
        if self.buffer is not None and self.buffer.is_cuda:
            return cut_together(self.buffer, self.starts[indices], sizes[:, 1], boxes, size, self.images.channels)
        pairs = zip(indices, boxes.tolist())
        return torch.stack([v2.functional.resized_crop(self.image(i), *box, [size, size]) for i, box in pairs])

    def image(self, index):
        """One image, (C, H, W) uint8."""
        if self.buffer is None:
            pixels = torch.from_numpy(self.images.decode(index))
        else:
            height, width = self.images.sizes[index].tolist()
            shape = height, width, self.images.channels
            pixels = self.buffer[self.starts[index] :][: math.prod(shape)].view(shape)
        return pixels.permute(2, 0, 1)

    def __getitem__(self, key):
        """`cut` for a DataLoader's worker. A UserError is returned: raised, it would become a worker's traceback."""
        try:
            return self.cut(*key)
        except UserError as error:
            return error


def detach_worker(worker):
    """Keep Ctrl-C and SIGTERM from a worker: training finishes its step, saves, and then ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker has inherited training's handler
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def free_memory(device):
    """Free bytes on the host, or on a CUDA device if it has fewer; 8 GiB if the host's are unknown."""
    free = 8 * 2**30
    with suppress(OSError):  # Windows and macOS have no such file
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def place_images(images, device):
    """A tensor of images on the device, or as it is, on the host, if a GPU has not a third more memory free."""
    if device.type == "cuda" and images.nbytes > 3 / 4 * torch.cuda.mem_get_info(device)[0]:
        print(f"images of {images.nbytes / 2**30:.2f} GiB stay on the host: {device} has no room for them")
        return images
    return images.to(device)


@contextmanager
def images_in_memory():
    """A context, or a function's decorator, in which running out of memory is a UserError."""
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        raise UserError("the images do not fit into memory: use a smaller --image-size, or fewer images") from error


def crop_batches(images, *, scale, ratio, seed, device, cache_gib=None, workers=None):
    """A function from keys [(indices, epoch, step), ...] to an iterator over batches, each as from Crops.cut.

    LargeImages of up to cache_gib (default: a quarter of the free memory) are decoded once and kept on the GPU, or on
    the host without one. Larger ones are decoded in every epoch by `workers` processes (default: one per core, at most
    16).
    """
    budget = free_memory(device) / 4 if cache_gib is None else cache_gib * 2**30
    buffer = None
    if images.num_bytes <= budget:
        workers, buffer = 0, images.decode_all()
        buffer = place_images(buffer, device) if device.type == "cuda" else buffer
    else:
        workers = min(os.cpu_count(), 16) if workers is None else workers
        needed, limit = images.num_bytes / 2**30, budget / 2**30
        print(f"images of {needed:.2f} GiB exceed --cache-gib {limit:.2f}: {workers} workers decode them every epoch")
    return batches_by_workers(Crops(images, scale=scale, ratio=ratio, seed=seed, buffer=buffer), device, workers)


def batches_by_workers(crops, device, workers):
    """A function from keys to an iterator over crops.cut of each, in `workers` processes, or in this one if it is 0."""
    if not workers:
        return partial(starmap, crops.cut)
    pending = []  # the keys of the epoch under way; the loader's sampler
    loader = DataLoader(
        crops,
        batch_size=None,
        sampler=pending,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        worker_init_fn=detach_worker,
        generator=torch.Generator(),  # leaves the global generator alone
    )

    def stream(keys):
        pending[:] = keys
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    return stream
