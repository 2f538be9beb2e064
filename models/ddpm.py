"""The U-Net of a denoising diffusion model (Ho et al. 2020), conditioned on a class, for small images."""

import math
from functools import partial

import torch
from torch import nn
from torch.nn.functional import interpolate, silu

from errors import UserError
from models.attention import attend
from models.diffusion import denoise, signal_shares


def group_norm(channels):
    return nn.GroupNorm(8, channels)


def time_embedding(times, dim):
    """(B,) times to (B, dim): cosines and sines of falling frequencies (Vaswani et al. 2017)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=times.device) / (dim // 2))
    angles = times[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NoiseBlock(nn.Module):
    """Two convolutions with a residual, (B, dim, H, W) to (B, out_dim, H, W); (B, emb_dim) tells the time and class."""

    def __init__(self, dim, out_dim, emb_dim, *, drop, attention):
        super().__init__()
        self.norm1, self.conv1 = group_norm(dim), nn.Conv2d(dim, out_dim, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_dim)
        self.norm2, self.conv2 = group_norm(out_dim), nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.drop = nn.Dropout(drop)
        self.shortcut = nn.Conv2d(dim, out_dim, 1) if dim != out_dim else nn.Identity()
        self.attn = PixelAttention(out_dim) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        h = self.conv1(silu(self.norm1(x)))
        h = h + self.emb(silu(emb))[:, :, None, None]
        h = self.conv2(self.drop(silu(self.norm2(h))))
        return self.attn(self.shortcut(x) + h)  # (B, out_dim, H, W)


class PixelAttention(nn.Module):
    """Self-attention among the pixels of (B, dim, H, W), with one head and a residual."""

    def __init__(self, dim):
        super().__init__()
        self.norm, self.qkv, self.proj = group_norm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).mT  # (B, H * W, dim)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 1, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, 1, H * W, dim) each
        tokens = self.proj(attend(q, k, v)[:, 0])
        return x + tokens.mT.unflatten(2, x.shape[2:])


class Ddpm(nn.Module):
    """The noise in images (B, 3, S, S) at times (B,), given their labels (B,); label -1 is "no class".

    Three levels of width, 2 x width and 2 x width channels at S, S / 2 and S / 4 pixels, with `depth` blocks each, and
    attention at S / 2. As in Ho et al. 2020, who have four levels and a width of 128 for CIFAR-10; the class is added
    to the time. The last layer predicts v = √ᾱ noise - √(1 - ᾱ) image (Salimans & Ho 2022), from which forward computes
    the noise: where an image is almost pure noise, a small error of a directly predicted noise would be a large error
    of the image. Raises UserError for an image size that 4 does not divide, or a width that 8 does not.
    """

    no_weight_decay = ()

    def __init__(
        self, *, num_classes, image_size=32, width=64, depth=2, drop=0.1, noise_schedule="cosine", noise_steps=1000
    ):
        super().__init__()
        if not isinstance(image_size, int) or image_size % 4:
            raise UserError(f"--image-size {image_size}: ddpm needs squares whose side 4 divides")
        if width % 8:
            raise UserError(f"--width {width}: 8 must divide it")
        self.shape, self.width = (3, image_size, image_size), width
        # (T,) float32, since MPS has no float64
        self.register_buffer("shares", signal_shares(noise_schedule, noise_steps).float(), persistent=False)
        emb_dim, dims = 4 * width, (width, 2 * width, 2 * width)
        options = {"emb_dim": emb_dim, "drop": drop}
        self.time = nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.label = nn.Embedding(num_classes + 1, emb_dim)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up, kept, dim = nn.ModuleList(), nn.ModuleList(), [width], width
        for level, out_dim in enumerate(dims):
            for _ in range(depth):
                self.down.append(NoiseBlock(dim, out_dim, **options, attention=level == 1))
                kept.append(dim := out_dim)
            if level < 2:
                self.down.append(nn.Conv2d(dim, dim, 3, stride=2, padding=1))
                kept.append(dim)
        self.middle = nn.ModuleList([NoiseBlock(dim, dim, **options, attention=first) for first in (True, False)])
        for level, out_dim in reversed([*enumerate(dims)]):
            for _ in range(depth + 1):
                self.up.append(NoiseBlock(dim + kept.pop(), out_dim, **options, attention=level == 1))
                dim = out_dim
            if level:
                self.up.append(nn.Conv2d(dim, dim, 3, padding=1))
        self.norm, self.velocity = group_norm(dim), nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, images, times, labels):
        emb = self.time(time_embedding(times, self.width))  # (B, 4 * width)
        emb = emb + self.label(labels % self.label.num_embeddings)
        x = self.first(images)  # (B, width, S, S)
        kept = [x]
        for module in self.down:
            x = module(x, emb) if isinstance(module, NoiseBlock) else module(x)  # from S to S / 4
            kept.append(x)
        for module in self.middle:
            x = module(x, emb)  # (B, 2 * width, S / 4, S / 4)
        for module in self.up:
            if isinstance(module, NoiseBlock):
                x = module(torch.cat([x, kept.pop()], dim=1), emb)
            else:
                x = module(interpolate(x, scale_factor=2.0))
        v = self.velocity(silu(self.norm(x)))  # (B, 3, S, S)
        share = self.shares[times][:, None, None, None]  # (B, 1, 1, 1)
        return (1 - share).sqrt() * images + share.sqrt() * v  # the noise, which loss and sampler expect

    def generate(self, labels, draw, *, steps=50, eta=0.0, guidance=2.0):
        """Images (B, 3, S, S) of labels (B,), as yielded by denoise; draw(shape) is normal noise.

        guidance moves the noise away from that of no class: 1 leaves it as predicted, 0 leaves the class out.
        """

        def predict(images, t):
            times = torch.full_like(labels, t)
            if guidance == 1:
                return self(images, times, labels).float()
            both = torch.cat([labels, torch.full_like(labels, -1)])
            with_class, without = self(images.repeat(2, 1, 1, 1), times.repeat(2), both).float().chunk(2)
            return without.lerp(with_class, guidance)

        shares, more = self.shares.tolist(), partial(draw, self.shape)
        times = torch.linspace(len(shares) - 1, 0, min(steps, len(shares))).round().int().tolist()
        yield from denoise(predict, more(), shares=shares, times=times, eta=eta, draw=more)
