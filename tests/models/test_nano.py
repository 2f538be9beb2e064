"""The smallest model: what it has, and what its parts do."""

import pytest
import torch

from errors import UserError
from models import build_model
from models.attention import GridConv
from models.nano import NANO_MODELS
from models.summary import summarize


@pytest.mark.parametrize(
    ("name", "expected"), [("cct_nano", 466_517), ("cct_nano_once", 466_517), ("cct_nano_conv", 486_565)]
)
def test_parameters_stay_under_half_a_million(name, expected):
    assert sum(p.numel() for p in build_model(name, num_classes=100).parameters()) == expected < 500_000
    assert name in NANO_MODELS


def test_what_the_readme_says_of_its_multiply_adds():
    for name, millions in (("cct_nano_once", 42), ("cct_nano", 72)):
        last = summarize(build_model(name, num_classes=100), (3, 32, 32)).splitlines()[-1]
        assert round(int(last.split()[-1].replace(",", "")) / 1e6) == millions


def test_blocks_are_used_as_often_as_they_are_to_be():
    torch.manual_seed(0)
    twice, once = build_model("cct_nano").eval(), build_model("cct_nano_once").eval()
    once.load_state_dict(twice.state_dict())
    calls = []
    hooks = [model.blocks[1].register_forward_hook(lambda *_: calls.append(1)) for model in (twice, once)]
    images = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(twice(images), once(images)) and len(calls) == 3
    assert len(hooks) == 2 and twice.grid == (8, 8)


def test_grid_conv_sees_the_neighbours_on_the_grid():
    conv = GridConv(2, (3, 4))
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    x = torch.zeros(1, 12, 2)
    x[0, 5, 0] = 1  # row 1, column 1
    assert conv(x)[0, :, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10] and not conv(x)[0, :, 1].any()


def test_a_image_that_is_too_small():
    with pytest.raises(UserError, match="--image-size 4 is too small: .* use 5 or more"):
        build_model("cct_nano", image_size=4)
