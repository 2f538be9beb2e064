"""A run's folder: its checkpoints, log.csv, curves.png, predictions.npz and result.json."""

import csv
import datetime
import io
import itertools
import json
import math
import statistics
import subprocess
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from errors import UserError
from files import write_atomically
from training.checkpoint import open_checkpoint, save_checkpoint
from training.device import device_name, peak_memory_bytes
from training.loop import means, validate

COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "images_per_second",
    "peak_memory_bytes",
)
WRITTEN = ("*.pt", "log.csv", "curves.png", "predictions.npz", "split.csv", "result.json")
PATH_FLAGS = ("data_dir", "out_dir", "cache_dir", "run_name", "resume", "overwrite")


def choose_folder(given, *, default_name, default_dir):
    """(the run's folder, whether it holds a run to go on with), from the flags on the command line.

    Without --run-name the folder is the first of vit, vit-2, vit-3 ... that is not there yet. Raises UserError where
    the name is taken, or where there is nothing to resume.
    """
    resume = given.get("resume")
    if resume and resume != "auto":
        folder = Path(resume)
        if not has_checkpoint(folder):
            raise UserError(f"--resume {folder}: there is no last.pt in it")
        return folder, True
    out_dir = Path(given.get("out_dir", default_dir))
    folder = out_dir / given.get("run_name", default_name)
    if resume:
        return folder, has_checkpoint(folder)
    if is_taken(folder) and not given.get("overwrite"):
        if "run_name" in given:
            raise UserError(
                f"--run-name {folder.name}: {folder} exists; --resume {folder} goes on with it, --overwrite replaces it"
            )
        numbers = itertools.count(2)
        while is_taken(folder):
            folder = out_dir / f"{default_name}-{next(numbers)}"
    return folder, False


def has_checkpoint(folder):
    return (folder / "last.pt").exists() or (folder / "last.prev.pt").exists()


