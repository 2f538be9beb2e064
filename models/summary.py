"""A table of a model's layers: what comes out of each, how many parameters it has, and what it costs."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def summarize(model, input_shape):
    """The table as text. input_shape is that of one image, (C, H, W); the model is run once on zeros.

    A module has a row where it holds parameters itself, or multiplies matrices itself: so does one beside its children,
    such as a position embedding, or the two products of an attention. Multiply-adds are those of a forward pass of one
    image, in matrix products and convolutions.
    """
    shapes = {}

    def record(name):
        def hook(module, inputs, output):
            shapes[name] = tuple((output[0] if isinstance(output, tuple) else output).shape)

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    training, fast_path = model.training, torch.backends.mha.get_fastpath_enabled()
    try:
        # the mathematical form of attention, since a fused one's products are not counted on every device
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for hook in hooks:
            hook.remove()

    # what a module multiplies itself is what was counted while it ran, less what was counted in those below it
    costs = {}
    for name in sorted(shapes, key=lambda name: name.count(".") + bool(name), reverse=True):
        counted = counter.get_flop_counts().get(".".join(filter(None, (type(model).__name__, name))), {})
        below = sum(cost for other, cost in costs.items() if not name or other.startswith(f"{name}."))
        costs[name] = sum(counted.values()) // 2 - below

    rows = []
    for name, module in model.named_modules():
        leaf = not any(module.children())
        for own, parameter in module.named_parameters(recurse=False):
            if not leaf or own not in ("weight", "bias"):
                rows.append((f"{name}.{own}".lstrip("."), "parameter", tuple(parameter.shape), parameter.numel(), 0))
        if leaf or (name and costs.get(name)):
            count = sum(
                p.numel() for own, p in module.named_parameters(recurse=False) if leaf and own in ("weight", "bias")
            )
            rows.append((name, type(module).__name__, shapes.get(name, ""), count, costs.get(name, 0)))
    total = sum(row[3] for row in rows)
    rows.append(("total", type(model).__name__, shapes[""], total, sum(costs.values())))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'layer':{width}}  {'kind':18}  {'output shape':18}  {'parameters':>12}  {'multiply-adds':>14}"]
    lines += [
        f"{name:{width}}  {kind:18}  {shape!s:18}  {count:12,}  {cost:14,}" for name, kind, shape, count, cost in rows
    ]
    return "\n".join(lines)
