"""The hand-written loops: one epoch of training, and one pass over images to judge a model."""

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from seeding import seed_for


def new_sums(device):
    """What an epoch adds up: on the device the loss over images, the correct ones, and the first step whose loss is
    not finite, with its learning rate; on the host the images, the seconds, and the last step's learning rate."""
    return {
        "loss": torch.zeros((), device=device),
        "correct": torch.zeros((), dtype=torch.int64, device=device),
        "bad_step": torch.full((), -1, dtype=torch.int64, device=device),
        "bad_lr": torch.zeros((), device=device),
        "images": 0,
        "seconds": 0.0,
        "lr": 0.0,
    }


def means(sums):
    """(loss, accuracy) per image, as floats: waits for the device."""
    return sums["loss"].item() / sums["images"], sums["correct"].item() / sums["images"]


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
    start_step=0,
    sums,
    clip_grad=None,
    average=None,
    after_step,
):
    """Train from start_step to the end of an epoch (counted from 0), adding to sums (see new_sums).

    forward(images) gives the logits where the model itself is not to be called (see training/compiling.py).
    loss_function(logits, labels) gives the mean over the batch. average is an AveragedModel of torch's, which follows
    each update of the weights. after_step(steps done in this epoch, sums) is called after each step, and ends the epoch
    early by returning True. Nothing here waits for the device, but an average and, in float16, Muon do. Returns the
    number of steps done in this epoch.
    """
    model.train()
    scaler = precision.scaler
    step = start_step
    for images, labels in batches.batches(epoch, start_step):
        torch.manual_seed(seed_for("dropout", seed, epoch, step))
        with precision.autocast():
            logits = (model if forward is None else forward)(images)
            loss = loss_function(logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clip_grad:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if average:
            average.update_parameters(model)

        loss = loss.detach()
        sums["loss"] += loss * len(labels)
        hard_labels = labels if labels.ndim == 1 else labels.argmax(1)  # of mixed images: the larger share
        sums["correct"] += (logits.argmax(1) == hard_labels).sum()
        sums["images"] += len(labels)
        first_bad = (sums["bad_step"] < 0) & ~loss.isfinite()
        sums["bad_step"] = torch.where(first_bad, step, sums["bad_step"])
        sums["lr"] = schedule.get_last_lr()[0]
        sums["bad_lr"] = torch.where(first_bad, sums["lr"], sums["bad_lr"])
        schedule.step()
        step += 1
        if after_step(step, sums):
            break
    return step


@torch.inference_mode()
def validate(*, model, batches, precision):
    """(loss, accuracy, logits): cross entropy and accuracy per image, logits (N, classes) float32 on the device.

    The model is in evaluation mode meanwhile, and afterwards in the mode that it was in.
    """
    training = model.training
    model.eval()
    sums = new_sums(batches.device)
    outputs = []
    for images, labels in batches.batches():
        with precision.autocast():
            logits = model(images)
        logits = logits.float()
        sums["loss"] += cross_entropy(logits, labels, reduction="sum")
        sums["correct"] += (logits.argmax(1) == labels).sum()
        sums["images"] += len(labels)
        outputs.append(logits)
    model.train(training)
    return *means(sums), torch.cat(outputs)
