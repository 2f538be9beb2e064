"""Batches: their order, what is drawn from what, and the transforms that the flags ask for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import indices_of, numbered_split

from data import Split
from pipeline.batches import Batches, image_transforms, mix_transform, normalised_transforms
from pipeline.crops import place_images


def plain_batches(split, **options):
    """Batches that are not normalised, so that a pixel is still its image's index."""
    return Batches(split, mean=[0, 0, 0], std=[1 / 255] * 3, device="cpu", **options)


def test_an_epoch_sees_every_image_once_in_an_order_that_follows_from_seed_and_epoch():
    batches = plain_batches(numbered_split(), batch_size=8, seed=3)
    assert batches.steps_per_epoch == 7
    epochs = [[indices_of(images) for images, _ in batches.batches(epoch)] for epoch in (0, 1, 0)]
    assert [len(batch) for batch in epochs[0]] == [8] * 6 + [2]
    assert sorted(sum(epochs[0], [])) == list(range(50))
    assert epochs[0] == epochs[2] != epochs[1]
    other_seed = plain_batches(numbered_split(), batch_size=8, seed=4)
    assert [indices_of(images) for images, _ in other_seed.batches(0)] != epochs[0]


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8] * 6), (25, [25, 25]), (49, [49]), (64, [50])])
def test_what_is_left_over_from_whole_batches_is_dropped_but_never_all(batch_size, sizes):
    batches = plain_batches(numbered_split(), batch_size=batch_size, seed=3, drop_last=True)
    epochs = [[indices_of(images) for images, _ in batches.batches(epoch)] for epoch in (0, 1)]
    assert [len(batch) for batch in epochs[0]] == sizes and batches.steps_per_epoch == len(sizes)
    left_out = [set(range(50)) - set(sum(epoch, [])) for epoch in epochs]
    assert len(left_out[0]) == 50 - sum(sizes) and (not left_out[0] or left_out[0] != left_out[1])


def test_starting_inside_an_epoch_gives_the_rest_of_it_with_the_same_augmentation():
    def noise(images, generator):
        return images + torch.randint(0, 100, images.shape, generator=generator, dtype=torch.uint8)

    batches = plain_batches(numbered_split(), batch_size=8, seed=3, transforms=[noise])
    whole = list(batches.batches(5))
    for (images, labels), (same, same_labels) in zip(whole[4:], batches.batches(5, start_step=4), strict=True):
        assert torch.equal(images, same) and torch.equal(labels, same_labels)


def test_images_are_normalised_by_mean_and_std_of_training():
    split = Split(torch.full((4, 3, 2, 2), 51, dtype=torch.uint8), torch.zeros(4).long(), np.arange(4))
    batches = Batches(split, batch_size=4, mean=[0.1, 0.2, 0.4], std=[0.5, 0.25, 0.1], device="cpu")
    images, _ = next(batches.batches())
    assert images[0, :, 0, 0].tolist() == pytest.approx([0.2, 0.0, -2.0], abs=1e-6)


def flags(**others):
    off = {"aa": "none", "fill": 0, "hflip": 0.0, "crop_padding": 0, "scale": None, "ratio": None, "rotate": 0.0}
    return SimpleNamespace(
        **off | {"reprob": 0.0, "cutout": 0, "mixup": 0.0, "cutmix": 0.0, "drop_last": False} | others
    )


def test_flags_ask_for_transforms_and_nothing_is_on_by_itself():
    assert not [*image_transforms(flags()), *normalised_transforms(flags())] and mix_transform(flags(), 10) is None
    everything = flags(aa="trivial", fill=9, hflip=0.5, crop_padding=4, scale=[0.5, 1], ratio=[1, 1], rotate=5.0)
    names = [transform.func.__name__ for transform in image_transforms(everything)]
    assert names == ["trivial_augment", "random_flip", "padded_crop", "random_resized_crop", "random_rotation"]
    assert next(image_transforms(everything)).keywords == {"fill": 9}
    names = [transform.func.__name__ for transform in normalised_transforms(flags(reprob=0.5, cutout=8))]
    assert names == ["random_erasing", "cutout"]


@pytest.mark.parametrize("mixes", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixed_labels_are_the_shares_of_the_images(mixes):
    """Each image is of one value, its class: so the mean of a mixed one's pixels is the mean of its labels."""
    labels = torch.arange(5).repeat(20)
    images = (10 * labels).byte()[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    split = Split(images, labels, np.arange(100))
    batches = plain_batches(split, batch_size=10, seed=1, mix=mix_transform(flags(**mixes), 5))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mixed = list(batches.batches(0))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is as it was
    for x, y in mixed:
        assert y.shape == (10, 5) and torch.allclose(y.sum(1), torch.ones(10))
        torch.testing.assert_close(x.mean((1, 2, 3)), 10 * (y @ torch.arange(5.0)), rtol=0, atol=1e-3)
    assert len({tuple(y.amax(1).tolist()) for _, y in mixed}) > 5  # another draw for every batch
    for (x, y), (same_x, same_y) in zip(mixed[4:], batches.batches(0, start_step=4), strict=True):
        assert torch.equal(x, same_x) and torch.equal(y, same_y)


def test_images_that_a_gpu_has_no_room_for_stay_on_the_host(monkeypatch, capsys):
    images = numbered_split().images
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (images.nbytes + 100, 10**9))
    assert place_images(images, torch.device("cuda")) is images
    assert "stay on the host" in capsys.readouterr().out


def test_batches_from_the_host_are_those_from_the_device(monkeypatch):
    expected = list(plain_batches(numbered_split(), batch_size=8, seed=3).batches(1, start_step=2))
    batches = plain_batches(numbered_split(), batch_size=8, seed=3)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda images: pinned.append(len(images)) or images)
    batches.images = OnHost(batches.images)
    found = list(batches.batches(1, start_step=2))
    assert pinned == [8, 8, 8, 8, 2]
    for (images, labels), (same, same_labels) in zip(expected, found, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, same_labels)


class OnHost:
    """Images on another device than the labels."""

    device = torch.device("meta")

    def __init__(self, images):
        self.images = images

    def __getitem__(self, indices):
        return self.images[indices]
