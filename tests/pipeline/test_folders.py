import os
import shutil
from functools import partial

import pytest
import torch
from conftest import write_images
from PIL import Image

from data import describe, load_dataset
from errors import UserError
from pipeline import folders
from pipeline.folders import find_splits, list_folder, read_folder


def read(root, cache, image_size=32):
    return read_folder(root, image_size, cache)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp", ".bmp", ".gif", ".TIF", ".jfif"])
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


def test_the_cache_is_used_and_notices_every_change(tmp_path, monkeypatch):
    root = write_images(tmp_path / "pets")
    decoded = []
    original = folders.decode_images
    monkeypatch.setattr(
        folders, "decode_images", lambda paths, *a, **k: decoded.append(len(paths)) or original(paths, *a, **k)
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


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation"), ("TRAIN", "valid", "testing")])
def test_splits_are_found_under_their_usual_names(tmp_path, names):
    for number, name in enumerate(names):
        write_images(tmp_path / "pets" / name, count=3 + number)
    dataset = load_dataset("folder", data_dir=tmp_path / "pets", image_size=8, cache_dir=tmp_path / "cache")
    assert dataset.classes == ["cat", "dog"] and len(dataset.train.labels) == 6
    assert (dataset.val is not None) == (len(names) == 3) and dataset.test.names[0] == f"{names[-1]}/cat/000.png"


def test_what_looks_like_splits_is_never_a_class(tmp_path):
    def message(*folders):
        root = tmp_path / "-".join(folders).replace("/", ".")
        for folder in folders:
            write_images(root, classes=(folder,), count=1)
        with pytest.raises(UserError) as raised:
            list_folder(root)
        return str(raised.value).removeprefix(f"--data-dir {root}: ").replace(str(root), "")

    assert message("train", "test").startswith("train/ has no class folders, as in train/cat/1.jpg (if it is a class")
    for names in (("seg_train/seg_train/sea", "seg_test/seg_test/sea"), ("train1", "test1"), ("train", "test data")):
        assert message(*names).endswith("look like splits: name them train/ and test/, with class folders")
    for names in (("train station", "bus stop"), ("trained", "tested"), ("train station", "train track")):
        assert find_splits(write_images(tmp_path / "-".join(names), classes=names, count=1))[0] == sorted(names)
    assert message("cat", "dog", "Test") == "it has Test/, but no train/ (if that is a class, rename it)"
    assert message("train/cat", "train/dog", "val/cat", "valid/cat").startswith("train/ and val/ and valid/: two")
    within = message("cat/train", "cat/test", "dog/train", "dog/test")
    assert "/cat holds splits" in within and within.endswith("they belong above classes: train/cat/1.jpg")
    for split in ("train", "test"):  # CIFAR-100 has trains
        write_images(tmp_path / "cifar100" / split, classes=("bus", "train"), count=1)
    assert list_folder(tmp_path / "cifar100")[0] == ["bus", "train"]


def test_swapped_folders_are_decoded_again(tmp_path):
    """Also if all files have one size and one time, as bitmaps that were unpacked together."""
    root = tmp_path / "pets"
    for grey, name in ((0, "cat"), (255, "dog")):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (grey,) * 3).save(root / name / "1.bmp")
        os.utime(root / name / "1.bmp", (0, 0))
    read = partial(read_folder, root, 8, tmp_path / "cache")
    before = read()[1]["all"][0]
    for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        (root / old).rename(root / new)
    assert torch.equal(read()[1]["all"][0], before.flip(0))


def test_runs_in_the_folder_are_no_classes(tmp_path):
    root = write_images(tmp_path / "pets", count=1)
    for run in ("checkpoints/vit/maps", "mine", "runs/vit-2"):
        write_images(root, classes=(run,), count=1)
    (root / "mine" / "last.pt").touch()
    (root / "runs" / "plan" / "vit-2").mkdir(parents=True)
    (root / "runs" / "plan" / "vit-2" / "last.prev.pt").touch()
    (root / "dog" / "split.csv").touch()  # this is a class nevertheless
    assert find_splits(root)[0] == ["cat", "dog"]


def test_what_is_not_read_is_counted_and_named_once(tmp_path, capsys, monkeypatch):
    root = write_images(tmp_path / "pets", count=1)
    for path in ("cat/1.heic", "dog/2.HEIC", "dog/notes", "dog/.hidden.heic"):
        (root / path).touch()
    write_images(tmp_path / "else", classes=("more",), count=1)
    (root / "cat" / "more").symlink_to(tmp_path / "else" / "more")
    os.mkfifo(root / "dog" / "pipe.jpg")
    (root / "dog" / "locked").mkdir()
    scandir = os.scandir

    def locked(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert len(list_folder(root)[1]) == 2
    assert capsys.readouterr().err == (
        f"warning: not read in {root}: 2 .heic, {root}/cat/1.heic; 1 linked, {root}/cat/more; "
        f"1 no regular file, {root}/dog/pipe.jpg; 1 unreadable, {root}/dog/locked; 1 without ending, {root}/dog/notes\n"
    )
    (root / "cat" / "000.png").unlink()
    with pytest.raises(UserError, match=r"cat contains no image \(.*\); not read: 1 \.heic, "):
        list_folder(root)


def test_names_that_are_not_utf8_can_be_printed_and_written(tmp_path):
    root = write_images(tmp_path / os.fsdecode(b"caf\xe9"), classes=("cat", os.fsdecode(b"caf\xe9")), count=5)
    (root / "cat" / "000.png").rename(root / "cat" / os.fsdecode(b"caf\xe9.png"))
    dataset = load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache")
    names = [dataset.name, *dataset.classes, *dataset.train.names, *dataset.test.names]
    "".join(names).encode()
    assert dataset.classes == [r"caf\xe9", "cat"] and r"cat/caf\xe9.png" in names


def test_folders_with_spaces_have_readable_names_and_no_two_are_alike(tmp_path):
    root = write_images(tmp_path / "pets", classes=("great", "great dane", "n01"), count=1)
    (root / "classes.txt").write_text("great dane\tDogge / large dog\ngreat  big\nn01\nn77 no folder\n")
    assert list_folder(root)[0] == ["big", "Dogge / large dog", "n01"]
    for twice in ("great big\ngreat dane big\nn01 tabby\n", "great a\ngreat b\n"):
        (root / "classes.txt").write_text(twice)
        with pytest.raises(UserError, match="classes.txt has great.* twice: each class needs one line"):
            list_folder(root)
