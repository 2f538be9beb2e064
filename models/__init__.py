"""What is trained: one table from a name to a model."""

from errors import UserError
from models.cct import COMPACT_MODELS
from models.nano import NANO_MODELS
from models.pretrained import PretrainedViT
from models.resnet import RESNETS
from models.vit import VisionTransformer
from models.xresnet import XRESNETS

MODELS = {"vit": VisionTransformer, "vit_b_16": PretrainedViT} | COMPACT_MODELS | NANO_MODELS | RESNETS | XRESNETS


def build_model(name, num_classes=10, **model_args):
    """The model of that name, freshly initialised; model_args are its constructor's keyword arguments.

    Raises UserError for an unknown name, and what the constructor raises.
    """
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}: there are {', '.join(MODELS)}")
    return MODELS[name](num_classes=num_classes, **model_args)
