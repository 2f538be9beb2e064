"""Random transforms of a batch of images on its device, another draw for every image.

Random numbers come from a generator on the host, so that every device sees the same images (but for a grey level
where it interpolates in TF32) and none is waited for. Images are uint8 up to `normalize`; only `random_erasing` and
`cutout` come after it.
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
    """Shift each of the images (B, C, H, W) by up to `padding` pixels either way, each offset equally likely.

    Four sides of `padding` pixels of grey level `fill`, then a crop of the old size (He et al. 2016, section 4.2).
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count, 1, 1), generator=generator)
    top, left = offsets.to(images.device, non_blocking=True)
    padded = F.pad(images, (padding,) * 4, value=fill)
    first_rows = padded.shape[2] * torch.arange(count * channels, device=images.device).view(count, channels, 1)
    starts = (first_rows + top + torch.arange(height, device=images.device)) * padded.shape[3] + left
    rows = padded.flatten().unfold(0, width, 1)  # from every pixel the `width` pixels that follow it, without a copy
    return rows.index_select(0, starts.flatten()).view(images.shape)


def random_boxes(count, size, generator, *, scale, ratio, largest):
    """Boxes (count, 4) of top, left, height, width in whole pixels, inside an image of `size` (H, W).

    The share of the area is uniform in scale, the ratio width / height log-uniform in ratio: the first of ten draws
    that is no larger than `largest` (height, width), a box of no pixels where none is.
    """
    height, width = size
    area = height * width * torch.empty(count, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(count, 10).uniform_(*torch.tensor(ratio).log().tolist(), generator=generator).exp()
    sides = torch.stack([area / aspect, area * aspect]).sqrt().round().int()  # (2, count, 10)
    fits = ((sides > 0) & (sides <= torch.tensor(largest)[:, None, None])).all(0)
    first = fits.int().argmax(1).expand(2, -1)[..., None]
    sides = sides.gather(2, first)[..., 0] * fits.any(1)
    room = torch.tensor(size)[:, None] - sides + 1
    corners = (torch.rand(2, count, generator=generator) * room).int().minimum(room - 1)
    return torch.cat([corners, sides]).T


def random_crop_boxes(count, size, generator, *, scale, ratio):
    """random_boxes to crop by (Szegedy et al. 2015, as torchvision draws them): the whole image where none fits."""
    boxes = random_boxes(count, size, generator, scale=scale, ratio=ratio, largest=size)
    return torch.where(boxes[:, 2:3] > 0, boxes, boxes.new_tensor([0, 0, *size]))


def interpolation_matrices(start, length, size):
    """Matrices (B, size, size) that stretch the `length` pixels from `start` of each row of `size` pixels to all of it.

    Bilinear with pixel centres at halves, the border pixel repeated; start and length are (B,).
    """
    pixels = torch.arange(size, device=start.device)
    source = ((pixels + 0.5) * (length / size)[:, None] - 0.5).clamp(min=0)  # (B, size)
    source = torch.minimum(source, (length - 1)[:, None]) + start[:, None]
    return (1 - (source[:, :, None] - pixels).abs()).clamp(min=0)  # (B, to, from)


def resized_crop(images, boxes):
    """Cut a box out of each of the images (B, C, H, W) uint8 and enlarge it to (H, W), bilinearly, as uint8.

    boxes is (B, 4): top, left, height, width. Two small matrix products per image take the place of a gather.
    """
    height, width = images.shape[2:]
    top, left, h, w = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = interpolation_matrices(top, h, height)[:, None]
    columns = interpolation_matrices(left, w, width)[:, None]
    return (rows @ images.float() @ columns.mT).round_().byte()


def random_resized_crop(images, generator, *, scale, ratio):
    """resized_crop of each image by a box of its own (see random_crop_boxes)."""
    return resized_crop(images, random_crop_boxes(len(images), images.shape[2:], generator, scale=scale, ratio=ratio))


def nearest_affine(images, matrices, *, fill):
    """Sample each of the images (B, C, H, W) at the pixels nearest to where its matrix points, `fill` outside.

    matrices (B, 2, 3), float64 on the host, take (x, y, 1) in the result to (x, y) in the source, both in pixels from
    the image's centre. Each float32 operation here is torchvision's (`affine` of its functional), so that a point
    halfway between two pixels falls as it does there; no matrix product, since a device may round its factors.
    """
    count, channels, height, width = images.shape
    device = images.device
    half = torch.tensor([width, height]) / 2
    scaled = (matrices.float() / half[:, None]).to(device, non_blocking=True)[..., None, None]  # (B, 2, 3, 1, 1)
    x = torch.arange(width, device=device) - (width - 1) / 2
    y = (torch.arange(height, device=device) - (height - 1) / 2)[:, None]
    column, row = (
        # from -1 to 1 across the image, then in pixels of the framed one
        (x * a + y * b).add_(c).add_(1).mul_(side / 2).sub_(0.5).round_().clamp_(-1, side).add_(1)
        for (a, b, c), side in zip(scaled.permute(1, 2, 0, 3, 4), (width, height))
    )
    source = row.mul_(width + 2).add_(column).long()  # (B, H, W); whole in float32 up to 16 million pixels
    framed = F.pad(images, (1, 1, 1, 1), value=fill).flatten(2)
    source = source.view(count, 1, -1).expand(-1, channels, -1)
    return framed.gather(2, source).view(images.shape)


def rotations(angles):
    """Matrices (B, 2, 3) for nearest_affine that turn counter-clockwise by angles (B,) in degrees."""
    cos, sin, zero = angles.deg2rad().cos(), angles.deg2rad().sin(), torch.zeros_like(angles)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)


