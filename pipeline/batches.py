"""Batches of images on the device: their order and their augmentation."""

from functools import partial

import torch
from torchvision.transforms import v2

from pipeline.augment import (
    cutout,
    normalize,
    padded_crop,
    random_erasing,
    random_flip,
    random_resized_crop,
    random_rotation,
)
from pipeline.crops import batches_by_workers, crop_batches, images_in_memory, place_images
from pipeline.large import LargeImages
from pipeline.policies import POLICIES
from seeding import seed_for

RATIO = (3 / 4, 4 / 3)  # of a random resized crop without --ratio: as in torchvision


class Batches:
    """Batches of a Split on a device: `steps_per_epoch`, and batches(epoch, start_step) of (images, labels).

    Images come as (B, 3, H, W) float, normalised; labels as (B,) int64, or (B, classes) float after mix. The uint8
    images of the Split lie where place_images puts them; LargeImages come through `crops`, from crop_batches, Shards
    with their labels. With a seed, the order follows from (seed, epoch) and everything else from (seed, epoch, step):
    transform(images, generator) of uint8 images for each of transforms, the same of normalised images for
    float_transforms, then mix(images, labels), which draws from torch's global generator. Without a seed, images come
    in order and unchanged. An epoch takes the first `length` images, by default all; reorder(order, epoch) may replace
    some of their indices. With drop_last, an incomplete last batch is left out, unless it is the only one.
    """

    def __init__(
        self,
        split,
        *,
        batch_size,
        mean,
        std,
        device,
        seed=None,
        length=None,
        reorder=None,
        drop_last=False,
        crops=None,
        transforms=(),
        float_transforms=(),
        mix=None,
    ):
        self.crops, self.images = crops, None if crops else place_images(split.images, torch.device(device))
        self.whole = split.images is not None  # Shards give each of several ranks its part alone
        self.labels, self.length, self.reorder = split.labels.to(device), length or len(split.labels), reorder
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.transforms, self.float_transforms, self.mix = transforms, float_transforms, mix
        complete, left_over = divmod(self.length, batch_size)
        self.steps_per_epoch = complete if complete and (drop_last or not left_over) else complete + 1

    def batches(self, epoch=0, start_step=0):
        generator = torch.Generator()
        order = torch.arange(self.length)
        if self.seed is not None:
            order = torch.randperm(self.length, generator=generator.manual_seed(seed_for("order", self.seed, epoch)))
        if self.reorder:
            order = self.reorder(order, epoch)
        indices = order.to(self.device).split(self.batch_size)[: self.steps_per_epoch]
        on_host = order.split(self.batch_size)[: self.steps_per_epoch]
        if self.crops:
            keys = [(part.numpy(), epoch, step) for step, part in enumerate(on_host)]
            uint8_batches = self.crops(keys[start_step:])
        elif self.images.device == self.labels.device:
            uint8_batches = (self.images[part] for part in indices[start_step:])
        else:
            uint8_batches = (self.images[part].pin_memory() for part in on_host[start_step:])
        for step, images in enumerate(uint8_batches, start_step):
            images, labels = images if isinstance(images, list | tuple) else (images, self.labels[indices[step]])
            images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
            if self.seed is not None:
                generator.manual_seed(seed_for("augmentation", self.seed, epoch, step))
            for transform in self.transforms:
                images = transform(images, generator)  # (B, 3, H, W) uint8
            images = normalize(images, self.mean, self.std)
            for transform in self.float_transforms:
                images = transform(images, generator)
            if self.mix:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed_for("mixing", self.seed, epoch, step))
                    images, labels = self.mix(images, labels)  # labels: (B, classes)
            yield images, labels


def image_transforms(args, *, cropped=False):
    """The random transforms of uint8 images that the flags ask for, in order; without --scale if already `cropped`."""
    if args.aa != "none":
        yield partial(POLICIES[args.aa], fill=args.fill)
    if args.hflip:
        yield partial(random_flip, p=args.hflip)
    if args.crop_padding:
        yield partial(padded_crop, padding=args.crop_padding)
    if args.scale and not cropped:
        yield partial(random_resized_crop, scale=args.scale, ratio=args.ratio or RATIO)
    if args.rotate:
        yield partial(random_rotation, degrees=args.rotate, fill=args.fill)


def normalised_transforms(args):
    """The random transforms of normalised images that the flags ask for, in order."""
    if args.reprob:
        yield partial(random_erasing, p=args.reprob)
    if args.cutout:
        yield partial(cutout, size=args.cutout)


def mix_transform(args, num_classes):
    """MixUp or CutMix of a batch, equally often if the flags ask for both; None if they ask for neither."""
    mixes = []
    if args.mixup:
        mixes.append(v2.MixUp(alpha=args.mixup, num_classes=num_classes))
    if args.cutmix:
        mixes.append(v2.CutMix(alpha=args.cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixes) if mixes else None


@images_in_memory()
def training_batches(dataset, args, device):
    """Batches of the training images, shuffled, and augmented as the flags say."""
    crops = None
    if isinstance(dataset.train.images, LargeImages):
        crops = crop_batches(
            dataset.train.images,
            scale=args.scale,
            ratio=args.ratio or RATIO,
            seed=args.seed,
            device=device,
            cache_gib=args.cache_gib,
            workers=args.workers,
        )
    elif dataset.train.images is None:  # in shards
        crops = batches_by_workers(dataset.train, device, dataset.train.workers)
    split, mixed = dataset.train, {}
    if dataset.extra:
        from pipeline.extra import mix_in  # only if it is asked for

        split, mixed = mix_in(split, dataset.extra, share=args.extra_fraction, seed=args.seed)
    return Batches(
        split,
        **mixed,
        batch_size=args.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        seed=args.seed,
        drop_last=args.drop_last,
        crops=crops,
        transforms=tuple(image_transforms(args, cropped=bool(crops))),
        float_transforms=tuple(normalised_transforms(args)),
        mix=mix_transform(args, len(dataset.classes)),
    )


@images_in_memory()
def evaluation_batches(dataset, split, args, device):
    """Batches of a Split in order and unchanged, up to four times as large as in training: no gradient is stored."""
    size = min(256, 4 * args.batch_size)
    return Batches(split, batch_size=size, mean=dataset.mean, std=dataset.std, device=device)
