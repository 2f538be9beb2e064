"""A folder of class folders to images, decoded by all cores, once."""

import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from errors import UserError
from files import write_atomically

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def find_splits(root):
    """(names of the class folders, {split: folder}) of a folder of class folders, or of one with train/ and others.

    The splits are train/, val/ and test/ where root has train/, else the single one "all". A val/ without a test/ is
    the test set, as with ImageNet and its children. Raises UserError for a folder that cannot be used.
    """
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder")
    folders = {"all": root}
    if (root / "train").is_dir() and subfolders(root / "train"):
        folders = {split: root / split for split in ("train", "val", "test") if (root / split).is_dir()}
        if "test" not in folders:
            if "val" not in folders:
                raise UserError(f"--data-dir {root}: it has train/, but no test/ or val/ beside it")
            folders["test"] = folders.pop("val")
    names = subfolders(next(iter(folders.values())))
    for folder in folders.values():
        if odd := sorted(set(names) ^ set(subfolders(folder))):
            raise UserError(f"--data-dir {root}: the classes of train/ and {folder.name}/ differ by {', '.join(odd)}")
    if len(names) < 2:
        found = f"one class folder ({names[0]})" if names else "no class folder"
        raise UserError(f"--data-dir {root}: it has {found}, and needs two at least")
    return names, folders


def read_folder(root, image_size, cache_dir=None):
    """(class names, {split: (images (N, 3, S, S) uint8, labels (N,), file names)}), split as find_splits says.

    Images are turned upright by their EXIF tag, scaled until the short side fits, and cut to the centre square.
    Raises UserError for a folder that cannot be used and a file that cannot be decoded.
    """
    names, splits = list_folder(root)
    files = [file for files, _, _ in splits.values() for file in files]
    paths = [path for path, _, _ in files]
    images = cached_array(root, f"{image_size}px", files, lambda: decode_images(paths, image_size), cache_dir)
    parts = torch.from_numpy(images).split([len(files) for files, _, _ in splits.values()])
    return names, {split: (part, *rest) for part, (split, (_, *rest)) in zip(parts, splits.items())}


def list_folder(root):
    """(class names, {split: (files as images_in has them, labels, file names)}), split as find_splits says."""
    class_folders, folders = find_splits(root)
    splits = {}
    for split, folder in folders.items():
        found = [(file, label) for label, name in enumerate(class_folders) for file in images_in(folder / name)]
        files, labels = map(list, zip(*found))
        splits[split] = files, labels, [Path(path).relative_to(root).as_posix() for path, _, _ in files]
    return readable_names(root, class_folders), splits


def subfolders(folder):
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__"))
    )


def images_in(folder):
    """(path, size, time of change) of every image below a folder, sorted. Raises UserError where there is none."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                path = os.path.join(parent, name)
                try:
                    status = os.stat(path)
                except OSError as error:
                    raise UserError(f"{path} cannot be read ({error.strerror})") from error
                found.append((path, status.st_size, status.st_mtime_ns))
    if not found:
        raise UserError(f"{folder} holds no image ({', '.join(EXTENSIONS)})")
    return sorted(found)


def readable_names(root, class_folders):
    """Class names, from classes.txt in root where there is one: a line a class, its folder and then a readable name."""
    path = root / "classes.txt"
    if not path.exists():
        return class_folders
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    names = {line[0]: line[-1].strip() for line in lines}
    if missing := [name for name in class_folders if name not in names]:
        raise UserError(
            f"{path} does not name {', '.join(missing)}: it has a line a class, the folder and then its name"
        )
    return [names[name] for name in class_folders]


@contextmanager
def opened(path):
    """An image's file as PIL has it, not decoded yet. Raises UserError where it cannot be, here or in the block."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be decoded as an image ({error})") from error


def upright_image(path, size):
    """An image as PIL has it, turned by its EXIF tag, in RGB; a large JPEG smaller, but no side shorter than size."""
    with opened(path) as image:
        image.draft("RGB", (size, size))
        return ImageOps.exif_transpose(image).convert("RGB")


def decode_image(path, size):
    """One image as (3, size, size) uint8."""
    image = upright_image(path, size)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def decode_images(paths, size, decode=decode_image):
    """decode(path, size) of each of the paths, (N, 3, size, size) uint8."""
    images = np.empty((len(paths), 3, size, size), np.uint8)
    for row, image in enumerate(by_all_cores(partial(decode, size=size), paths)):
        images[row] = image
    return images


def by_all_cores(decode, paths):
    """decode(path) of each of the paths, in order, behind a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            quiet = None if "ipykernel" not in sys.modules else False  # None: no bar where stderr is no terminal
            yield from tqdm(pool.map(decode, paths), "decoding", len(paths), disable=quiet)
        finally:
            pool.shutdown(cancel_futures=True)


def default_cache_dir():
    """The user's cache folder, as the operating system has it."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "small-image-attention"


def cached_array(root, what, files, make, cache_dir):
    """make(), or what it gave before: from the cache while no path, size or time of change of `files` differs.

    The cache of root has one file for each name `what`.
    """
    listing = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    key = hashlib.sha256(f"{root.resolve()} {what}".encode()).hexdigest()[:16]
    cache = Path(cache_dir or default_cache_dir()) / f"{root.resolve().name}-{what}-{key}.npz"
    try:
        with np.load(cache) as saved:
            if saved["listing"] == listing:
                return saved["array"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # there is none, or it is damaged: make it anew
    array = make()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: np.savez(file, listing=listing, array=array))
    except (OSError, UserError) as error:
        print(f"warning: {cache.parent} keeps no cache, so that the next start decodes again: {error}", file=sys.stderr)
    return array
