"""A folder of class folders to images, decoded once, on all cores."""

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

from errors import UserError, bar_disabled
from files import write_atomically

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def find_splits(root):
    """(names of the class folders, {split: folder}) of a folder that holds class folders, or train/ and other splits.

    The splits are train/, val/ and test/ if root has train/, else a single one, "all". If there is val/ but no test/,
    val/ is the test set, as with ImageNet. Raises UserError if the folder cannot be used.
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
            raise UserError(
                f"--data-dir {root}: only one of train/ and {folder.name}/ has the classes {', '.join(odd)}"
            )
    if len(names) < 2:
        found = f"one class folder ({names[0]})" if names else "no class folder"
        raise UserError(f"--data-dir {root}: it has {found}, but training needs at least two")
    return names, folders


def read_folder(root, image_size, cache_dir=None):
    """(class names, {split: (images (N, 3, S, S) uint8, labels (N,), file names)}) for the splits of find_splits.

    Images are turned upright by their EXIF tag, resized so that the short side fits, and cropped to the centre square.
    Raises UserError if the folder cannot be used or a file cannot be decoded.
    """
    names, files, splits = list_folder(root)
    paths = [path for path, _, _ in files]
    images = cached_array(root, f"{image_size}px", files, lambda: decode_images(paths, image_size), cache_dir)
    parts = torch.from_numpy(images).split([len(labels) for labels, _ in splits.values()])
    return names, {split: (part, *splits[split]) for split, part in zip(splits, parts)}


def list_folder(root):
    """(class names, files of all splits as in list_images, {split: (labels, file names)}); see find_splits."""
    class_folders, folders = find_splits(root)
    all_files, splits = [], {}
    for split, folder in folders.items():
        found = [(file, label) for label, name in enumerate(class_folders) for file in list_images(folder / name)]
        files, labels = map(list, zip(*found))
        splits[split] = labels, [Path(path).relative_to(root).as_posix() for path, _, _ in files]
        all_files += files
    return readable_names(root, class_folders), all_files, splits


def subfolders(folder):
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__"))
    )


def list_images(folder):
    """(path, size in bytes, modification time) of all images below a folder, sorted. Raises UserError without any."""
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
        raise UserError(f"{folder} contains no image ({', '.join(EXTENSIONS)})")
    return sorted(found)


def readable_names(root, class_folders):
    """Class names; from root/classes.txt if it exists. Each of its lines is a class folder and then a readable name."""
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
        raise UserError(f"{path} does not name {', '.join(missing)}: each line is a class folder and then its name")
    return [names[name] for name in class_folders]


@contextmanager
def open_image(path):
    """A PIL image, not decoded yet. Raises UserError if it cannot be opened, or decoded in the block."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be decoded as an image ({error})") from error


def upright_image(path, size):
    """A PIL image in RGB, turned by its EXIF tag. A large JPEG is decoded smaller, but no side is shorter than size."""
    with open_image(path) as image:
        image.draft("RGB", (size, size))
        return ImageOps.exif_transpose(image).convert("RGB")


def decode_image(path, size):
    """One image, (3, size, size) uint8."""
    image = upright_image(path, size)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def decode_images(paths, size, decode=decode_image):
    """decode(path, size) of each path, as one array (N, 3, size, size) uint8."""
    images = np.empty((len(paths), 3, size, size), np.uint8)
    for row, image in enumerate(by_all_cores(partial(decode, size=size), paths)):
        images[row] = image
    return images


def by_all_cores(decode, paths):
    """decode(path) of each path, in order, on all cores, with a progress bar."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield from tqdm(pool.map(decode, paths), "decoding", len(paths), disable=bar_disabled())
        finally:
            pool.shutdown(cancel_futures=True)


def default_cache_dir():
    """The operating system's folder for a user's caches."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "small-image-attention"


def cached_array(root, name, files, make, cache_dir):
    """make(), or its cached result if no path, size or modification time in `files` has changed since.

    The cache keeps one file per root and name.
    """
    listing = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    key = hashlib.sha256(f"{root.resolve()} {name}".encode()).hexdigest()[:16]
    cache = Path(cache_dir or default_cache_dir()) / f"{root.resolve().name}-{name}-{key}.npz"
    try:
        with np.load(cache) as saved:
            if saved["listing"] == listing:
                return saved["array"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # missing or damaged
    array = make()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: np.savez(file, listing=listing, array=array))
    except (OSError, UserError) as error:
        print(f"warning: no cache in {cache.parent}, so the next start decodes again: {error}", file=sys.stderr)
    return array
