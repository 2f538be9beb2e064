"""Compact transformers: ViT-Lite, CVT and CCT (Hassani et al. 2021, "Escaping the Big Data Paradigm")."""

import itertools
from functools import partial

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from errors import UserError
from models.attention import AttentionSpec, Dropout, Mlp, make_attention


def conv_tokenizer(embed_dim, *, kernel_size, layers, in_channels=3):
    """The tokenizer of CCT: images (B, in_channels, H, W) to feature maps (B, embed_dim, rows, columns).

    Each layer is a convolution without bias, MaxPool(3, 2, 1) and ReLU; all except the last have 64 channels. The
    published code has ReLU before the pooling: the same result for four times the work.
    """
    widths = [in_channels] + [64] * (layers - 1) + [embed_dim]
    options = {"stride": max(1, kernel_size // 2 - 1), "padding": kernel_size // 2, "bias": False}
    modules = []
    for before, after in zip(widths, widths[1:], strict=False):
        modules += [nn.Conv2d(before, after, kernel_size, **options), nn.MaxPool2d(3, 2, 1), nn.ReLU()]
    return nn.Sequential(*modules)


def sine_embedding(tokens, dim):
    """(1, tokens, dim): sines and cosines of the position, alternating (Vaswani et al. 2017, section 3.5)."""
    rates = 10000 ** (-(torch.arange(dim) // 2 * 2) / dim)
    angles = torch.arange(tokens)[:, None] * rates
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())[None]


class CompactBlock(nn.Module):
    """The published block on (B, N, dim): x = norm1(x + attn(pre_norm(x))), then x = x + mlp(x)."""

    def __init__(self, spec, *, attention, mlp_ratio, drop, drop_path):
        super().__init__()
        self.pre_norm = nn.LayerNorm(spec.dim)
        self.attn = make_attention(attention, spec)
        self.drop = Dropout(drop)
        self.norm1 = nn.LayerNorm(spec.dim)
        self.mlp = Mlp(spec.dim, int(spec.dim * mlp_ratio), drop=drop)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = self.norm1(x + self.drop_path(self.drop(self.attn(self.pre_norm(x)))))
        return x + self.drop_path(self.mlp(x))


class SequencePooling(nn.Module):
    """The mean of tokens (B, N, dim) as (B, dim), weighted by the softmax of a linear layer's score per token."""

    def __init__(self, dim):
        super().__init__()
        self.score = nn.Linear(dim, 1)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x):
        weights = self.softmax(self.score(x))  # (B, N, 1)
        return (weights.mT @ x)[:, 0]  # (B, dim)


class CompactTransformer(nn.Module):
    """A compact transformer (Hassani et al. 2021): images (B, C, H, W) to logits (B, num_classes).

    image_size is a number of pixels or (height, width). With kernel_size the tokenizer is CCT's, else a convolution of
    kernel = stride = patch_size. positional_embedding is "learnable", "sine" or "none". class_token replaces sequence
    pooling. drop_path grows from 0 in the first block to that rate in the last. `grid` is (rows, columns) of tokens.
    Raises UserError if the image is too small or not divisible into patches, and for an unknown name.
    """

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(
        self,
        *,
        image_size=32,
        in_channels=3,
        num_classes=10,
        embed_dim=256,
        depth=6,
        num_heads=4,
        mlp_ratio=2.0,
        kernel_size=None,
        conv_layers=1,
        patch_size=4,
        class_token=False,
        positional_embedding="learnable",
        attention="softmax",
        drop=0.0,
        attn_drop=0.1,
        drop_path=0.1,
    ):
        super().__init__()
        if kernel_size:
            options = {"kernel_size": kernel_size, "layers": conv_layers, "in_channels": in_channels}
            self.tokenizer = conv_tokenizer(embed_dim, **options)
        else:
            self.tokenizer = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.grid = token_grid(self.tokenizer, image_size)
        tokens = self.grid[0] * self.grid[1] + class_token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        if positional_embedding == "learnable":
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))
        elif positional_embedding == "sine":
            self.register_buffer("pos_embed", sine_embedding(tokens, embed_dim))
        elif positional_embedding == "none":
            self.pos_embed = None
        else:
            raise UserError(f"--positional-embedding {positional_embedding}: choose from learnable, sine, none")
        self.drop = Dropout(drop)
        spec = AttentionSpec(embed_dim, num_heads, self.grid, class_token, qkv_bias=False, attn_drop=attn_drop)
        self.blocks = nn.ModuleList(
            CompactBlock(spec, attention=attention, mlp_ratio=mlp_ratio, drop=drop, drop_path=rate)
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = None if class_token else SequencePooling(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.initialise()

    def initialise(self):
        """As in the authors' code: linear layers truncated normal 0.02, positions 0.2, convolutions He-normal."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.tokenizer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.2)

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)  # faster for convolutions
        x = self.tokenizer(images).flatten(2).mT  # (B, N, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, dim)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x[:, 0] if self.pool is None else self.pool(x)  # (B, dim)
        return self.head(x)  # (B, num_classes)


@torch.no_grad()
def token_grid(tokenizer, image_size):
    """(rows, columns) of the tokens of an image; image_size is a number of pixels or (height, width).

    Raises UserError if the image is not divisible into patches, or so small that it is a single token.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(tokenizer, nn.Conv2d):
        patch = tokenizer.stride[0]
        for side in sides:
            if side % patch:
                raise UserError(f"--image-size {side}: must be a multiple of {patch}, the side of a patch")
    channels = next(tokenizer.parameters()).shape[1]
    grid = tuple(tokenizer(torch.zeros(1, channels, *sides)).shape[2:])
    if max(grid) == 1:
        enough = next(s for s in itertools.count(max(sides)) if tokenizer(torch.zeros(1, channels, s, s)).shape[2] > 1)
        raise UserError(f"--image-size {max(sides)} is too small: the image is a single token; use {enough} or more")
    return grid


CCT_SMALL = partial(CompactTransformer, embed_dim=128, num_heads=2, mlp_ratio=1.0)
COMPACT_MODELS = {
    "vit_lite_6_4": partial(CompactTransformer, depth=6, class_token=True),
    "vit_lite_7_4": partial(CompactTransformer, depth=7, class_token=True),
    "cvt_6_4": partial(CompactTransformer, depth=6),
    "cvt_7_4": partial(CompactTransformer, depth=7),
    "cct_2_3x2": partial(CCT_SMALL, depth=2, kernel_size=3, conv_layers=2),
    "cct_4_3x2": partial(CCT_SMALL, depth=4, kernel_size=3, conv_layers=2),
    "cct_6_3x1": partial(CompactTransformer, depth=6, kernel_size=3, conv_layers=1),
    "cct_6_3x2": partial(CompactTransformer, depth=6, kernel_size=3, conv_layers=2),
    "cct_7_3x1": partial(CompactTransformer, depth=7, kernel_size=3, conv_layers=1),
    "cct_7_3x2": partial(CompactTransformer, depth=7, kernel_size=3, conv_layers=2),
    "cct_14_7x2": partial(
        CompactTransformer, depth=14, embed_dim=384, num_heads=6, mlp_ratio=3.0, kernel_size=7, conv_layers=2
    ),
}
