"""Pictures to patches and back, by unfold."""

from errors import UserError


def patch_grid(image_size, patch_size, *, pad=False):
    """Patches down and across a picture: (rows, columns).

    image_size is (height, width) in pixels; with pad, a patch that the border cuts counts as a whole one.
    Raises UserError where patches do not divide the picture and pad is off.
    """
    if patch_size < 1:
        raise UserError(f"--patch-size {patch_size}: must be at least 1")
    for size in image_size:
        if size % patch_size and not pad:
            below = size // patch_size * patch_size
            fits = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            raise UserError(
                f"--image-size {size} is not divisible by --patch-size {patch_size}: {fits} would be; --pad fills it up"
            )
    return tuple(-(-size // patch_size) for size in image_size)


def to_patches(pictures, patch_size):
    """Cut pictures (B, C, H, W) into non-overlapping patches (B, N, C*p*p), row by row; H and W are multiples of p.

    Within a patch the order is channel, row, column: that of a Conv2d weight, so that a Linear on these patches is
    the Conv2d of kernel = stride = p with the same weights.
    """
    p = patch_size
    patches = pictures.unfold(2, p, p).unfold(3, p, p)  # (B, C, H/p, W/p, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (B, H/p, W/p, C, p, p)
    return patches.flatten(3).flatten(1, 2)  # (B, N, C*p*p)


def from_patches(patches, patch_size, grid):
    """The inverse of to_patches: (B, N, C*p*p) on a grid of (rows, columns) back to (B, C, rows*p, columns*p)."""
    p, (rows, columns) = patch_size, grid
    pictures = patches.unflatten(2, (-1, p, p)).unflatten(1, (rows, columns))  # (B, rows, columns, C, p, p)
    return pictures.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
