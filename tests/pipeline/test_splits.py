"""Splits by group, and folds."""

import csv
import itertools
import re

import numpy as np
import pytest
import torch
from conftest import TINY, error_line, run_train_vit, write_images

import compare
import train_vit
from data import Split, load_dataset
from errors import UserError
from experiments.runs import own_groups
from pipeline.splits import group_numbers, place_groups, split_by_class
from training.checkpoint import load_checkpoint


def write_shots(root, objects=10, shots=(1, 2, 3, 4)):
    """Photos cat/OBJECT-SHOT.png and dog/OBJECT-SHOT.png, from 1 to 4 of an object, which is of both classes."""
    write_images(root, classes=("cat", "dog"), count=objects * max(shots))
    for folder in (root / "cat", root / "dog"):
        files = iter(sorted(folder.iterdir()))
        for number, count in zip(range(objects), itertools.cycle(shots)):
            for shot in range(count):
                next(files).rename(folder / f"{number:02}-{shot}.png")
        for file in files:
            file.unlink()
    return root


def objects_of(split):
    return {re.search(r"(\d+)-", name)[1] for name in split.names}


def test_the_text_of_a_group_is_its_first_parentheses_or_the_whole_match():
    names = ["cat/7-a.png", "cat/7-b.png", "dog/7-a.png", "dog/8-a.png"]
    assert group_numbers(names, r"(\d+)-").tolist() == [0, 0, 0, 1]  # across classes
    assert group_numbers(names, r"/\d+").tolist() == [0, 0, 0, 1]
    assert group_numbers(names, r"(\w+/\d+)-").tolist() == [0, 0, 1, 2]  # within a class
    assert group_numbers(names, r"^(\w+)/(\d+)").tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"--group-by 8: it finds nothing in cat/7-a.png"):
        group_numbers(names, "8")
    with pytest.raises(UserError, match=r"finds nothing in dog/7-a.png"):
        group_numbers(names, r"cat(/)|dog")
    with pytest.raises(UserError, match=r"--group-by \(: not a regular expression \(missing \), unterminated"):
        group_numbers(names, "(")


