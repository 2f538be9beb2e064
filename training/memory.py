"""What to say if training fails: what a batch took that does not fit into the memory, and which size should fit."""

import contextlib
import re
import traceback

import torch

from errors import UserError, is_memory_error
from training.ranks import rank_and_ranks


def explained(error, run):
    """The UserError for an exception that training raised; None if it is a bug, or a UserError already."""
    if is_memory_error(error):
        return memory_error(error, run)
    if "more than 1 value per channel" in str(error):
        said = "BatchNorm cannot learn from a last batch of one image; use --drop-last or another --batch-size"
        return UserError(f"--batch-size {run.args.batch_size}: {said}")
    if "DataLoader worker" in str(error):  # raised wherever the main thread is, by a signal handler of torch's
        return UserError("one of the --workers that decode images was killed; if memory was used up, fewer take less")
    if "does not have a deterministic implementation" in str(error):
        return UserError(f"--deterministic: {str(error).splitlines()[0]}")
    if rank_and_ranks()[1] > 1 and re.search("gloo|nccl", f"{type(error)} {error}", re.IGNORECASE):
        return UserError(f"another process of this run has ended; {run.folder}/last.pt holds what was saved")


def memory_error(error, run):
    """A UserError with the batch size, what it took, and the largest batch that should fit (on a GPU)."""
    took, fits = "", ""
    traceback.clear_frames(error.__traceback__)  # they hold the batch's activations
    if run.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(run.device)
        took = f" into the {whole / 2**30:.1f} GiB of {torch.cuda.get_device_name(run.device)}"
        took += f": it took {torch.cuda.max_memory_allocated(run.device) / 2**30:.1f} GiB and needed more"
        with contextlib.suppress(torch.OutOfMemoryError):
            if not hasattr(run.model, "generate") and (size := largest_batch(run)):
                fits = f"; {size} should fit"
    kept = f"; {run.folder}/last.pt holds what was done" if (run.folder / "last.pt").exists() else ""
    patches = "patch_size" in run.model_args and run.model_args.get("attention") != "none"
    fewer = "; a larger --patch-size takes less, too" if patches else ""
    return UserError(f"--batch-size {run.args.batch_size} does not fit{took}{fits}{fewer}{kept}")


def largest_batch(run):
    """The largest power of two that should fit, estimated from a forward and backward pass on eight images; 0 if the
    weights alone fill the memory."""
    device, shape = run.device, run.dataset.test.images.shape[1:]  # (C, H, W)
    run.optimizer.zero_grad()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with run.precision.autocast():
        run.model(torch.zeros(8, *shape, device=device)).sum().backward()
    per_image = (torch.cuda.max_memory_allocated(device) - held) / 8
    run.optimizer.zero_grad()
    torch.cuda.empty_cache()
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    room = torch.cuda.mem_get_info(device)[0] - 4 * weights  # gradients, and state that the optimiser may not have yet
    most = max(0, int(0.9 * room / per_image))
    return 2 ** (most.bit_length() - 1) if most else 0
