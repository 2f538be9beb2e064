"""Images per second of whole training steps, data and augmentation included, beside the peers.

    python -m benchmarks.train --data-dir datasets --out results/speed/train-cpu.json

Ours is a script's recipe, with its batches, loop and optimiser. The peers (peers.py) have models of the same size,
loaders without workers that transform image by image, and plain loops; in float32 unless their name says otherwise.
Below the table of speeds: our steps' share of the machine's matrix product, measured in the same run; the share of data
and augmentation in a step; and the peak memory (on a CPU that of a process of its own).
"""

import statistics
from functools import partial
from pathlib import Path

import torch
import torchvision.transforms as v1

from benchmarks.ours import Ours, settings_of_training
from benchmarks.peers import (
    ReportViT,
    installed,
    one_hot,
    peer_training,
    plain_resnet18,
    timm_loader,
    timm_vit,
    torchvision_loader,
    vit_pytorch_cct,
    vit_pytorch_vit,
)
from benchmarks.turns import (
    images_per_second,
    in_fresh_process,
    peak_of_run,
    plot_speeds,
    print_machine,
    print_speeds,
    speed_parser,
    take_turns,
    write_speeds,
)
from data import DATASETS, load_dataset
from errors import run_script
from training.device import Precision, pick_device
from training.values import at_least

BATCHES = "our batches alone"  # a way that is timed but not shown


def ours_twice(script, flags, dataset, device, steps):
    """The steps of a script in the precision that the device is fast at, and in float32."""
    names = {"ours": "auto", "ours in float32": "off"}
    return {name: Ours(script, [*flags, "--amp", amp], dataset, device, steps) for name, amp in names.items()}


def vit_ways(dataset, device, *, steps, batch_size):
    """The report's ViT. Its own loop has transforms of tensors, one-hot targets, and asks for the attention weights."""
    batch_size = batch_size or 64
    ways = ours_twice("train_vit", ["--batch-size", str(batch_size)], dataset, device, steps)
    crop = {"scale": (0.8, 1.0), "ratio": (0.9, 1.1)}
    tensors = [v1.ToTensor(), v1.RandomHorizontalFlip(), v1.RandomResizedCrop(32, **crop, antialias=True)]
    report = torchvision_loader(dataset, tensors, batch_size)
    train = partial(peer_training, device=device, steps=steps)
    ways["the report's loop"] = train(ReportViT(), report, mix=one_hot(10), reads=True)
    if installed("timm"):
        ways["timm"] = train(timm_vit(), timm_loader(dataset, batch_size, hflip=0.5, **crop))
    if installed("vit_pytorch"):
        images = torchvision_loader(dataset, [*tensors[1:], v1.ToTensor()], batch_size)
        ways["vit-pytorch"] = train(vit_pytorch_vit(), images)
    return ways


def cct_ways(dataset, device, *, steps, batch_size):
    """CCT-6/3x1 with AutoAugment; vit-pytorch's with timm's AutoAugment and mixup."""
    batch_size = batch_size or 128
    flags = ["--amp", "auto", "--batch-size", str(batch_size)]
    ways = {"ours": Ours("train_cct", flags, dataset, device, steps)}
    if installed("timm", "vit_pytorch"):
        from timm.data import Mixup

        classes = len(dataset.classes)
        mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=classes)
        loader = timm_loader(dataset, batch_size, hflip=0.5, scale=(0.8, 1.0), auto_augment="original")
        train = partial(peer_training, loader=loader, device=device, steps=steps, mix=mix)
        ways["vit-pytorch, timm's data"] = train(vit_pytorch_cct(classes))
        ways["the same in bfloat16"] = train(vit_pytorch_cct(classes), dtype=torch.bfloat16)
    return ways


def small_cct_ways(dataset, device, *, steps, batch_size):
    flags = ["--model", "cct_2_3x2", "--amp", "auto", "--batch-size", str(batch_size or 128)]
    return {"ours": Ours("train_cct", flags, dataset, device, steps)}


def resnet18_ways(dataset, device, *, steps, batch_size):
    """ResNet18 for 32 pixels; torchvision's in torch's default memory format."""
    batch_size = batch_size or 128
    flags = ["--recipe", "survey", "--rotate", "0", "--batch-size", str(batch_size)]
    images = torchvision_loader(dataset, [v1.RandomCrop(32, 4), v1.RandomHorizontalFlip(), v1.ToTensor()], batch_size)
    sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    peer = peer_training(plain_resnet18(10), images, device, steps, make=sgd)
    return ours_twice("train_resnet_attn", flags, dataset, device, steps) | {"torchvision": peer}


