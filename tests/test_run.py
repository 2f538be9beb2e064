import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from errors import UserError
from training.run import choose_folder, draw_curves, epoch_line, is_best, out_of_patience, prepare_folder, write_epoch


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


def choose(tmp_path, **given):
    return choose_folder(given, default_name="vit", default_dir=tmp_path)


def test_runs_are_numbered_until_a_name_is_free(tmp_path):
    assert choose(tmp_path) == (tmp_path / "vit", False)
    for name in ("vit", "vit-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
    assert choose(tmp_path) == (tmp_path / "vit-3", False)
    assert choose(tmp_path, resume="auto") == (tmp_path / "vit", True)
    assert choose(tmp_path, resume=str(tmp_path / "vit-2")) == (tmp_path / "vit-2", True)
    assert choose(tmp_path, resume="auto", run_name="new") == (tmp_path / "new", False)
    assert choose(tmp_path, overwrite=True) == (tmp_path / "vit", False)
    assert choose(tmp_path, out_dir=str(tmp_path / "mounted"), run_name="a") == (tmp_path / "mounted" / "a", False)
    with pytest.raises(UserError, match="--run-name vit: .* exists; --resume .* --overwrite"):
        choose(tmp_path, run_name="vit")
    with pytest.raises(UserError, match="--resume .*nothing: there is no last.pt"):
        choose(tmp_path, resume=str(tmp_path / "nothing"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written"):
        prepare_folder(tmp_path / "file" / "run", resuming=False)


def test_a_replaced_run_leaves_only_what_no_run_wrote(tmp_path):
    for name in ("last.pt", "epoch-3.pt", "result.json", "notes.txt"):
        (tmp_path / name).touch()
    prepare_folder(tmp_path, resuming=True)
    assert len(list(tmp_path.iterdir())) == 4
    prepare_folder(tmp_path, resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_patience_counts_epochs_since_the_best():
    assert not out_of_patience(history(0.5, 0.4), 2)
    assert out_of_patience(history(0.5, 0.4, 0.5), 2)  # as good is not better
    assert not out_of_patience(history(0.5, 0.4, 0.6), 2)
    assert not out_of_patience(history(0.5, 0.4, 0.3), None)


def test_an_epoch_keeps_the_checkpoints_that_it_earns(tmp_path):
    checkpoint = {"args": {"sched": "multistep"}, "history": []}
    for accuracy in (0.4, 0.6, 0.5):
        checkpoint["history"] = history(*[row["val_accuracy"] for row in checkpoint["history"]], accuracy)
        write_epoch(tmp_path, checkpoint, save_epochs=[1, 3])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"last.pt", "last.prev.pt", "best.pt", "epoch-1.pt", "epoch-3.pt", "log.csv", "curves.png"}
    import torch

    assert len(torch.load(tmp_path / "best.pt")["history"]) == 2
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,lr,train_loss,train_accuracy,val_loss") and lines[3].startswith("3,0.1,")


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    checkpoint = {"args": {"sched": "multistep"}, "history": history(0.4)}
    checkpoint["history"][0]["val_loss"] = float("nan")
    with pytest.raises(UserError, match="the val loss after epoch 1 is not finite"):
        write_epoch(tmp_path, checkpoint)
    assert not list(tmp_path.iterdir())


def test_best_means_strictly_better():
    assert is_best(history(0.4), "val_accuracy") and not is_best(history(0.4, 0.4), "val_accuracy")
    assert not is_best(history(0.4), "test_accuracy")


def test_curves_mark_where_the_learning_rate_fell(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    for mark in (True, False):
        draw_curves(tmp_path / "curves.png", history(*np.linspace(0.2, 0.7, 6)), mark_falls=mark)
    marked, plain = (figure.axes for figure in drawn)
    for axes, losses in ((marked, "loss"), (plain, "loss")):
        assert [line.get_label() for line in axes[0].lines][:2] == ["train", "val"] and losses in axes[0].get_ylabel()
    assert [line.get_xdata()[0] for line in marked[0].lines[2:]] == [3.5] and len(plain[0].lines) == 2
    assert marked[1].lines[1].get_ydata()[-1] == pytest.approx(70)


def test_epoch_lines_are_aligned():
    rows = history(0.5, 1.0)
    rows[1]["epoch"], rows[1]["images_per_second"] = 100, 12345.6
    lines = [epoch_line(row, 100) for row in rows]
    assert len(lines[0]) == len(lines[1]) and "val 1.5000  50.00%" in lines[0] and json.dumps(lines[0])
