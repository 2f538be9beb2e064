import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import models.attention
from errors import UserError
from maps.recorder import AttentionRecorder
from models import build_model
from models.attention import ATTENTIONS, AttentionSpec, Block, MultiHeadAttention, attend, explicit_attention


def test_explicit_and_fused_agree():
    q, k, v = torch.randn(3, 2, 4, 65, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(explicit_attention(q, k, v), scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tokens", "onednn", "written_out"),
    [
        (torch.bfloat16, 65, "none", True),
        (torch.bfloat16, 401, "none", False),
        (torch.float32, 65, "none", False),
        (torch.float32, 65, "bf16", True),
        (torch.float32, 257, "bf16", False),
    ],
)
def test_attend_picks_by_its_rule_and_gives_the_same_either_way(
    monkeypatch, dtype, tokens, onednn, written_out, matmul_settings
):
    calls = []
    monkeypatch.setattr(models.attention, "explicit_attention", lambda *a: calls.append(1) or explicit_attention(*a))
    q, k, v = torch.randn(3, 2, 4, tokens, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = scaled_dot_product_attention(q.float(), k.float(), v.float())
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    matmul_settings.fp32_precision = onednn
    torch.testing.assert_close(attend(q, k, v).float(), expected, rtol=0, atol=tolerance)
    assert bool(calls) == written_out


def test_attention_is_scaled_by_the_width_of_a_head():
    """softmax(q kᵀ / √d) v by hand: with the whole width for d it would differ by far more than 1e-12."""
    q, k, v = torch.randn(3, 1, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / 8**0.5
    expected = torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)
    torch.testing.assert_close(explicit_attention(q, k, v), expected, rtol=0, atol=1e-12)


def test_equals_torchs_multihead_attention_and_starts_like_it():
    torch.manual_seed(3)
    reference = nn.MultiheadAttention(48, 4, batch_first=True)
    torch.manual_seed(3)
    ours = MultiHeadAttention(AttentionSpec(48, 4))
    bound = (6 / (48 + 3 * 48)) ** 0.5  # Xavier-uniform over the stacked weight
    for weight in (reference.in_proj_weight, ours.qkv.weight):
        assert weight.abs().max() <= bound and abs(weight.std() - bound / 3**0.5) < 0.02 * bound
    assert ours.qkv.bias.abs().max() == ours.proj.bias.abs().max() == 0
    assert reference.in_proj_bias.abs().max() == reference.out_proj.bias.abs().max() == 0

    ours.qkv.load_state_dict({"weight": reference.in_proj_weight, "bias": reference.in_proj_bias})
    ours.proj.load_state_dict(reference.out_proj.state_dict())
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), reference(x, x, x)[0], rtol=0, atol=1e-5)


def test_block_equals_torchs_pre_norm_encoder_layer():
    torch.manual_seed(0)
    reference = nn.TransformerEncoderLayer(
        32, 4, dim_feedforward=64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    ours = Block(AttentionSpec(32, 4), mlp_ratio=2.0)
    ours.load_state_dict(
        {
            **{f"norm1.{name}": value for name, value in reference.norm1.state_dict().items()},
            **{f"norm2.{name}": value for name, value in reference.norm2.state_dict().items()},
            "attn.qkv.weight": reference.self_attn.in_proj_weight,
            "attn.qkv.bias": reference.self_attn.in_proj_bias,
            "attn.proj.weight": reference.self_attn.out_proj.weight,
            "attn.proj.bias": reference.self_attn.out_proj.bias,
            "mlp.0.weight": reference.linear1.weight,
            "mlp.0.bias": reference.linear1.bias,
            "mlp.3.weight": reference.linear2.weight,
            "mlp.3.bias": reference.linear2.bias,
        }
    )
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x), reference(x), rtol=0, atol=1e-5)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="--embed-dim 30 is not divisible by --num-heads 8"):
        MultiHeadAttention(AttentionSpec(30, 8))


def has_weights(model, images, monkeypatch):
    """The recorder's rule: a submodule of a block is named softmax, or torch's function is called."""
    calls = []

    def spy(*args, **options):
        calls.append(args)
        return scaled_dot_product_attention(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        model(images)
    return bool(calls) or any(name.split(".")[-1] == "softmax" for name, _ in model.blocks.named_modules())


@pytest.mark.parametrize("model", ["vit", "cct_2_3x2", "vit_lite_6_4", "cct_nano"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_in_every_family(name, model, monkeypatch):
    """Shapes, gradients of all parameters, bfloat16, a grid that is not square, and maps or a clear refusal."""
    torch.manual_seed(0)
    built = build_model(model, image_size=(16, 24), attention=name)
    images = torch.randn(3, 3, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert built(images).dtype == torch.bfloat16
    logits = built(images)
    assert logits.shape == (3, 10)
    logits.square().mean().backward()
    assert not [name for name, p in built.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    if has_weights(built, images, monkeypatch):
        with AttentionRecorder(built) as recorder:
            built(images)
        tokens = built.grid[0] * built.grid[1] + (recorder.pooling is None)
        assert {tuple(a.shape) for a in recorder.attentions} == {(3, recorder.attentions[0].shape[1], tokens, tokens)}
    else:
        with pytest.raises(UserError, match="has no attention to record"), AttentionRecorder(built) as recorder:
            built(images)


def changed_tokens(module, tokens, index):
    """Which of the tokens that come out of a module change with the token of that index."""
    x = torch.randn(1, tokens, 8)
    other = x.clone()
    other[0, index] += 1
    with torch.no_grad():
        return (module(x) - module(other)).abs().sum(2)[0].gt(1e-6).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "class_token", "index", "expected"),
    [
        ("identity", False, 5, [5]),
        ("identity", True, 5, [0, 5]),  # the class token takes the mean of the others
        ("identity", True, 0, []),
        ("depthwise", False, 5, [0, 1, 2, 4, 5, 6, 8, 9, 10]),  # of 3 rows of 4
        ("depthwise", True, 6, [0, 1, 2, 3, 5, 6, 7, 9, 10, 11]),
        ("softmax", False, 5, list(range(12))),
    ],
)
def test_which_tokens_mix(name, class_token, index, expected):
    torch.manual_seed(0)
    module = ATTENTIONS[name](AttentionSpec(8, 2, grid=(3, 4), class_token=class_token))
    assert changed_tokens(module, 12 + class_token, index) == expected


def test_an_unknown_attention_lists_those_that_there_are():
    with pytest.raises(UserError, match="--attention linear: choose from softmax, identity, depthwise"):
        build_model("vit", attention="linear")


def test_dropout_of_attention_weights_is_in_training_alone():
    torch.manual_seed(0)
    module = MultiHeadAttention(AttentionSpec(8, 2, attn_drop=0.5))
    x = torch.randn(1, 9, 8)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
