"""Images that stand in two splits are counted, and said once before training."""

import shutil

import pytest
from conftest import TINY, write_images

import train_vit
from data import load_dataset


@pytest.fixture
def split_images(tmp_path):
    """train/ and test/ of random images; 2 of the 6 test images, under other names, are training images as well."""
    for count, split in ((8, "train"), (3, "test")):
        write_images(tmp_path / "pets" / split, count=count, size=(40, 32) if split == "train" else (32, 40))
    for name, test_name in (("cat", "000"), ("dog", "002")):
        copied = tmp_path / "pets" / "train" / name / "005.png"
        shutil.copy(copied, tmp_path / "pets" / "test" / name / f"{test_name}.png")
    return tmp_path / "pets"


@pytest.mark.parametrize("size", [16, 80])  # of one size, and of any size
def test_images_in_two_splits_are_counted(size, split_images, tmp_path):
    def repeated(**options):
        return load_dataset(
            "folder", data_dir=split_images, image_size=size, cache_dir=tmp_path / "cache", **options
        ).repeated

    assert repeated() == "2 of 6 test images are training images as well"
    shutil.copy(split_images / "train/cat/001.png", split_images / "train/cat/again.png")
    by_seed = {repeated(val_fraction=0.5, split_seed=seed) for seed in range(8)}
    assert any("2 of 9 validation images" in text or "1 of 8 validation images" in text for text in by_seed)
    for path in (split_images / "test").glob("*/00[02].png"):
        path.unlink()
    assert repeated() == ""


def test_repeated_images_are_said_once_before_training(split_images, tmp_path, capsys):
    extra = tmp_path / "made" / "cat"
    extra.mkdir(parents=True)
    shutil.copy(split_images / "test/cat/001.png", extra)
    flags = [
        "--data-dir",
        str(split_images),
        "--image-size",
        "16",
        "--epochs",
        "1",
        "--out-dir",
        str(tmp_path / "runs"),
    ]
    train_vit.main([*flags, "--cache-dir", str(tmp_path / "cache"), "--extra-data", str(extra.parent), *TINY])
    warnings = [line for line in capsys.readouterr().err.splitlines() if "images as well" in line]
    seen = "2 of 6 test images are training images as well; 1 of 6 test images are extra images as well"
    assert warnings == [f"warning: {seen}"]
    train_vit.main([*flags, "--cache-dir", str(tmp_path / "cache"), "--overfit", "4", *TINY])
    assert "images as well" not in capsys.readouterr().err
