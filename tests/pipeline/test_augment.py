import pytest
import torch
import torchvision.transforms.functional as reference
from scipy.stats import chisquare
from torchvision.transforms import RandomErasing, RandomResizedCrop

from data import load_dataset
from pipeline.augment import (
    cutout,
    erase,
    nearest_affine,
    normalize,
    padded_crop,
    random_crop_boxes,
    random_erasing,
    random_flip,
    random_resized_crop,
    random_rotation,
    resized_crop,
    rotations,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, height=32, width=32):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator())


def assert_crops_equal_torchvisions(images):
    size = images.shape[2:]
    boxes = random_crop_boxes(len(images), size, generator(1), scale=(0.1, 1.0), ratio=(0.5, 2.0))
    ours = resized_crop(images, boxes)
    for image, box, cut in zip(images, boxes.tolist(), ours, strict=True):
        expected = reference.resized_crop(image, *box, size, antialias=False)
        assert (cut.int() - expected.int()).abs().max() <= 1  # one grey level, of rounding


def test_crops_equal_torchvisions_on_random_images():
    assert_crops_equal_torchvisions(random_images(50))
    assert_crops_equal_torchvisions(random_images(50, 20, 28))


def test_crops_equal_torchvisions_on_real_images(cifar10_dir):
    images = load_dataset("cifar10", data_dir=cifar10_dir, image_size=32).test.images
    assert_crops_equal_torchvisions(images[:200])


def test_a_crop_of_everything_changes_nothing():
    images = random_images(4)
    assert torch.equal(resized_crop(images, torch.tensor([[0, 0, 32, 32]] * 4)), images)


def test_every_image_gets_a_draw_of_its_own():
    images = random_images(1).expand(64, -1, -1, -1)
    flipped = random_flip(images, generator())
    same = (flipped == images).flatten(1).all(1)
    assert torch.equal(flipped[~same], images[~same].flip(3)) and 15 < same.sum() < 49
    crops = random_resized_crop(images, generator(), scale=(0.5, 1.0), ratio=(0.9, 1.1))
    assert len({crop.numpy().tobytes() for crop in crops}) > 55


def test_flip_with_probability_0_and_1():
    images = random_images(20)
    assert torch.equal(random_flip(images, generator(), p=0.0), images)
    assert torch.equal(random_flip(images, generator(), p=1.0), images.flip(3))


def test_boxes_are_drawn_as_torchvisions():
    """Mean and standard deviation of position, height and width over many draws, within four standard errors."""
    options = {"scale": (0.8, 1.0), "ratio": (0.9, 1.1)}
    count = 4000
    ours = random_crop_boxes(count, (32, 32), generator(), **options).double()
    torch.manual_seed(0)
    blank = torch.zeros(3, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, *options.values()) for _ in range(count)]).double()
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * spread * (2 / count) ** 0.5).all()
    assert ((ours.std(0) / spread - 1).abs() < 0.1).all()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= 32).all() and (ours[:, 2:] > 0).all()


def test_where_no_draw_fits_the_whole_image_is_taken():
    boxes = random_crop_boxes(5, (8, 32), generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes.tolist() == [[0, 0, 8, 32]] * 5


@pytest.mark.parametrize("size", [(8, 6), (5, 9)])
def test_padded_crops_are_cuts_of_the_padded_image_each_equally_likely(size):
    images = random_images(5000, *size)
    crops = padded_crop(images, generator(1), padding=2, fill=9)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=9)
    offsets = [(top, left) for top in range(5) for left in range(5)]
    cuts = [padded[:, :, top : top + size[0], left : left + size[1]] for top, left in offsets]
    found = torch.stack([(crops == cut).flatten(1).all(1) for cut in cuts])
    assert (found.sum(0) == 1).all()
    assert chisquare(found.sum(1).numpy()).pvalue > 0.01


def test_a_crop_without_padding_changes_nothing():
    images = random_images(4, 20, 28)
    assert torch.equal(padded_crop(images, generator(), padding=0), images)


def assert_rotations_equal_torchvisions(images):
    angles = torch.empty(len(images), dtype=torch.float64).uniform_(-180, 180, generator=generator(1))
    angles[:8] = torch.arange(8) * 45.0 - 135
    for image, angle, turned in zip(images, angles.tolist(), nearest_affine(images, rotations(angles), fill=50)):
        assert torch.equal(turned, reference.rotate(image, angle, fill=[50.0] * 3))


def test_rotations_equal_torchvisions_on_random_images():
    for size in ((32, 32), (20, 28), (33, 32)):
        assert_rotations_equal_torchvisions(random_images(100, *size))


def test_rotations_equal_torchvisions_on_real_images(cifar10_dir):
    images = load_dataset("cifar10", data_dir=cifar10_dir, image_size=32).test.images
    assert_rotations_equal_torchvisions(images[:200])


def test_random_rotation_turns_both_ways_and_no_further():
    """Seen at one pixel on a ramp of angles: what a pixel right of the centre shows is where it was."""
    y, x = torch.meshgrid(torch.arange(65) - 32, torch.arange(65) - 32, indexing="ij")
    ramp = (torch.atan2(-y.float(), x.float()).rad2deg() + 128).clamp(0, 255).byte()  # 128 + degrees
    turned = random_rotation(ramp.expand(2000, 3, -1, -1), generator(), degrees=30)
    angles = 128 - turned[:, 0, 32, 64].float()
    assert angles.min() < -28 and angles.max() > 28 and angles.abs().max() <= 31
    assert abs(angles.mean()) < 2 and abs(angles.std() - 60 / 12**0.5) < 1
    images = random_images(10)
    assert torch.equal(random_rotation(images, generator(), degrees=0), images)


