from argparse import Namespace

import pytest
import torch
from torch import nn

from errors import UserError
from training.averaging import make_average
from training.device import Precision

NONE = {"model_ema_decay": 0.0, "swa_start": 0.0, "epochs": 8}


def asked_for(**values):
    return Namespace(**NONE | values)


class SomeBatches:
    steps_per_epoch = 4

    def batches(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(self.steps_per_epoch):
            yield 3 + 2 * torch.randn(16, 2, generator=generator), torch.zeros(16)


def after_epoch(average, model, epoch):
    average.after_epoch(model, SomeBatches(), epoch=epoch, seed=0, precision=Precision("off", torch.device("cpu")))


def test_the_moving_average_follows_its_formula_buffers_included():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = make_average(model, asked_for(model_ema_decay=0.9))
    assert average.model is None
    expected = None
    for value in (1.0, 2.0, 4.0):
        for tensor in (model[0].weight.data, model[1].running_mean):
            tensor.fill_(value)
        average.after_step(model)
        after_epoch(average, model, 7)  # which it does not follow
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    torch.testing.assert_close(average.model[0].weight, torch.full((2, 2), expected))
    torch.testing.assert_close(average.model[1].running_mean, torch.full((2,), expected))
    assert make_average(model, asked_for()) is None and not average.model.training


def test_swa_is_the_mean_of_the_weights_after_the_last_epochs():
    model = nn.Linear(2, 2)
    average = make_average(model, asked_for(swa_start=0.75))
    for epoch in range(8):
        model.weight.data.fill_(2.0**epoch)
        average.after_step(model)  # which it does not follow
        after_epoch(average, model, epoch)
        assert (average.model is None) == (epoch < 6)
    assert torch.equal(average.model.weight, torch.full((2, 2), (64 + 128) / 2))


def test_swa_computes_the_statistics_of_batchnorm_anew():
    """Those of the model belong to other weights; the mean over batches of the same epoch is the closed form."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = make_average(model, asked_for(swa_start=0.5))
    for epoch in (4, 5):
        nn.init.normal_(model[0].weight)
        after_epoch(average, model, epoch)
    with torch.no_grad():
        outputs = [average.model[0](images) for images, _ in SomeBatches().batches(5)]
    expected = torch.stack([output.mean(0) for output in outputs]).mean(0)
    torch.testing.assert_close(average.model[1].running_mean, expected)
    assert not average.model.training and torch.equal(model[1].running_mean, torch.zeros(2))


@pytest.mark.parametrize(("how", "count"), [({"swa_start": 0.5}, 2), ({"model_ema_decay": 0.9}, 9)])
def test_a_loaded_average_continues_as_if_never_stored(how, count):
    model = nn.Linear(2, 2)
    whole, resumed = (make_average(model, asked_for(**how)) for _ in range(2))
    for epoch in range(8):
        if epoch == 6:
            weights = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
            resumed.load(weights, epoch=6, step=3)
            assert resumed.averaged.n_averaged.item() == count
        model.weight.data.fill_(2.0**epoch)
        for average in (whole, resumed)[: 1 + (epoch > 5)]:
            average.after_step(model)
            after_epoch(average, model, epoch)
    assert torch.equal(whole.model.weight, resumed.model.weight)


def test_two_averages_exclude_each_other():
    with pytest.raises(UserError, match="--model-ema-decay and --swa-start exclude each other"):
        make_average(nn.Linear(1, 1), asked_for(model_ema_decay=0.9, swa_start=0.5))
