import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import train_vit

pytest.importorskip("captum")
import attribute
from errors import UserError
from maps.attributions import ATTRIBUTIONS, grad_cam, integrated_gradients, token_grad_cam
from maps.methods import METHODS
from models import build_model
from training.checkpoint import load_checkpoint


@pytest.fixture
def run(folder_flags, tmp_path):
    train_vit.main([*folder_flags, "--epochs", "1"])
    return tmp_path / "runs" / "vit"


class Linear(torch.nn.Module):
    """Logits that are linear in the pixels, so that every gradient method has a closed form."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", images, self.weight)


PICTURES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([2, 0, 3])


def test_gradient_methods_on_a_linear_model():
    model = Linear()
    weights = model.weight.detach()[CLASSES]
    expected = {
        "saliency": weights.abs().amax(1),
        "input_x_gradient": (weights * PICTURES).sum(1).abs(),
        "integrated_gradients": (weights * PICTURES).sum(1).abs(),
    }
    for name, maps in expected.items():
        torch.testing.assert_close(ATTRIBUTIONS[name](model, PICTURES, CLASSES)[0], maps, rtol=0, atol=1e-4)
    _, delta = integrated_gradients(model, PICTURES, CLASSES)
    assert delta.shape == (3,) and delta.abs().max() < 1e-3


def test_gradient_shap_is_near_and_has_a_delta_a_image():
    torch.manual_seed(0)
    maps, delta = ATTRIBUTIONS["gradient_shap"](Linear(), PICTURES, CLASSES)
    exact, _ = ATTRIBUTIONS["input_x_gradient"](Linear(), PICTURES, CLASSES)
    assert delta.shape == (3,) and np.corrcoef(maps.flatten(), exact.flatten())[0, 1] > 0.98


def test_occlusion_finds_the_only_pixel_that_counts():
    model = Linear()
    with torch.no_grad():
        model.weight.zero_()
        model.weight[:, :, 5, 2] = 1
    maps, delta = ATTRIBUTIONS["occlusion"](model, torch.ones(2, 3, 8, 8), CLASSES[:2])
    assert delta is None and maps[0, 5, 2] == maps[0].max() > 0
    far = maps[0].clone()
    far[4:7, 1:4] = 0
    assert far.max() == 0


def test_the_batch_equals_its_images_one_by_one():
    torch.manual_seed(0)
    model = build_model("vit", image_size=(16, 24), embed_dim=16, depth=2, num_heads=2).eval()
    images, classes = torch.randn(3, 3, 16, 24), torch.tensor([1, 2, 3])
    for name, method in ATTRIBUTIONS.items():
        maps, _ = method(model, images, classes)
        assert maps.min() >= 0 and maps.max() > 0
        if name != "gradient_shap":  # it draws at random
            torch.testing.assert_close(method(model, images[1:2], classes[1:2])[0][0], maps[1], rtol=1e-3, atol=1e-5)
    assert grad_cam(model, images, classes)[0].shape == (3, 4, 6)


def test_grad_cam_of_tokens_by_its_definition():
    """relu of Σ_d A_d · mean over tokens of ∂ logit / ∂ A_d, with the gradient of a copy of the model's last block."""
    torch.manual_seed(0)
    model = build_model("vit", embed_dim=16, depth=2, num_heads=2).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        x = model.patch_embed(torch.nn.functional.unfold(images, 4, stride=4).mT)
        x = torch.cat([model.cls_token.expand(2, -1, -1), x], 1) + model.pos_embed
        x = model.blocks[0](x)
    features = model.blocks[1].norm1(x).detach().requires_grad_()
    block = model.blocks[1]
    y = x + block.attn(features)
    y = y + block.mlp(block.norm2(y))
    model.head(model.norm(y[:, 0]))[:, 5].sum().backward()
    expected = torch.relu((features * features.grad.mean(1, keepdim=True)).sum(2))[:, 1:].reshape(2, 8, 8)
    torch.testing.assert_close(
        token_grad_cam(model, model.blocks[-1].attn, images, torch.tensor([5, 5])), expected.detach()
    )


def test_grad_cam_of_tokens_where_blocks_are_used_twice():
    """Of the last use: a nudge of the features that enter it moves the logit by their gradient."""
    torch.manual_seed(0)
    model = build_model("cct_nano").double().eval()
    images, classes, entered = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2]), []
    attention = model.blocks[-1].attn
    hook = attention.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0].requires_grad_()))
    logits = model(images)
    hook.remove()
    assert len(entered) == 2
    logits[torch.arange(2), classes].sum().backward(inputs=[entered[1]])
    expected = torch.relu((entered[1] * entered[1].grad.mean(1, keepdim=True)).sum(2)).unflatten(1, model.grid)
    torch.testing.assert_close(grad_cam(model, images, classes)[0], expected.detach())


def test_grad_cam_of_a_resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).eval()
    images = torch.randn(2, 3, 64, 64)
    features = []
    hook = model.layer4.register_forward_hook(lambda module, inputs, output: features.append(output))
    logits = model(images)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), features)
    expected = torch.relu((features[0] * gradient.mean((2, 3), keepdim=True)).sum(1)).detach()
    torch.testing.assert_close(grad_cam(model, images, torch.tensor([1, 1]))[0], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="grad_cam: Linear has neither blocks nor layer4"):
        grad_cam(Linear(), PICTURES, CLASSES)


