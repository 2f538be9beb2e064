"""What a run leaves behind to look at: log.csv, curves.png, split.csv, predictions.npz and result.json."""

import csv
import datetime
import io
import itertools
import math
import statistics
import subprocess
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from files import make_folder, write_atomically, write_json
from training.device import device_name, peak_memory_bytes
from training.flags import flag_kind
from training.optimizer import make_schedule
from training.ranks import rank_and_ranks, warn_of

COLUMNS = (  # of log.csv
    *("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy"),
    *("seconds", "images_per_second", "peak_memory_bytes"),
)
NAN_COUNTS = ("skipped_updates", "rollbacks")  # of --on-nan, also in the rows of a history if there were any


def print_header(args, precision):
    """The first lines of a run: its recipe, and what it runs on."""
    epochs = "1 epoch" if args.epochs == 1 else f"{args.epochs} epochs"
    print(f"recipe {args.recipe}: {args.dataset}, {epochs}, batch {args.batch_size}, lr {args.lr:g}")
    print(f"{device_name(precision.device)}, {precision.dtype}, torch {torch.__version__}")


def print_model(name, model, cells):
    """A model's size, and the grid of what it attends to: cells are its patches, tokens or positions."""
    print(f"{name}, {count_parameters(model):,} parameters, a grid of {model.grid[0]} x {model.grid[1]} {cells}")


def print_summary(table, args):
    """Print a model's table, and draw the learning rate of the run that the flags ask for to OUT_DIR/schedule.png."""
    print(table)
    path, steps = Path(args.out_dir, "schedule.png"), 50  # steps per epoch, enough for a smooth line
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr, momentum=0.9)
    schedule, rates = make_schedule(args, optimizer, steps_per_epoch=steps), []
    for _ in range(args.epochs * steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([step / steps for step in range(len(rates))], rates)
    axes.set(xlabel="epoch", ylabel="learning rate")
    axes.grid(alpha=0.3)
    make_folder(path.parent)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"its learning rate: {path}")


def epoch_line(row, epochs):
    """One aligned line for the terminal."""
    width = len(str(epochs))
    splits = "   ".join(
        f"{split} {row[f'{split}_loss']:.4f}" + ("" if (a := row[f"{split}_accuracy"]) is None else f" {a:7.2%}")
        for split in ("train", "val", "test")
        if row[f"{split}_loss"] is not None
    )
    speed = f"{row['seconds']:7.1f} s {row['images_per_second']:7,.0f} images/s"
    counts = "".join(f"   {name.replace('_', ' ')}: {row[name]}" for name in NAN_COUNTS if name in row)
    return f"epoch {row['epoch']:{width}}/{epochs}   lr {row['lr']:.2e}   {splits}   {speed}{counts}"


def warn_if_constant(run, split, logits=None):
    """Warn if logits (N, classes) name one class alone, and labels several; not in the first of several epochs."""
    one_class = logits is not None and len(logits.argmax(1).unique()) == 1
    if one_class and (run.epoch or run.args.epochs == 1) and len(run.dataset.splits()[split].labels.unique()) > 1:
        advice = "try a lower --lr, --clip-grad 1 or --class-weights balanced"
        warn_of(run, f"the model predicts the same class for every image; {advice}")


def largest_gradient(run):
    """What an error says of the last step's gradients: which has the largest element, of several infinite the last."""
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    if run.args.fsdp or not gradients:
        return ""
    sizes = torch.stack([gradient.abs().max() for gradient in gradients.values()])
    sizes = sizes.nan_to_num(math.inf, posinf=math.inf).tolist()
    size, _, name = max(zip(sizes, range(len(sizes)), gradients))
    return f"; at step {run.sums['step']} the largest gradient was {size:.2g}, of {name}"


def accuracy_text(result):
    """The accuracy of a finished run, or with --overfit how many images it learnt; of a generator, its loss."""
    if "test_accuracy" not in result:
        return f"training loss {result['train_loss']:.4f} after epoch {result['epochs']}"
    if result["test_accuracy"] is None:  # --skip-test
        return f"validation accuracy {result['val_accuracy']:.2%} after epoch {result['epochs']}, without a test"
    if not (count := result["args"].get("overfit")):
        accuracy, balanced = result["test_accuracy"], result.get("test_balanced_accuracy")  # older results have none
        differs = balanced is not None and not math.isclose(accuracy, balanced)  # so the classes are unbalanced
        recalls = f"; balanced accuracy {balanced:.2%}, the mean over classes" if differs else ""
        return f"test accuracy {accuracy:.2%} after epoch {result['epochs']}{recalls}"
    learnt = round(count * result["test_accuracy"])
    advice = "" if learnt == count else "; more --epochs or another --lr may do it, else look for a mistake"
    return f"{learnt} of {count} images learnt by heart{advice}"


