"""Devices: which there is, what it computes in and keeps, and what it calls itself."""

import platform
import subprocess
import sys
import warnings

import pytest
import torch

from errors import UserError
from training.device import Precision, device_name, has_bfloat16, onednn_keeps_float32, pick_device


def test_the_first_device_there_is(monkeypatch):
    monkeypatch.setattr("training.device.check_kernels", lambda device: None)
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda cuda=cuda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device().type == expected


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:3", "abacus"):
        with pytest.raises(UserError, match=f"--device {name}: .* available: cpu"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--device cuda:1"):
        pick_device("cuda:1")


def test_a_t4_which_emulates_bfloat16_gets_float16_with_a_scaler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    cuda = torch.device("cuda:1")
    assert has_bfloat16(torch.device("cuda")) and not has_bfloat16(cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no CUDA for the scaler here
        assert Precision("auto", cuda).amp == "fp16"
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    for amp in ("bf16", "tf32"):
        with pytest.raises(UserError, match=f"--amp {amp}: Tesla T4 has no"):
            Precision(amp, cuda)


def test_off_is_float32_and_tf32_a_choice_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for amp, allowed in (("off", False), ("tf32", True)):
        precision = Precision(amp, torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        assert precision.dtype == torch.float32 and not precision.autocast()._enabled
    with pytest.raises(UserError, match="--amp tf32: .* has no TF32"):
        Precision("tf32", torch.device("cpu"))


def test_precision_on_a_processor(monkeypatch):
    cpu = torch.device("cpu")
    assert device_name(cpu)
    for capable, amp, dtype in ((True, "bf16", torch.bfloat16), (False, "off", torch.float32)):
        monkeypatch.setattr("training.device.has_bfloat16", lambda device, capable=capable: capable)
        precision = Precision("auto", cpu)
        assert precision.amp == amp and not precision.scaler.is_enabled()
        with precision.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.fixture
def asked_anew():
    onednn_keeps_float32.cache_clear()
    yield
    onednn_keeps_float32.cache_clear()


def test_float32_stays_float32_whoever_multiplies(asked_anew, matmul_settings):
    """On a machine with AMX oneDNN would multiply in bfloat16, and is not asked."""
    Precision("off", torch.device("cpu"))
    assert matmul_settings.fp32_precision == ("bf16" if onednn_keeps_float32() else "none")
    generator = torch.Generator().manual_seed(1)
    for rows, inner, columns in ((64 * 65, 256, 768), (512, 64 * 65, 256), (33, 77, 129)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(inner, columns, generator=generator)
        expected = a.double() @ b.double()
        assert ((a @ b).double() - expected).abs().max() < 4e-5 * inner**0.5


def test_a_probe_that_is_not_float32_is_seen(asked_anew, matmul_settings, monkeypatch):
    class Rough(torch.Tensor):
        def __matmul__(self, other):
            exact = self.dtype == torch.float64
            return self.matmul(other) if exact else self.bfloat16().matmul(other.bfloat16()).float()

    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: draw(*size, **options).as_subclass(Rough))
    Precision("off", torch.device("cpu"))
    assert not onednn_keeps_float32() and matmul_settings.fp32_precision == "none"


def test_bfloat16_leaves_the_switch_alone(matmul_settings, monkeypatch):
    monkeypatch.setattr("training.device.has_bfloat16", lambda device: True)
    Precision("auto", torch.device("cpu"))
    assert matmul_settings.fp32_precision == "none"


@pytest.mark.parametrize(
    ("capability", "kinds", "runs"),
    [
        ((6, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_75", "sm_86"], True),
        ((9, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_75", "compute_90"], True),
        ((9, 0), ["sm_80", "sm_90a", "sm_120"], True),
    ],
)
def test_a_card_without_kernels_is_named(monkeypatch, capability, kinds, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: kinds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    if runs:
        assert pick_device().type == "cuda"
    else:
        said = f"none for Tesla P100 .sm_{capability[0]}{capability[1]}.; use --device cpu"
        with pytest.raises(UserError, match=said):
            pick_device()
    monkeypatch.setattr(torch.version, "hip", "7.1")  # whose kinds have other names
    assert pick_device().type == "cuda"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """Counted in page faults of buffers of 64 MiB, one after the other, in a process of their own."""
    program = """
import resource, torch
from training.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
given_back = faults()
keep_freed_memory()
print(given_back, [faults() for _ in range(6)][-1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 20
