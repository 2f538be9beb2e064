"""Checkpoints: written in one piece, opened without running code, resumed exactly."""

import sys
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import torch

from errors import UserError
from files import is_first_rank, write_atomically
from training.archives import read_archive, read_from_outside, write_archive
from training.outputs import COLUMNS
from training.ranks import ADDED_BY_RANK, sums_of_all_ranks

FORMAT_VERSION = 1


def all_finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def finite_weights(weights):
    """Whether no weight or bias of a state dict is infinite or NaN, as a mask in it may be."""
    return all_finite(weight for name, weight in weights.items() if name.endswith(("weight", "bias")))


def image_shape(channels, size):
    """(C, H, W) of images; size is that of --image-size, a number of pixels or [height, width]."""
    return channels, *((size, size) if isinstance(size, int) else size)


FIELDS = {  # what a checkpoint holds: {name: (its type, what is true of a sensible value)}
    "format_version": (int, lambda version: version == FORMAT_VERSION),
    "model": (str,),
    "classes": (list[str], len),
    "image_size": (int | list[int], lambda n: len(s := image_shape(1, n)) == 3 and 0 < min(s) <= max(s) <= 10_000),
    "mean": (list[float], lambda mean: len(mean) in (1, 3)),
    "std": (list[float], lambda std: len(std) in (1, 3) and min(std) > 0),
    "weights": (dict[str, torch.Tensor], len, finite_weights),
    "ema": (dict[str, torch.Tensor] | None, lambda weights: not weights or finite_weights(weights)),
    **dict.fromkeys(("model_args", "optimizer", "scaler"), (dict[str, object],)),
    "schedule": (dict[str, object], lambda s: {type(s.get(k, 0)) for k in ("last_epoch", "_step_count")} == {int}),
    "seed": (int,),
    **dict.fromkeys(("epoch", "step"), (int, lambda number: number >= 0)),
    "sums": (dict[str, torch.Tensor | int | float], lambda sums: not any(getattr(v, "ndim", 0) for v in sums.values())),
    "history": (list[dict[str, int | float | None]], lambda rows: all(set(COLUMNS[:8]) <= row.keys() for row in rows)),
    "args": (dict[str, object], lambda args: is_of_kind([args.get("dataset"), args.get("data_dir")], list[str])),
}


def is_of_kind(value, kind):
    """Whether a value is of a type, which may be built from others as list[str] and dict[str, int | None] are."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(is_of_kind(value, one) for one in inner)
    parts = [value, value.values()] if origin is dict and isinstance(value, dict) else [value]
    return isinstance(value, origin or kind) and all(is_of_kind(x, k) for part, k in zip(parts, inner) for x in part)


def make_checkpoint(run):
    """The state of a run (see training/run.py) at one moment, as a dict of tensors and plain Python types.

    Raises UserError if a weight is not finite: such a run could not be resumed.
    """
    weights, optimizer = run.model.state_dict(), run.optimizer.state_dict()
    if run.args.fsdp:
        from training.sharding import gathered  # only if it is asked for

        weights, optimizer = gathered(weights), gathered(optimizer)
    if not all_finite(run.model.parameters()):
        raise UserError(f"weights are not finite {position(run.epoch, run.sums['step'])}: lower --lr, or --clip-grad 1")
    return {
        "format_version": FORMAT_VERSION,
        "model": run.args.model,
        "model_args": run.model_args,
        "classes": list(run.dataset.classes),
        "image_size": run.args.image_size,
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "data_hashes": run.data_hashes,
        "weights": weights,
        "ema": run.average.model.state_dict() if run.average and run.average.model else None,
        "optimizer": optimizer,
        # without the milestones: they follow from the arguments, and are no plain type
        "schedule": {name: value for name, value in run.schedule.state_dict().items() if name != "milestones"},
        "scaler": run.precision.scaler.state_dict(),
        "seed": run.args.seed,
        "epoch": run.epoch,
        "step": run.sums["step"],
        "sums": sums_of_all_ranks(run.sums),
        "history": run.history,
        "log_id": run.log_id,
        "args": vars(run.args),
    }


def save_checkpoint(path, checkpoint):
    """Write a checkpoint to path; an existing last.pt becomes last.prev.pt."""
    path = Path(path)
    previous = path.with_name("last.prev.pt") if path.name == "last.pt" else None
    write_atomically(path, lambda file: write_archive(file, checkpoint), previous=previous)


def open_checkpoint(path, device="cpu"):
    """The checkpoint in a file. Raises UserError if it is damaged or none, or more than tensors and plain types."""
    if not Path(path).exists():
        raise UserError(f"there is no checkpoint {path}")
    checkpoint = read_archive(path, f"{path} is damaged or no checkpoint", device)
    for name, (kind, *conditions) in FIELDS.items():
        value = checkpoint.get(name, ...) if isinstance(checkpoint, dict) else ...
        if not is_of_kind(value, kind) or not all(holds(value) for holds in conditions):
            what = "no checkpoint of this project, or one of another version of it"
            raise UserError(f"{path} is {what}: {name} is missing, not finite or makes no sense")
    return checkpoint


def position(epoch, step):
    """How far a run has come, from its finished epochs and the steps of the one in progress."""
    return f"in epoch {epoch + 1} after step {step}" if step else f"after epoch {epoch}"


def checkpoint_file(path, which=None):
    """The file of a checkpoint: of a run's folder last.pt, or WHICH.pt; of a file, itself."""
    return path / f"{which or 'last'}.pt" if path.is_dir() else path


