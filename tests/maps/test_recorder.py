import time

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from errors import UserError
from maps.methods import attention_maps, maps_in_training_mode
from maps.recorder import AttentionRecorder
from models import build_model


def small_vit(**options):
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 3, "num_heads": 4} | options
    return build_model("vit", **options).eval()


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64
    )


def timm_vit():
    return timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4)


PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1))
MODELS = {
    "ours": (lambda: small_vit(patch_size=8), PICTURES),
    "torchvision": (torchvision_vit, PICTURES),
    "timm": (timm_vit, PICTURES),
    "nn.TransformerEncoder": (encoder, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_recorded_and_the_output_stays_the_same(name):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        expected = model(inputs)
        with AttentionRecorder(model) as recorder:
            recorded = model(inputs)
        after = model(inputs)
    torch.testing.assert_close(recorded, expected, rtol=0, atol=1e-5)
    assert torch.equal(after, expected)
    assert [tuple(a.shape) for a in recorder.attentions] == [(2, 4, 17, 17)] * 3
    for attention in recorder.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 17), rtol=0, atol=1e-5)


def test_torchvisions_vit_b_16_as_it_is():
    model = torchvision.models.vit_b_16().eval()
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(torch.zeros(1, 3, 224, 224))
    assert [tuple(a.shape) for a in recorder.attentions] == [(1, 12, 197, 197)] * 12


