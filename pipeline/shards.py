"""More images than a disk holds: training images in tar files of webdataset (shards), read in random order."""

import hashlib
import io
import os
import random
import re
import tarfile
from functools import partial
from itertools import islice
from urllib.parse import urlparse

import numpy as np
import torch
from torch import distributed

from errors import UserError, import_optional
from pipeline.batches import RATIO
from pipeline.crops import Crops, batches_by_workers
from pipeline.decoding import decode_images
from pipeline.folders import EXTENSIONS, SPLITS
from pipeline.large import LargeImages, centre_crop, upright_size
from seeding import seed_for

LANES = 16  # how many shards are read side by side; the order of the images follows from it, not from --workers
WINDOW = 8000  # files in memory, of all lanes, among which the next image is drawn
SEEN_OF_SHARD = 2000  # images of the first shard from which mean and standard deviation are computed


class Member(io.BytesIO):
    """A file in a shard; as text, its name."""

    def __str__(self):
        return self.name


def file_name(url):
    return re.split(r"[/\\]", url)[-1]


def find_shards(pattern):
    """({split: shards}, class names) of --data-dir, say a/train-{000..099}.tar::a/test.tar: the names say the split.

    classes.txt beside the first shard has a line for class 0, for class 1 ... Raises UserError for a missing split or
    file, and for the commands (pipe:) that webdataset would run: they may come out of someone else's checkpoint.
    """
    wds = import_optional("webdataset")
    urls = wds.shardlists.expand_urls(pattern)
    if others := [url for url in urls if urlparse(url).scheme not in ("", "http", "https")]:
        raise UserError(f"--data-dir {others[0]}: shards are files, or addresses that begin with http: or https:")
    words = {url: {*re.split(r"[\W_\d]+", file_name(url).lower())} for url in urls}
    splits = {split: [url for url in urls if words[url] & {*names}] for split, names in SPLITS.items()}
    if missing := [split for split in ("train", "test") if not splits[split]]:
        example = "shards/train-{000..099}.tar::shards/test-{0..9}.tar"
        raise UserError(f"--data-dir {pattern}: no file with {missing[0]} in its name, as in {example}")
    path = urls[0].removesuffix(file_name(urls[0])) + "classes.txt"
    try:
        return splits, wds.gopen(path).read().decode().strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): a line for the name of class 0, of class 1 ...") from error


def read_shards(urls, classes):
    """(image as a Member, label) of each sample. Raises UserError if a shard or a sample cannot be used."""
    wds, sample = import_optional("webdataset"), None
    try:
        for sample in wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples()):
            name, label = f"{file_name(sample['__url__'])}/{sample['__key__']}", sample.get("cls", b"").strip()
            endings = [ending for ending in EXTENSIONS if ending[1:] in sample]
            if not endings or not label.isdigit() or int(label) >= len(classes):
                raise UserError(f"{name} must have an image, as .jpg, and a number below {len(classes)} as .cls")
            member = Member(sample[endings[0][1:]])
            member.name = name + endings[0]
            yield member, int(label)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"--data-dir: a shard cannot be read ({error})") from error
    if not sample:
        raise UserError(f"--data-dir: {urls[0]} holds no images")


class Shards(Crops):
    """Training images in shards, in the place of a Split: their labels are known when they are read.

    Of R ranks, each reads every R-th shard, and B / R images per step. An epoch has --epoch-images of them, in an order
    that follows from (seed, epoch) and R; shards that are too few for that are read again.
    """

    def __init__(self, urls, classes, args):
        self.urls, self.classes, self.args, self.open = urls, classes, args, {}
        self.images, self.labels = None, torch.full((args.epoch_images,), -1)
        spread = distributed.is_available() and distributed.is_initialized()
        self.rank, self.ranks = (distributed.get_rank(), distributed.get_world_size()) if spread else (0, 1)
        if len(urls) < self.ranks:
            raise UserError(f"--data-dir {args.data_dir}: {len(urls)} shards are too few for {self.ranks} processes")
        self.lanes = 1 << min(LANES, len(urls) // self.ranks).bit_length() - 1  # a power of two

    def hash(self):
        """SHA-256 of the names of the shards: nobody reads them all for it."""
        return hashlib.sha256("\n".join(map(file_name, self.urls)).encode()).hexdigest()

    def samples(self, epoch, lane):
        """The (Member, label) of a lane, without end: shards in random order, then shuffled within the window."""
        shuffle = import_optional("webdataset").shuffle
        rng = random.Random(seed_for("order", self.args.seed, epoch))
        urls = rng.sample(self.urls, len(self.urls))[self.rank + self.ranks * lane :: self.ranks * self.lanes]
        while True:
            yield from shuffle(WINDOW // self.lanes, rng=rng)(read_shards(urls, self.classes))

    def cut(self, indices, epoch, step):
        """(images (B, C, S, S) uint8, labels (B,)) of one step; `indices` only says how many there are."""
        args, lane = self.args, step % self.lanes
        at, samples = self.open.get(lane, (None, None))
        if at != (epoch, step):  # the lane's first step here; what came before it is read, but not decoded
            before = step // self.lanes * (args.batch_size // self.ranks)
            samples = islice(self.samples(epoch, lane), before, None)
        members, labels = zip(*islice(samples, max(1, len(indices) // self.ranks)))
        self.open[lane] = (epoch, step + self.lanes), samples
        sizes, files = torch.tensor([upright_size(member) for member in members]), np.array(members)[:, None]
        images = LargeImages(None, files, sizes, args.image_size, args.crop_pct, None, args.channels)
        crops = Crops(images, scale=args.scale, ratio=args.ratio or RATIO, seed=args.seed)
        return crops.cut(np.arange(len(members)), epoch, step * self.ranks + self.rank), torch.tensor(labels)

    def by_workers(self, device):
        """The same in worker processes: a function from keys, as that of crop_batches."""
        workers = min(os.cpu_count(), LANES) if self.args.workers is None else self.args.workers
        return batches_by_workers(self, device, 1 << workers.bit_length() >> 1)  # a power of two: a lane has one worker


def read_webdataset(args):
    """(class names, Shards, {"test" and "val": (images, labels, names)}, (N, C, S, S) uint8 of the first shard)."""
    urls, classes = find_shards(args.data_dir)
    crop = partial(centre_crop, crop_pct=args.crop_pct)
    decode = partial(decode_images, size=args.image_size, decode=crop, channels=args.channels)
    splits = {}
    for split in [split for split in ("test", "val") if urls[split]]:
        images, labels, names = [], [], []
        for url in urls[split]:  # one after the other: what is not decoded yet is small
            members, some = zip(*read_shards([url], classes))
            images.append(torch.from_numpy(decode(members)))
            labels, names = labels + [*some], names + [*map(str, members)]
        splits[split] = torch.cat(images), labels, names
    first = [member for member, _ in islice(read_shards(urls["train"][:1], classes), SEEN_OF_SHARD)]
    return classes, Shards(urls["train"], classes, args), splits, torch.from_numpy(decode(first))
