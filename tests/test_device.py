import warnings

import pytest
import torch

from errors import UserError
from training.device import Precision, device_name, has_bfloat16, pick_device


def test_the_first_device_there_is(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda cuda=cuda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device().type == expected


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:3", "abacus"):
        with pytest.raises(UserError, match=f"--device {name}: .* here there is cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--device cuda:1"):
        pick_device("cuda:1")


def test_a_t4_which_emulates_bfloat16_gets_float16_with_a_scaler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    cuda = torch.device("cuda")
    assert not has_bfloat16(cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no CUDA for the scaler here
        assert Precision("auto", cuda).amp == "fp16"
    with pytest.raises(UserError, match="--amp bf16: Tesla T4 has no bfloat16"):
        Precision("bf16", cuda)


def test_precision_on_a_processor(monkeypatch):
    cpu = torch.device("cpu")
    assert device_name(cpu)
    for capable, amp, dtype in ((True, "bf16", torch.bfloat16), (False, "off", torch.float32)):
        monkeypatch.setattr("training.device.has_bfloat16", lambda device, capable=capable: capable)
        precision = Precision("auto", cpu)
        assert precision.amp == amp and not precision.scaler.is_enabled()
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
