"""Random transforms of a batch of images on its device; each image draws its own parameters.

Random numbers come from a generator on the host. So every device draws the same, and the host never waits for the
device. Images are uint8 until `normalize`; only `random_erasing` and `cutout` come after it.
"""

import torch
import torch.nn.functional as F


def random_flip(images, generator, *, p=0.5):
    """Mirror each of the images (B, C, H, W) left to right with probability p."""
    count = len(images)
    flipped = torch.rand(count, generator=generator) < p
    source = (torch.arange(count) + count * flipped).to(images.device, non_blocking=True)
    return torch.cat([images, images.flip(3)]).index_select(0, source)


def padded_crop(images, generator, *, padding, fill=0):
    """Shift each of the images (B, C, H, W) by up to `padding` pixels in each direction, all offsets equally likely.

    Pads all four sides with grey level `fill`, then crops to the old size (He et al. 2016, section 4.2).
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count, 1, 1), generator=generator)
    top, left = offsets.to(images.device, non_blocking=True)
    padded = F.pad(images, (padding,) * 4, value=fill)
    first_rows = padded.shape[2] * torch.arange(count * channels, device=images.device).view(count, channels, 1)
    starts = (first_rows + top + torch.arange(height, device=images.device)) * padded.shape[3] + left  # (B, C, H)
    rows = padded.flatten().unfold(0, width, 1)  # a view: row i holds the `width` pixels from pixel i on
    return rows.index_select(0, starts.flatten()).view(images.shape)


def whole_sides(area, aspect):
    """Height and width (..., 2), in whole pixels, of boxes of an area and a ratio width / height."""
    return torch.stack([area / aspect, area * aspect], -1).sqrt().round().long()


def random_sides(sizes, generator, *, scale, ratio, largest, fallback):
    """Height and width (B, 2), in whole pixels, of a random box in each image of sizes (B, 2).

    The box's share of the image's area is uniform in scale, width / height is log-uniform in ratio. The first of ten
    draws that is not larger than `largest` (B, 2) is taken; if none is, `fallback` (B, 2).
    """
    count = len(sizes)
    area = sizes.prod(1, keepdim=True) * torch.empty(count, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(count, 10).uniform_(*torch.tensor(ratio).log().tolist(), generator=generator).exp()
    sides = whole_sides(area, aspect)  # (B, 10, 2)
    fits = ((sides > 0) & (sides <= largest[:, None])).all(2)  # (B, 10)
    first = sides[torch.arange(count), fits.int().argmax(1)]
    return torch.where(fits.any(1, keepdim=True), first, fallback)


def place_boxes(sides, sizes, position):
    """Boxes (B, 4) of top, left, height, width inside images of sizes (B, 2); position (B, 2) is uniform in [0, 1)."""
    room = sizes - sides
    corners = (position * (room + 1)).long().minimum(room)
    return torch.cat([corners, sides], 1)


def random_crop_boxes(count, size, generator, *, scale, ratio):
    """Boxes (count, 4) in images of one `size` (H, W) (Szegedy et al. 2015); the whole image if none of ten fits."""
    sizes = torch.tensor(size).expand(count, 2)
    sides = random_sides(sizes, generator, scale=scale, ratio=ratio, largest=sizes, fallback=sizes)
    return place_boxes(sides, sizes, torch.rand(2, count, generator=generator).T)


def interpolation_matrices(start, length, size):
    """Matrices (B, size, size) that enlarge `length` pixels from `start` on, of a row of `size`, to the whole row.

    Bilinear, pixel centres at halves, border pixels repeated; start and length are (B,).
    """
    pixels = torch.arange(size, device=start.device)
    source = ((pixels + 0.5) * (length / size)[:, None] - 0.5).clamp(min=0)  # (B, size)
    source = torch.minimum(source, (length - 1)[:, None]) + start[:, None]
    return (1 - (source[:, :, None] - pixels).abs()).clamp(min=0)  # (B, to, from)


def resized_crop(images, boxes):
    """Crop a box from each of the images (B, C, H, W) uint8 and enlarge it to (H, W), bilinearly, as uint8.

    boxes is (B, 4): top, left, height, width. Two small matrix products per image replace a gather.
    """
    height, width = images.shape[2:]
    top, left, h, w = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = interpolation_matrices(top, h, height)[:, None]  # (B, 1, H, H)
    columns = interpolation_matrices(left, w, width)[:, None]  # (B, 1, W, W)
    return (rows @ images.float() @ columns.mT).round_().byte()


def random_resized_crop(images, generator, *, scale, ratio):
    """resized_crop of the images (B, C, H, W) with random_crop_boxes."""
    return resized_crop(images, random_crop_boxes(len(images), images.shape[2:], generator, scale=scale, ratio=ratio))


def nearest_affine(images, matrices, *, fill):
    """Transform images (B, C, H, W) by matrices, taking the nearest pixel, or `fill` outside the image.

    matrices (B, 2, 3), float64 on the host, map (x, y, 1) in the result to (x, y) in the source, both in pixels from
    the image's centre. The float32 operations are those of torchvision's `affine`, in the same order, so that a point
    halfway between two pixels is rounded alike. There is no matrix product, since a device may round its factors.
    """
    count, channels, height, width = images.shape
    device = images.device
    half = torch.tensor([width, height]) / 2
    scaled = (matrices.float() / half[:, None]).to(device, non_blocking=True)[..., None, None]  # (B, 2, 3, 1, 1)
    x = torch.arange(width, device=device) - (width - 1) / 2
    y = (torch.arange(height, device=device) - (height - 1) / 2)[:, None]
    column, row = (
        # from -1 to 1 across the image, then in pixels of the image with a border of one pixel
        (x * a + y * b).add_(c).add_(1).mul_(side / 2).sub_(0.5).round_().clamp_(-1, side).add_(1)
        for (a, b, c), side in zip(scaled.permute(1, 2, 0, 3, 4), (width, height))
    )
    source = row.mul_(width + 2).add_(column).long()  # (B, H, W); exact in float32 up to 16 million pixels
    framed = F.pad(images, (1, 1, 1, 1), value=fill).flatten(2)
    source = source.view(count, 1, -1).expand(-1, channels, -1)
    return framed.gather(2, source).view(images.shape)


def rotations(angles):
    """Matrices (B, 2, 3) for nearest_affine that rotate counter-clockwise by angles (B,) in degrees."""
    cos, sin, zero = angles.deg2rad().cos(), angles.deg2rad().sin(), torch.zeros_like(angles)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)


def random_rotation(images, generator, *, degrees, fill=0):
    """Rotate each of the images (B, C, H, W) by an angle uniform in [-degrees, degrees], taking the nearest pixel."""
    angles = torch.empty(len(images), dtype=torch.float64).uniform_(-degrees, degrees, generator=generator)
    return nearest_affine(images, rotations(angles), fill=fill)


def normalize(images, mean, std):
    """(images / 255 - mean) / std as float, for images (B, C, H, W) uint8.

    mean and std are tensors (C,) on the images' device, as fractions of 255.
    """
    scale, offset = 1 / (255 * std), -mean / std
    return images.float().mul_(scale[:, None, None]).add_(offset[:, None, None])


def erase(images, boxes):
    """Set a box of each of the normalised images (B, C, H, W) to 0, which is the mean.

    boxes is (B, 4): top, left, height, width; a box may be empty or extend beyond the border.
    """
    top, left, height, width = boxes.to(images.device, non_blocking=True)[:, :, None].unbind(1)
    rows = torch.arange(images.shape[2], device=images.device) - top
    columns = torch.arange(images.shape[3], device=images.device) - left
    rows, columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)  # (B, H), (B, W)
    kept = ~(rows[:, :, None] & columns[:, None])  # (B, H, W)
    return images * kept[:, None]  # much faster than where() and masked_fill()


def random_erasing(images, generator, *, p, scale=(0.02, 1 / 3), ratio=(0.3, 3.3)):
    """Erase a rectangle of each of the normalised images (B, C, H, W) with probability p (Zhong et al. 2020).

    Drawn as in torchvision: the share of the area is uniform in scale, height / width is log-uniform in ratio, and both
    sides are smaller than the image's. Nothing is erased if none of ten draws fits.
    """
    count, (low, high) = len(images), ratio
    sizes = torch.tensor(images.shape[2:]).expand(count, 2)
    limits = {"largest": sizes - 1, "fallback": torch.zeros_like(sizes)}
    erased = torch.rand(count, 1, generator=generator) < p
    # random_sides takes width / height
    sides = random_sides(sizes, generator, scale=scale, ratio=(1 / high, 1 / low), **limits)
    return erase(images, place_boxes(sides, sizes, torch.rand(2, count, generator=generator).T) * erased)


def cutout(images, generator, *, size):
    """Erase a square of `size` pixels of each of the normalised images (B, C, H, W) (DeVries & Taylor 2017).

    Its centre is uniform over the image's pixels; the part beyond the border is ignored.
    """
    centres = (torch.rand(len(images), 2, generator=generator) * torch.tensor(images.shape[2:])).long()
    return erase(images, torch.cat([centres - size // 2, torch.full_like(centres, size)], dim=1))
