import re
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_images

from data import Split, count_classes, dataset_of, describe, load_dataset
from errors import UserError
from maps.evaluate import against_masks
from maps.images import object_masks
from pipeline.splits import split_by_class


def test_arguments_of_an_older_checkpoint_take_the_defaults(tmp_path):
    write_images(tmp_path, classes=("ant", "bee"), count=10)
    args = Namespace(dataset="folder", data_dir=tmp_path, image_size=8, cache_dir=tmp_path / "cache")
    dataset = dataset_of(args, ([0.1] * 3, [0.2] * 3))
    assert len(dataset.test.labels) == 4 and dataset.mean == [0.1] * 3 and dataset.std == [0.2] * 3


def numbered_split(count=50, classes=5):
    """Images whose pixels all hold their own index."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return Split(images.contiguous(), torch.arange(count) % classes, np.arange(count))


def indices_of(images):
    return images[:, 0, 0, 0].round().int().tolist()


def test_cifar10_as_published(cifar10_dir):
    dataset = load_dataset("cifar10", data_dir=cifar10_dir, image_size=32)
    assert len(dataset.train.labels) == 50_000 and len(dataset.test.labels) == 10_000 and dataset.val is None
    assert dataset.classes[3] == "cat" and dataset.train.labels.bincount().tolist() == [5000] * 10
    assert dataset.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert dataset.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)  # and not 0.2023, 0.1994, 0.2010
    reference = torchvision.datasets.CIFAR10(cifar10_dir, train=False)
    pixels = np.asarray(reference[7][0]).transpose(2, 0, 1)
    assert np.array_equal(dataset.test.images[7].numpy(), pixels) and dataset.test.labels[7] == reference[7][1]
    assert "train  50,000 images: 5,000 of each of 10 classes" in describe(dataset)
    assert count_classes("cifar10", cifar10_dir) == len(dataset.classes)


def test_cifar100_is_read_as_torchvision_has_it(tmp_path, monkeypatch):
    """The official files are not at hand: torchvision's class is replaced by one that holds a few images."""

    class FewImages:
        def __init__(self, root, train):
            self.data = np.full((4 if train else 2, 32, 32, 3), [10, 20, 30], np.uint8)
            self.targets = [0, 1] * (2 if train else 1)
            self.classes = ["apple", "bear"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FewImages)
    dataset = load_dataset("cifar100", data_dir=tmp_path, image_size=32)
    assert dataset.train.images[0, :, 5, 5].tolist() == [10, 20, 30] and dataset.train.labels.tolist() == [0, 1, 0, 1]


def test_no_network_names_the_file_and_the_folder(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", no_network)
    message = re.escape(f"cifar10 is not in {tmp_path} and cannot be downloaded")
    with pytest.raises(UserError, match=message + ".*no route to host.*cifar-10-python.tar.gz.*--data-dir"):
        load_dataset("cifar10", data_dir=tmp_path, image_size=32)


def test_cifar_may_lie_there_as_folders(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "cifar100" / split, count=3, size=(32, 32))
    dataset = load_dataset("cifar100", data_dir=str(tmp_path), image_size=32, cache_dir=tmp_path / "cache")
    assert dataset.name == "cifar100" and dataset.classes == ["cat", "dog"]
    assert dataset.train.images.shape == (6, 3, 32, 32) and len(dataset.test.labels) == 6


@pytest.mark.parametrize("name", ["shapes", "shapes_pair"])
def test_shapes_and_resizing(name):
    dataset = load_dataset(name, data_dir=None, image_size=16)
    masks = object_masks({"args": {"dataset": name}}, dataset, torch.arange(3))
    assert {*masks} == {"masks", "outlines", *(["others"] if name == "shapes_pair" else [])}
    assert all(mask.shape == (3, 16, 16) and mask.any() for mask in masks.values())
    score = against_masks(masks["masks"].float(), **masks)
    assert score["pointing"].tolist() == [1] * 3 and sum(score.get("pointing_other", torch.zeros(3))) == 0
    assert dataset.train.images.shape == (20_000, 3, 16, 16) and len(dataset.val.labels) == 2000
    expected = dataset.train.images.double().div(255)
    assert dataset.mean == pytest.approx(expected.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert dataset.std == pytest.approx(expected.transpose(0, 1).flatten(1).std(1, correction=0).tolist(), abs=1e-9)


def test_split_by_class_takes_the_same_share_of_every_class_and_depends_on_its_seed_alone():
    split = numbered_split()
    names = list("abcde")
    first, rest = split_by_class(split, 0.2, names, seed=(0, 1), flag="--val-fraction")
    assert first.labels.bincount().tolist() == [2] * 5 and rest.labels.bincount().tolist() == [8] * 5
    assert sorted([*first.names, *rest.names]) == list(range(50))
    assert indices_of(first.images) == first.names.tolist()
    again, _ = split_by_class(split, 0.2, names, seed=(0, 1), flag="--val-fraction")
    other, _ = split_by_class(split, 0.2, names, seed=(1, 1), flag="--val-fraction")
    assert again.names.tolist() == first.names.tolist() != other.names.tolist()
    with pytest.raises(UserError, match="--val-fraction 0.97 leaves no training image of class a, which has 10"):
        split_by_class(split, 0.97, names, seed=(0, 1), flag="--val-fraction")


def test_classes_that_the_model_has_no_place_for_are_refused(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path / "imagewoof" / split, classes=[f"n{number:02}" for number in range(11)], count=1)
    with pytest.raises(UserError, match="imagewoof has 11 class folders, but imagewoof has 10: use --dataset folder"):
        load_dataset("imagewoof", data_dir=tmp_path, image_size=32, cache_dir=tmp_path / "cache")


def test_a_test_fraction_without_effect_is_said(tmp_path, capsys):
    for split in ("train", "test"):
        write_images(tmp_path / "pets" / split, count=3)
    options = {"data_dir": tmp_path / "pets", "image_size": 8, "cache_dir": tmp_path / "cache"}
    load_dataset("folder", **options)
    assert not capsys.readouterr().err
    load_dataset("folder", **options, test_fraction=0.3)
    assert capsys.readouterr().err == "warning: --test-fraction 0.3: pets has test images of its own\n"


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 9 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_images_that_do_not_fit_into_memory_are_one_line(tmp_path, monkeypatch, error):
    def no_room(*args, **options):
        raise error

    monkeypatch.setattr("pipeline.folders.decode_images", no_room)
    with pytest.raises(UserError, match="the images do not fit into memory: use a smaller --image-size"):
        load_dataset("folder", data_dir=write_images(tmp_path / "pets"), image_size=8, cache_dir=tmp_path / "cache")
