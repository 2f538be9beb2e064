"""Attention over feature maps: against the formulas written out, and what a block that was never trained changes."""

import pytest
import torch
from torch import nn

from errors import UserError
from maps.recorder import AttentionRecorder
from models.attention import AttentionSpec, MultiHeadAttention
from models.attention2d import (
    ATTENTIONS2D,
    NODE_ATTENTIONS,
    GraphAttention,
    GraphAttentionV2,
    NodeAttention2d,
    SelfAttention2d,
    SimpleSelfAttention,
    make_attention2d,
)

EXACT = {"rtol": 0, "atol": 1e-10}
NAMES = ATTENTIONS2D[1:]


def double(make, *args, **options):
    """A module in float64, in evaluation mode, where γ is 0.7."""
    torch.manual_seed(0)
    module = make(*args, **options).double().eval()
    if getattr(module, "gamma", None) is not None:
        module.gamma.data.fill_(0.7)
    return module


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weighted_values(module, x, weights):
    """proj(weights · value) of a single image, head by head; weights (heads, N, N)."""
    values = x @ module.value.weight.T + module.value.bias
    heads = [w @ v for w, v in zip(weights, values.chunk(len(weights), dim=1))]
    return torch.cat(heads, dim=1) @ module.proj.weight.T + module.proj.bias


@torch.no_grad()
def test_graph_attention_by_its_formula():
    module = double(GraphAttention, AttentionSpec(6, 2))

    def sigma(s):
        return s if s > 0 else 0.2 * s

    x = random(2, 5, 6)
    out = module(x)
    for image, expected in zip(x, out):
        weights = torch.empty(2, 5, 5, dtype=torch.float64)
        for head in range(2):
            q, k = (image @ layer.weight[head] for layer in (module.query, module.key))
            for i in range(5):
                scores = torch.stack([sigma(q[i] + k[j]) for j in range(5)]).exp()
                weights[head, i] = scores / scores.sum()
        torch.testing.assert_close(weighted_values(module, image, weights), expected, **EXACT)


@torch.no_grad()
def test_graph_attention_v2_by_its_formula():
    module = double(GraphAttentionV2, AttentionSpec(6, 2))
    x = random(2, 5, 6)
    out = module(x)
    for image, expected in zip(x, out):
        weights = torch.empty(2, 5, 5, dtype=torch.float64)
        q, k = (image @ layer.weight.T for layer in (module.query, module.key))
        for head in range(2):
            own = slice(3 * head, 3 * head + 3)
            for i in range(5):
                pairs = [q[i, own] + k[j, own] for j in range(5)]
                scores = torch.stack([module.a[head] @ torch.where(s > 0, s, 0.2 * s) for s in pairs]).exp()
                weights[head, i] = scores / scores.sum()
        torch.testing.assert_close(weighted_values(module, image, weights), expected, **EXACT)


@torch.no_grad()
def test_classic_attention_by_its_formula():
    module = double(MultiHeadAttention, AttentionSpec(6, 2))
    x = random(2, 5, 6)
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).chunk(3, dim=2)
    heads = []
    for own in (slice(0, 3), slice(3, 6)):
        weights = (torch.einsum("bid,bjd->bij", q[..., own], k[..., own]) / 3**0.5).exp()
        heads.append(torch.einsum("bij,bjd->bid", weights / weights.sum(2, keepdim=True), v[..., own]))
    expected = torch.cat(heads, dim=2) @ module.proj.weight.T + module.proj.bias
    torch.testing.assert_close(module(x), expected, **EXACT)


@torch.no_grad()
def test_with_a_monotone_function_every_node_ranks_its_neighbours_alike_and_v2_mends_that():
    for attention, alike in ((GraphAttention, True), (GraphAttentionV2, False)):
        module = double(attention, AttentionSpec(8, 2))
        order = module.scores(random(1, 9, 8)).argsort(dim=-1)  # (1, heads, N, N)
        assert bool((order == order[:, :, :1]).all()) == alike


