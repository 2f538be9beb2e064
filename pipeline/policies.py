"""AutoAugment, RandAugment and TrivialAugment on a batch of uint8 images; each image draws its own operations.

A policy has one or more stages. For each stage it draws, on the host, one operation and its magnitude per image. The
batch is then sorted by operation, so that each operation runs once, on all the images that drew it. The operations
compute what torchvision's functional transforms of uint8 tensors do.
"""

import torch

from pipeline.augment import nearest_affine, rotations

# torchvision's names
OPERATIONS = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize", "Identity", "Invert"),
)
AFFINE, SIGNED, WITHOUT_INVERT = 5, 9, 14  # the first 5 move pixels, the first 9 have a sign, the last is Invert
IDENTITY = OPERATIONS.index("Identity")

# Cubuk et al. 2019, table 7: operation, probability and index of the magnitude (0 to 9), for both stages
CIFAR10_POLICY = (
    ("Invert", 0.1, 0, "Contrast", 0.2, 6),
    ("Rotate", 0.7, 2, "TranslateX", 0.3, 9),
    ("Sharpness", 0.8, 1, "Sharpness", 0.9, 3),
    ("ShearY", 0.5, 8, "TranslateY", 0.7, 9),
    ("AutoContrast", 0.5, 0, "Equalize", 0.9, 0),
    ("ShearY", 0.2, 7, "Posterize", 0.3, 7),
    ("Color", 0.4, 3, "Brightness", 0.6, 7),
    ("Sharpness", 0.3, 9, "Brightness", 0.7, 9),
    ("Equalize", 0.6, 0, "Equalize", 0.5, 0),
    ("Contrast", 0.6, 7, "Sharpness", 0.6, 5),
    ("Color", 0.7, 7, "TranslateX", 0.5, 8),
    ("Equalize", 0.3, 0, "AutoContrast", 0.4, 0),
    ("TranslateY", 0.4, 3, "Sharpness", 0.2, 6),
    ("Brightness", 0.9, 6, "Color", 0.2, 8),
    ("Solarize", 0.5, 2, "Invert", 0.0, 0),
    ("Equalize", 0.2, 0, "AutoContrast", 0.6, 0),
    ("Equalize", 0.2, 0, "Equalize", 0.6, 0),
    ("Color", 0.9, 9, "Equalize", 0.6, 0),
    ("AutoContrast", 0.8, 0, "Solarize", 0.2, 8),
    ("Brightness", 0.1, 3, "Color", 0.7, 0),
    ("Solarize", 0.4, 5, "AutoContrast", 0.9, 0),
    ("TranslateY", 0.9, 9, "TranslateY", 0.7, 9),
    ("AutoContrast", 0.9, 0, "Solarize", 0.8, 3),
    ("Equalize", 0.8, 0, "Invert", 0.1, 0),
    ("TranslateY", 0.7, 9, "AutoContrast", 0.9, 0),
)


def move(images, operation, magnitude, *, fill):
    """Shear, translate or rotate images (n, 3, H, W), all by one gather; operation and magnitude are (n,)."""
    height, width = images.shape[2:]
    amounts = torch.zeros(AFFINE, len(images), dtype=torch.float64).scatter_(0, operation[None], magnitude[None])
    shear_x, shear_y, right, down, angle = amounts
    matrices = rotations(angle)
    matrices[:, 0, 1] += shear_x  # about the upper left corner
    matrices[:, 1, 0] += shear_y
    matrices[:, 0, 2] += shear_x * (height / 2) - right.trunc()
    matrices[:, 1, 2] += shear_y * (width / 2) - down.trunc()
    return nearest_affine(images, matrices, fill=fill)


def blend(degenerate, images, magnitude):
    """Move images away from the degenerate ones if the magnitude is above 0, towards them if it is below."""
    return torch.lerp(degenerate, images.float(), 1 + magnitude).clamp_(0, 255).byte()


def grey(images):
    """The luminance (n, 1, H, W) of images (n, C, H, W), rounded down to whole levels, as float."""
    if images.shape[1] == 1:
        return images.float()  # so that `color` changes nothing, as in torchvision
    red, green, blue = images.float().split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def brightness(images, magnitude):
    return blend(torch.zeros_like(magnitude), images, magnitude)


def color(images, magnitude):
    return blend(grey(images), images, magnitude)


def contrast(images, magnitude):
    return blend(grey(images).mean((2, 3), keepdim=True), images, magnitude)


def sharpness(images, magnitude):
    """Blend with a blur of 3 x 3 pixels whose centre weighs 5 and the others 1; the border does not change."""
    rows = images.short()
    rows = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]  # (n, 3, H - 2, W)
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # (n, 3, H - 2, W - 2)
    blurred = images.float()
    inner = blurred[:, :, 1:-1, 1:-1]
    inner.mul_(4).add_(around).div_(13).round_()  # in place: also in `blurred`
    return blend(blurred, images, magnitude)


def posterize(images, bits):
    lost = (8 - bits).byte()
    return images >> lost << lost


def solarize(images, threshold):
    return images ^ 255 * (images >= threshold).byte()  # 255 - v is v ^ 255; torch.where is much slower


def autocontrast(images, magnitude):
    """Stretch each channel to 0..255; a channel with a single value does not change."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = low == high
    scale = 255 / torch.where(flat, 255, high - low)
    return (images - torch.where(flat, 0, low)).mul(scale).byte()


def equalize(images, magnitude):
    """Flatten each channel's histogram with a look-up table of 256 levels, in integers as in Pillow."""
    levels = images.flatten(2).long()  # (n, 3, H * W)
    histogram = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    below = histogram.cumsum(2) - histogram
    step = below.gather(2, levels.amax(2, keepdim=True)) // 255  # without the pixels of the highest level
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255).byte()
    table = torch.where(step > 0, table, torch.arange(256, dtype=torch.uint8, device=images.device))
    return table.gather(2, levels).view(images.shape)


