"""rollout.py from end to end, on a run that takes a second."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import rollout as script
import train_resnet_attn
import train_vit
from errors import UserError
from maps.images import checkpoint_dataset, normalised
from maps.methods import METHODS, attention_maps, tokens_to_map
from models import build_model
from models.attention import ATTENTIONS
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
    expected = [f"{i}-{what}" for i in (0, 3) for what in ("rollout-all.png", *(f"{method}.npy" for method in METHODS))]
    assert names(written) == [*expected, "panel-rollout-all.png"] and written[0].parent == run / "maps"
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


def test_layers_and_matrices(run, monkeypatch):
    drawn = {}
    monkeypatch.setattr(script, "draw_layers", lambda path, image, caption, maps, **look: drawn.update(layers=maps))
    monkeypatch.setattr(script, "draw_matrix", lambda path, matrix, caption, **look: drawn.update({path.stem: matrix}))
    written = script.main([str(run), "--index", "1", "--method", "all", "--layers", "--matrix", "--layer", "2", "1"])
    matrices = [f"1-{method}-matrix" for method in METHODS] + ["1-layer-2-matrix", "1-layer-1-matrix"]
    assert names(written)[6:] == ["1-layers.png", *(f"{name}.png" for name in matrices)]
    assert drawn["layers"].shape == (2, 2, 8, 8)  # layer, head
    for name in matrices:
        assert drawn[name].shape == (65, 65)  # 64 patches and the class token
    for method in METHODS:
        drawn_map = tokens_to_map(torch.from_numpy(drawn[f"1-{method}-matrix"])[None], (8, 8))[0]
        np.testing.assert_allclose(drawn_map, np.load(run / "maps" / f"1-{method}.npy"), atol=1e-6)
    first, last = (drawn[f"1-layer-{layer}-matrix"] for layer in (1, 2))
    np.testing.assert_array_equal(last, drawn["1-raw-matrix"])
    np.testing.assert_allclose(first.T @ last, drawn["1-report-matrix"], atol=1e-6)
    with pytest.raises(UserError, match="--layer 3: the model has 2 layers"):
        script.main([str(run), "--index", "1", "--layer", "3"])


def test_layers_matrices_and_patches_are_drawn(run):
    written = script.main([str(run), "--index", "1", "--layers", "--matrix", "--layer", "1", "--patches"])
    assert len(written) == 6
    for path in written[2:]:
        assert np.asarray(Image.open(path).convert("L")).std() > 20


def test_images_are_chosen_by_class_and_split(run, monkeypatch):
    dataset = checkpoint_dataset(load_checkpoint(run))
    for split, prefix in (("test", ""), ("train", "train-")):
        images, labels, _ = getattr(dataset, split)
        first = (labels == 1).nonzero()[:3, 0].tolist()
        flags = ["--class", "be", "--num-images", "3", "--split", split]
        shown = []
        monkeypatch.setattr(script, "draw_panel", lambda path, shows, *rest, found=shown, **look: found.extend(shows))
        written = script.main([str(run), *flags])
        assert [path.stem for path in written if path.suffix == ".npy"] == [f"{prefix}{i}-rollout" for i in first]
        for index, image in zip(first, shown, strict=False):
            assert np.array_equal(image, images[index].permute(1, 2, 0).numpy())
    with pytest.raises(UserError, match="--split val: .* has no validation images"):
        script.main([str(run), "--split", "val"])


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
    assert set(scores) >= {*METHODS, "rollout, training mode", "uniform", "centred gaussian", "random"}
    readings = [
        scores[f"report{reading}"] for reading in ("", ", column", ", training mode", ", column, training mode")
    ]
    assert readings[0] == readings[2] and readings[1] == readings[3] != readings[0]  # the model has no dropout
    mean, error = scores["uniform"]["pointing"]
    assert 0.13 < mean < 0.17 and 0 < error < 0.02 and scores["uniform"]["mass_ratio"][0] == pytest.approx(1)
    assert set(scores["rollout"]) == {
        *("pointing", "pointing_filled", "mass_ratio", "average_precision", "pixel_accuracy", "miou"),
        *("deletion", "insertion", "saco"),
    }
    assert len(record["curves"]["rollout"]["deletion"]) == 11
    assert record["ranked_by"] == "pointing" and set(record["values"]) == set(scores)
    for name, values in record["values"].items():  # of each image
        assert len(values) == 40 and sum(values) / 40 == pytest.approx(scores[name]["pointing"][0], abs=1e-3)
    out = capsys.readouterr().out
    assert "rollout, training mode" in out and f"{mean:.3f} ± {error:.3f}" in out
    assert np.asarray(Image.open(written[1]).convert("L")).std() > 10


def test_redrawn_weights_are_rows_of_the_table_and_a_figure(shapes_run, tmp_path, capsys):
    flags = ["--evaluate", "--num-images", "40", "--out", str(tmp_path), "--method", "rollout"]
    written = script.main([str(shapes_run), *flags, "--randomise"])
    assert names(written) == ["evaluation.json", "deletion.png", "randomise.png"]
    record = json.loads(written[0].read_text())
    row, curve = record["scores"]["rollout"], record["curves"]["rollout"]["redrawn"]
    assert len(curve) == 7 and curve[0] == pytest.approx(1)  # rollout says nothing of the head
    assert row["rank_correlation"][0] == pytest.approx(curve[-1]) and 0 <= row["pointing_redrawn"][0] <= 1
    assert "rank_correlation" not in record["scores"]["random"]
    with pytest.raises(UserError, match="--randomise needs --evaluate"):
        script.main([str(shapes_run), "--randomise"])


def test_heads_of_a_layer_are_rows(shapes_run, tmp_path):
    flags = ["--evaluate", "--num-images", "20", "--out", str(tmp_path), "--method", "raw"]
    written = script.main([str(shapes_run), *flags, "--layer", "1", "2"])
    scores = json.loads(written[0].read_text())["scores"]
    assert {"layer 1, head 2", "layer 2, head 1", "layer 2, head 2"} < set(scores)
    assert scores["layer 2, head 1"] != scores["layer 2, head 2"] != scores["layer 1, head 2"]
    with pytest.raises(UserError, match="--layer 9: the model has . layers with attention"):
        script.main([str(shapes_run), *flags, "--layer", "9"])


def test_evaluation_where_the_object_is_not_known(run):
    record = json.loads(
        script.main([str(run), "--evaluate", "--num-images", "6", "--method", "rollout"])[0].read_text()
    )
    assert set(record["scores"]["rollout"]) == {"deletion", "insertion", "saco"}
    assert set(record["scores"]) == {"rollout", "rollout, training mode", "uniform", "centred gaussian", "random"}


def test_a_table_holds_rows_of_the_same_weights_and_images_alone(run, folder_flags, capsys):
    def table(checkpoint, method, *flags):
        path = script.main([str(checkpoint), "--evaluate", "--method", method, *flags])[0]
        record = json.loads(path.read_text())
        return set(record["scores"]) & set(METHODS), record

    table(run, "raw")
    found, record = table(run / "last.pt", "relevance")
    assert found == {"raw", "relevance"} and record["checkpoint"] == "vit last" and record["split"] == "test"
    shutil.copytree(run / "maps", run.parent / "kept")
    (run / "maps" / "notes.txt").write_text("a user's own")

    train_vit.main([*folder_flags, "--epochs", "1", "--seed", "1", "--run-name", "vit", "--overwrite"])
    assert names((run / "maps").iterdir()) == ["notes.txt"]
    capsys.readouterr()
    found, now = table(run, "rollout", "--out", str(run.parent / "kept"))
    assert found == {"rollout"} and now["weights_hash"] != record["weights_hash"]
    assert "evaluation.json: its rows have another weights hash and are dropped" in capsys.readouterr().out
    found, now = table(run / "best_on_test.pt", "raw", "--split", "train")
    assert found == {"raw"} and (now["checkpoint"], now["split"], now["images"]) == ("vit best_on_test", "train", 48)


def test_an_evaluation_that_does_not_fit_into_memory_is_one_line(run, monkeypatch):
    monkeypatch.setattr("maps.commands.evaluate", lambda *args, **options: torch.empty(2**60))
    with pytest.raises(UserError, match="--batch-size 4 does not fit into memory; try a smaller one"):
        script.main([str(run), "--evaluate", "--batch-size", "4"])


def test_a_checkpoint_of_an_attention_that_is_not_known_here(folder_flags, tmp_path, monkeypatch):
    class Own(ATTENTIONS["softmax"]):
        pass

    with monkeypatch.context() as patch:
        patch.setitem(ATTENTIONS, "own", Own)
        train_vit.main([*folder_flags, "--epochs", "1", "--attention", "own"])
        assert len(script.main([str(tmp_path / "runs" / "vit"), "--index", "0"])) == 2
    with pytest.raises(UserError, match="cannot be built here: --attention own: .* of your own"):
        script.main([str(tmp_path / "runs" / "vit"), "--index", "0"])


def test_a_run_ends_with_a_command_that_can_draw_it(folder_flags, tmp_path, capsys):
    flags = [*folder_flags[: -len(TINY)], "--epochs", "1", "--device", "cpu"]
    vit, resnet = [*flags, "--embed-dim", "16", "--depth", "1"], [*flags, "--width", "4", "--lr", "0.01"]
    for train, argv, name in (
        (train_vit, [*vit, "--num-heads", "2"], "rollout.py"),
        (train_vit, [*vit, "--attention", "identity"], "attribute.py"),
        (train_resnet_attn, resnet, "attribute.py"),
        (train_resnet_attn, [*resnet, "--attention", "simple"], "attribute.py"),
        (train_resnet_attn, [*resnet, "--attention", "sagan"], "rollout.py"),
    ):
        train.main(argv)
        assert f"python {name} {tmp_path / 'runs'}" in capsys.readouterr().out.splitlines()[-1]


def test_which_checkpoint(run, capsys):
    script.main([str(run), "--index", "0", "--which", "best_on_test"])
    assert "best_on_test.pt: vit after epoch 1" in capsys.readouterr().out
    script.main([str(run / "last.pt"), "--index", "0"])
    assert "last.pt: vit after epoch 1" in capsys.readouterr().out


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
        ("--evaluate", "--index", "1"): "argument --index: not allowed with argument --evaluate",
        ("--image", "photo.jpg", "--evaluate"): "argument --evaluate: not allowed with argument --image",
        ("--evaluate", "--num-images", "1"): "a standard error needs two",
        ("--class", "dodo"): "--class dodo: the classes are ant, bee, cat",
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
