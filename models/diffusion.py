"""Denoising diffusion: the schedule of the noise, the loss, and the steps from noise to an image.

Images are scaled to -1 ... 1. A time t counts from 0, after the first step into the noise, to the last one.
"""

import math

import torch
from torch.nn.functional import mse_loss


def signal_shares(name, steps):
    """ᾱ (steps,) float64: the share of an image's variance that is left at each time.

    "linear" is Ho et al. 2020 (β from 1e-4 to 0.02 in 1,000 steps, scaled to others), "cosine" Nichol & Dhariwal 2021.
    """
    if name == "linear":
        scale = 1000 / steps
        return (1 - torch.linspace(scale * 1e-4, min(scale * 0.02, 0.999), steps, dtype=torch.float64)).cumprod(0)
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    left = ((times + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (left[1:] / left[:-1]).clamp(min=0.001).cumprod(0)


def noisy_images(images, share, noise):
    """A draw from q(x_t | x_0) for ᾱ_t in share (B,): √ᾱ x_0 + √(1 - ᾱ) noise (Ho et al. 2020, eq. 4)."""
    share = share[:, None, None, None]  # (B, 1, 1, 1)
    return share.sqrt() * images + (1 - share).sqrt() * noise


def diffusion_loss(forward, images, labels, *, shares, label_drop):
    """(the mean squared error of the predicted noise (), None), at random times (Ho et al. 2020, eq. 14).

    forward is a Ddpm's, shares (T,) are the signal_shares. A share label_drop of the labels (B,) is replaced by "no
    class", as classifier-free guidance needs (Ho & Salimans 2022). The second value would be the correct answers.
    """
    times = torch.randint(len(shares), labels.shape, device=labels.device)  # (B,)
    noise = torch.randn_like(images)
    labels = labels.masked_fill(torch.rand(labels.shape, device=labels.device) < label_drop, -1)
    predicted = forward(noisy_images(images, shares[times], noise), times, labels)  # (B, 3, H, W)
    return mse_loss(predicted.float(), noise), None


def denoise(predict, images, *, shares, times, eta, draw):
    """From noise (B, 3, H, W) to images along decreasing times: yields the image that each step expects at the end.

    predict(images, t) is the noise in them. eta = 1 adds in each step as much noise as DDPM does (Ho et al. 2020, with
    the variance of the posterior; given all times, it is DDPM), eta = 0 none (DDIM, Song et al. 2021, eq. 12 and 16).
    draw() gives that noise, (B, 3, H, W); shares is a list. The expected image is clipped to -1 ... 1.
    """
    for t, following in zip(times, [*times[1:], None], strict=True):
        now, then = shares[t], 1.0 if following is None else shares[following]
        noise = predict(images, t)
        expected = ((images - (1 - now) ** 0.5 * noise) / now**0.5).clamp(-1, 1)
        yield expected
        noise = (images - now**0.5 * expected) / (1 - now) ** 0.5  # what is left of it after clipping
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        images = then**0.5 * expected + max(1 - then - sigma**2, 0.0) ** 0.5 * noise
        if sigma:
            images = images + sigma * draw()
