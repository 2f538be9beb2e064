"""A folder of class folders to images, decoded once, on all cores."""

import hashlib
import json
import os
import re
import stat
import sys
from collections import defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from errors import UserError, regular_file
from files import write_atomically
from pipeline.decoding import decode_images

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
# what their folders may be called, in any case
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
RUN_FILES = ("last.pt", "last.prev.pt")  # what training leaves in the folder of a run
DECODING = 2  # part of a cache's key: raise it when a file gives other pixels than before
GREY = {1: "-grey", 3: ""}  # {channels: end of the names of caches}


def find_splits(root):
    """(names of the class folders, {split: folder}) of a folder that holds class folders, or train/ and other splits.

    The splits are train, val and test if root has folders named so (see SPLITS), else a single one, "all". If there is
    val/ but no test/, val/ is the test set, as with ImageNet. Raises UserError if the folder cannot be used.
    """
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder")
    check_unclear_splits(root)
    found = [(split, name) for name in subfolders(root) for split in SPLITS if name.lower() in SPLITS[split]]
    named = " and ".join(f"{name}/" for _, name in found)
    folders = {split: root / name for split, name in found}
    folders = {split: folders[split] for split in SPLITS if split in folders} or {"all": root}
    classes = {split: subfolders(folder) for split, folder in folders.items()}
    first, names = next(iter(classes.items()))
    if len(folders) < len(found):
        raise UserError(f"--data-dir {root}: {named}: two of them are the same split; join them")
    if first in ("val", "test"):
        raise UserError(f"--data-dir {root}: it has {named}, but no train/ (if that is a class, rename it)")
    if first == "train" and not names:
        raise UserError(
            f"--data-dir {root}: {folders[first].name}/ has no class folders, as in train/cat/1.jpg"
            " (if it is a class itself, rename it)"
        )
    if first == "train" and len(folders) == 1:
        raise UserError(f"--data-dir {root}: it has {named}, but no test/ or val/ beside it")
    for split, others in classes.items():
        if odd := sorted(set(names) ^ set(others)):
            pair = f"{folders[first].name}/ and {folders[split].name}/"
            raise UserError(f"--data-dir {root}: only one of {pair} has the classes {', '.join(odd)}")
    if len(names) < 2:
        found = f"one class folder ({names[0]})" if names else "no class folder"
        raise UserError(f"--data-dir {root}: it has {found}, but training needs at least two")
    if "val" in folders and "test" not in folders:
        folders["test"] = folders.pop("val")
    return names, folders


def check_unclear_splits(root):
    """Raises UserError for folders such as seg_train/ and seg_test/, which are splits or classes."""
    meant = {}  # {folder: the split that a word of its name says}
    for name in subfolders(root):
        for split in SPLITS:
            if {*re.split(r"[\W_\d]+", name.lower())} & {*SPLITS[split]}:
                meant[name] = split
    unclear = [name for name, split in meant.items() if name.lower() not in SPLITS[split]]
    if unclear and len(set(meant.values())) > 1:
        names = " and ".join(f"{name}/" for name in meant)
        raise UserError(f"--data-dir {root}: {names} look like splits: name them train/ and test/, with class folders")


def read_folder(root, image_size, cache_dir=None, *, channels=3):
    """(class names, {split: (images (N, C, H, W) uint8, labels (N,), file names)}) for the splits of find_splits.

    Images are turned upright by their EXIF tag, resized so that one side fits, and cropped to the centre. image_size is
    a number of pixels or [height, width]. Raises UserError if the folder cannot be used or a file cannot be decoded.
    """
    names, files, splits = list_folder(root)
    paths = [path for path, _, _ in files]
    name = (f"{image_size}px" if isinstance(image_size, int) else "{}x{}px".format(*image_size)) + GREY[channels]
    decode = partial(decode_images, paths, image_size, channels=channels)
    images = cached_array(root, name, files, decode, cache_dir)
    parts = torch.from_numpy(images).split([len(labels) for labels, _ in splits.values()])
    return names, {split: (part, *splits[split]) for split, part in zip(splits, parts)}


