"""timm's models by --model timm:NAME: from weights in a file or of timm's own, to maps of what they look at."""

from functools import partial

import pytest
import torch

import rollout
import train_vit
from errors import UserError
from maps.methods import attention_maps
from models import build_model
from models.portable import PORTABLE
from models.pretrained import pretrained_side

timm = pytest.importorskip("timm")
MODELS = {
    "vit": partial(timm.models.VisionTransformer, patch_size=16, embed_dim=24, depth=2, num_heads=3),
    "gap": partial(
        timm.models.VisionTransformer,
        **{"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "class_token": False, "global_pool": "avg"},
    ),
    "swin": partial(timm.models.SwinTransformer, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """timm.create_model for small models, whose weights lie in a file; returns what it is to make."""
    wanted = {"kind": "vit"}

    def create(name, *, pretrained=False, num_classes=1000, drop_path_rate=None):
        model = MODELS[wanted["kind"]](num_classes=num_classes, drop_path_rate=drop_path_rate or 0.0)
        if pretrained:
            timm.models.load_checkpoint(model, str(tmp_path / "weights.pth"))
        return model

    monkeypatch.setattr(timm, "create_model", create)
    torch.manual_seed(0)
    torch.save(create("vit").state_dict(), tmp_path / "weights.pth")
    return wanted


@pytest.fixture
def flags(image_folder, tmp_path):
    return [
        *(
            "--recipe",
            "finetune",
            "--device",
            "cpu",
            "--epochs",
            "1",
            "--lr",
            "1e-12",
            "--out-dir",
            str(tmp_path / "runs"),
        ),
        *("--dataset", "folder", "--data-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache")),
        *("--model", "timm:deit_tiny_patch16_224", "--image-size", "32", "--batch-size", "16"),
    ]


@pytest.mark.parametrize("way", ["--pretrained", "--init-from", "safetensors"])
def test_a_run_starts_from_its_weights(way, flags, small, tmp_path, capsys):
    given, started = [way], torch.load(tmp_path / "weights.pth", weights_only=True)
    if way == "--init-from":
        given += [str(tmp_path / "weights.pth")]
    elif way == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(started, tmp_path / "weights.safetensors")
        given = ["--init-from", str(tmp_path / "weights.safetensors")]
    result = train_vit.main([*flags, *given])
    assert result["model"] == "timm:deit_tiny_patch16_224"
    printed = capsys.readouterr().out
    taken = printed.split("left out: vit.head.weight, vit.head.bias; tensors in it: ")[1].split("\n")[0]
    assert set(taken.split(", ")) == {"cls_token 1", "pos_embed 1", "patch_embed 2", "blocks 24", "norm 2", "head 2"}
    folder = tmp_path / "runs" / "timm-deit_tiny_patch16_224"
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    for name, value in started.items():
        if "head" not in name:
            torch.testing.assert_close(checkpoint["weights"][f"vit.{name}"], value)
    assert (checkpoint["mean"] == [0.485, 0.456, 0.406]) == (way == "--pretrained")
    rollout.main([str(folder), "--index", "0", "--method", "all"])
    assert len(list((folder / "maps").glob("*.npy"))) == 5
    assert train_vit.main(["--resume", str(folder), "--device", "cpu"])["model"] == result["model"]


def test_maps_of_plain_vits_and_which_are_refused(small):
    images = torch.randn(2, 3, 224, 224)
    for kind in ("vit", "gap"):
        small["kind"] = kind
        model = build_model("timm:vit_small_patch16_224.dino").eval()
        maps, logits = attention_maps(model, images, ["rollout"])
        assert maps["rollout"].shape == (2, 14, 14)
        torch.testing.assert_close(logits, model(images).detach(), atol=1e-5, rtol=0)
        total = maps["rollout"].sum((1, 2))  # a row of the matrix sums to 1; the class token keeps a part of its own
        assert (total < 0.9).all() if kind == "vit" else torch.allclose(total, torch.ones(2))
    small["kind"] = "swin"
    with pytest.raises(UserError, match="timm:swin_tiny_patch4_window7_224 attends within windows of the image"):
        attention_maps(build_model("timm:swin_tiny_patch4_window7_224").eval(), images, ["rollout"])


def test_timms_own_model_has_its_published_size_and_is_exported(capsys):
    model = build_model("timm:vit_tiny_patch16_224", num_classes=1000).eval()
    assert sum(p.numel() for p in model.parameters()) == 5_717_416 and model.grid == (14, 14)
    assert model.no_weight_decay and pretrained_side("timm:vit_tiny_patch16_384") == 384
    images = torch.randn(2, 3, 32, 32)
    _, convert, runner = PORTABLE["torch"]
    torch.testing.assert_close(
        runner(model, convert(model, images, {}))(images[:1]), model(images[:1]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "timm:vit_tiny_16"], r"--model timm:vit_tiny_16: timm [\d.]+ has no such model"),
        (["--model", "timm:vit_tiny_patch16_224.mine"], "--model timm:vit_tiny_patch16_224.mine: "),
        (["--model", "timm:hf-hub:someone/model"], "has no such model"),
        (["--model", "timm:resnet18", "--image-size", "32"], "--model timm:resnet18 does not cut images into patches"),
        (["--model", "swin"], "--model swin: choose from vit, vit_b_16, timm"),
        (["--model", "timm"], "unknown model 'timm'"),
        (["--channels", "1"], "--channels 1: pretrained models take images of 3 channels"),
        (["--embed-dim", "64"], "--embed-dim: timm:deit_tiny_patch16_224 does not take it"),
    ],
)
def test_mistakes_are_one_line(more, message, flags):
    with pytest.raises(UserError, match=message) as caught:
        train_vit.main([*flags, *more])
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded(flags, small, tmp_path):
    (tmp_path / "weights.pth").unlink()
    message = r"--pretrained: no weights of timm:deit_tiny_patch16_224 \(.*\): --init-from FILE"
    with pytest.raises(UserError, match=message):
        train_vit.main([*flags, "--pretrained"])
