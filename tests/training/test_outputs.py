"""What is printed and written at the end of a run."""

import numpy as np
import pytest
import torch
from conftest import TINY, write_images

import train_vit
from training.outputs import accuracy_text, balanced_accuracy


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_occur():
    """As scikit-learn's balanced_accuracy_score: here (3/4 + 1/2 + 0/1) / 3, and class 3 has no image."""
    labels, predicted = torch.tensor([0, 0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 3, 1, 2, 0])
    assert balanced_accuracy(torch.eye(4)[predicted], labels) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3, abs=1e-15)
    always = torch.eye(4)[torch.zeros(7, dtype=torch.long)]
    assert balanced_accuracy(always, labels) == pytest.approx(1 / 3)  # and an accuracy of 4/7
    assert balanced_accuracy(always, torch.tensor([0, 1, 2, 3] * 5).roll(1)[:7]) == pytest.approx(1 / 4)


def test_a_run_on_unbalanced_classes_prints_it_and_one_on_balanced_classes_does_not(tmp_path, capsys):
    where = ["--out-dir", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), "--epochs", "1", *TINY]
    root = write_images(tmp_path / "pets", classes=("ant",), count=40)
    write_images(root, classes=("bee", "cat"), count=5)
    flags = ["--recipe", "quick", "--data-dir", str(root), "--lr", "1e-9", "--run-name"]
    result = train_vit.main([*flags, "rare", *where])
    saved = np.load(tmp_path / "rare" / "predictions.npz")
    recalls = [(saved["logits"].argmax(1) == y)[saved["labels"] == y].mean() for y in range(3)]
    assert result["images"]["test"] == 10 and result["test_balanced_accuracy"] == pytest.approx(np.mean(recalls))
    ending = f"; balanced accuracy {result['test_balanced_accuracy']:.2%}, the mean over classes\n"
    assert f"test accuracy {result['test_accuracy']:.2%} after epoch 1{ending}" in capsys.readouterr().out
    weighted = train_vit.main([*flags, "weighted", "--class-weights", "balanced", *where])
    assert weighted["args"]["class_weights"] == "balanced"
    write_images(root, classes=("bee", "cat"), count=40)
    even = train_vit.main([*flags, "even", *where])
    assert even["test_balanced_accuracy"] == pytest.approx(even["test_accuracy"])
    assert "balanced accuracy" not in capsys.readouterr().out.split("after epoch 1")[-1]
    del even["test_balanced_accuracy"]  # an older result
    assert accuracy_text(even) == f"test accuracy {even['test_accuracy']:.2%} after epoch 1"
