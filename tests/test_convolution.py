"""The convolution with a weight gradient of its own: the same numbers as torch's, and only where the rule says so."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from models import build_model
from models.convolution import SmallMapConv2d, WeightGradientAsProduct


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 1)])
def test_gradients_are_torchs(layout, kernel, stride, padding):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64, generator=generator)
    grads = []
    for function in (WeightGradientAsProduct.apply, conv2d):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        more = (stride, padding) if function is not conv2d else (None, stride, padding)
        out = function(*leaves, *more)
        weights_of_sum = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        grads.append((out, *torch.autograd.grad((out * weights_of_sum).sum(), leaves)))
    for ours, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def as_product(conv, shape, dtype):
    """Whether the rule takes the product; the output is torch's to the bit either way."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out, expected = conv(x), nn.Conv2d.forward(conv, x)
    assert torch.equal(out, expected) and out.dtype == expected.dtype
    ours, torchs = (torch.autograd.grad(o.float().square().sum(), [x, conv.weight]) for o in (out, expected))
    for a, b in zip(ours, torchs, strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
    return "Product" in type(out.grad_fn).__name__


@pytest.mark.parametrize(
    ("options", "size", "dtype", "expected"),
    [
        ({}, (4, 4), torch.bfloat16, True),
        ({}, (2, 8), torch.bfloat16, True),
        ({"stride": 2}, (8, 7), torch.bfloat16, True),
        ({}, (4, 5), torch.bfloat16, False),
        ({"stride": 2}, (9, 8), torch.bfloat16, False),
        ({}, (4, 4), torch.float32, False),
        ({}, (4, 4), torch.float16, False),
        ({"groups": 2}, (4, 4), torch.bfloat16, False),
        ({"dilation": 2, "padding": 2}, (4, 4), torch.bfloat16, False),
        ({"bias": True}, (4, 4), torch.bfloat16, False),
    ],
)
def test_the_rule(options, size, dtype, expected):
    torch.manual_seed(0)
    conv = SmallMapConv2d(4, 6, 3, **{"padding": 1, "bias": False} | options)
    assert as_product(conv, (2, 4, *size), dtype) is expected


def test_a_frozen_weight_has_no_gradient_and_still_hands_one_on():
    conv = SmallMapConv2d(4, 6, 3, padding=1, bias=False)
    conv.weight.requires_grad_(False)
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv(x).float().sum().backward()
    assert x.grad.abs().sum() > 0 and conv.weight.grad is None


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "xresnet18", "xresnet50"])
def test_all_convolutions_of_a_trunk_are_of_this_kind(name):
    with torch.device("meta"):
        convs = [module for module in build_model(name).modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) >= 20 and all(type(conv) is SmallMapConv2d for conv in convs)
