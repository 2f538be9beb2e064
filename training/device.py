"""The device, the precision that it computes in, and what it calls itself."""

import ctypes
import functools
import platform
import re
import sys
from pathlib import Path

import torch

from errors import UserError


def pick_device(name=None):
    """torch.device of that name; without one, cuda, then mps, then cpu. Raises UserError where there is none such."""
    available = [
        kind
        for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        if there
    ]
    available.append("cpu")
    try:
        device = torch.device(name or available[0])
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; here there is {', '.join(available)}") from error
    if device.type not in available or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"--device {name}: this machine, or this build of torch, has none; here there is {', '.join(available)}"
        )
    if device.type == "cuda":
        check_kernels(device)
    return device


def check_kernels(device):
    """Raises UserError for an NVIDIA GPU that this build of torch has no kernels for."""
    if torch.version.hip:
        return
    own = torch.cuda.get_device_capability(device)
    kinds = torch.cuda.get_arch_list()
    for kind in kinds:  # sm_75 runs on 7.5 and above up to 7.9, compute_90 on all from 9.0
        name, number = kind.rstrip("af").split("_")
        needed = divmod(int(number), 10)
        if needed <= own and (name == "compute" or needed[0] == own[0]):
            return
    name = f"{torch.cuda.get_device_name(device)} (sm_{own[0]}{own[1]})"
    raise UserError(
        f"--device {device}: this torch has kernels for {' '.join(kinds)}, none for {name}; --device cpu goes, or an"
        " older torch"
    )


def has_bfloat16(device):
    """Whether the device multiplies bfloat16 matrices itself, rather than by emulation (as a T4, which says yes)."""
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


@functools.cache
def onednn_keeps_float32():
    """Whether oneDNN, allowed to use bfloat16 within a product of float32 matrices, keeps to float32 on this CPU.

    torch has MKL multiply, which takes twice as long on an AMD Zen 5; this permission is the one way to oneDNN, which
    makes use of it where there is AMX. Three products, of the layouts that a linear layer needs, tell.
    """
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    pairs = ((a, b), (a, b.mT), (a.mT, b))
    error = max((left @ right - left.double() @ right.double()).abs().max().item() for left, right in pairs)
    settings.fp32_precision = before
    return error < 1e-3  # float32 1e-5, bfloat16 0.1


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory(*, block=2**30, most=2**31 - 1):
    """Let the C library (glibc) keep freed blocks of up to `block` bytes, `most` in all, for the next step.

    It would give blocks above 32 MiB back in every step and get them anew, page by page: on two Zen 5 cores a step of
    CCT-6/3x1 took a third longer so, with as much memory at its peak. Other C libraries are left alone.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, block)
        library.mallopt(M_TRIM_THRESHOLD, most)


class Precision:
    """Mixed precision on one device: `autocast()` for the forward pass, `scaler` for the backward pass.

    amp is "auto" (bf16 where the device has it, else fp16 on CUDA, else off), "bf16", "fp16" or "off" (float32; its
    products on a GPU are in TF32).
    Raises UserError for bf16 on a device without it.
    """

    def __init__(self, amp, device):
        if amp == "auto":
            amp = "bf16" if has_bfloat16(device) else "fp16" if device.type == "cuda" else "off"
        elif amp == "bf16" and not has_bfloat16(device):
            raise UserError(f"--amp bf16: {device_name(device)} has no bfloat16; --amp auto takes what it has")
        self.amp = amp
        self.device_type = device.type
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
        if device.type == "cuda":  # as convolutions have it; fp32_precision, which is newer, would make this unreadable
            torch.backends.cuda.matmul.allow_tf32 = True
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cpu" and amp == "off" and onednn_keeps_float32():
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self):
        return torch.autocast(self.device_type, self.dtype, enabled=self.amp != "off")


def device_name(device):
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple " + platform.machine()
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


def peak_memory_bytes(device):
    """The most memory held so far: on the GPU, or by the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux, where ru_maxrss may be that of the process that started this one
    if status.exists() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(match[1])
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
