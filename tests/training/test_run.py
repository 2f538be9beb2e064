import csv
import itertools
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import write_images
from matplotlib.figure import Figure

import train_vit
from data import load_dataset
from errors import UserError
from training.arguments import Start
from training.checkpoint import check_same_images, save_checkpoint
from training.device import Precision
from training.optimizer import multistep_schedule
from training.outputs import draw_curves, epoch_line
from training.run import Run, is_best


def history(*val_accuracies, lr=0.1):
    return [
        {
            "epoch": epoch + 1,
            "lr": lr if epoch < 3 else lr / 10,
            "train_loss": 2 / (epoch + 1),
            "train_accuracy": 0.3,
            "val_loss": 1.5,
            "val_accuracy": accuracy,
            "test_loss": None,
            "test_accuracy": None,
            "seconds": 61.23,
            "images_per_second": 812.3,
            "peak_memory_bytes": 10**9,
        }
        for epoch, accuracy in enumerate(val_accuracies)
    ]


PLAIN = {
    **{"smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": "none"},
    **{"model_ema_decay": 0.0, "swa_start": 0.0, "fsdp": False, "on_nan": "stop"},
}


def small_run(folder, **options):
    """A Run of one linear layer on nothing in particular."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = {
        "epochs": 9,
        "seed": 0,
        "image_size": 1,
        "channels": 3,
        "sched": "multistep",
        "save_epochs": [1, 3],
        "patience": None,
        "skip_test": False,
    }
    start = Start("train_vit.py", {"linear": ()}, Namespace(**PLAIN | args | {"model": "linear"} | options), folder)
    return Run(
        start,
        model,
        Namespace(classes=["a", "b"], mean=[0.5], std=[0.5], val=None, extra=None, splits=dict),
        optimizer=optimizer,
        schedule=multistep_schedule(optimizer, epochs=9, steps_per_epoch=1),
        precision=Precision("off", torch.device("cpu")),
    )


def end_epoch(run, *, writing_seconds=0.0, **scores):
    """End one; the writing before it took writing_seconds."""
    run.writing_seconds = writing_seconds
    run.sums |= {"images": 4, "seconds": 2.0, "lr": 0.1}
    run.trained_at = time.monotonic() - 0.5
    run.end_epoch(scores)


def test_patience_counts_epochs_since_the_best(tmp_path):
    def out(*accuracies, patience=2):
        run = small_run(tmp_path, patience=patience)
        run.history = history(*accuracies)
        return run.out_of_patience()

    assert not out() and not out(0.5, 0.4) and not out(0.5, 0.4, 0.6) and not out(0.5, 0.4, 0.3, patience=None)
    assert out(0.5, 0.4, 0.5)  # as good is not better


def test_an_epoch_keeps_the_checkpoints_that_it_earns(tmp_path):
    run = small_run(tmp_path)
    for accuracy in (0.4, 0.6, 0.5):
        end_epoch(run, val=(1.0, accuracy))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last.pt", "last.prev.pt", "best.pt", "epoch-1.pt", "epoch-3.pt", "log.csv", "curves.png"}
    assert torch.load(tmp_path / "best.pt")["epoch"] == 2 and torch.load(tmp_path / "epoch-1.pt")["epoch"] == 1
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["val_accuracy"] for row in rows] == ["0.4", "0.6", "0.5"] and rows[0]["test_loss"] == ""
    assert float(rows[2]["seconds"]) == pytest.approx(2.5, abs=0.3)
    assert rows[2]["images_per_second"] == "2.0" and rows[2]["lr"] == "0.1"


def test_killed_while_an_epoch_is_written_nothing_of_it_is_missed(tmp_path, monkeypatch):
    """last.pt says where to go on, so it comes after all that a resumed run would not write again."""
    run = small_run(tmp_path)
    end_epoch(run, val=(1.0, 0.4))

    def killed(path, checkpoint):
        if path.name == "last.pt":
            raise KeyboardInterrupt
        save_checkpoint(path, checkpoint)

    monkeypatch.setattr("training.run.save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        end_epoch(run, val=(1.0, 0.6))
    assert torch.load(tmp_path / "last.pt")["epoch"] == 1 and torch.load(tmp_path / "best.pt")["epoch"] == 2
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_short_epochs_are_written_together_and_each_as_it_was(tmp_path):
    run = small_run(tmp_path)
    end_epoch(run, val=(1.0, 0.4))
    for accuracy in (0.6, 0.5):
        run.model.weight.data.fill_(accuracy)
        end_epoch(run, val=(1.0, accuracy), writing_seconds=1000)
    run.model.weight.data.fill_(7)
    assert not (tmp_path / "epoch-3.pt").exists()
    assert torch.load(tmp_path / "last.pt")["epoch"] == torch.load(tmp_path / "best.pt")["epoch"] == 1
    run.write()
    for name, epoch, weight in (("best", 2, 0.6), ("epoch-3", 3, 0.5), ("last", 3, 7)):
        checkpoint = torch.load(tmp_path / f"{name}.pt")
        assert checkpoint["epoch"] == len(checkpoint["history"]) == epoch
        assert checkpoint["weights"]["weight"].item() == pytest.approx(weight)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4 and not run.unwritten


def test_the_last_epoch_is_written_however_short(tmp_path):
    run = small_run(tmp_path, epochs=2)
    for accuracy in (0.4, 0.6):
        end_epoch(run, val=(1.0, accuracy), writing_seconds=1000)
    assert torch.load(tmp_path / "last.pt")["epoch"] == torch.load(tmp_path / "best.pt")["epoch"] == 2


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    run = small_run(tmp_path)
    with pytest.raises(UserError, match="the val loss of epoch 1 is not finite"):
        end_epoch(run, val=(float("nan"), 0.1))
    assert not list(tmp_path.iterdir())


def test_best_means_strictly_better():
    assert is_best(history(0.4), "val_accuracy") and not is_best(history(0.4, 0.4), "val_accuracy")
    assert not is_best(history(0.4), "test_accuracy")


def test_curves_mark_where_the_learning_rate_fell(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    for mark in ("multistep", "cosine"):
        draw_curves(tmp_path / "curves.png", history(*np.linspace(0.2, 0.7, 6)), Namespace(sched=mark, **PLAIN))
    marked, plain = (figure.axes for figure in drawn)
    for axes, losses in ((marked, "loss"), (plain, "loss")):
        assert [line.get_label() for line in axes[0].lines][:2] == ["train", "val"] and losses in axes[0].get_ylabel()
    assert [line.get_xdata()[0] for line in marked[0].lines[2:]] == [3.5] and len(plain[0].lines) == 2
    assert marked[1].lines[1].get_ydata()[-1] == pytest.approx(70)


@pytest.mark.parametrize(
    ("quantities", "panels"),
    [
        ({}, {"loss (cross entropy)": ["train", "val"], "accuracy (%)": ["train", "val"]}),
        (
            {"smoothing": 0.1},
            {
                "training loss, label smoothing 0.1": ["train"],
                "loss (cross entropy)": ["val"],
                "accuracy (%)": ["train", "val"],
            },
        ),
        (
            {"class_weights": "balanced"},
            {
                "training loss, classes weighted": ["train"],
                "loss (cross entropy)": ["val"],
                "accuracy (%)": ["train", "val"],
            },
        ),
        (
            {"smoothing": 0.1, "mixup": 0.8},
            {
                "training loss, label smoothing 0.1, mixed labels": ["train"],
                "training accuracy on mixed images (%)": ["train"],
                "loss (cross entropy)": ["val"],
                "accuracy (%)": ["val"],
            },
        ),
    ],
)
def test_curves_that_share_axes_show_one_quantity(tmp_path, monkeypatch, quantities, panels):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    draw_curves(tmp_path / "curves.png", history(0.2, 0.7), Namespace(sched="cosine", **PLAIN | quantities))
    [figure] = drawn
    found = {axes.get_ylabel(): [line.get_label() for line in axes.lines] for axes in figure.axes}
    assert found == panels


def test_epoch_lines_are_aligned():
    rows = history(0.5, 1.0)
    rows[1]["epoch"], rows[1]["images_per_second"] = 100, 12345.6
    lines = [epoch_line(row, 100) for row in rows]
    assert len(lines[0]) == len(lines[1]) and "val 1.5000  50.00%" in lines[0]


def test_changed_images_are_refused_whatever_they_are_normalised_by(tmp_path):
    root, pets = tmp_path / "pets", [tmp_path / "pets" / split for split in ("train", "val", "test")]
    for number, split in enumerate(pets):
        write_images(split, count=3 + number)

    def run_on_images():
        dataset = load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache")
        hashes = {split: images.hash() for split, images in dataset.splits().items()}
        return Namespace(dataset=dataset._replace(mean=[0.5] * 3, std=[0.5] * 3), data_hashes=hashes)

    def swap(one, other):
        for path, target in ((one, root / "swap"), (other, one), (root / "swap", other)):
            path.rename(target)

    checkpoint = {"classes": ["cat", "dog"], "mean": [0.5] * 3, "std": [0.5] * 3}
    checkpoint["data_hashes"] = run_on_images().data_hashes
    check_same_images(checkpoint, run_on_images())
    for (split, word), (one, other) in itertools.product(
        zip(pets, ("training", "validation", "test")),
        (("cat", "dog"), ("cat/000.png", "dog/002.png")),
    ):
        swap(split / one, split / other)
        with pytest.raises(UserError, match=f"the {word} images are not those of the run to resume"):
            check_same_images(checkpoint, run_on_images())
        swap(split / one, split / other)
        check_same_images(checkpoint, run_on_images())
    del checkpoint["data_hashes"]  # as in an older checkpoint, of which mean and std alone are compared
    check_same_images(checkpoint, run_on_images())
    with pytest.raises(UserError, match="the training images are not those of the run to resume"):
        check_same_images(checkpoint | {"std": [0.4] * 3}, run_on_images())


def test_a_checkpoint_keeps_the_hashes_of_all_images(folder_flags, tmp_path):
    result = train_vit.main([*folder_flags, "--epochs", "1", "--val-fraction", "0.2"])
    hashes = torch.load(tmp_path / "runs/vit/last.pt")["data_hashes"]
    assert list(hashes) == ["train", "val", "test"] and len({*hashes.values()}) == 3
    assert hashes["train"] == result["data_hash"]
