"""A batch that is not a number, in every way that --on-nan knows; a collapsed loss scale; one class for every image."""

import math
import os
import re
import signal

import pytest
import torch
from conftest import same_weights
from test_train_vit import stop_after
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_generator
import train_resnet_attn
import train_vit
from errors import UserError
from pipeline.batches import Batches
from training.checkpoint import load_checkpoint, save_checkpoint
from training.device import has_bfloat16
from training.interrupt import Interrupted, Watch


@pytest.fixture
def plant(monkeypatch):
    """plant(*places): the training images of these (epoch, batch) are NaN; both counted from 0."""
    original = Batches.batches

    def plant(*places):
        def batches(self, epoch=0, start_step=0):
            for step, (images, labels) in enumerate(original(self, epoch, start_step), start_step):
                bad = self.seed is not None and (epoch, step) in places
                yield images * math.nan if bad else images, labels

        monkeypatch.setattr(Batches, "batches", batches)

    return plant


class LeftOut:
    """A context in which some updates, counted from 0, are not applied: their gradients are taken away."""

    def __init__(self, *updates):
        self.updates, self.count, self.optimizer = updates, -1, None

    def __enter__(self):
        self.handle = register_optimizer_step_pre_hook(self.before_step)

    def __exit__(self, *exception):
        self.handle.remove()

    def before_step(self, optimizer, *_):
        self.optimizer = self.optimizer or optimizer  # Muon's has parts, which call this as well
        self.count += optimizer is self.optimizer
        for group in optimizer.param_groups if self.count in self.updates else ():
            for parameter in group["params"]:
                parameter.grad = None


def stopped_after(steps, main, flags, patch):
    """A run that is stopped and saved after so many steps."""
    with patch.context() as inner, pytest.raises(Interrupted):
        stop_after(inner, steps, lambda: os.kill(os.getpid(), signal.SIGTERM))
        main(flags)


def same(first, second, *parts):
    """Whether two checkpoints hold the same tensors, bit for bit, in all parts."""
    first, second = (torch.load(path, weights_only=True) for path in (first, second))
    return all(torch.equal(first[part][name], second[part][name]) for part in parts for name in first[part])


