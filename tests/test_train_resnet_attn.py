"""train_resnet_attn.py as a user runs it: a trunk, a block after it, and the flags that say how."""

import shutil

import pytest
import torch

import rollout
import train_resnet_attn
from errors import UserError
from models.resnet import trunk_names
from training.arguments import complete_arguments, given_arguments


@pytest.fixture
def resnet_flags(image_folder, tmp_path):
    """The flags of a run of a second: a narrow ResNet18 on image_folder, an epoch of 6 steps, written to tmp_path."""
    return [
        *("--dataset", "folder", "--data-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache")),
        *("--out-dir", str(tmp_path / "runs"), "--width", "4", "--device", "cpu", "--epochs", "1", "--batch-size", "8"),
    ]


def test_the_recipes_follow_their_documents():
    """The survey's values, and fastai's presize, do not leak into other recipes."""
    survey = train_resnet_attn.chosen_recipe({})[1]
    names = ("epochs", "clip_grad", "seed", "num_heads", "attention_gamma", "amp")
    assert [survey[name] for name in names] == [50, 0.5, 42, 1, False, "off"]
    parser = train_resnet_attn.resnet_parser()
    for given in ({"recipe": "woof"}, {"recipe": "strong"}, {"dataset": "shapes"}):
        recipe = train_resnet_attn.chosen_recipe(given)[1]
        args = complete_arguments(parser, given, recipe)
        assert [getattr(args, name) for name in names[1:]] == [None, 0, 4, True, "auto"]
    for size, share in ((128, 0.8), (256, 256 / 288)):
        given = {"recipe": "woof", "image_size": size}
        assert train_resnet_attn.chosen_recipe(given)[1]["crop_pct"] == share
    assert complete_arguments(parser, given_arguments(parser, ["--clip-grad", "none"]), survey).clip_grad is None


def weights_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)["weights"]


def test_a_block_after_a_trained_trunk_that_is_frozen(resnet_flags, tmp_path, capsys):
    """The trunk stays as it is to the bit, its BatchNorm statistics too; head and block are trained."""
    trunk, then = tmp_path / "runs" / "resnet18", tmp_path / "runs" / "then"
    assert train_resnet_attn.main(resnet_flags)["recipe"] == "survey"
    flags = [*resnet_flags, "--attention", "graph", "--attention-gamma", "--run-name", "then", "--freeze", "trunk"]
    result = train_resnet_attn.main([*flags, "--init-from", str(trunk)])
    assert result["init_from"] == "resnet18" and result["trained_params"] < result["params"] / 2
    out = capsys.readouterr().out
    assert f"weights of {trunk}; left out: fc.weight, fc.bias" in out
    before, after = weights_of(trunk), weights_of(then)
    assert all(torch.equal(before[name], after[name]) for name in trunk_names(before))
    assert after["attention.gamma"] != 0 and not torch.equal(before["fc.weight"], after["fc.weight"])
    rollout.main([str(then), "--index", "0", "--layers"])
    assert (then / "maps" / "0-layers.png").exists()


def test_without_freeze_the_trunk_goes_on_learning_and_a_cut_run_goes_on(resnet_flags, tmp_path):
    train_resnet_attn.main(resnet_flags)
    trunk = tmp_path / "runs" / "resnet18"
    flags = [*resnet_flags, "--attention", "classic", "--init-from", str(trunk), "--freeze", "trunk"]
    whole = train_resnet_attn.main([*flags, "--run-name", "whole"])
    assert train_resnet_attn.main([*flags, "--run-name", "cut", "--minutes", "0.0001"]) is None
    assert train_resnet_attn.main(["--resume", str(tmp_path / "runs" / "cut"), "--device", "cpu"])["params"]
    first, second = weights_of(tmp_path / "runs" / "whole"), weights_of(tmp_path / "runs" / "cut")
    assert whole["args"]["freeze"] == "trunk" and all(torch.equal(first[name], second[name]) for name in first)
    train_resnet_attn.main([*flags[:-2], "--run-name", "trained"])
    assert not torch.equal(weights_of(trunk)["conv1.weight"], weights_of(tmp_path / "runs" / "trained")["conv1.weight"])


def test_a_last_batch_of_one_image_on_a_map_of_one_position(resnet_flags, tmp_path):
    """60 images, 12 of them the test set: 48 to train on, and a last batch of one."""
    flags = [*resnet_flags, "--stem", "imagenet", "--batch-size", "47"]
    with pytest.raises(UserError, match="--batch-size 47: BatchNorm .* one image; use --drop-last or another"):
        train_resnet_attn.main(flags)
    assert train_resnet_attn.main([*flags, "--drop-last", "--overwrite"])["epochs"] == 1


