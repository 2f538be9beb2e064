"""torchvision's ViT-B/16 through train_vit.py, with a small model and a small file of weights in its place."""

import pytest
import torch
import torchvision

import rollout
import train_vit
from errors import UserError
from models import build_model
from models.pretrained import VIT_B_16


@pytest.fixture
def small_vit_b_16(tmp_path, monkeypatch):
    """torchvision's vit_b_16 with two layers of 32, and a file of its weights where torch would have put it."""

    def build(num_classes=1000, dropout=0.0):
        layers = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
        return torchvision.models.VisionTransformer(
            image_size=224, patch_size=16, num_classes=num_classes, dropout=dropout, **layers
        )

    monkeypatch.setattr(torchvision.models, "vit_b_16", build)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = tmp_path / "torch" / "hub" / "checkpoints" / VIT_B_16.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(build().state_dict(), path)
    return path


@pytest.fixture
def finetune_flags(image_folder, tmp_path):
    return [
        *("--recipe", "finetune", "--pretrained", "--device", "cpu", "--batch-size", "16"),
        *("--dataset", "folder", "--data-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache")),
        *("--out-dir", str(tmp_path / "runs")),
    ]


def test_the_published_size():
    assert sum(p.numel() for p in build_model("vit_b_16", num_classes=1000).parameters()) == 86_567_656


def test_fine_tuning_starts_from_the_weights_with_their_mean_and_std_and_its_maps_are_drawn(
    small_vit_b_16, finetune_flags, tmp_path, capsys
):
    result = train_vit.main([*finetune_flags, "--epochs", "1", "--lr", "1e-12"])
    assert result["model"] == "vit_b_16" and result["args"]["lr"] == 1e-12 and result["args"]["sched"] == "cosine"
    folder = tmp_path / "runs" / "vit_b_16"
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    assert checkpoint["mean"] == [0.485, 0.456, 0.406] and checkpoint["std"] == [0.229, 0.224, 0.225]
    started = torch.load(small_vit_b_16, weights_only=True)
    for name, value in started.items():
        own = checkpoint["weights"][f"vit.{name}"]
        assert own.shape[0] == 3 if name.startswith("heads.") else torch.allclose(own, value, atol=1e-6)
    rollout.main([str(folder), "--index", "0", "1"])
    assert len(list((folder / "maps").glob("*.npy"))) == 2
    rollout.main([str(folder), "--evaluate", "--num-images", "4"])
    assert (folder / "maps" / "evaluation.json").exists()


def test_what_the_weights_have_seen_is_asked(small_vit_b_16, finetune_flags, monkeypatch):
    asked = []
    monkeypatch.setattr(train_vit, "warn_of_seen_images", asked.append)
    train_vit.main([*finetune_flags, "--minutes", "0.0001"])
    assert asked == ["folder"]


def test_a_resumed_run_needs_no_weights(small_vit_b_16, finetune_flags, tmp_path):
    whole = train_vit.main([*finetune_flags, "--epochs", "2", "--run-name", "whole"])
    assert train_vit.main([*finetune_flags, "--epochs", "2", "--run-name", "cut", "--minutes", "0.0001"]) is None
    small_vit_b_16.unlink()
    cut = train_vit.main(["--resume", str(tmp_path / "runs" / "cut"), "--device", "cpu"])
    assert cut["test_accuracy"] == whole["test_accuracy"]
    first, second = (torch.load(tmp_path / "runs" / name / "last.pt", weights_only=True) for name in ("whole", "cut"))
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vit"], "--pretrained: there are no weights for vit, only for vit_b_16"),
        (["--embed-dim", "64"], "--embed-dim: vit_b_16 does not take it"),
    ],
)
def test_mistakes_are_one_line(flags, message, finetune_flags):
    with pytest.raises(UserError, match=message):
        train_vit.main([*finetune_flags, *flags])


@pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_downloaded(finetune_flags, small_vit_b_16, monkeypatch, error):
    small_vit_b_16.unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **b: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match=rf"--pretrained: https://.*vit_b_16.* cannot be downloaded \({error}\)"):
        train_vit.main(finetune_flags)


def test_folders_are_read_at_the_size_of_the_model():
    """Not at 32 pixels, which it would enlarge; small images stay small in memory."""
    sizes = [
        train_vit.chosen_recipe({"recipe": "finetune"} | given)[1].get("image_size")
        for given in ({"dataset": "folder"}, {"dataset": "imagewoof"}, {}, {"dataset": "folder", "model": "vit"})
    ]
    assert sizes == [224, 224, None, None]
    assert train_vit.chosen_recipe({"dataset": "folder", "model": "vit_b_16"})[1]["image_size"] == 224


def test_a_damaged_file_in_torchs_cache_is_named(finetune_flags, small_vit_b_16):
    for text in ("<!DOCTYPE html>", "PK\x03\x04"):
        small_vit_b_16.write_text(text)
        with pytest.raises(UserError, match=f"--pretrained: {small_vit_b_16} is damaged: delete it") as caught:
            train_vit.main(finetune_flags)
        assert "\n" not in str(caught.value)


def test_a_run_starts_from_one_place(finetune_flags):
    with pytest.raises(UserError, match="--init-from and --pretrained exclude each other"):
        train_vit.main([*finetune_flags, "--init-from", "somewhere"])
