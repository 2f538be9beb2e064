"""Our own compact transformer: as much accuracy as possible with fewer than half a million parameters."""

from functools import partial

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from models.attention import AttentionSpec, GridConv, make_attention
from models.cct import SequencePooling, token_grid


class InvertedResidual(nn.Module):
    """Widen, depthwise 3x3, narrow (Sandler et al. 2018): (B, in_channels, H, W) to (B, out_channels, H, W).

    With a residual if both have the same number of channels.
    """

    def __init__(self, in_channels, out_channels, *, expansion=3):
        super().__init__()
        hidden = expansion * in_channels
        self.residual = in_channels == out_channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class NanoBlock(nn.Module):
    """A pre-norm block on (B, N, dim) that knows the grid, by two depthwise convolutions.

    The first encodes positions (Chu et al. 2023); then attention; the second is inside the MLP (Li et al. 2021,
    LocalViT).
    """

    def __init__(self, spec, *, attention, mlp_ratio, drop_path):
        super().__init__()
        hidden = int(spec.dim * mlp_ratio)
        self.where = GridConv(spec.dim, spec.grid)
        self.norm1 = nn.LayerNorm(spec.dim)
        self.attn = make_attention(attention, spec)
        self.norm2 = nn.LayerNorm(spec.dim)
        self.mlp = nn.Sequential(
            nn.Linear(spec.dim, hidden), nn.GELU(), GridConv(hidden, spec.grid), nn.GELU(), nn.Linear(hidden, spec.dim)
        )
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.where(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NanoTransformer(nn.Module):
    """Inverted residuals down to a quarter of the image's side, then attention blocks, each applied `repeats` times.

    Images (B, C, H, W) to logits (B, num_classes). Applying a block twice (Lan et al. 2020, ALBERT) adds depth without
    parameters: with 100 classes the defaults have 466,517. Raises UserError if the image is too small.
    """

    no_weight_decay = ()

    def __init__(
        self,
        *,
        image_size=32,
        in_channels=3,
        num_classes=10,
        width=48,
        expansion=3,
        conv_layers=1,
        embed_dim=128,
        depth=4,
        repeats=2,
        num_heads=4,
        mlp_ratio=1.0,
        attention="softmax",
        attn_drop=0.0,
        drop_path=0.0,
    ):
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.MaxPool2d(3, 2, 1),
            nn.GELU(),
            *(InvertedResidual(width, width, expansion=expansion) for _ in range(conv_layers)),
            InvertedResidual(width, embed_dim, expansion=expansion),
            nn.MaxPool2d(3, 2, 1),
        )
        self.grid = token_grid(self.tokenizer, image_size)
        self.repeats = repeats
        spec = AttentionSpec(embed_dim, num_heads, self.grid, attn_drop=attn_drop)
        self.blocks = nn.ModuleList(
            NanoBlock(spec, attention=attention, mlp_ratio=mlp_ratio, drop_path=rate)
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = SequencePooling(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        x = self.tokenizer(images.contiguous(memory_format=torch.channels_last))  # (B, dim, rows, columns)
        x = x.flatten(2).mT  # (B, N, dim)
        for block in self.blocks:
            for _ in range(self.repeats):
                x = block(x)
        return self.head(self.pool(self.norm(x)))  # (B, num_classes)


NANO_MODELS = {
    "cct_nano": NanoTransformer,
    "cct_nano_once": partial(NanoTransformer, repeats=1),
    "cct_nano_conv": partial(NanoTransformer, width=64, conv_layers=2, expansion=2),
}