def random_rotation(images, generator, *, degrees, fill=0):
    """Turn each of the images (B, C, H, W) by an angle uniform in [-degrees, degrees], to the nearest pixel."""
    angles = torch.empty(len(images), dtype=torch.float64).uniform_(-degrees, degrees, generator=generator)
    return nearest_affine(images, rotations(angles), fill=fill)


def normalize(images, mean, std):
    """(images / 255 - mean) / std as float, of images (B, 3, H, W) uint8.

    mean and std are tensors (3,) on the images' device, as fractions of 255; so nothing is sent there each time.
    """
    scale, offset = 1 / (255 * std), -mean / std
    return images.float().mul_(scale[:, None, None]).add_(offset[:, None, None])


def erase(images, boxes):
    """Set a box of each of the normalised images (B, 3, H, W) to 0, which is the mean.

    boxes is (B, 4): top, left, height, width; it may be empty or stand out over the border.
    """
    top, left, height, width = boxes.to(images.device, non_blocking=True)[:, :, None].unbind(1)
    rows = torch.arange(images.shape[2], device=images.device) - top
    columns = torch.arange(images.shape[3], device=images.device) - left
    rows, columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)  # (B, H), (B, W)
    kept = ~(rows[:, :, None] & columns[:, None])
    return images * kept[:, None]  # where() and masked_fill() are slower by far


def random_erasing(images, generator, *, p, scale=(0.02, 1 / 3), ratio=(0.3, 3.3)):
    """Erase a rectangle of each of the normalised images (B, 3, H, W) with probability p (Zhong et al. 2020).

    Its share of the area is uniform in scale, its ratio height / width log-uniform in ratio; it is smaller than the
    image both ways, as torchvision draws it.
    """
    (height, width), (low, high) = images.shape[2:], ratio
    erased = torch.rand(len(images), 1, generator=generator) < p
    boxes = random_boxes(
        len(images),
        (height, width),
        generator,
        scale=scale,
        ratio=(1 / high, 1 / low),  # width / height
        largest=(height - 1, width - 1),
    )
    return erase(images, boxes * erased)


def cutout(images, generator, *, size):
    """Erase a square of `size` pixels of each of the normalised images (B, 3, H, W) (DeVries & Taylor 2017).

    Its centre is uniform over the image's pixels; what stands out over the border is lost.
    """
    centres = (torch.rand(len(images), 2, generator=generator) * torch.tensor(images.shape[2:])).long()
    return erase(images, torch.cat([centres - size // 2, torch.full_like(centres, size)], dim=1))
