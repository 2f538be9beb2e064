"""predict.py from end to end, on runs that take a second."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

import predict
import train_resnet_attn
import train_vit
from errors import UserError
from maps.images import pixels_of
from maps.predictions import image_files, predict_logits
from models import build_model
from training.checkpoint import load_checkpoint, rebuild_model


@pytest.fixture
def run(folder_flags, tmp_path):
    train_vit.main([*folder_flags, "--epochs", "1"])
    return tmp_path / "runs" / "vit"


@pytest.fixture
def photos(tmp_path):
    """Two classes that the model knows and one that it does not, with a sub-folder, as JPEG files of another size."""
    write_images(tmp_path / "elsewhere", classes=("bee", "ant", "lion"), count=3, size=(90, 50), suffix=".jpg")
    return write_images(tmp_path / "elsewhere" / "bee", classes=("nested",), count=2).parent


def record_of(paths):
    return json.loads(paths[0].read_text())


def test_the_likeliest_classes_of_files_and_folders(run, photos, tmp_path, capsys):
    out = tmp_path / "new"
    single = photos / "lion" / "000.jpg"
    flags = ["--csv", str(out / "a.csv"), str(photos), "--json", str(out / "a.json"), "--device", "cpu"]
    written = predict.main([str(run), str(single), *flags])
    assert written == [out / "a.csv", out / "a.json"]
    header, *rows = csv.reader((out / "a.csv").open())
    assert header == ["image", *(f"{what}_{rank}" for rank in (1, 2, 3) for what in ("class", "probability"))]
    assert len(rows) == 11 and rows[0][0] == str(single)  # the single one comes first, and not again
    assert str(photos / "bee" / "nested" / "000.png") in [row[0] for row in rows]

    checkpoint = load_checkpoint(run)
    model = rebuild_model(checkpoint, build_model)
    probabilities = predict_logits(model, checkpoint, pixels_of([single], checkpoint))[0].softmax(0)
    best = probabilities.argsort(descending=True).tolist()
    assert rows[0][1::2] == [checkpoint["classes"][index] for index in best]
    np.testing.assert_allclose([float(p) for p in rows[0][2::2]], probabilities[best], atol=1e-6)
    for row, entry in zip(rows, json.loads((out / "a.json").read_text()), strict=True):
        assert [str(value) for value in entry.values()] == row and list(entry) == header
    assert f"{rows[0][1]} {float(rows[0][2]):.1%}" in capsys.readouterr().out


def test_the_sheet_shows_every_image_with_its_map(run, photos, tmp_path, monkeypatch):
    sheet = tmp_path / "sheet.png"
    predict.main([str(run), str(photos), "--sheet", str(sheet)])
    assert Image.open(sheet).size == (1440, 420)  # 11 images in rows of 8
    drawn = []
    monkeypatch.setattr(predict, "draw_sheet", lambda *found: drawn.extend(found))
    predict.main([str(run), str(photos), "--sheet", str(sheet)])
    _, images, captions, maps = drawn
    assert images.shape == (11, 3, 128, 128) and len(captions) == 11
    assert [one.shape for one in maps] == [(8, 8)] * 11 and min(one.min() for one in maps) >= 0


def test_a_model_without_attention_has_a_sheet_without_maps(folder_flags, photos, tmp_path, capsys):
    flags = [flag for flag in folder_flags if flag not in ("--embed-dim", "--depth", "--num-heads", "16", "2")]
    flags.remove("--epochs")
    train_resnet_attn.main([*flags, "--epochs", "1", "--width", "8"])
    predict.main([str(tmp_path / "runs" / "resnet18"), str(photos), "--sheet", str(tmp_path / "sheet.png")])
    assert "sheet.png is without maps: ResNet has no attention" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "sheet.png").convert("L")).std() > 20


def test_the_accuracy_is_that_of_result_json(run, capsys):
    result = json.loads((run / "result.json").read_text())
    written = predict.main([str(run), "--evaluate", "--tta", "flip"])
    assert written == [run / "predict" / "last.json", run / "predict" / "last.png"]
    found, saved = record_of(written), np.load(run / "predictions.npz")
    assert found["accuracies"]["all images"]["accuracy"] == result["test_accuracy"]
    predicted = saved["logits"].argmax(1)
    assert found["accuracies"]["bee"]["accuracy"] == (predicted == 1)[saved["labels"] == 1].mean()
    for true, row in enumerate(found["confusion"]):
        assert row == [int(((saved["labels"] == true) & (predicted == said)).sum()) for said in range(3)]
    assert found["top5"] == 1 and 0 <= found["accuracies"]["all images, --tta flip"]["accuracy"] <= 1
    assert len(found["mistakes"]) == min(8, (predicted != saved["labels"]).sum())
    assert Image.open(written[1]).size == (1870, 990)
    assert "no temperature: the run has no validation images" in capsys.readouterr().out


def test_the_temperature_is_fitted_on_validation_images_alone(folder_flags, photos, tmp_path, monkeypatch):
    train_vit.main([*folder_flags, "--epochs", "1", "--val-fraction", "0.2"])
    run, fitted = tmp_path / "runs" / "vit", []
    monkeypatch.setattr("maps.predictions.fit_temperature", lambda *found: fitted.append(found) or 2.0)
    found = record_of(predict.main([str(run), "--evaluate"]))
    checkpoint = load_checkpoint(run)
    val = predict.checkpoint_dataset(checkpoint).val
    ((logits, labels),) = fitted
    assert labels.equal(val.labels)
    torch.testing.assert_close(logits, predict_logits(rebuild_model(checkpoint, build_model), checkpoint, val.images))
    assert found["temperature"] == 2 and list(found["calibrations"]) == ["as predicted", "temperature 2.000"]
    found = record_of(predict.main([str(run), str(photos), "--evaluate"]))  # another test set, the same temperature
    assert found["temperature"] == 2 and fitted[1][1].equal(val.labels)


def test_images_of_another_run_are_not_needed_for_a_folder(folder_flags, image_folder, photos, tmp_path, capsys):
    train_vit.main([*folder_flags, "--epochs", "1", "--val-fraction", "0.2"])
    image_folder.rename(tmp_path / "moved")
    found = record_of(predict.main([str(tmp_path / "runs" / "vit"), "--evaluate", str(photos)]))
    assert "temperature" not in found and "no temperature: --data-dir" in capsys.readouterr().out


def test_a_test_set_that_changed_is_named(run, image_folder, capsys):
    predict.main([str(run), "--evaluate"])
    assert "warning" not in capsys.readouterr().out
    write_images(image_folder, classes=("ant",), count=30)
    predict.main([str(run), "--evaluate"])
    assert "warning: the test images are not those" in capsys.readouterr().out


def test_another_test_set_is_matched_by_the_names_of_its_folders(run, photos, capsys):
    written = predict.main([str(run), "--evaluate", str(photos)])
    assert written[0] == run / "predict" / "last-elsewhere.json"
    found = record_of(written)
    counts = {name: row["images"] for name, row in found["accuracies"].items()}
    assert counts == {"all images": 8, "ant": 3, "bee": 5}
    assert [sum(row) for row in found["confusion"]] == [3, 5, 0]
    assert "left out, unknown to the model (images): lion (3)" in capsys.readouterr().out and found["left_out"] == {
        "lion": 3
    }


def test_which_and_a_checkpoint_file_name_what_is_written(run, photos):
    assert predict.main([str(run), "--which", "best_on_test", "--evaluate"])[0].name == "best_on_test.json"
    written = predict.main(
        [str(run / "last.prev.pt" if (run / "last.prev.pt").exists() else run / "last.pt"), "--evaluate"]
    )
    assert written[0].parent == run / "predict" and written[0].name.startswith("last")


def test_a_replaced_run_takes_its_evaluation_along(run, folder_flags, photos):
    predict.main([str(run), "--evaluate", str(photos)])
    train_vit.main([*folder_flags, "--epochs", "1", "--run-name", "vit", "--overwrite"])
    assert not (run / "predict").exists()


def test_users_mistakes_are_one_line(run, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "wolves" / "wolf").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "wolves" / "wolf" / "1.png")
    photo = str(photos / "ant" / "000.jpg")
    for argv, said in {
        (run, tmp_path / "empty"): "empty contains no image",
        (run, tmp_path / "text.jpg"): "text.jpg cannot be decoded as an image",
        (run, tmp_path / "none.jpg"): "none.jpg: there is no such file",
        (run, "--evaluate", tmp_path / "none"): "none: there is no such file or folder",
        (run, "--evaluate", photo): "no folder of a class that the model knows",
        (run, "--evaluate", tmp_path / "wolves"): r"knows \(ant, bee, cat\), but wolf \(1\)",
        (tmp_path / "text.jpg", photo): "text.jpg is damaged or no checkpoint",
        (tmp_path / "nowhere", photo): "there is no checkpoint",
        (run,): "name images or folders to predict",
        (run, photo, photo, "--evaluate"): "name images or folders",
        (run, photo, "--tta", "flip"): "--tta and --corruptions need --evaluate",
        (run, "--evaluate", "--csv", "a.csv"): "--csv, --json and --sheet are without it",
        (run, photo, "--sheet", "a.doc"): "--sheet a.doc: the name must end in .png",
        (run, photo, "--csv", tmp_path / "text.jpg" / "a.csv"): "text.jpg cannot be written",
        (run, photo, "--tto"): "did you mean --tta",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            predict.main([str(part) for part in argv])
        assert "\n" not in str(caught.value), argv


def test_hidden_files_and_folders_named_as_splits(tmp_path, capsys):
    write_images(tmp_path, classes=("train", "test"), count=1)
    (tmp_path / "train" / ".hidden.png").write_text("")
    (tmp_path / "train" / "photo.heic").write_text("")
    assert image_files(tmp_path) == [tmp_path / "test" / "000.png", tmp_path / "train" / "000.png"]
    assert "1 .heic" in capsys.readouterr().err
