"""A table of a model's layers: output shapes, parameters and multiply-adds."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def summarize(model, input_shape):
    """The table as text. input_shape is (C, H, W) of one image; the model runs once on zeros.

    There is a row for each module without children, for each parameter of a module with children (a positional
    embedding), and for each module with children that multiplies matrices itself (attention). Multiply-adds are those
    of the matrix products and convolutions in a forward pass of one image.
    """
    shapes = {}

    def record(name, module, inputs, output):
        shapes[name] = tuple((output[0] if isinstance(output, tuple) else output).shape)

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in model.named_modules()]
    training, fast_path = model.training, torch.backends.mha.get_fastpath_enabled()
    try:
        # attention written out, since the products of fused kernels are not counted on every device
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()

    # a module's own multiply-adds: those counted while it ran, minus those of its descendants; the deepest come first
    costs = {}
    for name in sorted(shapes, key=lambda name: name.count(".") + bool(name), reverse=True):
        counted = counter.get_flop_counts().get(".".join(filter(None, (type(model).__name__, name))), {})
        below = sum(cost for other, cost in costs.items() if not name or other.startswith(f"{name}."))
        costs[name] = sum(counted.values()) // 2 - below

    rows = []
    for name, module in model.named_modules():
        parameters, leaf = dict(module.named_parameters(recurse=False)), not any(module.children())
        if not leaf:
            for own, p in parameters.items():
                rows.append((f"{name}.{own}".lstrip("."), "parameter", tuple(p.shape), p.numel(), 0))
        if leaf or (name and costs.get(name)):
            count = sum(p.numel() for p in parameters.values()) if leaf else 0
            rows.append((name, type(module).__name__, shapes.get(name, ""), count, costs.get(name, 0)))
    total = sum(row[3] for row in rows)
    rows.append(("total", type(model).__name__, shapes[""], total, sum(costs.values())))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'layer':{width}}  {'kind':18}  {'output shape':18}  {'parameters':>12}  {'multiply-adds':>14}"]
    lines += [
        f"{name:{width}}  {kind:18}  {shape!s:18}  {count:12,}  {cost:14,}" for name, kind, shape, count, cost in rows
    ]
    return "\n".join(lines)
