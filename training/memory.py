"""What to say when a batch does not fit into memory."""

import contextlib
import traceback

import torch

from errors import UserError


def is_memory_error(error):
    """Whether an exception says that memory is used up: a GPU's, or the host's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def memory_watched(run):
    """A context in which used up memory is a UserError (see memory_error)."""
    try:
        yield
    except Exception as error:
        if is_memory_error(error):
            raise memory_error(error, run) from error
        raise


def memory_error(error, run):
    """A UserError with the batch size, what it took, and the largest batch that should fit (on a GPU)."""
    took, fits = "", ""
    traceback.clear_frames(error.__traceback__)  # they hold the batch's activations
    if run.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(run.device)
        took = f" into the {whole / 2**30:.1f} GiB of {torch.cuda.get_device_name(run.device)}"
        took += f": it took {torch.cuda.max_memory_allocated(run.device) / 2**30:.1f} GiB and wanted more"
        with contextlib.suppress(torch.OutOfMemoryError):
            if size := largest_batch(run):
                fits = f"; {size} should fit"
    kept = f"; {run.folder}/last.pt is from before" if (run.folder / "last.pt").exists() else ""
    return UserError(f"--batch-size {run.args.batch_size} does not fit{took}{fits}{kept}")


def largest_batch(run):
    """The largest power of two that should fit, from what a forward and backward pass on eight pictures takes; 0 where
    the weights alone take all there is."""
    device, size = run.device, run.args.image_size
    run.optimizer.zero_grad()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with run.precision.autocast():
        run.model(torch.zeros(8, 3, size, size, device=device)).sum().backward()
    a_picture = (torch.cuda.max_memory_allocated(device) - held) / 8
    run.optimizer.zero_grad()
    torch.cuda.empty_cache()
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    room = torch.cuda.mem_get_info(device)[0] - 4 * weights  # gradients, and what the optimiser may not have yet
    most = max(0, int(0.9 * room / a_picture))
    return 2 ** (most.bit_length() - 1) if most else 0
