"""The hand-written loops: one epoch of training, and one pass over images that evaluates a model."""

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from seeding import seed_for
from training.ranks import (
    own_rows,
    rank_words,
    rows_of_all_ranks,
    same_buffers,
    shared_steps,
    synchronise_last,
)
from training.values import as_epoch_and_count


def new_sums(device):
    """What an epoch adds up, from its first step.

    On the device: the loss summed over images, that of the last step, the number of correct images, and the first step
    whose loss is not finite, with its learning rate. On the host: steps, images, seconds, and the last learning rate.
    """
    return {
        "loss": torch.zeros((), device=device),
        "last_loss": torch.zeros((), device=device),
        "correct": torch.zeros((), dtype=torch.int64, device=device),
        "bad_step": torch.full((), -1, dtype=torch.int64, device=device),
        "bad_lr": torch.zeros((), device=device),
        "step": 0,
        "images": 0,
        "seconds": 0.0,
        "lr": 0.0,
    }


def loss_and_accuracy(sums):
    """The means per image, as floats, the accuracy None if the loss has no such thing: waits for the device."""
    loss, accuracy = (sums[name].item() / (sums["images"] or float("nan")) for name in ("loss", "correct"))
    return loss, None if accuracy < 0 else accuracy


def train_one_epoch(
    *,
    model,
    forward=None,
    batches,
    loss_function,
    optimizer,
    schedule,
    precision,
    seed,
    epoch,
    sums,
    accumulate=("1",),
    clip_grad=None,
    clip_value=None,
    average=None,
    after_step,
):
    """Train from sums["step"] to the end of an epoch (counted from 0), adding to sums (see new_sums).

    forward stands in place of the model itself, if it is compiled or shared (see compiled_forward). loss_function is
    called as classification_loss is. A step is one update of the weights, by the gradient of so many batches (see
    batches_per_step). clip_grad limits the gradient's norm, clip_value each of its elements. average, a WeightAverage,
    follows each update. after_step(sums) is called after each step, and ends the epoch early by returning True.
    Nothing here waits for the device, except an average, --on-nan skip and, in float16, Muon.
    """
    model.train()
    forward = forward or model
    scaler = precision.scaler
    for parts in shared_steps(batches, epoch, sums["step"], accumulate=batches_per_step(accumulate, epoch)):
        optimizer.zero_grad()
        step_loss = torch.zeros_like(sums["loss"])
        for images, labels, weight in synchronise_last(parts, forward):  # (B, 3, H, W); (B,), or (B, classes) if mixed
            torch.manual_seed(seed_for("dropout", seed, epoch, sums["step"], *rank_words()))
            with precision.autocast():
                loss, correct = loss_function(forward, images, labels)  # () and (), as classification_loss
            scaler.scale(loss * weight).backward()
            step_loss += loss.detach() * weight
            if weight:  # without: an image in place of none, see shared_steps
                add_batch(sums, loss.detach(), correct, count=len(labels), lr=schedule.get_last_lr()[0])
            sums["step"] += 1
        sums["last_loss"] = step_loss
        if clip_grad or clip_value:
            scaler.unscale_(optimizer)
        if clip_grad:
            clip_grad_norm_(model.parameters(), clip_grad)
        if clip_value:
            clip_grad_value_(model.parameters(), clip_value)
        scaler.step(optimizer)
        skipped = scaler.update()  # None; with --on-nan skip, whether the update was left out
        if average and not skipped:
            average.after_step(model)
        for _ in parts:  # a schedule counts batches
            schedule.step()
        if after_step(sums):
            break


def classification_loss(forward, images, labels, *, criterion):
    """(the mean loss of a batch (), the number of correct images (); None from a loss that has no such thing).

    criterion(logits, labels) gives that mean for labels (B,), or (B, classes) if images are mixed.
    """
    logits = forward(images)  # (B, classes)
    hard_labels = labels if labels.ndim == 1 else labels.argmax(1)  # (B,): of mixed images, the larger share
    return criterion(logits, labels), (logits.argmax(1) == hard_labels).sum()


def add_batch(sums, loss, correct, *, count, lr):
    """Add one batch of `count` images to sums: its mean loss (), its correct images () and its learning rate."""
    sums["loss"] += loss * count
    sums["correct"] += -count if correct is None else correct  # below zero: the loss has no such thing
    sums["images"] += count
    first_bad = (sums["bad_step"] < 0) & ~loss.isfinite()
    sums["bad_step"] = torch.where(first_bad, sums["step"], sums["bad_step"])
    sums["bad_lr"] = torch.where(first_bad, lr, sums["bad_lr"])
    sums["lr"] = lr


def batches_per_step(accumulate, epoch):
    """How many batches make a step in an epoch, counted from 0, by --accumulate, say ["0:8", "10:4"]."""
    return [count for start, count in [(0, 1), *sorted(map(as_epoch_and_count, accumulate))] if start <= epoch][-1]


@torch.inference_mode()
def validate(*, model, batches, precision):
    """(loss, accuracy, logits): mean cross entropy and accuracy per image, logits (N, classes) float32 on the device.

    The model is in evaluation mode meanwhile, and afterwards in the mode that it was in. Several ranks take a part of
    each batch, and all have the result.
    """
    training = model.training
    same_buffers(model)
    model.eval()
    sums = new_sums(batches.device)
    outputs = []
    for images, labels in batches.batches():  # (B, 3, H, W) and (B,)
        rows = own_rows(len(labels))
        with precision.autocast():
            logits = model(images[rows])  # (B, classes)
        outputs.append(rows_of_all_ranks(logits.float(), rows, len(labels)))
        sums["loss"] += cross_entropy(outputs[-1], labels, reduction="sum")
        sums["correct"] += (outputs[-1].argmax(1) == labels).sum()
        sums["images"] += len(labels)
    model.train(training)
    return *loss_and_accuracy(sums), torch.cat(outputs)  # (N, classes)
