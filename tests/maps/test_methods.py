"""Every way to join layers against the same written out by hand, in float64."""

import pytest
import torch

import maps.methods as methods
from errors import UserError
from maps.recorder import AttentionRecorder
from models import build_model

EXACT = {"rtol": 0, "atol": 1e-12}


def stochastic(layers=3, batch=2, heads=4, tokens=7, seed=0):
    """Random attention weights, another scale of logits in every layer, so that the layers are unlike each other."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, heads, tokens, tokens, dtype=torch.float64, generator=generator) * (layer + 1)).softmax(-1)
        for layer in range(layers)
    ]


def gradients_like(attentions, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in attentions]


def by_hand(layers):
    """Products of rows, one number at a time: result = layers[-1] · ... · layers[0]."""
    result = layers[0].tolist()
    for layer in layers[1:]:
        left = layer.tolist()
        size = range(len(left))
        result = [[sum(left[i][k] * result[k][j] for k in size) for j in size] for i in size]
    return torch.tensor(result, dtype=torch.float64)


def normalised(matrix):
    mixed = [[0.5 * value + 0.5 * (i == j) for j, value in enumerate(row)] for i, row in enumerate(matrix.tolist())]
    return torch.tensor([[value / sum(row) for value in row] for row in mixed], dtype=torch.float64)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout(fusion):
    attentions = stochastic()
    result = methods.rollout(attentions, head_fusion=fusion)
    torch.testing.assert_close(result.sum(-1), torch.ones(2, 7, dtype=torch.float64), **EXACT)
    for item in range(2):
        heads = [[a[item, h].tolist() for h in range(4)] for a in attentions]
        pick = {"mean": lambda v: sum(v) / 4, "max": max, "min": min}[fusion]
        fused = [[[pick([head[i][j] for head in layer]) for j in range(7)] for i in range(7)] for layer in heads]
        expected = by_hand([normalised(torch.tensor(layer, dtype=torch.float64)) for layer in fused])
        torch.testing.assert_close(result[item], expected, **EXACT)


def test_rollout_discards_the_lowest_of_each_row_but_never_the_class_token():
    attention = torch.tensor(
        [[0.01, 0.02, 0.9, 0.07], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.5, 0.2, 0.05]]
    )
    kept = methods.discard_lowest(attention[None].double(), 0.67)
    expected = [[0.01, 0, 0.9, 0], [0.4, 0.3, 0, 0], [0.1, 0, 0, 0.4], [0.25, 0.5, 0, 0]]
    torch.testing.assert_close(kept[0], torch.tensor(expected).double(), rtol=0, atol=1e-7)
    without = methods.discard_lowest(attention[None].double(), 0.5, class_token=False)
    assert (without[0, 0] > 0).tolist() == [False, False, True, True]
    attentions = stochastic()
    rows = methods.rollout(attentions, discard_ratio=0.5).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), **EXACT)
    assert not torch.equal(methods.rollout(attentions, discard_ratio=0.5), methods.rollout(attentions))


def test_raw_is_the_last_layer():
    attentions = stochastic()
    assert torch.equal(methods.raw(attentions), attentions[2].mean(1))
    assert torch.equal(methods.raw(attentions, head_fusion="max"), attentions[2].amax(1))


def test_the_reports_formula():
    attentions = stochastic()
    result = methods.report(attentions)
    for item in range(2):
        first, second, third = (a[item].mean(0) for a in attentions)
        expected = by_hand([third, by_hand([second, first.T]).T])  # ((A₁ᵀ A₂)ᵀ A₃), as products of rows
        torch.testing.assert_close(result[item], expected, **EXACT)
    assert torch.equal(methods.report_column(attentions), result.mT)


def test_gradient_rollout_with_layers_that_are_unlike_each_other():
    attentions = stochastic()
    gradients = gradients_like(attentions)
    result = methods.gradient_rollout(attentions, gradients)
    for item in range(2):
        layers = []
        for attention, gradient in zip(attentions, gradients, strict=True):
            weighted = [[[max(x, 0.0) for x in row] for row in head] for head in (attention * gradient)[item].tolist()]
            layers.append(torch.tensor(weighted, dtype=torch.float64).mean(0))
        torch.testing.assert_close(result[item], by_hand([normalised(layer) for layer in layers]), **EXACT)
    wrong_order = methods.gradient_rollout(attentions, gradients[::-1])
    assert (wrong_order - result).abs().max() > 0.01


def test_relevance_by_its_definition():
    """R starts as the identity; R <- R + Ā R, Ā the mean over heads of what is positive in gradient times weight."""
    attentions = stochastic()
    gradients = gradients_like(attentions)
    result = methods.relevance(attentions, gradients)
    for item in range(2):
        expected = torch.eye(7, dtype=torch.float64)
        for attention, gradient in zip(attentions, gradients, strict=True):
            weighted = torch.zeros(7, 7, dtype=torch.float64)
            for head in range(4):
                weighted += torch.relu(gradient[item, head] * attention[item, head]) / 4
            expected = expected + by_hand([expected, weighted])
        torch.testing.assert_close(result[item], expected, **EXACT)
    cut_after_the_mean = torch.relu((attentions[0] * gradients[0]).mean(1))
    assert (methods.relevance(attentions[:1], gradients[:1]) - torch.eye(7) - cut_after_the_mean).abs().max() > 0.01


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_batch_equals_its_images_one_by_one(method):
    attentions = stochastic(batch=3)
    gradients = gradients_like(attentions)
    whole = methods.join_layers(method, attentions, gradients, discard_ratio=0.3)
    for item in range(3):
        alone = methods.join_layers(
            method, [a[item : item + 1] for a in attentions], [g[item : item + 1] for g in gradients], discard_ratio=0.3
        )
        torch.testing.assert_close(whole[item], alone[0], **EXACT)


def test_from_tokens_to_a_map():
    matrix = torch.arange(49.0, dtype=torch.float64).reshape(1, 7, 7)
    assert methods.tokens_to_map(matrix, (2, 3)).tolist() == [[[1, 2, 3], [4, 5, 6]]]  # the class token's row
    pooling = torch.rand(1, 6, dtype=torch.float64).softmax(1)
    square = matrix[:, 1:, 1:]
    expected = torch.tensor([[sum(pooling[0, k] * square[0, k, j] for k in range(6)) for j in range(6)]])
    torch.testing.assert_close(methods.tokens_to_map(square, (3, 2), pooling), expected.reshape(1, 3, 2), **EXACT)
    with pytest.raises(UserError, match="6 tokens do not make a grid of 2 x 2"):
        methods.tokens_to_map(matrix, (2, 2))


def wide_vit():
    torch.manual_seed(0)
    model = build_model("vit", image_size=(16, 24), embed_dim=16, depth=3, num_heads=2, drop=0.5).double().eval()
    return model, torch.randn(4, 3, 16, 24, dtype=torch.float64)


def test_maps_of_a_model_whose_grid_is_not_square():
    model, images = wide_vit()
    found, logits = methods.attention_maps(model, images, methods.METHODS)
    assert torch.allclose(logits, model(images)) and not logits.requires_grad
    assert all(p.grad is None for p in model.parameters())
    for method in methods.METHODS:
        assert found[method].shape == (4, 4, 6) and found[method].min() >= 0
        alone, _ = methods.attention_maps(model, images[2:3], [method])
        torch.testing.assert_close(alone[method][0], found[method][2], **EXACT)

    with AttentionRecorder(model, gradients=True) as recorder:
        model(images).max(1).values.sum().backward()
    expected = methods.relevance(recorder.attentions, recorder.gradients)[:, 0, 1:].reshape(4, 4, 6)
    torch.testing.assert_close(found["relevance"], expected, **EXACT)


def test_the_padding_of_a_image_is_no_part_of_its_map():
    torch.manual_seed(0)
    model = build_model("vit", patch_size=6, pad=True, embed_dim=16, depth=2, num_heads=2).eval()
    images = torch.randn(2, 3, 32, 32)
    found, _ = methods.attention_maps(model, images, ["rollout"])
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(images)
    patches = methods.rollout(recorder.attentions)[:, 0, 1:].reshape(2, 6, 6)
    assert found["rollout"].shape == (2, 32, 32)
    assert torch.equal(found["rollout"][:, ::6, ::6], patches) and torch.equal(
        found["rollout"][:, 30:, 31], patches[:, 5:, 5].expand(-1, 2)
    )


def test_a_target_class_changes_what_methods_with_gradients_say():
    model, images = wide_vit()
    predicted, logits = methods.attention_maps(model, images, methods.METHODS)
    targets = (logits.argmax(1) + 1) % 10
    other, _ = methods.attention_maps(model, images, methods.METHODS, targets=targets)
    for method in methods.METHODS:
        assert torch.equal(predicted[method], other[method]) != (method in methods.WITH_GRADIENTS)


def test_the_reports_way_takes_layers_of_different_dropout_masks():
    model, images = wide_vit()
    torch.manual_seed(0)
    way = methods.maps_in_training_mode(model, images)
    assert way.shape == (4, 4, 6) and not model.training
    clean = methods.attention_maps(model, images, ["report"])[0]["report"]
    assert not torch.allclose(way, clean)
    with pytest.raises(RuntimeError):
        methods.maps_in_training_mode(model, images[:, :1])
    assert not model.training
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(methods.maps_in_training_mode(model, images), clean, **EXACT)
