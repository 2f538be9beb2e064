from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from training.device import Precision
from training.loop import batches_per_step, classification_loss, loss_and_accuracy, new_sums, train_one_epoch, validate
from training.optimizer import cosine_schedule

CPU = torch.device("cpu")


class ListOfBatches:
    """The loop's side of the contract: steps_per_epoch and batches(epoch, start_step)."""

    device, whole = CPU, True

    def __init__(self, *batches):
        self.list, self.steps_per_epoch = batches, len(batches)

    def batches(self, epoch=0, start_step=0):
        yield from self.list[start_step:]


def random_batches(sizes=(8, 8, 3)):
    generator = torch.Generator().manual_seed(0)
    return ListOfBatches(
        *((torch.randn(n, 5, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes)
    )


def cosine(optimizer, steps=100):
    return cosine_schedule(optimizer, epochs=steps, steps_per_epoch=1, warmup_epochs=0)


def train(
    model, batches, *, optimizer=None, schedule=None, sums=None, amp="off", steps=100, after_step=None, **options
):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    schedule = schedule or cosine(optimizer, steps)
    sums = sums or new_sums(CPU)
    train_one_epoch(
        model=model,
        batches=batches,
        loss_function=partial(classification_loss, criterion=cross_entropy),
        optimizer=optimizer,
        schedule=schedule,
        precision=Precision(amp, CPU),
        sums=sums,
        after_step=after_step or (lambda sums: False),
        **{"seed": 0, "epoch": 0} | options,
    )
    return sums


def test_loss_and_accuracy_are_weighted_by_images():
    """The last batch is smaller: a mean over batches would give another number."""
    model, batches = nn.Linear(5, 4), random_batches()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    images, labels = (torch.cat(parts) for parts in zip(*batches.list, strict=True))
    with torch.no_grad():
        logits = model(images)
    expected = cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    sums = train(model, batches, optimizer=frozen)
    assert loss_and_accuracy(sums) == pytest.approx(expected, abs=1e-6) and sums["step"] == 3
    loss, accuracy, outputs = validate(model=model, batches=batches, precision=Precision("off", CPU))
    assert (loss, accuracy) == pytest.approx(expected, abs=1e-6) and torch.equal(outputs, logits)


def test_one_step_is_the_optimisers_step():
    torch.manual_seed(0)
    model, reference = nn.Linear(5, 4), nn.Linear(5, 4)
    reference.load_state_dict(model.state_dict())
    batches = random_batches((8,))
    train(model, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    images, labels = batches.list[0]
    cross_entropy(reference(images), labels).backward()
    torch.testing.assert_close(model.weight, reference.weight - 0.1 * reference.weight.grad)


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8, 8, 8, 3)], ids=["whole", "the last group is short"])
def test_accumulated_batches_equal_one_large_batch(sizes):
    torch.manual_seed(0)
    small, large = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    large.load_state_dict(small.state_dict())
    batches = random_batches(sizes)
    batches.list = [(images.double(), labels) for images, labels in batches.list]
    joined = ListOfBatches(
        *(
            (torch.cat([batches.list[k][0] for k in pair]), torch.cat([batches.list[k][1] for k in pair]))
            for pair in ((0, 1), (2, 3))
        )
    )
    seen, of_large = [], []
    options = {"clip_grad": 0.5, "clip_value": 0.05}

    def note(seen):
        return lambda sums: seen.append((sums["step"], sums["last_loss"].item()))

    sums = train(small, batches, accumulate=["2"], steps=4, after_step=note(seen), **options)
    expected = train(large, joined, steps=2, after_step=note(of_large), **options)
    torch.testing.assert_close(small.weight, large.weight, rtol=0, atol=1e-12)
    assert [step for step, _ in seen] == [2, 4]
    assert [loss for _, loss in seen] == pytest.approx([loss for _, loss in of_large], rel=1e-5)
    assert loss_and_accuracy(sums) == pytest.approx(loss_and_accuracy(expected), rel=1e-5)
    assert sums["lr"] == expected["lr"]  # of the last step: the schedule counts batches


