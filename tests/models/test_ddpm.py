"""The diffusion process against step-by-step formulas in float64, and the U-Net against another implementation."""

import math

import pytest
import torch

from errors import UserError
from models import build_model
from models.diffusion import denoise, diffusion_loss, noisy_images, signal_shares

SHAPE = (4, 3, 8, 8)


def random(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_closed_form_of_the_noise_is_that_of_its_steps(name):
    """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) e, followed from x_0: the factor of x_0, and the variance."""
    shares = signal_shares(name, 1000)
    betas = 1 - shares / torch.cat([torch.ones(1), shares[:-1]])
    factor, variance = 1.0, 0.0
    for t, beta in enumerate(betas.tolist()):
        factor, variance = factor * math.sqrt(1 - beta), (1 - beta) * variance + beta
        if t in (0, 1, 500, 999):
            image, noise = random(0), random(1)
            found = noisy_images(image, shares[t].expand(4), noise)
            torch.testing.assert_close(found, factor * image + math.sqrt(variance) * noise, rtol=1e-9, atol=1e-12)
    assert shares.dtype == torch.float64 and (shares.diff() < 0).all()


def test_the_schedules_are_those_of_the_papers():
    linear = signal_shares("linear", 1000)
    betas = 1 - linear[1:] / linear[:-1]
    assert 1 - linear[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    assert linear[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    cosine = signal_shares("cosine", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500)]
    assert cosine[499].item() == pytest.approx(f[1] / f[0])
    assert cosine[-1] / cosine[-2] == pytest.approx(1 - 0.999)  # Nichol & Dhariwal clip beta


def fixed_noise(images, t):
    return 0.7 * images + 0.01 * t  # any function of both


def test_ancestral_sampling_follows_the_posterior_step_by_step():
    """Ho et al. 2020, eq. 6 and 7: with eta = 1 and all times each step is their mean and variance."""
    shares = signal_shares("linear", 20)
    draws = [random(seed) for seed in range(20)]
    pending = iter(draws[1:])
    found = list(
        denoise(
            fixed_noise, draws[0], shares=shares, times=list(range(19, -1, -1)), eta=1.0, draw=lambda: next(pending)
        )
    )
    x, pending = draws[0], iter(draws[1:])
    for step, t in enumerate(range(19, -1, -1)):
        now, before = shares[t], shares[t - 1] if t else torch.ones((), dtype=torch.float64)
        alpha = now / before
        x0 = ((x - (1 - now).sqrt() * fixed_noise(x, t)) / now.sqrt()).clamp(-1, 1)
        torch.testing.assert_close(found[step], x0, rtol=0, atol=1e-10)
        mean = before.sqrt() * (1 - alpha) / (1 - now) * x0 + alpha.sqrt() * (1 - before) / (1 - now) * x
        x = mean + ((1 - before) / (1 - now) * (1 - alpha)).sqrt() * (next(pending) if t else 0)
    torch.testing.assert_close(found[-1], x, rtol=0, atol=1e-10)
    assert next(pending, None) is None


@pytest.mark.parametrize("times", [[49], [49, 20, 0], [*range(49, -1, -1)]])
def test_ddim_with_the_true_noise_finds_the_image(times):
    shares = signal_shares("cosine", 50)
    image, noise = random(0).clamp(-1, 1), random(1)
    start = noisy_images(image, shares[times[0]].expand(4), noise)
    found = list(denoise(lambda x, t: noise, start, shares=shares, times=times, eta=0.0, draw=pytest.fail))
    assert len(found) == len(times)
    torch.testing.assert_close(found[-1], image, rtol=0, atol=1e-6)


def test_the_loss_is_that_of_its_draws():
    shares, images, labels = signal_shares("linear", 10), random(0).float(), torch.arange(4)

    def zero(noisy, times, given):
        seen.append((noisy, times, given))
        return torch.zeros_like(noisy)

    seen = []
    torch.manual_seed(0)
    loss, correct = diffusion_loss(zero, images, labels, shares=shares, label_drop=0.0)
    torch.manual_seed(0)
    times = torch.randint(10, (4,))
    noise = torch.randn_like(images)
    assert correct is None and loss.item() == pytest.approx(noise.square().mean().item())
    assert torch.equal(seen[0][1], times) and torch.equal(seen[0][2], labels)
    expected = torch.stack(
        [noisy_images(images[i : i + 1], shares[t : t + 1], noise[i : i + 1])[0] for i, t in enumerate(times)]
    )
    torch.testing.assert_close(seen[0][0], expected)
    diffusion_loss(zero, images.repeat(250, 1, 1, 1), labels.repeat(250), shares=shares, label_drop=0.25)
    assert 0.2 < (seen[1][2] == -1).float().mean() < 0.3


def small(**options):
    torch.manual_seed(0)
    model = build_model("ddpm", num_classes=3, image_size=16, width=16, depth=1, drop=0.0, noise_steps=10, **options)
    for parameter in model.parameters():  # also those that begin at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_guidance_lies_on_the_line_through_both_predictions():
    model, labels = small(), torch.tensor([0, 2])
    noise = torch.randn(2, 3, 16, 16)

    def image(guidance, labels=labels):
        with torch.no_grad():
            return list(model.generate(labels, lambda shape: noise, steps=1, guidance=guidance))[-1]

    with torch.no_grad():
        times = torch.tensor([9, 9])
        with_class, without = (model(noise, times, given) for given in (labels, torch.tensor([-1, -1])))
    share = model.shares[9].item()
    for guidance in (0.0, 1.0, 3.0):
        predicted = without + guidance * (with_class - without)
        expected = ((noise - (1 - share) ** 0.5 * predicted) / share**0.5).clamp(-1, 1)
        torch.testing.assert_close(image(guidance), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(image(0.0), image(1.0, torch.tensor([-1, -1])), rtol=0, atol=1e-4)


def test_the_unet_equals_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    ours = build_model("ddpm", num_classes=4, image_size=16, width=16, depth=2, drop=0.0).eval()
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,  # one head
        norm_num_groups=8,
        num_class_embeds=5,
        freq_shift=0,
        flip_sin_to_cos=True,
    ).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    torch.manual_seed(0)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.load_state_dict(as_diffusers(ours.state_dict(), depth=2))
    images, times, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 30, 999]), torch.tensor([0, 3, -1])
    with torch.no_grad():
        v = theirs(images, times, class_labels=labels % 5).sample
        share = ours.shares[times].view(3, 1, 1, 1)
        expected = (1 - share).sqrt() * images + share.sqrt() * v
        torch.testing.assert_close(ours(images, times, labels), expected, rtol=1e-4, atol=1e-4)


