"""--find-lr: the steepest part of the loss, and a run that is afterwards as it was."""

import copy
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import train_vit
from errors import UserError
from training.device import Precision
from training.find_lr import DECADE, LOWEST, SWEEP, find_lr, smooth, steepest, sweep
from training.loop import classification_loss, train_one_epoch
from training.optimizer import make_optimizer

CPU = torch.device("cpu")
RATES = [LOWEST * 10 ** (step / DECADE) for step in range(SWEEP)]


def few_batches(*batches):
    return SimpleNamespace(batches=lambda epoch, start_step: iter(batches[start_step:]), whole=True)


def sweepable(model, optimizer, batches, loss_function, amp="off"):
    """(run, train_epoch) as find_lr takes them."""
    run = SimpleNamespace(model=model, optimizer=optimizer, precision=Precision(amp, CPU), device=CPU)
    loss = partial(classification_loss, criterion=loss_function)
    fixed = {"model": model, "batches": batches, "loss_function": loss, "optimizer": optimizer}
    return run, partial(train_one_epoch, **fixed, precision=run.precision, seed=0)


def test_the_steepest_decade_of_a_known_curve():
    """exp(-a r) falls most over a decade around r where a r (10 - 1) / sqrt(10) = ln 10; it is lowest at the end."""
    for a in (1.0, 30.0, 1000.0):
        found = steepest(RATES, [math.exp(-a * rate) for rate in RATES])
        expected = math.log(10) * math.sqrt(10) / 9 / a
        assert abs(math.log10(found / expected)) <= 0.5 / DECADE + 1e-9


def test_a_fall_in_the_first_decade_or_after_a_jump_does_not_count():
    losses = [3.0 - 0.1 * step if step < DECADE else 2 - 0.01 * step - 0.1 * (step > 40) for step in range(60)]
    jump = [4.0 - step / 20 for step in range(30)]
    middle = steepest(RATES, losses + jump)
    assert middle == steepest(RATES, losses) and RATES[41 - DECADE] < middle < RATES[40 + DECADE]
    with pytest.raises(UserError, match="--find-lr: no learning rate from 1e-07 to .* lowers the loss"):
        steepest(RATES, [1.0 + step for step in range(SWEEP)])
    with pytest.raises(UserError, match="lowers the loss"):
        steepest(RATES[:3], [3.0, 2.0, 1.0])


def test_means_are_corrected_for_their_start():
    assert smooth([7.0] * 9) == pytest.approx([7.0] * 9)
    assert smooth([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 1 + 2) / 1.9])


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, images):
        return self.w.expand(len(images), 2)


@pytest.mark.parametrize("curvature", [40.0, 4000.0])
def test_on_a_quadratic_it_is_the_slope_and_not_the_minimum(curvature):
    """The loss h w^2 / 2 after each step is that of w times (1 - h r): known for every r, and divergent above 2 / h."""
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = few_batches(*[(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))] * 40)
    run, train_epoch = sweepable(model, optimizer, batches, lambda logits, labels: curvature / 2 * logits[0, 0] ** 2)
    rates, means = sweep(run, train_epoch, first_epoch=0)
    w, losses = 1.0, []
    for rate in RATES[: len(rates)]:
        losses.append(curvature / 2 * w * w)
        w *= 1 - curvature * rate
    assert rates == pytest.approx(RATES[: len(rates)]) and means == pytest.approx(smooth(losses), rel=1e-6)
    assert means[-1] > 4 * min(means) and len(rates) < SWEEP and rates[-1] > 2 / curvature
    found = steepest(rates, means)
    # per e-fold of r the loss falls by 2 c h r of itself (c steps), so most where a r = 2 c h r is as above; the means
    # lag behind it by up to nine steps
    middle = math.log(10) * math.sqrt(10) / 9 / (2 * DECADE / math.log(10) * curvature)
    assert 0.9 * middle < found < 1.1 * middle * 10 ** (9 / DECADE)
    assert found < rates[means.index(min(means))] / 2


def small_model():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Dropout(0.3))
    model = nn.ModuleDict({"blocks": trunk, "head": nn.Linear(16, 4)})
    model.forward = lambda images: model["head"](model["blocks"](images))
    model.no_weight_decay = ()
    return model


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw", "muon"])
def test_the_run_is_afterwards_as_before_to_the_bit(opt, amp):
    args = {"lr": 0.01, "weight_decay": 0.1, "decay_all": False, "momentum": 0.9, "opt_betas": [0.9, 0.99]}
    model = small_model()
    optimizer = make_optimizer(SimpleNamespace(opt=opt, opt_eps=1e-8, **args), model)
    images, labels = torch.randn(64, 5), torch.arange(64) % 4
    images[:, :4] += 2 * torch.eye(4)[labels]
    batches = few_batches((images[:32], labels[:32]), (images[32:], labels[32:]))
    run, train_epoch = sweepable(model, optimizer, batches, cross_entropy, amp)

    def state():
        parts = [part.state_dict() for part in (model, optimizer, run.precision.scaler)]
        return copy.deepcopy([*parts, torch.get_rng_state(), [p.grad for p in model.parameters()]])

    before = state()
    rates, sweeps = find_lr(run, train_epoch)
    assert same(before, state())
    assert len(rates) == 3 and all(1e-5 < rate < 3 for rate in rates)
    assert len({tuple(means) for _, means in sweeps}) == 3  # other orders and dropout masks
    again, _ = find_lr(run, train_epoch)
    assert again == rates


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("flags", [[], ["--opt", "muon", "--sched", "onecycle", "--model-ema-decay", "0.9"]])
def test_a_real_sweep_prints_a_rate_and_leaves_a_plot(folder_flags, tmp_path, capsys, flags):
    assert train_vit.main([*folder_flags, *flags, "--find-lr"]) is None
    out = capsys.readouterr().out
    found = re.search(r"^--lr (\S+) \(3 seeds: (\S+), (\S+), (\S+)\)$", out, re.M).groups()
    assert found[0] == found[2] and [*found[1:]] == sorted(found[1:], key=float)
    assert all(1e-6 < float(rate) < 1 for rate in found)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["lr-finder.png"]
    train_vit.main([*folder_flags, *flags, "--lr", found[0], "--epochs", "1"])


@pytest.mark.parametrize(
    "other",
    [["--summary"], ["--resume", "auto"], ["--overwrite"], ["--accumulate", "4"], ["--minutes", "1"], ["--log"]],
)
def test_what_contradicts_it_is_one_line(folder_flags, other):
    with pytest.raises(UserError, match=f"^--find-lr and {other[0]} exclude each other$"):
        train_vit.main([*folder_flags, "--find-lr", *other])


def test_it_says_nothing_of_a_folder_that_it_does_not_write(folder_flags, tmp_path, capsys):
    (tmp_path / "runs" / "vit").mkdir(parents=True)
    (tmp_path / "runs" / "vit" / "last.pt").touch()
    train_vit.main([*folder_flags, "--find-lr", "--embed-dim", "8"])
    assert "this run is written to" not in capsys.readouterr().out
