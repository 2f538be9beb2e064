"""Several processes (ranks) that train one model, started by torchrun: what each does, and what they agree on.

Every rank draws the order and the augmentation of whole batches and takes its part of them, so nothing but dropout
depends on their number. Gradients are averaged by DistributedDataParallel (DDP) or, with --fsdp, by FSDP2.
"""

import contextlib
import datetime
import itertools
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError


def rank_and_ranks():
    """(this process's number, the number of processes); (0, 1) without torchrun."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def join_ranks():
    """Join the processes that torchrun started, if it did. All but the first one are silent from here on.

    Messages that are on the CPU go by gloo, so that they do not wait for a GPU.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        both = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=datetime.timedelta(hours=1))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 until the process ends


def leave_ranks():
    if rank_and_ranks()[1] > 1:
        dist.barrier()
        dist.destroy_process_group()


def from_first_rank(function, *arguments, **options):
    """What function(*arguments, **options) returns on the first rank, or the UserError that it raises, on all of them.

    It must be picklable.
    """
    rank, ranks = rank_and_ranks()
    try:
        value = [function(*arguments, **options) if rank == 0 else None]
    except UserError as error:
        value = [error]
    if ranks > 1:
        dist.broadcast_object_list(value)
    if isinstance(value[0], UserError):
        raise value[0]
    return value[0]


def first_rank_first(function, *arguments):
    """function(*arguments) on each machine's first rank, then on the others, which find its downloads and caches."""
    waits = rank_and_ranks()[1] > 1 and os.environ["LOCAL_RANK"] != "0"
    if waits:
        dist.barrier()
    value = function(*arguments)
    if rank_and_ranks()[1] > 1 and not waits:
        dist.barrier()
    return value


def any_rank(*flags):
    """For each of the flags, whether it is true on any rank. Every rank must call this at the same place."""
    if rank_and_ranks()[1] > 1:
        flags = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


def warn_of(run, text):
    """Print a warning on stderr, each text once per run."""
    if text not in run.warnings and rank_and_ranks()[0] == 0:
        print(f"warning: {text}", file=sys.stderr)
    run.warnings.add(text)


def rank_words():
    """What a rank's dropout is seeded by, beside the batch; nothing on the first rank."""
    rank, _ = rank_and_ranks()
    return (rank,) if rank else ()


def own_rows(count):
    """The slice of a batch of `count` images that this rank takes; with fewer images than ranks, some take the first
    one again, in place of none: every rank has to take part in every step."""
    rank, ranks = rank_and_ranks()
    each, more = divmod(count, ranks)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more)) if rank < count else slice(0, 1)


def shared_steps(batches, epoch, start_step, *, accumulate):
    """The steps of an epoch: lists of (images, labels, weight), this rank's parts of `accumulate` batches or the rest.

    The mean loss of each part, times its weight, added up over the list and averaged over the ranks, is the mean over
    the images of the step. The weight of an image in place of none is 0. Batches that are not `whole` are this rank's
    parts already, and as large as those of the others.
    """
    rank, ranks = rank_and_ranks() if batches.whole else (0, 1)
    left = batches.batches(epoch, start_step)
    while group := list(itertools.islice(left, accumulate)):
        total = sum(len(labels) for _, labels in group)
        parts = []
        for images, labels in group:
            rows = own_rows(len(labels)) if batches.whole else slice(0, len(labels))
            counted = rows.stop - rows.start if rank < len(labels) else 0
            parts.append((images[rows], labels[rows], counted * ranks / total))
        yield parts


def synchronise_last(parts, forward):
    """The parts of a step; gradients are averaged over the ranks in the backward pass of the last one alone."""
    for part in parts:
        last = part is parts[-1]
        if hasattr(forward, "set_requires_gradient_sync"):  # FSDP2
            forward.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or not hasattr(forward, "no_sync") else forward.no_sync():  # DDP
            yield part


def rows_of_all_ranks(values, rows, count):
    """values (B, ...), this rank's own_rows, as (count, ...), those of all ranks in order."""
    rank, ranks = rank_and_ranks()
    if ranks == 1:
        return values
    whole = values.new_zeros(count, *values.shape[1:])
    if rank < count:
        whole[rows] = values
    dist.all_reduce(whole)
    return whole


ADDED_BY_RANK = ("loss", "correct", "images")  # of new_sums; the rest is the same on all ranks


def sums_of_all_ranks(sums):
    """What an epoch has added up (see new_sums), over all ranks."""
    if rank_and_ranks()[1] == 1:
        return sums
    totals = {name: torch.as_tensor(sums[name]).clone() for name in ADDED_BY_RANK}
    for total in totals.values():
        dist.all_reduce(total)
    return sums | totals | {"images": totals["images"].item()}


def same_buffers(model):
    """Give a model's buffers, such as BatchNorm's statistics, the values of the first rank."""
    for buffer in model.buffers() if rank_and_ranks()[1] > 1 else ():
        dist.broadcast(buffer, 0)


def check_ranks(args, device):
    """Raises UserError for flags that exclude each other, or the number of ranks."""
    ranks = rank_and_ranks()[1]
    given = {"--fsdp": args.fsdp, "--sync-bn": args.sync_bn}
    for flag in (flag for flag in given if given[flag] and ranks == 1):
        raise UserError(f"{flag} needs several processes: torchrun --nproc-per-node 2 ...")
    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size}: {ranks} processes cannot share it equally")
    if args.sync_bn and device.type != "cuda":
        raise UserError(f"--sync-bn needs GPUs, and --device is {device.type}")
    if args.fsdp and args.opt == "muon":
        raise UserError("--fsdp and --opt muon exclude each other: Muon needs whole matrices")
    if args.fsdp and (args.model_ema_decay or args.swa_start):
        raise UserError("--fsdp excludes --model-ema-decay and --swa-start: an average would be whole on each rank")


def shared_forward(model, args, device):
    """The model as training calls it: on several ranks wrapped in DDP, or sharded block by block with --fsdp.

    --sync-bn makes BatchNorm see the whole batch, not each rank's part. Raises UserError (see check_ranks).
    """
    check_ranks(args, device)
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return model
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not args.fsdp:
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    from training.sharding import shard_model  # only if it is asked for

    return shard_model(model, device, ranks)
