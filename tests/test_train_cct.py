"""train_cct.py as a user runs it, and the flags that it shares with the others."""

import pytest
import torch
from test_cct import published_weights

import rollout
import train_cct
import train_vit
from errors import UserError
from models import build_model
from training.checkpoint import load_checkpoint, rebuild_model


@pytest.fixture
def cct_flags(image_folder, tmp_path):
    """The flags of a run of seconds: the smallest CCT on image_folder, 2 epochs of 6 steps, written to tmp_path."""
    return [
        *("--dataset", "folder", "--data-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache")),
        *("--out-dir", str(tmp_path / "runs"), "--model", "cct_2_3x2", "--image-size", "16", "--device", "cpu"),
        *("--epochs", "2", "--batch-size", "8", "--recipe", "report"),
    ]


@pytest.mark.parametrize("model", ["cct_2_3x2", "vit_lite_6_4", "cct_nano"])
def test_a_run_and_its_maps(model, cct_flags, tmp_path, capsys):
    result = train_cct.main([*cct_flags, "--model", model])
    assert result["model"] == model and result["script"] == "train_cct.py" and result["recipe"] == "report"
    folder = tmp_path / "runs" / model
    rollout.main([str(folder), "--index", "0", "1", "--method", "all"])
    assert len(list((folder / "maps").glob("*.npy"))) == 2 * 5
    assert f"python rollout.py {folder}" in capsys.readouterr().out


def test_everything_at_once_resumes_to_the_bit(cct_flags, tmp_path):
    """Muon, averaged weights, mixing and every augmentation, stopped within an epoch, against the run at one go."""
    flags = [
        *cct_flags,
        *("--recipe", "strong", "--aa", "rand", "--mixup", "0.8", "--cutmix", "1", "--reprob", "0.5", "--cutout", "4"),
        *("--rotate", "10", "--scale", "0.5", "1", "--ratio", "0.9", "1.1", "--model-ema-decay", "0.9"),
        *("--drop", "0.1", "--attn-drop", "0.1", "--drop-path", "0.2"),
    ]
    whole = train_cct.main([*flags, "--run-name", "whole"])
    assert train_cct.main([*flags, "--run-name", "cut", "--minutes", "0.0001"]) is None
    cut = train_cct.main(["--resume", str(tmp_path / "runs" / "cut"), "--device", "cpu"])
    assert whole["weights"] == cut["weights"] == "ema"
    first, second = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    for part in ("weights", "ema"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    assert first["optimizer"]["muon"]["state"].keys() and cut["test_accuracy"] == whole["test_accuracy"]
    for part in ("muon", "adamw"):
        states = zip(*(c["optimizer"][part]["state"].values() for c in (first, second)), strict=True)
        assert all(torch.equal(a[key], b[key]) for a, b in states for key in a)


def test_an_average_that_has_hardly_moved_is_named(cct_flags, capsys):
    result = train_cct.main([*cct_flags, "--model-ema-decay", "0.99"])
    steps = result["epochs"] * -(-result["images"]["train"] // result["args"]["batch_size"])
    assert f"the average still has {0.99**steps:.0%} of the first weights: lower --model-ema" in capsys.readouterr().out


def test_a_checkpoint_is_rebuilt_with_the_weights_that_were_judged(cct_flags, tmp_path, capsys):
    train_cct.main([*cct_flags, "--model-ema-decay", "0.5"])
    assert "of the first weights" not in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "runs" / "cct_2_3x2")
    weights = rebuild_model(checkpoint, build_model).state_dict()
    assert all(torch.equal(weights[name], checkpoint["ema"][name]) for name in weights)
    assert not all(torch.equal(weights[name], checkpoint["weights"][name]) for name in weights)


@pytest.mark.parametrize("script", [train_cct, train_vit])
def test_short_strong_runs_are_light(script):
    assert script.chosen_recipe({}) == ("report", script.REPORT)
    assert script.chosen_recipe({"dataset": "shapes"})[0] == "quick"
    assert script.chosen_recipe({"recipe": "strong"})[1] == script.STRONG
    assert script.chosen_recipe({"recipe": "strong", "epochs": 50})[1] == script.STRONG
    assert script.chosen_recipe({"recipe": "strong", "epochs": 49})[1] == script.STRONG | script.LIGHT


def test_weights_of_the_authors_are_taken(cct_flags, tmp_path, capsys):
    path = tmp_path / "cct_2_3x2_32.pth"
    torch.save(published_weights("cct_2_3x2", tokens=64, classes=10), path)
    result = train_cct.main([*cct_flags, "--init-from", str(path), "--lr", "1e-12"])
    assert "left out: head.weight, head.bias" in capsys.readouterr().out and result["init_from"] == path.name
    weights = torch.load(tmp_path / "runs" / "cct_2_3x2" / "last.pt", weights_only=True)["weights"]
    expected = torch.load(path, weights_only=True)["classifier.blocks.1.linear1.weight"]
    torch.testing.assert_close(weights["blocks.1.mlp.0.weight"], expected)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"--init-from {path}: it is neither a checkpoint nor a file of weights"):
        train_cct.main([*cct_flags, "--init-from", str(path)])
    with pytest.raises(UserError, match="there is no checkpoint .*missing.pth"):
        train_cct.main([*cct_flags, "--init-from", str(tmp_path / "missing.pth")])


