"""The compact transformers: published counts, another implementation's logits, and the authors' weights."""

import pytest
import torch
import torch.nn.functional as F

from errors import UserError
from models import build_model
from models.cct import COMPACT_MODELS, sine_embedding
from models.pretrained import load_published
from models.summary import summarize

# with 100 classes, without and with a learnable positional embedding
PARAMETERS = {
    "vit_lite_6_4": (3_197_028, 3_213_668),
    "vit_lite_7_4": (3_723_364, 3_740_004),
    "cvt_6_4": (3_197_029, 3_213_413),
    "cvt_7_4": (3_723_365, 3_739_749),
    "cct_2_3x2": (287_141, 295_333),
    "cct_4_3x2": (485_541, 493_733),
    "cct_6_3x1": (3_191_397, 3_256_933),
    "cct_6_3x2": (3_333_669, 3_350_053),
    "cct_7_3x1": (3_717_733, 3_783_269),
    "cct_7_3x2": (3_860_005, 3_876_389),
}
# layers, heads, MLP ratio, width, kernel size and number of the tokenizer's convolutions
SHAPES = {
    "vit_lite_6_4": (6, 4, 2, 256, 4, 1),
    "vit_lite_7_4": (7, 4, 2, 256, 4, 1),
    "cvt_6_4": (6, 4, 2, 256, 4, 1),
    "cvt_7_4": (7, 4, 2, 256, 4, 1),
    "cct_2_3x2": (2, 2, 1, 128, 3, 2),
    "cct_4_3x2": (4, 2, 1, 128, 3, 2),
    "cct_6_3x1": (6, 4, 2, 256, 3, 1),
    "cct_6_3x2": (6, 4, 2, 256, 3, 2),
    "cct_7_3x1": (7, 4, 2, 256, 3, 1),
    "cct_7_3x2": (7, 4, 2, 256, 3, 2),
    "cct_14_7x2": (14, 6, 3, 384, 7, 2),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_as_published(name):
    for embedding, expected in zip(("none", "learnable"), PARAMETERS[name], strict=True):
        assert count(build_model(name, num_classes=100, positional_embedding=embedding)) == expected
    assert count(build_model(name, num_classes=100, positional_embedding="sine")) == PARAMETERS[name][0]


def test_parameters_of_the_imagenet_model():
    assert count(build_model("cct_14_7x2", num_classes=1000, image_size=224)) == 22_367_273


def published_weights(name, *, tokens, classes=10, embedding="learnable"):
    """Random weights under the names that the authors' released files have, of a variant's shapes."""
    depth, _, ratio, dim, kernel, convs = SHAPES[name]
    patches, pooled = not name.startswith("cct"), not name.startswith("vit")
    shapes = {"classifier.norm": (dim,), "classifier.fc": (classes, dim)}
    for layer in range(convs):
        widths = (dim if layer == convs - 1 else 64, 3 if layer == 0 else 64)
        shapes[f"tokenizer.conv_layers.{layer}.0"] = (*widths, kernel, kernel)
    for block in (f"classifier.blocks.{index}." for index in range(depth)):
        shapes |= {block + "self_attn.qkv": (3 * dim, dim), block + "self_attn.proj": (dim, dim)}
        shapes |= {block + "linear1": (ratio * dim, dim), block + "linear2": (dim, ratio * dim)}
        shapes |= {block + "pre_norm": (dim,), block + "norm1": (dim,)}
    if pooled:
        shapes["classifier.attention_pool"] = (1, dim)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        norm = len(shape) == 1
        scale = 0.1 if norm else torch.Size(shape[1:]).numel() ** -0.5
        weights[f"{key}.weight"] = scale * torch.randn(shape, generator=generator) + norm
        if "qkv" not in key and (patches or "conv" not in key):
            weights[f"{key}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    if not pooled:
        weights["classifier.class_emb"] = torch.randn(1, 1, dim, generator=generator)
    if embedding != "none":
        weights["classifier.positional_emb"] = torch.randn(1, tokens + (not pooled), dim, generator=generator)
    return weights


def reference_logits(name, weights, images):
    """A compact transformer's logits straight from the paper's description, in float64."""
    depth, heads, _, dim, kernel, convs = SHAPES[name]
    w = {key: value.double() for key, value in weights.items()}

    def linear(x, key):
        return x @ w[f"{key}.weight"].T + w.get(f"{key}.bias", 0)

    def norm(x, key):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{key}.weight"] + w[f"{key}.bias"]

    x = images.double()
    for layer in range(convs):
        key = f"tokenizer.conv_layers.{layer}.0"
        if name.startswith("cct"):
            x = F.conv2d(x, w[f"{key}.weight"], stride=2 if kernel == 7 else 1, padding=kernel // 2).relu()
            x = F.max_pool2d(x, 3, 2, 1)
        else:
            x = F.conv2d(x, w[f"{key}.weight"], w[f"{key}.bias"], stride=kernel)
    x = torch.einsum("bdhw->bhwd", x).flatten(1, 2)
    if "classifier.class_emb" in w:
        x = torch.cat([w["classifier.class_emb"].expand(len(x), 1, dim), x], 1)
    x = x + w.get("classifier.positional_emb", 0)
    for block in (f"classifier.blocks.{index}." for index in range(depth)):
        q, k, v = linear(norm(x, block + "pre_norm"), block + "self_attn.qkv").split(dim, -1)
        q, k, v = (part.unflatten(-1, (heads, dim // heads)) for part in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (dim // heads) ** 0.5
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = norm(x + linear(mixed, block + "self_attn.proj"), block + "norm1")
        x = x + linear(F.gelu(linear(x, block + "linear1")), block + "linear2")
    x = norm(x, "classifier.norm")
    if "classifier.attention_pool.weight" in w:
        x = torch.einsum("bnk,bnd->bd", linear(x, "classifier.attention_pool").softmax(1), x)
    else:
        x = x[:, 0]
    return linear(x, "classifier.fc")


@pytest.mark.parametrize("embedding", ["learnable", "sine", "none"])
@pytest.mark.parametrize("name", COMPACT_MODELS)
def test_logits_of_the_authors_weights_equal_another_implementations(name, embedding):
    model = build_model(name, positional_embedding=embedding).eval()
    tokens = model.grid[0] * model.grid[1]
    weights = published_weights(name, tokens=tokens, embedding=embedding)
    if embedding == "sine":  # fixed: theirs is what the formula gives
        length = tokens + name.startswith("vit")
        weights["classifier.positional_emb"] = written_out_sine(length, SHAPES[name][3])[None]
    assert load_published(model, weights) == []
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = reference_logits(name, weights, images)
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), expected, rtol=1e-5, atol=1e-5)
    if embedding != "none":  # it does what it says
        weights["classifier.positional_emb"] = weights["classifier.positional_emb"].flip(1)
        assert not torch.allclose(reference_logits(name, weights, images), expected, atol=1e-3)


def written_out_sine(tokens, dim):
    positions = torch.arange(tokens, dtype=torch.float64)
    rows = torch.empty(tokens, dim, dtype=torch.float64)
    for pair in range(dim // 2):
        angle = positions / 10000 ** (2 * pair / dim)
        rows[:, 2 * pair], rows[:, 2 * pair + 1] = angle.sin(), angle.cos()
    return rows.float()


def test_sine_embedding_is_its_formula_and_no_parameter():
    torch.testing.assert_close(sine_embedding(70, 24)[0], written_out_sine(70, 24), rtol=0, atol=1e-5)
    model = build_model("cct_2_3x2", positional_embedding="sine")
    assert "pos_embed" not in dict(model.named_parameters())
    torch.testing.assert_close(model.pos_embed[0], written_out_sine(64, 128), rtol=0, atol=1e-5)


def test_starts_as_the_authors_code():
    torch.manual_seed(0)
    model = build_model("cct_6_3x1")
    assert abs(model.pos_embed.std() - 0.2) < 0.01 and abs(model.blocks[3].attn.qkv.weight.std() - 0.02) < 1e-3
    assert abs(model.tokenizer[0].weight.std() - (2 / 27) ** 0.5) < 0.01
    assert model.head.bias.abs().max() == 0
    assert [round(block.drop_path.p, 3) for block in model.blocks] == [0, 0.02, 0.04, 0.06, 0.08, 0.1]
    assert all(block.attn.attn_drop == 0.1 for block in model.blocks)


def test_dropout_and_drop_path_work_in_training_alone():
    images = torch.randn(4, 3, 32, 32)
    for rates in ({"drop": 0.5}, {"attn_drop": 0.5}, {"drop_path": 0.5}):
        model = build_model("cct_2_3x2", **{"drop": 0.0, "attn_drop": 0.0, "drop_path": 0.0} | rates)
        assert not torch.equal(model(images), model(images))
        assert torch.equal(model.eval()(images), model(images))


def test_another_size_interpolates_the_positional_embedding():
    """A plane over the old grid is a plane over the new one, but for the border, and the class token keeps its own."""
    rows = torch.arange(8.0)[:, None].expand(8, 8)
    weights = published_weights("vit_lite_6_4", tokens=64)
    cells = rows.flatten()[:, None].expand(64, 256)
    weights["classifier.positional_emb"] = torch.cat([torch.full((1, 256), -7.0), cells])[None]
    model = build_model("vit_lite_6_4", image_size=(64, 48))
    load_published(model, weights)
    assert (model.pos_embed[0, 0] == -7).all()
    new = model.pos_embed[0, 1:].unflatten(0, (16, 12))
    torch.testing.assert_close(new[2:14, :, 0], (torch.arange(2.0, 14) / 2 - 0.25)[:, None].expand(12, 12))


def test_a_head_of_other_classes_is_left_out_and_other_differences_are_named():
    weights = published_weights("cct_2_3x2", tokens=64, classes=7)
    model = build_model("cct_2_3x2", num_classes=10)
    assert load_published(model, weights) == ["head.weight", "head.bias"]
    with pytest.raises(
        UserError,
        match=r"do not fit the model, .*: blocks\.2\.attn\.proj\.bias \(missing in the file, \(128,\) in the model",
    ):
        load_published(build_model("cct_4_3x2"), weights)


def test_sizes_that_the_tokenizer_cannot_take():
    with pytest.raises(UserError, match="--image-size 30: must be a multiple of 4"):
        build_model("cvt_6_4", image_size=30)
    with pytest.raises(UserError, match="--image-size 4 is too small: .* use 5 or more"):
        build_model("cct_2_3x2", image_size=4)
    with pytest.raises(UserError, match="choose from learnable, sine, none"):
        build_model("cct_2_3x2", positional_embedding="cosine")
    wide = build_model("cct_2_3x2", image_size=(16, 24))
    assert wide.grid == (4, 6) and wide(torch.zeros(2, 3, 16, 24)).shape == (2, 10)


def test_multiply_adds_equal_closed_forms():
    def block(tokens, dim, hidden):
        return tokens * dim * (3 * dim + dim + 2 * hidden) + 2 * tokens**2 * dim

    def total(model):
        return int(summarize(model, (3, 32, 32)).splitlines()[-1].split()[-1].replace(",", ""))

    assert total(build_model("vit")) == 64 * 48 * 256 + 6 * block(65, 256, 512) + 256 * 10
    convolution = 32 * 32 * 27 * 256
    assert total(build_model("cct_6_3x1")) == convolution + 6 * block(256, 256, 512) + 2 * 256 * 256 + 256 * 10
