import subprocess
import sys

import pytest
import timm
import torch

from errors import UserError
from models import build_model
from models.summary import summarize


def test_the_reports_model_has_its_parameters():
    assert sum(p.numel() for p in build_model("vit").parameters()) == 3_195_146


def test_class_token_and_position_embedding_start_standard_normal():
    torch.manual_seed(0)
    model = build_model("vit")
    assert abs(model.pos_embed.std() - 1) < 0.02 and abs(model.pos_embed.mean()) < 0.02
    assert abs(model.cls_token.std() - 1) < 0.15


def test_logits_equal_timms_with_the_same_weights():
    torch.manual_seed(0)
    ours = build_model("vit", num_classes=7, embed_dim=64, depth=3, num_heads=4).eval()
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=4, num_classes=7, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2
    ).eval()
    names = {"patch_embed.": "patch_embed.proj.", "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    weights = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value.unflatten(1, (3, 4, 4)) if name == "patch_embed.proj.weight" else value
    theirs.load_state_dict(weights)
    for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.eps = 1e-5  # torch's default; timm's ViT has 1e-6
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_a_image_that_is_not_square_and_one_that_is_padded():
    wide = build_model("vit", image_size=(16, 24), embed_dim=16, depth=1, num_heads=2)
    assert wide.grid == (4, 6) and wide(torch.zeros(2, 3, 16, 24)).shape == (2, 10)
    padded = build_model("vit", patch_size=6, pad=True, embed_dim=16, depth=1, num_heads=2).eval()
    larger = build_model("vit", image_size=36, patch_size=6, embed_dim=16, depth=1, num_heads=2).eval()
    larger.load_state_dict(padded.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert padded.grid == (6, 6)
    assert torch.equal(padded(images), larger(torch.nn.functional.pad(images, (0, 4, 0, 4))))


def test_dropout_works_where_the_report_has_it_and_only_in_training():
    model = build_model("vit", embed_dim=16, depth=2, num_heads=2)
    assert sum(isinstance(m, torch.nn.Dropout) and m.p == 0.2 for m in model.modules()) == 1 + 2 * 2
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_an_unknown_model_is_named():
    with pytest.raises(
        UserError, match="unknown model 'vitt': choose from vit, vit_b_16, .*, cct_nano, .*, resnet18, .*, xresnet18"
    ):
        build_model("vitt")


def test_a_family_is_imported_when_it_is_asked_for():
    code = "import sys; from models import build_model; build_model('vit'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    families = {"vit", "cct", "nano", "resnet", "xresnet", "pretrained"}
    assert {name for name in families if f"models.{name}" in modules} == {"vit"}


def test_summary_counts_every_parameter_and_leaves_the_model_as_it_was():
    model = build_model("vit")
    table = summarize(model, (3, 32, 32))
    assert table.splitlines()[-1].split()[-2] == "3,195,146"
    assert any(line.split()[0] == "pos_embed" and "16,640" in line for line in table.splitlines())
    assert any(line.split()[0] == "blocks.5.attn.qkv" and "(1, 65, 768)" in line for line in table.splitlines())
    assert model.training and not any(m._forward_hooks for m in model.modules())
