"""Methods that join the attention of a model's layers into one matrix, and the maps of such matrices.

Each method takes the recorded weights, a list of (B, heads, N, N), first layer first, and returns (B, N, N): row i is
how much token i takes from each token of the input. Later layers multiply from the left.
"""

import copy

import torch

from errors import UserError
from maps.recorder import AttentionRecorder


def fuse_heads(attention, head_fusion="mean"):
    """A layer's (B, heads, N, N) to (B, N, N), by the "mean", "max" or "min" over its heads."""
    return {"mean": attention.mean, "max": attention.amax, "min": attention.amin}[head_fusion](dim=1)


def discard_lowest(matrix, discard_ratio, *, class_token=True):
    """Set the lowest `discard_ratio` of each row of (B, N, N) to zero, except for the class token's column."""
    first = int(class_token)  # the class token is column 0
    count = int(discard_ratio * (matrix.shape[-1] - first))
    lowest = matrix[..., first:].topk(count, dim=-1, largest=False).indices + first  # (B, N, count)
    return matrix.scatter(-1, lowest, 0.0)


def raw(attentions, head_fusion="mean"):
    """The last layer's attention alone."""
    return fuse_heads(attentions[-1], head_fusion)


def rollout(attentions, head_fusion="mean", discard_ratio=0.0, *, class_token=True):
    """Attention rollout (Abnar & Zuidema 2020, eq. 1): the product of ½A + ½I over layers, rows renormalised.

    discard_ratio sets this share of each row, the lowest values, to zero; the paper discards nothing.
    """
    result = identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for attention in attentions:
        matrix = discard_lowest(fuse_heads(attention, head_fusion), discard_ratio, class_token=class_token)
        matrix = 0.5 * matrix + 0.5 * identity  # the residual connection passes each token on
        result = matrix / matrix.sum(dim=-1, keepdim=True) @ result
    return result


def report(attentions, head_fusion="mean"):
    """The ViT report's own formula, A <- Aᵀ · Aᵢ, for comparison.

    It has no residual, does not renormalise rows, and transposes the product at every layer.
    """
    result = fuse_heads(attentions[0], head_fusion)
    for attention in attentions[1:]:
        result = result.mT @ fuse_heads(attention, head_fusion)
    return result


def report_column(attentions, head_fusion="mean"):
    """The transpose of report: its listing leaves open whether the class token's row or its column is the map."""
    return report(attentions, head_fusion).mT


def gradient_rollout(attentions, gradients, head_fusion="mean", discard_ratio=0.0, *, class_token=True):
    """Rollout of relu(A ⊙ ∇A), with the gradient of one class's logit: the map explains that class."""
    weighted = [(a * g).clamp(min=0) for a, g in zip(attentions, gradients, strict=True)]
    return rollout(weighted, head_fusion, discard_ratio, class_token=class_token)


def relevance(attentions, gradients):
    """Relevance (Chefer, Gur & Wolf, ICCV 2021, eq. 5-6): R <- R + Ā R, with Ā the mean over heads of (∇A ⊙ A)⁺.

    Unlike in gradient_rollout, a layer with small gradients changes R little: rows are not renormalised.
    """
    result = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for attention, gradient in zip(attentions, gradients, strict=True):
        result = result + (attention * gradient).clamp(min=0).mean(dim=1) @ result
    return result


METHODS = ("raw", "rollout", "report", "gradient_rollout", "relevance")
WITH_GRADIENTS = ("gradient_rollout", "relevance")


def join_layers(method, attentions, gradients, *, head_fusion="mean", discard_ratio=0.0, class_token=True):
    """(B, N, N) by the method of this name, of METHODS or report_column; options that it does not have are ignored."""
    if method in ("raw", "report", "report_column"):
        return {"raw": raw, "report": report, "report_column": report_column}[method](attentions, head_fusion)
    if method == "relevance":
        return relevance(attentions, gradients)
    if method == "gradient_rollout":
        return gradient_rollout(attentions, gradients, head_fusion, discard_ratio, class_token=class_token)
    return rollout(attentions, head_fusion, discard_ratio, class_token=class_token)


