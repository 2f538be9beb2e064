"""Pictures a second of whole training steps, data and augmentation included, beside the peers.

    python -m benchmarks.train --data-dir datasets --out results/speed/train-cpu.json

Ours is a script's own recipe, through its own batches, loop and optimiser. The peers of ResNet18: torchvision's model
in float32 and in torch's default layout, fed by our batches, and fed as its users do, by a DataLoader of one process
that crops, flips and normalises picture by picture. They take turns, round after round; the median is shown, and the
quartiles of the rounds as the spread.
"""

import importlib
import itertools
import os
from functools import partial

import torch
import torchvision.transforms as v1
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image

from batches import training_batches
from benchmarks.turns import print_speeds, speed_parser, take_turns, write_speeds
from campaign import script_parser
from data import DATASETS, load_dataset
from errors import run_script
from models import build_model
from training.arguments import complete_arguments, given_arguments
from training.device import Precision, device_name, pick_device
from training.flag_types import at_least
from training.loop import new_sums, train_one_epoch
from training.optimizer import make_optimizer
from training.schedules import make_schedule


def chosen_arguments(script, flags):
    """What a training script would make of these flags, and the names of those that its model is built with."""
    module, parser = importlib.import_module(script), script_parser(f"{script}.py")
    given = given_arguments(parser, flags)
    recipe, defaults = module.chosen_recipe(given)
    args = complete_arguments(parser, given | {"recipe": recipe}, defaults)
    return args, module.MODEL_FLAGS[args.model]


def our_training(script, flags, dataset, device, steps, *, model=None):
    """A function without arguments that trains so many steps and returns the number of pictures; so are the peers'.

    model stands in for the one that the flags ask for.
    """
    args, model_flags = chosen_arguments(script, flags)
    if model is None:
        model = build_model(
            args.model, num_classes=len(dataset.classes), **{name: getattr(args, name) for name in model_flags}
        )
    model = model.to(device)
    batches = training_batches(dataset, args, device)
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, steps_per_epoch=batches.steps_per_epoch)
    epochs = itertools.count()

    def run():
        sums = new_sums(device)
        train_one_epoch(
            model=model,
            batches=batches,
            loss_function=partial(cross_entropy, label_smoothing=args.smoothing),
            optimizer=optimizer,
            schedule=schedule,
            precision=Precision(args.amp, device),
            seed=args.seed,
            epoch=next(epochs),
            sums=sums,
            clip_grad=args.clip_grad,
            after_step=lambda done, sums: done == steps,
        )
        return sums["pictures"]

    return run


def plain_resnet18(num_classes):
    """torchvision's, with the stem for small pictures."""
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.no_weight_decay = ()
    return model


class PilPictures(torch.utils.data.Dataset):
    """The pictures of a Split as torchvision's users have them: PIL, transformed one by one."""

    def __init__(self, split, transform):
        self.pictures, self.labels, self.transform = split.pictures, split.labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(to_pil_image(self.pictures[index])), int(self.labels[index])


def torchvision_training(model, dataset, device, steps, *, batch_size):
    size, mean, std = dataset.train.pictures.shape[2:], dataset.mean, dataset.std
    transform = v1.Compose([v1.RandomCrop(size, 4), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(mean, std)])
    loader = DataLoader(PilPictures(dataset.train, transform), batch_size, shuffle=True)
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def run():
        count = 0
        for pictures, labels in itertools.islice(loader, steps):
            loss = cross_entropy(model(pictures.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += len(labels)
        return count

    return run


def resnet18_ways(dataset, device, *, steps, batch_size):
    flags = ["--recipe", "survey", "--rotate", "0", "--batch-size", str(batch_size)]
    ours = partial(our_training, "train_resnet_attn", dataset=dataset, device=device, steps=steps)
    peer = partial(plain_resnet18, len(dataset.classes))
    return {
        "ours": ours(flags),
        "ours in float32": ours([*flags, "--amp", "off"]),
        "torchvision's model, our batches": ours([*flags, "--amp", "off"], model=peer()),
        "torchvision's model and batches": torchvision_training(peer(), dataset, device, steps, batch_size=batch_size),
    }


BENCHMARKED = {"resnet18": resnet18_ways}


def main(argv=None):
    parser = speed_parser(__doc__.splitlines()[0])
    parser.add_argument("--models", choices=BENCHMARKED, nargs="+", default=list(BENCHMARKED), help="(all)")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="(%(default)s)")
    parser.add_argument("--data-dir", default="datasets", help="(%(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=128, help="(%(default)s)")
    parser.add_argument("--steps", type=at_least(1), default=10, help="at a time (%(default)s)")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    dataset = load_dataset(args.dataset, data_dir=args.data_dir, image_size=32)
    print(f"{device_name(device)}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {dataset.name}")
    speeds = {}
    for name in args.models:
        ways = BENCHMARKED[name](dataset, device, steps=args.steps, batch_size=args.batch_size)
        speeds[name] = take_turns(ways, device, rounds=args.rounds, seconds=args.seconds)
        print_speeds(name, speeds[name])
    if args.out:
        options = {"dataset": dataset.name, "batch_size": args.batch_size, "steps": args.steps}
        write_speeds(args.out, device, {**options, "pictures_per_second": speeds})


if __name__ == "__main__":
    run_script(main)
