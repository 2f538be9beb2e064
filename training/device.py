"""The device: its precision, its name, its memory, and torch.compile on it."""

import contextlib
import ctypes
import functools
import os
import platform
import re
import sys
from pathlib import Path

import torch

from errors import UserError
from training.ranks import rank_and_ranks, shared_forward


def pick_device(name=None):
    """torch.device of that name; without a name cuda, then mps, then cpu. Raises UserError if there is none.

    Under torchrun, each process on a machine takes a GPU of its own.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind in there if there[kind]]
    try:
        device = torch.device(name or available[0])
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; available: {', '.join(available)}") from error
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type not in available or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        reason = "this machine, or this build of torch, has none"
        raise UserError(f"--device {name}: {reason}; available: {', '.join(available)}")
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
    advice = "use --device cpu or an older torch"
    raise UserError(f"--device {device}: this torch has kernels for {' '.join(kinds)}, none for {name}; {advice}")


def has_tf32(device):
    """Whether the device multiplies float32 matrices in TF32: NVIDIA's GPUs do, from the A100 on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def has_bfloat16(device):
    """Whether the device multiplies bfloat16 matrices itself; a T4 only emulates it, though torch says yes."""
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


@functools.cache
def onednn_keeps_float32():
    """Whether oneDNN, allowed to use bfloat16 within a product of float32 matrices, keeps to float32 on this CPU.

    By default torch multiplies by MKL, which takes twice as long on an AMD Zen 5. This permission is the only way to
    oneDNN, which really uses bfloat16 on CPUs with AMX. Three products, in the layouts of a linear layer, tell.
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

    Otherwise it returns blocks above 32 MiB to the system in every step and gets them again, page by page: on two Zen 5
    cores a step of CCT-6/3x1 then took a third longer, at the same peak memory. Other C libraries are left alone.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, block)
        library.mallopt(M_TRIM_THRESHOLD, most)


class Precision:
    """Mixed precision on one device: `autocast()` for the forward pass, `scaler` for the backward pass.

    amp is "auto" (bf16 if the device has it, else fp16 on CUDA, else off), "bf16", "fp16", "tf32" (float32 weights and
    activations, multiplied in TF32) or "off" (float32). What remains in float32 under bf16 and fp16 is multiplied in
    TF32 as well. deterministic: the same bits each time, on a GPU as on a CPU. Raises UserError for bf16 and tf32 on a
    device without it.
    """

    def __init__(self, amp, device, *, deterministic=False):
        if amp == "auto":
            amp = "bf16" if has_bfloat16(device) else "fp16" if device.type == "cuda" else "off"
        elif amp == "bf16" and not has_bfloat16(device):
            raise UserError(f"--amp bf16: {device_name(device)} has no bfloat16; use --amp auto")
        elif amp == "tf32" and not has_tf32(device):
            raise UserError(f"--amp tf32: {device_name(device)} has no TF32; use --amp auto")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
            torch.use_deterministic_algorithms(True)
        self.amp, self.device = amp, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)
        if device.type == "cuda":  # after the newer fp32_precision these could not be read
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = amp != "off"
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cpu" and amp == "off" and onednn_keeps_float32():
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.amp in ("bf16", "fp16"))


def device_name(device):
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple " + platform.machine()
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


def peak_memory_bytes(device):
    """The most memory held so far: on the GPU, or by the process; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux: ru_maxrss may be that of the parent process
    if status.exists() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(match[1])
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


LONG = 1_000_000  # --compile auto compiles for a GPU from this many training images on, over all epochs


def compiled_forward(model, args, *, device, num_images):
    """What to call in training: the model, compiled as --compile says and shared by ranks, on the same weights.

    auto compiles on CUDA alone, with CUDA graphs, and only for long runs (num_images is per epoch): compiling takes a
    minute or more. On two Zen 5 cores it took four minutes for a ResNet18, whose steps then took an eighth longer. A
    batch of another size than --batch-size, the last of an epoch, goes through the model itself. If nothing can be
    compiled, one line says so.
    """
    model = shared_forward(model, args, device)
    long_run = device.type == "cuda" and args.epochs * num_images >= LONG
    if args.compile == "off" or (args.compile == "auto" and not long_run):
        return model
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"warning: --compile {args.compile}: {reason}; training without it", file=sys.stderr)
        return model
    if rank_and_ranks()[1] > 1:  # without CUDA graphs, since gradients are averaged in the backward pass
        return torch.compile(model)
    compiled = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)

    def forward(images, *others):
        return (compiled if len(images) == args.batch_size else model)(images, *others)

    return forward


@contextlib.contextmanager
def memory_watched(run):
    """A context in which running out of memory is a UserError, and so are a few other failures (see explained)."""
    try:
        yield
    except Exception as error:
        from training.memory import explained  # only if it is needed

        if said := explained(error, run):
            raise said from error
        raise