def as_diffusers(weights, *, depth):
    """Our state dict by diffusers' names."""
    parts = {"norm1": "norm1", "conv1": "conv1", "emb": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
    parts |= {"shortcut": "conv_shortcut"}
    found = {}
    renamed = {"time.0": "time_embedding.linear_1", "time.2": "time_embedding.linear_2", "label": "class_embedding"}
    renamed |= {"first": "conv_in", "norm": "conv_norm_out", "velocity": "conv_out"}
    for name, value in weights.items():
        if name.startswith(("down.", "up.", "middle.")):
            side, number, *rest = name.split(".")
            blocks = depth + (side == "up")
            level, place = (0, int(number)) if side == "middle" else divmod(int(number), blocks + 1)
            if side == "middle":
                block, sampler, attention = f"mid_block.resnets.{place}", None, "mid_block.attentions.0"
            else:
                block, attention = (f"{side}_blocks.{level}.{kind}.{place}" for kind in ("resnets", "attentions"))
                sampler = f"{side}_blocks.{level}.{side}samplers.0.conv"
            if place == blocks and side != "middle":
                found[f"{sampler}.{rest[0]}"] = value
            elif rest[0] != "attn":
                found[f"{block}.{parts[rest[0]]}.{rest[1]}"] = value
            elif rest[1] == "norm":
                found[f"{attention}.group_norm.{rest[2]}"] = value
            elif rest[1] == "proj":
                found[f"{attention}.to_out.0.{rest[2]}"] = value
            else:
                for kind, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{attention}.to_{kind}.{rest[2]}"] = part
        else:
            start = max((key for key in renamed if name.startswith(f"{key}.")), key=len)
            found[renamed[start] + name.removeprefix(start)] = value
    return found


def test_what_does_not_fit_is_said():
    for options, message in (
        ({"image_size": 30}, "--image-size 30: ddpm needs squares whose side 4 divides"),
        ({"image_size": [32, 64]}, r"--image-size \[32, 64\]"),
        ({"width": 20}, "--width 20: 8 must divide it"),
    ):
        with pytest.raises(UserError, match=message):
            build_model("ddpm", num_classes=2, **options)