@torch.no_grad()
@pytest.mark.parametrize("attention", NODE_ATTENTIONS)
@pytest.mark.parametrize("gamma", [True, False])
def test_nodes_are_patches_of_the_map_and_go_back_to_where_they_were(attention, gamma):
    module = double(NodeAttention2d, 8, attention=attention, patch_size=2, gamma=gamma)
    x = random(2, 8, 4, 6)
    nodes = torch.empty(2, 6, 8, dtype=torch.float64)
    for row in range(2):
        for column in range(3):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            nodes[:, 3 * row + column] = torch.einsum("bchw,ochw->bo", patch, module.nodes.weight) + module.nodes.bias
    nodes = nodes + module.block.attn(module.block.norm1(nodes))
    nodes = nodes + module.block.mlp(module.block.norm2(nodes))
    expected = x.clone()
    for row in range(2):
        for column in range(3):
            patch = torch.einsum("bc,cohw->bohw", nodes[:, 3 * row + column], module.back.weight)
            patch = patch + module.back.bias[:, None, None]
            expected[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += patch * (0.7 if gamma else 1)
    torch.testing.assert_close(module(x), expected, **EXACT)


@torch.no_grad()
def test_sagan_by_its_formula():
    """As published: the softmax is over the positions attended from, the first dimension of queryᵀ key."""
    module = double(SelfAttention2d, 16)
    x = random(2, 16, 3, 4)
    flat = x.flatten(2)
    query, key, value = (layer.weight[:, :, 0, 0] @ flat for layer in (module.query, module.key, module.value))
    scores = torch.einsum("bci,bcj->bij", query, key).exp()
    beta = scores / scores.sum(1, keepdim=True)
    expected = x + 0.7 * torch.einsum("bci,bij->bcj", value, beta).reshape(x.shape)
    with AttentionRecorder(module) as recorder:
        torch.testing.assert_close(module(x), expected, **EXACT)
    torch.testing.assert_close(recorder.weights[0][:, 0], beta.mT, rtol=0, atol=1e-7)  # who asks comes first


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 16, 3, 3)])  # fewer channels than positions, and more
@pytest.mark.parametrize(("kernel_size", "symmetric"), [(1, False), (1, True), (3, False)])
def test_simple_self_attention_by_its_formula_in_both_orders(shape, kernel_size, symmetric):
    x = random(*shape)
    module = double(SimpleSelfAttention, x.shape[1], kernel_size=kernel_size, symmetric=symmetric)
    weight = module.conv.weight
    if symmetric:
        weight = (weight + weight.transpose(0, 1)) / 2
    flat = x.flatten(2)
    padded = torch.nn.functional.pad(flat, (kernel_size // 2, kernel_size // 2))
    mixed = sum(weight[:, :, i] @ padded[:, :, i : i + flat.shape[2]] for i in range(kernel_size))
    similar = torch.einsum("bcn,bcm->bnm", flat, mixed)  # xᵀWx
    change = torch.einsum("bcn,bnm->bcm", flat, similar)
    torch.testing.assert_close(module(x), x + 0.7 * change.reshape(shape), **EXACT)
    torch.testing.assert_close(module.channels_first(flat, mixed), change, **EXACT)
    torch.testing.assert_close(module.positions_first(flat, mixed), change, **EXACT)


def take_spectral_weight(ours, theirs):
    """Give our convolution the weight of one that torch.nn.utils.spectral_norm normalises, the estimate included."""
    ours.parametrizations.weight.original.data = theirs.weight_orig.data.reshape(ours.weight.shape)
    ours.parametrizations.weight[0]._u.copy_(theirs.weight_u)
    ours.parametrizations.weight[0]._v.copy_(theirs.weight_v)


@torch.no_grad()
def test_as_fastais_own():
    layers = pytest.importorskip("fastai.layers")
    x = torch.randn(2, 16, 3, 4)
    pairs = [
        (SelfAttention2d(16).eval(), layers.SelfAttention(16)),
        (SimpleSelfAttention(16).eval(), layers.SimpleSelfAttention(16)),
    ]
    for ours, theirs in pairs:
        for _ in range(20):  # in training mode it finds its largest singular value
            theirs(x)
        theirs.eval()
        for name, layer in ours.named_children():
            other = getattr(theirs, name)
            take_spectral_weight(layer, other[0] if isinstance(other, nn.Sequential) else other)
        for module in (ours, theirs):
            module.gamma.fill_(0.7)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [SelfAttention2d, SimpleSelfAttention])
def test_spectral_norm_divides_by_the_largest_singular_value(make):
    module = make(32)
    for name, layer in module.named_children():
        weight = layer.weight.detach().flatten(1)
        assert layer.bias is None and torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=0.05), name


