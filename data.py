"""From a dataset's name to its images, classes and splits."""

import hashlib
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision

from errors import UserError
from files import is_first_rank
from pipeline.crops import images_in_memory
from pipeline.decoding import both_sides
from pipeline.folders import find_splits, printable, read_folder
from pipeline.imagenette import IMAGENETTES, READABLE, find_imagenette
from pipeline.large import CROP_PCT, LargeImages, read_large_folder

SHAPES = ("shapes", "shapes_even", "shapes_pair", "shapes_shuffled")  # drawn, with a mask of each shape
DATASETS = ("cifar10", "cifar100", *SHAPES, "folder", "webdataset", *IMAGENETTES)
SMALL = 64  # up to this --image-size, a folder's images are resized when they are decoded


class Split(NamedTuple):
    images: torch.Tensor | LargeImages  # (N, C, H, W) uint8; LargeImages in a training split if is_large
    labels: torch.Tensor  # (N,) int64
    names: np.ndarray  # (N,) file names, or indices in the published dataset

    def pick(self, indices):
        return Split(self.images[indices], self.labels[indices], self.names[indices])

    def hash(self, name="sha256"):
        """SHA-256 of labels and pixels; of LargeImages, which keep it in the cache as `name`, of labels and files."""
        digest, large = hashlib.sha256(self.labels.numpy().tobytes()), isinstance(self.images, LargeImages)

        def whole():
            for part in self.images.files[:, 0] if large else [self.images.numpy()]:
                digest.update(Path(part).read_bytes() if large else part)
            return np.frombuffer(digest.digest(), np.uint8)

        return (self.images.cached(name, whole) if large else whole()).tobytes().hex()


class Dataset(NamedTuple):
    """The training, validation (or None) and test images, their classes and their statistics."""

    name: str
    classes: list[str]
    train: Split  # or Shards, of webdataset
    val: Split | None
    test: Split
    mean: list[float]  # of the training images, one per channel, as fractions of 255
    std: list[float]
    whole_hash: str | None = None  # with --folds: of the images of all splits, the same for each fold
    extra: Split | None = None  # with --extra-data: generated images that training mixes in
    repeated: str = ""  # how many images of other splits are training images as well

    def learnt_by_heart(self, count):
        """`count` of the training images, evenly spread, which are the test images as well."""
        if count > (most := len(self.train.labels)):
            raise UserError(f"--overfit {count}: there are {most:,} training images")
        train = self.train.pick(torch.arange(count) * most // count)
        large = isinstance(train.images, LargeImages)
        test = train._replace(images=train.images.centre_crops("overfit")) if large else train
        name = f"{count} images of {self.name}, by heart"
        return self._replace(name=name, train=train, val=None, test=test, repeated="")

    def splits(self):
        """{"train", "val" if there is one, "test", "extra" if there are any: Split}."""
        return {key: split for key in ("train", "val", "test", "extra") if (split := getattr(self, key))}


def count_classes(name, data_dir):
    """The number of classes of a dataset, without reading its images."""
    if name == "folder":
        return len(find_splits(Path(data_dir))[0])
    if name == "webdataset":
        from pipeline.shards import find_shards  # only if it is asked for

        return len(find_shards(data_dir)[1])
    return 100 if name == "cifar100" else 10


def is_large(name, image_size):
    """Whether images keep their shape and are cropped to squares (see large.py), rather than resized to one size."""
    kept = name in ("webdataset", *IMAGENETTES)
    return isinstance(image_size, int) and (kept or (name == "folder" and image_size > SMALL))


@images_in_memory()
def load_dataset(
    name,
    *,
    data_dir,
    image_size,
    channels=3,
    crop_pct=CROP_PCT,
    cache_dir=None,
    dataset_name=None,
    train_per_class=None,
    **how_to_split,
):
    """The images of a dataset, resized to image_size, a number of pixels or [height, width], as a Dataset.

    how_to_split are the keyword arguments of made_splits; of what is left for training, train_per_class images of each
    class are kept. cifar10 and cifar100 may also lie in data_dir as folders, cifar100/train/CLASS/*.png. If is_large,
    the training images are LargeImages, and the others centre crops of crop_pct of the short side. Raises UserError if
    images are missing or cannot be read.
    """
    from pipeline.pixels import channel_statistics, repeated_images, resized  # only if images are loaded
    from pipeline.splits import made_splits, some_of_each_class

    folder, large = None, is_large(name, image_size)
    if name == "folder":
        folder = Path(data_dir).resolve()
    elif name in IMAGENETTES:
        folder = find_imagenette(name, data_dir, max(both_sides(image_size)))
    elif name.startswith("cifar") and Path(data_dir, name, "train").is_dir():
        folder = Path(data_dir, name)
    if folder:
        read = partial(read_large_folder, crop_pct=crop_pct) if large else read_folder
        classes, splits = read(folder, image_size, cache_dir, channels=channels)
    else:
        classes, splits = (read_shapes if name in SHAPES else read_cifar)(name, data_dir)
    if name != "folder" and len(classes) > (most := count_classes(name, data_dir)):
        raise UserError(f"{folder} has {len(classes)} class folders, but {name} has {most}: use --dataset folder")
    if name in IMAGENETTES:
        classes = [READABLE.get(label, label) for label in classes]
    name = dataset_name or (printable(folder.name) if folder else name)
    splits = {
        key: Split(p if large else resized(p, image_size), torch.as_tensor(y), np.asarray(n))
        for key, (p, y, n) in splits.items()
    }
    whole = splits["all"].hash("sha256-all") if "all" in splits and how_to_split.get("folds") else None
    splits = made_splits(splits, classes, name, **how_to_split)
    if train_per_class:
        seed = how_to_split.get("split_seed", 0), 2
        splits["train"] = some_of_each_class(splits["train"], classes, train_per_class, seed=seed)
    repeated = repeated_images(splits)
    if large:
        for key in splits.keys() - {"train"}:
            splits[key] = splits[key]._replace(images=splits[key].images.centre_crops(key))
    mean, std = channel_statistics(splits["train"].images)
    parts = (splits.get(key) for key in ("train", "val", "test"))
    return Dataset(name, classes, *parts, mean, std, whole_hash=whole, repeated=repeated)


def dataset_of(args, statistics=None):
    """load_dataset with the values of a training script's flags, the attributes of args.

    statistics are the (mean, std) by which images are normalised, if not by their own: those of pretrained weights.
    """
    if args.dataset == "webdataset":
        from pipeline.pixels import channel_statistics  # only if it is asked for
        from pipeline.shards import read_webdataset

        classes, shards, splits = read_webdataset(args)
        splits = {key: Split(*parts) for key, parts in splits.items()}
        mean, std = statistics or channel_statistics(splits["train"].images)
        return Dataset(args.dataset_name or args.dataset, classes, shards, splits.get("val"), splits["test"], mean, std)
    names = ("image_size", "channels", "crop_pct", "cache_dir", "dataset_name")
    names += ("val_fraction", "test_fraction", "split_seed", "group_by", "folds", "seed", "train_per_class")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}  # an older checkpoint lacks some
    dataset = load_dataset(args.dataset, data_dir=args.data_dir, **options)
    if getattr(args, "overfit", None):
        dataset = dataset.learnt_by_heart(args.overfit)
    if getattr(args, "extra_data", None):
        from pipeline.extra import read_extra  # only if it is asked for
        from pipeline.pixels import repeated_images

        extra = Split(*read_extra(args.extra_data, dataset.classes, dataset.train.images))
        repeated = [dataset.repeated, repeated_images({**dataset.splits(), "extra": extra}, "extra", "extra")]
        dataset = dataset._replace(extra=extra, repeated="; ".join(filter(None, repeated)))
    return dataset._replace(mean=statistics[0], std=statistics[1]) if statistics else dataset


