"""The Vision Transformer of the CIFAR-10 report."""

import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError
from models.attention import AttentionSpec, Block, Dropout


class VisionTransformer(nn.Module):
    """The report's ViT (Dosovitskiy et al. 2021): images (B, C, H, W) to logits (B, num_classes).

    image_size is a number of pixels or (height, width); with pad, zeros at the right and bottom make it divisible by
    patch_size. attention is a name in ATTENTIONS. drop_path grows from 0 in the first block to that rate in the last.
    `grid` is (rows, columns) of patches. The defaults have 3,195,146 parameters. Raises UserError for sizes that are
    not divisible (see patch_grid, MultiHeadAttention) and for an unknown attention.
    """

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(
        self,
        *,
        image_size=32,
        patch_size=4,
        in_channels=3,
        num_classes=10,
        embed_dim=256,
        depth=6,
        num_heads=8,
        mlp_ratio=2.0,
        drop=0.2,
        drop_path=0.0,
        attention="softmax",
        pad=False,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = patch_grid((height, width), patch_size, pad=pad)
        self.patch_size = patch_size
        self.padding = (0, self.grid[1] * patch_size - width, 0, self.grid[0] * patch_size - height)
        num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Linear(in_channels * patch_size**2, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches + 1, embed_dim))
        self.drop = Dropout(drop)
        spec = AttentionSpec(embed_dim, num_heads, grid=self.grid, class_token=True)
        self.blocks = nn.ModuleList(
            Block(spec, attention=attention, mlp_ratio=mlp_ratio, drop=drop, drop_path=rate)
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        images = F.pad(images, self.padding)  # (B, C, rows * patch_size, columns * patch_size)
        x = self.patch_embed(to_patches(images, self.patch_size))  # (B, N, dim)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, dim)
        x = self.drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # (B, num_classes)


def patch_grid(image_size, patch_size, *, pad=False):
    """(rows, columns) of the patches of an image of image_size (height, width) in pixels.

    With pad, the patches that extend beyond the border count too. Raises UserError if patch_size does not divide the
    image and pad is off.
    """
    if patch_size < 1:
        raise UserError(f"--patch-size {patch_size}: must be at least 1")
    for size in image_size:
        if size % patch_size and not pad:
            below = size // patch_size * patch_size
            fits = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            raise UserError(f"--image-size {size} is not divisible by --patch-size {patch_size}: use {fits}, or --pad")
    return tuple(-(-size // patch_size) for size in image_size)


def to_patches(images, patch_size):
    """Cut images (B, C, H, W) into non-overlapping patches (B, N, C*p*p), row by row; p must divide H and W.

    Within a patch the order is channel, row, column, as in the weight of a Conv2d. So a Linear on these patches is a
    Conv2d of kernel = stride = p with the same weights.
    """
    p = patch_size
    patches = images.unfold(2, p, p).unfold(3, p, p)  # (B, C, H/p, W/p, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (B, H/p, W/p, C, p, p)
    return patches.flatten(3).flatten(1, 2)  # (B, N, C*p*p)


def from_patches(patches, patch_size, grid):
    """The inverse of to_patches: (B, N, C*p*p) on a grid of (rows, columns) back to (B, C, rows*p, columns*p)."""
    p, (rows, columns) = patch_size, grid
    images = patches.unflatten(2, (-1, p, p)).unflatten(1, (rows, columns))  # (B, rows, columns, C, p, p)
    return images.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)
