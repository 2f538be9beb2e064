"""torchvision's ViT-B/16 for fine-tuning on small images, and weights that others have published."""

import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from errors import UserError

VIT_B_16 = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1


class PretrainedViT(nn.Module):
    """torchvision's ViT-B/16 (Dosovitskiy et al. 2021): images (B, 3, H, W) of any size to logits (B, num_classes).

    Images are enlarged to 224 pixels inside the model, so that a dataset of small images stays small in memory.
    """

    grid, patch_size, side = (14, 14), 16, 224
    no_weight_decay = ("vit.class_token", "vit.encoder.pos_embedding")

    def __init__(self, *, in_channels=3, num_classes=10, drop=0.0):
        super().__init__()
        if in_channels != 3:
            raise UserError(f"--channels {in_channels}: vit_b_16 takes images of 3 channels")
        self.vit = torchvision.models.vit_b_16(num_classes=num_classes, dropout=drop)

    def forward(self, images):
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)  # (B, 3, 224, 224)
        return self.vit(images)  # (B, num_classes)


def imagenet_statistics():
    """(mean, std) of the images that the weights expect, as fractions of 255."""
    preset = VIT_B_16.transforms()
    return preset.mean, preset.std


def download_weights(weights):
    """The state dict of torchvision's `weights`, from torch's cache or downloaded. Raises UserError if that fails."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        return weights.get_state_dict(check_hash=True)
    except (OSError, EOFError, RuntimeError, LookupError, pickle.UnpicklingError) as error:
        cached = folder / weights.url.rpartition("/")[2]
        if cached.exists():  # it was not downloaded now, and its hash was not looked at
            raise UserError(f"--pretrained: {cached} is damaged: delete it, and it is downloaded again") from error
        raise UserError(f"--pretrained: {weights.url} cannot be downloaded ({error}): put it into {folder}") from error


def load_imagenet_weights(model):
    """Put torchvision's ImageNet weights into a PretrainedViT, except the head. Raises UserError without them."""
    own = model.vit.state_dict()
    head = {name: own[name] for name in own if name.startswith("heads.")}
    model.vit.load_state_dict(download_weights(VIT_B_16) | head)


# patterns in the names of the authors' released weights, and what stands for them here
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
    """Put a state dict of the same model, or the authors' released weights, into a model. Returns the names left out.

    A learnable positional embedding of a square image is interpolated bilinearly to the model's grid; a head for
    another number of classes is left out. Raises UserError if other weights do not fit (see check_shapes).
    """
    for pattern, name in PUBLISHED_NAMES.items():
        weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    if isinstance(getattr(model, "tokenizer", None), nn.Conv2d):
        weights = {key.replace("tokenizer.0.", "tokenizer."): value for key, value in weights.items()}
    own = model.state_dict()
    if "pos_embed" in weights and "pos_embed" in own:
        class_tokens = int(model.cls_token is not None)
        weights["pos_embed"] = resize_positions(weights["pos_embed"], model.grid, class_tokens)
    heads = [key for key in weights if key in own and key.endswith(("head.weight", "head.bias"))]
    left_out = [key for key in heads if weights[key].shape != own[key].shape]
    weights |= {key: own[key] for key in left_out}
    check_shapes(weights, own, sorted(own.keys() | weights.keys()), flag="--init-from")
    model.load_state_dict(weights)
    return left_out


def shape_of(weights, name):
    return tuple(weights[name].shape) if name in weights else "missing"


def check_shapes(weights, own, names, *, flag):
    """Raises UserError, with the first three of them, if tensors of two state dicts differ in shape or are missing."""
    wrong = [
        f"{name} ({shape_of(weights, name)} in the file, {shape_of(own, name)} in the model)"
        for name in names
        if shape_of(weights, name) != shape_of(own, name)
    ]
    if wrong:
        listed = ", ".join(wrong[:3]) + (" ..." if len(wrong) > 3 else "")
        raise UserError(f"{flag}: the weights do not fit the model, or need other model flags: {listed}")


def resize_positions(embedding, grid, class_tokens):
    """A positional embedding (1, N, dim) of class_tokens and then a square grid, resized to another grid.

    One of as many cells as the grid has is taken as it is.
    """
    first, cells = embedding[:, :class_tokens], embedding[:, class_tokens:]
    side = round(cells.shape[1] ** 0.5)
    if side * side != cells.shape[1] or cells.shape[1] == grid[0] * grid[1]:
        return embedding
    cells = F.interpolate(cells.mT.unflatten(2, (side, side)), grid, mode="bilinear")  # (1, dim, rows, columns)
    return torch.cat([first, cells.flatten(2).mT], dim=1)  # (1, class_tokens + rows * columns, dim)
