"""Maps of a model whose weights are redrawn: the layers in their order, the weights afterwards, the correlations."""

import pytest
import torch
from scipy.stats import spearmanr

from maps.commands import scores_text
from maps.randomise import layers_from_the_head, learnt_nothing, maps_while_redrawn, rank_correlation
from models import build_model


def vit():
    return build_model("vit", num_classes=3, image_size=16, embed_dim=8, depth=2, num_heads=2)


def test_layers_are_redrawn_from_the_head_down_and_the_model_is_as_before():
    model, fresh = vit(), vit().state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []

    def explain(images, classes):
        state = model.state_dict()
        seen.append([key for key in state if torch.equal(state[key], fresh[key]) and not torch.equal(*both(key))])
        return torch.zeros(1, 4, 4)

    def both(key):
        return before[key], fresh[key]

    found = maps_while_redrawn(model, fresh, {"one": explain}, torch.zeros(1, 3, 16, 16), torch.tensor([0]))
    assert [len(found["one"])] == [len(seen)] == [len(layers_from_the_head(before))] == [7]
    assert seen[0] == ["head.weight", "head.bias"] and not any(key.startswith("blocks.0") for key in seen[2])
    assert any(key.startswith("blocks.1") for key in seen[2]) and any(key.startswith("blocks.0") for key in seen[3])
    assert {"cls_token", "pos_embed", "patch_embed.weight"} <= {*seen[-1]}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_interrupted_redrawing_restores_the_weights():
    model, fresh = vit(), vit().state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        maps_while_redrawn(model, fresh, {"one": interrupted}, torch.zeros(1, 3, 16, 16), torch.tensor([0]))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def interrupted(images, classes):
    raise KeyboardInterrupt


def test_the_correlation_is_spearmans_ties_included():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(6, (5, 4, 4), generator=generator).float() for _ in range(2))
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b).tolist() == pytest.approx(expected)
    assert rank_correlation(a, a).tolist() == pytest.approx([1] * 5)
    assert rank_correlation(a, torch.ones(5, 4, 4)).tolist() == [0] * 5


def test_a_method_that_finds_the_object_without_learning_has_a_star():
    table = {
        "seeing": {"pointing": (0.9, 0.01), "pointing_redrawn": (0.8, 0.01)},
        "learning": {"pointing": (0.9, 0.01), "pointing_redrawn": (0.31, 0.01)},
        "centred gaussian": {"pointing": (0.3, 0.01)},
    }
    assert learnt_nothing(table) == ["seeing"]
    assert "seeing *" in scores_text(table) and "learning *" not in scores_text(table)
    assert learnt_nothing({"seeing": {"pointing": (0.9, 0.01)}}) == []
