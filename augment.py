"""Random transforms of a batch of uint8 pictures on its device, another draw for every picture.

Random numbers come from a generator on the host, so that every device sees the same pictures.
"""

import torch


def random_flip(pictures, generator, *, p=0.5):
    """Mirror each of the pictures (B, C, H, W) left to right with probability p."""
    flipped = torch.rand(len(pictures), generator=generator) < p
    flipped = flipped.to(pictures.device, non_blocking=True)[:, None, None, None]
    return torch.where(flipped, pictures.flip(3), pictures)


def random_crop_boxes(count, size, generator, *, scale, ratio):
    """Boxes (count, 4) of top, left, height, width in whole pixels, inside a picture of `size` (H, W).

    The share of the area is uniform in scale, the ratio width / height log-uniform in ratio (Szegedy et al. 2015, as
    torchvision draws them): the first of ten draws that fits, the whole picture where none does.
    """
    height, width = size
    area = height * width * torch.empty(count, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(count, 10).uniform_(*torch.tensor(ratio).log().tolist(), generator=generator).exp()
    w, h = (area * aspect).sqrt().round().int(), (area / aspect).sqrt().round().int()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1)
    h = torch.where(found, h.gather(1, first)[:, 0], height)
    w = torch.where(found, w.gather(1, first)[:, 0], width)
    room = torch.stack([height - h + 1, width - w + 1])
    top, left = (torch.rand(2, count, generator=generator) * room).int().minimum(room - 1)
    return torch.stack([top, left, h, w], dim=1)


def interpolation_matrices(start, length, size):
    """Matrices (B, size, size) that stretch the `length` pixels from `start` of each row of `size` pixels to all of it.

    Bilinear with pixel centres at halves, the border pixel repeated; start and length are (B,).
    """
    pixels = torch.arange(size, device=start.device)
    source = ((pixels + 0.5) * (length / size)[:, None] - 0.5).clamp(min=0)  # (B, size)
    source = torch.minimum(source, (length - 1)[:, None]) + start[:, None]
    return (1 - (source[:, :, None] - pixels).abs()).clamp(min=0)  # (B, to, from)


def resized_crop(pictures, boxes):
    """Cut a box out of each of the pictures (B, C, H, W) uint8 and enlarge it to (H, W), bilinearly, as uint8.

    boxes is (B, 4): top, left, height, width. Two small matrix products a picture take the place of a gather.
    """
    height, width = pictures.shape[2:]
    top, left, h, w = boxes.to(pictures.device, non_blocking=True).unbind(1)
    rows = interpolation_matrices(top, h, height)[:, None]
    columns = interpolation_matrices(left, w, width)[:, None]
    return (rows @ pictures.float() @ columns.mT).round_().byte()


def random_resized_crop(pictures, generator, *, scale, ratio):
    """resized_crop of each picture by a box of its own (see random_crop_boxes)."""
    return resized_crop(
        pictures, random_crop_boxes(len(pictures), pictures.shape[2:], generator, scale=scale, ratio=ratio)
    )
