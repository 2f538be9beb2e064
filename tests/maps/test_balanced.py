"""AttnLRP and LibraGrad: they add up to the logit, and have the gradients of their rules written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError
from maps.attributions import input_x_gradient
from maps.balanced import BALANCED, SOFTMAX, BalancedGradients
from models import build_model

MODELS = {
    "vit": lambda: build_model("vit", num_classes=3, image_size=16, embed_dim=16, depth=3, num_heads=2, drop=0.0),
    "cct_2_3x2": lambda: build_model("cct_2_3x2", num_classes=3, image_size=16),
    "timm": lambda: pytest.importorskip("timm").create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2
    ),
}


def model_of(name):
    """A model in float64, with all parameters random, also those that begin at zero."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def random_images(count=4):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Recording(BalancedGradients):
    """Keeps (input, output) of each softmax, with their gradients."""

    def __init__(self, rule):
        super().__init__(rule)
        self.kept = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if func in SOFTMAX and result.requires_grad:
            args[0].retain_grad()
            result.retain_grad()
            self.kept.append((args[0], result))
        return result

    def constant_parts(self):
        return sum((y * y.grad).sum() - (x * x.grad).sum() for x, y in self.kept)


@pytest.mark.parametrize("rule", BALANCED)
@pytest.mark.parametrize("name", MODELS)
def test_pixels_and_biases_add_up_to_the_logit(name, rule):
    model, images = model_of(name), random_images(1).requires_grad_()
    with Recording(rule) as recording:
        logits = model(images)
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-12)
    logits[0, 1].backward()
    added = [p for n, p in model.named_parameters() if n.endswith(("bias", "token", "embed", "embedding"))]
    total = (images * images.grad).sum() + sum((p * p.grad).sum() for p in added if p.grad is not None)
    total += recording.constant_parts()
    assert len(recording.kept) == (0 if rule == "libragrad" else 3)
    assert total.item() == pytest.approx(logits[0, 1].item(), abs=1e-5)
    maps, _ = BALANCED[rule](model, images, torch.tensor([1]))
    torch.testing.assert_close(maps, (images * images.grad).sum(1).clamp(min=0).detach())


@pytest.mark.parametrize("rule", BALANCED)
def test_a_network_of_affine_pieces_has_its_usual_gradient(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 49, 3)).double()
    images, classes = random_images(), torch.tensor([0, 1, 2, 0])
    signed = model(images.requires_grad_()).gather(1, classes[:, None]).sum()
    (gradient,) = torch.autograd.grad(signed, images)
    maps, _ = BALANCED[rule](model, images, classes)
    torch.testing.assert_close(maps, (images * gradient).sum(1).clamp(min=0).detach())
    positive = (images * gradient).sum(1) > 0
    torch.testing.assert_close(maps[positive], input_x_gradient(model, images, classes)[0][positive])


def blocks_by_hand(model, x, rule):
    """The report's ViT after its patches, with the rules written where they act."""

    def half(x):
        return x / 2 + (x / 2).detach()

    def norm(layer, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.var(-1, keepdim=True, correction=0) + layer.eps).sqrt().detach() * layer.weight + layer.bias

    for block in model.blocks:
        qkv = block.attn.qkv(norm(block.norm1, x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if rule == "libragrad":
            q, k = q.detach(), k.detach()
        weights = half(q @ k.mT / math.sqrt(q.shape[-1])) if rule == "attnlrp" else q @ k.mT / math.sqrt(q.shape[-1])
        mixed = weights.softmax(-1) @ v
        mixed = half(mixed) if rule == "attnlrp" else mixed
        x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        hidden = block.mlp[0](norm(block.norm2, x))
        x = x + block.mlp[3](hidden * (0.5 + 0.5 * torch.erf(hidden / math.sqrt(2))).detach())
    return model.head(norm(model.norm, x[:, 0]))


@pytest.mark.parametrize("rule", BALANCED)
def test_the_gradient_is_that_of_the_rules_by_hand(rule):
    model, tokens = model_of("vit"), torch.randn(2, 17, 16, dtype=torch.float64)
    found = []
    for how in ("context", "by hand"):
        x = tokens.clone().requires_grad_()
        if how == "context":
            with BalancedGradients(rule):
                y = x
                for block in model.blocks:
                    y = block(y)
                logits = model.head(model.norm(y[:, 0]))
        else:
            logits = blocks_by_hand(model, x, rule)
        found.append(torch.autograd.grad(logits[:, 2].sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_at_zero_a_gate_is_a_half():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    with BalancedGradients("libragrad"):
        (F.gelu(x) + F.silu(x)).sum().backward()
    assert x.grad.item() == 1


def test_a_layer_without_a_rule_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2), nn.Sigmoid())
    with pytest.raises(UserError, match="attnlrp: no rule for Sigmoid: use integrated_gradients"):
        BALANCED["attnlrp"](model, torch.randn(1, 3, 16, 16), torch.tensor([0]))