def is_taken(folder):
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def prepare_folder(folder, *, resuming):
    """Make the run's folder; a run that is to be replaced leaves it. Raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in WRITTEN if not resuming else ():
            for path in folder.glob(pattern):
                path.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from error
    write_atomically(folder / ".writable", lambda file: None)
    (folder / ".writable").unlink()


def training_row(epoch, sums, device):
    """A row of log.csv with what training puts into it; epoch counts from 0, the learning rate is the last step's."""
    loss, accuracy = means(sums)
    return dict.fromkeys(COLUMNS) | {
        "epoch": epoch + 1,
        "lr": sums["lr"],
        "train_loss": loss,
        "train_accuracy": accuracy,
        "seconds": sums["seconds"],
        "images_per_second": sums["pictures"] / sums["seconds"],
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def epoch_line(row, epochs):
    """One aligned line for the terminal."""
    width = len(str(epochs))
    splits = "   ".join(
        f"{split} {row[f'{split}_loss']:.4f} {row[f'{split}_accuracy']:7.2%}"
        for split in ("train", "val", "test")
        if row[f"{split}_loss"] is not None
    )
    speed = f"{row['seconds']:7.1f} s {row['images_per_second']:7,.0f} pictures/s"
    return f"epoch {row['epoch']:{width}}/{epochs}   lr {row['lr']:.2e}   {splits}   {speed}"


def out_of_patience(history, patience):
    """Whether the last `patience` epochs brought no better validation accuracy. Raises UserError without validation."""
    if not patience or not history:
        return False
    accuracies = [row["val_accuracy"] for row in history]
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience


def write_epoch(folder, checkpoint, *, save_epochs=()):
    """Write what an epoch leaves behind: the checkpoints that it earns, log.csv and curves.png.

    Raises UserError, and writes nothing, where a loss is not finite.
    """
    history = checkpoint["history"]
    row = history[-1]
    for name, value in row.items():
        if name.endswith("loss") and value is not None and not math.isfinite(value):
            raise UserError(
                f"the {name.replace('_', ' ')} after epoch {row['epoch']} is not finite; {folder / 'last.pt'} is from before"
            )
    names = ["last.pt"]
    if is_best(history, "val_accuracy"):
        names.append("best.pt")
    if row["val_accuracy"] is None and is_best(history, "test_accuracy"):
        names.append("best_on_test.pt")  # the report's choice, which is no result
    if row["epoch"] in save_epochs:
        names.append(f"epoch-{row['epoch']}.pt")
    for name in names:
        save_checkpoint(folder / name, checkpoint)
    write_log(folder / "log.csv", history)
    draw_curves(folder / "curves.png", history, mark_falls=checkpoint["args"]["sched"] == "multistep")


def is_best(history, key):
    values = [row[key] for row in history]
    return values[-1] is not None and values[-1] > max(values[:-1], default=-1)


def write_log(path, history):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def draw_curves(path, history, *, mark_falls):
    """Loss and accuracy against the epoch; with mark_falls a dotted line wherever the learning rate fell."""
    epochs = [row["epoch"] for row in history]
    falls = [row["epoch"] for before, row in itertools.pairwise(history) if mark_falls and row["lr"] < before["lr"]]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, quantity, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for split, colour in (("train", "C0"), ("val", "C2"), ("test", "C1")):
            values = [row[f"{split}_{quantity}"] for row in history]
            if values[-1] is not None:
                axes.plot(
                    epochs,
                    [scale * value for value in values],
                    colour,
                    label=split,
                    marker="." if len(epochs) < 30 else "",
                )
        for epoch in falls:
            axes.axvline(
                epoch - 0.5, color="grey", linestyle=":", label="learning rate fell" if epoch == falls[0] else None
            )
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    loss.set_ylabel("loss (cross entropy)")
    accuracy.set_ylabel("accuracy (%)")
    loss.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def write_split(path, dataset):
    """split.csv: which file went where."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "class", "split"))
    for key in ("train", "val", "test"):
        if split := getattr(dataset, key):
            writer.writerows(
                (name, dataset.classes[label], key) for name, label in zip(split.names, split.labels.tolist())
            )
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_predictions(path, *, logits, split, classes):
    """predictions.npz: logits (N, classes) float32, labels (N,), names (N,) of the test pictures, and classes."""
    arrays = {
        "logits": logits.cpu().numpy(),
        "labels": split.labels.numpy(),
        "names": split.names,
        "classes": np.array(classes),
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def git_commit(script):
    """(commit, whether the tree is clean) of the working folder, (None, None) where git does not know the script there."""

    def git(*command):
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", script)
        return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None, None


def finish_run(folder, *, script, args, model, model_name, dataset, test, history, precision, device):
    """Judge the last epoch's weights on the test pictures, write predictions.npz and result.json, say what there is.

    Returns what result.json holds; accuracies are fractions.
    """
    _, test_accuracy, logits = validate(model=model, batches=test, precision=precision)
    write_predictions(folder / "predictions.npz", logits=logits, split=dataset.test, classes=dataset.classes)
    at_best_val = None
    if (folder / "best.pt").exists():
        model.load_state_dict(open_checkpoint(folder / "best.pt", device)["weights"])
        _, at_best_val, _ = validate(model=model, batches=test, precision=precision)
    commit, clean = git_commit(script)
    result = {
        "script": script,
        "recipe": args["recipe"],
        "args": {name: value for name, value in args.items() if name not in PATH_FLAGS},
        "model": model_name,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "dataset_name": dataset.name,
        "pictures": {key: len(split.labels) for key in ("train", "val", "test") if (split := getattr(dataset, key))},
        "num_classes": len(dataset.classes),
        "data_hash": dataset.data_hash(),
        "epochs": len(history),
        "seed": args["seed"],
        "split_seed": args["split_seed"],
        "test_accuracy": test_accuracy,
        "val_accuracy": history[-1]["val_accuracy"],
        "test_accuracy_at_best_val": at_best_val,
        "best_on_test": max(
            (row["test_accuracy"] for row in history if row["test_accuracy"] is not None), default=None
        ),
        "weights": "raw",
        "precision": precision.amp,
        "seconds": sum(row["seconds"] for row in history),
        "images_per_second": statistics.median(row["images_per_second"] for row in history),
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device_name(device),
        "torch": torch.__version__,
        "commit": commit,
        "clean": clean,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_atomically(folder / "result.json", lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))
    print(f"test accuracy {test_accuracy:.2%} after epoch {len(history)}")
    if at_best_val is not None:
        print(f"test accuracy {at_best_val:.2%} at the best validation accuracy")
    if result["best_on_test"] is not None:
        print(f"best_on_test {result['best_on_test']:.2%} (chosen by looking at the test pictures: no result)")
    for path in sorted(folder.iterdir()):
        print(f"  {path}")
    print(f"draw its attention maps: python rollout.py {folder}")
    return result


def finished_result(folder):
    """A finished run's results, said and returned; None where it is not finished."""
    path = folder / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    print(f"{folder} is finished: test accuracy {result['test_accuracy']:.2%} after epoch {result['epochs']}")
    return result