def tokens_to_map(matrix, grid, pooling=None):
    """Maps (B, rows, columns) of matrices (B, N, N): the class token's row without its own column.

    Without a class token, pass pooling (B, N), the weights that pool the tokens: it multiplies the matrix from the
    left, as one more layer with a single row. Raises UserError if N does not fit the grid.
    """
    rows, columns = grid
    row = matrix[:, 0, 1:] if pooling is None else (pooling[:, None] @ matrix)[:, 0]  # (B, rows * columns)
    if row.shape[1] != rows * columns:
        raise UserError(f"{row.shape[1]} tokens do not make a grid of {rows} x {columns} patches")
    return row.unflatten(1, (rows, columns))


def model_maps(model, matrix, pooling=None):
    """Maps of a model's matrices (B, N, N): (B, rows, columns), or (B, H, W) if the model pads its images."""
    return without_padding(model, tokens_to_map(matrix, model.grid, pooling))


def without_padding(model, maps):
    """Maps (B, rows, columns) as they are, or (B, H, W), one value per pixel, if the model pads its images."""
    _, right, _, bottom = getattr(model, "padding", (0, 0, 0, 0))
    if not right and not bottom:
        return maps
    pixels = maps.repeat_interleave(model.patch_size, 1).repeat_interleave(model.patch_size, 2)
    return pixels[:, : pixels.shape[1] - bottom, : pixels.shape[2] - right]


def maps_of_layers(model, recorder, index):
    """The maps of one image, of every layer and head by itself: (L, heads, h, w)."""
    pooling, maps = recorder.pooling, []
    for weights in recorder.attentions:
        heads = weights[index]  # (heads, N, N), as a batch of matrices
        maps.append(model_maps(model, heads, None if pooling is None else pooling[index].expand(len(heads), -1)))
    return torch.stack(maps).cpu().numpy()


def attention_maps(model, images, methods, **options):
    """({method: maps (B, h, w)}, logits (B, classes)) of images (B, C, H, W); options as in attention_matrices."""
    matrices, logits, recorder = attention_matrices(model, images, methods, **options)
    return {method: model_maps(model, matrices[method], recorder.pooling) for method in methods}, logits


def attention_matrices(model, images, methods, *, targets=None, head_fusion="mean", discard_ratio=0.0):
    """({method: matrices (B, N, N)}, logits (B, classes), the recorder) of images (B, C, H, W), by one forward pass.

    The model stays in its mode. targets (B,) are the classes that methods with gradients explain (default: the
    predicted ones). Raises UserError if the model has no attention or its layers differ in the number of tokens.
    """
    needs_gradients = any(method in WITH_GRADIENTS for method in methods)
    with torch.set_grad_enabled(needs_gradients), AttentionRecorder(model, gradients=needs_gradients) as recorder:
        logits = model(images)
    name = getattr(model, "name", type(model).__name__)
    if any(len(weights) != len(images) for weights in recorder.weights):
        reason = "attends within windows of the image (as Swin does), which give no map of the whole"
        raise UserError(f"{name} {reason}: use attribute.py, which explains any model")
    tokens = list(dict.fromkeys(weights.shape[-1] for weights in recorder.weights))
    if len(tokens) > 1:
        sizes = " and ".join(map(str, tokens))
        raise UserError(f"{name}'s layers attend over {sizes} tokens, which give no one map")
    gradients = None
    if needs_gradients:
        targets = logits.argmax(1) if targets is None else targets
        # the logits of different images do not interact, so the gradient of their sum is that of each
        gradients = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), recorder.weights)
    options = {"head_fusion": head_fusion, "discard_ratio": discard_ratio, "class_token": recorder.pooling is None}
    attentions = recorder.attentions
    matrices = {method: join_layers(method, attentions, gradients, **options) for method in methods}
    return matrices, logits.detach(), recorder


def maps_in_training_mode(model, images, *, join=report):
    """Maps (B, h, w) computed in training mode, with one forward pass per layer, as the report's listing makes them.

    So no two layers see the same dropout masks. join makes one matrix of the layers. The model is left unchanged.
    """
    model, layers = copy.deepcopy(model).train(), []  # BatchNorm statistics change in training mode
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(images)
        for layer in range(len(recorder.weights)):
            model(images)
            layers.append(recorder.attentions[layer])
    return model_maps(model, join(layers), recorder.pooling)
