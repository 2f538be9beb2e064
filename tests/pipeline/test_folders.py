import os
import shutil

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from data import describe, load_dataset
from errors import UserError
from pipeline import folders
from pipeline.folders import decode_image, read_folder


def read(root, cache, image_size=32):
    return read_folder(root, image_size, cache)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp"])
def test_a_folder_without_splits_is_split_by_class(tmp_path, suffix):
    root = write_images(tmp_path / "pets", classes=("ant", "bee"), count=10, suffix=suffix)
    dataset = load_dataset("folder", data_dir=root, image_size=16, cache_dir=tmp_path / "cache")
    assert dataset.name == "pets" and dataset.classes == ["ant", "bee"]
    assert dataset.train.labels.bincount().tolist() == [8, 8] and dataset.test.labels.bincount().tolist() == [2, 2]
    assert dataset.train.images.shape == (16, 3, 16, 16)
    for image, label in zip(dataset.test.images, dataset.test.labels.tolist(), strict=True):
        assert image.float().mean((1, 2)).argmax() == label  # each class is of one colour
    assert not set(dataset.train.names) & set(dataset.test.names)
    assert dataset.test.names[0].startswith("ant/") and dataset.test.names[0].endswith(suffix)


def test_splits_of_its_own(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        write_images(tmp_path / "pets" / split, count=3 + number)
    dataset = load_dataset("folder", data_dir=tmp_path / "pets", image_size=8, cache_dir=tmp_path / "cache")
    assert [len(s.labels) for s in (dataset.train, dataset.val, dataset.test)] == [6, 8, 10]
    assert dataset.val.names[0] == "val/cat/000.png"
    with pytest.raises(UserError, match="--val-fraction 0.1: .* has validation images of its own"):
        load_dataset("folder", data_dir=tmp_path / "pets", image_size=8, cache_dir=tmp_path / "cache", val_fraction=0.1)
    shutil.rmtree(tmp_path / "pets" / "test")
    dataset = load_dataset("folder", data_dir=tmp_path / "pets", image_size=8, cache_dir=tmp_path / "cache")
    assert dataset.val is None and dataset.test.names[0] == "val/cat/000.png"


def test_readable_names_and_numbers_a_class(tmp_path):
    root = write_images(tmp_path / "pets", classes=("n01", "n02"), count=10)
    (root / "classes.txt").write_text("n02 golden retriever\nn01 tabby\n")
    write_images(root, classes=("n01",), count=15)
    dataset = load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache")
    assert dataset.classes == ["tabby", "golden retriever"]
    assert "tabby 12, golden retriever 8" in describe(dataset)
    (root / "classes.txt").write_text("n02 golden retriever\n")
    with pytest.raises(UserError, match="classes.txt does not name n01"):
        load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache")
    (root / "classes.txt").write_bytes("n01 Löwe\n".encode("latin-1"))
    with pytest.raises(UserError, match="classes.txt cannot be read"):
        load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache")
    (root / "n01" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="gone.png cannot be read"):
        load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache")


def test_images_are_upright_opaque_and_cut_to_the_centre_square(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decode_image(tmp_path / "wide.png", 20).min() == 200
    half = Image.new("RGB", (40, 40))
    half.paste((255, 255, 255), (0, 0, 40, 20))  # the top is white, until the tag turns it by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    half.save(tmp_path / "turned.jpg", exif=exif)
    turned = decode_image(tmp_path / "turned.jpg", 40)
    assert turned[:, :15].max() < 20 and turned[:, 25:].min() > 235
    for mode in ("L", "P", "RGBA", "CMYK"):
        Image.new(mode, (9, 9)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
        assert decode_image(next(tmp_path.glob(f"{mode}.*")), 9).shape == (3, 9, 9)


def test_the_cache_is_used_and_notices_every_change(tmp_path, monkeypatch):
    root = write_images(tmp_path / "pets")
    decoded = []
    original = folders.decode_images
    monkeypatch.setattr(
        folders, "decode_images", lambda paths, size: decoded.append(len(paths)) or original(paths, size)
    )
    first = read(root, tmp_path / "cache")[1]["all"]
    again = read(root, tmp_path / "cache")[1]["all"]
    assert decoded == [12] and torch.equal(first[0], again[0]) and first[1:] == again[1:]

    black = Image.new("RGB", (40, 32))
    black.save(root / "cat" / "000.png")  # another content
    assert read(root, tmp_path / "cache")[1]["all"][0][0].max() == 0
    status = (root / "cat" / "000.png").stat()
    os.utime(root / "cat" / "001.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # another time alone
    read(root, tmp_path / "cache")
    (root / "cat" / "002.png").unlink()
    read(root, tmp_path / "cache")
    read(root, tmp_path / "cache", image_size=8)
    assert decoded == [12, 12, 12, 11, 11]
    read(root, tmp_path / "cache")
    assert len(decoded) == 5

    cache = next((tmp_path / "cache").glob("pets-32px-*"))
    cache.write_bytes(cache.read_bytes()[:1000])
    read(root, tmp_path / "cache")
    assert len(decoded) == 6


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    root = write_images(tmp_path / "pets")
    (tmp_path / "file").write_text("not a folder")
    read(root, tmp_path / "file" / "cache")
    assert "warning: no cache in" in capsys.readouterr().err


def test_what_cannot_be_used_is_named(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        read(tmp_path / "nowhere", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: it has no class folder, but training needs at least two"):
        read(tmp_path / "empty", cache)
    root = write_images(tmp_path / "pets", classes=("cat",))
    with pytest.raises(UserError, match=r"it has one class folder \(cat\)"):
        read(root, cache)
    (root / "dog").mkdir()
    with pytest.raises(UserError, match="dog contains no image"):
        read(root, cache)
    (root / "dog" / "broken.png").write_bytes((root / "cat" / "000.png").read_bytes()[:200])
    with pytest.raises(UserError, match="dog/broken.png cannot be decoded"):
        read(root, cache)
    write_images(tmp_path / "split" / "train", classes=("cat", "dog"))
    with pytest.raises(UserError, match="it has train/, but no test/ or val/"):
        read(tmp_path / "split", cache)
    write_images(tmp_path / "split" / "test", classes=("cat", "dot"))
    with pytest.raises(UserError, match="only one of train/ and test/ has the classes dog, dot"):
        read(tmp_path / "split", cache)
