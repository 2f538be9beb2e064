"""A table of a model's layers: output shapes, parameters and multiply-adds; and the memory that it takes."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def output_numbers(model, images):
    """How many numbers the modules of a model put out for a batch, call by call, without CONTAINERS and the model.

    This is what the tool torchsummary counts; a module that calls others counts too.
    """
    counted = []

    def count(module, inputs, output):
        if module is not model and not isinstance(module, CONTAINERS):
            counted.append((output[0] if isinstance(output, tuple) else output).numel())

    with torch.no_grad(), register_module_forward_hook(count):
        model(images)
    return sum(counted)


def saved_bytes(model, images):
    """The bytes that a training step keeps between its forward and backward pass, without the model's own weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).sum()  # noqa: F841, it holds what was saved
    return sum(tensor.untyped_storage().nbytes() for address, tensor in storages.items() if address not in own)


def describe_memory(model, input_shape, batch_size):
    """What a model takes in float32, as text: for one image by torchsummary's rule, and in a training step.

    By that rule the input, every output (twice, since it also has a gradient) and the parameters count. A training step
    takes the parameters, their gradients, the two moments of Adam, and for each image what the backward pass reads.
    """
    trial = copy.deepcopy(model).train()  # its statistics may change
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    two, four = (torch.zeros(n, *input_shape, device=next(model.parameters()).device) for n in (2, 4))
    per_image = (saved_bytes(trial, four) - saved_bytes(trial, two)) / 2 / 2**20
    numbers = [two[0].numel(), 2 * output_numbers(trial.eval(), two[:1]), total]
    sizes = [4 * number / 2**20 for number in numbers]
    fixed = sizes[2] + 3 * 4 * trained / 2**20
    return (
        f"parameters   {trained:,} trained, {total - trained:,} fixed\n"
        "one image    {:.2f} MiB input, {:.2f} forward and backward, {:.2f} parameters, {:.2f} in all\n"
        "training     at least {:,.0f} MiB for a batch of {} in float32: {:.2f} per image, {:.2f} for weights and AdamW"
    ).format(*sizes, sum(sizes), fixed + batch_size * per_image, batch_size, per_image, fixed)


def summarize(model, input_shape, *, batch_size=None):
    """The table as text, with describe_memory's lines if batch_size is given. input_shape is (C, H, W) of one image.

    There is a row for each module without children, for each parameter of a module with children (a positional
    embedding), and for each module with children that multiplies matrices itself (attention). Multiply-adds are those
    of the matrix products and convolutions in a forward pass of one image.
    """
    shapes, names = {}, {module: name for name, module in model.named_modules()}

    def record(module, inputs, output):
        shapes[names[module]] = tuple((output[0] if isinstance(output, tuple) else output).shape)

    training, fast_path = model.training, torch.backends.mha.get_fastpath_enabled()
    try:
        # attention written out, since the products of fused kernels are not counted on every device
        torch.backends.mha.set_fastpath_enabled(False)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), register_module_forward_hook(record), counter:
            model.eval()(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(fast_path)

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
    for name, kind, shape, count, cost in rows:
        lines.append(f"{name:{width}}  {kind:18}  {shape!s:18}  {count:12,}  {cost:14,}")
    if batch_size:
        lines.append(describe_memory(model, input_shape, batch_size))
    return "\n".join(lines)
