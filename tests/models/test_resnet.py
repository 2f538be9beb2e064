"""ResNets: torchvision's own counts, names and logits, attention after any stage, and the trunk told from the rest."""

import pytest
import torch
import torchvision
from torch import nn

from errors import UserError
from models import build_model
from models.attention2d import ATTENTIONS2D
from models.resnet import STAGES, load_imagenet_trunk, load_trunk, trunk_names

PICTURES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def small(attention="none", *, model="resnet18", **options):
    torch.manual_seed(0)
    return build_model(model, **{"width": 8, "image_size": (32, 48), "attention": attention} | options)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_names_and_shapes(name):
    with torch.device("meta"):
        ours = build_model(name, stem="imagenet", num_classes=1000).state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_logits(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10).eval()
    ours = build_model(name, stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(PICTURES), theirs(PICTURES), rtol=1e-4, atol=1e-4)


def test_it_starts_as_torchvisions_with_the_same_seed_and_has_the_cifar_stem_up_to_64_pixels():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    torch.manual_seed(0)
    ours = build_model("resnet18", image_size=65).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for size, kernel_size, stride in ((64, 3, 1), ((65, 32), 7, 2)):
        conv = small(image_size=size).conv1
        assert conv.kernel_size == (kernel_size,) * 2 and conv.stride == (stride,) * 2


def test_width_scales_every_stage():
    with torch.device("meta"):
        whole, half = (build_model("resnet50", width=width).state_dict() for width in (64, 32))
    for name in trunk_names(whole):
        assert tuple(half[name].shape) == tuple(n if n in (1, 3) else n // 2 for n in whole[name].shape), name


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS2D[1:])
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_a_block_on_a_trunk_changes_no_logit_to_the_bit_until_it_is_trained(attention, model):
    plain = small(model=model).eval()
    model = small(attention, model=model, attention_after="layer3").eval()
    assert model.grid == (8, 12) and plain.grid == (4, 6)
    shared = plain.state_dict()
    assert all(torch.equal(model.state_dict()[name], shared[name]) for name in shared)  # the seed's trunk is the same
    assert torch.equal(model(PICTURES), plain(PICTURES))
    model.attention.gamma.fill_(1)
    assert not torch.equal(model(PICTURES), plain(PICTURES))


def test_without_gamma_a_block_counts_from_the_start():
    model = small("graph", attention_gamma=False)
    assert model.attention.gamma is None
    assert not torch.equal(model.eval()(PICTURES), small().eval()(PICTURES))


@torch.no_grad()
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("size", "stem", "patch_size"), [((32, 48), "cifar", 2), ((72, 104), "imagenet", 1)])
def test_the_grid_is_that_of_the_nodes(stage, size, stem, patch_size):
    model = small("classic", attention_after=stage, image_size=size, stem=stem, patch_size=patch_size).eval()
    nodes = []
    model.attention.nodes.register_forward_hook(lambda module, inputs, output: nodes.append(output.shape[2:]))
    assert model(torch.randn(1, 3, *size)).shape == (1, 10)
    assert nodes == [model.grid]


