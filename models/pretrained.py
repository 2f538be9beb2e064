"""torchvision's ViT-B/16, whose ImageNet weights are fine-tuned on small images."""

import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from errors import UserError

VIT_B_16 = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1


class PretrainedViT(nn.Module):
    """torchvision's ViT-B/16 (Dosovitskiy et al. 2021): images (B, 3, H, W) of any size to logits (B, num_classes).

    It enlarges its images to the 224 pixels of its weights, so that a dataset of small ones needs no more memory.
    """

    grid, patch_size, side = (14, 14), 16, 224
    no_weight_decay = ("vit.class_token", "vit.encoder.pos_embedding")

    def __init__(self, *, num_classes=10, drop=0.0):
        super().__init__()
        self.vit = torchvision.models.vit_b_16(num_classes=num_classes, dropout=drop)

    def forward(self, images):
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        return self.vit(images)


def imagenet_statistics():
    """(mean, std) of the images that the weights expect, as fractions of 255."""
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


# from the names of the authors' released weights to those here
PUBLISHED_NAMES = {
    r"tokenizer\.conv_layers\.(\d)\.0\.": lambda found: f"tokenizer.{3 * int(found[1])}.",
    r"^classifier\.": "",
    r"class_emb": "cls_token",
    r"positional_emb": "pos_embed",
    r"attention_pool": "pool.score",
    r"self_attn": "attn",
    r"linear1": "mlp.0",
    r"linear2": "mlp.3",
    r"^fc": "head",
}


def load_published(model, weights):
    """Put the authors' released weights, a state dict, into a CompactTransformer; returns the names that were left out.

    A learnable embedding of a square image of another size is interpolated, bilinearly; a head for other classes is
    left out. Raises UserError that names the first keys that differ otherwise.
    """
    for pattern, name in PUBLISHED_NAMES.items():
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    if isinstance(model.tokenizer, nn.Conv2d):
        weights = {key.replace("tokenizer.0.", "tokenizer."): value for key, value in weights.items()}
    own = model.state_dict()
    if "pos_embed" in weights and "pos_embed" in own:
        first = int(model.cls_token is not None)
        weights["pos_embed"] = resize_positions(weights["pos_embed"], model.grid, first)
    left = [key for key in ("head.weight", "head.bias") if key in weights and weights[key].shape != own[key].shape]
    weights |= {key: own[key] for key in left}
    wrong = [
        f"{key} ({shape_of(weights, key)} there, {shape_of(own, key)} here)"
        for key in sorted(own.keys() | weights.keys())
        if shape_of(weights, key) != shape_of(own, key)
    ]
    if wrong:
        raise UserError(f"the weights do not fit the model: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    model.load_state_dict(weights)
    return left


def shape_of(weights, key):
    return tuple(weights[key].shape) if key in weights else "none"


def resize_positions(embedding, grid, class_token):
    """A positional embedding (1, N, dim) of class_token tokens and a square grid, for another grid (rows, columns)."""
    first, cells = embedding[:, :class_token], embedding[:, class_token:]
    side = round(cells.shape[1] ** 0.5)
    if side * side != cells.shape[1] or (side, side) == grid:
        return embedding
    cells = F.interpolate(cells.mT.unflatten(2, (side, side)), grid, mode="bilinear")
    return torch.cat([first, cells.flatten(2).mT], dim=1)
