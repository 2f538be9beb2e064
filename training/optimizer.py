"""The optimiser, and which parameters its weight decay leaves alone."""

import torch


def parameter_groups(model, weight_decay, *, decay_all):
    """Two groups for an optimiser: with weight decay, and without.

    Unless decay_all, vectors (biases, norms) and what model.no_weight_decay names are left out, as is usual since
    Vaswani et al.'s code; the report's own run decays everything.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        skip = not decay_all and (parameter.ndim < 2 or name in model.no_weight_decay)
        (free if skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_adamw(model, *, lr, weight_decay, decay_all):
    """AdamW (Loshchilov & Hutter 2019) with torch's betas, in its fused form: one pass over the weights a step."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay, decay_all=decay_all), lr=lr, fused=True)
