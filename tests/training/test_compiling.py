"""torch.compile by --compile: when, on which batches, and what happens without a compiler."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training import device as devices
from training.device import LONG, compiled_forward

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flags(choice, epochs=1):
    return SimpleNamespace(compile=choice, epochs=epochs, batch_size=4, fsdp=False, sync_bn=False)


@pytest.mark.parametrize(
    ("choice", "device", "epochs", "compiles"),
    [
        ("auto", CPU, LONG, False),
        ("auto", CUDA, 99, False),
        ("auto", CUDA, 100, True),
        ("off", CUDA, LONG, False),
        ("on", CPU, 1, True),
    ],
)
def test_auto_compiles_long_runs_on_a_gpu(monkeypatch, choice, device, epochs, compiles):
    monkeypatch.setattr(devices.torch, "zeros", lambda *size, device: None)
    asked = []
    monkeypatch.setattr(devices.torch, "compile", lambda f, **mode: asked.append(mode) or (lambda x, *more: "compiled"))
    model = nn.Linear(2, 2)
    forward = compiled_forward(model, flags(choice, epochs), device=device, num_images=LONG // 100)
    assert (forward is not model) == compiles
    if compiles:
        assert asked[1] == {"mode": "reduce-overhead" if device == CUDA else None}
        assert forward(torch.ones(4, 2)) == "compiled" and isinstance(forward(torch.ones(3, 2)), torch.Tensor)
        assert forward(torch.ones(4, 2), 1, 2) == "compiled"  # a generator takes times and classes as well


def test_without_a_compiler_it_goes_on_without(monkeypatch, capsys):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    torch._dynamo.reset()
    model = nn.Linear(2, 2)
    with torch._inductor.utils.fresh_cache():
        assert compiled_forward(model, flags("on"), device=CPU, num_images=1) is model
    warning = capsys.readouterr().err
    assert "warning: --compile on: " in warning and "C++ compiler" in warning and "training without it" in warning


@pytest.mark.slow
def test_a_compiled_model_is_the_same_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    forward = compiled_forward(model, flags("on"), device=CPU, num_images=1)
    x = torch.randn(4, 3)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    forward(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
