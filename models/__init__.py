"""Build a model by its name. A family's file is imported only when one of its models is asked for."""

from functools import partial

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


def build_model(name, num_classes=10, **model_args):
    """The model `name`, freshly initialised; model_args are keyword arguments of its constructor.

    Raises UserError for an unknown name or an invalid argument.
    """
    family = model_family(name)
    if name not in family:
        known = [*map(model_family, ("vit", "vit_b_16", "cct_", "cct_nano", "resnet", "xresnet"))]
        raise UserError(f"unknown model {name!r}: choose from {', '.join(name for names in known for name in names)}")
    return family[name](num_classes=num_classes, **model_args)
