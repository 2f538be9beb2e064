"""More images than a disk holds: training images in tar files of webdataset (shards), read in random order."""

import hashlib
import io
import os
import random
import re
from functools import partial
from itertools import islice
from urllib.parse import urlparse

import numpy as np
import torch
from torch import distributed

from errors import UserError, import_optional, regular_file
from pipeline.batches import RATIO
from pipeline.crops import Crops
from pipeline.decoding import decode_images
from pipeline.folders import EXTENSIONS, SPLITS
from pipeline.large import LargeImages, centre_crop, upright_size
from seeding import seed_for

WINDOW = 8000  # files in memory, of all workers, among which the next image is drawn
FIRST = 2000  # training images from which mean and standard deviation are computed


class Member(io.BytesIO):
    """A file in a shard; as text, its name."""

    def __str__(self):
        return self.name


def find_shards(pattern):
    """({split: shards}, class names) of --data-dir, say a/train-{000..099}.tar::a/test.tar: the names say the split.

    classes.txt beside the first shard has a line for class 0, for class 1 ... Raises UserError for a missing split or
    file, and for the commands (pipe:) that webdataset would run: they may come out of someone else's checkpoint.
    """
    wds = import_optional("webdataset")
    urls = wds.shardlists.expand_urls(pattern)
    if others := [url for url in urls if urlparse(url).scheme not in ("", "http", "https")]:
        raise UserError(f"--data-dir {others[0]}: shards are files, or addresses that begin with http: or https:")
    words = {url: {*re.split(r"[\W_\d]+", os.path.basename(url).lower())} for url in urls}
    splits = {split: [url for url in urls if words[url] & {*names}] for split, names in SPLITS.items()}
    if missing := [split for split in ("train", "test") if not splits[split]]:
        raise UserError(
            f"--data-dir {pattern}: no file with {missing[0]} in its name, as in {missing[0]}-{{000..099}}.tar"
        )
    path = f"{os.path.dirname(urls[0]) or '.'}/classes.txt"
    try:
        file = wds.gopen(path if urlparse(path).scheme else regular_file(path))
        return splits, file.read().decode().strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): a line for the name of class 0, of class 1 ...") from error


def read_shards(urls, classes):
    """(image as a Member, label) of each sample. Raises UserError if a shard or a sample cannot be used."""
    wds, sample = import_optional("webdataset"), None
    try:
        for url in (url for url in urls if not urlparse(url).scheme):
            regular_file(url)
        for sample in wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples()):
            name, label = f"{os.path.basename(sample['__url__'])}/{sample['__key__']}", sample.get("cls", b"").strip()
            ending = next((ending for ending in EXTENSIONS if ending[1:] in sample), None)
            if not ending or not label.isdigit() or int(label) >= len(classes):
                raise UserError(f"{name} must have an image, as .jpg, and a number below {len(classes)} as .cls")
            member = Member(sample[ending[1:]])
            member.name = name + ending
            yield member, int(label)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a damaged file raises is open-ended
        raise UserError(f"--data-dir: a shard cannot be read ({str(error) or type(error).__name__})") from error
    if not sample:
        raise UserError(f"--data-dir: {urls[0]} holds no images")


class Shards(Crops):
    """Training images in shards, in the place of a Split: their labels are known when they are read.

    Each of R ranks cuts batches of B / R images, and each of its W workers every W-th of them, from every R x W-th
    shard. The order follows from (seed, epoch), R and W. Shards that are too few for an epoch are read again.
    """

    def __init__(self, urls, classes, args):
        self.urls, self.classes, self.args, self.next_place = urls, classes, args, None
        self.images, self.labels = None, torch.full((args.epoch_images,), -1)
        spread = distributed.is_available() and distributed.is_initialized()
        self.rank, self.ranks = (distributed.get_rank(), distributed.get_world_size()) if spread else (0, 1)
        if len(urls) < self.ranks:
            raise UserError(f"--data-dir {args.data_dir}: {len(urls)} shards are too few for {self.ranks} processes")
        if args.workers is None:
            args.workers = min(os.cpu_count(), 16)  # kept in the checkpoint: a resumed run has as many
        self.workers = min(args.workers, len(urls) // self.ranks)

    def hash(self):
        """SHA-256 of the names of the shards: nobody reads them all for it."""
        return hashlib.sha256("\n".join(map(os.path.basename, self.urls)).encode()).hexdigest()

    def samples(self, epoch, worker, workers):
        """The (Member, label) of a worker, without end: shards in random order, then shuffled within the window."""
        shuffle = import_optional("webdataset").shuffle
        rng = random.Random(seed_for("order", self.args.seed, epoch))
        urls = rng.sample(self.urls, len(self.urls))[self.rank + self.ranks * worker :: self.ranks * workers]
        while True:
            yield from shuffle(WINDOW // workers, rng=rng)(read_shards(urls, self.classes))

    def cut(self, indices, epoch, step):
        """(images (B, C, S, S) uint8, labels (B,)) of one step; `indices` only says how many there are."""
        args, workers = self.args, max(1, self.workers)
        if self.next_place != (epoch, step):  # the first step here; what came before it is read, but not decoded
            before = step // workers * (args.batch_size // self.ranks)
            self.left = islice(self.samples(epoch, step % workers, workers), before, None)
        self.next_place = epoch, step + workers
        members, labels = zip(*islice(self.left, max(1, len(indices) // self.ranks)))
        sizes, files = torch.tensor([upright_size(member) for member in members]), np.array(members)[:, None]
        images = LargeImages(None, files, sizes, args.image_size, args.crop_pct, None, args.channels)
        crops = Crops(images, scale=args.scale, ratio=args.ratio or RATIO, seed=args.seed)
        return crops.cut(np.arange(len(members)), epoch, step * self.ranks + self.rank), torch.tensor(labels)


def read_webdataset(args):
    """(class names, Shards, {split: (images, labels, names)}), in which the training images are the FIRST ones."""
    urls, classes = find_shards(args.data_dir)
    crop = partial(centre_crop, crop_pct=args.crop_pct)
    splits = {}
    for split, count in {"test": None, "val": None, "train": FIRST}.items():
        if urls[split]:
            members, labels = zip(*islice(read_shards(urls[split], classes), count))
            images = torch.from_numpy(decode_images(members, args.image_size, crop, channels=args.channels))
            splits[split] = images, torch.tensor(labels), np.array([*map(str, members)])
    return classes, Shards(urls["train"], classes, args), splits
