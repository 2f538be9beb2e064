"""torch.compile: when it pays, and what happens where it cannot be had."""

import sys

import torch

LONG = 1_000_000  # pictures to train on in all from which --compile auto compiles for a GPU


def compiled_forward(model, args, *, device, num_pictures):
    """What to call in training: model, or on the same weights what torch.compile makes of it, as --compile says.

    auto compiles on CUDA alone, with CUDA graphs, and only for long runs of num_pictures an epoch: compiling takes a
    minute or more. On two Zen 5 cores it took four minutes for a ResNet18, whose steps then took an eighth longer.
    Batches of another size than --batch-size, the last of an epoch, go through the model as it is. Where nothing can
    be compiled that is said in one line.
    """
    long_run = device.type == "cuda" and args.epochs * num_pictures >= LONG
    if args.compile == "off" or (args.compile == "auto" and not long_run):
        return model
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"warning: --compile {args.compile}: {reason}; going on without it", file=sys.stderr)
        return model
    compiled = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)

    def forward(pictures):
        return (compiled if len(pictures) == args.batch_size else model)(pictures)

    return forward