def test_images_are_normalised_as_the_trunk_knows_them(resnet_flags, tmp_path):
    train_resnet_attn.main(resnet_flags)
    trunk = tmp_path / "runs" / "resnet18"
    checkpoint = torch.load(trunk / "last.pt", weights_only=True) | {"mean": [0.1, 0.2, 0.3], "std": [0.7, 0.8, 0.9]}
    torch.save(checkpoint, trunk / "last.pt")
    flags = [*resnet_flags, "--init-from", str(trunk), "--freeze", "trunk", "--run-name", "then"]
    assert train_resnet_attn.main([*flags, "--minutes", "0.0001"]) is None
    shutil.rmtree(trunk)
    assert train_resnet_attn.main(["--resume", str(tmp_path / "runs" / "then"), "--device", "cpu"])
    after = torch.load(tmp_path / "runs" / "then" / "last.pt", weights_only=True)
    assert after["mean"] == checkpoint["mean"] and after["std"] == checkpoint["std"]


def test_an_xresnet_by_the_recipe_of_its_time_and_no_rollout_of_its_block(resnet_flags, tmp_path):
    flags = [*resnet_flags[: resnet_flags.index("--width")], "--device", "cpu", "--recipe", "woof", "--epochs", "1"]
    flags += [
        "--model",
        "xresnet18",
        "--image-size",
        "48",
        "--attention",
        "simple",
        "--symmetric",
        "--batch-size",
        "16",
    ]
    result = train_resnet_attn.main(flags)
    assert result["args"]["opt_eps"] == 1e-6 and result["args"]["sched"] == "onecycle" and result["params"] > 11e6
    with pytest.raises(UserError, match="SimpleSelfAttention"):
        rollout.main([str(tmp_path / "runs" / "xresnet18"), "--index", "0"])


def test_strong_is_light_in_short_runs_and_has_crops_for_large_images():
    chosen, strong = train_resnet_attn.chosen_recipe, train_resnet_attn.STRONG
    assert chosen({"recipe": "strong"}) == ("strong", strong) and strong["cutout"]
    assert chosen({"recipe": "strong", "epochs": 29})[1] == strong | {"cutout": 0}
    name, large = chosen({"recipe": "strong", "dataset": "imagewoof", "epochs": 80})
    assert large["model"] == "xresnet50" and large["image_size"] == 128 and large["scale"] == [0.35, 1.0]
    assert large["opt"] == "muon" and not large["crop_padding"] and not large["cutout"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freeze", "trunk"], "--freeze trunk needs a trained trunk: --init-from RUN or --pretrained"),
        (["--attention", "graph", "--attention-after", "layer5"], "--attention-after: invalid choice: 'layer5'"),
        (["--attention", "graph", "--stem", "imagenet"], "the feature map of 1 x 1 is a single node"),
        (["--attention", "graph", "--patch-size", "8"], "--patch-size 8 does not divide the map of 4 x 4"),
        (["--attention", "graph", "--symmetric"], "--symmetric requires --attention simple"),
        (["--stem-widths", "8", "8", "8"], "--stem-widths: resnet18 does not take it"),
        (["--pretrained"], "--pretrained: the weights require --width 64, not 4"),
        (["--pretrained", "--init-from", "nowhere"], "--init-from and --pretrained exclude each other"),
        (["--init-from", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_mistakes_are_one_line(flags, message, resnet_flags):
    with pytest.raises(UserError, match=message):
        train_resnet_attn.main([*resnet_flags, *flags])


def test_there_are_no_weights_of_imagenet_for_an_xresnet():
    with pytest.raises(UserError, match="--pretrained: there are no weights for xresnet18, only for resnet18, resnet3"):
        train_resnet_attn.main(["--dataset", "shapes", "--model", "xresnet18", "--pretrained", "--device", "cpu"])


def test_another_trunk_is_refused_by_the_layers_that_differ(resnet_flags, tmp_path):
    train_resnet_attn.main(resnet_flags)
    flags = [*resnet_flags, "--init-from", str(tmp_path / "runs" / "resnet18")]
    with pytest.raises(UserError, match=r"do not fit the model, .*: conv1.weight \(\(4, 3, 3, 3\) in the file, \(8, 3"):
        train_resnet_attn.main([*flags, "--width", "8"])
