"""Images of one channel, and images that are not square, through the scripts and their maps; and --overfit."""

import numpy as np
import pytest
import torch
from conftest import TINY, write_images
from PIL import Image

import attribute
import rollout
import train_cct
import train_resnet_attn
import train_vit
from data import load_dataset
from errors import UserError
from maps.images import photographs
from models import build_model
from models.pretrained import resize_positions
from training.checkpoint import load_checkpoint
from training.values import pixels

SMALL = {
    train_vit: [*TINY, "--patch-size", "8"],
    train_cct: ["--model", "cct_2_3x2", "--device", "cpu"],
    train_resnet_attn: ["--width", "4", "--attention", "graph", "--num-heads", "2", "--device", "cpu"],
}
EVERYTHING = [
    *("--crop-padding", "2", "--scale", "0.5", "1", "--rotate", "10"),
    *("--reprob", "0.5", "--cutout", "4", "--mixup", "0.8", "--cutmix", "1"),
]


STREAMED = ["--cache-gib", "0", "--workers", "0"]


@pytest.fixture
def flags(image_folder, tmp_path):
    where = ["--dataset", "folder", "--data-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache")]
    return [*where, "--out-dir", str(tmp_path / "runs"), "--run-name", "run", "--epochs", "1", "--batch-size", "16"]


@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("policy", ["auto", "rand", "trivial"])
def test_grey_and_oblong_images_with_every_augmentation(script, policy, flags, tmp_path):
    script.main([*flags, *SMALL[script], *EVERYTHING, "--channels", "1", "--image-size", "16x40", "--aa", policy])
    checkpoint = load_checkpoint(tmp_path / "runs" / "run")
    assert checkpoint["image_size"] == [16, 40] and len(checkpoint["mean"]) == len(checkpoint["std"]) == 1
    assert checkpoint["model_args"]["in_channels"] == checkpoint["args"]["channels"] == 1
    assert script.main(["--resume", str(tmp_path / "runs" / "run")])["args"]["image_size"] == [16, 40]
    with pytest.raises(UserError, match="--channels is 1 there and 3 here"):
        script.main(["--resume", str(tmp_path / "runs" / "run"), "--channels", "3"])


@pytest.mark.parametrize("script", SMALL)
def test_a_run_on_them_resumes_within_an_epoch(script, flags, tmp_path):
    flags = [*flags, *SMALL[script], "--channels", "1", "--image-size", "16x40"]
    assert script.main([*flags, "--minutes", "0.0001"]) is None
    result = script.main(["--resume", str(tmp_path / "runs" / "run")])
    whole = script.main([*flags, "--run-name", "whole"])
    assert result["test_accuracy"] == whole["test_accuracy"] and result["args"]["image_size"] == [16, 40]


@pytest.mark.parametrize("size", ["24x40", "72"])
def test_their_maps_are_drawn(size, flags, tmp_path):
    """72 pixels are crops of large images."""
    Image.new("RGB", (300, 200), (200, 10, 10)).save(tmp_path / "photo.jpg")
    train_vit.main([*flags, *SMALL[train_vit], "--channels", "1", "--image-size", size])
    run = str(tmp_path / "runs" / "run")
    written = rollout.main([run, "--index", "0", "1", "--split", "train", "--patches", "--layers"])
    written += rollout.main([run, "--image", str(tmp_path / "photo.jpg")])
    assert all(path.exists() for path in written)
    side = {"24x40": (3, 5), "72": (9, 9)}[size]
    assert np.load(tmp_path / "runs" / "run" / "maps" / "photo-rollout.npy").shape == side
    attribute.main([run, "--index", "0", "--method", "occlusion"])
    rollout.main([run, "--evaluate", "--num-images", "4", "--method", "raw"])
    (photo,) = photographs([tmp_path / "photo.jpg"], load_checkpoint(run))
    assert photo.shown.shape == {"24x40": (154, 256, 1), "72": (256, 256, 1)}[size]
    assert photo.pixels.shape == {"24x40": (1, 24, 40), "72": (1, 72, 72)}[size]


def test_grey_is_read_as_it_is_and_colour_by_its_luminance(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20)).save(tmp_path / "pets" / name / "grey.png")
        Image.new("RGB", (20, 12), (255, 0, 0)).save(tmp_path / "pets" / name / "red.png")
    options = {"data_dir": tmp_path / "pets", "image_size": [12, 20], "test_fraction": 0.5}
    for channels, red in ((1, [76]), (3, [255, 0, 0]), (1, [76])):  # each from a cache of its own
        dataset = load_dataset("folder", **options, channels=channels, cache_dir=tmp_path / "cache")
        assert dataset.train.images.shape == (2, channels, 12, 20) and len(dataset.mean) == channels
        for split in (dataset.train, dataset.test):
            for image, name in zip(split.images, split.names):
                if "red" in name:
                    assert image[:, 5, 5].tolist() == red
                else:
                    assert all(torch.equal(channel.flatten(), torch.arange(240).byte()) for channel in image)