def load_checkpoint(path, *, which=None, device="cpu"):
    """The checkpoint in a run's folder (last.pt, or WHICH.pt) or in a file; prints its file, epoch and accuracy.

    If last.pt is missing or damaged, last.prev.pt is opened in its place, with a warning on stderr that names both.
    """
    path = checkpoint_file(Path(path), which)
    try:
        checkpoint = open_checkpoint(path, device)
    except UserError as error:
        previous = path.with_name("last.prev.pt")
        if path.name != "last.pt" or not previous.exists():
            raise
        print(f"warning: {error}: using {previous}", file=sys.stderr)
        path, checkpoint = previous, open_checkpoint(previous, device)
    last = checkpoint["history"][-1] if checkpoint["history"] else {}
    accuracies = [f"{split} {value:.2%}" for split in ("val", "test") if (value := last.get(f"{split}_accuracy"))]
    print(f"{path}: {checkpoint['model']} {position(checkpoint['epoch'], checkpoint['step'])}", *accuracies, sep=", ")
    return checkpoint


def has_checkpoint(folder):
    return (folder / "last.pt").exists() or (folder / "last.prev.pt").exists()


def folder_to_resume(path, out_dir):
    """The folder of the run that --resume names, by its folder or its last.pt. Raises UserError if there is none."""
    folder = path.parent if path.name == "last.pt" else path
    if has_checkpoint(folder):
        return folder
    reason = "there is no last.pt in it" if path.is_dir() else "that is no run's folder, and no last.pt"
    there = Path(out_dir) / path.name
    raise UserError(f"--resume {path}: {reason}" + (f"; use --resume {there}" if has_checkpoint(there) else ""))


def evaluated_weights(checkpoint):
    """The weights that a checkpoint's accuracies belong to: the averaged ones if there are any."""
    return checkpoint["ema"] or checkpoint["weights"]


def rebuild_model(checkpoint, build_model, *, attention=None, generates=False, trained=True):
    """The model of a checkpoint as it was evaluated, in evaluation mode; build_model(name, **model_args) makes it.

    Without `trained` it keeps the random weights of a new model. An attention FILE.py:Class is loaded only if
    `attention` names it again. Raises UserError if the model or a part of it is not known here, if it generates images
    and `generates` is false, or the other way round, or if the weights do not fit it.
    """
    from training.own import with_own_class  # training alone does not need it

    model_args = with_own_class(checkpoint["model_args"], attention)
    with read_from_outside("the checkpoint's weights do not fit its model and model_args"):
        try:
            model = build_model(checkpoint["model"], **model_args)
        except UserError as error:
            advice = "docs/extending.md says how to add a block of your own"
            raise UserError(f"the checkpoint's model cannot be built here: {error}; {advice}") from error
        if hasattr(model, "generate") != generates:
            what = "classifies images: use predict.py" if generates else "generates images: use generate.py"
            raise UserError(f"{checkpoint['model']} {what}")
        if trained:
            model.load_state_dict(evaluated_weights(checkpoint))
    return model.eval()


def check_same_images(checkpoint, run):
    """Raises UserError if a run's dataset is not the one that the checkpoint was trained on."""
    dataset, then, now = run.dataset, checkpoint.get("data_hashes"), run.data_hashes
    if checkpoint["classes"] != list(dataset.classes):
        there, here = ", ".join(checkpoint["classes"]), ", ".join(dataset.classes)
        raise UserError(f"the run to resume has the classes {there}, the images {here}")
    if not isinstance(then, dict):  # an older checkpoint: all it knows of the images is their statistics
        here, there = [dataset.mean, dataset.std], [checkpoint["mean"], checkpoint["std"]]
        then = now if torch.allclose(torch.tensor(here), torch.tensor(there), rtol=0, atol=1e-6) else {}
    names = {"train": "training", "val": "validation", "test": "test", "extra": "extra"}
    if changed := [name for key, name in names.items() if then.get(key) != now.get(key)]:
        raise UserError(f"the {changed[0]} images are not those of the run to resume: an image or its class is another")


def load_weights(model, weights, *, sharded):
    """Load whole weights, of which each rank keeps its shards if the model is `sharded` (--fsdp)."""
    if sharded:
        from training.sharding import sharded_weights  # only if it is asked for

        weights = sharded_weights(weights, model)
    model.load_state_dict(weights)


def restore_training(checkpoint, run):
    """Restore a run's weights, optimiser, schedule, scaler and position from a checkpoint."""
    with read_from_outside(f"--resume {run.folder}: the checkpoint does not fit the run"):
        load_weights(run.model, checkpoint["weights"], sharded=run.args.fsdp)
        if checkpoint["ema"]:
            run.average.load(checkpoint["ema"], epoch=checkpoint["epoch"], step=checkpoint["step"])
        state = checkpoint["optimizer"]
        if run.args.fsdp:
            from training.sharding import sharded_state  # only if it is asked for

            state = sharded_state(state, run.optimizer)
        run.optimizer.load_state_dict(state)
        run.schedule.load_state_dict(checkpoint["schedule"])
        if checkpoint["scaler"]:
            run.precision.scaler.load_state_dict(checkpoint["scaler"])
        run.epoch, run.history, run.log_id = checkpoint["epoch"], checkpoint["history"], checkpoint.get("log_id")
        if run.epoch != len(run.history):
            raise ValueError(f"{run.epoch} epochs, and a history of {len(run.history)}")
        for name, value in checkpoint["sums"].items():
            name = "images" if name == "pictures" else name  # as older versions called it
            if name not in ADDED_BY_RANK or is_first_rank():  # which has the others' share as well
                run.sums[name] = value.to(run.device) if torch.is_tensor(value) else value
        run.sums["step"] = checkpoint["step"]
