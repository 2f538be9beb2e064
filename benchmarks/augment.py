"""Pictures a second through random crop, flip and normalisation, without and with AutoAugment, beside the peers.

    python -m benchmarks.augment --out results/speed/augment-cpu.json

The peers: torchvision on PIL pictures and its v2 transforms on uint8 tensors, both picture by picture in one process,
as a data loader's worker runs them; kornia on whole batches of float, which gives all of a batch the same sub-policy.
Whoever is measured starts from a batch of uint8 (or of PIL pictures) and ends with a normalised batch on the device.
They take turns, round after round; the median is shown, and the quartiles of the rounds as the spread.
"""

import json
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec

import torch
import torchvision.transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

from augment import normalize, padded_crop, random_flip
from errors import run_script
from files import write_atomically
from policies import auto_augment
from training.device import device_name, pick_device
from training.flag_types import Parser, at_least

MEAN, STD, PADDING = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4  # CIFAR-10's
JOBS = {"crop, flip, normalise": False, "the same with AutoAugment": True}
OURS = "augment.py"


def our_pipeline(pictures, auto):
    """A function without arguments that transforms the batch `pictures` once; so are the peers below."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([MEAN, STD], device=pictures.device)

    def run():
        batch = random_flip(padded_crop(pictures, generator, padding=PADDING), generator)
        return normalize(auto_augment(batch, generator, fill=0) if auto else batch, mean, std)

    return run


def torchvision_pil_pipeline(pictures, auto):
    size, device = pictures.shape[2:], pictures.device
    policy = [v1.AutoAugment(v1.AutoAugmentPolicy.CIFAR10)] if auto else []
    transform = v1.Compose(
        [v1.RandomCrop(size, PADDING), v1.RandomHorizontalFlip(), *policy, v1.ToTensor(), v1.Normalize(MEAN, STD)]
    )
    opened = [to_pil_image(picture) for picture in pictures.cpu()]
    return lambda: torch.stack([transform(picture) for picture in opened]).to(device)


def torchvision_v2_pipeline(pictures, auto):
    size, device = pictures.shape[2:], pictures.device
    policy = [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)] if auto else []
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([v2.RandomCrop(size, PADDING), v2.RandomHorizontalFlip(), *policy, *to_float])
    on_host = list(pictures.cpu())
    return lambda: torch.stack([transform(picture) for picture in on_host]).to(device)


def kornia_pipeline(pictures, auto):
    import kornia.augmentation as kornia_transforms
    from kornia.augmentation.auto import AutoAugment

    transform = torch.nn.Sequential(
        kornia_transforms.RandomCrop(tuple(pictures.shape[2:]), padding=PADDING),
        kornia_transforms.RandomHorizontalFlip(),
        *([AutoAugment("cifar10")] if auto else []),
        kornia_transforms.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ).to(pictures.device)
    return lambda: transform(pictures.float() / 255)


PIPELINES = {
    OURS: our_pipeline,
    "torchvision, PIL": torchvision_pil_pipeline,
    "torchvision v2, uint8": torchvision_v2_pipeline,
    "kornia, batch": kornia_pipeline,
}


def pictures_a_second(run, count, device, *, seconds):
    """Batches of `count` pictures, one after the other for at least `seconds`."""
    batches = 0
    start = time.perf_counter()
    while True:
        run()
        batches += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (elapsed := time.perf_counter() - start) >= seconds:
            return batches * count / elapsed


def measure(pictures, rounds, pipelines):
    """{job: {pipeline: pictures a second in each round}}, after a round that does not count."""
    speeds = {}
    for job, auto in JOBS.items():
        runs = {name: make(pictures, auto) for name, make in pipelines.items()}
        speeds[job] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                speed = pictures_a_second(run, len(pictures), pictures.device, seconds=1.0 if number else 0.2)
                speeds[job][name] += [speed] if number else []
    return speeds


def print_table(speeds):
    for job, rows in speeds.items():
        print(f"\n{job:26}{'pictures/s':>12}{'quartiles':>24}   {OURS} is")
        ours = statistics.median(rows[OURS])
        for name, values in rows.items():
            middle = statistics.median(values)
            low, _, high = statistics.quantiles(values, method="inclusive")
            ratio = "" if name == OURS else f"{ours / middle:6.1f} times as fast"
            print(f"{name:26}{middle:12,.0f}{f'{low:,.0f} - {high:,.0f}':>24}   {ratio}".rstrip())


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda (default: the best there is)")
    parser.add_argument("--batch-size", type=at_least(1), default=512)
    parser.add_argument("--rounds", type=at_least(2), default=5)
    parser.add_argument("--out", help="also write the speeds of all rounds to this JSON")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    pipelines, packages = dict(PIPELINES), ["torch", "torchvision", "kornia"]
    if find_spec("kornia") is None:
        print("without kornia, which is not installed (pip install -r benchmarks/requirements.txt)")
        del pipelines["kornia, batch"]
        packages.remove("kornia")
    versions = {name: version(name) for name in packages}
    torch.manual_seed(0)
    pictures = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"{device_name(device)}, {torch.get_num_threads()} CPU threads, {names}")
    print(f"batches of {args.batch_size} pictures of 32 x 32, {args.rounds} rounds")
    speeds = measure(pictures, args.rounds, pipelines)
    print_table(speeds)
    if args.out:
        about = {"device": device_name(device), "threads": torch.get_num_threads(), "versions": versions}
        text = json.dumps({**about, "batch_size": args.batch_size, "pictures_per_second": speeds}, indent=1)
        write_atomically(args.out, lambda file: file.write(f"{text}\n".encode()))


if __name__ == "__main__":
    run_script(main)