def read_shapes(name, data_dir):
    from pipeline.shapes import CLASSES, make_shapes  # only if this dataset is asked for

    sets = {split: make_shapes(split, name) for split in ("train", "val", "test")}
    return CLASSES, {split: (s.images, s.labels, np.arange(len(s.labels))) for split, s in sets.items()}


def read_cifar(name, data_dir):
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    splits = {}
    for split in ("train", "test"):
        try:
            try:
                found = dataset(data_dir, train=split == "train")
            except RuntimeError:  # missing, or its checksums are wrong
                found = dataset(data_dir, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            advice = f"put {dataset.filename} there, or set --data-dir"
            raise UserError(f"{name} is not in {data_dir} and cannot be downloaded ({error}): {advice}") from error
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        splits[split] = (images, found.targets, np.arange(len(images)))
    return found.classes, splits


def describe(dataset):
    """One line per split: how many images it has, and how many of each class; a warning of repeated ones on stderr."""
    if dataset.repeated and is_first_rank():
        print(f"warning: {dataset.repeated}", file=sys.stderr)
    lines = []
    for key, split in dataset.splits().items():
        if split.images is None:
            lines.append(f"{key:6}{len(split.labels):7,} images per epoch, of {len(split.urls):,} shards")
            continue
        counts = split.labels.bincount(minlength=len(dataset.classes)).tolist()
        if len(set(counts)) == 1:
            each = f"{counts[0]:,} of each of {len(counts)} classes"
        else:
            each = ", ".join(f"{name} {count:,}" for name, count in zip(dataset.classes, counts))
        lines.append(f"{key:6}{len(split.labels):7,} images: {each}")
    return "\n".join(lines)