def write_log(path, history):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def draw_curves(path, history, args):
    """Loss and accuracy against the epoch of a run with the arguments args; a dotted line where multistep acted.

    A training loss with label smoothing, mixed labels or weights, and an accuracy on mixed images, are other quantities
    than those on validation and test images: they have axes of their own.
    """
    epochs = [row["epoch"] for row in history]
    stepped = args.sched == "multistep"
    falls = [row["epoch"] for before, row in itertools.pairwise(history) if stepped and row["lr"] < before["lr"]]
    mixed, how = args.mixup or args.cutmix, f", label smoothing {args.smoothing:g}" if args.smoothing else ""
    how += (", mixed labels" if mixed else "") + (", classes weighted" if args.class_weights != "none" else "")
    other = {"train_loss": f"training loss{how}"} if how else {}
    other |= {"train_accuracy": "training accuracy on mixed images (%)"} if mixed else {}
    panels = [([name], label) for name, label in other.items()]
    generates = "noise_steps" in vars(args)
    for quantity, label in (("loss", "loss" if generates else "loss (cross entropy)"), ("accuracy", "accuracy (%)")):
        names = [f"{split}_{quantity}" for split in ("train", "val", "test")]
        panels += [(names, label)] if any(history[-1][name] is not None for name in names) else []
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (names, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in (n for n in names if history[-1][n] is not None and (n not in other or names == [n])):
            split, _, quantity = name.partition("_")
            values = [row[name] * (100 if quantity == "accuracy" else 1) for row in history]
            colour = {"train": "C0", "val": "C2", "test": "C1"}[split]
            axes.plot(epochs, values, colour, label=split, marker="." if len(epochs) < 30 else "")
        for epoch in falls:
            label_once = "learning rate fell" if epoch == falls[0] else None
            axes.axvline(epoch - 0.5, color="grey", linestyle=":", label=label_once)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def write_split(path, dataset):
    """Write split.csv: which image is in which split."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "class", "split"))
    for key, split in dataset.splits().items():
        writer.writerows((name, dataset.classes[y], key) for name, y in zip(split.names, split.labels.tolist()))
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_predictions(path, logits, dataset):
    """Write predictions.npz: logits (N, classes) float32, labels (N,), names (N,) of the test images, and classes."""
    labels, names = dataset.test.labels.numpy(), dataset.test.names
    arrays = {"logits": logits.cpu().numpy(), "labels": labels, "names": names, "classes": np.array(dataset.classes)}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def git_commit(script):
    """(commit, whether the tree is clean) of the working folder; (None, None) if git does not track the script."""

    def git(*command):
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", script)
        return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None, None


def count_parameters(model, leave_out=None):
    """The number of a model's parameters, without the one named leave_out."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name != leave_out)


def balanced_accuracy(logits, labels):
    """The mean recall of the classes that occur in labels (N,), for logits (N, classes)."""
    correct = logits.argmax(1).to(labels.device) == labels
    return statistics.fmean(correct[labels == label].double().mean().item() for label in labels.unique())


def write_result(run, **measured):
    """Write result.json: how a run was made, and what was measured; accuracies are fractions. Returns it as a dict."""
    args, history, dataset = vars(run.args), run.history, run.dataset
    commit, clean = git_commit(run.script)
    result = {
        "script": run.script,
        "recipe": args["recipe"],
        "args": {name: value for name, value in args.items() if flag_kind(name) == "run"},
        "model": args["model"],
        "init_from": Path(args["init_from"]).name if args.get("init_from") else None,
        "params": count_parameters(run.model),
        "trained_params": sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad),
        "params_without_embedding": count_parameters(run.model, leave_out="pos_embed"),
        "dataset_name": dataset.name,
        "images": {key: len(split.labels) for key, split in dataset.splits().items()},
        "num_classes": len(dataset.classes),
        "extra": run.extra_record,
        "data_hash": dataset.whole_hash or run.data_hashes["train"],  # folds of one set of images are one group
        "epochs": len(history),
        "seed": args["seed"],
        "split_seed": args["split_seed"],
        "val_accuracy": history[-1]["val_accuracy"],
        **measured,
        **{name: count for name in NAN_COUNTS if (count := sum(row.get(name, 0) for row in history))},
        "weights": "raw" if run.evaluated_model is run.model else run.average.kind,
        "ranks": rank_and_ranks()[1],
        "precision": run.precision.amp,
        "seconds": sum(row["seconds"] for row in history),
        "images_per_second": statistics.median(row["images_per_second"] for row in history),
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "device": device_name(run.device),
        "device_type": run.device.type,
        "torch": torch.__version__,
        "commit": commit,
        "clean": clean,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(run.folder / "result.json", result)
    return result
