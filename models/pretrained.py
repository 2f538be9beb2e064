"""torchvision's ViT-B/16 and timm's for fine-tuning on small images, and weights that others have published."""

import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from errors import UserError, import_optional

VIT_B_16 = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1


class EnlargingViT(nn.Module):
    """Images (B, 3, H, W) of any size to the logits (B, num_classes) of a model `vit` for images of one size, `side`.

    Images are enlarged inside the model, so that a dataset of small images stays small in memory.
    """

    def __init__(self, in_channels):
        super().__init__()
        if in_channels != 3:
            raise UserError(f"--channels {in_channels}: pretrained models take images of 3 channels")

    def forward(self, images):
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        return self.vit(images)  # of (B, 3, side, side): (B, num_classes)


class PretrainedViT(EnlargingViT):
    """torchvision's ViT-B/16 (Dosovitskiy et al. 2021)."""

    grid, patch_size, side = (14, 14), 16, 224
    no_weight_decay = ("vit.class_token", "vit.encoder.pos_embedding")

    def __init__(self, *, in_channels=3, num_classes=10, drop=0.0):
        super().__init__(in_channels)
        self.vit = torchvision.models.vit_b_16(num_classes=num_classes, dropout=drop)

    def pretrained(self):
        """(weights, mean, std of the images that they expect). Raises UserError if they cannot be downloaded."""
        return download_weights(VIT_B_16), *imagenet_statistics()


class TimmViT(EnlargingViT):
    """timm's model `name`, if it cuts images into patches. Raises UserError without timm and for other names."""

    def __init__(self, *, name, in_channels=3, num_classes=10, drop_path=0.0):
        super().__init__(in_channels)
        self.name, self.config = f"timm:{name}", timm_config(name)
        self.vit = import_optional("timm").create_model(name, num_classes=num_classes, drop_path_rate=drop_path or None)
        if not hasattr(getattr(self.vit, "patch_embed", None), "grid_size"):
            raise UserError(f"--model {self.name} does not cut images into patches")
        self.grid, self.side = tuple(self.vit.patch_embed.grid_size), self.config.input_size[-1]
        self.patch_size = self.side // self.grid[0]
        self.no_weight_decay = tuple(f"vit.{parameter}" for parameter in getattr(self.vit, "no_weight_decay", set)())
        self.class_token = getattr(self.vit, "global_pool", "avg") != "avg"  # for maps: else the mean of all tokens

    def pretrained(self):
        """(weights, mean, std of the images that they expect). Raises UserError if they cannot be downloaded."""
        try:
            model = import_optional("timm").create_model(self.name.removeprefix("timm:"), pretrained=True)
        except Exception as error:  # of timm, of the hub's client, of the network
            reason = str(error).split("\n")[0]
            advice = "--init-from FILE takes a file of them"
            raise UserError(f"--pretrained: no weights of {self.name} ({reason}): {advice}") from error
        return model.state_dict(), list(self.config.mean), list(self.config.std)


def timm_config(name):
    """timm's description of the weights of a model, with their image size. Raises UserError for an unknown name."""
    timm = import_optional("timm")
    if not timm.is_model(name):
        raise UserError(f"--model timm:{name}: timm {timm.__version__} has no such model (timm.list_models() has all)")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"--model timm:{name}: {error}") from error


def pretrained_side(model):
    """The side of the images that vit_b_16 or timm:NAME enlarges others to."""
    return timm_config(model.removeprefix("timm:")).input_size[-1] if ":" in model else PretrainedViT.side


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
    # the ViT report's own model
    r"^pos_embedding": "pos_embed",
    r"^to_patch_embedding\.1": "patch_embed",
    r"^transformers_seq\.": "blocks.",
    r"layer_norm_": "norm",
    r"mh_attention\.in_proj_": "attn.qkv.",
    r"mh_attention\.out_proj": "attn.proj",
    r"(blocks\.\d+\.mlp)\.[1-4]\.": r"\1.3.",
    r"^mlp_head\.0\.": "norm.",
    r"^mlp_head(\.\d+)?\.": "head.",
}


def load_published(model, weights):
    """Put a state dict of the same model, or weights that others released, into a model. Returns the names left out.

    These are of the CCT authors' model, the ViT report's, or the one inside an EnlargingViT. A learnable positional
    embedding of a square image is interpolated bilinearly to the model's grid; a head for another number of classes, or
    that the file lacks, is left out. Raises UserError if other weights do not fit (see check_shapes).
    """
    own, p = model.state_dict(), getattr(model, "patch_size", 1)
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    name = "to_patch_embedding.1.weight"  # (dim, p * p * C): row, column, channel; ours is channel, row, column
    if name in weights and weights[name].ndim == 2 and weights[name].shape[1] % p**2 == 0:
        weights[name] = weights[name].unflatten(1, (p, p, -1)).permute(0, 3, 1, 2).flatten(1)
    weights = {own_name(name, own): value for name, value in weights.items()}
    if isinstance(getattr(model, "tokenizer", None), nn.Conv2d):
        weights = {key.replace("tokenizer.0.", "tokenizer."): value for key, value in weights.items()}
    if "pos_embed" in weights and "pos_embed" in own:
        class_tokens = int(model.cls_token is not None)
        weights["pos_embed"] = resize_positions(weights["pos_embed"], model.grid, class_tokens)
    heads = [key for key in own if key.endswith(("head.weight", "head.bias"))]
    left_out = [key for key in heads if shape_of(weights, key) != shape_of(own, key)]
    weights |= {key: own[key] for key in left_out}
    check_shapes(weights, own, sorted(own.keys() | weights.keys()), flag="--init-from")
    model.load_state_dict(weights)
    return left_out


def own_name(name, own):
    """The name in the state dict `own` that a name in someone's file stands for; as it is if it stands for none."""
    if f"vit.{name}" in own:  # inside an EnlargingViT
        return f"vit.{name}"
    for pattern, replacement in PUBLISHED_NAMES.items() if name not in own else ():
        name = re.sub(pattern, replacement, name)
    return name


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
