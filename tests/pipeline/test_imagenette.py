"""fastai's archives: found, unpacked, checked and named."""

import hashlib
import re
import tarfile

import pytest
import torchvision
from test_large import write_large_images

from data import count_classes, load_dataset
from errors import UserError
from pipeline import imagenette
from pipeline.imagenette import MD5_SUMS, READABLE, find_imagenette, warn_of_seen_images


@pytest.fixture
def no_network(monkeypatch):
    def urlopen(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", urlopen)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """imagewoof2-160.tgz in datasets/, of two classes, with its sum as the right one."""
    folder = write_large_images(tmp_path / "imagewoof2-160", splits=("train", "val"))
    for split in ("train", "val"):
        for name, wordnet in (("cat", "n02111889"), ("dog", "n02115641")):
            (folder / split / name).rename(folder / split / wordnet)
    path = tmp_path / "datasets" / "imagewoof2-160.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, folder.name)
    monkeypatch.setitem(MD5_SUMS, "imagewoof2-160", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_what_weights_of_imagenet_have_seen_is_said(capsys):
    for name in ("cifar10", "imagewoof"):
        warn_of_seen_images(name)
    said = capsys.readouterr().err
    assert said.startswith("warning: --pretrained: most test images of imagewoof are") and said.count("\n") == 1


def test_an_archive_is_unpacked_and_its_classes_have_names(archive, no_network, tmp_path):
    options = {"data_dir": archive.parent, "image_size": 128, "cache_dir": tmp_path / "cache"}
    dataset = load_dataset("imagewoof", **options)
    assert dataset.name == "imagewoof2-160" and dataset.classes == ["Samoyed", "dingo"] and dataset.val is None
    assert len(dataset.train.labels) == len(dataset.test.labels) == 12
    assert dataset.test.names[0] == "val/n02111889/0-150x100.png"
    assert sorted(path.name for path in archive.parent.iterdir()) == ["imagewoof2-160", "imagewoof2-160.tgz"]
    archive.unlink()
    assert load_dataset("imagewoof", **options).train.hash() == dataset.train.hash()


def test_a_folder_of_the_name_is_taken_first_and_half_an_archive_never(archive, no_network):
    (archive.parent / ".imagewoof2-160.part" / "imagewoof2-160" / "train").mkdir(parents=True)  # an interrupted start
    assert find_imagenette("imagewoof", archive.parent, 64).name == "imagewoof2-160"
    (archive.parent / "imagewoof" / "train").mkdir(parents=True)
    assert find_imagenette("imagewoof", archive.parent, 64).name == "imagewoof"


@pytest.mark.parametrize(("size", "archive_size"), [(128, "-160"), (129, "-320"), (224, "-320"), (256, "")])
@pytest.mark.parametrize("name", ["imagenette", "imagewoof"])
def test_no_network_names_the_file_and_the_folder(tmp_path, no_network, name, size, archive_size):
    message = re.escape(f"{name} is not in {tmp_path} and cannot be downloaded") + ".*no route to host"
    with pytest.raises(UserError, match=rf"{message}.*{name}2{archive_size}\.tgz.*--data-dir"):
        find_imagenette(name, tmp_path, size)


def test_a_damaged_archive_is_not_unpacked(archive, no_network):
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be downloaded"):
        find_imagenette("imagewoof", archive.parent, 128)
    assert not (archive.parent / "imagewoof2-160").exists()


def test_the_table_agrees_with_torchvisions():
    for size in ("160", "320"):
        url, md5 = torchvision.datasets.Imagenette._ARCHIVES[f"{size}px"]
        assert (f"{imagenette.URL}/imagenette2-{size}.tgz", MD5_SUMS[f"imagenette2-{size}"]) == (url, md5)
    for wordnet, names in torchvision.datasets.Imagenette._WNID_TO_CLASS.items():
        assert READABLE[wordnet] == names[0]
    assert len(READABLE) == 20 and count_classes("imagewoof", "nowhere") == 10