BENCHMARKED = {
    "vit": (vit_ways, "cifar10"),
    "cct_6_3x1": (cct_ways, "cifar100"),
    "cct_2_3x2": (small_cct_ways, "cifar100"),
    "resnet18": (resnet18_ways, "cifar10"),
}


def matmul_peak(device, dtype):
    """GFLOP/s of the product of two square matrices, the best of five tries."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def run():
        torch.mm(a, b)
        return 2 * size**3 / 1e9

    return max(images_per_second(run, device, seconds=0.3) for _ in range(5))


def make_ways(name, device, args):
    """({way: run}, the dataset) of one model."""
    make, default = BENCHMARKED[name]
    dataset = load_dataset(args.dataset or default, data_dir=args.data_dir, image_size=32)
    ways = make(dataset, device, steps=args.steps, batch_size=args.batch_size)
    return ways | {BATCHES: ways["ours"].run_batches}, dataset


def peak_of_way(name, way, args):
    device = pick_device(args.device)
    return peak_of_run(make_ways(name, device, args)[0][way], device)


def peaks_of_ways(name, ways, args):
    """{way: the most bytes in use in a process of its own}."""
    return {way: in_fresh_process(peak_of_way, name, way, args) for way in ways}


def train_parser():
    parser = speed_parser(__doc__.splitlines()[0])
    parser.add_argument("--models", choices=BENCHMARKED, nargs="+", default=list(BENCHMARKED), help="what to train")
    parser.add_argument("--dataset", choices=DATASETS, help="(default: cifar100 for CCT, cifar10 for the others)")
    parser.add_argument("--data-dir", default="datasets", help="folder of the dataset")
    parser.add_argument("--batch-size", type=at_least(1), help="images per batch (default: the recipe's)")
    parser.add_argument("--steps", type=at_least(1), default=2, help="training steps per measurement")
    return parser


def main(argv=None):
    args = train_parser().parse_args(argv)
    device = pick_device(args.device)
    with settings_of_training():
        mixed = Precision("auto", device).dtype
        Precision("off", device)
        names = {dtype: str(dtype)[6:] for dtype in (torch.float32, mixed)}
        peaks = {dtype_name: matmul_peak(device, dtype) for dtype, dtype_name in names.items()}
    print_machine(device)
    print("matrix product: " + ", ".join(f"{peak:,.0f} GFLOP/s in {name}" for name, peak in peaks.items()))
    results = {name: {} for name in ("gflop_per_image", "share_of_peak", "data_share")}
    speeds, peak_bytes = {}, {}
    for name in args.models:
        ways, dataset = make_ways(name, device, args)
        ours = ways["ours"]
        speeds[name] = take_turns(ways, device, rounds=args.rounds, seconds=args.seconds)
        medians = {way: statistics.median(values) for way, values in speeds[name].items()}
        del speeds[name][BATCHES]
        print_speeds(f"{name}, {dataset.name}", speeds[name])
        work = ours.gflop_per_image()
        dtypes = {"ours": names[ours.precision.dtype], "ours in float32": "float32"}
        shares = {way: (dtypes[way], medians[way] * work / peaks[dtypes[way]]) for way in dtypes if way in medians}
        for way, (dtype, share) in shares.items():
            print(f"{way}: {work:.3f} GFLOP per image, {share:.0%} of the {dtype} peak")
        data = medians["ours"] / medians[BATCHES]
        print(f"data and augmentation: {data:.1%} of a step")
        for table, value in zip(results.values(), (work, shares, data), strict=True):
            table[name] = value
        if device.type == "cuda":  # includes the weights of all ways; a process for each would compile again
            for run in (run for run in ways.values() if isinstance(run, Ours)):
                run.forward = run.model  # so that the memory of CUDA graphs does not count
            peak_bytes[name] = {way: peak_of_run(ways[way], device) for way in speeds[name]}
    print()
    for name in args.models:
        peak_bytes[name] = peak_bytes.get(name) or peaks_of_ways(name, list(speeds[name]), args)
        print(f"{name}, peak MiB: " + ", ".join(f"{way} {peak / 2**20:,.0f}" for way, peak in peak_bytes[name].items()))
    if args.out:
        results = {"peak_gflops": peaks, "images_per_second": speeds, **results, "peak_bytes": peak_bytes}
        write_speeds(args.out, device, results)
        plot_speeds(Path(args.out).with_suffix(".png"), speeds, device)


if __name__ == "__main__":
    run_script(main)
