"""The ways to join the attention of a model's layers into one matrix, and from there to a map.

Each takes recorded weights, a list of (B, heads, N, N), first layer first, and gives (B, N, N): row i says how much
token i takes from each token of the input. In all of them later layers stand on the left.
"""

import torch

from errors import UserError
from maps.recorder import AttentionRecorder


def fuse_heads(attention, head_fusion="mean"):
    """One (B, N, N) of a layer's (B, heads, N, N), by the "mean", "max" or "min" over the heads."""
    return {"mean": attention.mean, "max": attention.amax, "min": attention.amin}[head_fusion](dim=1)


def discard_lowest(matrix, discard_ratio, *, class_token=True):
    """Set the lowest `discard_ratio` of each row of (B, N, N) to zero, never what goes to the class token."""
    first = int(class_token)
    count = int(discard_ratio * (matrix.shape[-1] - first))
    lowest = matrix[..., first:].topk(count, dim=-1, largest=False).indices + first
    return matrix.scatter(-1, lowest, 0.0)


def propagate(matrices):
    """The product of each layer's (B, N, N) with the identity added and its rows made to sum to 1, later ones left."""
    identity = torch.eye(matrices[0].shape[-1], dtype=matrices[0].dtype, device=matrices[0].device)
    result = identity.expand_as(matrices[0])
    for matrix in matrices:
        matrix = 0.5 * matrix + 0.5 * identity
        result = matrix / matrix.sum(dim=-1, keepdim=True) @ result
    return result


def raw(attentions, head_fusion="mean"):
    """The last layer's attention alone."""
    return fuse_heads(attentions[-1], head_fusion)


def rollout(attentions, head_fusion="mean", discard_ratio=0.0, *, class_token=True):
    """Attention rollout (Abnar & Zuidema 2020, eq. 1): the product of ½A + ½I over the layers, rows renormalised.

    discard_ratio leaves the lowest share of each row out, never the class token; the paper discards nothing.
    """
    fused = (fuse_heads(attention, head_fusion) for attention in attentions)
    return propagate([discard_lowest(matrix, discard_ratio, class_token=class_token) for matrix in fused])


def report(attentions, head_fusion="mean"):
    """The ViT report's own formula, A <- Aᵀ · Aᵢ, to be compared: no residual, rows not renormalised, A turned over
    at every layer.
    """
    result = fuse_heads(attentions[0], head_fusion)
    for attention in attentions[1:]:
        result = result.mT @ fuse_heads(attention, head_fusion)
    return result


def gradient_rollout(attentions, gradients, head_fusion="mean", discard_ratio=0.0, *, class_token=True):
    """Rollout of relu(A ⊙ ∇A), the gradient being that of one class's logit: rollout that asks about a class."""
    weighted = [(a * g).clamp(min=0) for a, g in zip(attentions, gradients, strict=True)]
    return rollout(weighted, head_fusion, discard_ratio, class_token=class_token)


def relevance(attentions, gradients):
    """Relevance (Chefer, Gur & Wolf, ICCV 2021, eq. 5-6): R <- R + Ā R with Ā the mean over heads of (∇A ⊙ A)⁺.

    It differs from gradient_rollout in what a layer weighs: there every row is made to sum to 1, here a layer whose
    gradients are small changes R little. Negative values are cut before the mean over heads.
    """
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    result = identity.expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        result = result + (attention * gradient).clamp(min=0).mean(dim=1) @ result
    return result


METHODS = ("raw", "rollout", "report", "gradient_rollout", "relevance")
WITH_GRADIENTS = ("gradient_rollout", "relevance")


def join_layers(method, attentions, gradients, *, head_fusion="mean", discard_ratio=0.0, class_token=True):
    """(B, N, N) by the method of that name (see METHODS), with those of the options that it knows."""
    fusion = {"head_fusion": head_fusion}
    rolling = fusion | {"discard_ratio": discard_ratio, "class_token": class_token}
    return {
        "raw": lambda: raw(attentions, **fusion),
        "rollout": lambda: rollout(attentions, **rolling),
        "report": lambda: report(attentions, **fusion),
        "gradient_rollout": lambda: gradient_rollout(attentions, gradients, **rolling),
        "relevance": lambda: relevance(attentions, gradients),
    }[method]()


def tokens_to_map(matrix, grid, pooling=None):
    """Maps (B, rows, columns) of matrices (B, N, N): the class token's row without its own column.

    For models without a class token pooling (B, N), the weights by which the tokens are pooled, is the row that the
    product still lacks: it multiplies the matrix from the left. Raises UserError where N does not fit the grid.
    """
    rows, columns = grid
    row = matrix[:, 0, 1:] if pooling is None else (pooling[:, None] @ matrix)[:, 0]
    if row.shape[1] != rows * columns:
        raise UserError(f"{row.shape[1]} tokens do not make a grid of {rows} x {columns} patches")
    return row.unflatten(1, (rows, columns))


def model_maps(model, matrix, pooling=None):
    """Maps of a model's matrices (B, N, N): (B, rows, columns), or where the model pads its images (B, H, W), a value
    a pixel, without what lies in the padding.
    """
    maps = tokens_to_map(matrix, model.grid, pooling)
    _, right, _, bottom = getattr(model, "padding", (0, 0, 0, 0))
    if not right and not bottom:
        return maps
    pixels = maps.repeat_interleave(model.patch_size, 1).repeat_interleave(model.patch_size, 2)
    return pixels[:, : pixels.shape[1] - bottom, : pixels.shape[2] - right]


def attention_maps(model, images, methods, *, targets=None, head_fusion="mean", discard_ratio=0.0):
    """({method: maps (B, h, w)}, logits (B, classes)) of images (B, C, H, W), in the model's present mode.

    targets (B,) are the classes that methods with gradients explain, the predicted ones where none are given. One
    forward pass serves all methods. Raises UserError for a model without attention, or with layers of different sizes.
    """
    wants_gradients = any(method in WITH_GRADIENTS for method in methods)
    with torch.set_grad_enabled(wants_gradients), AttentionRecorder(model, gradients=wants_gradients) as recorder:
        logits = model(images)
    tokens = list(dict.fromkeys(weights.shape[-1] for weights in recorder.weights))
    if len(tokens) > 1:
        sizes = " and ".join(map(str, tokens))
        raise UserError(f"{type(model).__name__}'s layers attend over {sizes} tokens, which give no one map")
    gradients = None
    if wants_gradients:
        targets = logits.argmax(1) if targets is None else targets
        gradients = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), recorder.weights)
    maps = {}
    for method in methods:
        matrix = join_layers(
            method,
            recorder.attentions,
            gradients,
            head_fusion=head_fusion,
            discard_ratio=discard_ratio,
            class_token=recorder.pooling is None,
        )
        maps[method] = model_maps(model, matrix, recorder.pooling)
    return maps, logits.detach()


def maps_as_reported(model, images, *, join=report):
    """Maps (B, h, w) the report's way: in training mode, with a forward pass of its own for every layer, so
    that no two layers belong to the same dropout masks. join makes one matrix of the layers. The model stays as it is.
    """
    training = model.training
    buffers = [buffer.clone() for buffer in model.buffers()]  # BatchNorm's statistics and the like
    layers = []
    try:
        model.train()
        with torch.no_grad(), AttentionRecorder(model) as recorder:
            model(images)
            for layer in range(len(recorder.weights)):
                model(images)
                layers.append(recorder.attentions[layer])
    finally:
        model.train(training)
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
    return model_maps(model, join(layers), recorder.pooling)