@pytest.mark.parametrize("name", ["vit", "vit_lite_6_4", "cvt_6_4", "cct_2_3x2", "cct_nano", "resnet18", "xresnet18"])
def test_every_model_takes_grey_oblong_images(name):
    model = build_model(name, in_channels=1, image_size=[32, 64], num_classes=4).eval()
    assert model.grid[1] == 2 * model.grid[0] and model(torch.zeros(2, 1, 32, 64)).shape == (2, 4)


def test_positions_of_an_oblong_grid_are_taken_as_they_are():
    positions = torch.randn(1, 17, 8)
    assert resize_positions(positions, (2, 8), 1) is positions
    assert resize_positions(positions, (8, 8), 1).shape == (1, 65, 8)


def test_large_grey_images_that_do_not_fit_into_memory_are_decoded_alike(flags):
    more = ["--channels", "1", "--image-size", "72", "--scale", "0.5", "1", "--patch-size", "24", *TINY]
    kept, streamed = (train_vit.main([*flags, *more, "--overwrite", *memory]) for memory in ([], STREAMED))
    assert kept["test_accuracy"] == streamed["test_accuracy"] and kept["data_hash"] == streamed["data_hash"]


def test_the_flag_of_the_image_size():
    assert pixels("32") == pixels("32x32") == 32 and pixels("32x64") == [32, 64]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--channels", "2"], "--channels: invalid choice: 2"),
        (["--image-size", "8x8x8"], "--image-size: must be at least 1 and at most 10000, or two as 32x64, not 8x8x8"),
        (["--image-size", "0"], "--image-size: must be at least 1"),
        (["--image-size", "wide"], "--image-size: invalid pixels value: 'wide'"),
        (["--model", "vit_b_16", "--channels", "1"], "--channels 1: pretrained models take images of 3 channels"),
        (["--dataset", "shapes", "--channels", "1"], "--channels has no effect here: it needs --dataset folder"),
        (["--overfit", "1000"], "--overfit 1000: there are 48 training images"),
    ],
)
def test_mistakes_are_one_line(more, message, flags):
    with pytest.raises(UserError, match=message):
        train_vit.main([*flags, *SMALL[train_vit][-2:], *more] if "vit_b_16" not in more else [*flags, *more])


def test_pretrained_needs_three_channels(flags):
    with pytest.raises(UserError, match="--pretrained: the weights require --channels 3, not 1"):
        train_resnet_attn.main([*flags, "--channels", "1", "--pretrained"])


@pytest.mark.parametrize("script", SMALL)
def test_images_learnt_by_heart(script, flags, tmp_path, capsys):
    more = ["--overfit", "8", "--epochs", "30", "--lr", "3e-3", "--opt", "adamw", "--sched", "cosine"]
    more += ["--clip-grad", "none"]
    recipe = ["--recipe", "strong"] if script is not train_resnet_attn else ["--recipe", "quick"]
    result = script.main([*flags, *SMALL[script], *recipe, "--image-size", "16", *more])
    assert "\n8 of 8 images learnt by heart\n" in (out := capsys.readouterr().out) and "test accuracy" not in out
    assert result["images"] == {"train": 8, "test": 8} and result["dataset_name"] == "8 images of pets, by heart"
    args = result["args"]
    assert not (args["hflip"] or args["mixup"] or args["smoothing"] or args["weight_decay"] or args["crop_padding"])
    assert args["aa"] == "none" and not args.get("drop")
    script.main(["--resume", str(tmp_path / "runs" / "run")])
    assert "is finished: 8 of 8 images learnt by heart\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="--overfit is 8 there and 9 here"):
        script.main(["--resume", str(tmp_path / "runs" / "run"), "--overfit", "9"])


def test_images_not_learnt_by_heart(flags, capsys):
    """Crops of large images, and a learning rate at which nothing is learnt."""
    result = train_vit.main([*flags, *SMALL[train_vit], "--image-size", "72", "--overfit", "9", "--lr", "1e-12"])
    learnt = round(9 * result["test_accuracy"])
    assert learnt < 9 and f"{learnt} of 9 images learnt by heart; more --epochs" in capsys.readouterr().out
    assert result["images"] == {"train": 9, "test": 9}
    given = train_vit.main([*flags[:-6], *SMALL[train_vit], "--overfit", "9", "--hflip", "0.5", "--epochs", "1"])
    assert given["args"]["hflip"] == 0.5


def test_the_images_to_learn_are_of_all_classes(tmp_path):
    root = write_images(tmp_path / "pets", classes=("ant", "bee", "cat"), count=20)
    dataset = load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache").learnt_by_heart(6)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and dataset.test is dataset.train
    whole = load_dataset("folder", data_dir=root, image_size=8, cache_dir=tmp_path / "cache")
    assert np.array_equal(whole.learnt_by_heart(48).train.names, whole.train.names)
