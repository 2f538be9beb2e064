"""The optimisers, which parameters their weight decay leaves alone, and the average of the weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from errors import UserError


def parameter_groups(model, weight_decay, *, decay_all, leave_out=()):
    """Two groups for an optimiser: with weight decay, and without; leave_out are parameters for another optimiser, and
    those that are not trained have no place in either.

    Unless decay_all, vectors (biases, norms) and what model.no_weight_decay names are left out, as is usual since
    Vaswani et al.'s code; the report's own run decays everything.
    """
    left_out = {id(parameter) for parameter in leave_out}
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out or not parameter.requires_grad:
            continue
        skip = not decay_all and (parameter.ndim < 2 or name in model.no_weight_decay)
        (free if skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the weights of a model's blocks, AdamW on all the rest, as one optimiser.

    Blocks are what lies in `blocks`, or in `layer1` to `layer4` of a ResNet; a convolution counts as the matrix that
    takes a patch to the channels. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that one
    learning rate serves both. Raises UserError where nothing in a block is trained.
    """

    def __init__(self, model, *, lr, weight_decay, decay_all):
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        inner = [p for name, p in trained if p.ndim in (2, 4) and name.startswith(("blocks.", "layer"))]
        if not inner:
            raise UserError("--opt muon: no weight matrix of a block is trained here; --opt adamw goes")
        self.matrices = {p: nn.Parameter(p.detach().flatten(1)) for p in inner}  # the same memory
        muon = torch.optim.Muon(
            self.matrices.values(), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        groups = parameter_groups(model, weight_decay, decay_all=decay_all, leave_out=inner)
        self.parts = {"muon": muon, "adamw": torch.optim.AdamW(groups, lr=lr, fused=True)}
        super().__init__(self.outer_groups(), {})

    def outer_groups(self):
        """Those that a schedule and a scaler of gradients see: the parts' own, Muon's with the weights as they are."""
        muon, adamw = (part.param_groups for part in self.parts.values())
        return [muon[0] | {"params": list(self.matrices)}, *adamw]

    def pass_on(self):
        """Let Muon know what a schedule has written to the outer groups; AdamW's are its own."""
        inner = self.parts["muon"].param_groups[0]
        inner.update(self.param_groups[0] | {"params": inner["params"]})

    def step(self):
        self.pass_on()
        for weight, matrix in self.matrices.items():
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts.values():
            part.step()

    def state_dict(self):
        self.pass_on()
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.param_groups = self.outer_groups()


def make_optimizer(args, model):
    """The optimiser that the flags ask for (--opt, --lr, --weight-decay, --decay-all, --momentum, --opt-betas,
    --opt-eps), of the parameters that are to be trained.

    adam adds weight decay to the gradient, adamw takes it off the weights (Loshchilov & Hutter 2019). All but muon are
    torch's fused forms: one pass over the weights a step.
    """
    if args.opt == "muon":
        return MuonWithAdamW(model, lr=args.lr, weight_decay=args.weight_decay, decay_all=args.decay_all)
    groups = parameter_groups(model, args.weight_decay, decay_all=args.decay_all)
    if args.opt == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)
        # a first step that a scaler of gradients skips would leave these empty, that is with anything in them
        for group in groups if args.momentum else ():
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.opt]
    return kind(groups, lr=args.lr, betas=tuple(args.opt_betas), eps=args.opt_eps, fused=True)


def make_average(model, decay):
    """An exponential moving average of a model's weights and buffers, which .update_parameters(model) moves on.

    Buffers are averaged too, so that no BatchNorm statistics are of other weights. None where decay is 0.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).eval() if decay else None
