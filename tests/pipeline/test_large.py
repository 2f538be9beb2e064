"""Images of any shape: how they are held, and how those to judge by are cut."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torchvision import transforms

from data import is_large, load_dataset
from errors import UserError
from pipeline.batches import evaluation_batches
from pipeline.large import read_large_folder

SHAPES = ((150, 100), (100, 150), (300, 90), (80, 80), (400, 320), (20, 30))  # width, height


def write_large_images(root, *, splits=("train", "test"), suffix=".png"):
    """An image of each of SHAPES a class and split, in class folders below root; returns root."""
    for split in splits:
        for number, size in enumerate(SHAPES):
            write_images(root / split, count=1, size=size, suffix=suffix)
            for folder in (root / split).iterdir():
                (folder / f"000{suffix}").rename(folder / f"{number}-{size[0]}x{size[1]}{suffix}")
    return root


def load_large(root, tmp_path, image_size=72, **options):
    return load_dataset("folder", data_dir=root, image_size=image_size, cache_dir=tmp_path / "cache", **options)


def test_which_images_are_large():
    assert [is_large("folder", size) for size in (32, 64, 65)] == [False, False, True]
    assert is_large("imagewoof", 64) and is_large("imagenette", 32) and not is_large("cifar100", 224)


def test_images_keep_their_shape_and_no_more_pixels_than_crops_need(tmp_path):
    dataset = load_large(write_large_images(tmp_path / "pets"), tmp_path)
    images = dataset.train.images
    held = [[100, 150], [150, 100], [90, 300], [80, 80], [144, 180], [30, 20]]
    assert images.sizes.tolist() == 2 * held and len(images) == len(dataset.train.labels) == 12
    whole = images.decode_all().split([3 * height * width for height, width in 2 * held] + [3 * 300])[:-1]
    for index, (pixels, name) in enumerate(zip(whole, dataset.train.names)):
        pixels = pixels.view(*images.sizes[index], 3).numpy()
        assert np.array_equal(pixels, images.decode(index))
        with Image.open(tmp_path / "pets" / name) as image:
            assert np.array_equal(pixels, np.asarray(image.resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)))


@pytest.mark.parametrize(
    ("image_size", "crop_pct", "short_side"), [(72, 0.875, 82), (128, 0.875, 146), (128, 0.8, 160)]
)
def test_images_to_judge_by_are_cut_as_torchvision_does(tmp_path, image_size, crop_pct, short_side):
    root = write_large_images(tmp_path / "pets")
    load_large(root, tmp_path, image_size)  # another crop_pct does not take what this one leaves in the cache
    test = load_large(root, tmp_path, image_size, crop_pct=crop_pct).test
    reference = transforms.Compose([transforms.Resize(short_side), transforms.CenterCrop(image_size)])
    assert test.images.shape == (12, 3, image_size, image_size) and test.images.dtype == torch.uint8
    for pixels, name in zip(test.images, test.names, strict=True):
        with Image.open(root / name) as image:
            assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(reference(image)))


def test_val_is_the_test_set_where_there_is_no_other_and_fractions_are_split_off(tmp_path):
    root = write_large_images(tmp_path / "pets", splits=("train", "val"))
    dataset = load_large(root, tmp_path, val_fraction=0.3)
    assert [len(split.labels) for split in (dataset.train, dataset.val, dataset.test)] == [8, 4, 12]
    assert dataset.test.names[0].startswith("val/") and dataset.val.names[0].startswith("train/")
    assert len(dataset.train.images) == 8 and dataset.val.images.shape == (4, 3, 72, 72)
    assert not set(dataset.train.names) & set(dataset.val.names)
    for path, name in zip(dataset.train.images.files[:, 0], dataset.train.names, strict=True):
        assert path == str(root / name)
    batch, labels = next(
        evaluation_batches(dataset, dataset.val, SimpleNamespace(batch_size=64), torch.device("cpu")).batches()
    )
    assert batch.shape == (4, 3, 72, 72) and torch.equal(labels, dataset.val.labels)


@pytest.mark.parametrize(("batch_size", "judged_in"), [(8, 32), (64, 256), (512, 256)])
def test_a_small_batch_size_is_one_of_memory_for_judging_too(tmp_path, batch_size, judged_in):
    dataset = load_large(write_large_images(tmp_path / "pets"), tmp_path)
    args = SimpleNamespace(batch_size=batch_size)
    assert evaluation_batches(dataset, dataset.test, args, torch.device("cpu")).batch_size == judged_in


def test_statistics_and_hash_are_of_the_training_images(tmp_path):
    root = write_large_images(tmp_path / "pets")
    dataset = load_large(root, tmp_path)
    images = dataset.train.images
    pixels = np.concatenate([images.decode(index).reshape(-1, 3) for index in range(12)]) / 255
    assert dataset.mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-9)
    assert dataset.std == pytest.approx(pixels.std(0).tolist(), abs=1e-9)
    first = dataset.train.hash()
    Image.new("RGB", (99, 99)).save(root / "test" / "cat" / "0-150x100.png")
    assert load_large(root, tmp_path).train.hash() == first
    Image.new("RGB", (99, 99)).save(root / "train" / "cat" / "0-150x100.png")
    changed = load_large(root, tmp_path)
    assert changed.train.hash() != first and changed.mean != dataset.mean


def test_a_photograph_is_held_upright(tmp_path):
    root = write_large_images(tmp_path / "pets", suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    half = Image.new("RGB", (1000, 400))
    half.paste((255, 255, 255), (0, 0, 500, 400))
    half.save(root / "train" / "cat" / "0-150x100.jpg", exif=exif)
    images = load_large(root, tmp_path).train.images
    assert images.sizes[0].tolist() == [360, 144]
    upright = images.decode(0)
    assert upright[:170].min() > 235 and upright[190:].max() < 20


def test_small_images_are_enlarged_with_one_warning(tmp_path, capsys):
    root = write_large_images(tmp_path / "pets")
    load_large(root, tmp_path)
    warning = capsys.readouterr().err
    assert "4 of 24 images are smaller than --image-size 72 (the smallest: 20 pixels) and are enlarged" in warning
    assert warning.count("\n") == 1
    shutil.rmtree(root / "test")
    for path in root.glob("*/*/5-*"):
        path.unlink()
    load_large(root / "train", tmp_path)
    assert not capsys.readouterr().err


def test_what_is_no_image_is_named(tmp_path):
    root = write_large_images(tmp_path / "pets")
    (root / "train" / "dog" / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match="dog/text.jpg cannot be decoded"):
        read_large_folder(root, 72, tmp_path / "cache")
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        read_large_folder(tmp_path / "nowhere", 72, tmp_path / "cache")
