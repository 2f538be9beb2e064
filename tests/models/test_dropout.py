"""Dropout with masks of bytes: its rates, its scale, its gradient, and what it draws from."""

import pytest
import torch

from models.attention import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_the_rate_is_the_nearest_of_bytes_and_the_scale_follows_it(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 1003, dtype=dtype)
    y = dropout(x, p)
    rate = round(256 * p) / 256
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rate), dtype=dtype).item()}
    assert y.dtype == dtype and abs(rate - p) <= 1 / 512
    dropped = (y == 0).double()
    error = (rate * (1 - rate) / y.numel()) ** 0.5
    assert dropped.mean().item() == pytest.approx(rate, abs=5 * error)
    neighbours = (dropped[:, 1:] * dropped[:, :-1]).mean().item()
    assert neighbours == pytest.approx(rate**2, abs=10 * error)  # also between the bytes of one word


def test_every_byte_of_a_word_drops_alike():
    torch.manual_seed(0)
    rates = (dropout(torch.ones(200_000, 8), 0.5) == 0).double().mean(0)
    assert (rates - 0.5).abs().max() < 0.006


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(50, 7, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 1 / 0.75))
    torch.testing.assert_close(y, x * x.grad)


def test_masks_follow_from_the_seed_whatever_the_threads_and_the_layout():
    x = torch.ones(300, 301)
    threads = torch.get_num_threads()
    masks = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(3)
            masks.append((dropout(x, 0.3), dropout(x.T, 0.3)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(masks[0][0], masks[1][0]) and torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(*masks[0])


def test_none_all_and_evaluation():
    x = torch.randn(5, 5)
    assert torch.equal(dropout(x, 0.0), x) and not dropout(x, 1.0).any()
    assert torch.equal(Dropout(0.5).eval()(x), x) and not torch.equal(Dropout(0.5).train()(x), x)
    assert isinstance(Dropout(0.5), torch.nn.Dropout)
