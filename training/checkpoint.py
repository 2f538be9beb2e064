"""Checkpoints: written in one piece, opened without running code, resumed exactly."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import torch

from errors import UserError
from files import write_atomically

FORMAT_VERSION = 1


def make_checkpoint(run):
    """The state of a run (see training/run.py) at one moment, as a dict of tensors and plain Python types."""
    return {
        "format_version": FORMAT_VERSION,
        "model": run.args.model,
        "model_args": run.model_args,
        "classes": list(run.dataset.classes),
        "image_size": run.args.image_size,
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "data_hashes": run.data_hashes,
        "weights": run.model.state_dict(),
        "ema": run.average.module.state_dict() if run.average else None,
        "optimizer": run.optimizer.state_dict(),
        # without the milestones: they follow from the arguments, and are no plain type
        "schedule": {name: value for name, value in run.schedule.state_dict().items() if name != "milestones"},
        "scaler": run.precision.scaler.state_dict(),
        "seed": run.args.seed,
        "epoch": run.epoch,
        "step": run.sums["step"],
        "sums": run.sums,
        "history": run.history,
        "args": vars(run.args),
    }


def save_checkpoint(path, checkpoint):
    """Write a checkpoint to path; an existing last.pt becomes last.prev.pt."""
    path = Path(path)
    previous = path.with_name("last.prev.pt") if path.name == "last.pt" else None
    write_atomically(path, lambda file: torch.save(checkpoint, file), previous=previous)


def open_checkpoint(path, device="cpu"):
    """The checkpoint in a file. Raises UserError if it is damaged, or holds more than tensors and plain types."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check the zip's checksums
        if damaged:
            raise UserError(f"{path} is damaged (checksum of {damaged})")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged or no checkpoint ({first_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no checkpoint of this project: it holds more than tensors and plain types"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is no checkpoint of this project, or one of another version of it")
    return checkpoint


def open_weights(path):
    """The state dict in a file that another program saved. Raises UserError if there is none."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"--init-from {path}: cannot be read as weights ({first_line(error)})") from error
    if not isinstance(weights, dict) or not all(torch.is_tensor(value) for value in weights.values()):
        raise UserError(f"--init-from {path} holds no state dict (a tensor for each name)")
    return weights


def first_line(error):
    return str(error).strip().split("\n")[0]


def load_checkpoint(path, *, which="last", device="cpu"):
    """The checkpoint in a run's folder (last.pt, or WHICH.pt) or in a file; prints its file, epoch and accuracy.

    If last.pt is missing or damaged, last.prev.pt is opened in its place, with a warning on stderr that names both.
    Raises UserError if neither can be read.
    """
    path = Path(path)
    if path.is_dir():
        path = path / f"{which}.pt"
    try:
        checkpoint = open_checkpoint(path, device)
    except UserError as error:
        previous = path.with_name("last.prev.pt")
        if path.name != "last.pt" or not previous.exists():
            raise
        checkpoint = open_checkpoint(previous, device)
        print(f"warning: {error}: using {previous}", file=sys.stderr)
        path = previous
    history = checkpoint["history"]
    accuracies = [
        f"{key[:-9]} {history[-1][key]:.2%}"
        for key in ("val_accuracy", "test_accuracy")
        if history and history[-1].get(key)
    ]
    print(
        f"{path}: {checkpoint['model']}, epoch {checkpoint['epoch']}, step {checkpoint['step']}", *accuracies, sep=", "
    )
    return checkpoint


def evaluated_weights(checkpoint):
    """The weights that a checkpoint's accuracies belong to: the averaged ones if there are any."""
    return checkpoint["ema"] or checkpoint["weights"]


def rebuild_model(checkpoint, build_model):
    """The model of a checkpoint as it was evaluated, in evaluation mode; build_model(name, **model_args) makes it.

    Raises UserError if the model or a part of it is not known here.
    """
    try:
        model = build_model(checkpoint["model"], **checkpoint["model_args"])
    except UserError as error:
        advice = "a class of your own must be in its table first, see docs/extending.md"
        raise UserError(f"the checkpoint's model cannot be built here ({error}): {advice}") from error
    model.load_state_dict(evaluated_weights(checkpoint))
    return model.eval()


def check_same_images(checkpoint, run):
    """Raises UserError if a run's dataset is not the one that the checkpoint was trained on."""
    dataset, then, now = run.dataset, checkpoint.get("data_hashes"), run.data_hashes
    if checkpoint["classes"] != list(dataset.classes):
        there, here = ", ".join(checkpoint["classes"]), ", ".join(dataset.classes)
        raise UserError(f"the run to resume has the classes {there}, the images {here}")
    if then is None:  # the checkpoint is older than data_hashes: all it knows of the images is their statistics
        here, there = [dataset.mean, dataset.std], [checkpoint["mean"], checkpoint["std"]]
        then = now if torch.allclose(torch.tensor(here), torch.tensor(there), rtol=0, atol=1e-6) else {}
    names = {"train": "training", "val": "validation", "test": "test"}
    if changed := [name for key, name in names.items() if then.get(key) != now.get(key)]:
        raise UserError(f"the {changed[0]} images are not those of the run to resume: an image or its class is another")


def restore_training(checkpoint, run):
    """Restore a run's weights, optimiser, schedule, scaler and position from a checkpoint."""
    run.model.load_state_dict(checkpoint["weights"])
    if run.average:
        run.average.module.load_state_dict(checkpoint["ema"])
        run.average.n_averaged.fill_(checkpoint["epoch"] + checkpoint["step"])  # only whether it is 0 matters
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.schedule.load_state_dict(checkpoint["schedule"])
    if checkpoint["scaler"]:
        run.precision.scaler.load_state_dict(checkpoint["scaler"])
    run.epoch, run.history = checkpoint["epoch"], checkpoint["history"]
    for name, value in checkpoint["sums"].items():
        name = "images" if name == "pictures" else name  # as older versions called it
        run.sums[name] = value.to(run.device) if torch.is_tensor(value) else value
    run.sums["step"] = checkpoint["step"]
