"""Images per second through random crop, flip and normalisation, with and without AutoAugment, beside the peers.

    python -m benchmarks.augment --out results/speed/augment-cpu.json

The peers: torchvision's transforms of PIL images and its v2 transforms of uint8 tensors, both image by image in one
process, like a data loader's worker; and kornia's of float batches, with one sub-policy for a whole batch. All start
from a uint8 batch (or PIL images) and end with a normalised batch on the device.
"""

from importlib.metadata import version

import torch
import torchvision.transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from benchmarks.peers import installed
from benchmarks.turns import print_machine, print_speeds, speed_parser, take_turns, write_speeds
from errors import run_script
from pipeline.augment import normalize, padded_crop, random_flip
from pipeline.policies import auto_augment
from training.device import pick_device
from training.values import at_least

MEAN, STD, PADDING = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4  # CIFAR-10's
JOBS = {"crop, flip, normalise": False, "the same with AutoAugment": True}


def our_pipeline(images, auto):
    """A function without arguments that transforms the batch `images`, like those of the peers below."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([MEAN, STD], device=images.device)

    def run():
        batch = random_flip(padded_crop(images, generator, padding=PADDING), generator)
        return normalize(auto_augment(batch, generator, fill=0) if auto else batch, mean, std)

    return run


def torchvision_pil_pipeline(images, auto):
    size, device = images.shape[2:], images.device
    policy = [v1.AutoAugment(v1.AutoAugmentPolicy.CIFAR10)] if auto else []
    to_float = [v1.ToTensor(), v1.Normalize(MEAN, STD)]
    transform = v1.Compose([v1.RandomCrop(size, PADDING), v1.RandomHorizontalFlip(), *policy, *to_float])
    opened = [to_pil_image(image) for image in images.cpu()]
    return lambda: torch.stack([transform(image) for image in opened]).to(device)


def torchvision_v2_pipeline(images, auto):
    size, device = images.shape[2:], images.device
    policy = [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)] if auto else []
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([v2.RandomCrop(size, PADDING), v2.RandomHorizontalFlip(), *policy, *to_float])
    on_host = list(images.cpu())
    return lambda: torch.stack([transform(image) for image in on_host]).to(device)


def kornia_pipeline(images, auto):
    import kornia.augmentation as kornia_transforms
    from kornia.augmentation.auto import AutoAugment

    transform = torch.nn.Sequential(
        kornia_transforms.RandomCrop(tuple(images.shape[2:]), padding=PADDING),
        kornia_transforms.RandomHorizontalFlip(),
        *([AutoAugment("cifar10")] if auto else []),
        kornia_transforms.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(images.device)
    return lambda: transform(images.float() / 255)


PIPELINES = {
    "augment.py": our_pipeline,
    "torchvision, PIL": torchvision_pil_pipeline,
    "torchvision v2, uint8": torchvision_v2_pipeline,
    "kornia, batch": kornia_pipeline,
}


def counted(run):
    return lambda: len(run())


def augment_parser():
    parser = speed_parser(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=at_least(1), default=512, help="images per batch")
    return parser


def main(argv=None):
    args = augment_parser().parse_args(argv)
    device = pick_device(args.device)
    pipelines, packages = dict(PIPELINES), ["torchvision", "kornia"]
    if not installed("kornia"):
        del pipelines["kornia, batch"]
        packages.remove("kornia")
    versions = {name: version(name) for name in packages}
    torch.manual_seed(0)
    images = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    print_machine(device, f"torch {torch.__version__}", *(f"{name} {number}" for name, number in versions.items()))
    print(f"batches of {args.batch_size} images of 32 x 32, {args.rounds} rounds")
    speeds = {}
    for job, auto in JOBS.items():
        ways = {name: counted(make(images, auto)) for name, make in pipelines.items()}
        speeds[job] = take_turns(ways, device, rounds=args.rounds, seconds=args.seconds)
        print_speeds(job, speeds[job])
    if args.out:
        results = {"versions": versions, "batch_size": args.batch_size, "images_per_second": speeds}
        write_speeds(args.out, device, results)


if __name__ == "__main__":
    run_script(main)
