import torch
import torchvision.transforms.functional as reference
from torchvision.transforms import RandomResizedCrop

from augment import random_crop_boxes, random_flip, random_resized_crop, resized_crop
from data import load_dataset


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_pictures(count, height=32, width=32):
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator())


def assert_crops_equal_torchvisions(pictures):
    size = pictures.shape[2:]
    boxes = random_crop_boxes(len(pictures), size, generator(1), scale=(0.1, 1.0), ratio=(0.5, 2.0))
    ours = resized_crop(pictures, boxes)
    for picture, box, cut in zip(pictures, boxes.tolist(), ours, strict=True):
        expected = reference.resized_crop(picture, *box, size, antialias=False)
        assert (cut.int() - expected.int()).abs().max() <= 1  # one grey level, of rounding


def test_crops_equal_torchvisions_on_random_pictures():
    assert_crops_equal_torchvisions(random_pictures(50))
    assert_crops_equal_torchvisions(random_pictures(50, 20, 28))


def test_crops_equal_torchvisions_on_real_pictures(cifar10_dir):
    pictures = load_dataset("cifar10", data_dir=cifar10_dir, image_size=32).test.pictures
    assert_crops_equal_torchvisions(pictures[:200])


def test_a_crop_of_everything_changes_nothing():
    pictures = random_pictures(4)
    assert torch.equal(resized_crop(pictures, torch.tensor([[0, 0, 32, 32]] * 4)), pictures)


def test_every_picture_gets_a_draw_of_its_own():
    pictures = random_pictures(1).expand(64, -1, -1, -1)
    flipped = random_flip(pictures, generator())
    same = (flipped == pictures).flatten(1).all(1)
    assert torch.equal(flipped[~same], pictures[~same].flip(3)) and 15 < same.sum() < 49
    crops = random_resized_crop(pictures, generator(), scale=(0.5, 1.0), ratio=(0.9, 1.1))
    assert len({crop.numpy().tobytes() for crop in crops}) > 55


def test_flip_with_probability_0_and_1():
    pictures = random_pictures(20)
    assert torch.equal(random_flip(pictures, generator(), p=0.0), pictures)
    assert torch.equal(random_flip(pictures, generator(), p=1.0), pictures.flip(3))


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


def test_where_no_draw_fits_the_whole_picture_is_taken():
    boxes = random_crop_boxes(5, (8, 32), generator(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert boxes.tolist() == [[0, 0, 8, 32]] * 5