def test_normalize_equals_torchvisions():
    images = random_images(20, 20, 28)
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    expected = reference.normalize(images / 255, mean, std)
    torch.testing.assert_close(normalize(images, torch.tensor(mean), torch.tensor(std)), expected)


def test_erase_sets_a_box_to_the_mean():
    images = torch.randn(4, 3, 20, 28, generator=generator())
    boxes = torch.tensor([[2, 3, 5, 7], [-3, 20, 6, 20], [0, 0, 0, 0], [0, 0, 20, 28]])
    expected = images.clone()
    expected[0, :, 2:7, 3:10] = 0
    expected[1, :, :3, 20:] = 0
    expected[3] = 0
    assert torch.equal(erase(images, boxes), expected)


def erased_sides(images):
    """Height and width (B,) of what is 0 in images that had no 0; it must be a rectangle, and the rest untouched."""
    erased = (images == 0).all(1)
    assert torch.equal(erased, (images == 0).any(1)) and (images[~erased[:, None].expand_as(images)] == 1).all()
    height, width = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(erased.sum((1, 2)), height * width)
    return height, width


def test_erasing_happens_at_its_rate_within_its_ranges():
    height, width = erased_sides(random_erasing(torch.ones(4000, 3, 40, 60), generator(), p=0.25))
    happened = height > 0
    assert abs(happened.sum() - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5
    height, width = height[happened].float(), width[happened].float()
    share = height * width / 2400
    assert 0.018 < share.min() < 0.04 and 0.3 < share.max() < 0.35
    assert height.max() < 40 and width.max() < 60
    assert 0.25 < (height / width).min() < 0.4 and 2.8 < (height / width).max() < 4


def test_erased_boxes_are_drawn_as_torchvisions():
    """Mean of position, height and width over many draws, within four standard errors."""
    count, scale, ratio = 4000, (0.02, 1 / 3), (0.3, 3.3)
    erased = random_erasing(torch.ones(count, 3, 32, 24), generator(), p=1.0, scale=scale, ratio=ratio) == 0
    height, width = erased_sides(1.0 - erased.float())
    top, left = erased[:, 0].any(2).int().argmax(1), erased[:, 0].any(1).int().argmax(1)
    ours = torch.stack([top, left, height, width], dim=1).double()
    torch.manual_seed(0)
    blank = torch.zeros(3, 32, 24)
    theirs = [RandomErasing.get_params(blank, scale, ratio, [0.0])[:4] for _ in range(count)]
    theirs = torch.tensor(theirs).double()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * theirs.std(0) * (2 / count) ** 0.5).all()
    assert ((ours.std(0) / theirs.std(0) - 1).abs() < 0.1).all()


def test_where_no_box_fits_there_is_none():
    images = torch.ones(5, 3, 8, 32)
    assert torch.equal(random_erasing(images, generator(), p=1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0)), images)


@pytest.mark.parametrize("size", [8, 5])
def test_cutout_cuts_a_square_whose_centre_is_anywhere(size):
    height, width = erased_sides(cutout(torch.ones(6000, 3, 20, 28), generator(), size=size))
    for sides, length in ((height, 20), (width, 28)):
        starts = torch.arange(length) - size // 2
        lengths = (starts + size).clamp(max=length) - starts.clamp(min=0)  # for each centre
        expected = lengths.bincount().numpy() * 6000 / length
        counts = sides.bincount(minlength=size + 1).numpy()
        assert (counts[expected == 0] == 0).all()
        assert chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.01


TRANSFORMS = {
    "flip": (random_flip, {}),
    "padded crop": (padded_crop, {"padding": 4}),
    "resized crop": (random_resized_crop, {"scale": (0.3, 1.0), "ratio": (0.5, 2.0)}),
    "rotation": (random_rotation, {"degrees": 15}),
    "erasing": (random_erasing, {"p": 0.5}),
    "cutout": (cutout, {"size": 8}),
}


@pytest.mark.parametrize("transform, options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_follows_from_its_generator_alone(transform, options):
    images = random_images(1, 20, 28).expand(64, -1, -1, -1)
    if transform in (random_erasing, cutout):
        images = images.float() + 1
    state = torch.get_rng_state()
    first = transform(images, generator(), **options)
    assert torch.equal(transform(images, generator(), **options), first)
    assert not torch.equal(transform(images, generator(1), **options), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == images.shape and first.dtype == images.dtype
    assert len({image.numpy().tobytes() for image in first}) > (1 if transform is random_flip else 20)
    alone = transform(images[:1], generator(), **options)
    assert alone.shape == (1, 3, 20, 28) and alone.dtype == images.dtype


@pytest.mark.parametrize("transform, options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_nothing_is_asked_of_the_device(transform, options):
    """Tensors on meta have no values, so that a copy to the host, or a shape that hangs on values, is an error."""
    dtype = torch.float if transform in (random_erasing, cutout) else torch.uint8
    assert transform(torch.empty(20, 3, 32, 24, dtype=dtype, device="meta"), generator(), **options).is_meta
