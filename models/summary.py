"""A table of a model's layers: what comes out of each, and how many parameters it has."""

import torch


def summarize(model, input_shape):
    """The table as text. input_shape is that of one picture, (C, H, W); the model is run once on zeros.

    A module has a row where it holds parameters itself: so does one beside its children, such as a position embedding.
    """
    shapes = {}

    def record(name):
        def hook(module, inputs, output):
            shapes[name] = tuple(output.shape)

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()

    rows = []
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if not any(module.children()) and own in ("weight", "bias"):
                continue
            rows.append((f"{name}.{own}".lstrip("."), "parameter", tuple(parameter.shape), parameter.numel()))
        if not any(module.children()):
            count = sum(p.numel() for own, p in module.named_parameters(recurse=False) if own in ("weight", "bias"))
            rows.append((name, type(module).__name__, shapes.get(name, ""), count))
    total = sum(row[3] for row in rows)
    rows.append(("total", type(model).__name__, shapes[""], total))
    width = max(len(row[0]) for row in rows)
    lines = [f"{'layer':{width}}  {'kind':18}  {'output shape':18}  {'parameters':>12}"]
    lines += [f"{name:{width}}  {kind:18}  {shape!s:18}  {count:12,}" for name, kind, shape, count in rows]
    return "\n".join(lines)