@torch.no_grad()
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_was_never_trained_changes_nothing_to_the_bit(name, precision):
    torch.manual_seed(0)
    module = make_attention2d(name, 16).train()
    x = torch.randn(2, 16, 4, 6).to(precision)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        out = module(x)
        assert out.dtype == precision and torch.equal(out, x)
        module.gamma.fill_(0.1)
        assert not torch.equal(module(x), x)


@torch.no_grad()
def test_simple_self_attention_does_not_overflow_float16_where_its_sum_does():
    x = torch.full((1, 64, 32, 32), 4.0, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(SimpleSelfAttention(64)(x), x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_layout_and_gradients_of_all_parameters(name, channels_last):
    torch.manual_seed(0)
    module = make_attention2d(name, 16)
    module.gamma.data.fill_(0.5)
    x = torch.randn(2, 16, 4, 6)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    out = module(x)
    assert out.shape == x.shape
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out.square().mean().backward()
    assert not [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["graph", "graph_v2", "classic", "sagan"])
def test_recorded_weights_sum_to_one_and_multiply_the_values(name):
    torch.manual_seed(0)
    module = make_attention2d(name, 16).eval()
    seen = {}
    inner = module if name == "sagan" else module.block.attn
    inner.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], out=output))
    with AttentionRecorder(module) as recorder:
        module.gamma.fill_(1)
        module(torch.randn(2, 16, 3, 4))
    (weights,) = recorder.attentions
    heads = 1 if name == "sagan" else 4
    assert weights.shape == (2, heads, 12, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, 12))
    x = seen["x"]
    if name == "sagan":
        values = inner.value(x).flatten(2).mT[:, None]  # (B, 1, N, C)
        expected = (seen["out"] - x).flatten(2).mT
    else:
        values = inner.qkv(x).chunk(3, dim=2)[2] if name == "classic" else inner.value(x)
        values = values.unflatten(2, (4, -1)).transpose(1, 2)
        expected = seen["out"]
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed if name == "sagan" else inner.proj(mixed), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gat", {}, "--attention gat: choose from none, graph, graph_v2, classic, sagan, simple"),
        ("graph", {"num_heads": 3}, "--num-heads 3 does not divide the 16 channels"),
        ("classic", {"num_heads": 0}, "--num-heads 0 does not divide"),
        ("sagan", {"patch_size": 2}, "--attention sagan: --patch-size 2 requires one of graph, graph_v2, classic"),
        ("none", {"symmetric": True}, "--attention none: --symmetric requires --attention simple"),
        ("sagan", {"kernel_size": 3}, "--attention sagan: --attention-kernel-size 3 requires --attention simple"),
        ("simple", {"kernel_size": 2}, "--attention-kernel-size 2: must be odd"),
        ("simple", {"kernel_size": 3, "symmetric": True}, "--symmetric needs --attention-kernel-size 1, not 3"),
    ],
)
def test_mistakes_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        make_attention2d(name, 16, **options)
