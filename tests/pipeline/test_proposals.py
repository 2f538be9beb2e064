"""What --data-dir alone means, and what the images in it propose."""

from pathlib import Path

import pytest
from conftest import write_images

import train_cct
import train_resnet_attn
import train_vit
from errors import UserError
from pipeline.proposals import implied_dataset, proposals_of_images


@pytest.fixture
def datasets(tmp_path):
    """A folder of datasets, as datasets/ is: no photographs."""
    root = tmp_path / "datasets"
    for split in ("train", "test"):
        write_images(root / "cifar100" / split, count=1)
        write_images(root / "imagewoof" / split, count=1)
    (root / "cifar-10-batches-py").mkdir()
    return root


def implied(root, **given):
    return implied_dataset({"data_dir": str(root)} | given)


def test_a_folder_of_class_folders_is_meant_by_its_name_alone(tmp_path, datasets):
    assert implied(write_images(tmp_path / "pets")) == "folder"
    write_images(tmp_path / "split" / "Training")
    assert implied(tmp_path / "split") == "folder"
    assert implied(tmp_path / "pets", dataset="cifar10") == "cifar10"
    assert implied_dataset({}) is implied_dataset({"data_dir": None}) is None
    assert implied(tmp_path / "nowhere", dataset="cifar10") == "cifar10"
    with pytest.raises(UserError, match="nowhere: there is no such folder; to download images to it, add --dataset"):
        implied(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert implied(tmp_path / "empty") is None
    assert implied(datasets) is None and implied(datasets / "imagewoof") == "folder"
    write_images(datasets, classes=("previews",))
    assert implied(datasets) is None


@pytest.mark.parametrize(
    ("size", "image_size"), [((48, 60), 32), ((200, 49), 64), ((128, 128), 64), ((129, 200), 96), ((640, 480), 96)]
)
def test_the_image_size_follows_from_the_short_side(tmp_path, capsys, size, image_size):
    root = write_images(tmp_path / "pets", size=size, count=3)
    found = proposals_of_images({"data_dir": root})
    assert found["image_size"] == image_size and ("scale" in found) == (image_size > 64)
    line = capsys.readouterr().out
    assert line.startswith(f"your images are about {size[0]} x {size[1]} pixels: --image-size {image_size}")


def test_a_size_that_is_given_is_kept_and_own_validation_images_are_used(tmp_path, capsys):
    for split in ("train", "val", "test"):
        write_images(tmp_path / "pets" / split, size=(300, 200), count=1)
    given = {"data_dir": tmp_path / "pets", "image_size": 32}
    assert proposals_of_images(given) == {"val_fraction": 0.0} and not capsys.readouterr().out
    assert proposals_of_images(given | {"image_size": 72})["scale"] == [0.35, 1.0]
    assert proposals_of_images(given | {"dataset": "cifar10"}) == proposals_of_images({"data_dir": None}) == {}
    with pytest.raises(UserError, match="there is no such folder"):
        proposals_of_images({"data_dir": tmp_path / "nowhere"})


def test_the_recipe_of_a_folder(tmp_path, datasets):
    given = {"data_dir": str(write_images(tmp_path / "pets", count=1))}
    name, values = train_cct.chosen_recipe(given)
    assert (name, values["dataset"], values["image_size"], values["val_fraction"]) == ("photos", "folder", 32, 0.2)
    assert train_cct.chosen_recipe(given | {"dataset": "folder"})[0] == "photos"
    assert train_cct.chosen_recipe(given | {"recipe": "strong"})[1] == train_cct.STRONG | {"dataset": "folder"}
    assert train_cct.chosen_recipe({"data_dir": str(datasets)}) == ("report", train_cct.REPORT)
    for script, recipe in ((train_vit, "report"), (train_resnet_attn, "survey")):
        name, values = script.chosen_recipe(given)
        assert name == recipe and values["dataset"] == "folder"
        assert script.chosen_recipe({"data_dir": str(datasets)})[1]["dataset"] == "cifar10"


def test_the_shortest_command_trains(tmp_path, capsys):
    """Photographs of which the model sees crops; a val/ that stands alone is the test set, and that is said."""
    for split, count in (("train", 5), ("val", 2)):
        write_images(tmp_path / "pets" / split, size=(150, 130), count=count, suffix=".jpg")
    flags = ["--out-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache"), "--device", "cpu"]
    result = train_cct.main(["--data-dir", str(tmp_path / "pets"), "--epochs", "1", *flags])
    out = capsys.readouterr().out
    assert "--image-size 96" in out and "pets has no test/: val/ is the test set\n" in out
    assert result["images"] == {"train": 8, "val": 2, "test": 4} and result["args"]["image_size"] == 96
    assert result["recipe"] == "photos" and Path(tmp_path / "runs" / "cct_2_3x2" / "split.csv").exists()