@pytest.mark.parametrize("seed", range(20))
def test_groups_come_near_the_fraction(seed):
    """At most three images from the nearest size that any choice of groups has; images alone give it exactly."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, rng.integers(4, 11))
    parts = place_groups(sizes[:, None], np.array([0.2, 0.8]), rng)
    choices = (sum(c) for n in range(1, len(sizes)) for c in itertools.combinations(sizes.tolist(), n))
    nearest = min(abs(size - 0.2 * sizes.sum()) for size in choices)
    assert abs(sizes[parts == 0].sum() - 0.2 * sizes.sum()) <= nearest + 3
    alone = place_groups(np.repeat(np.eye(3, dtype=int), (50, 20, 10), 0), np.array([0.2, 0.8]), rng)
    assert [alone[:50].tolist().count(0), alone[50:70].tolist().count(0), alone[70:].tolist().count(0)] == [10, 4, 2]


def test_a_class_of_few_groups_is_in_every_part():
    parts = place_groups(np.array([[6], [5], [4]]), np.array([0.2, 0.8]), np.random.default_rng(0))
    assert parts.tolist() == [1, 1, 0]
    parts = place_groups(np.array([[90], [1], [2], [1], [3]]), np.full(5, 0.2), np.random.default_rng(0))
    assert sorted(parts) == [0, 1, 2, 3, 4]


def test_every_split_keeps_objects_together_and_follows_the_seed(tmp_path):
    root = write_shots(tmp_path / "pets", objects=20)
    options = {"data_dir": root, "image_size": 8, "cache_dir": tmp_path / "cache", "val_fraction": 0.25}
    dataset = load_dataset("folder", **options, group_by=r"/(\d+)-")
    train, val, test = (objects_of(split) for split in (dataset.train, dataset.val, dataset.test))
    assert not train & val and not train & test and not val & test and len(train | val | test) == 20
    assert [split.labels.bincount().tolist() for split in (dataset.test, dataset.val)] == [[10, 10], [10, 10]]
    again = load_dataset("folder", **options, group_by=r"/(\d+)-")
    other = load_dataset("folder", **options, group_by=r"/(\d+)-", split_seed=1)
    assert again.test.names.tolist() == dataset.test.names.tolist() and objects_of(other.test) != test
    with pytest.raises(
        UserError, match=r"--test-fraction 0.2 with --group-by cat\|dog leaves a split without class cat"
    ):
        load_dataset("folder", **options, group_by="cat|dog")


def test_splits_of_its_own_are_kept_and_the_validation_images_grouped(tmp_path):
    for split in ("train", "test"):
        write_shots(tmp_path / "pets" / split)
    options = {"data_dir": tmp_path / "pets", "image_size": 8, "cache_dir": tmp_path / "cache"}
    dataset = load_dataset("folder", **options, group_by=r"(\d+)-", val_fraction=0.2)
    assert not objects_of(dataset.train) & objects_of(dataset.val) and len(dataset.test.names) == 46
    with pytest.raises(UserError, match="--group-by x: pets has test images of its own, and there is no --val-fr"):
        load_dataset("folder", **options, group_by="x")
    with pytest.raises(UserError, match="--folds 5: pets has test images of its own"):
        load_dataset("folder", **options, folds=5)


@pytest.mark.parametrize("group_by", [None, r"/(\d+)-"])
@pytest.mark.parametrize("image_size", [8, 72])
def test_each_image_is_tested_on_once_in_k_folds(tmp_path, group_by, image_size):
    root = write_shots(tmp_path / "pets", objects=20)
    options = {"data_dir": root, "image_size": image_size, "cache_dir": tmp_path / "cache", "val_fraction": 0.2}
    folds = [load_dataset("folder", **options, folds=5, seed=s, group_by=group_by) for s in (10, 1, 2, 3, 4)]
    tested = sum((fold.test.names.tolist() for fold in folds), [])
    assert len(tested) == len(set(tested)) == 100
    for fold in folds:
        assert fold.test.labels.bincount().tolist() == [10, 10]
        names = [name for split in fold.splits().values() for name in split.names]
        assert len(names) == len(set(names)) == 100 and len(fold.val.names) == pytest.approx(16, abs=2)
        if group_by:
            assert not objects_of(fold.test) & (objects_of(fold.train) | objects_of(fold.val))
    assert len({fold.whole_hash for fold in folds}) == 1 and len({fold.train.hash() for fold in folds}) == 5
    other = load_dataset("folder", **options, folds=5, seed=0, group_by=group_by, split_seed=1)
    assert set(other.test.names) != set(folds[0].test.names) and other.whole_hash == folds[0].whole_hash
    write_images(root, classes=("cat",), count=1)  # another image: no longer one set
    (root / "cat" / "000.png").rename(root / "cat" / "30-0.png")
    assert load_dataset("folder", **options, folds=5, group_by=group_by).whole_hash != other.whole_hash


def test_folds_of_uneven_classes_are_balanced_and_of_one_size():
    labels = torch.tensor(sum(([label] * count for label, count in enumerate((11, 11, 11, 13, 6))), []))
    split = Split(torch.zeros(52), labels, np.arange(52))
    options = {"seed": 0, "flag": "--folds"}
    folds = [split_by_class(split, 5, list("abcde"), part=part, **options)[0] for part in range(5)]
    assert sorted(sum((fold.names.tolist() for fold in folds), [])) == list(range(52))
    counts = np.array([fold.labels.bincount(minlength=5).tolist() for fold in folds])
    assert (np.ptp(counts, axis=0) <= 1).all() and np.ptp(counts.sum(1)) <= 1
    with pytest.raises(UserError, match=r"--folds 7 leaves a split without class e \(images: 6, groups: 6\)"):
        split_by_class(split, 7, list("abcde"), **options)


def test_folds_are_one_group_of_runs(tmp_path, capsys):
    root = write_images(tmp_path / "pets", count=10)
    flags = ["--recipe", "quick", "--data-dir", str(root), "--cache-dir", str(tmp_path / "cache"), *TINY]
    flags += ["--epochs", "1", "--folds", "2", "--out-dir", str(tmp_path / "runs")]
    results = [train_vit.main([*flags, "--seed", str(s), "--run-name", f"a-seed-{s}"]) for s in (0, 1)]
    assert results[0]["data_hash"] == results[1]["data_hash"] and results[0]["images"]["test"] == 10
    [group] = own_groups([tmp_path / "runs"])
    assert [run.result["seed"] for run in group.runs] == [0, 1]
    capsys.readouterr()
    compare.main([str(tmp_path / "runs")])
    mean = sum(result["test_accuracy"] for result in results) / 2
    assert re.search(rf" {mean:.2%}".replace("%", "") + r" ± \d+\.\d\d %.* 2  ", capsys.readouterr().out)
    tested = []
    for seed in (0, 1):
        with (tmp_path / "runs" / f"a-seed-{seed}" / "split.csv").open() as file:
            tested += [row["file"] for row in csv.DictReader(file) if row["split"] == "test"]
    assert len(set(tested)) == 20
    assert load_checkpoint(tmp_path / "runs" / "a-seed-1")["args"]["folds"] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--group-by", "("], "--group-by (: not a regular expression (missing )"),
        (["--folds", "21"], "--folds 21 leaves a split without class ant (images: 20, groups: 20)"),
        (
            ["--folds", "2", "--test-fraction", "0.3"],
            "--test-fraction has no effect here: it needs --dataset folder, w",
        ),
        (["--folds", "1"], "argument --folds: must be at least 2, not 1"),
    ],
)
def test_mistakes_are_named(folder_flags, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        train_vit.main([*folder_flags, *flags])


def test_a_file_that_does_not_match_is_one_line(folder_flags):
    line = error_line(run_train_vit(*folder_flags, "--group-by", "nothing"))
    assert line == "error: --group-by nothing: it finds nothing in ant/000.png"


@pytest.mark.parametrize("flag", ["--folds=2", "--group-by=x"])
def test_they_need_a_folder(flag):
    with pytest.raises(UserError, match="has no effect here: it needs --dataset folder"):
        train_vit.main(["--dataset", "shapes", flag])