@pytest.mark.parametrize("attention", ATTENTIONS2D)
def test_gradients_reach_all_parameters(attention):
    model = small(attention, symmetric=attention == "simple")
    if attention != "none":
        model.attention.gamma.data.fill_(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(PICTURES)
    assert logits.shape == (2, 10) and logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize("attention", ["graph", "sagan"])
def test_a_frozen_trunk_stays_as_it_is_also_in_training_mode(attention):
    model = small(attention)
    model.attention.gamma.data.fill_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.freeze_trunk()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model.eval().train()
    model(PICTURES).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    trunk = set(trunk_names(after))
    assert trunk <= same and trunk == set(small().state_dict()) - {"fc.weight", "fc.bias"}
    assert {"fc.weight", "attention.gamma"} <= set(after) - same


def test_a_trunk_is_taken_from_another_run_and_what_was_left_is_named():
    trained = small("classic", attention_after="layer3", num_classes=5)
    trained.conv1.weight.data.fill_(0.5)
    model = small("graph")
    left = load_trunk(model, trained.state_dict())
    assert {name.split(".")[0] for name in left} == {"attention", "fc"}
    before, after = trained.state_dict(), model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in trunk_names(after))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"width": 4},
            r"--init-from: .*conv1.weight \(\(4, 3, 3, 3\) in the file, \(8, 3, .* in the model\), .* \.\.\.",
        ),
        ({"stem": "imagenet"}, r"model, .*: conv1.weight \(\(8, 3, 7, 7\) in the file, \(8, 3, 3, 3\) in the model\)$"),
        (
            {"model": "resnet34"},
            r"model, .*: layer1.2.conv1.weight \(\(8, 8, 3, 3\) in the file, missing in the model\)",
        ),
    ],
)
def test_another_trunk_is_refused(other, message):
    with pytest.raises(UserError, match=message):
        load_trunk(small(), small(**other).state_dict())


@pytest.fixture
def imagenet_file(tmp_path, monkeypatch):
    """A file of random weights where torch would have put torchvision's, without counters, as older files are."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    weights = torchvision.models.resnet18().state_dict()
    torch.save({name: value for name, value in weights.items() if "num_batches" not in name}, path)
    return path


@pytest.mark.parametrize(("stem", "left"), [("imagenet", ["fc"]), ("cifar", ["conv1", "fc"])])
def test_imagenet_weights(imagenet_file, stem, left):
    model = build_model("resnet18", stem=stem, attention="sagan", image_size=64)
    names = load_imagenet_trunk(model)
    assert sorted({name.split(".")[0] for name in names}) == left
    own = model.state_dict()
    for name, value in torch.load(imagenet_file).items():
        assert name in names or torch.equal(own[name], value)


def test_imagenet_weights_that_do_not_fit_or_cannot_be_had(imagenet_file, monkeypatch):
    with pytest.raises(UserError, match="--pretrained: the weights require --width 64, not 8"):
        load_imagenet_trunk(small())
    imagenet_file.unlink()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **b: (_ for _ in ()).throw(OSError("no network")))
    message = rf"resnet18-.*\.pth cannot be downloaded \(no network\): put it into {imagenet_file.parent}"
    with pytest.raises(UserError, match=message):
        load_imagenet_trunk(build_model("resnet18"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_after": "layer5"}, "--attention-after layer5: choose from layer1, layer2, layer3, layer4"),
        ({"attention": "gat"}, "--attention gat: choose from none, graph"),
        ({"stem": "tiny"}, "--stem tiny: choose from cifar, imagenet"),
        ({"width": 0}, "--width 0"),
        ({"patch_size": 8}, "--patch-size 8 does not divide the map of 4 x 6 after layer4"),
        ({"patch_size": 4}, "--patch-size 4 does not divide the map of 4 x 6 after layer4"),
        ({"patch_size": 0}, "--patch-size 0 does not divide"),
        ({"attention": "none", "patch_size": 2}, "--attention none: --patch-size 2 requires one of graph"),
        (
            {"image_size": 32, "stem": "imagenet"},
            "--attention-after layer4: .* 1 x 1 is a single node; use --attention-after layer3 or --stem cifar",
        ),
        ({"image_size": 8}, "single node; use --attention-after layer3$"),
        (
            {"image_size": 32, "patch_size": 4},
            "single node; use --attention-after layer3 or a smaller --patch-size",
        ),
        ({"image_size": 1}, "single node; use a larger image"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        small(**{"attention": "graph"} | options)


def test_statistics_are_frozen_with_their_weight_alone():
    model = small()
    model.layer1.requires_grad_(False)
    assert not model.train().layer1[0].bn1.training and model.layer2[0].bn1.training and model.training
    assert all(module.training for module in model.requires_grad_(True).train().modules())
    assert isinstance(model.bn1, nn.BatchNorm2d)
