import math
from argparse import Namespace

import pytest
import torch

from training.optimizer import make_schedule

STEPS = 7  # an epoch


def optimizer_and_schedule(name, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    defaults = {"sched": name, "epochs": 20, "milestones": None, "gamma": 0.1, "warmup_epochs": None}
    defaults |= {"lr": 0.3, "div_factor": 10.0, "swa_start": 0.0, "swa_lr": None}
    return optimizer, make_schedule(Namespace(**defaults | options), optimizer, steps_per_epoch=STEPS)


def rates(optimizer, schedule, steps):
    """The learning rate that each of the next steps uses."""
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


def multistep_closed_form(step, milestones):
    return 0.3 * 0.1 ** sum(step >= milestone * STEPS for milestone in milestones)


def cosine_closed_form(step, *, warmup, total):
    if step < warmup:
        return 0.3 * step / warmup
    return 0.15 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def onecycle_closed_form(step, *, total):
    peak = 0.3 * total - 1
    if step <= peak:
        return 0.03 + (0.3 - 0.03) * (1 - math.cos(math.pi * step / peak)) / 2
    return 3e-6 + (0.3 - 3e-6) * (1 + math.cos(math.pi * (step - peak) / (total - 1 - peak))) / 2


CASES = {
    "one cycle": ("onecycle", {}, lambda t: onecycle_closed_form(t, total=20 * STEPS)),
    "multistep, as in the report": ("multistep", {"epochs": 160}, lambda t: multistep_closed_form(t, (100, 150))),
    "multistep, scaled": ("multistep", {}, lambda t: multistep_closed_form(t, (12, 19))),
    "multistep, given": ("multistep", {"milestones": [3, 5, 9]}, lambda t: multistep_closed_form(t, (3, 5, 9))),
    "cosine": ("cosine", {}, lambda t: cosine_closed_form(t, warmup=2 * STEPS, total=20 * STEPS)),
    "cosine, no warm-up": ("cosine", {"warmup_epochs": 0}, lambda t: cosine_closed_form(t, warmup=0, total=20 * STEPS)),
    "cosine, half an epoch": (
        "cosine",
        {"warmup_epochs": 0.5},
        lambda t: cosine_closed_form(t, warmup=3.5, total=20 * STEPS),
    ),
    "cosine, then --swa-lr": (
        "cosine",
        {"swa_start": 0.5, "swa_lr": 0.02},
        lambda t: cosine_closed_form(t, warmup=2 * STEPS, total=20 * STEPS) if t < 10 * STEPS else 0.02,
    ),
    "multistep, then as it is at --swa-start": (
        "multistep",
        {"milestones": [3, 15], "swa_start": 0.5},
        lambda t: multistep_closed_form(t, (3,)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_whole_sequence_equals_the_closed_form_also_across_a_resume(case):
    name, options, closed_form = CASES[case]
    total = options.get("epochs", 20) * STEPS
    expected = [closed_form(step) for step in range(total)]
    assert rates(*optimizer_and_schedule(name, **options), total) == pytest.approx(expected, abs=1e-12)

    for stop in (1, 3 * STEPS - 1, 3 * STEPS, 3 * STEPS + 1, 12 * STEPS):
        optimizer, schedule = optimizer_and_schedule(name, **options)
        before = rates(optimizer, schedule, stop)
        saved = optimizer.state_dict(), {k: v for k, v in schedule.state_dict().items() if k != "milestones"}
        optimizer, schedule = optimizer_and_schedule(name, **options)
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        assert before + rates(optimizer, schedule, total - stop) == pytest.approx(expected, abs=1e-12)
        assert schedule.last_epoch == total  # the loggers count by it


def test_momentum_goes_down_and_up_against_the_one_cycle():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.3, betas=(0.9, 0.99))
    args = Namespace(sched="onecycle", epochs=20, lr=0.3, div_factor=10.0, swa_start=0.0)
    schedule = make_schedule(args, optimizer, steps_per_epoch=STEPS)
    seen = []
    for _ in range(20 * STEPS):
        seen.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        schedule.step()
    first = [betas[0] for betas in seen]
    assert first[0] == pytest.approx(0.95) and first[-1] == pytest.approx(0.95) and min(first) == pytest.approx(0.85)
    assert first.index(min(first)) == 6 * STEPS - 1 and {betas[1] for betas in seen} == {0.99}
