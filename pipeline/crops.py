"""Random crops of images of any shape, a batch at a time: cut from memory, or by workers that decode the files."""

import os
import signal
from contextlib import suppress
from functools import partial
from itertools import starmap
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resized_crop

from errors import UserError
from seeding import seed_for


def random_crops(sizes, generator, *, scale, ratio):
    """Boxes (B, 4) of top, left, height, width in whole pixels, each in an image of its own size, sizes (B, 2).

    As augment.random_boxes draws them; where none of the ten draws fits, the largest box of the ratio closest to the
    image's, anywhere in it. (torchvision has that one in the middle, which loses the ends of a wide image.)
    """
    count, low_high = len(sizes), torch.tensor(ratio)
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * torch.empty(count, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(count, 10).uniform_(*low_high.log().tolist(), generator=generator).exp()
    closest = (width / height).clamp(*ratio)
    largest = torch.minimum(height, width / closest) ** 2 * closest
    area, aspect = torch.cat([area, largest], 1), torch.cat([aspect, closest], 1)
    sides = torch.stack([area / aspect, area * aspect], 2).sqrt().round().long()  # (B, 11, 2)
    fits = ((sides > 0) & (sides <= sizes[:, None])).all(2)
    sides = sides[torch.arange(count), fits.int().argmax(1)]
    room = sizes - sides
    corners = (torch.rand(count, 2, generator=generator) * (room + 1)).long().minimum(room)
    return torch.cat([corners, sides], 1)


def centre_boxes(sizes, crop_pct):
    """The boxes (B, 4) of the images' centres: squares of crop_pct of their short sides."""
    sides = (sizes.amin(1, keepdim=True) * crop_pct).round().long().expand(-1, 2)
    return torch.cat([(sizes - sides) // 2, sides], 1)


def antialiasing_matrices(lengths, size, longest):
    """Matrices (B, size, longest) that resize the first `lengths` (B,) pixels of a row to `size` pixels.

    Bilinear; where they shrink, with the triangle as wide as a new pixel, as PIL and torchvision have it.
    """
    step = (lengths / size)[:, None, None]
    pixels = torch.arange(longest, device=lengths.device)
    centres = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * step  # (B, size, 1)
    weights = (1 - (pixels + 0.5 - centres).abs() / step.clamp(min=1)).clamp(min=0) * (pixels < lengths[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def cut_together(buffer, starts, widths, boxes, size):
    """Cut a box out of each of B images and resize it: (B, 3, size, size) uint8, without a loop over the images.

    buffer is as LargeImages.decode_all has it, and starts (B,) is where the images begin in it; starts, widths and
    boxes are on the host. The result is within a grey level of torchvision's resized_crop.
    """
    top, left, height, width = boxes.unbind(1)
    tallest, widest = height.max().item(), width.max().item()
    rows = top[:, None] + torch.arange(tallest).minimum(height[:, None] - 1)  # (B, tallest)
    first = (starts[:, None] + 3 * (rows * widths[:, None] + left[:, None])).to(buffer.device, non_blocking=True)
    lines = buffer.unfold(0, 3 * widest, 1)  # from every byte those that follow it, without a copy
    pixels = lines.index_select(0, first.flatten()).view(*first.shape, -1).float()  # (B, tallest, 3 widest)
    height, width = torch.stack([height, width]).to(buffer.device, non_blocking=True)
    pixels = antialiasing_matrices(height, size, tallest) @ pixels
    pixels = pixels.unflatten(2, (widest, 3)).permute(0, 3, 1, 2)  # (B, 3, size, widest)
    return (pixels @ antialiasing_matrices(width, size, widest).mT[:, None]).round_().byte()


class Crops:
    """Random crops of LargeImages, or their centres without `scale`: out of `buffer`, else of files decoded anew.

    On the host each crop is torchvision's resized_crop, so that both ways give the same, to the bit.
    """

    def __init__(self, images, *, scale, ratio, seed, buffer=None):
        self.images, self.scale, self.ratio, self.seed, self.buffer = images, scale, ratio, seed, buffer
        num_bytes = 3 * images.sizes.prod(1)
        self.starts = num_bytes.cumsum(0) - num_bytes

    def cut(self, indices, epoch, step):
        """A batch (B, 3, S, S) uint8, by boxes that follow from (seed, epoch, step)."""
        sizes, size = self.images.sizes[indices], self.images.image_size
        if self.scale:
            generator = torch.Generator().manual_seed(seed_for("augmentation", self.seed, epoch, step, 1))  # 1: crops
            boxes = random_crops(sizes, generator, scale=self.scale, ratio=self.ratio)
        else:
            boxes = centre_boxes(sizes, self.images.crop_pct)
        if self.buffer is not None and self.buffer.is_cuda:
            return cut_together(self.buffer, self.starts[indices], sizes[:, 1], boxes, size)
        cut = [resized_crop(self.image(index), *box, [size, size]) for index, box in zip(indices, boxes.tolist())]
        return torch.stack(cut)

    def image(self, index):
        """One image, (3, H, W) uint8."""
        if self.buffer is None:
            pixels = torch.from_numpy(self.images.decode(index))
        else:
            height, width = self.images.sizes[index].tolist()
            pixels = self.buffer[self.starts[index] :][: 3 * height * width].view(height, width, 3)
        return pixels.permute(2, 0, 1)

    def __getitem__(self, key):
        """What a DataLoader asks its workers for; a UserError is given back, since it makes a traceback of it."""
        try:
            return self.cut(*key)
        except UserError as error:
            return error


def stand_apart(worker):
    """Keep a Ctrl-C or SIGTERM to the whole group from a worker: training ends the step in hand, saves, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked one has training's handler
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def free_memory(device):
    """How many bytes are free on the host, or on a CUDA device if it has less; 8 GiB where the host does not tell."""
    free = 8 * 2**30
    with suppress(OSError):  # there is no such file on Windows and macOS
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def crop_batches(images, *, scale, ratio, seed, device, cache_gib=None, workers=None):
    """A function that turns keys [(indices, epoch, step), ...] into batches, one by one, as Crops.cut does.

    LargeImages that take up to cache_gib (a quarter of what is free) are decoded once, and lie on the device where
    that is a GPU; others are decoded anew each time by `workers` processes (one a core, 16 at most).
    """
    budget = free_memory(device) / 4 if cache_gib is None else cache_gib * 2**30
    buffer = None
    if images.num_bytes <= budget:
        workers, buffer = 0, images.decode_all()
        buffer = buffer.to(device) if device.type == "cuda" else buffer
    else:
        workers = min(os.cpu_count(), 16) if workers is None else workers
        held, limit = images.num_bytes / 2**30, budget / 2**30
        print(f"{held:.2f} GiB of images, more than --cache-gib {limit:.2f}: decoded anew by {workers} workers")
    crops = Crops(images, scale=scale, ratio=ratio, seed=seed, buffer=buffer)
    if not workers:
        return partial(starmap, crops.cut)
    wanted = []
    loader = DataLoader(
        crops,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        worker_init_fn=stand_apart,
        generator=torch.Generator(),  # not the global one
    )

    def streamed(keys):
        wanted[:] = keys
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    return streamed