def test_images_are_written_for_every_class_that_is_named(run, tmp_path):
    written = attribute.main([str(run), "--index", "2", "--method", "saliency", "--target", "ant", "cat"])
    assert [path.name for path in written] == ["2-saliency-0-ant.npy", "2-saliency-2-cat.npy", "2-saliency.png"]
    assert not np.array_equal(np.load(written[0]), np.load(written[1])) and Image.open(written[2]).size[0] > 800
    Image.effect_noise((90, 50), 80).save(tmp_path / "photo.png")
    written = attribute.main([str(run), "--image", str(tmp_path / "photo.png"), "--method", "all"])
    assert len(written) == len(ATTRIBUTIONS) + 1 and written[-1].name == "photo-attribution-all.png"
    before = [np.load(path) for path in written[:-1]]
    again = attribute.main([str(run), "--image", str(tmp_path / "photo.png"), "--method", "all"])
    assert all(np.array_equal(one, np.load(path)) for one, path in zip(before, again[:-1], strict=True))
    with pytest.raises(UserError, match="--target dodo: the classes are ant, bee, cat"):
        attribute.main([str(run), "--index", "0", "--target", "dodo"])


def test_classes_whose_names_are_alike_or_no_file_names(run, monkeypatch):
    checkpoint = load_checkpoint(run) | {"classes": ["a/b", "a b", "a/b"]}
    monkeypatch.setattr("maps.commands.load_checkpoint", lambda *args, **options: checkpoint)
    written = attribute.main([str(run), "--index", "2", "--method", "saliency", "--target", "0", "1", "2"])
    assert [path.name for path in written[:3]] == [f"2-saliency-{i}-a_b.npy" for i in range(3)]
    assert all(path.exists() for path in written)


def test_grad_cam_of_torchvisions_vit():
    """vit_b_16 has no `blocks`; its last nn.MultiheadAttention is taken."""
    torch.manual_seed(0)
    model = build_model("vit_b_16").eval()
    model.vit.encoder.layers = model.vit.encoder.layers[-2:]  # faster
    torch.nn.init.normal_(model.vit.heads.head.weight)  # zero at the start
    maps, _ = grad_cam(model, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert maps.shape == (2, 14, 14) and (maps > 0).any(2).any(1).all()


def test_grad_cam_of_padded_images_is_without_the_padding():
    torch.manual_seed(0)
    model = build_model("vit", patch_size=6, pad=True, embed_dim=16, depth=2, num_heads=2).eval()
    maps, _ = grad_cam(model, torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert maps.shape == (2, 32, 32) and torch.equal(maps[:, 6:12, 30:], maps[:, 6:7, 30:31].expand(-1, 6, 2))


def test_evaluation_stands_in_one_table_with_the_attention_maps(run):
    import rollout

    rollout.main([str(run), "--evaluate", "--num-images", "4"])
    path = attribute.main([str(run), "--evaluate", "--num-images", "4"])[0]
    assert set(json.loads(path.read_text())["scores"]) >= {"rollout", "relevance", *ATTRIBUTIONS, "uniform"}
    path = attribute.main([str(run), "--evaluate", "--num-images", "5"])[0]  # other images: another table
    assert "rollout" not in json.loads(path.read_text())["scores"]


def test_all_methods_are_compared_the_best_first(run, folder_flags, monkeypatch, capsys):
    drawn = []
    with monkeypatch.context() as patch:
        patch.setattr(attribute, "draw_comparison", lambda path, image, caption, maps, **look: drawn.append([*maps]))
        attribute.main([str(run), "--compare", "--index", "3"])
        assert drawn[0] == [*METHODS, *ATTRIBUTIONS]
        order = {"saliency": 0.9, "raw": 0.8, "rollout": 0.1}
        scores = {name: {"pointing": [mean, 0.1]} for name, mean in order.items()}
        (run / "maps" / "evaluation.json").write_text(json.dumps({"scores": scores}))
        attribute.main([str(run), "--compare", "--index", "3", "--target", "bee"])
        assert drawn[1][:3] == [*order] and {*drawn[1]} == {*drawn[0]}
        heads = folder_flags.index("--num-heads")
        headless = [*folder_flags[:heads], *folder_flags[heads + 2 :], "--attention", "identity", "--epochs", "1"]
        train_vit.main([*headless, "--run-name", "plain"])
        attribute.main([str(run.parent / "plain"), "--compare", "--index", "3"])
        assert drawn[2] == [*ATTRIBUTIONS] and "left out: VisionTransformer has no attention" in capsys.readouterr().out
    (path,) = attribute.main([str(run), "--compare", "--index", "3"])
    assert path.name == "3-compare.png" and Image.open(path).size[0] > 1500
    for flags in (["--method", "saliency"], ["--target", "ant", "bee"], ["--evaluate"]):
        with pytest.raises(UserError, match="^--compare draws all methods for one class: without --evaluate, --method"):
            attribute.main([str(run), "--compare", *flags])
