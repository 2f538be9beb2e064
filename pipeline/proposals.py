"""What a folder of photographs proposes for flags that are not given."""

import os
import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from errors import UserError
from pipeline.folders import EXTENSIONS, SPLITS, find_splits, list_images, subfolders
from pipeline.large import upright_size

SEEN = 100  # images whose size is looked at
PARENT = re.compile(r"cifar-?100?(-|$)|image(nette|woof)")  # a folder of such folders is datasets/, not photographs


def holds_images(folder):
    with suppress(OSError):  # read_folder names a folder that cannot be read
        return any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(folder))
    return False


def implied_dataset(given):
    """--dataset; without it "folder" if --data-dir holds class folders of images, else None: the recipe says.

    given has the flags on the command line, {name: value}. Raises UserError for a --data-dir that does not exist,
    unless --dataset says what to download to it.
    """
    root = Path(given.get("data_dir") or "")
    if "dataset" in given or not given.get("data_dir") or given.get("resume", "auto") != "auto":
        return given.get("dataset")
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder; to download images to it, add --dataset cifar10")
    names = subfolders(root)
    if any(PARENT.match(name) for name in names):
        return None
    folders = [root, *(root / name for name in names if name.lower() in SPLITS["train"])]
    found = (folder / name for folder in folders for name in subfolders(folder))
    return "folder" if any(map(holds_images, found)) else None


def proposals_of_images(given):
    """{flag: value} that suits the images in --data-dir: image_size, if it is not given, and what goes with it.

    Images are validated on if the folder has none for that. Prints a line with the proposed size. Raises UserError if
    the folder cannot be used.
    """
    if given.get("dataset", "folder") != "folder" or not given.get("data_dir"):
        return {}
    names, folders = find_splits(Path(given["data_dir"]))
    proposed = {"val_fraction": 0.0} if "val" in folders else {}
    size = given.get("image_size")
    if size is None:
        first = next(iter(folders.values()))
        files = [path for name in names for path, *_ in list_images(first / name, defaultdict(list))]
        height, width = np.median([upright_size(path) for path in files[:: -(-len(files) // SEEN)]], 0)
        short = min(height, width)
        size = proposed["image_size"] = 32 if short <= 48 else 64 if short <= 128 else 96
        faster = ", or a smaller one, which is faster" if size > 32 else ""
        print(f"your images are about {width:.0f} x {height:.0f} pixels: --image-size {size}{faster}")
    if isinstance(size, int) and size > 64:  # another crop in every epoch, as in train_resnet_attn.py's woof
        proposed |= {"scale": [0.35, 1.0], "crop_padding": 0}
    return proposed
