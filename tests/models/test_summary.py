"""The memory that --summary states: torchsummary's numbers, and what autograd keeps."""

import re

import pytest
import torch
import torchvision
from torch import nn

from models import build_model
from models.summary import describe_memory, output_numbers, saved_bytes

MIB = 2**20


def forward_and_backward(model, size):
    return 2 * 4 * output_numbers(model.eval(), torch.zeros(1, 3, size, size)) / MIB


def test_resnet18_takes_what_torchsummary_says():
    """Its README shows 62.79 MB for torchvision's ResNet18 at 224 pixels; its ReLUs are called twice in each block."""
    assert round(forward_and_backward(torchvision.models.resnet18(), 224), 2) == 62.79


@pytest.mark.parametrize(
    ("convolutions", "expected"), [(1, (0.01, 69.50, 12.17, 81.69)), (2, (0.01, 16.25, 12.72, 28.98))]
)
def test_the_reports_sizes_of_cct_6_are_those_of_the_authors_modules(convolutions, expected):
    """vit-pytorch's modules are the authors', but for the tokenizer's nn.Flatten: one more output of its size."""
    cct = pytest.importorskip("vit_pytorch.cct").CCT
    model = cct(
        img_size=32, embedding_dim=256, n_conv_layers=convolutions, kernel_size=3, stride=1, padding=1,
        pooling_kernel_size=3, pooling_stride=2, pooling_padding=1, num_layers=6, num_heads=4, mlp_ratio=2,
        num_classes=100, positional_embedding="none",
    )  # fmt: skip
    flattened = model.tokenizer(torch.zeros(1, 3, 32, 32)).numel()
    sizes = [
        4 * 3 * 32 * 32 / MIB,
        forward_and_backward(model, 32) + 2 * 4 * flattened / MIB,
        4 * sum(p.numel() for p in model.parameters()) / MIB,
    ]
    assert tuple(round(size, 2) for size in [*sizes, sum(sizes)]) == expected


def test_a_training_step_keeps_the_inputs_of_its_layers():
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    assert saved_bytes(model, torch.zeros(4, 7)) == 4 * 4 * (7 + 5)  # the ReLU's output is the second layer's input


def test_the_lines_agree_with_each_other_and_leave_the_model_alone():
    model = build_model("resnet18", width=8)
    for parameter in model.layer1.parameters():
        parameter.requires_grad = False
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, image, training = describe_memory(model, (3, 32, 32), 64).splitlines()
    fixed = sum(p.numel() for p in model.layer1.parameters())
    assert f"{sum(p.numel() for p in model.parameters()) - fixed:,} trained, {fixed:,} fixed" in parameters
    batch, images, per_image, weights = map(
        float, re.findall(r"[\d.]+\d", training.replace(",", "").replace("float32", ""))
    )
    assert images == 64 and batch == pytest.approx(weights + 64 * per_image, abs=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
