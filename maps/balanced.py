"""AttnLRP and LibraGrad: pixel times gradient, with a gradient that is changed so that the sum is the logit."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from errors import UserError
from models.attention import explicit_attention

GATED = (F.gelu, F.silu)  # functions f with f(x) = x g(x) and g(0) = 1/2
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
BILINEAR = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mul, Tensor.mul, Tensor.__mul__)
WITHOUT_RULE = (nn.MultiheadAttention, nn.GroupNorm, nn.RMSNorm, nn.Sigmoid, nn.Tanh)


class BalancedGradients(TorchFunctionMode):
    """A context in which a forward pass has its usual values, but a gradient that treats each layer as affine.

    Layer normalisation divides by a constant, and GELU and SiLU are x times a constant. With rule "libragrad" (Mehri et
    al. 2025) softmax is a constant, too. With "attnlrp" (Achtibat et al. 2024) it keeps its gradient, and a product of
    two activations passes half of its gradient to each; "libragrad" does that for what is not attention. Linear layers
    and convolutions stay as they are (AttnLRP's rule with epsilon 0).
    """

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if kwargs.pop("dropout_p", 0.0) or any(value not in (None, False) for value in kwargs.values()):
                raise UserError(f"{self.rule}: no rule for attention with a mask or dropout: use integrated_gradients")
            with self:  # its softmax and its products have rules
                return explicit_attention(*args[:3])
        if func is F.layer_norm:
            return layer_norm(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in GATED:
            return args[0] * torch.where(args[0] == 0, 0.5, result / args[0]).detach()
        if func in SOFTMAX and self.rule == "libragrad":
            return result.detach()
        if func in BILINEAR and all(map(is_activation, args[:2])):
            return result / 2 + (result / 2).detach()
        return result


def is_activation(x):
    return torch.is_tensor(x) and x.requires_grad and not isinstance(x, nn.Parameter)


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    """F.layer_norm with a constant standard deviation."""
    dims = tuple(range(-len(shape), 0))
    x = x - x.mean(dims, keepdim=True)
    x = x / (x.square().mean(dims, keepdim=True) + eps).sqrt().detach()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def balanced(model, images, classes, *, rule):
    """(what each pixel contributes to the logit of classes (B,): maps (B, H, W), negative parts set to 0; None).

    Over all pixels, negative parts included, and all biases, it adds up to the logit; with attnlrp, the constant part
    of each softmax (what its gradient times its input leaves of its output) counts as a bias. Raises UserError for a
    model with a layer that has no rule.
    """
    for module in model.modules():
        if isinstance(module, WITHOUT_RULE):
            raise UserError(f"{rule}: no rule for {type(module).__name__}: use integrated_gradients")
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        with BalancedGradients(rule):
            logits = model(images)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), images)
    return (images * gradient).sum(1).detach().clamp(min=0), None


BALANCED = {rule: partial(balanced, rule=rule) for rule in ("attnlrp", "libragrad")}
