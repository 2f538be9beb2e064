import math

import pytest

import train_cct
import train_resnet_attn
import train_vit
from errors import UserError
from training.arguments import complete_arguments, given_arguments

PARSERS = {
    train_vit: train_vit.vit_parser,
    train_resnet_attn: train_resnet_attn.resnet_parser,
    train_cct: train_cct.cct_parser,
}


def arguments(script, *flags):
    parser = PARSERS[script]()
    given = given_arguments(parser, flags)
    recipe, defaults = script.chosen_recipe(given)
    return complete_arguments(parser, given | {"recipe": recipe}, defaults)


@pytest.mark.parametrize(
    ("script", "flags", "factor"),
    [
        (train_vit, ["--batch-size", "256"], 2.0),  # report: adamw, 64
        (train_vit, ["--batch-size", "32", "--accumulate", "4"], math.sqrt(2)),
        (train_vit, ["--recipe", "strong", "--batch-size", "32"], 0.5),  # muon, 128
        (train_resnet_attn, ["--batch-size", "32"], 0.5),  # survey: sgd, 64
        (train_vit, [], 1.0),
    ],
)
def test_another_batch_size_scales_the_recipes_learning_rate(script, flags, factor, capsys):
    base = arguments(script, *[f for f in flags if f in ("--recipe", "strong")])
    assert arguments(script, *flags).lr == base.lr  # not without being asked
    scaled = arguments(script, *flags, "--lr-scale", "auto")
    assert scaled.lr == pytest.approx(base.lr * factor)
    batch = scaled.batch_size * (4 if "--accumulate" in flags else 1)
    assert capsys.readouterr().out.endswith(f"{batch}/{base.batch_size}\n")


@pytest.mark.parametrize("other", [["--lr", "0.1"], ["--accumulate", "0:8", "10:4"]])
def test_flags_that_exclude_a_scaled_rate_are_named(other):
    with pytest.raises(UserError, match=f"--lr-scale auto (and|needs one batch size;) {other[0]}"):
        arguments(train_vit, "--lr-scale", "auto", *other)


@pytest.mark.parametrize("value", ["0", "3:-2", "3:", "a", "1.5"])
def test_an_accumulation_that_is_none_is_refused(value):
    with pytest.raises(UserError, match=f"--accumulate: must be K or EPOCH:K with K at least 1, not {value}"):
        arguments(train_vit, "--accumulate", value)


def test_two_accumulations_of_one_epoch_are_refused():
    with pytest.raises(UserError, match="--accumulate 2 3: two numbers of batches for one epoch"):
        arguments(train_vit, "--accumulate", "2", "0:3")
