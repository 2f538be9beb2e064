"""torchvision's ViT-B/16, whose ImageNet weights are fine-tuned on small pictures."""

import torch.nn.functional as F
import torchvision
from torch import nn

from errors import UserError

VIT_B_16 = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1


class PretrainedViT(nn.Module):
    """torchvision's ViT-B/16 (Dosovitskiy et al. 2021): pictures (B, 3, H, W) of any size to logits (B, num_classes).

    It enlarges its pictures to the 224 pixels of its weights, so that a dataset of small ones needs no more memory.
    """

    grid, patch_size, side = (14, 14), 16, 224
    no_weight_decay = ("vit.class_token", "vit.encoder.pos_embedding")

    def __init__(self, *, num_classes=10, drop=0.0):
        super().__init__()
        self.vit = torchvision.models.vit_b_16(num_classes=num_classes, dropout=drop)

    def forward(self, pictures):
        if pictures.shape[2:] != (self.side, self.side):
            pictures = F.interpolate(pictures, (self.side, self.side), mode="bilinear", antialias=True)
        return self.vit(pictures)


def imagenet_statistics():
    """(mean, std) of the pictures that the weights expect, as fractions of 255."""
    preset = VIT_B_16.transforms()
    return preset.mean, preset.std


def load_imagenet_weights(model):
    """Put torchvision's ImageNet weights into a PretrainedViT, all but the head.

    They are downloaded into torch's cache when they are not there. Raises UserError where that fails.
    """
    try:
        weights = VIT_B_16.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: what came is another file
        raise UserError(f"--pretrained: {VIT_B_16.url} cannot be downloaded ({error})") from error
    own = model.vit.state_dict()
    model.vit.load_state_dict(weights | {name: own[name] for name in own if name.startswith("heads.")})