def identity(images, magnitude):
    return images


def invert(images, magnitude):
    return 255 - images


# OPERATIONS[AFFINE:]; each takes images (n, C, H, W) uint8 and magnitudes (n, 1, 1, 1) float
CHANGES = (brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize, identity, invert)


def apply_operation(images, operation, magnitude, *, fill):
    """Apply to each of the images (B, C, H, W) uint8 its own operation, with its own magnitude.

    operation (B,) int64, indices in OPERATIONS, and magnitude (B,) float64 are on the host, so that the host never
    waits for the device. `fill` is the grey level outside the images.
    """
    device = images.device
    operation, order = operation.sort(stable=True)
    magnitude = magnitude[order]
    counts = operation.bincount(minlength=len(OPERATIONS)).tolist()
    counts = [sum(counts[:AFFINE]), *counts[AFFINE:]]  # the affine operations are one group
    groups = images.index_select(0, order.to(device, non_blocking=True)).split(counts)
    magnitudes = magnitude.float().to(device, non_blocking=True).view(-1, 1, 1, 1).split(counts)
    done = []
    if moved := counts[0]:
        done.append(move(groups[0], operation[:moved], magnitude[:moved], fill=fill))
    for change, group, amount in zip(CHANGES, groups[1:], magnitudes[1:], strict=True):
        if len(group):
            done.append(change(group, amount))
    return torch.cat(done).index_select(0, order.argsort().to(device, non_blocking=True))


def apply_operations(images, operations, magnitudes, *, fill):
    """apply_operation for each stage; operations and magnitudes are (B, stages)."""
    for operation, magnitude in zip(operations.T, magnitudes.T):
        images = apply_operation(images, operation, magnitude, fill=fill)
    return images


def magnitude_table(bins, *, shear, right, down, degrees, enhance, bits):
    """Magnitudes (len(OPERATIONS), bins), from no change to the largest; posterize removes up to `bits` bits."""
    largest = (shear, shear, right, down, degrees, enhance, enhance, enhance, enhance)
    table = torch.zeros(len(OPERATIONS), bins)
    table[:SIGNED] = torch.stack([torch.linspace(0, end, bins) for end in largest])
    table[OPERATIONS.index("Posterize")] = 8 - torch.linspace(0, bits, bins).round()
    table[OPERATIONS.index("Solarize")] = torch.linspace(255, 0, bins)
    return table.double()


def usual_magnitudes(bins, size):
    """The magnitude_table of AutoAugment and RandAugment for images of `size` (H, W)."""
    down, right = (150 / 331 * side for side in size)
    return magnitude_table(bins, shear=0.3, right=right, down=down, degrees=30, enhance=0.9, bits=4)


def wide_magnitudes(bins):
    """The magnitude_table of TrivialAugment."""
    return magnitude_table(bins, shear=0.99, right=32, down=32, degrees=135, enhance=0.99, bits=6)


def signed_magnitudes(table, operations, bins, generator):
    """Magnitudes from a table; those of operations with a sign are negative with probability 1/2."""
    negative = (torch.rand(operations.shape, generator=generator) < 0.5) & (operations < SIGNED)
    magnitudes = table[operations, bins]
    return torch.where(negative, -magnitudes, magnitudes)


def draw_auto_augment(count, size, generator):
    """Operations and magnitudes (count, 2) of AutoAugment: a row of the policy per image, with its probabilities."""
    rows = [((OPERATIONS.index(a), b, c), (OPERATIONS.index(d), e, f)) for a, b, c, d, e, f in CIFAR10_POLICY]
    chosen = torch.tensor(rows)[torch.randint(len(rows), (count,), generator=generator)]  # (count, 2, 3)
    operations, probabilities, bins = chosen.unbind(2)
    applied = torch.rand(count, 2, generator=generator) < probabilities
    operations = torch.where(applied, operations.long(), IDENTITY)
    return operations, signed_magnitudes(usual_magnitudes(10, size), operations, bins.long(), generator)


def draw_rand_augment(count, size, generator, *, num_ops, magnitude):
    """Operations and magnitudes (count, num_ops) of RandAugment, each operation equally likely."""
    operations = torch.randint(WITHOUT_INVERT, (count, num_ops), generator=generator)
    return operations, signed_magnitudes(usual_magnitudes(31, size), operations, magnitude, generator)


def draw_trivial_augment(count, generator):
    """Operations and magnitudes (count, 1) of TrivialAugment, each operation and each magnitude equally likely."""
    operations, bins = (torch.randint(high, (count, 1), generator=generator) for high in (WITHOUT_INVERT, 31))
    return operations, signed_magnitudes(wide_magnitudes(31), operations, bins, generator)


def auto_augment(images, generator, *, fill):
    """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019) on images (B, 3, H, W) uint8."""
    return apply_operations(images, *draw_auto_augment(len(images), images.shape[2:], generator), fill=fill)


def rand_augment(images, generator, *, num_ops=2, magnitude=9, fill):
    """RandAugment (Cubuk et al. 2020) on images (B, 3, H, W) uint8; magnitude is an integer from 0 to 30."""
    drawn = draw_rand_augment(len(images), images.shape[2:], generator, num_ops=num_ops, magnitude=magnitude)
    return apply_operations(images, *drawn, fill=fill)


def trivial_augment(images, generator, *, fill):
    """TrivialAugment with its wide ranges (Müller & Hutter 2021) on images (B, 3, H, W) uint8."""
    return apply_operations(images, *draw_trivial_augment(len(images), generator), fill=fill)


POLICIES = {"auto": auto_augment, "rand": rand_augment, "trivial": trivial_augment}
