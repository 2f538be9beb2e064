"""Training images in webdataset's shards: what is in them, in which order, on how many workers and ranks."""

import io
import re
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, same_weights, write_images
from PIL import Image

import train_vit
from data import count_classes, dataset_of, describe
from errors import UserError
from pipeline import shards
from pipeline.batches import training_batches

wds = pytest.importorskip("webdataset")


def write_shards(folder, *, train=6, per_shard=10):
    """Shards of images of one colour each: red is the number of the image, green that of its class."""
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    number = 0
    for split, shard_count in (("train", train), ("test", 2)):
        with wds.ShardWriter(f"{folder}/{split}-%03d.tar", maxcount=per_shard, verbose=0) as writer:
            for _ in range(shard_count * per_shard):
                label, file = number % 3, io.BytesIO()
                pixels = np.full((70 + number % 5, 80, 3), (number, 100 * label, 0), np.uint8)
                Image.fromarray(pixels).save(file, format="PNG")
                writer.write({"__key__": f"{number:05}", "png": file.getvalue(), "cls": label})
                number += 1
    return f"{folder}/train-{{000..{train - 1:03}}}.tar::{folder}/test-{{000..001}}.tar"


def test_the_code_of_the_docs_writes_them(tmp_path, monkeypatch):
    text = Path("docs/your-images.md").read_text()
    code = dedent(re.search(r"^    # shards of a thousand.*?\n\n", text, re.M | re.S)[0])
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write_images(Path("photos", split), count=8, size=(80, 70), suffix=".jpg")
    exec(code.replace("maxcount=1000", "maxcount=4"), {})
    dataset = dataset_of(flags("shards/train-{000..003}.tar::shards/test-{000..003}.tar"))
    assert dataset.classes == ["cat", "dog"] and dataset.test.labels.bincount().tolist() == [8, 8]
    for image, label in zip(dataset.test.images, dataset.test.labels.tolist(), strict=True):
        assert image.float().mean((1, 2)).argmax() == label  # each class is of one colour
    assert len(dataset.train.urls) == 4


def flags(pattern, **others):
    values = {"dataset": "webdataset", "data_dir": pattern, "dataset_name": None, "image_size": 66, "channels": 3}
    values |= {"crop_pct": 1.0, "epoch_images": 60, "batch_size": 8, "seed": 0, "workers": 0, "drop_last": False}
    values |= {"scale": None, "ratio": None, "aa": "none", "fill": 0, "hflip": 0, "crop_padding": 0, "rotate": 0}
    return SimpleNamespace(**values | {"reprob": 0, "cutout": 0, "mixup": 0, "cutmix": 0} | others)


def seen(batches, epoch=0, start_step=0):
    """[(number, label) of each image] of each batch."""
    found = []
    for images, labels in batches.batches(epoch, start_step):
        pixels = (images * batches.std[:, None, None] + batches.mean[:, None, None]) * 255
        numbers = pixels[:, 0].mean((1, 2)).round().int()
        assert torch.equal((pixels[:, 1].mean((1, 2)) / 100).round().long(), labels)
        found.append(numbers.tolist())
    return found


def batches_of(pattern, **others):
    args = flags(pattern, **others)
    return training_batches(dataset_of(args), args, torch.device("cpu"))


def test_the_images_and_their_classes(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "shards")
    assert count_classes("webdataset", pattern) == 3
    dataset = dataset_of(flags(pattern))
    assert dataset.classes == ["ant", "bee", "cat"] and dataset.val is None
    assert dataset.test.images.shape == (20, 3, 66, 66)
    assert dataset.test.labels.tolist() == [number % 3 for number in range(60, 80)]
    assert dataset.test.names[:2].tolist() == ["test-000.tar/00060.png", "test-000.tar/00061.png"]
    assert dataset.mean[0] == pytest.approx(29.5 / 255) and dataset.mean[2] == 0
    monkeypatch.setattr(shards, "FIRST", 10)
    assert dataset_of(flags(pattern)).mean[0] == pytest.approx(4.5 / 255)  # images 0 to 9
    assert describe(dataset).startswith(
        "train      60 images per epoch, of 6 shards\ntest       20 images: ant 7, bee 7"
    )


