"""The ViT report's own checkpoints: its model, by its names, gives the logits that ours gives with its weights."""

import pytest
import torch
from torch import nn

import rollout
import train_vit
from errors import UserError
from models import build_model
from models.pretrained import load_published


class ReportsPatches(nn.Module):
    """einops' "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"."""

    def forward(self, images, p=4):
        batch, channels, height, width = images.shape
        cut = images.view(batch, channels, height // p, p, width // p, p)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


class ReportsBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mh_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * dim, dim), nn.Dropout(0.2)
        )

    def forward(self, x):
        normed = self.layer_norm_1(x)
        x = x + self.mh_attention(normed, normed, normed)[0]
        return x + self.mlp(self.layer_norm_2(x))


class ReportsModel(nn.Module):
    """The report's ViT with the names of its own files, smaller."""

    def __init__(self, dim=32, heads=4, depth=3, classes=10):
        super().__init__()
        self.pos_embedding, self.cls_token = nn.Parameter(torch.randn(1, 65, dim)), nn.Parameter(torch.randn(1, 1, dim))
        self.to_patch_embedding = nn.Sequential(ReportsPatches(), nn.Linear(48, dim))
        self.dropout = nn.Dropout(0.2)
        self.transformers_seq = nn.Sequential(*(ReportsBlock(dim, heads) for _ in range(depth)))
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, images):
        x = self.to_patch_embedding(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        return self.mlp_head(self.transformers_seq(self.dropout(x))[:, 0])


@pytest.fixture
def reports():
    torch.manual_seed(0)
    model = ReportsModel().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no bias at 0, no scale at 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ours(**options):
    return build_model("vit", embed_dim=32, depth=3, num_heads=4, **options).eval()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_logits_are_the_reports(prefix, reports):
    model = ours()
    assert load_published(model, {prefix + name: value for name, value in reports.state_dict().items()}) == []
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reports(images), rtol=0, atol=1e-5)


def test_names_that_do_not_fit_are_said(reports):
    weights = reports.state_dict() | {"transformers_seq.3.gate.weight": torch.zeros(2)}
    with pytest.raises(UserError, match=r"blocks.3.gate.weight \(\(2,\) in the file, missing in the model\)"):
        load_published(ours(), weights)
    with pytest.raises(UserError, match=r"patch_embed.weight \(\(32, 48\) in the file, \(32, 192\) in the model\)"):
        load_published(ours(patch_size=8), reports.state_dict())
    del weights["to_patch_embedding.1.bias"], weights["transformers_seq.3.gate.weight"]
    with pytest.raises(UserError, match=r"patch_embed.bias \(missing in the file, \(32,\) in the model\)"):
        load_published(ours(), weights)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_starts_from_its_file_and_its_maps_are_drawn(wrapped, reports, folder_flags, tmp_path, capsys):
    """The two commands of docs/export.md; the second also from a checkpoint with the weights among other things."""
    weights = reports.state_dict()
    file = {"epoch": 3, "model_state_dict": weights, "optimizer_state_dict": {"state": {}}} if wrapped else weights
    torch.save(file, tmp_path / "report.pth")
    flags = [*folder_flags, "--embed-dim", "32", "--depth", "3", "--num-heads", "4", "--epochs", "1", "--lr", "1e-12"]
    train_vit.main([*flags, "--init-from", str(tmp_path / "report.pth")])
    printed = capsys.readouterr().out
    assert (
        "left out: head.weight, head.bias; tensors in it: pos_embedding 1, cls_token 1, to_patch_embedding 2" in printed
    )
    assert "transformers_seq 36, mlp_head 4" in printed
    last = torch.load(tmp_path / "runs" / "vit" / "last.pt", weights_only=True)["weights"]
    torch.testing.assert_close(last["blocks.1.attn.qkv.bias"], weights["transformers_seq.1.mh_attention.in_proj_bias"])
    written = rollout.main([str(tmp_path / "runs" / "vit"), "--index", "0"])
    assert any(path.suffix == ".npy" for path in written)