def test_a_run_stopped_between_accumulated_steps_resumes():
    def weights(stops):
        torch.manual_seed(1)
        model = nn.Linear(5, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule, sums = cosine(optimizer), new_sums(CPU)
        for stop in (*stops, 99):
            options = {"optimizer": optimizer, "schedule": schedule, "sums": sums, "accumulate": ["3"]}
            train(model, random_batches((8,) * 7), after_step=lambda s, stop=stop: s["step"] >= stop, **options)
        return model.weight.tolist(), sums["step"], schedule.last_epoch

    assert weights([]) == weights([1]) == weights([2, 4]) and weights([])[1:] == (7, 7)


def test_the_number_of_batches_per_step_follows_the_epoch():
    plan = ["10:4", "0:8"]
    assert [batches_per_step(plan, epoch) for epoch in (0, 9, 10, 99)] == [8, 8, 4, 4]
    assert [batches_per_step(["3:2"], epoch) for epoch in (0, 2, 3)] == [1, 1, 2]


def test_clip_value_limits_each_element():
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    before = model.weight.detach().clone()
    train(
        model, random_batches((8,)), optimizer=torch.optim.SGD(model.parameters(), lr=1.0), clip_value=0.01, amp="fp16"
    )
    moved = (model.weight - before).abs()
    assert moved.max().item() == pytest.approx(0.01, rel=1e-3) and (moved < 0.0099).any()


class CountWaits(TorchDispatchMode):
    """Counts what makes the host wait for a device: .item(), bool(), float(), and copies to the host."""

    waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        to_host = name == "aten::_to_copy" and (kwargs or {}).get("device") == CPU
        self.waits += "_local_scalar_dense" in name or "nonzero" in name or to_host
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_inside_an_epoch():
    Precision("off", CPU)  # looks at how this CPU multiplies, once a process
    with CountWaits() as counted:
        train(nn.Linear(5, 4), random_batches(), clip_grad=1.0)
    assert counted.waits == 0
    with CountWaits() as counted:
        torch.ones(1).item()
        bool(torch.ones(1))
    assert counted.waits == 2  # the counter does count


def test_dropout_follows_from_seed_epoch_and_step_alone():
    def weights_after(**options):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        torch.manual_seed(options.pop("global_seed", 7))
        train(model, random_batches(), **options)
        return model[0].weight.detach()

    assert torch.equal(weights_after(), weights_after(global_seed=8))
    assert not torch.equal(weights_after(), weights_after(seed=1))
    assert not torch.equal(weights_after(), weights_after(epoch=1))


def test_stopping_and_going_on_inside_an_epoch_changes_nothing():
    def trained(stops):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Linear(16, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule, sums = cosine(optimizer), new_sums(CPU)
        for stop in (*stops, 99):
            train(
                model,
                random_batches((8,) * 6),
                optimizer=optimizer,
                schedule=schedule,
                sums=sums,
                after_step=lambda sums, stop=stop: sums["step"] >= stop,
            )
        return sums["step"], loss_and_accuracy(sums), model[0].weight.tolist()

    whole = trained([])
    assert whole[0] == 6 and whole == trained([2]) == trained([1, 5, 6])


@pytest.mark.parametrize("bad_step", [0, 2])
def test_the_first_loss_that_is_not_finite_is_noted(bad_step):
    batches = random_batches((8,) * 5)
    batches.list[bad_step][0].fill_(float("nan"))
    sums = train(nn.Linear(5, 4), batches, steps=10)
    assert sums["bad_step"].item() == bad_step
    expected = 0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * bad_step / 10)).item())
    assert sums["bad_lr"].item() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_unscaled_before_they_are_clipped():
    """With a loss scale of 65536 and the order reversed, the clipped gradient would be 65536 times too small."""
    torch.manual_seed(0)
    model, reference = nn.Linear(5, 4), nn.Linear(5, 4)
    reference.load_state_dict(model.state_dict())
    for m, amp in ((model, "fp16"), (reference, "off")):
        train(m, random_batches((8,)), optimizer=torch.optim.SGD(m.parameters(), lr=1.0), amp=amp, clip_grad=0.01)
    start = torch.nn.utils.parameters_to_vector(reference.parameters())
    torch.testing.assert_close(torch.nn.utils.parameters_to_vector(model.parameters()), start, rtol=0, atol=1e-4)


def test_validate_leaves_the_mode_and_the_weights_alone():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = [validate(model=model, batches=random_batches(), precision=Precision("off", CPU))[0] for _ in range(2)]
    assert results[0] == results[1] and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
