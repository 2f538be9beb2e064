"""XResNets: the published counts, and attention where the published code has it."""

import pytest
import torch

from errors import UserError
from maps.methods import attention_maps
from models import build_model
from models.attention2d import SelfAttention2d, SimpleSelfAttention
from models.resnet import load_trunk, trunk_names
from models.xresnet import XResBlock

PICTURES = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
# with 10 classes, without and with SimpleSelfAttention
PARAMETERS = {
    "xresnet18": (11_228_586, 11_232_683),
    "xresnet34": (21_336_746, 21_340_843),
    "xresnet50": (23_575_466, 23_641_003),
    "xresnet101": (42_567_594, 42_633_131),
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def small(attention="none", **options):
    torch.manual_seed(0)
    return build_model("xresnet18", **{"image_size": (40, 56), "attention": attention} | options)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_as_published(name):
    with torch.device("meta"):
        for attention, expected in zip(("none", "simple"), PARAMETERS[name]):
            assert count(build_model(name, attention=attention)) == expected
            assert count(build_model(name, attention=attention, stem_widths=(32, 32, 64))) == expected - 27_712


@torch.no_grad()
@pytest.mark.parametrize("expansion", [1, 4])
@pytest.mark.parametrize(("channels", "stride"), [(8, 1), (16, 2)])
def test_a_block_by_its_formula(expansion, channels, stride):
    """On a map of odd size, where a halved one rounds up either way."""
    torch.manual_seed(0)
    block = XResBlock(8, channels, expansion=expansion, stride=stride).eval()
    x = torch.randn(2, 8, 5, 7)
    shortcut = x
    if stride == 2:
        padded = torch.nn.functional.pad(x, (0, 1, 0, 1), value=torch.nan).unfold(2, 2, 2).unfold(3, 2, 2)
        shortcut = padded.nanmean(dim=(4, 5))
        shortcut = block.shortcut[1](shortcut)
    else:
        assert not len(block.shortcut)
    torch.testing.assert_close(block(x), shortcut.relu())  # the last normalisation starts at zero
    torch.nn.init.ones_(block.convs[-1][1].weight)
    block.attention = SimpleSelfAttention(channels).eval()
    block.attention.gamma.fill_(1)
    expected = (block.attention(block.convs(x)) + shortcut).relu()
    torch.testing.assert_close(block(x), expected)
    assert [layer[0].kernel_size[0] for layer in block.convs] == ([3, 3] if expansion == 1 else [1, 3, 1])
    assert [layer[0].stride[0] for layer in block.convs] == ([stride, 1] if expansion == 1 else [1, stride, 1])


def test_attention_is_in_the_last_block_of_the_stage_and_changes_no_logit_until_it_is_trained():
    plain = small().eval()
    logits = plain(PICTURES)
    assert plain.grid == (2, 2) and logits.shape == (2, 10)
    for attention, kind in (("sagan", SelfAttention2d), ("simple", SimpleSelfAttention)):
        model = small(attention).eval()
        assert [name for name, module in model.named_modules() if isinstance(module, kind)] == ["layer1.1.attention"]
        assert model.grid == (10, 14)
        assert trunk_names(model.state_dict()) == trunk_names(plain.state_dict())
        assert torch.equal(model(PICTURES), logits)  # the seed's trunk is the same
        assert all("attention" in name or "fc" in name for name in load_trunk(plain, model.state_dict()))


def test_several_stages_at_once():
    model = small("sagan", attention_in=["layer3", "layer1"])
    names = [name for name, module in model.named_modules() if isinstance(module, SelfAttention2d)]
    assert names == ["layer1.1.attention", "layer3.1.attention"] and model.grid == (3, 4)
    with pytest.raises(UserError, match="XResNet's layers attend over 140 and 12 tokens, which give no one map"):
        attention_maps(model.eval(), PICTURES, ["raw"])


@pytest.mark.parametrize("attention", ["none", "sagan", "simple"])
def test_gradients_reach_all_parameters(attention):
    model = small(attention, symmetric=attention == "simple")
    for name, parameter in model.named_parameters():
        if name.endswith("gamma") or (parameter.ndim == 1 and not name.endswith("bias")):
            parameter.data.fill_(1)  # also of the last normalisations, which start at zero
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(PICTURES)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_a_frozen_trunk_leaves_the_attention_and_the_head():
    model = small("simple")
    model.freeze_trunk()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    module = "layer1.1.attention"
    assert trained == [f"{module}.gamma", f"{module}.conv.parametrizations.weight.original", "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "graph"}, "--attention graph: choose from none, sagan, simple"),
        ({"attention_in": ["layer0"]}, "--attention-in layer0: choose from layer1, layer2, layer3, layer4"),
        ({"attention_in": ["layer4"], "image_size": 32}, "single node; use --attention-in layer3"),
        ({"attention": "sagan", "symmetric": True}, "--attention sagan: --symmetric requires --attention simple"),
        ({"attention_kernel_size": 3, "symmetric": True}, "--symmetric needs --attention-kernel-size 1, not 3"),
        ({"stem_widths": (32, 64)}, "--stem-widths 32 64: must be three numbers"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        small(**{"attention": "simple"} | options)
