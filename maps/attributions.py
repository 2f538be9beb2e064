"""Pixel attributions by Captum.

Each function takes a model, normalised images (B, C, H, W) and classes (B,), and returns (maps, delta): maps (B, h, w)
that are not negative, and the convergence delta (B,), how far the attributions are from adding up to the change of the
logit, or None if the method has none. The baseline, if there is one, is the mean colour: zero after normalisation.
"""

import numpy as np
import torch
from captum.attr import GradientShap, InputXGradient, IntegratedGradients, LayerGradCam, Occlusion, Saliency

from errors import UserError
from maps.balanced import BALANCED
from maps.methods import without_padding

INTERNAL_BATCH = 256  # images per forward pass, at most, in methods that need many passes
STEPS_OF_PATH = 50  # of integrated gradients
SAMPLES = 20  # of gradient SHAP


def magnitude(attributions):
    """Attributions (B, C, H, W) to maps (B, H, W): the absolute value of the sum over channels."""
    return attributions.detach().sum(1).abs()


def saliency(model, images, classes):
    """|∂ logit / ∂ pixel|, the maximum over channels (Simonyan et al. 2014)."""
    return Saliency(model).attribute(images.clone().requires_grad_(), target=classes).detach().amax(1), None


def input_x_gradient(model, images, classes):
    """Pixel times gradient (Shrikumar et al. 2017)."""
    return magnitude(InputXGradient(model).attribute(images.clone().requires_grad_(), target=classes)), None


def integrated_gradients(model, images, classes):
    """Gradients along the straight line from the mean colour to the image (Sundararajan et al. 2017)."""
    attributions, delta = IntegratedGradients(model).attribute(
        images,
        target=classes,
        n_steps=STEPS_OF_PATH,
        internal_batch_size=max(INTERNAL_BATCH, len(images)),
        return_convergence_delta=True,
    )
    return magnitude(attributions), delta


def gradient_shap(model, images, classes):
    """Expected gradients from random points between noisy images and the mean colour (Lundberg & Lee 2017)."""
    np.random.seed(torch.randint(2**31, ()).item())  # Captum draws from numpy's generator as well
    found, deltas = [], []
    share = max(1, INTERNAL_BATCH // SAMPLES)  # each image becomes SAMPLES noisy ones
    baselines = torch.zeros_like(images[:1])
    for chunk, targets in zip(images.split(share), classes.split(share), strict=True):
        attributions, delta = GradientShap(model).attribute(
            chunk, baselines, target=targets, n_samples=SAMPLES, stdevs=0.1, return_convergence_delta=True
        )
        found.append(magnitude(attributions))
        deltas.append(delta.unflatten(0, (len(chunk), SAMPLES)).mean(1))
    return torch.cat(found), torch.cat(deltas)


def occlusion(model, images, classes):
    """How much the logit falls if a square of a quarter of the image's side is covered (Zeiler & Fergus 2014)."""
    channels, height, width = images.shape[1:]
    window = (max(1, height // 4), max(1, width // 4))
    attributions = Occlusion(model).attribute(
        images,
        target=classes,
        sliding_window_shapes=(channels, *window),
        strides=(channels, max(1, window[0] // 2), max(1, window[1] // 2)),
        baselines=0,
        perturbations_per_eval=max(1, INTERNAL_BATCH // len(images)),
    )
    return attributions.detach().sum(1).clamp(min=0), None


def grad_cam(model, images, classes):
    """Grad-CAM (Selvaraju et al. 2017) of a transformer's tokens (see token_grad_cam) or a ResNet's `layer4`.

    A transformer has `blocks`, or torch's nn.MultiheadAttention. Raises UserError for a model with neither.
    """
    multihead = [module for module in model.modules() if isinstance(module, torch.nn.MultiheadAttention)]
    if hasattr(model, "blocks") or multihead:
        attention = model.blocks[-1].attn if hasattr(model, "blocks") else multihead[-1]
        return token_grad_cam(model, attention, images, classes), None
    if not hasattr(model, "layer4"):
        raise UserError(f"grad_cam: {type(model).__name__} has neither blocks nor layer4: choose another --method")
    cam = LayerGradCam(model, model.layer4).attribute(images, target=classes, relu_attributions=True)
    return cam.detach()[:, 0], None


def token_grad_cam(model, attention, images, classes):
    """Grad-CAM of the tokens that enter `attention`, the last block's: (B, rows, columns), as in without_padding.

    After that attention only the class token has a gradient. If the block is used several times, the last use counts.
    """
    kept = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    with hook, torch.enable_grad():
        logits = model(images)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), kept[-1])
    features = kept[-1].detach()  # (B, N, dim); the class token comes first, if there is one
    importance = gradient.mean(1, keepdim=True)  # (B, 1, dim)
    rows, columns = model.grid
    relevance = (features * importance).sum(2).clamp(min=0)  # (B, N)
    return without_padding(model, relevance[:, -rows * columns :].unflatten(1, (rows, columns)))


ATTRIBUTIONS = {
    "saliency": saliency,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "gradient_shap": gradient_shap,
    "occlusion": occlusion,
    "grad_cam": grad_cam,
    **BALANCED,
}