@pytest.mark.parametrize("name", MODELS)
def test_weights_times_values_are_the_layers_output(name, monkeypatch):
    """The values and the outputs of torch's own kernel are taken in a pass of their own, without the recorder."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    fused, passed = F.scaled_dot_product_attention, []

    def spy(query, key, value, *args, **options):
        output = fused(query, key, value, *args, **options)
        passed.append((value, output))
        return output

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", spy)
            torch.backends.mha.set_fastpath_enabled(False)
            model(inputs)
            torch.backends.mha.set_fastpath_enabled(True)
        with AttentionRecorder(model) as recorder:
            model(inputs)
    assert len(passed) == 3
    for attention, (value, output) in zip(recorder.attentions, passed, strict=True):
        torch.testing.assert_close(attention @ value, output, rtol=0, atol=1e-5)


def test_masks_causality_and_scale_are_torchs():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator)
    shared_k, shared_v = torch.randn(2, 2, 2, 6, 8, generator=generator)
    additive = torch.randn(6, 6, generator=generator)
    cases = [
        ((q, k, v), {"attn_mask": additive}),
        ((q, k, v), {"attn_mask": (additive > 0) | torch.eye(6, dtype=torch.bool)}),
        ((q, k, v), {"is_causal": True}),
        ((q, k, v), {"scale": 0.7}),
        ((q, shared_k, shared_v), {"enable_gqa": True}),
    ]

    class OneCall(nn.Module):
        def forward(self, inputs, options):
            return F.scaled_dot_product_attention(*inputs, **options)

    model = OneCall()
    for inputs, options in cases:
        expected = model(inputs, options)
        with AttentionRecorder(model):
            torch.testing.assert_close(model(inputs, options), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"average_attn_weights": False}, {"need_weights": False}])
@pytest.mark.parametrize("batched", [True, False])
def test_multihead_attention_is_recorded_and_still_gives_its_weights(options, batched):
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, **options)

    torch.manual_seed(0)
    model, x = Asking(), torch.randn(3, 6, 8) if batched else torch.randn(6, 8)
    expected, weights = model(x)
    own = model.attn(x, x, x, average_attn_weights=False)[1]
    with AttentionRecorder(model, gradients=True) as recorder:
        output, given = model(x)
        output.sum().backward()
        assert model.attn(x, x, x)[1] is not None  # not the model's pass: torch's own
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(given, weights)
    torch.testing.assert_close(recorder.attentions[0], own if batched else own[None])
    assert recorder.gradients[0].abs().max() > 0


def test_one_head_without_a_dimension_of_its_own():
    class OneHead(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(6, 6, 4, generator=torch.Generator().manual_seed(0))
    with AttentionRecorder(OneHead()) as recorder:
        torch.testing.assert_close(recorder.model(x), F.scaled_dot_product_attention(x, x, x))
    torch.testing.assert_close(recorder.attentions, [(x @ x.mT / 2).softmax(-1)[:, None]])


class Attending(nn.Module):
    """Attention of all tokens to all, then of the first `asking` to all, last a softmax over the classes."""

    def __init__(self, asking):
        super().__init__()
        self.asking, self.softmax = asking, nn.Softmax(1)

    def forward(self, x):
        x = F.scaled_dot_product_attention(x, x, x)
        x = F.scaled_dot_product_attention(x[:, :, : self.asking], x, x)
        return self.softmax(x.mean((1, 2)))


def test_attention_with_one_query_at_the_end_pools_the_tokens():
    """As timm's models with global_pool="map" have it."""
    x = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    with AttentionRecorder(Attending(1)) as recorder:
        recorder.model(x)
    assert [a.shape for a in recorder.attentions] == [(2, 4, 16, 16)]
    inside = F.scaled_dot_product_attention(x, x, x)
    weights = (inside[:, :, :1] @ inside.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(recorder.pooling, weights.mean(1)[:, 0])


def test_attention_from_some_tokens_to_others_is_refused():
    with pytest.raises(UserError, match="from 3 tokens to 16 others"), AttentionRecorder(Attending(3)) as recorder:
        recorder.model(torch.randn(2, 4, 16, 8))


def test_gradients_are_those_of_the_weights():
    """Against a finite difference: the score moves by gradient times nudge."""
    model = small_vit().double()
    images = PICTURES.double()
    with AttentionRecorder(model, gradients=True) as recorder:
        model(images)[:, 3].sum().backward()
    assert [g.shape for g in recorder.gradients] == [a.shape for a in recorder.attentions]
    gradient = recorder.gradients[1]

    nudge = torch.zeros_like(gradient)
    nudge[0, 2, 5, 7] = 1e-6
    calls = []

    class Nudged(AttentionRecorder):
        def keep(self, weights):
            super().keep(weights)
            calls.append(1)
            if len(calls) == 2:
                weights += nudge

    with torch.no_grad():
        plain = model(images)[:, 3].sum()
        with Nudged(model):
            nudged = model(images)[:, 3].sum()
    assert ((nudged - plain) / 1e-6).item() == pytest.approx(gradient[0, 2, 5, 7].item(), rel=1e-3)


def test_frozen_models_give_gradients_too():
    model = small_vit().requires_grad_(False)
    with AttentionRecorder(model, gradients=True) as recorder:
        model(PICTURES)[:, 0].sum().backward()
    assert len(recorder.gradients) == 3 and recorder.gradients[0].abs().max() > 0


def test_asking_for_gradients_that_are_not_there():
    model = small_vit()
    with AttentionRecorder(model) as recorder:
        model(PICTURES)
    with pytest.raises(RuntimeError, match="no gradients yet"):
        _ = recorder.gradients


def test_everything_is_put_back_also_after_an_exception():
    model = small_vit()
    before = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), AttentionRecorder(model):
        assert F.scaled_dot_product_attention is not before[0]
        raise KeyError("something else")
    with pytest.raises(RuntimeError), AttentionRecorder(model):
        model(torch.zeros(1, 5, 32, 32))
    assert (F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_each_pass_replaces_the_one_before_and_other_models_are_not_recorded():
    model, other = small_vit(), small_vit(depth=5)
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(PICTURES)
        first = recorder.attentions[0]
        other(PICTURES)
        assert len(recorder.attentions) == 3
        model(PICTURES.flip(0))
    assert torch.allclose(first.flip(0), recorder.attentions[0], atol=1e-6) and len(recorder.attentions) == 3


def test_a_model_without_attention_is_told_where_to_go():
    model = torchvision.models.resnet18(num_classes=10)
    with (
        pytest.raises(UserError, match="ResNet has no attention to record: use attribute.py"),
        AttentionRecorder(model),
    ):
        model(PICTURES)


def test_softmaxes_that_are_modules_are_taken_by_a_hook():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = nn.ModuleDict({"softmax": nn.Softmax(-1)})
            self.pool = nn.ModuleDict({"softmax": nn.Softmax(1)})

        def forward(self, x):
            weights = self.graph["softmax"](x[:, None] + x[:, None].mT)  # (B, 1, N, N)
            return self.pool["softmax"]((weights[:, 0] @ x).mean(-1, keepdim=True)).mT @ x

    x = torch.randn(2, 6, 6)
    with AttentionRecorder(Pooled()) as recorder:
        recorder.model(x)
    assert recorder.attentions[0].shape == (2, 1, 6, 6) and recorder.pooling.shape == (2, 6)
    torch.testing.assert_close(recorder.pooling.sum(1), torch.ones(2))


def test_under_autocast_and_in_training_mode_our_own_layers_are_recorded():
    """There attend() would otherwise take its own way, past torch's function."""
    model = small_vit().train()
    with torch.autocast("cpu", torch.bfloat16), AttentionRecorder(model, gradients=True) as recorder:
        model(PICTURES)[:, 0].sum().backward()
    assert len(recorder.attentions) == 3 and recorder.attentions[0].dtype == torch.float32
    assert recorder.gradients[2].abs().max() > 0


@pytest.mark.parametrize(("name", "options"), [("cct_2_3x2", {}), ("resnet18", {"width": 8, "attention": "graph"})])
def test_models_in_half_precision_have_maps_in_float32(name, options):
    model = build_model(name, **options).bfloat16().eval()
    maps, _ = attention_maps(model, PICTURES.bfloat16(), ["rollout", "relevance"])
    assert {method: values.dtype for method, values in maps.items()} == dict.fromkeys(maps, torch.float32)


def test_a_frozen_model_has_maps_by_gradients():
    model = small_vit().requires_grad_(False)
    assert attention_maps(model, PICTURES, ["relevance"])[0]["relevance"].std() > 0


@pytest.mark.parametrize("attention", ["graph", "graph_v2", "classic", "sagan"])
def test_a_resnets_map_is_the_mean_over_those_who_ask(attention):
    torch.manual_seed(0)
    model = build_model("resnet18", width=8, attention=attention, attention_after="layer3").eval()
    with AttentionRecorder(model) as recorder:
        model(PICTURES)
    (weights,) = recorder.attentions  # (2, heads, 64, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert torch.equal(recorder.pooling, torch.full((2, 64), 1 / 64))
    maps, _ = attention_maps(model, PICTURES, ["raw", "rollout", "gradient_rollout"])
    torch.testing.assert_close(maps["raw"], weights.mean(dim=(1, 2)).unflatten(1, (8, 8)))
    torch.testing.assert_close(maps["rollout"], maps["raw"] / 2 + 1 / 128)
    assert maps["gradient_rollout"].shape == (2, 8, 8)


def test_maps_in_training_mode_leave_the_statistics_of_a_resnet_as_they_were():
    model = build_model("resnet18", width=8, attention="sagan").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps_in_training_mode(model, PICTURES)
    assert not model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model", ["resnet18", "xresnet18"])
def test_weights_that_are_no_distribution_are_refused_by_name(model):
    model = build_model(model, attention="simple", image_size=32)
    message = "the weights of SimpleSelfAttention are not a distribution and cannot be drawn: use attribute.py"
    with pytest.raises(UserError, match=message), AttentionRecorder(model):
        model(PICTURES)


@pytest.mark.slow
def test_recording_takes_at_most_twice_as_long():
    """The report's ViT, the median of seven pairs of passes over a batch of 64."""
    model = build_model("vit").eval()
    images = torch.randn(64, 3, 32, 32)

    def seconds():
        started = time.perf_counter()
        model(images)
        return time.perf_counter() - started

    ratios = []
    with torch.no_grad():
        for _ in range(8):
            plain = seconds()
            with AttentionRecorder(model):
                ratios.append(seconds() / plain)
    assert sorted(ratios[1:])[3] < 2, ratios