def test_an_epoch_has_each_image_once_in_an_order_of_its_own(tmp_path):
    batches = batches_of(write_shards(tmp_path / "shards"))
    first, second = seen(batches), seen(batches, 1)
    assert batches.steps_per_epoch == 8 and [len(batch) for batch in first] == [8] * 7 + [4]
    assert sorted(sum(first, [])) == list(range(60)) != sum(first, [])
    assert first != second and seen(batches) == first
    other = batches_of(tmp_path.joinpath("shards").as_posix() + "/{train-{000..005},test-{000..001}}.tar", seed=1)
    assert seen(other) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_a_long_epoch_reads_the_shards_again(tmp_path, workers):
    pattern = write_shards(tmp_path / "shards", train=4)
    for times in (1, 2):
        batches = batches_of(pattern, epoch_images=40 * times, batch_size=10, workers=workers)
        assert sorted(sum(seen(batches), [])) == sorted([*range(40)] * times)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_stop_does_not_change_the_order(tmp_path, workers):
    pattern = write_shards(tmp_path / "shards")
    crops = {"scale": [0.3, 1.0], "hflip": 0.5, "seed": 5, "workers": workers}
    whole, stopped = batches_of(pattern, **crops), batches_of(pattern, **crops)
    for epoch, start_step in ((0, 0), (1, 4), (1, 4), (2, 3)):
        pairs = zip([*whole.batches(epoch)][start_step:], stopped.batches(epoch, start_step), strict=True)
        assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in pairs)
    plain = batches_of(pattern, workers=workers)
    assert (seen(plain) == seen(batches_of(pattern))) is (workers < 2)  # two workers read other shards first


def test_each_worker_reads_shards_of_its_own(tmp_path):
    batches = seen(batches_of(write_shards(tmp_path / "shards", train=4), epoch_images=40, batch_size=10, workers=9))
    assert [len({number // 10 for number in batch}) for batch in batches] == [1] * 4  # four shards: four workers
    assert sorted(sum(batches, [])) == list(range(40))


def test_ranks_share_the_shards_and_take_the_same_number_of_steps(tmp_path, monkeypatch):
    pattern, found = write_shards(tmp_path / "shards", train=5), []
    monkeypatch.setattr(shards.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(shards.distributed, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(shards.distributed, "get_rank", lambda rank=rank: rank)
        batches = batches_of(pattern, epoch_images=50)
        found.append(seen(batches))
        assert batches.steps_per_epoch == len(found[-1]) == 7 and [len(b) for b in found[-1]] == [4] * 6 + [1]
    assert not set(sum(found[0], [])) & set(sum(found[1], []))
    monkeypatch.setattr(shards.distributed, "get_world_size", lambda: 6)
    with pytest.raises(UserError, match="5 shards are too few for 6 processes"):
        batches_of(pattern)


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "shards")
    run = ["--dataset", "webdataset", "--data-dir", pattern, "--epoch-images", "40", "--recipe", "quick", *TINY]
    run += ["--image-size", "16", "--epochs", "2", "--batch-size", "8", "--workers", "2", "--out-dir", str(tmp_path)]
    whole = train_vit.main([*run, "--run-name", "whole"])
    assert whole["images"] == {"train": 40, "test": 20} and whole["dataset_name"] == "webdataset"
    assert train_vit.main([*run, "--run-name", "part", "--minutes", "1e-9"]) is None
    moved = Path(str(tmp_path / "shards")).rename(tmp_path / "moved")
    pattern = pattern.replace("/shards/", f"/{moved.name}/")
    resume = ["--resume", str(tmp_path / "part"), "--data-dir", pattern]
    with pytest.raises(UserError, match="is another run: --workers is 2 there and 3 here"):
        train_vit.main([*resume, "--workers", "3"])
    part = train_vit.main(resume)
    assert part["test_accuracy"] == whole["test_accuracy"]
    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "part" / "last.pt")


def test_mistakes_are_named(tmp_path):
    pattern = write_shards(tmp_path / "shards")
    folder = tmp_path / "shards"

    def said(pattern=pattern, **others):
        with pytest.raises(UserError) as raised:
            seen(batches_of(pattern, **others))
        return str(raised.value)

    assert re.search("no file with test in its name, as in test-{000..099}.tar", said(f"{folder}/train-000.tar"))
    assert re.search("pipe:cat: shards are files, or addresses that begin", said(f"pipe:cat::{pattern}"))
    assert re.search("a shard cannot be read .*train-007.tar", said(f"{folder}/train-007.tar::{pattern}"))
    (folder / "train-001.tar").write_bytes((folder / "train-001.tar").read_bytes()[:3000])
    assert "a shard cannot be read" in said(workers=1)
    (folder / "classes.txt").write_text("ant\nbee")
    assert re.search(r"test-000.tar/00062 must have an image, as .jpg, and a number below 2 as .cls", said())
    (folder / "classes.txt").unlink()
    assert re.search("classes.txt cannot be read .*: a line for the name of class 0", said())
    for extra in (["--overfit", "3"], ["--val-fraction", "0.1"], ["--class-weights", "balanced"]):
        with pytest.raises(UserError, match="has no effect here: it needs images that are not in shards"):
            train_vit.main(["--dataset", "webdataset", "--data-dir", pattern, "--epoch-images", "9", *extra])
    with pytest.raises(UserError, match="needs --data-dir, --epoch-images and a square --image-size"):
        train_vit.main(["--dataset", "webdataset", "--data-dir", pattern])
