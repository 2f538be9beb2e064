"""train_generator.py and generate.py as a user runs them, and generated images in the training of a classifier."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, same_weights, write_images
from PIL import Image
from test_train_vit import kill_and_resume

import export
import generate
import predict
import train_generator
import train_vit
from data import Split
from errors import UserError
from pipeline.batches import Batches
from pipeline.extra import mix_in
from training.checkpoint import load_checkpoint

SMALL = {"ddpm": ["--depth", "1", "--noise-steps", "20"], "acgan": ["--model", "acgan", "--noise-dim", "8"]}


@pytest.fixture
def flags(image_folder, tmp_path):
    """The flags of a run of seconds: the smallest generator on image_folder, 2 epochs of 6 steps, in tmp_path."""
    return [
        *("--data-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache"), "--out-dir", str(tmp_path / "runs")),
        *("--device", "cpu", "--image-size", "16", "--width", "8", "--epochs", "2", "--batch-size", "8"),
    ]


@pytest.fixture
def ddpm(flags, tmp_path):
    train_generator.main([*flags, *SMALL["ddpm"]])
    return tmp_path / "runs" / "ddpm"


@pytest.mark.parametrize("model", SMALL)
def test_a_run_stopped_within_an_epoch_ends_with_the_same_bits(model, flags, tmp_path, capsys):
    flags = [*flags, *SMALL[model], "--model-ema-decay", "0.9", "--val-fraction", "0.2", "--sample-epochs", "1"]
    whole = train_generator.main([*flags, "--run-name", "whole"])
    assert train_generator.main([*flags, "--run-name", "cut", "--minutes", "0.0001"]) is None
    cut = train_generator.main(["--resume", str(tmp_path / "runs" / "cut"), "--device", "cpu"])
    first, second = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("weights", "ema"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    for name in ("train_loss", "val_loss", "val_accuracy", "params"):
        assert whole[name] == cut[name]
    assert (whole["val_loss"] is None) == (model == "acgan")
    sheets = [np.asarray(Image.open(tmp_path / "runs" / name / "samples.png")) for name in ("whole", "cut")]
    assert np.array_equal(*sheets) and sheets[0].shape == (2 * (3 * 17 + 1), 2 * (8 * 17 + 1), 3)
    expected = {"ddpm": ([0.9, 0.999], 1.0, 128), "acgan": ([0.5, 0.999], None, 100)}[model]  # of the papers
    args = train_generator.chosen_recipe({"model": model})[1]
    assert (args.get("opt_betas", [0.9, 0.999]), args["clip_grad"], args["batch_size"]) == expected
    assert (whole["args"]["opt_betas"], whole["args"]["clip_grad"]) == expected[:2]
    assert whole["val_accuracy"] is None and "test_accuracy" not in whole and whole["weights"] == "ema"
    assert not (tmp_path / "runs" / "whole" / "best.pt").exists()
    assert train_generator.main(["--resume", str(tmp_path / "runs" / "whole")])["epochs"] == 2
    assert "is finished: training loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALL)
def test_killed_three_times_and_resumed_the_weights_are_the_same(model, flags, tmp_path):
    flags = [*flags, *SMALL[model], "--epochs", "400", "--sample-epochs", "400"]
    kill_and_resume(tmp_path, kills=3, flags=flags, seconds=(5, 8), script="train_generator.py")
    assert same_weights(*(tmp_path / "runs" / name / "last.pt" for name in ("alone", "killed")))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mixup", "0.8"], "unrecognized arguments: --mixup"),
        (["--overfit", "5"], "unrecognized arguments: --overfit"),
        (["--model", "acgan", "--depth", "2"], "--depth: acgan does not take it"),
        (["--model", "acgan", "--label-drop", "0.1"], "--label-drop has no effect here: it needs --model ddpm"),
        (["--gan-loss", "paper"], "--gan-loss has no effect here: it needs --model acgan"),
        (["--model", "vit"], "--model: invalid choice: 'vit'"),
        (["--label-drop", "1"], "--label-drop: must be above 0 and below 1, not 1"),
        (["--image-size", "30"], "--image-size 30: ddpm needs squares whose side 4 divides"),
        (["--extra-data", "x"], "unrecognized arguments: --extra-data"),
        (["--train-per-class", "500"], "--train-per-class 500: class ant has 16 training images"),
    ],
)
def test_mistakes_are_said_in_a_line(argv, message, flags):
    with pytest.raises(UserError, match=message):
        train_generator.main([*flags, *argv])


def pixels(folder):
    return {
        path.relative_to(folder): np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*/*.png"))
    }


def test_images_follow_from_the_seed_and_not_from_the_batch(ddpm, tmp_path):
    make = [str(ddpm), "--per-class", "5", "--device", "cpu", "--steps", "4"]
    a, b, other = (
        pixels(generate.main([*make, "--out", str(tmp_path / name), *more]))
        for name, more in (("a", []), ("b", ["--batch-size", "2"]), ("c", ["--seed", "1"]))
    )
    assert len(a) == 15 and a.keys() == b.keys()
    assert max(abs(a[name] - b[name]).max() for name in a) <= 1  # grey levels: sums in another order
    assert all(abs(a[name] - other[name]).mean() > 3 for name in a)
    assert len({image.tobytes() for image in a.values()}) == 15


@pytest.mark.parametrize("sampler", [["--sampler", "ddpm"], ["--guidance", "0"], ["--class", "bee", "--steps", "20"]])
def test_a_folder_is_completed_with_the_images_that_it_lacks(sampler, ddpm, tmp_path):
    make = [str(ddpm), "--per-class", "4", "--device", "cpu", "--batch-size", "3", "--out", str(tmp_path / "made")]
    out = generate.main([*make, *sampler])
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    assert {path.parent.name for path in before} == ({"bee"} if "--class" in sampler else {"ant", "bee", "cat"})
    for path in [*before][::2]:
        path.unlink()
    (out / "bee" / ".000000.png.tmp").write_bytes(b"half a file")
    generate.main([*make, *sampler])
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == before
    with pytest.raises(UserError, match=f"--out {out}: its images have another seed; name another folder"):
        generate.main([*make, *sampler, "--seed", "3"])
    (out / "generated.json").write_text("half a record")
    with pytest.raises(UserError, match="generated.json is damaged"):
        generate.main([*make, *sampler])


def test_an_animation_ends_with_the_images(ddpm, tmp_path):
    assert generate.main([str(ddpm), "--animate", str(tmp_path / "new" / "noise.gif"), "--device", "cpu"]) is None
    with Image.open(tmp_path / "new" / "noise.gif") as movie:
        assert movie.n_frames == 20
        assert movie.size == (2 * (3 * 17 + 1), 2 * (4 * 17 + 1))
        movie.seek(19)
        last = np.asarray(movie.convert("RGB")).astype(int)
    written = pixels(generate.main([str(ddpm), "--per-class", "1", "--device", "cpu", "--steps", "20"]))
    bee, other = (abs(last[2:34:2, 36:68:2] - written[Path(name, "000000.png")]).mean() for name in ("bee", "ant"))
    assert bee < other / 3  # a GIF has few colours


def test_a_classifier_says_how_good_they_are(ddpm, folder_flags, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    train_vit.main([*folder_flags, "--image-size", "16"])
    make = [str(ddpm), "--per-class", "4", "--device", "cpu", "--out", str(tmp_path / "made")]
    out = generate.main([*make, "--classifier", str(tmp_path / "runs" / "vit")])
    found = json.loads((out / "quality.json").read_text())
    assert found["images"] == 12 and found["scores"].keys() == {"training images", "generated images"}
    predict.main([str(tmp_path / "runs" / "vit"), str(out), "--json", str(tmp_path / "found.json"), "--device", "cpu"])
    rows = json.loads((tmp_path / "found.json").read_text())
    right = sum(row["class_1"] == Path(row["image"]).parent.name for row in rows)
    assert found["scores"]["generated images"]["recognised"] == pytest.approx(right / 12)
    assert (out / "nearest.png").exists() and "generated images" in capsys.readouterr().out


def test_what_generate_refuses(ddpm, flags, folder_flags, tmp_path):
    train_vit.main(folder_flags)
    train_generator.main([*flags, *SMALL["acgan"]])
    (tmp_path / "full" / "x").mkdir(parents=True)
    for argv, message in (
        ([ddpm, "--guidance", "-1"], "--guidance: must be at least 0, not -1"),
        ([ddpm, "--steps", "21"], "--steps 21: the model was trained with 20"),
        ([ddpm, "--class", "lion"], "--class lion: the classes are ant, bee, cat"),
        ([ddpm, "--out", tmp_path / "full"], "full: it is not empty; name another folder"),
        ([ddpm, "--classifier", tmp_path / "runs" / "ddpm"], "ddpm generates images: use generate.py"),
        (
            [ddpm, "--classifier", tmp_path / "runs" / "vit", "--per-class", "2"],
            "6 generated images are too few; it needs 7",
        ),
        ([ddpm, "--animate", "noise.png"], "--animate noise.png: its name must end in .gif"),
        ([tmp_path / "runs" / "acgan", "--animate", "x.gif"], "--animate x.gif: this is for a ddpm; acgan"),
        ([tmp_path / "runs" / "vit"], "vit classifies images: use predict.py"),
        (
            [tmp_path / "runs" / "acgan", "--steps", "5"],
            "--steps 5: this is for a ddpm; acgan makes images in one step",
        ),
    ):
        with pytest.raises(UserError, match=message):
            generate.main([*map(str, argv), "--device", "cpu"])
    for command in (predict.main, export.main):
        with pytest.raises(UserError, match="ddpm generates images: use generate.py"):
            command([str(ddpm)] + ([str(tmp_path)] if command is predict.main else []))
    with pytest.raises(UserError, match="train_vit.py does not train the model there, ddpm"):
        train_vit.main(["--resume", str(ddpm)])
    with pytest.raises(UserError, match="train_generator.py does not train the model there, vit"):
        train_generator.main(["--resume", str(tmp_path / "runs" / "vit")])


def test_a_share_of_each_batch_is_generated_and_the_rest_is_as_before():
    def split(start, count):  # each image is filled with its number
        numbers = torch.arange(start, start + count)
        return Split(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), numbers, numbers.numpy())

    options = {"batch_size": 10, "mean": [0.0] * 3, "std": [1.0] * 3, "device": "cpu", "seed": 3}
    plain = Batches(split(0, 45), **options)
    both, more = mix_in(split(0, 45), split(100, 8), share=0.3, seed=3)
    mixed = Batches(both, **options, **more)
    assert mixed.steps_per_epoch == plain.steps_per_epoch == 5
    seen = []
    for (_, before), (images, labels) in zip(plain.batches(1), mixed.batches(1), strict=True):
        generated = labels >= 100
        assert int(generated.sum()) == (3 if len(labels) == 10 else 1)
        assert torch.equal(labels[~generated], before[~generated])
        torch.testing.assert_close(images[:, 0, 0, 0] * 255, labels.float())
        seen += labels[generated].tolist()
    assert set(seen) == set(range(100, 108)) and len(seen) == 13
    again = [labels for _, labels in mixed.batches(1, start_step=3)]
    assert torch.equal(again[0], [labels for _, labels in mixed.batches(1)][3])
    both, more = mix_in(split(0, 45), split(100, 8), share=1.0, seed=3)
    only = Batches(both, **options, **more)
    assert all((labels >= 100).all() for _, labels in only.batches())


def test_a_classifier_says_what_was_mixed_in(ddpm, flags, folder_flags, tmp_path, capsys):
    made = generate.main([str(ddpm), "--per-class", "4", "--device", "cpu", "--out", str(tmp_path / "made")])
    mix = ["--image-size", "16", "--extra-data", str(made), "--extra-fraction", "0.25"]
    result = train_vit.main([*folder_flags, *mix])
    assert "generator was trained on other images" not in capsys.readouterr().err
    trained_on = load_checkpoint(ddpm)["data_hashes"]["train"]
    assert result["extra"]["model"] == "ddpm" and result["extra"]["trained_on"] == trained_on == result["data_hash"]
    assert result["images"] == {"train": 48, "test": 12, "extra": 12} and result["args"]["extra_fraction"] == 0.25
    train_vit.main([*folder_flags, *mix, "--train-per-class", "10"])
    assert "its generator was trained on other images than this run" in capsys.readouterr().err
    other = write_images(tmp_path / "others", classes=("ant", "lion"))
    for argv, message in (
        (["--extra-data", str(other)], "others must hold folders named after classes of the dataset: ant, bee, cat"),
        (["--extra-data", str(tmp_path / "nothing")], "nothing cannot be read"),
        (["--extra-data", str(made), "--image-size", "80"], "only be mixed with images of up to 64 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            train_vit.main([*folder_flags, *argv, "--patch-size", "8"])


def test_some_images_of_each_class_are_the_same_for_every_seed(flags, image_folder, tmp_path):
    hashes = {
        name: train_vit.main(
            ["--data-dir", str(image_folder), "--epochs", "1", *TINY, "--out-dir", str(tmp_path), "--cache-dir"]
            + [str(tmp_path / "cache"), "--train-per-class", "10", "--image-size", "16", *more]
        )
        for name, more in (("a", []), ("b", ["--seed", "1"]), ("c", ["--split-seed", "1"]))
    }
    assert all(result["images"]["train"] == 30 for result in hashes.values())
    assert hashes["a"]["data_hash"] == hashes["b"]["data_hash"] != hashes["c"]["data_hash"]
