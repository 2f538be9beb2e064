import hashlib
import time

import pytest
import torch

from data import SHAPES
from pipeline.shapes import CLASSES, DISTANCES, make_shapes


@pytest.fixture(scope="module")
def sets():
    return {split: make_shapes(split) for split in ("train", "val", "test")}


def test_made_in_five_seconds_of_two_cores():
    started = time.process_time()  # of all threads together, so that other programs do not count
    for split in ("train", "val", "test"):
        make_shapes(split)
    assert time.process_time() - started < 10


def test_numbers_and_types(sets):
    assert {split: len(s.labels) for split, s in sets.items()} == {"train": 20_000, "val": 2_000, "test": 2_000}
    for s in sets.values():
        assert s.images.shape[1:] == (3, 32, 32) and s.images.dtype == torch.uint8
        assert s.labels.bincount().tolist() == [len(s.labels) // 10] * 10


def test_the_images_never_change(sets):
    """Maps are scored against these masks, so that any change of a constant is one of every published number."""
    digests = {}
    for name in SHAPES:
        digest = hashlib.sha256()
        for part in make_shapes("test", name):
            digest.update(b"" if part is None else part.numpy())
        digests[name] = digest.hexdigest()
    assert digests == {
        "shapes": "d69532608eccfd81789b98e836577e4ac9735e81347ca3dacb1982669908a286",
        "shapes_even": "1510a6ad05143d3f215db22696f8f1c8bb430d8f7b71e48bc0dd31da74693b6c",
        "shapes_pair": "83c23b34d1b37f207727220ce1819d3925a2850f9fe85a7094d402a31f3c2d5c",
        "shapes_shuffled": "d69532608eccfd81789b98e836577e4ac9735e81347ca3dacb1982669908a286",  # as in shapes
    }


def test_every_second_image_of_shapes_even_is_inverted(sets):
    even, plain = make_shapes("test", "shapes_even"), sets["test"]
    same, inverted = ((even.images == images).flatten(1).all(1) for images in (plain.images, 255 - plain.images))
    assert torch.equal(same, ~inverted) and 0.45 < inverted.float().mean() < 0.55
    assert all(torch.equal(*parts) for parts in zip(even[1:4], plain[1:4], strict=True))
    light = even.images.float().mean(1)
    inside, outside = ((light * m).sum((1, 2)) / m.sum((1, 2)) for m in (even.masks, ~even.masks))
    assert abs((inside > outside).float().mean() - 0.5) < 0.05


def test_only_the_training_labels_of_shapes_shuffled_are_shuffled(sets):
    train, plain = make_shapes("train", "shapes_shuffled"), sets["train"]
    assert torch.equal(train.images, plain.images) and torch.equal(train.masks, plain.masks)
    assert torch.equal(train.labels.bincount(), plain.labels.bincount())
    assert (train.labels == plain.labels).float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(make_shapes("test", "shapes_shuffled").labels, sets["test"].labels)


def test_the_label_of_shapes_pair_is_that_of_the_red_shape():
    pair = make_shapes("val", "shapes_pair")
    assert pair.labels.bincount().tolist() == [200] * 10 and not (pair.masks & pair.others).any()
    red, blue = (
        (pair.images[:, c].float() * (m / m.sum((1, 2), keepdim=True))).sum((1, 2))
        for c, m in ((0, pair.masks), (2, pair.others))
    )
    green = [(pair.images[:, 1].float() * (m / m.sum((1, 2), keepdim=True))).sum((1, 2)) for m in pair[2:5:2]]
    assert (red > green[0] + 40).all() and (blue > green[1] + 40).float().mean() > 0.99
    columns = torch.arange(32.0)
    left = [(m.float().sum(1) @ columns) / m.sum((1, 2)) < 16 for m in (pair.masks, pair.others)]
    assert (left[0] != left[1]).float().mean() > 0.99 and 0.45 < left[0].float().mean() < 0.55
    for part in (pair.masks, pair.others):
        assert 0.06 < part.float().mean() < 0.08


def test_no_image_is_in_two_sets(sets):
    images = [p.numpy().tobytes() for s in sets.values() for p in s.images]
    assert len(set(images)) == len(images)


def test_masks_cover_what_they_promise(sets):
    for s in sets.values():
        share = s.masks.float().mean((1, 2))
        assert share.min() >= 0.08 and s.outlines.float().mean((1, 2)).max() <= 0.25
        assert abs(share.mean() - 0.15) < 0.003


def test_a_centred_guess_rarely_hits(sets):
    """Nor does any other guess that is the same for every image."""
    for s in sets.values():
        assert s.outlines.float().mean(0).max() < 0.35


def test_centres_lie_uniformly(sets):
    """A disc's centre of mass is its centre where no border cuts it: chi-square over 4 x 4 cells, p = 0.001 at 37.7."""
    s = sets["train"]
    y, x = torch.meshgrid(torch.arange(32.0) + 0.5, torch.arange(32.0) + 0.5, indexing="ij")
    masks = s.masks[s.labels == CLASSES.index("disc")].float()
    whole = (masks[:, [0, -1]].sum((1, 2)) == 0) & (masks[:, :, [0, -1]].sum((1, 2)) == 0)
    masks = masks[whole]
    centres = torch.stack([(masks * axis).sum((1, 2)) / masks.sum((1, 2)) for axis in (y, x)], 1)
    inner = centres[((centres > 10) & (centres < 22)).all(1)]  # no disc is so large that the border cuts it there
    counts = ((inner - 10) // 3).long() @ torch.tensor([4, 1])
    expected = len(inner) / 16
    assert len(inner) > 300 and ((counts.bincount(minlength=16) - expected) ** 2 / expected).sum() < 37.7


def test_outlines_fill_the_holes_of_hollow_shapes_alone(sets):
    s = sets["test"]
    for label, name in enumerate(CLASSES):
        masks, outlines = s.masks[s.labels == label], s.outlines[s.labels == label]
        assert (masks <= outlines).all()
        assert (outlines.sum() > 1.2 * masks.sum()) == isinstance(DISTANCES[name], tuple)


def test_a_mask_lies_on_the_shape(sets):
    """Shapes are brighter than their backgrounds: inside the mask brighter than outside, in nearly every image."""
    s = sets["test"]
    brightness = s.images.float().mean(1)
    inside = (brightness * s.masks).sum((1, 2)) / s.masks.sum((1, 2))
    outside = (brightness * ~s.masks).sum((1, 2)) / (~s.masks).sum((1, 2))
    assert (inside - outside > 20).float().mean() > 0.99


def test_a_linear_classifier_stays_under_40_percent(sets):
    """Ridge regression onto the classes, on all pixels; the ridge is the one that serves the test images best."""
    train, test = sets["train"], sets["test"]
    x, x_test = (s.images.flatten(1).float() / 255 - 0.3 for s in (train, test))
    targets = torch.nn.functional.one_hot(train.labels, 10).float() - 0.1
    gram, moment = x.T @ x, x.T @ targets
    best = 0
    for ridge in (10, 100, 1000, 10_000):
        weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), moment)
        best = max(best, ((x_test @ weights).argmax(1) == test.labels).float().mean().item())
    assert 0.1 < best < 0.4
