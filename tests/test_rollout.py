"""rollout.py from end to end, on a run that takes a second."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import rollout as script
import train_vit
from errors import UserError
from maps.images import checkpoint_dataset, normalised
from maps.methods import METHODS, attention_maps, tokens_to_map
from models import build_model
from training.checkpoint import load_checkpoint, rebuild_model


@pytest.fixture
def run(folder_flags, tmp_path):
    train_vit.main([*folder_flags, "--epochs", "1", "--drop", "0.2"])
    return tmp_path / "runs" / "vit"


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    train_vit.main(["--dataset", "shapes", "--epochs", "1", "--out-dir", str(out), *TINY])
    return out / "vit"


def names(paths):
    return [path.name for path in paths]


def test_images_maps_and_a_panel_are_written(run, capsys):
    written = script.main([str(run), "--index", "0", "3", "--method", "all"])
    expected = [f"{i}-{what}" for i in (0, 3) for what in ("all.png", *(f"{method}.npy" for method in METHODS))]
    assert names(written) == [*expected, "panel-all.png"] and written[0].parent == run / "maps"
    assert Image.open(written[0]).size[0] > 800 and Image.open(written[-1]).size[1] > 600
    assert str(written[0]) in capsys.readouterr().out

    checkpoint = load_checkpoint(run)
    model = rebuild_model(checkpoint, build_model)
    images = normalised(checkpoint_dataset(checkpoint).test.images[[0, 3]], checkpoint)
    maps, _ = attention_maps(model, images, METHODS)
    for method in METHODS:
        saved = np.load(run / "maps" / f"3-{method}.npy")
        np.testing.assert_allclose(saved, maps[method][1], rtol=0, atol=1e-6)


def test_maps_are_drawn_in_evaluation_mode(run):
    """The run has dropout: in training mode two drawings would differ."""
    maps = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        maps.append(np.load(script.main([str(run), "--index", "2"])[1]))
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize("size", [(1200, 300), (33, 90), (5, 5)])
def test_photographs_of_any_size(run, tmp_path, size):
    photo = tmp_path / "photo.jpg"
    Image.effect_noise(size, 80).convert("RGB").save(photo)
    flags = ["--image", str(photo), "--out", str(tmp_path / "out"), "--format", "pdf", "--interpolation", "nearest"]
    written = script.main([str(run), *flags])
    assert names(written) == ["photo-rollout.pdf", "photo-rollout.npy"]
    assert written[0].read_bytes().startswith(b"%PDF") and np.load(written[1]).shape == (8, 8)


def test_layers_and_matrix(run, monkeypatch):
    drawn = {}
    monkeypatch.setattr(script, "draw_layers", lambda path, image, caption, maps, **look: drawn.update(layers=maps))
    monkeypatch.setattr(script, "draw_matrix", lambda path, matrix, caption, **look: drawn.update(matrix=matrix))
    written = script.main([str(run), "--index", "1", "--layers", "--matrix"])
    assert names(written)[2:] == ["1-layers.png", "1-matrix.png"]
    assert drawn["layers"].shape == (2, 2, 8, 8) and drawn["matrix"].shape == (
        65,
        65,
    )  # layer, head; 64 patches and one
    np.testing.assert_allclose(drawn["matrix"].sum(1), 1, atol=1e-5)
    rolled = tokens_to_map(torch.from_numpy(drawn["matrix"])[None], (8, 8))[0]
    np.testing.assert_allclose(rolled, np.load(written[1]), atol=1e-6)


def test_layers_and_matrix_are_drawn(run):
    for path in script.main([str(run), "--index", "1", "--layers", "--matrix"])[2:]:
        assert np.asarray(Image.open(path).convert("L")).std() > 20


def test_head_fusion_discard_ratio_and_target_arrive(run):
    def drawn(*flags):
        return np.load(script.main([str(run), "--index", "1", *flags])[1])

    plain = drawn()
    assert not np.array_equal(plain, drawn("--head-fusion", "max"))
    assert not np.array_equal(plain, drawn("--discard-ratio", "0.9"))
    by_class = [drawn("--method", "relevance", "--target", name) for name in ("ant", "bee", "1")]
    assert not np.array_equal(*by_class[:2]) and np.array_equal(*by_class[1:])


def test_evaluation_of_shapes(shapes_run, capsys):
    written = script.main([str(shapes_run), "--evaluate", "--num-images", "40", "--batch-size", "30"])
    record = json.loads(written[0].read_text())
    scores = record["scores"]
    assert record["images"] == 40 and record["patches"] == [8, 8] and record["epoch"] == 1
    assert set(scores) >= {*METHODS, "report, as it was run", "uniform", "centred gaussian", "random"}
    mean, error = scores["uniform"]["pointing"]
    assert 0.13 < mean < 0.17 and 0 < error < 0.02 and scores["uniform"]["mass_ratio"][0] == pytest.approx(1)
    assert set(scores["rollout"]) == {
        *("pointing", "pointing_filled", "mass_ratio", "average_precision", "pixel_accuracy", "miou"),
        *("deletion", "insertion"),
    }
    assert len(record["curves"]["rollout"]["deletion"]) == 11
    out = capsys.readouterr().out
    assert "rollout, run that way" in out and f"{mean:.3f} ± {error:.3f}" in out
    assert np.asarray(Image.open(written[1]).convert("L")).std() > 10


def test_evaluation_where_the_object_is_not_known(run):
    record = json.loads(
        script.main([str(run), "--evaluate", "--num-images", "6", "--method", "rollout"])[0].read_text()
    )
    assert set(record["scores"]["rollout"]) == {"deletion", "insertion"}
    assert set(record["scores"]) == {"rollout", "rollout, run that way", "uniform", "centred gaussian", "random"}


def test_an_evaluation_that_does_not_fit_into_memory_is_one_line(run, monkeypatch):
    monkeypatch.setattr("maps.commands.evaluate", lambda *args, **options: torch.empty(2**60))
    with pytest.raises(UserError, match="--batch-size 4 does not fit into memory; try a smaller one"):
        script.main([str(run), "--evaluate", "--batch-size", "4"])


def test_which_checkpoint(run, capsys):
    script.main([str(run), "--index", "0", "--which", "best_on_test"])
    assert "best_on_test.pt: vit, epoch 1" in capsys.readouterr().out
    script.main([str(run / "last.pt"), "--index", "0"])
    assert "last.pt: vit, epoch 1" in capsys.readouterr().out


def test_mistakes_are_named(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "file").write_text("")
    for flags, message in {
        ("--index", "99"): "--index 99: there are 12 test images, 0 to 11",
        ("--index", "-1"): "--index -1",
        ("--image", str(tmp_path / "broken.jpg")): "broken.jpg cannot be decoded",
        ("--image", str(tmp_path / "missing.jpg")): "missing.jpg cannot be decoded",
        ("--index", "0", "--method", "relevance", "--target", "dodo"): "--target dodo: the classes are ant, bee, cat",
        ("--index", "0", "--out", str(tmp_path / "file" / "maps")): "file/maps cannot be written",
        ("--which", "best"): "there is no checkpoint",
        ("--method", "guess"): "invalid choice: 'guess'",
        ("--image", str(tmp_path / "a" / "1.png"), str(tmp_path / "b" / "1.png")): "several files are named 1",
        ("--dpi", "1"): "must be at least 20 and at most 1200, not 1",
        ("--discard-ratio", "1"): "must be at least 0 and below 1",
        ("--device", "abacus"): "--device abacus",
    }.items():
        with pytest.raises(UserError) as error:
            script.main([str(run), *flags])
        assert message in str(error.value)
    with pytest.raises(UserError, match="--which best needs a run's folder"):
        script.main([str(run / "last.pt"), "--which", "best"])


def test_library_names():
    for name in ("AttentionRecorder", "rollout", "raw", "report", "gradient_rollout", "relevance"):
        assert callable(getattr(script, name))