SKIPPED = {  # {name: (script, flags, the batch of the first epoch that is NaN, its update)}
    "float32": (train_vit, ["--amp", "off"], 2, 2),
    "bfloat16": (train_vit, ["--amp", "bf16"], 0, 0),
    "muon": (train_vit, ["--recipe", "strong", "--amp", "off"], 3, 3),
    "accumulate": (train_vit, ["--amp", "off", "--accumulate", "2"], 3, 1),
    "generator": (train_generator, ["--depth", "1", "--noise-steps", "20", "--image-size", "16", "--width", "8"], 2, 2),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_skipped_run_is_one_without_that_update(case, folder_flags, tmp_path, plant, monkeypatch, capsys):
    script, flags, batch, update = SKIPPED[case]
    if case == "bfloat16" and not has_bfloat16(torch.device("cpu")):
        pytest.skip("this processor has no bfloat16")
    flags = [*(folder_flags if script is train_vit else [*folder_flags[:-8], "--device", "cpu"]), *flags]
    with LeftOut(update):
        script.main([*flags, "--run-name", "by-hand"])
    plant((0, batch))
    capsys.readouterr()
    result = script.main([*flags, "--run-name", "skipped", "--on-nan", "skip"])
    assert re.findall(r"images/s(.*)\n", capsys.readouterr().out) == ["   skipped updates: 1", ""]
    assert result["skipped_updates"] == 1 and "on_nan" not in result["args"]
    stopped_after(2, script.main, [*flags, "--run-name", "cut", "--on-nan", "skip"], monkeypatch)
    assert script.main(["--resume", str(tmp_path / "runs" / "cut")])["skipped_updates"] == 1
    by_hand, skipped, cut = (tmp_path / "runs" / name / "last.pt" for name in ("by-hand", "skipped", "cut"))
    assert same(skipped, by_hand, "weights") and same(skipped, cut, "weights")


def test_where_nothing_is_skipped_no_bit_differs(folder_flags, tmp_path):
    for mode in ("stop", "skip", "rollback"):
        result = train_vit.main([*folder_flags, "--run-name", mode, "--on-nan", mode])
        assert same_weights(tmp_path / "runs/stop/last.pt", tmp_path / f"runs/{mode}/last.pt")
        assert not result.keys() & {"skipped_updates", "rollbacks"}


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_averages_batchnorm_and_sums_do_not_follow_a_skipped_update(amp, folder_flags, tmp_path, plant, monkeypatch):
    flags = [*folder_flags[:-8], "--device", "cpu", "--width", "8", "--epochs", "1", "--amp", amp, "--on-nan", "skip"]
    flags += ["--model-ema-decay", "0.5"]
    plant((0, 5))
    train_resnet_attn.main([*flags, "--run-name", "whole"])
    stopped_after(5, train_resnet_attn.main, [*flags, "--run-name", "before"], monkeypatch)
    whole, before = (tmp_path / "runs" / name / "last.pt" for name in ("whole", "before"))
    assert same(whole, before, "weights", "ema")
    images, loss = (torch.load(before)["sums"][name] for name in ("images", "loss"))
    assert torch.load(whole)["history"][0]["train_loss"] == pytest.approx(loss.item() / images)


def test_an_epoch_of_which_nothing_is_left_ends_the_run(folder_flags, plant):
    plant(*((0, step) for step in range(6)))
    with pytest.raises(UserError, match="the train loss of epoch 1 is not finite"):
        train_vit.main([*folder_flags, "--on-nan", "skip"])


def test_twenty_in_a_row_end_the_run_at_the_parameter_next_to_the_output(folder_flags, plant):
    plant(*((0, step) for step in range(3, 23)))
    with pytest.raises(UserError) as caught:
        train_vit.main([*folder_flags, "--on-nan", "skip", "--batch-size", "2", "--amp", "off"])
    said = (
        "20 updates in a row: epoch 1, step 23, learning rate 0.0005; at step 23 the largest gradient was inf, of head"
    )
    assert said in str(caught.value)


def test_the_error_names_the_largest_gradient_at_the_last_look(folder_flags, plant, monkeypatch):
    monkeypatch.setattr(Watch, "REFRESH_SECONDS", 0)
    plant((1, 3))
    with pytest.raises(UserError) as caught:
        train_vit.main([*folder_flags, "--amp", "off"])
    start = r"the loss is not finite: epoch 2, step 4, learning rate 5e-05; at step 3 the largest gradient was "
    assert re.match(start + r"0\.\d+, of (head|blocks)[\w.]*; what was saved before is kept; try", str(caught.value))


@pytest.mark.parametrize("flags", [["--opt", "muon", "--sched", "cosine"], ["--sched", "onecycle"]])
def test_a_rollback_leaves_batches_out_and_is_resumed_exactly(
    flags, folder_flags, tmp_path, plant, monkeypatch, capsys
):
    flags = [*folder_flags, "--amp", "off", *flags]
    with LeftOut(6, 7, 8):  # the second epoch's, up to the bad one
        train_vit.main([*flags, "--run-name", "by-hand"])
    plant((1, 2))
    flags += ["--on-nan", "rollback", "--model-ema-decay", "0.5"]
    result = train_vit.main([*flags, "--run-name", "whole"])
    said = capsys.readouterr()
    expected = "epoch 2, step 3: back to the weights after epoch 1, without the batches since then\n"
    assert said.err.count(f"warning: the loss is not finite: {expected}") == said.err.count("not finite") == 1
    assert said.out.count("   rollbacks: 1\n") == result["rollbacks"] == 1
    runs = tmp_path / "runs"
    assert same(runs / "whole/last.pt", runs / "by-hand/last.pt", "weights")
    with (
        monkeypatch.context() as patch,
        pytest.raises(ZeroDivisionError),
    ):  # killed: nothing is saved after the rollback
        stop_after(patch, 10, lambda: 1 / 0)
        train_vit.main([*flags, "--run-name", "cut"])
    assert train_vit.main(["--resume", str(runs / "cut")])["rollbacks"] == 1
    assert same(runs / "whole/last.pt", runs / "cut/last.pt", "weights", "ema")


def test_rollbacks_end_the_run_without_a_checkpoint_and_after_three(folder_flags, tmp_path, plant):
    flags = [*folder_flags, "--on-nan", "rollback", "--epochs", "3"]
    plant((0, 1))
    with pytest.raises(UserError, match="the loss is not finite: epoch 1, step 2, .*there is no .*last.pt yet; what"):
        train_vit.main(flags)
    plant((1, 0), (1, 2), (1, 4), (2, 1))
    with pytest.raises(UserError, match="the loss is not finite: epoch 3, step 2, .*; rolled back 3 times; what"):
        train_vit.main([*flags, "--overwrite"])
    plant()
    assert train_vit.main(["--resume", str(tmp_path / "runs/vit"), "--on-nan", "stop"])["rollbacks"] == 3


def test_a_run_of_before_resumes_with_any_of_them(folder_flags, tmp_path, plant, monkeypatch):
    stopped_after(7, train_vit.main, folder_flags, monkeypatch)
    path = tmp_path / "runs/vit/last.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["on_nan"]
    save_checkpoint(path, checkpoint)
    plant((1, 3))
    with pytest.raises(UserError, match="the loss is not finite: epoch 2, step 4"):
        train_vit.main(["--resume", str(path.parent)])
    assert train_vit.main(["--resume", str(path.parent), "--on-nan", "skip"])["skipped_updates"] == 1


def test_a_collapsed_loss_scale_is_said_once(folder_flags, monkeypatch, capsys):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: 0.5)
    train_vit.main(folder_flags)
    assert capsys.readouterr().err.count("warning: the loss scale is below 1: float16 overflows") == 1


def test_one_class_for_every_image_is_said_once(folder_flags, monkeypatch, capsys):
    said = "warning: the model predicts the same class for every image; "
    for logits in (torch.eye(3)[[0] * 12], torch.eye(3)[[0] * 11 + [1]]):
        monkeypatch.setattr("train_vit.validate", lambda logits=logits, **_: (1.0, 0.3, logits))
        train_vit.main([*folder_flags, "--overwrite"])
        assert capsys.readouterr().err.count(said) == len(logits.argmax(1).unique()) % 2


def test_weights_that_are_not_finite_are_never_saved(folder_flags, tmp_path):
    """By a loss that is finite, and whose gradient is not."""
    steps = []

    def spoil(optimizer, *_):
        steps.append(optimizer)
        if len(steps) == 3:
            optimizer.param_groups[0]["params"][0].grad *= math.nan

    handle = register_optimizer_step_pre_hook(spoil)
    try:
        with pytest.raises(UserError, match="weights are not finite in epoch 1 after step 3: lower --lr"):
            train_vit.main([*folder_flags, "--save-minutes", "1e-9"])
    finally:
        handle.remove()
    assert load_checkpoint(tmp_path / "runs" / "vit")["step"] == 2
