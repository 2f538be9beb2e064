"""Build a model by its name. A family's file is imported only when one of its models is asked for."""

import math
import os
from functools import partial

from torch.utils._python_dispatch import TorchDispatchMode

from errors import UserError


def model_family(name):
    """{name: constructor} of the models that share the beginning of `name`."""
    if name == "vit":
        from models.vit import VisionTransformer

        return {"vit": VisionTransformer}
    if name == "vit_b_16":
        from models.pretrained import PretrainedViT

        return {"vit_b_16": PretrainedViT}
    if name.startswith("timm:"):
        from models.pretrained import TimmViT

        return {name: partial(TimmViT, name=name.removeprefix("timm:"))}
    if name.startswith("cct_nano"):
        from models.nano import NANO_MODELS

        return NANO_MODELS
    if name.startswith(("vit_lite_", "cvt_", "cct_")):
        from models.cct import COMPACT_MODELS

        return COMPACT_MODELS
    if name.startswith("resnet"):
        from models.resnet import RESNETS

        return RESNETS
    if name in ("acgan", "ddpm"):
        from models.acgan import Acgan
        from models.ddpm import Ddpm

        return {"acgan": Acgan, "ddpm": Ddpm}
    if name.startswith("xresnet"):
        from models.xresnet import XRESNETS

        return XRESNETS
    return {}


class SizeLimit(TorchDispatchMode):
    """Refuses new float32 tensors once they would fill half of the memory: Linux kills a process that fills it."""

    def __init__(self, name):
        super().__init__()
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else -1  # Windows has none
        self.limit = pages * os.sysconf("SC_PAGE_SIZE") // 2 if pages > 0 else math.inf
        self.name, self.taken = name, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], (list, tuple)) and all(isinstance(side, int) for side in args[0]):
            self.taken += 4 * math.prod(args[0])
            if self.taken > self.limit:
                raise UserError(
                    f"{self.name}: half of the memory, {self.limit / 2**30:.0f} GiB, cannot hold its weights"
                )
        return function(*args, **(kwargs or {}))


def build_model(name, num_classes=10, **model_args):
    """The model `name`, freshly initialised; model_args are keyword arguments of its constructor.

    Raises UserError for an unknown name or an invalid argument, or weights that half of the memory does not hold.
    """
    family = model_family(name)
    if name not in family:
        known = [*map(model_family, ("vit", "vit_b_16", "cct_", "cct_nano", "resnet", "xresnet"))]
        raise UserError(f"unknown model {name!r}: choose from {', '.join(name for names in known for name in names)}")
    with SizeLimit(name):
        return family[name](num_classes=num_classes, **model_args)
