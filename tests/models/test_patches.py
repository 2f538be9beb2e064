import pytest
import torch
from torch import nn

from errors import UserError
from models.vit import from_patches, patch_grid, to_patches


@pytest.mark.parametrize("size", [(32, 32), (8, 20)])
def test_unfold_and_linear_equal_a_convolution_with_the_same_weights(size):
    torch.manual_seed(0)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    convolution = nn.Conv2d(3, 5, kernel_size=4, stride=4, dtype=torch.float64)
    linear = nn.functional.linear(to_patches(images, 4), convolution.weight.flatten(1), convolution.bias)
    torch.testing.assert_close(linear, convolution(images).flatten(2).mT, rtol=0, atol=1e-12)


def test_patches_go_row_by_row_and_come_back():
    images = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    patches = to_patches(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].flatten())  # second row, second column
    assert torch.equal(from_patches(patches, 4, (2, 3)), images)


def test_patch_grid():
    assert patch_grid((32, 48), 4) == (8, 12)
    assert patch_grid((32, 32), 6, pad=True) == (6, 6)
    with pytest.raises(UserError, match="--image-size 30 .* --patch-size 4: use 28 or 32, or --pad"):
        patch_grid((30, 30), 4)