@pytest.mark.parametrize("model", ["cct_2_3x2", "cct_nano"])
def test_a_run_starts_from_the_weights_of_another(model, cct_flags, tmp_path, capsys):
    train_cct.main([*cct_flags, "--model", model, "--run-name", "first", "--epochs", "1"])
    for start in (tmp_path / "runs" / "first", tmp_path / "runs" / "first" / "best_on_test.pt"):
        flags = [*cct_flags, "--model", model, "--run-name", "then", "--overwrite", "--epochs", "1", "--lr", "1e-12"]
        train_cct.main([*flags, "--init-from", str(start)])
        assert f"weights of {start}; left out: nothing" in capsys.readouterr().out
        first, then = (torch.load(tmp_path / "runs" / name / "last.pt")["weights"] for name in ("first", "then"))
        assert all(
            torch.allclose(first[name], then[name])
            for name in first
            if "num_batches" not in name and "running" not in name
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "cct_9"], "invalid choice: 'cct_9' .*cct_6_3x1"),
        (["--smoothing", "1"], "--smoothing: must be at least 0 and below 1, not 1"),
        (["--drop-path", "-0.1"], "--drop-path: must be at least 0 and below 1, not -0.1"),
        (["--aa", "imagenet"], "--aa: invalid choice: 'imagenet'"),
        (["--fill", "256"], "--fill: must be at least 0 and at most 255, not 256"),
        (["--attention", "none"], "--attention: invalid choice: 'none'"),
        (
            ["--model", "cct_nano", "--positional-embedding", "sine"],
            "--positional-embedding: cct_nano does not take it",
        ),
        (["--init-from", "nowhere"], "there is no checkpoint nowhere"),
        (["--image-size", "4"], "--image-size 4 is too small"),
        (["--model", "vit_lite_6_4", "--image-size", "18"], "--image-size 18: must be a multiple of 4"),
    ],
)
def test_mistakes_are_one_line(flags, message, cct_flags):
    with pytest.raises(UserError, match=message):
        train_cct.main([*cct_flags, *flags])


def test_the_reports_small_vit(folder_flags):
    """8 layers of 64, 4 heads, patches of 6 that do not divide 32 pixels."""
    small = ["--depth", "8", "--embed-dim", "64", "--num-heads", "4", "--patch-size", "6"]
    with pytest.raises(UserError, match="--image-size 32 is not divisible by --patch-size 6: use 30 or 36, or --pad"):
        train_vit.main([*folder_flags, *small])
    assert train_vit.main([*folder_flags, *small, "--pad", "--epochs", "1"])["args"]["pad"]