def list_folder(root):
    """(class names, files of all splits as in list_images, {split: (labels, file names)}); see find_splits.

    A warning on stderr counts what is not read.
    """
    class_folders, folders = find_splits(root)
    if "test" in folders and (name := folders["test"].name).lower() in SPLITS["val"]:
        print(f"{printable(root.name)} has no test/: {name}/ is the test set")
    all_files, splits, skipped = [], {}, defaultdict(list)
    for split, folder in folders.items():
        found = [(file, y) for y, name in enumerate(class_folders) for file in list_images(folder / name, skipped)]
        files, labels = map(list, zip(*found))
        splits[split] = labels, [printable(Path(path).relative_to(root).as_posix()) for path, _, _ in files]
        all_files += files
    if skipped:
        print(f"warning: not read in {root}: {summary_of(skipped)}", file=sys.stderr)
    return readable_names(root, class_folders), all_files, splits


def printable(name):
    """A file's name as text; bytes that are not UTF-8 as in \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def subfolders(folder):
    """The names of the folders in a folder, sorted, without hidden ones, runs, and folders of runs."""
    try:
        found = [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__"))]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error
    return sorted(entry.name for entry in found if entry.name != "checkpoints" and not holds_runs(entry))


def holds_runs(folder, depth=2):
    with suppress(OSError):  # list_images names a folder that cannot be read
        for entry in os.scandir(folder):
            below = depth and entry.is_dir(follow_symlinks=False)
            if entry.name in RUN_FILES or (below and holds_runs(entry, depth - 1)):
                return True
    return False


def list_images(folder, skipped, *, of_class=True):
    """(path, size in bytes, modification time and inode) of all images below a folder, sorted.

    Appends the paths of what is not read to the lists in skipped, {kind: paths}. Raises UserError without any image,
    and if there are splits below the folder of a class.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=lambda error: skipped["unreadable"].append(error.filename)):
        if of_class and folders and all(name.lower() in sum(SPLITS.values(), ()) for name in folders):
            raise UserError(f"{parent} holds splits ({', '.join(folders)}): they belong above classes: train/cat/1.jpg")
        if links := [path for name in folders if os.path.islink(path := os.path.join(parent, name))]:
            skipped["linked"] += links
        for path in (os.path.join(parent, name) for name in names if not name.startswith(".")):
            ending = os.path.splitext(path)[1].lower()
            if ending not in EXTENSIONS:
                skipped[ending or "without ending"].append(path)
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror})") from error
            if stat.S_ISREG(status.st_mode):
                found.append((path, status.st_size, f"{status.st_mtime_ns}-{status.st_ino}"))
            else:
                skipped["no regular file"].append(path)
    if not found:
        unread = f"; not read: {summary_of(skipped)}" if skipped else ""
        raise UserError(f"{folder} contains no image ({', '.join(EXTENSIONS)}){unread}")
    return sorted(found)


def summary_of(skipped):
    """How many of each kind, with one as an example."""
    return "; ".join(f"{len(paths):,} {kind}, {paths[0]}" for kind, paths in sorted(skipped.items()))


def readable_names(root, class_folders):
    """Class names; from root/classes.txt if it exists. Each of its lines is a class folder and then a readable name."""
    path = root / "classes.txt"
    if not path.exists():
        return [*map(printable, class_folders)]
    try:
        text = regular_file(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    names = {}
    for line in map(str.strip, text.splitlines()):
        ends = [match.start() for match in re.finditer(r"\s|$", line)]  # a folder's name may hold spaces
        folder = max((line[:end] for end in ends if line[:end] in class_folders), key=len, default=None)
        name = line[len(folder or "") :].strip() or folder
        if folder in names or (folder and name in names.values()):
            raise UserError(f"{path} has {folder} or {name} twice: each class needs one line and a name of its own")
        if folder:
            names[folder] = name
    if missing := [name for name in class_folders if name not in names]:
        raise UserError(f"{path} does not name {', '.join(missing)}: each line is a class folder and then its name")
    return [names[name] for name in class_folders]


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
    """make(), or its cached result if nothing in `files` (see list_images) has changed since.

    The cache keeps one file per root and name.
    """
    listing = hashlib.sha256(json.dumps([DECODING, files]).encode()).hexdigest()
    key = hashlib.sha256(os.fsencode(f"{root.resolve()} {name}")).hexdigest()[:16]
    cache = Path(cache_dir or default_cache_dir()) / f"{root.resolve().name}-{name}-{key}.npz"
    try:
        with np.load(cache) as saved:
            if saved["listing"] == listing:
                return saved["array"]
    except Exception:
        pass  # missing or damaged; what that raises is open-ended
    array = make()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: np.savez(file, listing=listing, array=array))
    except (OSError, UserError) as error:
        print(f"warning: no cache in {cache.parent}, so the next start decodes again: {error}", file=sys.stderr)
    return array
