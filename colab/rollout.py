# rollout.py and all that it imports from its project in one file, written by colab/bundle.py: edit it there.
# In a notebook cell it takes its arguments from this list, and as a script from the command line.
ARGUMENTS = ["--dataset", "shapes"]


import argparse
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
import contextlib
from contextlib import contextmanager, suppress
import copy
import ctypes
from dataclasses import dataclass, replace
import difflib
import errno
import functools
from functools import cache, partial
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
from itertools import islice
import json
import math
from multiprocessing import parent_process
import os
from pathlib import Path
import pickle
import platform
import random
import re
import stat
import statistics
import sys
import tempfile
from textwrap import shorten
from threading import Lock
import traceback
from types import SimpleNamespace, UnionType
from typing import NamedTuple, get_args, get_origin
from urllib.parse import urlparse
import zipfile

from PIL import Image, ImageOps
from PIL.Image import Resampling
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
import numpy as np
from scipy.stats import rankdata
import torch
from torch import distributed, nn
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
import torchvision
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth
from torchvision.transforms import v2
from torchvision.transforms.functional import center_crop, resize
from tqdm.auto import tqdm


# ---- errors.py: What a user sees: the one exception that stands for a mistake of theirs, tables, how a script ends, progress bars.

class UserError(ValueError):
    """A mistake that the user can correct: one line that names the flag or file, its value, and what would be right.

    Line breaks become spaces, what cannot be printed is escaped, and of a very long message the middle is left out.
    """

    def __init__(self, message):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).splitlines()))
        super().__init__(line if len(line) <= 1000 else f"{line[:500]} ... {line[-400:]}")

    def _render_traceback_(self):
        """What IPython shows in a notebook: the line alone."""
        return [f"error: {self}"]


def regular_file(path):
    """The path of a regular file, as it is. Raises OSError for another one: a pipe or a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path


def aligned(rows):
    """Lists of strings, the headings first, as lines with aligned columns: numbers right, the rest left."""
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        numbers = all(cell[:1] in "0123456789+-" for cell in cells[1:])
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def import_optional(name, install=None):
    """A module of a package that few need. Raises UserError, with what pip installs for it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = install or name.partition(".")[0]
        raise UserError(f"this needs a package that is not installed: pip install {package} ({error})") from error


def command_line():
    """The arguments of this process; none in a notebook, where they are the kernel's own."""
    folder, name = os.path.split(sys.argv[0])
    from_kernel = "kernel" in name or os.path.basename(folder) == "ipykernel"
    return [] if from_kernel and "ipykernel" in sys.modules else sys.argv[1:]


def is_memory_error(error):
    """Whether an exception says that the memory of a GPU (torch.OutOfMemoryError) or of the host is used up."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return named or isinstance(error, MemoryError) or "out of memory" in str(error)


def bar_disabled():
    """The `disable` of a tqdm bar: show it in a notebook, and wherever stderr is a terminal."""
    return False if "ipykernel" in sys.modules else None  # None: tqdm looks at stderr


def run_script(main):
    """Call main() as a script: a UserError becomes `error: ...` on stderr and exit code 2; a bug keeps its traceback.

    Ctrl-C exits with 130; a KeyboardInterrupt that carries an `exit_code` (SIGTERM: 143) exits with that. Memory that
    is used up is one line, too. Where nobody reads the output any more (`| head`), the script ends without a word.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        sys.exit(141)
    except Exception as error:
        if not is_memory_error(error):
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        print(f"error: the memory is used up: a smaller model, image or batch takes less ({reason})", file=sys.stderr)
        sys.exit(2)


# ---- seeding.py: Where every random number comes from: a purpose and (seed, epoch, step), and nothing else.

PURPOSES = ("weights", "order", "augmentation", "dropout", "mixing", "validation", "samples", "extra")


def seed_for(purpose, *numbers):
    """A 64-bit seed for one purpose at one place of a run, say seed_for("dropout", seed, epoch, step).

    No generator is carried along, so a run that is resumed at any step draws the same numbers as one without a stop.
    """
    words = np.random.SeedSequence((PURPOSES.index(purpose), *numbers)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])


# ---- files.py: Files that are written completely or not at all.

def is_first_rank():
    """Whether this process writes files: of several that torchrun started for one run, only the first one does."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def write_atomically(path, write, *, previous=None):
    """write(file) into a temporary file beside path, flushed to the disk, then renamed: path is never half a file.

    Does nothing unless is_first_rank. An existing file at path is kept as `previous`, if that is given. Raises
    UserError if the file cannot be written; an existing file at path then stays as it was, and the temporary file is
    removed, as it is after any exception.
    """
    if not is_first_rank():
        return
    path = Path(path)
    if not path.name or (path.exists() and not path.is_file()):  # a device, such as /dev/null, would be replaced
        raise UserError(f"{path} cannot be written (it is no regular file)")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save makes a RuntimeError of it
        if isinstance(reason, OSError):
            raise UserError(f"{path} cannot be written ({reason.strerror or reason})") from error
        raise


def write_json(path, value):
    """write_atomically of a value as JSON."""
    write_atomically(path, lambda file: file.write(f"{json.dumps(value, indent=2)}\n".encode()))


def make_folder(path):
    """Make a folder to write to, and return it. Raises UserError if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # its name is unique: other runs may try at the same time
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error
    return path


# ---- models/attention.py: Attention over tokens: attend(), and the modules that are built on it.

def explicit_attention(q, k, v, dropout_p=0.0):
    """softmax(q kᵀ / √d) v, written out; q, k, v and the result are (B, heads, N, d) (Vaswani et al. 2017, eq. 1)."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
    weights = dropout(weights.softmax(dim=-1), dropout_p)
    return weights @ v  # (B, heads, N, d)


FUSED = F.scaled_dot_product_attention


def explicit_is_faster(q):
    """Whether explicit_attention is faster than torch's function, forward and backward, for q (B, heads, N, d).

    torch's time over explicit_attention's on two Zen 5 cores, 24 to 32 channels per head, at 17, 65, 257 and 577
    tokens: in bfloat16 8, 6, 1.3 and 1.05; in float32 by oneDNN (see training/device.py) 19, 4, 0.9 and 0.8, and by MKL
    1.6, 0.4, 0.4 and 0.4.
    """
    tokens = q.shape[-2]
    if q.device.type != "cpu" or torch.compiler.is_exporting():  # an exported model may run anywhere
        return False
    if q.dtype == torch.bfloat16:
        return tokens <= 400
    return tokens <= 128 and torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def attend(q, k, v, dropout_p=0.0):
    """Scaled dot-product attention on (B, heads, N, d), fused or written out, whichever is faster by the rule above.

    If torch's function has been replaced, to record the weights, the replacement is called.
    """
    recorded = F.scaled_dot_product_attention is not FUSED
    if not recorded and explicit_is_faster(q):
        return explicit_attention(q, k, v, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


class AttentionSpec(NamedTuple):
    """What a block tells its attention: width, heads and layout of the tokens, and two options of softmax attention.

    The tokens are the cells of a grid (rows, columns), row by row, after the class token if there is one.
    """

    dim: int
    num_heads: int
    grid: tuple[int, int] | None = None
    class_token: bool = False
    qkv_bias: bool = True
    attn_drop: float = 0.0


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention on (B, N, dim) (Vaswani et al. 2017), with dropout on the attention weights only.

    Initialised like nn.MultiheadAttention: Xavier-uniform over the stacked qkv weight, zero biases.
    Raises UserError if num_heads does not divide dim.
    """

    def __init__(self, spec):
        super().__init__()
        if spec.num_heads < 1 or spec.dim % spec.num_heads:
            raise UserError(f"--embed-dim {spec.dim} is not divisible by --num-heads {spec.num_heads}")
        self.num_heads, self.attn_drop = spec.num_heads, spec.attn_drop
        self.qkv = nn.Linear(spec.dim, 3 * spec.dim, bias=spec.qkv_bias)
        self.proj = nn.Linear(spec.dim, spec.dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.proj.bias)
        if spec.qkv_bias:
            nn.init.zeros_(self.qkv.bias)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, d) each
        x = attend(q, k, v, self.attn_drop if self.training else 0.0)  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, dim)


class NoMixing(nn.Module):
    """The control without attention on (B, N, dim): every token keeps its own value, so tokens do not mix.

    A class token, which would otherwise not see the image, becomes the mean of the other tokens.
    """

    def __init__(self, spec):
        super().__init__()
        self.class_token = spec.class_token
        self.value = nn.Linear(spec.dim, spec.dim, bias=spec.qkv_bias)
        self.proj = nn.Linear(spec.dim, spec.dim)

    def forward(self, x):
        x = self.value(x)
        x = self.mix(x[:, int(self.class_token) :])  # (B, rows * columns, dim)
        if self.class_token:
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)  # (B, N, dim)
        return self.proj(x)

    def mix(self, x):
        return x


class GridConv(nn.Conv2d):
    """A depthwise 3x3 convolution over the grid (rows, columns) of the tokens (B, N, dim)."""

    def __init__(self, dim, grid):
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.grid = grid

    def forward(self, x):
        x = x.mT.unflatten(2, self.grid)  # (B, dim, rows, columns)
        return super().forward(x).flatten(2).mT  # (B, N, dim)


class DepthwiseMixing(NoMixing):
    """The control that cannot choose where to look: a depthwise 3x3 convolution over the grid of tokens."""

    def __init__(self, spec):
        super().__init__(spec)
        self.conv = GridConv(spec.dim, spec.grid)

    def mix(self, x):
        return self.conv(x)


ATTENTIONS = {"softmax": MultiHeadAttention, "identity": NoMixing, "depthwise": DepthwiseMixing}


def make_attention(name, spec):
    """The module `name` of ATTENTIONS, or a class, on tokens (B, N, dim). Raises UserError for an unknown name."""
    if name not in ATTENTIONS and not isinstance(name, type):
        raise UserError(f"--attention {name}: choose from {', '.join(ATTENTIONS)}")
    return ATTENTIONS.get(name, name)(spec)


class Mlp(nn.Sequential):
    """Linear, GELU, dropout, Linear, dropout on (B, N, dim)."""

    def __init__(self, dim, hidden_dim, *, drop=0.0):
        first, second = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        super().__init__(first, nn.GELU(), Dropout(drop), second, Dropout(drop))


class Block(nn.Module):
    """A pre-norm block on (B, N, dim): attention, then MLP, each with a residual (Dosovitskiy et al. 2021).

    drop_path is the probability that a branch is skipped, drawn per image (Huang et al. 2016).
    """

    def __init__(self, spec, *, attention="softmax", mlp_ratio=2.0, drop=0.0, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim)
        self.attn = make_attention(attention, spec)
        self.norm2 = nn.LayerNorm(spec.dim)
        self.mlp = Mlp(spec.dim, int(spec.dim * mlp_ratio), drop=drop)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def dropout(x, p):
    """x of any shape with elements set to 0 with probability p, the others scaled up (Srivastava et al. 2014).

    On a CPU one random byte per element decides: p is rounded to a multiple of 1/256, and the scale follows. On one
    Zen 5 core in bfloat16 torch's dropout, used on other devices, took 7 times as long, forward and backward.
    """
    threshold = round(256 * p)
    if x.device.type != "cpu" or threshold == 256:
        return F.dropout(x, p)
    if threshold == 0:
        return x
    count = x.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    kept = words.view(torch.uint8)[:count].view(x.shape).to(x.dtype).ge_(threshold)
    return x * kept.mul_(256 / (256 - threshold))


class Dropout(nn.Dropout):
    """nn.Dropout that calls dropout()."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


# ---- models/vit.py: The Vision Transformer of the CIFAR-10 report.

class VisionTransformer(nn.Module):
    """The report's ViT (Dosovitskiy et al. 2021): images (B, C, H, W) to logits (B, num_classes).

    image_size is a number of pixels or (height, width); with pad, zeros at the right and bottom make it divisible by
    patch_size. attention is a name in ATTENTIONS. drop_path grows from 0 in the first block to that rate in the last.
    `grid` is (rows, columns) of patches. The defaults have 3,195,146 parameters. Raises UserError for sizes that are
    not divisible (see patch_grid, MultiHeadAttention) and for an unknown attention.
    """

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(
        self,
        *,
        image_size=32,
        patch_size=4,
        in_channels=3,
        num_classes=10,
        embed_dim=256,
        depth=6,
        num_heads=8,
        mlp_ratio=2.0,
        drop=0.2,
        drop_path=0.0,
        attention="softmax",
        pad=False,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = patch_grid((height, width), patch_size, pad=pad)
        self.patch_size = patch_size
        self.padding = (0, self.grid[1] * patch_size - width, 0, self.grid[0] * patch_size - height)
        num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Linear(in_channels * patch_size**2, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches + 1, embed_dim))
        self.drop = Dropout(drop)
        spec = AttentionSpec(embed_dim, num_heads, grid=self.grid, class_token=True)
        self.blocks = nn.ModuleList(
            Block(spec, attention=attention, mlp_ratio=mlp_ratio, drop=drop, drop_path=rate)
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        images = F.pad(images, self.padding)  # (B, C, rows * patch_size, columns * patch_size)
        x = self.patch_embed(to_patches(images, self.patch_size))  # (B, N, dim)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, dim)
        x = self.drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # (B, num_classes)


def patch_grid(image_size, patch_size, *, pad=False):
    """(rows, columns) of the patches of an image of image_size (height, width) in pixels.

    With pad, the patches that extend beyond the border count too. Raises UserError if patch_size does not divide the
    image and pad is off.
    """
    if patch_size < 1:
        raise UserError(f"--patch-size {patch_size}: must be at least 1")
    for size in image_size:
        if size % patch_size and not pad:
            below = size // patch_size * patch_size
            fits = f"{below} or {below + patch_size}" if below else f"{patch_size}"
            raise UserError(f"--image-size {size} is not divisible by --patch-size {patch_size}: use {fits}, or --pad")
    return tuple(-(-size // patch_size) for size in image_size)


def to_patches(images, patch_size):
    """Cut images (B, C, H, W) into non-overlapping patches (B, N, C*p*p), row by row; p must divide H and W.

    Within a patch the order is channel, row, column, as in the weight of a Conv2d. So a Linear on these patches is a
    Conv2d of kernel = stride = p with the same weights.
    """
    p = patch_size
    patches = images.unfold(2, p, p).unfold(3, p, p)  # (B, C, H/p, W/p, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (B, H/p, W/p, C, p, p)
    return patches.flatten(3).flatten(1, 2)  # (B, N, C*p*p)


def from_patches(patches, patch_size, grid):
    """The inverse of to_patches: (B, N, C*p*p) on a grid of (rows, columns) back to (B, C, rows*p, columns*p)."""
    p, (rows, columns) = patch_size, grid
    images = patches.unflatten(2, (-1, p, p)).unflatten(1, (rows, columns))  # (B, rows, columns, C, p, p)
    return images.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)


# ---- models/pretrained.py: torchvision's ViT-B/16 and timm's for fine-tuning on small images, and weights that others have published.

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


# ---- models/cct.py: Compact transformers: ViT-Lite, CVT and CCT (Hassani et al. 2021, "Escaping the Big Data Paradigm").

def conv_tokenizer(embed_dim, *, kernel_size, layers, in_channels=3):
    """The tokenizer of CCT: images (B, in_channels, H, W) to feature maps (B, embed_dim, rows, columns).

    Each layer is a convolution without bias, MaxPool(3, 2, 1) and ReLU; all except the last have 64 channels. The
    published code has ReLU before the pooling: the same result for four times the work.
    """
    widths = [in_channels] + [64] * (layers - 1) + [embed_dim]
    options = {"stride": max(1, kernel_size // 2 - 1), "padding": kernel_size // 2, "bias": False}
    modules = []
    for before, after in zip(widths, widths[1:], strict=False):
        modules += [nn.Conv2d(before, after, kernel_size, **options), nn.MaxPool2d(3, 2, 1), nn.ReLU()]
    return nn.Sequential(*modules)


def sine_embedding(tokens, dim):
    """(1, tokens, dim): sines and cosines of the position, alternating (Vaswani et al. 2017, section 3.5)."""
    rates = 10000 ** (-(torch.arange(dim) // 2 * 2) / dim)
    angles = torch.arange(tokens)[:, None] * rates
    return torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())[None]


class CompactBlock(nn.Module):
    """The published block on (B, N, dim): x = norm1(x + attn(pre_norm(x))), then x = x + mlp(x)."""

    def __init__(self, spec, *, attention, mlp_ratio, drop, drop_path):
        super().__init__()
        self.pre_norm = nn.LayerNorm(spec.dim)
        self.attn = make_attention(attention, spec)
        self.drop = Dropout(drop)
        self.norm1 = nn.LayerNorm(spec.dim)
        self.mlp = Mlp(spec.dim, int(spec.dim * mlp_ratio), drop=drop)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = self.norm1(x + self.drop_path(self.drop(self.attn(self.pre_norm(x)))))
        return x + self.drop_path(self.mlp(x))


class SequencePooling(nn.Module):
    """The mean of tokens (B, N, dim) as (B, dim), weighted by the softmax of a linear layer's score per token."""

    def __init__(self, dim):
        super().__init__()
        self.score = nn.Linear(dim, 1)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x):
        weights = self.softmax(self.score(x))  # (B, N, 1)
        return (weights.mT @ x)[:, 0]  # (B, dim)


class CompactTransformer(nn.Module):
    """A compact transformer (Hassani et al. 2021): images (B, C, H, W) to logits (B, num_classes).

    image_size is a number of pixels or (height, width). With kernel_size the tokenizer is CCT's, else a convolution of
    kernel = stride = patch_size. positional_embedding is "learnable", "sine" or "none". class_token replaces sequence
    pooling. drop_path grows from 0 in the first block to that rate in the last. `grid` is (rows, columns) of tokens.
    Raises UserError if the image is too small or not divisible into patches, and for an unknown name.
    """

    no_weight_decay = ("cls_token", "pos_embed")

    def __init__(
        self,
        *,
        image_size=32,
        in_channels=3,
        num_classes=10,
        embed_dim=256,
        depth=6,
        num_heads=4,
        mlp_ratio=2.0,
        kernel_size=None,
        conv_layers=1,
        patch_size=4,
        class_token=False,
        positional_embedding="learnable",
        attention="softmax",
        drop=0.0,
        attn_drop=0.1,
        drop_path=0.1,
    ):
        super().__init__()
        if kernel_size:
            options = {"kernel_size": kernel_size, "layers": conv_layers, "in_channels": in_channels}
            self.tokenizer = conv_tokenizer(embed_dim, **options)
        else:
            self.tokenizer = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.grid = token_grid(self.tokenizer, image_size)
        tokens = self.grid[0] * self.grid[1] + class_token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        if positional_embedding == "learnable":
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))
        elif positional_embedding == "sine":
            self.register_buffer("pos_embed", sine_embedding(tokens, embed_dim))
        elif positional_embedding == "none":
            self.pos_embed = None
        else:
            raise UserError(f"--positional-embedding {positional_embedding}: choose from learnable, sine, none")
        self.drop = Dropout(drop)
        spec = AttentionSpec(embed_dim, num_heads, self.grid, class_token, qkv_bias=False, attn_drop=attn_drop)
        self.blocks = nn.ModuleList(
            CompactBlock(spec, attention=attention, mlp_ratio=mlp_ratio, drop=drop, drop_path=rate)
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = None if class_token else SequencePooling(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.initialise()

    def initialise(self):
        """As in the authors' code: linear layers truncated normal 0.02, positions 0.2, convolutions He-normal."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.tokenizer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.trunc_normal_(self.pos_embed, std=0.2)

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)  # faster for convolutions
        x = self.tokenizer(images).flatten(2).mT  # (B, N, dim)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, dim)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        x = x[:, 0] if self.pool is None else self.pool(x)  # (B, dim)
        return self.head(x)  # (B, num_classes)


@torch.no_grad()
def token_grid(tokenizer, image_size):
    """(rows, columns) of the tokens of an image; image_size is a number of pixels or (height, width).

    Raises UserError if the image is not divisible into patches, or so small that it is a single token.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(tokenizer, nn.Conv2d):
        patch = tokenizer.stride[0]
        for side in sides:
            if side % patch:
                raise UserError(f"--image-size {side}: must be a multiple of {patch}, the side of a patch")
    channels = next(tokenizer.parameters()).shape[1]
    grid = tuple(tokenizer(torch.zeros(1, channels, *sides)).shape[2:])
    if max(grid) == 1:
        enough = next(s for s in itertools.count(max(sides)) if tokenizer(torch.zeros(1, channels, s, s)).shape[2] > 1)
        raise UserError(f"--image-size {max(sides)} is too small: the image is a single token; use {enough} or more")
    return grid


CCT_SMALL = partial(CompactTransformer, embed_dim=128, num_heads=2, mlp_ratio=1.0)
COMPACT_MODELS = {
    "vit_lite_6_4": partial(CompactTransformer, depth=6, class_token=True),
    "vit_lite_7_4": partial(CompactTransformer, depth=7, class_token=True),
    "cvt_6_4": partial(CompactTransformer, depth=6),
    "cvt_7_4": partial(CompactTransformer, depth=7),
    "cct_2_3x2": partial(CCT_SMALL, depth=2, kernel_size=3, conv_layers=2),
    "cct_4_3x2": partial(CCT_SMALL, depth=4, kernel_size=3, conv_layers=2),
    "cct_6_3x1": partial(CompactTransformer, depth=6, kernel_size=3, conv_layers=1),
    "cct_6_3x2": partial(CompactTransformer, depth=6, kernel_size=3, conv_layers=2),
    "cct_7_3x1": partial(CompactTransformer, depth=7, kernel_size=3, conv_layers=1),
    "cct_7_3x2": partial(CompactTransformer, depth=7, kernel_size=3, conv_layers=2),
    "cct_14_7x2": partial(
        CompactTransformer, depth=14, embed_dim=384, num_heads=6, mlp_ratio=3.0, kernel_size=7, conv_layers=2
    ),
}


# ---- models/nano.py: Our own compact transformer: as much accuracy as possible with fewer than half a million parameters.

class InvertedResidual(nn.Module):
    """Widen, depthwise 3x3, narrow (Sandler et al. 2018): (B, in_channels, H, W) to (B, out_channels, H, W).

    With a residual if both have the same number of channels.
    """

    def __init__(self, in_channels, out_channels, *, expansion=3):
        super().__init__()
        hidden = expansion * in_channels
        self.residual = in_channels == out_channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


class NanoBlock(nn.Module):
    """A pre-norm block on (B, N, dim) that knows the grid, by two depthwise convolutions.

    The first encodes positions (Chu et al. 2023); then attention; the second is inside the MLP (Li et al. 2021,
    LocalViT).
    """

    def __init__(self, spec, *, attention, mlp_ratio, drop_path):
        super().__init__()
        hidden = int(spec.dim * mlp_ratio)
        self.where = GridConv(spec.dim, spec.grid)
        self.norm1 = nn.LayerNorm(spec.dim)
        self.attn = make_attention(attention, spec)
        self.norm2 = nn.LayerNorm(spec.dim)
        self.mlp = nn.Sequential(
            nn.Linear(spec.dim, hidden), nn.GELU(), GridConv(hidden, spec.grid), nn.GELU(), nn.Linear(hidden, spec.dim)
        )
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.where(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class NanoTransformer(nn.Module):
    """Inverted residuals down to a quarter of the image's side, then attention blocks, each applied `repeats` times.

    Images (B, C, H, W) to logits (B, num_classes). Applying a block twice (Lan et al. 2020, ALBERT) adds depth without
    parameters: with 100 classes the defaults have 466,517. Raises UserError if the image is too small.
    """

    no_weight_decay = ()

    def __init__(
        self,
        *,
        image_size=32,
        in_channels=3,
        num_classes=10,
        width=48,
        expansion=3,
        conv_layers=1,
        embed_dim=128,
        depth=4,
        repeats=2,
        num_heads=4,
        mlp_ratio=1.0,
        attention="softmax",
        attn_drop=0.0,
        drop_path=0.0,
    ):
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.MaxPool2d(3, 2, 1),
            nn.GELU(),
            *(InvertedResidual(width, width, expansion=expansion) for _ in range(conv_layers)),
            InvertedResidual(width, embed_dim, expansion=expansion),
            nn.MaxPool2d(3, 2, 1),
        )
        self.grid = token_grid(self.tokenizer, image_size)
        self.repeats = repeats
        spec = AttentionSpec(embed_dim, num_heads, self.grid, attn_drop=attn_drop)
        self.blocks = nn.ModuleList(
            NanoBlock(spec, attention=attention, mlp_ratio=mlp_ratio, drop_path=rate)
            for rate in torch.linspace(0, drop_path, depth).tolist()
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = SequencePooling(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        x = self.tokenizer(images.contiguous(memory_format=torch.channels_last))  # (B, dim, rows, columns)
        x = x.flatten(2).mT  # (B, N, dim)
        for block in self.blocks:
            for _ in range(self.repeats):
                x = block(x)
        return self.head(self.pool(self.norm(x)))  # (B, num_classes)


NANO_MODELS = {
    "cct_nano": NanoTransformer,
    "cct_nano_once": partial(NanoTransformer, repeats=1),
    "cct_nano_conv": partial(NanoTransformer, width=64, conv_layers=2, expansion=2),
}


# ---- models/attention2d.py: Attention over the positions of a feature map (B, C, H, W): graph, classic, SAGAN's and SimpleSelfAttention.

class GraphAttention(nn.Module):
    """Graph attention on the nodes (B, N, dim) of a complete graph: A_ij is the softmax over j of σ(q_i + k_j).

    Here q and k are one number per node and head, σ is LeakyReLU(0.2) (Veličković et al. 2018, eq. 3); values and
    output are as in a ViT block. The scores are a broadcast sum, not a matrix product, but two tensors (B, heads, N, N)
    are stored for the backward pass, and a fused kernel stores none. Since σ is monotone, all nodes rank their
    neighbours alike, by k_j (Brody et al. 2022); GraphAttentionV2 fixes that.
    """

    def __init__(self, spec):
        super().__init__()
        self.num_heads = spec.num_heads
        self.query, self.key = (nn.Linear(spec.dim, spec.num_heads, bias=False) for _ in range(2))
        self.activation = nn.LeakyReLU(0.2)
        self.softmax = nn.Softmax(dim=-1)
        self.value = nn.Linear(spec.dim, spec.dim, bias=spec.qkv_bias)
        self.proj = nn.Linear(spec.dim, spec.dim)

    def scores(self, x):
        q, k = self.query(x).mT, self.key(x).mT  # (B, heads, N) each
        return self.activation(q[..., :, None] + k[..., None, :])  # (B, heads, N, N)

    def forward(self, x):
        v = self.value(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        x = self.softmax(self.scores(x)) @ v  # (B, heads, N, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, dim)


class GraphAttentionV2(GraphAttention):
    """Graph attention whose ranking depends on the node: scores a · σ(W_Q h_i + W_K h_j), with one vector a per head.

    Brody et al. 2022, eq. 7. For the backward pass it stores two tensors (B, N, N, dim), dim / heads times as much as
    GraphAttention.
    """

    def __init__(self, spec):
        super().__init__(spec)
        self.query, self.key = (nn.Linear(spec.dim, spec.dim, bias=False) for _ in range(2))
        self.a = nn.Parameter(torch.empty(spec.num_heads, spec.dim // spec.num_heads))
        nn.init.xavier_uniform_(self.a)

    def scores(self, x):
        q, k = (layer(x).unflatten(2, (self.num_heads, -1)) for layer in (self.query, self.key))  # (B, N, heads, d)
        pairs = self.activation(q[:, :, None] + k[:, None])  # (B, N, N, heads, d)
        return torch.einsum("bijhd,hd->bhij", pairs, self.a)  # (B, heads, N, N)


NODE_ATTENTIONS = {"graph": GraphAttention, "graph_v2": GraphAttentionV2, "classic": MultiHeadAttention}


def add_scaled(x, gamma, change):
    """x + γ·change in the precision of x, so that γ = 0 changes no bit, even under autocast."""
    return x + gamma.to(x.dtype) * change


class NodeAttention2d(nn.Module):
    """x + γ · back(block(nodes(x))) on (B, channels, H, W): a ViT block over patches of the map, the nodes.

    γ is learnable and starts at 0; with gamma=False there is none, as in the survey. patch_size must divide H and W.
    Raises UserError if num_heads does not divide the channels.
    """

    def __init__(self, channels, *, attention, patch_size=1, num_heads=4, gamma=True):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise UserError(f"--num-heads {num_heads} does not divide the {channels} channels of the feature map")
        self.nodes = nn.Conv2d(channels, channels, patch_size, stride=patch_size)
        spec = AttentionSpec(channels, num_heads)
        self.block = Block(spec)  # draws a softmax attention too, as recorded runs did; it is replaced
        self.block.attn = NODE_ATTENTIONS.get(attention, attention)(spec)
        self.back = nn.ConvTranspose2d(channels, channels, patch_size, stride=patch_size)
        self.gamma = nn.Parameter(torch.zeros(1)) if gamma else None

    def forward(self, x):
        nodes = self.nodes(x)  # (B, C, rows, columns)
        change = self.block(nodes.flatten(2).mT)  # (B, N, C)
        change = self.back(change.mT.unflatten(2, nodes.shape[2:]))  # (B, C, H, W)
        return x + change if self.gamma is None else add_scaled(x, self.gamma, change)


def spectral_conv(conv):
    """The convolution, He-normal at the start, with its weight divided by its largest singular value."""
    nn.init.kaiming_normal_(conv.weight)
    return spectral_norm(conv)


class SelfAttention2d(nn.Module):
    """SAGAN's attention on (B, C, H, W) as in fastai (Zhang et al. 2019, eq. 1 to 3): x + γ·o, γ from 0, one head.

    o_j = Σ_i β_ij value_i, where β is the softmax over i of query_i · key_j, not divided by √d. So what the paper calls
    `key` has the role of the query, and `query` that of the key, with C/8 channels each.
    """

    def __init__(self, channels):
        super().__init__()
        widths = (max(1, channels // 8),) * 2 + (channels,)
        convs = (spectral_conv(nn.Conv2d(channels, width, 1, bias=False)) for width in widths)
        self.query, self.key, self.value = convs
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        layers = (self.query, self.key, self.value)
        k, q, v = (layer(x).flatten(2).mT[:, None] for layer in layers)  # (B, 1, N, width) each; roles swapped
        o = attend(q * q.shape[-1] ** 0.5, k, v)  # (B, 1, N, C); attend divides by √d
        return add_scaled(x, self.gamma, o[:, 0].mT.unflatten(2, x.shape[2:]))  # (B, C, H, W)


class SimpleSelfAttention(nn.Module):
    """x + γ · x(xᵀWx) on maps (B, C, H, W), with x as (B, C, N) and γ from 0 (github.com/sdoria/SimpleSelfAttention).

    W is a spectrally normalised convolution along the N positions; `symmetric` averages W and its transpose (in the
    published code the hook of spectral norm undoes that before W is used). xᵀWx is not a distribution.
    Raises UserError for an even kernel size, and for symmetric with a kernel size other than 1.
    """

    sums_to_one = False  # AttentionRecorder refuses such weights

    def __init__(self, channels, *, kernel_size=1, symmetric=False):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"--attention-kernel-size {kernel_size}: must be odd, and at least 1")
        if symmetric and kernel_size != 1:
            raise UserError(f"--symmetric needs --attention-kernel-size 1, not {kernel_size}")
        self.symmetric = symmetric
        self.conv = spectral_conv(nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        weight = self.conv.weight
        if self.symmetric:
            weight = (weight + weight.transpose(0, 1)) / 2
        flat = x.flatten(2)  # (B, C, N)
        _, channels, positions = flat.shape
        mixed = F.conv1d(flat, weight, padding=self.conv.padding)  # Wx, (B, C, N)
        # a mean over positions, until γ multiplies by their number: the sum can overflow float16, and 0 · inf is NaN
        flat = flat * positions**-0.5
        change = self.channels_first(flat, mixed) if channels <= positions else self.positions_first(flat, mixed)
        return add_scaled(x, self.gamma * positions, change.unflatten(2, x.shape[2:]))  # (B, C, H, W)

    @staticmethod
    def channels_first(x, mixed):
        return (x @ x.mT) @ mixed  # the product in brackets is (B, C, C)

    @staticmethod
    def positions_first(x, mixed):
        return x @ (x.mT @ mixed)  # the product in brackets is (B, N, N)


ATTENTIONS2D = ("none", *NODE_ATTENTIONS, "sagan", "simple")


def make_attention2d(
    name, channels, *, patch_size=1, num_heads=4, gamma=True, kernel_size=1, symmetric=False, known=ATTENTIONS2D
):
    """The module `name`, one of `known`, on maps (B, channels, H, W); "none" is the identity.

    A class stands for a node attention. patch_size, num_heads and gamma are for NodeAttention2d, kernel_size and
    symmetric for SimpleSelfAttention. Raises UserError for an unknown name, and for an option that the module does not
    have or cannot use.
    """
    kind, said = ("classic", name.__name__) if isinstance(name, type) else (name, name)
    if kind not in known:
        raise UserError(f"--attention {said}: choose from {', '.join(known)}")
    if kind not in NODE_ATTENTIONS and patch_size != 1:
        raise UserError(f"--attention {said}: --patch-size {patch_size} requires one of {', '.join(NODE_ATTENTIONS)}")
    if kind != "simple" and (symmetric or kernel_size != 1):
        option = "--symmetric" if symmetric else f"--attention-kernel-size {kernel_size}"
        raise UserError(f"--attention {said}: {option} requires --attention simple")
    if kind in NODE_ATTENTIONS:
        return NodeAttention2d(channels, attention=name, patch_size=patch_size, num_heads=num_heads, gamma=gamma)
    if kind == "sagan":
        return SelfAttention2d(channels)
    if kind == "simple":
        return SimpleSelfAttention(channels, kernel_size=kernel_size, symmetric=symmetric)
    return nn.Identity()


# ---- models/resnet.py: ResNets from torchvision's blocks, also for small images, with attention after one of the stages.

STAGES = ("layer1", "layer2", "layer3", "layer4")


def trunk_names(weights):
    """The names in a state dict that belong neither to a module `attention` nor to the head `fc`."""
    return [name for name in weights if not {"attention", "fc"} & set(name.split("."))]


class TrunkAndHead(nn.Module):
    """Images (B, 3, H, W) to logits: a trunk, with or without modules `attention`, and a head `fc` on its mean."""

    no_weight_decay = ()
    class_token = False  # the head weighs all positions equally

    def freeze_trunk(self):
        """Stop training the trunk; its BatchNorm statistics stay fixed too."""
        names = trunk_names(self.state_dict())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in names)
        self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self


def stage_grids(image_size, stem_stride):
    """{stage: (rows, columns)} of the feature maps; image_size is a number of pixels or (height, width)."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    return {name: tuple(-(-side // (stem_stride * 2**i)) for side in sides) for i, name in enumerate(STAGES)}


def node_grid(grids, stage, *, flag="--attention-after", patch_size=1, instead=()):
    """(rows, columns) of the nodes for attention after a stage; grids is from stage_grids.

    Raises UserError if the stage does not exist, if patch_size does not divide its map, and if there is a single node.
    The last message suggests the last stage with more nodes, and what to do `instead`.
    """
    if stage not in grids:
        raise UserError(f"{flag} {stage}: choose from {', '.join(grids)}")
    rows, columns = grids[stage]
    if patch_size < 1 or rows % patch_size or columns % patch_size:
        raise UserError(f"--patch-size {patch_size} does not divide the map of {rows} x {columns} after {stage}")
    if rows == columns == patch_size:
        ways = [f"{flag} {name}" for name in grids if max(grids[name]) > patch_size][-1:] + list(instead)
        ways += ["a smaller --patch-size"] if patch_size > 1 else []
        advice = " or ".join(ways) or "a larger image"
        raise UserError(f"{flag} {stage}: the feature map of {rows} x {columns} is a single node; use {advice}")
    return rows // patch_size, columns // patch_size


def residual_stage(block, in_channels, planes, *, count, stride):
    """One of the four stages: `count` of torchvision's blocks; the first has the stride."""
    channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != channels:
        conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))
    blocks = [block(in_channels, planes, stride, shortcut)] + [block(channels, planes) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


class ResNet(TrunkAndHead):
    """torchvision's ResNet (He et al. 2016) on images (B, C, H, W), with attention after one of its stages.

    image_size is a number of pixels or (height, width). The stem is torchvision's, "imagenet", or "cifar" (3x3, no
    stride, no pooling), the default up to 64 pixels. width is the number of channels in the first stage, or a quarter
    of it in resnet50. attention and its options are those of make_attention2d. `grid` is (rows, columns) of the
    attention's nodes, or of the last feature map. With one seed the trunk starts alike, whatever the attention.
    Raises UserError for an unknown stem, stage or attention, and for an unsuitable patch_size (see node_grid).
    """

    def __init__(
        self,
        *,
        depth=18,
        image_size=32,
        in_channels=3,
        num_classes=10,
        stem=None,
        width=64,
        attention="none",
        attention_after="layer4",
        patch_size=1,
        num_heads=4,
        attention_gamma=True,
        symmetric=False,
    ):
        super().__init__()
        self.depth, self.attention_after = depth, attention_after
        grids = {"cifar": stage_grids(image_size, 1), "imagenet": stage_grids(image_size, 4)}
        if stem is None:
            stem = "cifar" if max(grids["cifar"]["layer1"]) <= 64 else "imagenet"  # layer1 has the size of the image
        if stem not in grids:
            raise UserError(f"--stem {stem}: choose from {', '.join(grids)}")
        if width < 1:
            raise UserError(f"--width {width}: must be at least 1")
        self.grid = grids[stem]["layer4"]
        if attention != "none":
            cifar_helps = stem == "imagenet" and max(grids["cifar"].get(attention_after, (1, 1))) > patch_size
            instead = ["--stem cifar"] if cifar_helps else []
            self.grid = node_grid(grids[stem], attention_after, patch_size=patch_size, instead=instead)

        block, counts = RESNET_BLOCKS[depth]
        kernel_size, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)
        channels = {}
        before = width
        for i, (name, count) in enumerate(zip(STAGES, counts)):
            setattr(self, name, residual_stage(block, before, width * 2**i, count=count, stride=2 if i else 1))
            before = channels[name] = width * 2**i * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        options = {"patch_size": patch_size, "num_heads": num_heads, "gamma": attention_gamma, "symmetric": symmetric}
        self.attention = make_attention2d(attention, channels.get(attention_after), **options)

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)  # faster for convolutions
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))  # (B, width, rows, columns)
        for name in STAGES:
            x = getattr(self, name)(x)  # each stage after the first: twice the channels, half the rows and columns
            if name == self.attention_after:
                x = self.attention(x)
        return self.fc(self.avgpool(x).flatten(1))  # (B, num_classes)


RESNET_BLOCKS = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}
RESNETS = {f"resnet{depth}": partial(ResNet, depth=depth) for depth in RESNET_BLOCKS}


# ---- models/xresnet.py: XResNets as in fastai's code of May 2019 (the tweaks of He et al. 2019), with attention inside stages.

def conv_bn(in_channels, out_channels, kernel_size, *, stride=1, relu=True):
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([nn.ReLU(inplace=True)] if relu else []))


class XResBlock(nn.Module):
    """relu(attention(convs(x)) + shortcut(x)); the shortcut halves the map by average pooling, before its convolution.

    The last normalisation starts at zero, so that the block starts as its shortcut. `attention` is the identity until
    XResNet replaces it.
    """

    def __init__(self, in_channels, channels, *, expansion, stride):
        super().__init__()
        planes = channels // expansion
        if expansion == 1:
            convs = [conv_bn(in_channels, planes, 3, stride=stride), conv_bn(planes, channels, 3, relu=False)]
        else:
            convs = [conv_bn(in_channels, planes, 1), conv_bn(planes, planes, 3, stride=stride)]
            convs += [conv_bn(planes, channels, 1, relu=False)]
        self.convs = nn.Sequential(*convs)
        nn.init.zeros_(self.convs[-1][1].weight)
        self.attention = nn.Identity()
        pool = [] if stride == 1 else [nn.AvgPool2d(2, ceil_mode=True)]
        conv = [] if in_channels == channels else [conv_bn(in_channels, channels, 1, relu=False)]
        self.shortcut = nn.Sequential(*pool, *conv)

    def forward(self, x):
        return F.relu(self.attention(self.convs(x)) + self.shortcut(x), inplace=True)


class XResNet(TrunkAndHead):
    """XResNet on images (B, C, H, W): a stem of three convolutions, four stages, a linear head on the mean.

    attention is "none", "sagan" or "simple", in the last block of each stage in attention_in, between its last
    normalisation and the skip connection (github.com/sdoria/SimpleSelfAttention, 2019). Today's fastai has stem_widths
    (32, 32, 64). image_size is a number of pixels or (height, width). `grid` is (rows, columns) of the last map with
    attention, or of the last feature map.
    Raises UserError for an unknown stage or attention, and for a map of a single node (see node_grid).
    """

    def __init__(
        self,
        *,
        depth=50,
        image_size=128,
        in_channels=3,
        num_classes=10,
        stem_widths=(32, 64, 64),
        attention="none",
        attention_in=("layer1",),
        attention_kernel_size=1,
        symmetric=False,
    ):
        super().__init__()
        if len(stem_widths) != 3:
            raise UserError(f"--stem-widths {' '.join(map(str, stem_widths))}: must be three numbers, such as 32 64 64")
        expansion, counts = XRESNET_BLOCKS[depth]
        stem = zip((in_channels, *stem_widths), stem_widths, (2, 1, 1))
        self.stem = nn.Sequential(*(conv_bn(before, after, 3, stride=stride) for before, after, stride in stem))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = dict(zip(STAGES, (64 * expansion * 2**i for i in range(4))))
        width = stem_widths[-1]
        for name, count in zip(STAGES, counts):
            blocks = []
            for i in range(count):
                stride = 2 if i == 0 and name != "layer1" else 1
                blocks.append(XResBlock(width, channels[name], expansion=expansion, stride=stride))
                width = channels[name]
            setattr(self, name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.fc.bias)

        grids = stage_grids(image_size, 4)
        self.grid = grids["layer4"]
        options = {"kernel_size": attention_kernel_size, "symmetric": symmetric, "known": ("none", "sagan", "simple")}
        for name in sorted(attention_in):
            grid = node_grid(grids, name, flag="--attention-in")
            if attention != "none":
                self.grid = grid
            getattr(self, name)[-1].attention = make_attention2d(attention, channels[name], **options)

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)  # faster for convolutions
        x = self.maxpool(self.stem(images))  # (B, stem_widths[-1], rows, columns)
        for name in STAGES:
            x = getattr(self, name)(x)  # each stage after the first: twice the channels, half the rows and columns
        return self.fc(self.avgpool(x).flatten(1))  # (B, num_classes)


XRESNET_BLOCKS = {18: (1, (2, 2, 2, 2)), 34: (1, (3, 4, 6, 3)), 50: (4, (3, 4, 6, 3)), 101: (4, (3, 4, 23, 3))}
XRESNETS = {f"xresnet{depth}": partial(XResNet, depth=depth) for depth in XRESNET_BLOCKS}


# ---- models/__init__.py: Build a model by its name. A family's file is imported only when one of its models is asked for.

def model_family(name):
    """{name: constructor} of the models that share the beginning of `name`."""
    if name == "vit":
        return {"vit": VisionTransformer}
    if name == "vit_b_16":
        return {"vit_b_16": PretrainedViT}
    if name.startswith("timm:"):
        return {name: partial(TimmViT, name=name.removeprefix("timm:"))}
    if name.startswith("cct_nano"):
        return NANO_MODELS
    if name.startswith(("vit_lite_", "cvt_", "cct_")):
        return COMPACT_MODELS
    if name.startswith("resnet"):
        return RESNETS
    if name.startswith("xresnet"):
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


# ---- pipeline/augment.py: Random transforms of a batch of images on its device; each image draws its own parameters.

def whole_sides(area, aspect):
    """Height and width (..., 2), in whole pixels, of boxes of an area and a ratio width / height."""
    return torch.stack([area / aspect, area * aspect], -1).sqrt().round().long()


def random_sides(sizes, generator, *, scale, ratio, largest, fallback):
    """Height and width (B, 2), in whole pixels, of a random box in each image of sizes (B, 2).

    The box's share of the image's area is uniform in scale, width / height is log-uniform in ratio. The first of ten
    draws that is not larger than `largest` (B, 2) is taken; if none is, `fallback` (B, 2).
    """
    count = len(sizes)
    area = sizes.prod(1, keepdim=True) * torch.empty(count, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(count, 10).uniform_(*torch.tensor(ratio).log().tolist(), generator=generator).exp()
    sides = whole_sides(area, aspect)  # (B, 10, 2)
    fits = ((sides > 0) & (sides <= largest[:, None])).all(2)  # (B, 10)
    first = sides[torch.arange(count), fits.int().argmax(1)]
    return torch.where(fits.any(1, keepdim=True), first, fallback)


def place_boxes(sides, sizes, position):
    """Boxes (B, 4) of top, left, height, width inside images of sizes (B, 2); position (B, 2) is uniform in [0, 1)."""
    room = sizes - sides
    corners = (position * (room + 1)).long().minimum(room)
    return torch.cat([corners, sides], 1)


def normalize(images, mean, std):
    """(images / 255 - mean) / std as float, for images (B, C, H, W) uint8.

    mean and std are tensors (C,) on the images' device, as fractions of 255.
    """
    scale, offset = 1 / (255 * std), -mean / std
    return images.float().mul_(scale[:, None, None]).add_(offset[:, None, None])


# ---- pipeline/crops.py: Random crops of images of any shape, in batches: from memory, or by workers that decode the files.

def random_crops(sizes, generator, *, scale, ratio):
    """Boxes (B, 4) of top, left, height, width in whole pixels, each inside an image of its own size, sizes (B, 2).

    Drawn as in torchvision. If none of ten draws fits, the largest box with the closest ratio to the image's, anywhere
    in it; torchvision centres that box, so that the ends of a wide image never appear.
    """
    height, width = sizes.split(1, dim=1)
    closest = (width / height).clamp(*ratio)
    area = torch.minimum(height, width / closest) ** 2 * closest
    fallback = whole_sides(area, closest)[:, 0]
    sides = random_sides(sizes, generator, scale=scale, ratio=ratio, largest=sizes, fallback=fallback)
    return place_boxes(sides, sizes, torch.rand(len(sizes), 2, generator=generator))


def centre_boxes(sizes, crop_pct):
    """Boxes (B, 4) of centred squares, whose side is crop_pct of the short side of images of sizes (B, 2)."""
    sides = (sizes.amin(1, keepdim=True) * crop_pct).round().long().expand(-1, 2)
    return torch.cat([(sizes - sides) // 2, sides], 1)


def antialiasing_matrices(lengths, size, longest):
    """Matrices (B, size, longest) that resize the first `lengths` (B,) pixels of a row to `size` pixels.

    Bilinear; when shrinking, the filter is as wide as a new pixel, as in PIL and torchvision.
    """
    step = (lengths / size)[:, None, None]
    pixels = torch.arange(longest, device=lengths.device)
    centres = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * step  # (B, size, 1)
    weights = (1 - (pixels + 0.5 - centres).abs() / step.clamp(min=1)).clamp(min=0) * (pixels < lengths[:, None, None])
    return weights / weights.sum(2, keepdim=True)


def cut_together(buffer, starts, widths, boxes, size, channels=3):
    """Crop a box from each of B images and resize it: (B, C, size, size) uint8, without a loop over the images.

    buffer is that of LargeImages.decode_all; starts (B,) is where each image begins in it. starts, widths and boxes are
    on the host. The result differs from torchvision's resized_crop by at most one grey level.
    """
    top, left, height, width = boxes.unbind(1)
    tallest, widest = height.max().item(), width.max().item()
    rows = top[:, None] + torch.arange(tallest).minimum(height[:, None] - 1)  # (B, tallest)
    first = (starts[:, None] + channels * (rows * widths[:, None] + left[:, None])).to(buffer.device, non_blocking=True)
    lines = buffer.unfold(0, channels * widest, 1)  # a view: row i holds the bytes from byte i on
    pixels = lines.index_select(0, first.flatten()).view(*first.shape, -1).float()  # (B, tallest, C * widest)
    height, width = torch.stack([height, width]).to(buffer.device, non_blocking=True)
    pixels = antialiasing_matrices(height, size, tallest) @ pixels  # (B, size, C * widest)
    pixels = pixels.unflatten(2, (widest, channels)).permute(0, 3, 1, 2)  # (B, C, size, widest)
    return (pixels @ antialiasing_matrices(width, size, widest).mT[:, None]).round_().byte()  # (B, C, size, size)


class Crops:
    """Random crops of LargeImages, or centre crops without `scale`; from `buffer`, or else decoded for each crop.

    On the host each crop is torchvision's resized_crop, so that both ways give the same bits.
    """

    def __init__(self, images, *, scale, ratio, seed, buffer=None):
        self.images, self.scale, self.ratio, self.seed, self.buffer = images, scale, ratio, seed, buffer
        num_bytes = images.channels * images.sizes.prod(1)
        self.starts = num_bytes.cumsum(0) - num_bytes

    def cut(self, indices, epoch, step):
        """A batch (B, C, S, S) uint8; its boxes follow from (seed, epoch, step)."""
        sizes, size = self.images.sizes[indices], self.images.image_size
        if self.scale:
            generator = torch.Generator().manual_seed(seed_for("augmentation", self.seed, epoch, step, 1))  # 1: crops
            boxes = random_crops(sizes, generator, scale=self.scale, ratio=self.ratio)
        else:
            boxes = centre_boxes(sizes, self.images.crop_pct)
        if self.buffer is not None and self.buffer.is_cuda:
            return cut_together(self.buffer, self.starts[indices], sizes[:, 1], boxes, size, self.images.channels)
        pairs = zip(indices, boxes.tolist())
        return torch.stack([v2.functional.resized_crop(self.image(i), *box, [size, size]) for i, box in pairs])

    def image(self, index):
        """One image, (C, H, W) uint8."""
        if self.buffer is None:
            pixels = torch.from_numpy(self.images.decode(index))
        else:
            height, width = self.images.sizes[index].tolist()
            shape = height, width, self.images.channels
            pixels = self.buffer[self.starts[index] :][: math.prod(shape)].view(shape)
        return pixels.permute(2, 0, 1)

    def __getitem__(self, key):
        """`cut` for a DataLoader's worker. A UserError is returned: raised, it would become a worker's traceback."""
        try:
            return self.cut(*key)
        except UserError as error:
            return error


@contextmanager
def images_in_memory():
    """A context, or a function's decorator, in which running out of memory is a UserError."""
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        raise UserError("the images do not fit into memory: use a smaller --image-size, or fewer images") from error


# ---- pipeline/decoding.py: From files to pixels: one image, or many on all cores.

ONE_SPEAKER = Lock()


@contextmanager
def open_image(path):
    """A PIL image, not decoded yet. Raises UserError if it cannot be opened, or decoded in the block."""
    try:
        with Image.open(path if hasattr(path, "read") else regular_file(path)) as image:
            if 0 in image.size:
                raise ValueError("it has no pixels")
            yield image
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file raises is open-ended
        raise UserError(f"{path} cannot be decoded as an image ({str(error) or type(error).__name__})") from error


@cache
def warn_once(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


def eight_bits(image, file_format):
    """An image, with 8 bits if it has 16 (PIL makes all above 255 white). Raises ValueError for one of 32 bits."""
    if image.mode == "F" or (image.mode == "I" and file_format not in ("PNG", "PPM")):  # in these two, I has 16 bits
        raise ValueError("its pixels have 32 bits, and what is white is unknown: save it with 8 or 16")
    if not image.mode.startswith("I"):
        return image
    if not parent_process():  # not in each of the workers
        with ONE_SPEAKER:
            warn_once("grey images of 16 bits are scaled to 8: 65,535 is white, and 12-bit values come out dark")
    return Image.fromarray(((np.asarray(image).astype(np.int32) + 128) // 257).astype(np.uint8))


def both_sides(size):
    """(height, width) of an image size, which is a number of pixels or [height, width]."""
    return (size, size) if isinstance(size, int) else tuple(size)


def channels_first(image):
    """A PIL image as an array (C, H, W) uint8."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def upright_image(path, size, channels=3):
    """A PIL image in RGB, or in grey if channels is 1, turned by its EXIF tag.

    A large JPEG is decoded smaller, but no side is shorter than size.
    """
    with open_image(path) as image:
        short, long = sorted(image.size)
        if size * size * long // short > Image.MAX_IMAGE_PIXELS:  # once its short side has this size
            raise ValueError(f"one of its sides is {long // short:,} times as long as the other")
        image.draft("RGB", (size, size))
        return eight_bits(ImageOps.exif_transpose(image), image.format).convert("L" if channels == 1 else "RGB")


def decode_image(path, size, channels=3):
    """One image, (C, H, W) uint8, of a size that both_sides knows."""
    height, width = both_sides(size)
    image = upright_image(path, max(height, width), channels)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return channels_first(image)


def decode_images(paths, size, decode=decode_image, *, channels=3):
    """decode(path, size, channels=channels) of each path, as one array (N, C, H, W) uint8."""
    images = np.empty((len(paths), channels, *both_sides(size)), np.uint8)
    for row, image in enumerate(by_all_cores(partial(decode, size=size, channels=channels), paths)):
        images[row] = image
    return images


def by_all_cores(decode, paths):
    """decode(path) of each path, in order, on all cores, with a progress bar.

    Paths for which it raises UserError are left out, and named together in one UserError at the end.
    """

    def attempt(path):
        try:
            return decode(path)
        except UserError as error:
            return error

    errors = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for result in tqdm(pool.map(attempt, paths), "decoding", len(paths), disable=bar_disabled()):
                if isinstance(result, UserError):
                    errors.append(str(result))
                else:
                    yield result
        finally:
            pool.shutdown(cancel_futures=True)
    if errors:
        more = f"; and {len(errors) - 3:,} more files" if len(errors) > 3 else ""
        raise UserError("; ".join(errors[:3]) + more)


# ---- pipeline/folders.py: A folder of class folders to images, decoded once, on all cores.

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
# what their folders may be called, in any case
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
RUN_FILES = ("last.pt", "last.prev.pt")  # what training leaves in the folder of a run
DECODING = 2  # part of a cache's key: raise it when a file gives other pixels than before
GREY = {1: "-grey", 3: ""}  # {channels: end of the names of caches}


def find_splits(root):
    """(names of the class folders, {split: folder}) of a folder that holds class folders, or train/ and other splits.

    The splits are train, val and test if root has folders named so (see SPLITS), else a single one, "all". If there is
    val/ but no test/, val/ is the test set, as with ImageNet. Raises UserError if the folder cannot be used.
    """
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder")
    check_unclear_splits(root)
    found = [(split, name) for name in subfolders(root) for split in SPLITS if name.lower() in SPLITS[split]]
    named = " and ".join(f"{name}/" for _, name in found)
    folders = {split: root / name for split, name in found}
    folders = {split: folders[split] for split in SPLITS if split in folders} or {"all": root}
    classes = {split: subfolders(folder) for split, folder in folders.items()}
    first, names = next(iter(classes.items()))
    if len(folders) < len(found):
        raise UserError(f"--data-dir {root}: {named}: two of them are the same split; join them")
    if first in ("val", "test"):
        raise UserError(f"--data-dir {root}: it has {named}, but no train/ (if that is a class, rename it)")
    if first == "train" and not names:
        raise UserError(
            f"--data-dir {root}: {folders[first].name}/ has no class folders, as in train/cat/1.jpg"
            " (if it is a class itself, rename it)"
        )
    if first == "train" and len(folders) == 1:
        raise UserError(f"--data-dir {root}: it has {named}, but no test/ or val/ beside it")
    for split, others in classes.items():
        if odd := sorted(set(names) ^ set(others)):
            pair = f"{folders[first].name}/ and {folders[split].name}/"
            raise UserError(f"--data-dir {root}: only one of {pair} has the classes {', '.join(odd)}")
    if len(names) < 2:
        found = f"one class folder ({names[0]})" if names else "no class folder"
        raise UserError(f"--data-dir {root}: it has {found}, but training needs at least two")
    if "val" in folders and "test" not in folders:
        folders["test"] = folders.pop("val")
    return names, folders


def check_unclear_splits(root):
    """Raises UserError for folders such as seg_train/ and seg_test/, which are splits or classes."""
    meant = {}  # {folder: the split that a word of its name says}
    for name in subfolders(root):
        for split in SPLITS:
            if {*re.split(r"[\W_\d]+", name.lower())} & {*SPLITS[split]}:
                meant[name] = split
    unclear = [name for name, split in meant.items() if name.lower() not in SPLITS[split]]
    if unclear and len(set(meant.values())) > 1:
        names = " and ".join(f"{name}/" for name in meant)
        raise UserError(f"--data-dir {root}: {names} look like splits: name them train/ and test/, with class folders")


def read_folder(root, image_size, cache_dir=None, *, channels=3):
    """(class names, {split: (images (N, C, H, W) uint8, labels (N,), file names)}) for the splits of find_splits.

    Images are turned upright by their EXIF tag, resized so that one side fits, and cropped to the centre. image_size is
    a number of pixels or [height, width]. Raises UserError if the folder cannot be used or a file cannot be decoded.
    """
    names, files, splits = list_folder(root)
    paths = [path for path, _, _ in files]
    name = (f"{image_size}px" if isinstance(image_size, int) else "{}x{}px".format(*image_size)) + GREY[channels]
    decode = partial(decode_images, paths, image_size, channels=channels)
    images = cached_array(root, name, files, decode, cache_dir)
    parts = torch.from_numpy(images).split([len(labels) for labels, _ in splits.values()])
    return names, {split: (part, *splits[split]) for split, part in zip(splits, parts)}


def list_folder(root):
    """(class names, files of all splits as in list_images, {split: (labels, file names)}); see find_splits.

    A warning on stderr counts what is not read.
    """
    class_folders, folders = find_splits(root)
    if "test" in folders and (name := folders["test"].name).lower() in SPLITS["val"]:
        print(f"{printable(root.name)} has no test/: {name}/ is the test set")
    all_files, splits, skipped = [], {}, defaultdict(list)
    for split, folder in folders.items():
        found = [(file, y) for y, name in enumerate(class_folders) for file in list_images(folder / name, skipped)]
        files, labels = map(list, zip(*found))
        splits[split] = labels, [printable(Path(path).relative_to(root).as_posix()) for path, _, _ in files]
        all_files += files
    if skipped:
        print(f"warning: not read in {root}: {summary_of(skipped)}", file=sys.stderr)
    return readable_names(root, class_folders), all_files, splits


def printable(name):
    """A file's name as text; bytes that are not UTF-8 as in \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def subfolders(folder):
    """The names of the folders in a folder, sorted, without hidden ones, runs, and folders of runs."""
    try:
        found = [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith((".", "__"))]
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from error
    return sorted(entry.name for entry in found if entry.name != "checkpoints" and not holds_runs(entry))


def holds_runs(folder, depth=2):
    with suppress(OSError):  # list_images names a folder that cannot be read
        for entry in os.scandir(folder):
            below = depth and entry.is_dir(follow_symlinks=False)
            if entry.name in RUN_FILES or (below and holds_runs(entry, depth - 1)):
                return True
    return False


def list_images(folder, skipped, *, of_class=True):
    """(path, size in bytes, modification time and inode) of all images below a folder, sorted.

    Appends the paths of what is not read to the lists in skipped, {kind: paths}. Raises UserError without any image,
    and if there are splits below the folder of a class.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=lambda error: skipped["unreadable"].append(error.filename)):
        if of_class and folders and all(name.lower() in sum(SPLITS.values(), ()) for name in folders):
            raise UserError(f"{parent} holds splits ({', '.join(folders)}): they belong above classes: train/cat/1.jpg")
        if links := [path for name in folders if os.path.islink(path := os.path.join(parent, name))]:
            skipped["linked"] += links
        for path in (os.path.join(parent, name) for name in names if not name.startswith(".")):
            ending = os.path.splitext(path)[1].lower()
            if ending not in EXTENSIONS:
                skipped[ending or "without ending"].append(path)
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror})") from error
            if stat.S_ISREG(status.st_mode):
                found.append((path, status.st_size, f"{status.st_mtime_ns}-{status.st_ino}"))
            else:
                skipped["no regular file"].append(path)
    if not found:
        unread = f"; not read: {summary_of(skipped)}" if skipped else ""
        raise UserError(f"{folder} contains no image ({', '.join(EXTENSIONS)}){unread}")
    return sorted(found)


def summary_of(skipped):
    """How many of each kind, with one as an example."""
    return "; ".join(f"{len(paths):,} {kind}, {paths[0]}" for kind, paths in sorted(skipped.items()))


def readable_names(root, class_folders):
    """Class names; from root/classes.txt if it exists. Each of its lines is a class folder and then a readable name."""
    path = root / "classes.txt"
    if not path.exists():
        return [*map(printable, class_folders)]
    try:
        text = regular_file(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    names = {}
    for line in map(str.strip, text.splitlines()):
        ends = [match.start() for match in re.finditer(r"\s|$", line)]  # a folder's name may hold spaces
        folder = max((line[:end] for end in ends if line[:end] in class_folders), key=len, default=None)
        name = line[len(folder or "") :].strip() or folder
        if folder in names or (folder and name in names.values()):
            raise UserError(f"{path} has {folder} or {name} twice: each class needs one line and a name of its own")
        if folder:
            names[folder] = name
    if missing := [name for name in class_folders if name not in names]:
        raise UserError(f"{path} does not name {', '.join(missing)}: each line is a class folder and then its name")
    return [names[name] for name in class_folders]


def default_cache_dir():
    """The operating system's folder for a user's caches."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "small-image-attention"


def cached_array(root, name, files, make, cache_dir):
    """make(), or its cached result if nothing in `files` (see list_images) has changed since.

    The cache keeps one file per root and name.
    """
    listing = hashlib.sha256(json.dumps([DECODING, files]).encode()).hexdigest()
    key = hashlib.sha256(os.fsencode(f"{root.resolve()} {name}")).hexdigest()[:16]
    cache = Path(cache_dir or default_cache_dir()) / f"{root.resolve().name}-{name}-{key}.npz"
    try:
        with np.load(cache) as saved:
            if saved["listing"] == listing:
                return saved["array"]
    except Exception:
        pass  # missing or damaged; what that raises is open-ended
    array = make()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: np.savez(file, listing=listing, array=array))
    except (OSError, UserError) as error:
        print(f"warning: no cache in {cache.parent}, so the next start decodes again: {error}", file=sys.stderr)
    return array


# ---- pipeline/imagenette.py: fastai's Imagenette and Imagewoof: ten classes of ImageNet each, easy ones and dog breeds.

IMAGENETTES = ("imagenette", "imagewoof")
URL = "https://s3.amazonaws.com/fast-ai-imageclas"
MD5_SUMS = {  # Imagenette's from torchvision; Imagewoof's from catalyst, whose sums of Imagenette are the same
    "imagenette2-160": "e793b78cc4c9e9a4ccc0c1155377a412",
    "imagenette2-320": "3df6f0d01a2c9592104656642f5e78a3",
    "imagenette2": "fe2fc210e6bb7c5664d602c3cd71e612",
    "imagewoof2-160": "3d200a7be99704a0d7509be2a9fbfe15",
    "imagewoof2-320": "0f46d997ec2264e97609196c95897a44",
    "imagewoof2": "9aafe18bcdb1632c4249a76c458465ba",
}
READABLE = {
    **{"n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw"},
    **{"n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump"},
    **{"n03445777": "golf ball", "n03888257": "parachute", "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback"},
    **{"n02088364": "beagle", "n02089973": "English foxhound", "n02093754": "Border terrier"},
    **{"n02096294": "Australian terrier", "n02099601": "golden retriever", "n02105641": "Old English sheepdog"},
    **{"n02111889": "Samoyed", "n02115641": "dingo"},
}


def find_imagenette(name, data_dir, image_size):
    """The folder of imagenette or imagewoof, with train/ and val/: data_dir/imagewoof, or that of fastai's archive.

    The archive has 160 pixels up to --image-size 128, 320 up to 224, else the images' own sizes, as in fastai. If it is
    missing, it is downloaded, and its MD5 sum is checked. Raises UserError if that fails.
    """
    archive = f"{name}2" + ("-160" if image_size <= 128 else "-320" if image_size <= 224 else "")
    folder = Path(data_dir, archive)
    for found in (Path(data_dir, name), folder):
        if (found / "train").is_dir():
            return found
    partial_folder = Path(data_dir, f".{archive}.part")  # renamed when complete
    try:
        download_and_extract_archive(f"{URL}/{archive}.tgz", data_dir, partial_folder, md5=MD5_SUMS[archive])
        os.replace(partial_folder / archive, folder)
        partial_folder.rmdir()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {data_dir} and cannot be downloaded ({error}): "
            f"put {archive}.tgz or its folder {archive} there, or set --data-dir to its folder"
        ) from error
    return folder


# ---- pipeline/large.py: Images of any shape: training images get new crops in every epoch (see crops.py), test images one.

CROP_PCT = 0.875  # side of a test image's centre crop, as a fraction of the image's short side
MAX_SIDE = 2  # largest short side of a training image in memory, in sides of a crop: few crops lose detail


@dataclass
class LargeImages:
    """Files of images of any shape. sizes (N, 2) are the upright heights and widths to which they are decoded."""

    root: Path
    files: np.ndarray  # (N, 3), from list_images
    sizes: torch.Tensor
    image_size: int  # side of a crop
    crop_pct: float  # see CROP_PCT
    cache_dir: Path | None
    channels: int = 3

    def __len__(self):
        return len(self.files)

    def __getitem__(self, indices):
        """The LargeImages at `indices`."""
        return replace(self, files=self.files[indices], sizes=self.sizes[indices])

    @property
    def num_bytes(self):
        return self.channels * self.sizes.prod(1).sum().item()

    def cached(self, name, make):
        name = f"{self.image_size}px-{name}{GREY[self.channels]}"
        return cached_array(self.root, name, self.files.tolist(), make, self.cache_dir)

    def decode(self, index):
        """One image, (H, W, C) uint8."""
        height, width = self.sizes[index].tolist()
        image = upright_image(self.files[index, 0], min(height, width), self.channels)
        if image.size != (width, height):
            image = image.resize((width, height), Resampling.BILINEAR)
        return np.array(image).reshape(height, width, self.channels)

    def decode_all(self):
        """The bytes of all images (H, W, C), one after the other, and space for one more line (see cut_together)."""

        def pixels():
            buffer, end = np.empty(self.num_bytes + self.channels * self.sizes[:, 1].max().item(), np.uint8), 0
            for image in by_all_cores(self.decode, range(len(self))):
                start, end = end, end + image.size
                buffer[start:end] = image.ravel()
            return buffer

        return torch.from_numpy(self.cached("whole", pixels))

    def centre_crops(self, split):
        """centre_crop of each image, (N, C, S, S) uint8, cached under the name `split`."""
        crop = partial(centre_crop, crop_pct=self.crop_pct)
        decode = partial(decode_images, self.files[:, 0], self.image_size, crop, channels=self.channels)
        return torch.from_numpy(self.cached(f"{split}-{self.crop_pct:g}", decode))


def centre_crop(path, size, *, crop_pct=CROP_PCT, channels=3):
    """A test image, (C, size, size) uint8: the short side resized to size / crop_pct, then the centre square."""
    short_side = round(size / crop_pct)
    image = resize(upright_image(path, short_side, channels), short_side)
    return channels_first(center_crop(image, size))


def upright_size(path):
    """(height, width) of an image after its EXIF rotation. Decodes no pixel if the format allows that."""
    with open_image(path) as image:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # the orientations with sides swapped
        return image.size if turned else image.size[::-1]


def read_large_folder(root, image_size, cache_dir=None, *, crop_pct=CROP_PCT, channels=3):
    """(class names, {split: (LargeImages, labels, file names)}) for the splits of find_splits and crops of image_size.

    Warns on stderr if some images are smaller. Raises UserError if the folder cannot be used or a file is not an image.
    """
    names, files, splits = list_folder(root)
    paths = [path for path, _, _ in files]
    sizes = cached_array(root, "sizes", files, lambda: np.array([*by_all_cores(upright_size, paths)]), cache_dir)
    short_sides = sizes.min(1, keepdims=True)
    if small := (short_sides < image_size).sum():
        reach = f"smaller than --image-size {image_size} (the smallest: {short_sides.min()} pixels)"
        print(f"warning: {small:,} of {len(sizes):,} images are {reach} and are enlarged", file=sys.stderr)
    largest = MAX_SIDE * image_size
    sizes = torch.from_numpy(np.where(short_sides > largest, sizes * largest // short_sides, sizes))
    images = LargeImages(root, np.array(files, dtype=object), sizes, image_size, crop_pct, cache_dir, channels)
    parts = torch.arange(len(files)).split([len(labels) for labels, _ in splits.values()])
    return names, {split: (images[part], *splits[split]) for split, part in zip(splits, parts)}


# ---- pipeline/pixels.py: What all pixels of a dataset say: their statistics, and which images stand in two splits.

SAMPLE = 2000  # the number of large images from which mean and standard deviation are computed
TESTED = {"val": "validation", "test": "test"}  # {split: what its images are called}


def resized(images, size):
    """Images (N, C, H, W) uint8 resized to size, as both_sides knows it, with antialiasing."""
    sides = both_sides(size)
    if images.shape[2:] == sides:
        return images
    return torch.cat([resize(chunk, list(sides), antialias=True) for chunk in images.split(1000)])


def channel_statistics(images):
    """Mean and standard deviation of each channel over all pixels, as fractions of 255.

    For large images they are computed from a sample, the same whether the images are kept in memory or not.
    """
    if torch.is_tensor(images):
        return statistics_of_chunks(images.split(1000))
    some = images[:: -(-len(images) // SAMPLE)]
    chunks = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in by_all_cores(some.decode, range(len(some))))
    return some.cached("statistics", lambda: np.array(statistics_of_chunks(chunks))).tolist()


def statistics_of_chunks(chunks):
    """channel_statistics of all images in the chunks, each (N, C, H, W) uint8."""
    count, total, squares = 0, 0, 0
    for chunk in chunks:
        chunk = chunk.transpose(0, 1).flatten(1).to(torch.int64)
        count += chunk.shape[1]
        total += chunk.sum(1)
        squares += (chunk * chunk).sum(1)
    mean = total.double() / count
    std = (squares.double() / count - mean**2).sqrt().clamp(min=1)  # a channel of one value is not scaled
    return (mean / 255).tolist(), (std / 255).tolist()


def repeated_images(splits, seen="train", name="training"):
    """How many validation and test images the split `seen` has as well, as text; empty if there are none.

    Images of one size are compared by their pixels, LargeImages by the bytes of their files.
    """
    learnt, found = splits[seen].images, []
    tested = {key: splits[key].images for key in TESTED if key in splits}
    sizes = set()
    if not torch.is_tensor(learnt):
        sizes = {*learnt.files[:, 1]} & {size for images in tested.values() for size in images.files[:, 1]}
    known = {*contents(learnt, sizes)}
    for key, images in tested.items():
        if count := sum(content in known for content in contents(images, sizes)):
            found.append(f"{count:,} of {len(images):,} {TESTED[key]} images")
    return f"{' and '.join(found)} are {name} images as well" if found else ""


def contents(images, sizes):
    """A number for the content of each image, 64 bits; of LargeImages, for that of each file whose size is in sizes."""
    if torch.is_tensor(images):
        yield from (hash(image.tobytes()) for image in images.numpy())
        return
    for path in (path for path, size, _ in images.files if size in sizes):
        try:
            yield hash(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error


# ---- pipeline/splits.py: Splits that a dataset does not come with: of every class the same share, and images of one object on one side.

def made_splits(
    splits, classes, name, *, val_fraction=0.0, test_fraction=0.2, split_seed=0, group_by=None, folds=None, seed=0
):
    """{name: Split} with those that a dataset does not come with: test images out of "all", validation out of "train".

    By split_seed, val_fraction of each class's training images is split off, and test_fraction of "all", or of so many
    folds the one of number seed % folds. group_by is that of group_numbers. Raises UserError if a split is left
    without a class, or if a value has no effect.
    """
    if folds and "all" not in splits:
        raise UserError(f"--folds {folds}: {name} has test images of its own; --folds needs class folders alone")
    if group_by and "all" not in splits and not val_fraction:
        raise UserError(f"--group-by {group_by}: {name} has test images of its own, and there is no --val-fraction")
    divide = partial(split_by_class, classes=classes, group_by=group_by)
    if "all" in splits:
        share, flag = (folds, "--folds") if folds else (test_fraction, "--test-fraction")
        parts = divide(splits["all"], share, seed=(split_seed, 0), flag=flag, part=seed % (folds or 1))
        splits = dict(zip(("test", "train"), parts))
    elif test_fraction != 0.2:  # not the default
        print(f"warning: --test-fraction {test_fraction}: {name} has test images of its own", file=sys.stderr)
    if val_fraction:
        if "val" in splits:
            raise UserError(f"--val-fraction {val_fraction}: {name} has validation images of its own")
        parts = divide(splits["train"], val_fraction, seed=(split_seed, 1), flag="--val-fraction")
        splits["val"], splits["train"] = parts
    return splits


def some_of_each_class(split, classes, count, *, seed):
    """`count` images of each class of a Split. Raises UserError for a class that has fewer."""
    rng, labels, kept = np.random.default_rng(seed), split.labels.numpy(), []
    for label, name in enumerate(classes):
        members = rng.permutation((labels == label).nonzero()[0])
        if len(members) < count:
            raise UserError(f"--train-per-class {count}: class {name} has {len(members)} training images")
        kept += members[:count].tolist()
    return split.pick(torch.tensor(sorted(kept)))


def split_by_class(split, fraction, classes, *, seed, flag, group_by=None, part=0):
    """Two Splits, the first with `fraction` of every class (at least one image), the second with the rest.

    If fraction is a whole number, the first is fold number `part` of so many. group_by is that of group_numbers.
    """
    rng, labels, flag = np.random.default_rng(seed), split.labels.numpy(), f"{flag} {fraction}"
    classes = {name: (labels == label).nonzero()[0] for label, name in enumerate(classes)}  # {name: indices}
    if group_by or fraction >= 1:
        shares = [fraction, 1 - fraction] if fraction < 1 else [1 / fraction] * fraction
        groups = group_numbers(split.names, group_by) if group_by else np.arange(len(labels))
        counts = np.zeros((groups.max() + 1, len(classes)), int)
        np.add.at(counts, (groups, labels), 1)
        parts = place_groups(counts, shares, rng)[groups]
        for name, members in classes.items():
            if len({*parts[members]}) < len(shares):
                flag += f" with --group-by {group_by}" if group_by else ""
                found = f"images: {len(members)}, groups: {len({*groups[members]})}"
                raise UserError(f"{flag} leaves a split without class {name} ({found})")
        return split.pick(torch.from_numpy(parts == part)), split.pick(torch.from_numpy(parts != part))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for name, members in classes.items():
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise UserError(f"{flag} leaves no training image of class {name}, which has {len(members)}")
        chosen[rng.permutation(members)[:count]] = True
    return split.pick(chosen), split.pick(~chosen)


def group_numbers(names, group_by):
    """(N,) int: files in which a regular expression finds the same text have one number, whatever their class.

    The text is that of its first group in parentheses, or all that it matches if it has none. Raises UserError for an
    expression that cannot be compiled, and for a file in which it finds nothing.
    """
    try:
        found = [re.search(group_by, name) for name in map(str, names)]
    except re.error as error:
        raise UserError(f"--group-by {group_by}: not a regular expression ({error})") from error
    texts = [match and match[min(1, match.re.groups)] for match in found]
    if None in texts:
        raise UserError(f"--group-by {group_by}: it finds nothing in {names[texts.index(None)]}")
    return np.unique(texts, return_inverse=True)[1]


def place_groups(counts, shares, rng):
    """(G,) the part of each group, for counts (G, classes) of its images and the share of all images of each part.

    The largest group comes first, equal ones in random order; each goes to the part that lacks most of its classes.
    """
    totals, parts = counts.sum(0), np.empty(len(counts), int)
    lack = np.outer(shares, totals)  # (parts, classes): images
    for group in sorted(rng.permutation(len(counts)), key=lambda group: -counts[group].sum()):
        parts[group] = (lack @ (counts[group] / totals + 1e-9)).argmax()  # 1e-9: among equals, the smallest part
        lack[parts[group]] -= counts[group]
    return parts


# ---- pipeline/shapes.py: The built-in datasets: shapes drawn on textured backgrounds, with a mask of each shape.

SIZE = 32
COUNTS = {"train": 20_000, "val": 2_000, "test": 2_000}
MARGIN = 4
COVERAGE = (0.08, 0.25)  # fractions of the image: a mask covers at least the first, its outline at most the second
CHUNK = 100  # images drawn together: they fit into the processor's cache
# cosine and sine of 256 directions, rounded so that they are the same with every libm
DIRECTIONS = np.round([[np.cos(a), np.sin(a)] for a in np.arange(256) * (2 * np.pi / 256)], 6).astype(np.float32)
CENTRES = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
Y, X = CENTRES[:, None], CENTRES[None, :]


class ShapeSet(NamedTuple):
    images: torch.Tensor  # (N, 3, 32, 32) uint8
    labels: torch.Tensor  # (N,) int64
    masks: torch.Tensor  # (N, 32, 32) bool: the pixels of the shape
    outlines: torch.Tensor  # (N, 32, 32) bool: the mask with its hole filled
    others: torch.Tensor | None = None  # (N, 32, 32) bool: in shapes_pair, the pixels of the other shape alone


def length(x, y):
    return np.sqrt(x * x + y * y)


def box(x, y, width, height):
    return np.maximum(abs(x) - width, abs(y) - height)


def half_planes(x, y, count, distance):
    """Signed distances to `count` lines at `distance` from the origin, in directions at equal angles."""
    angles = np.arange(count) * (2 * np.pi / count)
    return [x * np.float32(round(np.cos(a), 6)) + y * np.float32(round(np.sin(a), 6)) - distance for a in angles]


def star(x, y):
    # inside a pentagram at most one of the five lines is crossed: the second largest distance is negative
    largest, second = np.full_like(x, -9), np.full_like(x, -9)
    for d in half_planes(x, y, 5, 0.382):
        second = np.maximum(second, np.minimum(largest, d))
        largest = np.maximum(largest, d)
    return second


# signed distances (negative inside) to shapes of about unit radius; a hollow shape is (outline, hole)
DISTANCES = {
    "disc": lambda x, y: length(x, y) - 1,
    "ring": (lambda x, y: length(x, y) - 1, lambda x, y: length(x, y) - 0.55),
    "square": lambda x, y: box(x, y, 1, 1),
    "frame": (lambda x, y: box(x, y, 1, 1), lambda x, y: box(x, y, 0.55, 0.55)),
    "triangle": lambda x, y: np.maximum.reduce(half_planes(x, y, 3, 0.6)),
    "star": star,
    "cross": lambda x, y: np.minimum(box(x, y, 1, 0.33), box(x, y, 0.33, 1)),
    "crescent": lambda x, y: np.maximum(length(x, y) - 1, 0.85 - length(x - 0.6, y)),
    "bar": lambda x, y: box(x, y, 1, 0.35),
    "tee": lambda x, y: np.minimum(box(x, y - 0.7, 1, 0.3), box(x, y + 0.3, 0.3, 0.7)),
}
CLASSES = list(DISTANCES)


def unit_area(distances):
    """The area of a shape of unit radius, without its hole."""
    grid = (np.arange(400, dtype=np.float32) - 199.5) / 100
    inside = [d(grid[None, :], grid[:, None]) < 0 for d in distances]
    return (inside[0].sum() - sum(hole.sum() for hole in inside[1:])) / 1e4


def draw_shapes(rng, name, count, *, centre=None, share=1):
    """`count` shapes of a class: coverage of each pixel (N, 32, 32) in [0, 1], masks and outlines (N, 32, 32) bool.

    centre (2, N, 1, 1) are the columns and rows of their centres; share is that of their area in `shapes`.
    """
    distances = DISTANCES[name] if isinstance(DISTANCES[name], tuple) else (DISTANCES[name],)
    unit = unit_area(distances)
    if centre is None:
        centre = MARGIN + (SIZE - 2 * MARGIN) * rng.random((2, count, 1, 1), dtype=np.float32)
    outer, inner = np.empty((2, count, SIZE, SIZE), np.float32)  # distances to the outline and to the hole
    left = np.arange(count)
    while len(left):  # a shape outside COVERAGE is drawn again with another size and angle, at the same centre
        area = rng.random((len(left), 1, 1), dtype=np.float32) * 0.15 + 0.095
        scale = np.sqrt(area * share * SIZE * SIZE / np.float32(unit))
        c, s = DIRECTIONS[rng.integers(256, size=len(left))].T[:, :, None, None]
        x, y = X - centre[0, left], Y - centre[1, left]
        x, y = (x * c + y * s) / scale, (y * c - x * s) / scale
        outer[left] = distances[0](x, y) * scale
        inner[left] = -distances[1](x, y) * scale if len(distances) > 1 else -np.inf
        mask_share = (np.maximum(outer[left], inner[left]) < 0).mean((1, 2))
        outline_share = (outer[left] < 0).mean((1, 2))
        left = left[(mask_share < share * COVERAGE[0]) | (outline_share > share * COVERAGE[1])]
    both = np.maximum(outer, inner)
    return np.clip(np.float32(0.5) - both, 0, 1), both < 0, outer < 0


def draw_backgrounds(rng, count):
    """Two dark colours mixed by smooth noise and stripes, and three strokes of any colour: (N, 3, 32, 32) float32."""
    coarse = rng.random((count, 6, 6), dtype=np.float32)
    position = CENTRES * np.float32(5 / SIZE)
    low, part = position.astype(int), position - np.floor(position)
    rows = coarse[:, low] * (1 - part[:, None]) + coarse[:, low + 1] * part[:, None]
    mix = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part  # (N, 32, 32): the noise, interpolated
    c, s = DIRECTIONS[rng.integers(256, size=count)].T[:, :, None, None]
    frequency, phase = rng.random((2, count, 1, 1), dtype=np.float32)
    wave = (X * c + Y * s) * (np.float32(0.08) + frequency * np.float32(0.15)) + phase
    mix = 0.6 * mix + 0.4 * abs(2 * (wave - np.floor(wave)) - 1)
    colours = rng.integers(0, 120, (2, count, 3, 1, 1)).astype(np.float32)
    images = colours[0] + (colours[1] - colours[0]) * mix[:, None]
    for _ in range(3):
        centre = rng.random((2, count, 1, 1), dtype=np.float32) * SIZE
        half, width = rng.random((2, count, 1, 1), dtype=np.float32) * 3 + np.float32([[[[0.5]]], [[[0.6]]]])
        c, s = DIRECTIONS[rng.integers(256, size=count)].T[:, :, None, None]
        x, y = X - centre[0], Y - centre[1]
        distance = box(x * c + y * s, y * c - x * s, half + width * 0.3, width * 0.3)
        stroke = np.clip(np.float32(0.5) - distance, 0, 1)[:, None]
        images += (rng.integers(0, 256, (count, 3, 1, 1)).astype(np.float32) - images) * stroke
    return images


def draw(rng, name, count):
    """`count` images of one class: (N, 3, 32, 32) float32, masks and outlines (N, 32, 32) bool."""
    coverage, masks, outlines = draw_shapes(rng, name, count)
    images = draw_backgrounds(rng, count)
    colour = rng.integers(120, 256, (count, 3, 1, 1)).astype(np.float32)
    return images + (colour - images) * coverage[:, None], masks, outlines


def draw_pair(rng, name, other, count):
    """draw, with a red shape of the class and a blue one of the class `other`; also the pixels of the latter alone."""
    images, drawn = draw_backgrounds(rng, count), []
    columns = np.where(rng.random(count) < 0.5, 8, 24)  # of the blue one
    for shape in (other, name):
        x, y = rng.random((2, count), dtype=np.float32)
        centre = np.stack([columns - 2 + 4 * x, 8 + 16 * y]).astype(np.float32)[:, :, None, None]
        coverage, masks, outlines = draw_shapes(rng, shape, count, centre=centre, share=np.float32(0.45))
        colour = [rng.integers(low, high, count) for low, high in ((160, 256), (0, 90), (0, 90))]
        colour = np.stack(colour[:: 1 if shape is name else -1], 1)[:, :, None, None].astype(np.float32)
        images += (colour - images) * coverage[:, None]
        columns = SIZE - columns
        drawn.append(masks)
    return images, masks, outlines, drawn[0] & ~masks


def make_shapes(split, name="shapes"):
    """The ShapeSet of "train", "val" or "test" of a dataset; all classes have the same number of images."""
    number, pair = list(COUNTS).index(split), name == "shapes_pair"
    count = COUNTS[split]
    order = np.random.default_rng([number, 0]).permutation(count)  # where each drawn image goes
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    masks = np.empty((3 if pair else 2, count, SIZE, SIZE), bool)  # as in a ShapeSet
    labels = np.empty(count, np.int64)

    def fill(start):
        turn, label = divmod(start // CHUNK, len(CLASSES))
        where = order[start : start + CHUNK]
        rng = np.random.default_rng([number, 2 if pair else 1, start])
        if pair:
            other = CLASSES[(label + 1 + turn % 9) % 10]
            pixels, *masks[:, where] = draw_pair(rng, CLASSES[label], other, len(where))
        else:
            pixels, *masks[:, where] = draw(rng, CLASSES[label], len(where))
        noise = rng.integers(0, 32, (2, *pixels.shape), dtype=np.uint8)
        pixels = np.clip(np.rint(pixels + (noise[0].astype(np.float32) - noise[1])), 0, 255).astype(np.uint8)
        if name == "shapes_even":
            pixels = np.where(rng.random((len(where), 1, 1, 1)) < 0.5, 255 - pixels, pixels)
        images[where], labels[where] = pixels, label

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, count, CHUNK)))
    if name == "shapes_shuffled" and split == "train":
        labels = np.random.default_rng([number, 3]).permutation(labels)
    return ShapeSet(*map(torch.from_numpy, (images, labels, *masks)))


# ---- pipeline/policies.py: AutoAugment, RandAugment and TrivialAugment on a batch of uint8 images; each image draws its own operations.

def identity(images, magnitude):
    return images


# ---- pipeline/extra.py: Images from another source, such as generate.py, that take the place of some training images.

def read_extra(root, classes, like):
    """(images (N, C, H, W) uint8, labels (N,), files (N,)) in folders named after some of the classes.

    They are resized to the size of the images `like`. Raises UserError for a folder of another name, and if these are
    large ones, which training crops.
    """
    if not torch.is_tensor(like):
        raise UserError(f"{root}: generated images can only be mixed with images of up to 64 pixels")
    names = subfolders(Path(root))
    if not names or set(names) - set(classes):
        raise UserError(f"{root} must hold folders named after classes of the dataset: {', '.join(classes)}")
    files = [[file for file, *_ in list_images(Path(root, name), defaultdict(list))] for name in names]
    labels = [classes.index(name) for name, some in zip(names, files, strict=True) for _ in some]
    files, (_, channels, *sides) = sum(files, []), like.shape
    return torch.from_numpy(decode_images(files, sides, channels=channels)), torch.tensor(labels), np.array(files)


# ---- pipeline/batches.py: Batches of images on the device: their order and their augmentation.

RATIO = (3 / 4, 4 / 3)  # of a random resized crop without --ratio: as in torchvision


# ---- pipeline/shards.py: More images than a disk holds: training images in tar files of webdataset (shards), read in random order.

WINDOW = 8000  # files in memory, of all workers, among which the next image is drawn
FIRST = 2000  # training images from which mean and standard deviation are computed


class Member(io.BytesIO):
    """A file in a shard; as text, its name."""

    def __str__(self):
        return self.name


def find_shards(pattern):
    """({split: shards}, class names) of --data-dir, say a/train-{000..099}.tar::a/test.tar: the names say the split.

    classes.txt beside the first shard has a line for class 0, for class 1 ... Raises UserError for a missing split or
    file, and for the commands (pipe:) that webdataset would run: they may come out of someone else's checkpoint.
    """
    wds = import_optional("webdataset")
    urls = wds.shardlists.expand_urls(pattern)
    if others := [url for url in urls if urlparse(url).scheme not in ("", "http", "https")]:
        raise UserError(f"--data-dir {others[0]}: shards are files, or addresses that begin with http: or https:")
    words = {url: {*re.split(r"[\W_\d]+", os.path.basename(url).lower())} for url in urls}
    splits = {split: [url for url in urls if words[url] & {*names}] for split, names in SPLITS.items()}
    if missing := [split for split in ("train", "test") if not splits[split]]:
        raise UserError(
            f"--data-dir {pattern}: no file with {missing[0]} in its name, as in {missing[0]}-{{000..099}}.tar"
        )
    path = f"{os.path.dirname(urls[0]) or '.'}/classes.txt"
    try:
        file = wds.gopen(path if urlparse(path).scheme else regular_file(path))
        return splits, file.read().decode().strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): a line for the name of class 0, of class 1 ...") from error


def read_shards(urls, classes):
    """(image as a Member, label) of each sample. Raises UserError if a shard or a sample cannot be used."""
    wds, sample = import_optional("webdataset"), None
    try:
        for url in (url for url in urls if not urlparse(url).scheme):
            regular_file(url)
        for sample in wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples()):
            name, label = f"{os.path.basename(sample['__url__'])}/{sample['__key__']}", sample.get("cls", b"").strip()
            ending = next((ending for ending in EXTENSIONS if ending[1:] in sample), None)
            if not ending or not label.isdigit() or int(label) >= len(classes):
                raise UserError(f"{name} must have an image, as .jpg, and a number below {len(classes)} as .cls")
            member = Member(sample[ending[1:]])
            member.name = name + ending
            yield member, int(label)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a damaged file raises is open-ended
        raise UserError(f"--data-dir: a shard cannot be read ({str(error) or type(error).__name__})") from error
    if not sample:
        raise UserError(f"--data-dir: {urls[0]} holds no images")


class Shards(Crops):
    """Training images in shards, in the place of a Split: their labels are known when they are read.

    Each of R ranks cuts batches of B / R images, and each of its W workers every W-th of them, from every R x W-th
    shard. The order follows from (seed, epoch), R and W. Shards that are too few for an epoch are read again.
    """

    def __init__(self, urls, classes, args):
        self.urls, self.classes, self.args, self.next_place = urls, classes, args, None
        self.images, self.labels = None, torch.full((args.epoch_images,), -1)
        spread = distributed.is_available() and distributed.is_initialized()
        self.rank, self.ranks = (distributed.get_rank(), distributed.get_world_size()) if spread else (0, 1)
        if len(urls) < self.ranks:
            raise UserError(f"--data-dir {args.data_dir}: {len(urls)} shards are too few for {self.ranks} processes")
        if args.workers is None:
            args.workers = min(os.cpu_count(), 16)  # kept in the checkpoint: a resumed run has as many
        self.workers = min(args.workers, len(urls) // self.ranks)

    def hash(self):
        """SHA-256 of the names of the shards: nobody reads them all for it."""
        return hashlib.sha256("\n".join(map(os.path.basename, self.urls)).encode()).hexdigest()

    def samples(self, epoch, worker, workers):
        """The (Member, label) of a worker, without end: shards in random order, then shuffled within the window."""
        shuffle = import_optional("webdataset").shuffle
        rng = random.Random(seed_for("order", self.args.seed, epoch))
        urls = rng.sample(self.urls, len(self.urls))[self.rank + self.ranks * worker :: self.ranks * workers]
        while True:
            yield from shuffle(WINDOW // workers, rng=rng)(read_shards(urls, self.classes))

    def cut(self, indices, epoch, step):
        """(images (B, C, S, S) uint8, labels (B,)) of one step; `indices` only says how many there are."""
        args, workers = self.args, max(1, self.workers)
        if self.next_place != (epoch, step):  # the first step here; what came before it is read, but not decoded
            before = step // workers * (args.batch_size // self.ranks)
            self.left = islice(self.samples(epoch, step % workers, workers), before, None)
        self.next_place = epoch, step + workers
        members, labels = zip(*islice(self.left, max(1, len(indices) // self.ranks)))
        sizes, files = torch.tensor([upright_size(member) for member in members]), np.array(members)[:, None]
        images = LargeImages(None, files, sizes, args.image_size, args.crop_pct, None, args.channels)
        crops = Crops(images, scale=args.scale, ratio=args.ratio or RATIO, seed=args.seed)
        return crops.cut(np.arange(len(members)), epoch, step * self.ranks + self.rank), torch.tensor(labels)


def read_webdataset(args):
    """(class names, Shards, {split: (images, labels, names)}), in which the training images are the FIRST ones."""
    urls, classes = find_shards(args.data_dir)
    crop = partial(centre_crop, crop_pct=args.crop_pct)
    splits = {}
    for split, count in {"test": None, "val": None, "train": FIRST}.items():
        if urls[split]:
            members, labels = zip(*islice(read_shards(urls[split], classes), count))
            images = torch.from_numpy(decode_images(members, args.image_size, crop, channels=args.channels))
            splits[split] = images, torch.tensor(labels), np.array([*map(str, members)])
    return classes, Shards(urls["train"], classes, args), splits


# ---- data.py: From a dataset's name to its images, classes and splits.

SHAPES = ("shapes", "shapes_even", "shapes_pair", "shapes_shuffled")  # drawn, with a mask of each shape
SMALL = 64  # up to this --image-size, a folder's images are resized when they are decoded


class Split(NamedTuple):
    images: torch.Tensor | LargeImages  # (N, C, H, W) uint8; LargeImages in a training split if is_large
    labels: torch.Tensor  # (N,) int64
    names: np.ndarray  # (N,) file names, or indices in the published dataset

    def pick(self, indices):
        return Split(self.images[indices], self.labels[indices], self.names[indices])

    def hash(self, name="sha256"):
        """SHA-256 of labels and pixels; of LargeImages, which keep it in the cache as `name`, of labels and files."""
        digest, large = hashlib.sha256(self.labels.numpy().tobytes()), isinstance(self.images, LargeImages)

        def whole():
            for part in self.images.files[:, 0] if large else [self.images.numpy()]:
                digest.update(Path(part).read_bytes() if large else part)
            return np.frombuffer(digest.digest(), np.uint8)

        return (self.images.cached(name, whole) if large else whole()).tobytes().hex()


class Dataset(NamedTuple):
    """The training, validation (or None) and test images, their classes and their statistics."""

    name: str
    classes: list[str]
    train: Split  # or Shards, of webdataset
    val: Split | None
    test: Split
    mean: list[float]  # of the training images, one per channel, as fractions of 255
    std: list[float]
    whole_hash: str | None = None  # with --folds: of the images of all splits, the same for each fold
    extra: Split | None = None  # with --extra-data: generated images that training mixes in
    repeated: str = ""  # how many images of other splits are training images as well

    def learnt_by_heart(self, count):
        """`count` of the training images, evenly spread, which are the test images as well."""
        if count > (most := len(self.train.labels)):
            raise UserError(f"--overfit {count}: there are {most:,} training images")
        train = self.train.pick(torch.arange(count) * most // count)
        large = isinstance(train.images, LargeImages)
        test = train._replace(images=train.images.centre_crops("overfit")) if large else train
        name = f"{count} images of {self.name}, by heart"
        return self._replace(name=name, train=train, val=None, test=test, repeated="")

    def splits(self):
        """{"train", "val" if there is one, "test", "extra" if there are any: Split}."""
        return {key: split for key in ("train", "val", "test", "extra") if (split := getattr(self, key))}


def count_classes(name, data_dir):
    """The number of classes of a dataset, without reading its images."""
    if name == "folder":
        return len(find_splits(Path(data_dir))[0])
    if name == "webdataset":
        return len(find_shards(data_dir)[1])
    return 100 if name == "cifar100" else 10


def is_large(name, image_size):
    """Whether images keep their shape and are cropped to squares (see large.py), rather than resized to one size."""
    kept = name in ("webdataset", *IMAGENETTES)
    return isinstance(image_size, int) and (kept or (name == "folder" and image_size > SMALL))


@images_in_memory()
def load_dataset(
    name,
    *,
    data_dir,
    image_size,
    channels=3,
    crop_pct=CROP_PCT,
    cache_dir=None,
    dataset_name=None,
    train_per_class=None,
    **how_to_split,
):
    """The images of a dataset, resized to image_size, a number of pixels or [height, width], as a Dataset.

    how_to_split are the keyword arguments of made_splits; of what is left for training, train_per_class images of each
    class are kept. cifar10 and cifar100 may also lie in data_dir as folders, cifar100/train/CLASS/*.png. If is_large,
    the training images are LargeImages, and the others centre crops of crop_pct of the short side. Raises UserError if
    images are missing or cannot be read.
    """
    folder, large = None, is_large(name, image_size)
    if name == "folder":
        folder = Path(data_dir).resolve()
    elif name in IMAGENETTES:
        folder = find_imagenette(name, data_dir, max(both_sides(image_size)))
    elif name.startswith("cifar") and Path(data_dir, name, "train").is_dir():
        folder = Path(data_dir, name)
    if folder:
        read = partial(read_large_folder, crop_pct=crop_pct) if large else read_folder
        classes, splits = read(folder, image_size, cache_dir, channels=channels)
    else:
        classes, splits = (read_shapes if name in SHAPES else read_cifar)(name, data_dir)
    if name != "folder" and len(classes) > (most := count_classes(name, data_dir)):
        raise UserError(f"{folder} has {len(classes)} class folders, but {name} has {most}: use --dataset folder")
    if name in IMAGENETTES:
        classes = [READABLE.get(label, label) for label in classes]
    name = dataset_name or (printable(folder.name) if folder else name)
    splits = {
        key: Split(p if large else resized(p, image_size), torch.as_tensor(y), np.asarray(n))
        for key, (p, y, n) in splits.items()
    }
    whole = splits["all"].hash("sha256-all") if "all" in splits and how_to_split.get("folds") else None
    splits = made_splits(splits, classes, name, **how_to_split)
    if train_per_class:
        seed = how_to_split.get("split_seed", 0), 2
        splits["train"] = some_of_each_class(splits["train"], classes, train_per_class, seed=seed)
    repeated = repeated_images(splits)
    if large:
        for key in splits.keys() - {"train"}:
            splits[key] = splits[key]._replace(images=splits[key].images.centre_crops(key))
    mean, std = channel_statistics(splits["train"].images)
    parts = (splits.get(key) for key in ("train", "val", "test"))
    return Dataset(name, classes, *parts, mean, std, whole_hash=whole, repeated=repeated)


def dataset_of(args, statistics=None):
    """load_dataset with the values of a training script's flags, the attributes of args.

    statistics are the (mean, std) by which images are normalised, if not by their own: those of pretrained weights.
    """
    if args.dataset == "webdataset":
        classes, shards, splits = read_webdataset(args)
        splits = {key: Split(*parts) for key, parts in splits.items()}
        mean, std = statistics or channel_statistics(splits["train"].images)
        return Dataset(args.dataset_name or args.dataset, classes, shards, splits.get("val"), splits["test"], mean, std)
    names = ("image_size", "channels", "crop_pct", "cache_dir", "dataset_name")
    names += ("val_fraction", "test_fraction", "split_seed", "group_by", "folds", "seed", "train_per_class")
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}  # an older checkpoint lacks some
    dataset = load_dataset(args.dataset, data_dir=args.data_dir, **options)
    if getattr(args, "overfit", None):
        dataset = dataset.learnt_by_heart(args.overfit)
    if getattr(args, "extra_data", None):
        extra = Split(*read_extra(args.extra_data, dataset.classes, dataset.train.images))
        repeated = [dataset.repeated, repeated_images({**dataset.splits(), "extra": extra}, "extra", "extra")]
        dataset = dataset._replace(extra=extra, repeated="; ".join(filter(None, repeated)))
    return dataset._replace(mean=statistics[0], std=statistics[1]) if statistics else dataset


def read_shapes(name, data_dir):
    sets = {split: make_shapes(split, name) for split in ("train", "val", "test")}
    return CLASSES, {split: (s.images, s.labels, np.arange(len(s.labels))) for split, s in sets.items()}


def read_cifar(name, data_dir):
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    splits = {}
    for split in ("train", "test"):
        try:
            try:
                found = dataset(data_dir, train=split == "train")
            except RuntimeError:  # missing, or its checksums are wrong
                found = dataset(data_dir, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            advice = f"put {dataset.filename} there, or set --data-dir"
            raise UserError(f"{name} is not in {data_dir} and cannot be downloaded ({error}): {advice}") from error
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        splits[split] = (images, found.targets, np.arange(len(images)))
    return found.classes, splits


# ---- training/archives.py: Files of torch.save: written with a digest, opened without running code, and whatever is wrong with them one line.

DIGEST_SIZE = 32  # bytes


def digest_of(file, size):
    """The digest of the first `size` bytes of an open file."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    file.seek(0)
    for start in range(0, size, 2**20):
        digest.update(file.read(min(2**20, size - start)))
    return digest.digest()


@contextlib.contextmanager
def read_from_outside(what_is_wrong):
    """A context in which any exception is a UserError: what a damaged or crafted file raises is open-ended."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to switch weights_only off
            reason = "not of torch.save, or more than tensors and plain types"
        raise UserError(f"{what_is_wrong} ({shorten(reason, 200, placeholder=' ...')})") from error


def read_archive(path, what_is_wrong, device="cpu"):
    """What torch.save wrote to a file, of tensors and plain types. Raises UserError if it is damaged or another file.

    The digest is checked, or in files without one the zip's checksums, which miss what is wrong in its directory;
    torch.load checks neither. Files of a torch from before 2020 are no zip, and have nothing to check.
    """
    with read_from_outside(what_is_wrong):
        damaged = None
        with open(regular_file(path), "rb") as file:
            if file.read(2) == b"PK":
                archive = zipfile.ZipFile(file)
                if sum(part.file_size for part in archive.infolist()) > os.path.getsize(path):  # torch compresses none
                    raise UserError(f"{path} is damaged (it would fill the memory with more than it holds)")
                right = digest_of(file, os.path.getsize(path) - DIGEST_SIZE) if archive.comment else b""
                damaged = archive.testzip() if right == archive.comment == b"" else right != archive.comment
        if damaged:
            raise UserError(f"{path} is damaged (its checksum is wrong)")
        return torch.load(path, map_location=device, weights_only=True)


# ---- training/ranks.py: Several processes (ranks) that train one model, started by torchrun: what each does, and what they agree on.

def rank_and_ranks():
    """(this process's number, the number of processes); (0, 1) without torchrun."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


# ---- training/memory.py: What to say if training fails: what a batch took that does not fit into the memory, and which size should fit.

def explained(error, run):
    """The UserError for an exception that training raised; None if it is a bug, or a UserError already."""
    if is_memory_error(error):
        return memory_error(error, run)
    if "more than 1 value per channel" in str(error):
        said = "BatchNorm cannot learn from a last batch of one image; use --drop-last or another --batch-size"
        return UserError(f"--batch-size {run.args.batch_size}: {said}")
    if "DataLoader worker" in str(error):  # raised wherever the main thread is, by a signal handler of torch's
        return UserError("one of the --workers that decode images was killed; if memory was used up, fewer take less")
    if "does not have a deterministic implementation" in str(error):
        return UserError(f"--deterministic: {str(error).splitlines()[0]}")
    if rank_and_ranks()[1] > 1 and re.search("gloo|nccl", f"{type(error)} {error}", re.IGNORECASE):
        return UserError(f"another process of this run has ended; {run.folder}/last.pt holds what was saved")


def memory_error(error, run):
    """A UserError with the batch size, what it took, and the largest batch that should fit (on a GPU)."""
    took, fits = "", ""
    traceback.clear_frames(error.__traceback__)  # they hold the batch's activations
    if run.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(run.device)
        took = f" into the {whole / 2**30:.1f} GiB of {torch.cuda.get_device_name(run.device)}"
        took += f": it took {torch.cuda.max_memory_allocated(run.device) / 2**30:.1f} GiB and needed more"
        with contextlib.suppress(torch.OutOfMemoryError):
            if not hasattr(run.model, "generate") and (size := largest_batch(run)):
                fits = f"; {size} should fit"
    kept = f"; {run.folder}/last.pt holds what was done" if (run.folder / "last.pt").exists() else ""
    patches = "patch_size" in run.model_args and run.model_args.get("attention") != "none"
    fewer = "; a larger --patch-size takes less, too" if patches else ""
    return UserError(f"--batch-size {run.args.batch_size} does not fit{took}{fits}{fewer}{kept}")


def largest_batch(run):
    """The largest power of two that should fit, estimated from a forward and backward pass on eight images; 0 if the
    weights alone fill the memory."""
    device, shape = run.device, run.dataset.test.images.shape[1:]  # (C, H, W)
    run.optimizer.zero_grad()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with run.precision.autocast():
        run.model(torch.zeros(8, *shape, device=device)).sum().backward()
    per_image = (torch.cuda.max_memory_allocated(device) - held) / 8
    run.optimizer.zero_grad()
    torch.cuda.empty_cache()
    weights = sum(p.numel() * p.element_size() for p in run.model.parameters())
    room = torch.cuda.mem_get_info(device)[0] - 4 * weights  # gradients, and state that the optimiser may not have yet
    most = max(0, int(0.9 * room / per_image))
    return 2 ** (most.bit_length() - 1) if most else 0


# ---- training/device.py: The device: its precision, its name, its memory, and torch.compile on it.

def pick_device(name=None):
    """torch.device of that name; without a name cuda, then mps, then cpu. Raises UserError if there is none.

    Under torchrun, each process on a machine takes a GPU of its own.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind in there if there[kind]]
    try:
        device = torch.device(name or available[0])
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; available: {', '.join(available)}") from error
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type not in available or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        reason = "this machine, or this build of torch, has none"
        raise UserError(f"--device {name}: {reason}; available: {', '.join(available)}")
    if device.type == "cuda":
        check_kernels(device)
    return device


def check_kernels(device):
    """Raises UserError for an NVIDIA GPU that this build of torch has no kernels for."""
    if torch.version.hip:
        return
    own = torch.cuda.get_device_capability(device)
    kinds = torch.cuda.get_arch_list()
    for kind in kinds:  # sm_75 runs on 7.5 and above up to 7.9, compute_90 on all from 9.0
        name, number = kind.rstrip("af").split("_")
        needed = divmod(int(number), 10)
        if needed <= own and (name == "compute" or needed[0] == own[0]):
            return
    name = f"{torch.cuda.get_device_name(device)} (sm_{own[0]}{own[1]})"
    advice = "use --device cpu or an older torch"
    raise UserError(f"--device {device}: this torch has kernels for {' '.join(kinds)}, none for {name}; {advice}")


def has_tf32(device):
    """Whether the device multiplies float32 matrices in TF32: NVIDIA's GPUs do, from the A100 on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def has_bfloat16(device):
    """Whether the device multiplies bfloat16 matrices itself; a T4 only emulates it, though torch says yes."""
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


@functools.cache
def onednn_keeps_float32():
    """Whether oneDNN, allowed to use bfloat16 within a product of float32 matrices, keeps to float32 on this CPU.

    By default torch multiplies by MKL, which takes twice as long on an AMD Zen 5. This permission is the only way to
    oneDNN, which really uses bfloat16 on CPUs with AMX. Three products, in the layouts of a linear layer, tell.
    """
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    pairs = ((a, b), (a, b.mT), (a.mT, b))
    error = max((left @ right - left.double() @ right.double()).abs().max().item() for left, right in pairs)
    settings.fp32_precision = before
    return error < 1e-3  # float32 1e-5, bfloat16 0.1


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory(*, block=2**30, most=2**31 - 1):
    """Let the C library (glibc) keep freed blocks of up to `block` bytes, `most` in all, for the next step.

    Otherwise it returns blocks above 32 MiB to the system in every step and gets them again, page by page: on two Zen 5
    cores a step of CCT-6/3x1 then took a third longer, at the same peak memory. Other C libraries are left alone.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, block)
        library.mallopt(M_TRIM_THRESHOLD, most)


class Precision:
    """Mixed precision on one device: `autocast()` for the forward pass, `scaler` for the backward pass.

    amp is "auto" (bf16 if the device has it, else fp16 on CUDA, else off), "bf16", "fp16", "tf32" (float32 weights and
    activations, multiplied in TF32) or "off" (float32). What remains in float32 under bf16 and fp16 is multiplied in
    TF32 as well. deterministic: the same bits each time, on a GPU as on a CPU. Raises UserError for bf16 and tf32 on a
    device without it.
    """

    def __init__(self, amp, device, *, deterministic=False):
        if amp == "auto":
            amp = "bf16" if has_bfloat16(device) else "fp16" if device.type == "cuda" else "off"
        elif amp == "bf16" and not has_bfloat16(device):
            raise UserError(f"--amp bf16: {device_name(device)} has no bfloat16; use --amp auto")
        elif amp == "tf32" and not has_tf32(device):
            raise UserError(f"--amp tf32: {device_name(device)} has no TF32; use --amp auto")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
            torch.use_deterministic_algorithms(True)
        self.amp, self.device = amp, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)
        if device.type == "cuda":  # after the newer fp32_precision these could not be read
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = amp != "off"
        if device.type == "cpu":
            keep_freed_memory()
        if device.type == "cpu" and amp == "off" and onednn_keeps_float32():
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.amp in ("bf16", "fp16"))


def device_name(device):
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple " + platform.machine()
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


# ---- training/values.py: The types of flags: what turns their text into values, or says what would be right.

# the absolute value of a number is 0 or between these, if it has no upper bound of its own
SMALLEST, LARGEST = 1e-30, {float: 1e9, int: 2**31 - 1}


def number(kind=float, *, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf, optional=False):
    """A flag's type: an int or float with low <= value <= high and above < value < below; optional: or "none"."""
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))

    def convert(text):
        if optional and text == "none":
            return None
        value = kind(text)
        if not (low <= value <= high and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        if min(high, below) == math.inf and value and not SMALLEST <= abs(value) <= LARGEST[kind]:
            bound = f"small: 0, or from {SMALLEST:g}" if abs(value) < 1 else f"large: at most {LARGEST[kind]:g}"
            raise argparse.ArgumentTypeError(f"{text} is too {bound}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type by it
    return convert


def pixels(text):
    """A flag's type: the side of a square, or HEIGHTxWIDTH as [height, width]."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or not 1 <= min(sides) <= max(sides) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be at least 1 and at most 10000, or two as 32x64, not {text}")
    return sides if len(set(sides)) == 2 else sides[0]


def at_least(low, kind=int):
    return number(kind, low=low)


fraction = number(low=0, below=1)
probability = number(low=0, high=1)
seed = number(int, low=0, high=2**63 - 1)


def is_own_class(value):
    """Whether --attention names a class of the user's own, as FILE.py:Class."""
    return isinstance(value, str) and ".py:" in value


# ---- training/flags.py: The flags that all training scripts share, the types of their values, and the parser that explains them.

class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Appends each flag's default to its help."""

    def _get_help_string(self, action):
        default = action.default
        if default in (None, argparse.SUPPRESS) or isinstance(action, argparse._StoreTrueAction):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{action.help} (default: {shown.replace('%', '%%') or 'none'})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, and no exit from a notebook."""

    def __init__(self, description=None, **options):
        formatter = partial(HelpFormatter, max_help_position=30)
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter, **options)

    def parse_known_args(self, args=None, namespace=None):  # parse_intermixed_args calls it, too
        argv = list(command_line() if args is None else args)
        for text in argv:
            if re.fullmatch("--[^=]+=--", text):  # argparse would make an empty list of it
                self.error(f"argument {text[:-3]}: expected a value, not --")
            value = text.partition("=")[2] if text.startswith("--") else text
            longest = max(len(os.fsencode(part)) for part in value.split("/"))
            if longest > 255 or set(text) & set("\n\r\0"):  # no name of a file
                self.error(f"argument {text[:40]!r} is too long, or holds a line break")
        return super().parse_known_args(argv, namespace)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        raise UserError(message + (f"; did you mean {close[0]}?" if close else ""))

    def check_values(self, values):
        """Raises UserError for a value, by its flag, that the command line would not have taken."""
        argv = []
        for action in self._actions:
            value, needed = values.get(action.dest), action.nargs is None and action.default is not None
            if isinstance(value, list) and action.nargs:
                argv += [action.option_strings[0], *map(str, value)]
            elif action.nargs != 0 and (value is not None or needed):
                text = "x".join(map(str, value)) if isinstance(value, list) else value  # --image-size 32x64
                text = "none" if text is None else text  # --clip-grad none
                argv.append(f"{action.option_strings[0]}={text}")
        self.parse_args(argv)


# ---- training/outputs.py: What a run leaves behind to look at: log.csv, curves.png, split.csv, predictions.npz and result.json.

COLUMNS = (  # of log.csv
    *("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy"),
    *("seconds", "images_per_second", "peak_memory_bytes"),
)


# ---- training/own.py: A block of the user's own: the class that --attention FILE.py:Class names. Its file runs only if a flag names it.

def load_own_class(text):
    """The class of nn.Module that FILE.py:Class names; its file runs here. Raises UserError if there is none."""
    flag, (file, _, name) = f"--attention {text}", text.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{flag}: there is no file {file}")
    module_name = f"own_{Path(file).stem}"  # a file data.py must not stand for the project's own
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses and torch.compile look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        last_line = traceback.format_exception_only(error)[-1].strip()
        raise UserError(f"{flag}: {file} cannot be imported: {last_line}") from error
    found = getattr(module, name, None)
    if found is None:
        there = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        raise UserError(f"{flag}: {file} has no class {name}, only {', '.join(there) or 'imports'}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{flag}: {name} must be a class that inherits from nn.Module")
    return found


def confirmed_attention(saved, given, where="the checkpoint"):
    """The --attention of a checkpoint: if it is a class of the user's own, the one `given`, as its file may have moved.

    Raises UserError if such a class is not given again, so that opening a checkpoint runs no file unasked, and if
    another attention is given.
    """
    own = is_own_class(saved)
    if own and not given:
        raise UserError(f"{where}: its attention is your own, and no file runs unasked: give --attention {saved} again")
    same_class = own and is_own_class(given) and saved.rpartition(":")[2] == given.rpartition(":")[2]
    if given and given != saved and not same_class:
        raise UserError(f"{where} is another run: --attention is {saved} there and {given} here")
    return given or saved


def with_own_class(model_args, given):
    """The keyword arguments of a model, with the class itself for an attention FILE.py:Class that is `given` again."""
    attention = confirmed_attention(model_args.get("attention"), given)
    return model_args | {"attention": load_own_class(attention)} if is_own_class(attention) else model_args


# ---- training/checkpoint.py: Checkpoints: written in one piece, opened without running code, resumed exactly.

FORMAT_VERSION = 1


def all_finite(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def finite_weights(weights):
    """Whether no weight or bias of a state dict is infinite or NaN, as a mask in it may be."""
    return all_finite(weight for name, weight in weights.items() if name.endswith(("weight", "bias")))


def image_shape(channels, size):
    """(C, H, W) of images; size is that of --image-size, a number of pixels or [height, width]."""
    return channels, *((size, size) if isinstance(size, int) else size)


FIELDS = {  # what a checkpoint holds: {name: (its type, what is true of a sensible value)}
    "format_version": (int, lambda version: version == FORMAT_VERSION),
    "model": (str,),
    "classes": (list[str], len),
    "image_size": (int | list[int], lambda n: len(s := image_shape(1, n)) == 3 and 0 < min(s) <= max(s) <= 10_000),
    "mean": (list[float], lambda mean: len(mean) in (1, 3)),
    "std": (list[float], lambda std: len(std) in (1, 3) and min(std) > 0),
    "weights": (dict[str, torch.Tensor], len, finite_weights),
    "ema": (dict[str, torch.Tensor] | None, lambda weights: not weights or finite_weights(weights)),
    **dict.fromkeys(("model_args", "optimizer", "scaler"), (dict[str, object],)),
    "schedule": (dict[str, object], lambda s: {type(s.get(k, 0)) for k in ("last_epoch", "_step_count")} == {int}),
    "seed": (int,),
    **dict.fromkeys(("epoch", "step"), (int, lambda number: number >= 0)),
    "sums": (dict[str, torch.Tensor | int | float], lambda sums: not any(getattr(v, "ndim", 0) for v in sums.values())),
    "history": (list[dict[str, int | float | None]], lambda rows: all(set(COLUMNS[:8]) <= row.keys() for row in rows)),
    "args": (dict[str, object], lambda args: is_of_kind([args.get("dataset"), args.get("data_dir")], list[str])),
}


def is_of_kind(value, kind):
    """Whether a value is of a type, which may be built from others as list[str] and dict[str, int | None] are."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(is_of_kind(value, one) for one in inner)
    parts = [value, value.values()] if origin is dict and isinstance(value, dict) else [value]
    return isinstance(value, origin or kind) and all(is_of_kind(x, k) for part, k in zip(parts, inner) for x in part)


def open_checkpoint(path, device="cpu"):
    """The checkpoint in a file. Raises UserError if it is damaged or none, or more than tensors and plain types."""
    if not Path(path).exists():
        raise UserError(f"there is no checkpoint {path}")
    checkpoint = read_archive(path, f"{path} is damaged or no checkpoint", device)
    for name, (kind, *conditions) in FIELDS.items():
        value = checkpoint.get(name, ...) if isinstance(checkpoint, dict) else ...
        if not is_of_kind(value, kind) or not all(holds(value) for holds in conditions):
            what = "no checkpoint of this project, or one of another version of it"
            raise UserError(f"{path} is {what}: {name} is missing, not finite or makes no sense")
    return checkpoint


def position(epoch, step):
    """How far a run has come, from its finished epochs and the steps of the one in progress."""
    return f"in epoch {epoch + 1} after step {step}" if step else f"after epoch {epoch}"


def checkpoint_file(path, which=None):
    """The file of a checkpoint: of a run's folder last.pt, or WHICH.pt; of a file, itself."""
    return path / f"{which or 'last'}.pt" if path.is_dir() else path


def load_checkpoint(path, *, which=None, device="cpu"):
    """The checkpoint in a run's folder (last.pt, or WHICH.pt) or in a file; prints its file, epoch and accuracy.

    If last.pt is missing or damaged, last.prev.pt is opened in its place, with a warning on stderr that names both.
    """
    path = checkpoint_file(Path(path), which)
    try:
        checkpoint = open_checkpoint(path, device)
    except UserError as error:
        previous = path.with_name("last.prev.pt")
        if path.name != "last.pt" or not previous.exists():
            raise
        print(f"warning: {error}: using {previous}", file=sys.stderr)
        path, checkpoint = previous, open_checkpoint(previous, device)
    last = checkpoint["history"][-1] if checkpoint["history"] else {}
    accuracies = [f"{split} {value:.2%}" for split in ("val", "test") if (value := last.get(f"{split}_accuracy"))]
    print(f"{path}: {checkpoint['model']} {position(checkpoint['epoch'], checkpoint['step'])}", *accuracies, sep=", ")
    return checkpoint


def evaluated_weights(checkpoint):
    """The weights that a checkpoint's accuracies belong to: the averaged ones if there are any."""
    return checkpoint["ema"] or checkpoint["weights"]


def rebuild_model(checkpoint, build_model, *, attention=None, generates=False, trained=True):
    """The model of a checkpoint as it was evaluated, in evaluation mode; build_model(name, **model_args) makes it.

    Without `trained` it keeps the random weights of a new model. An attention FILE.py:Class is loaded only if
    `attention` names it again. Raises UserError if the model or a part of it is not known here, if it generates images
    and `generates` is false, or the other way round, or if the weights do not fit it.
    """
    model_args = with_own_class(checkpoint["model_args"], attention)
    with read_from_outside("the checkpoint's weights do not fit its model and model_args"):
        try:
            model = build_model(checkpoint["model"], **model_args)
        except UserError as error:
            advice = "docs/extending.md says how to add a block of your own"
            raise UserError(f"the checkpoint's model cannot be built here: {error}; {advice}") from error
        if hasattr(model, "generate") != generates:
            what = "classifies images: use predict.py" if generates else "generates images: use generate.py"
            raise UserError(f"{checkpoint['model']} {what}")
        if trained:
            model.load_state_dict(evaluated_weights(checkpoint))
    return model.eval()


# ---- training/records.py: Text that others may have written: results, plans, records of images, evaluations.

LARGEST_TEXT = 64 * 2**20  # bytes of a file; the longest result has some thousand


def read_text(path):
    """The text of a file. Raises OSError or ValueError if it cannot be read, never ends, or is above LARGEST_TEXT."""
    with open(regular_file(Path(path)), "rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"it has more than {LARGEST_TEXT // 2**20} MiB")
    return content.decode().replace("\r\n", "\n")


def read_json(path):
    """The value in a JSON file. Raises OSError or ValueError, also if it is nested too deep or is not valid UTF-8."""
    try:
        value = json.loads(read_text(path))
        json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for half of a character, as in \\ud800
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return value


# ---- training/weights.py: The weights that a run starts from: of another run, or of a file that another program wrote.

def weights_hash(model):
    """SHA-256 of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- maps/randomise.py: Maps of a model whose weights are redrawn, layer by layer from the head down (Adebayo et al. 2018).

NOTE = "* finds the object with redrawn weights, too: it shows the image, not what the model has learnt"


def layers_from_the_head(state):
    """{layer: its keys in a state dict}, the last layer first; blocks.3 is a layer."""
    layers = {}
    for key in reversed(state):
        first, *rest = key.split(".")
        layers.setdefault(".".join([first, *rest[:1]]) if rest and rest[0].isdigit() else first, []).append(key)
    return layers


def maps_while_redrawn(model, fresh, explainers, images, classes):
    """{name: maps (B, h, w) of each stage}: one more layer has the weights of the state dict `fresh` at each stage.

    explainers are as evaluate takes them. Afterwards the model has its own weights again.
    """
    own = {key: value.clone() for key, value in model.state_dict().items()}
    mixed, found = dict(own), {name: [] for name in explainers}
    try:
        for keys in layers_from_the_head(own).values():
            mixed |= {key: fresh[key] for key in keys}
            model.load_state_dict(mixed)
            for name, explain in explainers.items():
                found[name].append(explain(images, classes))
    finally:
        model.load_state_dict(own)
    return found


def rank_correlation(maps, others):
    """(B,): Spearman's correlation over the cells of maps (B, h, w); 0 if all cells of one are equal."""
    ranks = [torch.from_numpy(rankdata(one.flatten(1).cpu().numpy(), axis=1)) for one in (maps, others)]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-30)


def learnt_nothing(table):
    """The methods that point at the object more often than the centre does (by two standard errors), although the
    weights are redrawn: they show the image, and not what the model has learnt."""
    chance = table.get("centred gaussian", {}).get("pointing", (1, 0))[0]
    found = {name: row["pointing_redrawn"] for name, row in table.items() if "pointing_redrawn" in row}
    return [name for name, (mean, error) in found.items() if mean - 2 * error > chance]


# ---- maps/evaluate.py: How good a map is: measured by the object's mask, and by deleting and inserting the patches that it ranks.

STEPS = 10  # of deletion, insertion and SaCo, each with a tenth of the patches


def comparable(maps):
    """Maps (B, H, W) as shares of their maximum, rounded to 1e-6, so that rounding errors do not break ties."""
    maps = maps.double().clamp(min=0)
    return (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)).mul(1e6).round() / 1e6


def to_pixels(maps, size):
    """Maps (B, h, w) enlarged to size (H, W) by bilinear interpolation."""
    return F.interpolate(maps[:, None].double(), size, mode="bilinear", align_corners=False)[:, 0]


def pointing_game(maps, masks):
    """(B,): 1 if the map's maximum lies in the mask (Zhang et al. 2016); the share of them if there are several."""
    highest = maps == maps.amax((1, 2), keepdim=True)
    return (highest & masks).sum((1, 2)).double() / highest.sum((1, 2))


def mass_ratio(maps, masks):
    """(B,): the share of the map's mass inside the mask, divided by the mask's share of the image; 1 if uniform."""
    inside = (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-30)
    return inside / masks.double().mean((1, 2))


def average_precision(maps, masks):
    """(B,): average precision of the map as a score of pixels in the mask; the mask's share for a uniform map."""
    scores, order = maps.flatten(1).sort(dim=1, descending=True)  # (B, H * W)
    hits = masks.flatten(1).gather(1, order).double()
    count = scores.shape[1]
    positions = torch.arange(count, device=maps.device)
    precision = hits.cumsum(1) / (positions + 1)  # of the pixels up to each position
    # pixels with the same score pass a threshold together: each takes the precision at the last of them
    is_last = torch.ones_like(scores, dtype=torch.bool)
    is_last[:, :-1] = scores[:, :-1] != scores[:, 1:]
    last = torch.where(is_last, positions, count).flip(1).cummin(1).values.flip(1)  # the next such position
    return (precision.gather(1, last) * hits).sum(1) / hits.sum(1)


def segmentation(maps, masks):
    """Pixel accuracy (B,) and mean IoU (B,) of object and background, if pixels above the map's mean are the object."""
    chosen = maps > maps.mean((1, 2), keepdim=True)
    accuracy = (chosen == masks).double().mean((1, 2))
    ious = []
    for a, b in ((chosen, masks), (~chosen, ~masks)):
        ious.append((a & b).sum((1, 2)).double() / (a | b).sum((1, 2)).clamp(min=1))
    return accuracy, (ious[0] + ious[1]) / 2


def against_masks(maps, masks, outlines, others=None):
    """{measure: (B,)} of maps (B, h, w), enlarged to the size of masks, outlines and others (B, H, W) bool."""
    maps = comparable(to_pixels(maps.cpu(), masks.shape[1:]))  # on the CPU: not all devices have float64
    accuracy, miou = segmentation(maps, masks)
    return {
        "pointing": pointing_game(maps, masks),
        "pointing_filled": pointing_game(maps, outlines),
        **({} if others is None else {"pointing_other": pointing_game(maps, others)}),
        "mass_ratio": mass_ratio(maps, masks),
        "average_precision": average_precision(maps, masks),
        "pixel_accuracy": accuracy,
        "miou": miou,
    }


def over_patches(model, maps):
    """Maps (B, h, w) averaged over each of the model's patches: (B, rows, columns). Padding does not count."""
    padding = getattr(model, "padding", (0, 0, 0, 0)) if maps.shape[1:] != model.grid else (0, 0, 0, 0)
    inside = F.pad(torch.ones_like(maps), padding)
    return F.adaptive_avg_pool2d(F.pad(maps, padding), model.grid) / F.adaptive_avg_pool2d(inside, model.grid)


@torch.no_grad()
def by_removal(model, images, maps, classes):
    """{"deletion", "insertion": curves (B, STEPS + 1) (Petsiuk et al. 2018), "saco": (B,)}.

    The curves are the probabilities of `classes` (B,) while the patches of normalised images (B, C, H, W) are replaced
    by the mean colour, the most relevant first, and while they are inserted into an image of the mean colour. maps is
    (B, rows, columns), one value per patch. For saco, each tenth of the patches is replaced by itself.
    """

    def probability(inputs):
        probabilities = model(inputs).float().softmax(1).expand(len(classes), -1)
        return probabilities.gather(1, classes[:, None])[:, 0]

    # the argsort of an argsort is each patch's rank, (B, rows * columns); 0 is the most relevant
    height, width = images.shape[2:]
    _, right, _, bottom = getattr(model, "padding", (0, 0, 0, 0))
    rank = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    ends = [round(step / STEPS * rank.shape[1]) for step in range(STEPS + 1)]
    parts = [((low <= rank) & (rank < high)).unflatten(1, maps.shape[1:]) for low, high in itertools.pairwise(ends)]
    whole, empty = probability(images), probability(torch.zeros_like(images[:1]))  # zero is the mean colour
    deletion, insertion, drops, removed = [whole], [empty], [], 0
    for part in parts:
        part = F.interpolate(part[:, None].float(), (height + bottom, width + right), mode="nearest")
        part = part[..., :height, :width]  # (B, 1, H, W)
        drops.append(whole - probability(images * (1 - part)))
        removed = removed + part
        if len(drops) < STEPS:
            deletion.append(probability(images * (1 - removed)))
            insertion.append(probability(images * removed))
    shares = torch.stack([(maps * part).sum((1, 2)) for part in parts], 1)
    curves = {"deletion": torch.stack([*deletion, empty], 1), "insertion": torch.stack([*insertion, whole], 1)}
    return curves | {"saco": saco(shares, torch.stack(drops, 1))}


def saco(shares, drops):
    """(B,) in -1 ... 1: the salience-guided faithfulness coefficient (Wu et al. 2024, algorithm 1).

    shares (B, K) are what a map gives to K groups of patches, the highest first, drops (B, K) how far the probability
    falls without each. Each pair of groups counts by the difference of its shares, as negative if the group with the
    larger share has the smaller drop. 0 if all shares are equal.
    """
    first, second = torch.triu_indices(shares.shape[1], shares.shape[1], offset=1)
    weights = shares[:, first] - shares[:, second]  # (B, K * (K - 1) / 2), none negative
    signs = torch.where(drops[:, first] >= drops[:, second], 1.0, -1.0)
    return (weights * signs.to(weights)).sum(1) / weights.sum(1).clamp(min=1e-30)


def area_under(curves):
    """(B,): the area under curves (B, steps) over the unit interval, by the trapezoidal rule."""
    return torch.trapezoid(curves.double(), dx=1 / (curves.shape[1] - 1), dim=1)


BASELINES = ("uniform", "centred gaussian", "random")


def centred_gaussian(grid):
    """A map (rows, columns) that always points at the centre; its standard deviation is a quarter of each side."""
    rows, columns = (((torch.arange(n) + 0.5) / n - 0.5) * 4 for n in grid)
    return torch.exp(-0.5 * (rows[:, None] ** 2 + columns[None, :] ** 2))


def mean_and_error(values):
    """The mean of (N,) values and its standard error."""
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def evaluate(model, batches, explainers, precision, *, masks, fresh=None):
    """({name: {measure: (N,)}}, {name: {measure: mean curve}}) over all N images.

    batches yields normalised images (B, C, H, W). explainers is {name: function}; each function takes (images,
    predicted classes) and returns maps (B, h, w). masks is as from object_masks. With fresh(), which gives a state dict
    of weights that have learnt nothing, the maps are also compared with those of such weights, others for each batch.
    Before a removal of patches, a map is averaged over each patch; only these forward passes use mixed precision.
    """
    found = {name: {} for name in explainers}
    start = 0
    for images in batches:
        with torch.no_grad():
            classes = model(images).argmax(1)
        drawn = {key: mask[start : start + len(images)] for key, mask in masks.items()}
        maps_of = {name: explain(images, classes) for name, explain in explainers.items()}
        learning = {name: explain for name, explain in explainers.items() if name not in BASELINES}
        redrawn = maps_while_redrawn(model, fresh(), learning, images, classes) if fresh else {}
        for name, maps in maps_of.items():
            scores = against_masks(maps, **drawn) if drawn else {}
            patches = over_patches(model, maps)
            if name != "uniform":  # it does not rank the patches
                with precision.autocast():
                    scores |= by_removal(model, images, patches, classes)
            if name in redrawn:
                stages = [rank_correlation(patches, over_patches(model, other)) for other in redrawn[name]]
                scores |= {"redrawn": torch.stack(stages, 1), "rank_correlation": stages[-1]}
                if drawn:
                    scores["pointing_redrawn"] = against_masks(redrawn[name][-1], **drawn)["pointing"]
            for measure, values in scores.items():
                found[name].setdefault(measure, []).append(values.cpu())
        start += len(images)

    scores, curves = {}, {}
    for name, measures in found.items():
        measures = {measure: torch.cat(values) for measure, values in measures.items()}
        curves[name] = {m: values.mean(0).tolist() for m, values in measures.items() if values.ndim == 2}
        scores[name] = {m: area_under(v) if v.ndim == 2 else v for m, v in measures.items() if m != "redrawn"}
    return scores, curves


def baselines(grid):
    """Explainers that ignore the image, for comparison: uniform, Gaussian, random; maps have the shape `grid`."""

    def repeated(one):
        return lambda images, classes: one.to(images.device).expand(len(images), -1, -1)

    generator = torch.Generator().manual_seed(0)

    def random(images, classes):
        return torch.rand(len(images), *grid, generator=generator).to(images.device)

    explainers = repeated(torch.ones(grid)), repeated(centred_gaussian(grid)), random
    return dict(zip(BASELINES, explainers, strict=True))


# ---- maps/draw.py: Figures of maps: over images, layer by layer and head by head, as matrices, deletion curves; and of predictions.

COLOURS = "inferno"


def save_map(path, one_map):
    """Write a map (rows, columns) as .npy."""
    write_atomically(path, lambda file: np.save(file, one_map))


def save_figure(figure, path, dpi):
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi))


def subplots(rows, columns, *, width, height):
    """(figure, axes (rows, columns)) of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(axes, image, title, one_map=None, *, alpha=0.6, interpolation="bilinear"):
    """Draw an image (H, W, C), with a map (rows, columns) over it as shares of the map's maximum; alpha=1 hides it."""
    extent = (0, image.shape[1], image.shape[0], 0)
    axes.imshow(image, extent=extent, cmap="gray", vmin=0, vmax=255)  # the last three for one channel alone
    if one_map is not None:
        shares = one_map / max(one_map.max(), 1e-30)
        axes.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, alpha=alpha, interpolation=interpolation, extent=extent)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def add_colour_bar(figure, grid, *, aspect, label="share of the map's maximum"):
    figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=grid, aspect=aspect, label=label)


def draw_panel(path, images, captions, maps, *, interpolation="bilinear", dpi=150):
    """Write panel_figure to path."""
    save_figure(panel_figure(images, captions, maps, interpolation=interpolation), path, dpi)


def panel_figure(images, captions, maps, *, interpolation="bilinear"):
    """One row per image: the image, then the map of each method over it; a single method is also drawn alone.

    images are (H, W, C) uint8, captions their titles, maps a list of {method: (rows, columns)}.
    """
    methods = list(maps[0])
    columns = [(method, method.replace("_", " "), 0.6) for method in methods]
    if len(methods) == 1:
        columns.insert(0, (methods[0], f"{columns[0][1]}, alone", 1.0))
    width, height = 2.2 * len(columns) + 3, 2.5 * len(images) + 0.1
    figure, grid = subplots(len(images), len(columns) + 1, width=width, height=height)
    for axes_row, image, caption, found in zip(grid, images, captions, maps, strict=True):
        show_image(axes_row[0], image, caption)
        for axes, (method, title, alpha) in zip(axes_row[1:], columns, strict=True):
            show_image(axes, image, title, found[method], alpha=alpha, interpolation=interpolation)
    add_colour_bar(figure, grid, aspect=20 * len(images))
    return figure


def draw_layers(path, image, caption, layers, *, interpolation="bilinear", dpi=150):
    """The map of every layer (a row) and head (a column) over the image; layers is (L, heads, rows, columns)."""
    depth, heads = layers.shape[:2]
    figure, grid = subplots(depth, heads, width=1.3 * heads + 0.8, height=1.45 * depth + 0.4)
    for layer in range(depth):
        for head in range(heads):
            title = f"layer {layer + 1}, head {head + 1}"
            show_image(grid[layer, head], image, title, layers[layer, head], interpolation=interpolation)
    add_colour_bar(figure, grid, aspect=10 * depth, label="share of each\nmap's maximum")
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path, dpi)


def cut_into_patches(model, pixels):
    """An image (C, H, W) uint8 as the model cuts it: (its patches, with white gaps between them; put back together).

    Both are (C, height, width). Raises UserError if the model cuts no patches.
    """
    if not hasattr(model, "patch_size"):
        raise UserError(f"--patches: {type(model).__name__} does not cut an image into patches, as vit does")
    p, grid = model.patch_size, model.grid
    image = F.pad(pixels[None], getattr(model, "padding", (0, 0, 0, 0)), value=128)  # grey for the mean colour
    image = F.interpolate(image, [cells * p for cells in grid], mode="bilinear")  # vit_b_16 enlarges its images
    patches, gap = to_patches(image, p), -(-p // 4)  # (1, N, C * p * p)
    apart = F.pad(patches.unflatten(2, (-1, p, p)), (0, gap, 0, gap), value=255).flatten(2)
    return from_patches(apart, p + gap, grid)[0, :, :-gap, :-gap], from_patches(patches, p, grid)[0]


def draw_patches(path, model, pixels, *, dpi=150):
    """An image (C, H, W) uint8, the patches that the model cuts it into, and these put back together."""
    apart, together = cut_into_patches(model, pixels)
    rows, columns = model.grid
    titles = ("the image", f"{rows} x {columns} patches of {model.patch_size} pixels", "put back together")
    figure, (row,) = subplots(1, 3, width=9, height=3.2)
    for axes, image, title in zip(row, (pixels, apart, together), titles, strict=True):
        show_image(axes, image.permute(1, 2, 0).numpy(), title)
    save_figure(figure, path, dpi)


def draw_matrix(path, matrix, caption, *, dpi=150):
    """A matrix (N, N) of how much each token (a row) takes from each token (a column), on a logarithmic scale."""
    figure, ((axes,),) = subplots(1, 1, width=6, height=5)
    smallest = max(matrix[matrix > 0].min(), matrix.max() * 1e-4)  # zero has no logarithm
    image = axes.imshow(matrix, cmap=COLOURS, norm=LogNorm(smallest, matrix.max(), clip=True), interpolation="nearest")
    axes.set_xlabel("token that is looked at")
    axes.set_ylabel("token that looks")
    axes.set_title(caption, fontsize=9)
    figure.colorbar(image, label="weight (logarithmic)")
    save_figure(figure, path, dpi)


def draw_redrawn(path, curves, layers, caption, *, dpi=150):
    """The rank correlation with the map before, while the weights of these layers are redrawn one after the other."""
    figure, ((axes,),) = subplots(1, 1, width=7, height=4.2)
    found = {name: values["redrawn"] for name, values in curves.items() if "redrawn" in values}
    for number, (name, values) in enumerate(found.items()):
        style = ("-", "--")[number // 10 % 2]
        axes.plot(
            range(len(values) + 1), [1, *values], f"C{number % 10}", linestyle=style, label=name.replace("_", " ")
        )
    axes.set_xticks(range(len(layers) + 1), ["none", *layers], rotation=45, ha="right")
    axes.set(xlabel="redrawn down to", ylabel="rank correlation with the map before")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path, dpi)


def draw_deletion_curves(path, curves, caption, *, dpi=150):
    """The predicted class's probability against the share of patches deleted (left) and inserted (right)."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure, better in zip(panels, ("deletion", "insertion"), ("lower", "higher"), strict=True):
        found = {name: values[measure] for name, values in curves.items() if measure in values}
        for number, (name, values) in enumerate(found.items()):
            share = [100 * step / (len(values) - 1) for step in range(len(values))]
            style = ":" if name in ("random", "centred gaussian") else ("-", "--")[number // 10 % 2]
            axes.plot(share, values, f"C{number % 10}", linestyle=style, label=name.replace("_", " "))
        axes.set_xlabel("patches deleted (%)" if measure == "deletion" else "patches inserted (%)")
        axes.grid(alpha=0.3)
        axes.set_title(f"{measure}: {better} is better", fontsize=9)
    panels[0].set_ylabel("probability of the predicted class")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path, dpi)


# ---- maps/images.py: The images to explain: from the dataset of the checkpoint, or photographs.

class Explained(NamedTuple):
    name: str  # begins the names of the files that are written
    shown: np.ndarray  # (H, W, C) uint8, for figures
    pixels: torch.Tensor  # (C, H, W) uint8, for the model
    label: int | None  # None for a photograph


def checkpoint_dataset(checkpoint, *, data_dir=None, cache_dir=None):
    """The dataset that a checkpoint was trained on, with the same splits."""
    places = {"data_dir": data_dir, "cache_dir": cache_dir}
    places = {name: path for name, path in places.items() if path} | {"extra_data": None}
    return dataset_of(SimpleNamespace(**checkpoint["args"] | places))


def find_split(dataset, name):
    """The dataset's Split of this name. Raises UserError if there is none."""
    if not isinstance(getattr(dataset, name), Split):  # None, or in shards
        kind = "validation" if name == "val" else "training"
        raise UserError(f"--split {name}: {dataset.name} has no {kind} images here")
    return getattr(dataset, name)


def images_at(images, indices):
    """A split's images at these indices, (N, C, H, W) uint8; large training images are cropped as test images are."""
    if torch.is_tensor(images):
        return images[indices]
    crop = partial(centre_crop, crop_pct=images.crop_pct)
    return torch.from_numpy(decode_images(images.files[indices, 0], images.image_size, crop, channels=images.channels))


def chosen_images(dataset, split="test", *, indices=None, class_name=None, count=4):
    """The Explained images of a split at these indices; without any, the first `count`, of one class if it is named.

    Raises UserError for an index out of range, and for a class that is unknown or has no images.
    """
    images, labels, _ = find_split(dataset, split)
    if indices is None:
        label = None if class_name is None else find_class(class_name, dataset.classes, flag="--class")
        fits = torch.ones_like(labels) if label is None else labels == label
        indices = fits.nonzero()[:count, 0].tolist()
        if not indices:
            raise UserError(f"--class {class_name}: the {split} images have none of this class")
    for index in indices:
        if not 0 <= index < len(labels):
            raise UserError(f"--index {index}: there are {len(labels)} {split} images, 0 to {len(labels) - 1}")
    prefix = "" if split == "test" else f"{split}-"
    return [
        Explained(f"{prefix}{index}", pixels.permute(1, 2, 0).numpy(), pixels, labels[index].item())
        for index, pixels in zip(indices, images_at(images, indices), strict=True)
    ]


def photographs(paths, checkpoint):
    """The Explained images in files of any size, cropped as the checkpoint's test images are.

    Raises UserError if a file cannot be read, or if two have the same name, since their maps would be one file.
    """
    if repeated := [name for name, count in Counter(path.stem for path in paths).items() if count > 1]:
        raise UserError(f"--image: several files are named {repeated[0]}, and their maps would be one file; rename one")
    shown, pixels = (pixels_of(paths, checkpoint, least=size) for size in (256, 1))
    files = zip(paths, shown.permute(0, 2, 3, 1).numpy(), pixels, strict=True)
    return [Explained(path.stem, *both, None) for path, *both in files]


def pixels_of(paths, checkpoint, *, least=1):
    """The images in files (N, C, H, W) uint8, cropped as the checkpoint's test images are.

    If the longer side has fewer pixels than `least`, they are enlarged to that, for figures.
    """
    args, size = checkpoint["args"], checkpoint["image_size"]
    large = is_large(args["dataset"], size)
    crop = partial(centre_crop, crop_pct=args.get("crop_pct", CROP_PCT)) if large else decode_image
    sides = both_sides(size)
    sides = [round(side * max(1, least / max(sides))) for side in sides]
    side = sides[0] if large else sides  # large images are square
    return torch.from_numpy(decode_images(paths, side, crop, channels=len(checkpoint["mean"])))


def normalised(pixels, checkpoint, device="cpu"):
    """Images (B, C, H, W) uint8 on the device, normalised by the checkpoint's mean and std."""
    mean, std = (torch.tensor(checkpoint[key], device=device) for key in ("mean", "std"))
    return normalize(pixels.to(device), mean, std)


def object_masks(checkpoint, dataset, indices, split="test"):
    """{"masks", "outlines", "others" if there are any: (N, H, W) bool} of drawn images; empty for other datasets."""
    name, size = checkpoint["args"]["dataset"], dataset.test.images.shape[2:]
    drawn = make_shapes(split, name)._asdict() if name in SHAPES else {}
    return {
        key: F.interpolate(drawn[key][indices, None].float(), size, mode="nearest")[:, 0].bool()
        for key in ("masks", "outlines", "others")
        if drawn.get(key) is not None
    }


def find_class(text, classes, *, flag="--target"):
    """The index of a class given by its name, by its index, or by a beginning or end that no other class has.

    Raises UserError that lists the classes.
    """
    found = [index for index, name in enumerate(classes) if name == text]
    if not found and text.isdecimal() and int(text) < len(classes):
        return int(text)
    found = found or [i for i, name in enumerate(classes) if text and (name.startswith(text) or name.endswith(text))]
    if len(found) == 1:
        return found[0]
    problem = f" fits {len(found)} of them" if found else ""
    raise UserError(f"{flag} {text}{problem}: the classes are {', '.join(classes)}, or 0 to {len(classes) - 1}")


def caption_of(explained, probabilities, classes):
    """The predicted and the true class, with probabilities."""
    best = int(probabilities.argmax())
    caption = f"predicted {classes[best]} ({probabilities[best]:.0%})"
    if explained.label is not None:
        caption += f"\ntrue {classes[explained.label]} ({probabilities[explained.label]:.0%})"
    return caption


# ---- maps/commands.py: What rollout.py and attribute.py share (predict.py, too): flags, what to open, the evaluation of a checkpoint.

ROWS = {"scores": dict[str, dict[str, list[float | int]]], "curves": dict[str, dict], "values": dict[str, list]}
SAME_EVALUATION = ("weights_hash", "data_hash", "split", "images")  # if these agree, tables are merged


def checkpoint_parser(description, name="checkpoint", *, help="a run's folder or a checkpoint file", **positional):
    """A parser with the flags of all commands that open a checkpoint, whose first argument is `name`."""
    parser = Parser(description)
    add = parser.add_argument
    add(name, type=Path, help=help, **positional)
    add("--which", help="a checkpoint of the folder: last, best, best_on_test, epoch-10 (default: last)")
    help_text = "the class of the run's attention again, if it is your own: its file is run"
    add("--attention", metavar="FILE.py:Class", help=help_text)
    add("--data-dir", metavar="DIR", help="where the run's images are, if they have moved since training")
    add("--cache-dir", metavar="DIR", help="where decoded folders are kept (default: where training kept them)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first available)")
    return parser


def maps_parser(description, methods, *, default):
    """A parser with the flags of rollout.py and attribute.py; --method is one of methods, or all."""
    parser = checkpoint_parser(description)
    add = parser.add_argument
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--index", type=int, nargs="+", metavar="N", help="images to explain (default: 0 1 2 3)")
    add_one("--class", dest="class_name", metavar="CLASS", help="explain the first images of this class instead")
    add_one("--image", type=Path, nargs="+", metavar="FILE", help="explain photographs, of any size, instead")
    add_one("--evaluate", action="store_true", help="measure the methods on many images instead of drawing maps")
    add("--split", choices=("train", "val", "test"), default="test", help="where the images are from")
    help_text = "images to evaluate (default: 1000; more give smaller standard errors), or to draw (default: 4)"
    add("--num-images", type=at_least(1), metavar="N", help=help_text)
    add("--method", choices=(*methods, "all"), help=f"(default: {default}; all with --evaluate)")

    add = parser.add_argument_group("figures").add_argument
    add("--out", type=Path, metavar="DIR", help="where to write (default: maps/ in the run's folder)")
    add("--interpolation", choices=("bilinear", "nearest"), default="bilinear", help="nearest shows the patches")
    add("--format", choices=("png", "pdf"), default="png", help="pdf is sharp at any size, for a paper")
    add("--dpi", type=number(int, low=20, high=1200), default=150, help="resolution, from 20 to 1200")

    add = parser.add_argument_group("evaluation").add_argument
    help_text = "also compare the maps with those of redrawn weights, layer by layer from the head down"
    add("--randomise", action="store_true", help=help_text)
    add("--batch-size", type=at_least(1), default=100, help="images per forward pass; lower it if memory runs out")
    return parser


def chosen_methods(args, methods, *, default):
    """The names of the methods to use, out of all `methods`."""
    name = args.method or ("all" if args.evaluate else default)
    return tuple(methods) if name == "all" else (name,)


def open_model(args, *, generates=False):
    """(checkpoint, its model on the device), as the flags of checkpoint_parser say; one that `generates`, or not."""
    device = pick_device(args.device)
    if args.which and args.checkpoint.is_file():
        raise UserError(f"--which {args.which} needs a run's folder, and {args.checkpoint} is a file")
    checkpoint = load_checkpoint(args.checkpoint, which=args.which, device=device)
    return checkpoint, rebuild_model(checkpoint, build_model, attention=args.attention, generates=generates).to(device)


def open_for_maps(args):
    """(checkpoint, model, chosen images, None) to draw, or (checkpoint, model, None, dataset) to evaluate."""
    if args.randomise and not args.evaluate:
        raise UserError("--randomise needs --evaluate")
    checkpoint, model = open_model(args)
    if args.image:
        return checkpoint, model, photographs(args.image, checkpoint), None
    dataset = checkpoint_dataset(checkpoint, data_dir=args.data_dir, cache_dir=args.cache_dir)
    if args.evaluate:
        return checkpoint, model, None, dataset
    choice = {"indices": args.index, "class_name": args.class_name, "count": args.num_images or 4}
    return checkpoint, model, chosen_images(dataset, args.split, **choice), None


def output_folder(args):
    """--out, or maps/ beside the checkpoint. Raises UserError if it cannot be written."""
    return make_folder(args.out or checkpoint_file(args.checkpoint).parent / "maps")


def scores_text(table):
    """A table of evaluate as aligned text: mean ± standard error, with a star at the methods of learnt_nothing."""
    measures = list(dict.fromkeys(measure for row in table.values() for measure in row))
    lines, starred = [["", *measures]], learnt_nothing(table)
    for name, row in table.items():
        cells = ["{:.3f} ± {:.3f}".format(*row[m]) if m in row else "-" for m in measures]
        lines.append([name + " *" * (name in starred), *cells])
    return aligned(lines) + f"\n{NOTE}" * bool(starred)


def read_table(path):
    """What an evaluation.json holds; None if there is none, or a damaged one, which is then replaced."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    whole = is_of_kind(record, dict[str, object]) and "scores" in record
    return record if whole and all(is_of_kind(record.get(name, {}), kind) for name, kind in ROWS.items()) else None


def with_earlier_rows(path, record):
    """The record with the rows that an evaluation.json holds, if they are of the same weights and images."""
    before = read_table(path)
    if not before:
        return record
    if different := [key for key in SAME_EVALUATION if before.get(key) != record[key]]:
        print(f"{path}: its rows have another {' and '.join(different).replace('_', ' ')} and are dropped")
        return record
    return record | {rows: before.get(rows, {}) | record[rows] for rows in ROWS}


def evaluate_checkpoint(args, checkpoint, model, dataset, explainers, out):
    """Evaluate explainers (see evaluate) and the baselines on --num-images images, evenly spread over --split.

    Prints the table and writes evaluation.json and deletion.png to out; their paths are returned. Rows of an earlier
    evaluation of the same weights on the same images are kept.
    """
    split = find_split(dataset, args.split)
    total, wanted = len(split.labels), args.num_images or 1000
    if min(wanted, total) < 2:
        raise UserError(f"--num-images {wanted}: of {total} {args.split} images; a standard error needs two")
    indices = torch.linspace(0, total - 1, min(wanted, total)).round().long()
    masks = object_masks(checkpoint, dataset, indices, args.split)
    device = next(model.parameters()).device

    def batches():
        for chunk in tqdm(indices.split(args.batch_size), "evaluating", disable=bar_disabled(), unit="batch"):
            yield normalised(images_at(split.images, chunk), checkpoint, device)

    torch.manual_seed(0)  # for methods with random numbers
    explainers = explainers | baselines(model.grid)

    def fresh():
        return rebuild_model(checkpoint, build_model, attention=args.attention, trained=False).to(device).state_dict()

    precision = Precision("auto", device)
    try:
        scores, curves = evaluate(
            model, batches(), explainers, precision, masks=masks, fresh=fresh if args.randomise else None
        )
    except Exception as error:
        if is_memory_error(error):
            raise UserError(f"--batch-size {args.batch_size} does not fit into memory; try a smaller one") from error
        raise
    file, ranked_by = checkpoint_file(args.checkpoint, args.which), "pointing" if masks else "saco"
    record = {
        "checkpoint": f"{file.resolve().parent.name} {file.stem}",
        "weights_hash": weights_hash(model),
        "model": checkpoint["model"],
        "epoch": checkpoint["epoch"],
        "dataset_name": dataset.name,
        "data_hash": dataset.train.hash(),
        "split": args.split,
        "images": len(indices),
        "patches": list(model.grid),
        "ranked_by": ranked_by,
        "scores": {name: {m: mean_and_error(of_each) for m, of_each in row.items()} for name, row in scores.items()},
        "curves": curves,
        "values": {name: row[ranked_by].round(decimals=3).tolist() for name, row in scores.items() if ranked_by in row},
    }
    path = out / "evaluation.json"
    record = with_earlier_rows(path, record)
    curves = record["curves"]
    print(scores_text(record["scores"]))
    write_json(path, record)
    caption = f"{len(indices)} {args.split} images of {dataset.name}, epoch {checkpoint['epoch']}"
    draw_deletion_curves(out / "deletion.png", curves, caption, dpi=args.dpi)
    if not any("redrawn" in values for values in curves.values()):
        return [path, out / "deletion.png"]
    draw_redrawn(out / "randomise.png", curves, layers_from_the_head(model.state_dict()), caption, dpi=args.dpi)
    return [path, out / "deletion.png", out / "randomise.png"]


# ---- maps/recorder.py: The attention weights of any model's forward pass, recorded without an edit to the model.

def at_least_float32(x):
    """A bfloat16 or float16 tensor in float32; other tensors as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class AttentionRecorder:
    """Context manager that records the attention weights of every layer while `model` runs.

    After a forward pass, `attentions` is a list of (B, heads, N, N), first layer first, query before key; rows sum to
    1. With gradients=True and after a backward pass, `gradients` is the list of their gradients. `pooling` (B, N) is
    how the model pools its tokens: by a softmax, by a last attention layer with one query (the mean over its heads),
    or uniformly if the model's attribute `class_token` is False; otherwise None. Each forward pass replaces the last.

    Inside the context, torch's scaled_dot_product_attention is replaced by a version that keeps its weights,
    nn.MultiheadAttention always calls it, and submodules named `softmax` are hooked. Leaving restores everything.
    A forward pass raises UserError if the model has no attention, if queries and keys differ in number, or if a module
    has `sums_to_one` False.
    """

    def __init__(self, model, *, gradients=False):
        self.model, self.keep_gradients = model, gradients
        self.weights, self.pooling, self.requests, self.running = [], None, [], False

    def __enter__(self):
        self.fused = F.scaled_dot_product_attention
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        F.scaled_dot_product_attention = self.attend_and_keep
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path calls a fused kernel directly
        softmaxes = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "softmax"]
        multihead = [module for module in self.model.modules() if isinstance(module, nn.MultiheadAttention)]
        self.hooks = [
            self.model.register_forward_pre_hook(self.begin_forward),
            self.model.register_forward_hook(self.end_forward),
            *(module.register_forward_hook(self.keep_softmax) for module in softmaxes),
            *(module.register_forward_pre_hook(self.request_no_weights, with_kwargs=True) for module in multihead),
            *(module.register_forward_hook(self.return_weights) for module in multihead),
        ]
        return self

    def __exit__(self, *exception):
        F.scaled_dot_product_attention = self.fused
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        for hook in self.hooks:
            hook.remove()

    def begin_forward(self, model, inputs):
        self.weights, self.pooling, self.requests, self.running = [], None, [], True

    def end_forward(self, model, inputs, output):
        self.running = False
        name = type(model).__name__
        for module in model.modules():
            if getattr(module, "sums_to_one", None) is False:
                name = type(module).__name__
                raise UserError(f"the weights of {name} are not a distribution and cannot be drawn: use attribute.py")
        # a last layer with one query, (B, heads, 1, N), pools the tokens and is not a layer of the rollout
        if self.weights and self.pooling is None and self.weights[-1].shape[-2] == 1 < self.weights[-1].shape[-1]:
            self.pooling = at_least_float32(self.weights.pop().detach()).mean(1)[:, 0]  # (B, N)
        if not self.weights:
            raise UserError(f"{name} has no attention to record: use attribute.py, which explains any model")
        for weights in self.weights:
            queries, keys = weights.shape[-2:]
            if queries != keys:
                raise UserError(f"{name} attends from {queries} tokens to {keys} others: use attribute.py instead")
        if self.pooling is None and getattr(model, "class_token", None) is False:
            weights = self.attentions[-1]
            self.pooling = weights.new_full((len(weights), weights.shape[-1]), 1 / weights.shape[-1])

    def keep(self, weights):
        if self.keep_gradients:
            if not weights.requires_grad:  # all parameters are frozen: the graph begins here
                weights.requires_grad_()
            weights.retain_grad()
        self.weights.append(weights)

    def keep_softmax(self, module, inputs, output):
        if output.ndim == 4:  # (B, heads, N, N): attention that does not call scaled_dot_product_attention
            self.keep(output)
        elif output.ndim == 3 and 1 in output.shape[1:]:  # (B, N, 1) or (B, 1, N): sequence pooling
            self.pooling = at_least_float32(output.detach().flatten(1))

    def request_no_weights(self, module, inputs, options):
        """Call nn.MultiheadAttention with need_weights=False: only then does it use scaled_dot_product_attention."""
        if not self.running:
            self.requests.append((False, False))  # return_weights takes one entry per call
            return None
        call = inspect.signature(module.forward).bind(*inputs, **options)
        call.apply_defaults()
        self.requests.append((call.arguments["need_weights"], call.arguments["average_attn_weights"]))
        call.arguments["need_weights"] = False
        return call.args, call.kwargs

    def return_weights(self, module, inputs, output):
        """Return the recorded weights to a caller of nn.MultiheadAttention that requested weights."""
        requested, averaged = self.requests.pop()
        if not requested:
            return None
        weights = self.weights[-1].mean(1) if averaged else self.weights[-1]
        return output[0], weights if output[0].ndim == 3 else weights[0]  # inputs may have no batch dimension

    def attend_and_keep(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        """torch's scaled_dot_product_attention written out, with the softmax in float32 or finer."""
        if not self.running:  # another model: only the forward pass of self.model is recorded
            return self.fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if options.get("enable_gqa"):  # several query heads share a key head
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights = weights.reshape(len(weights), -1, *weights.shape[-2:])  # (B, heads, N, N); (B, N, N) is one head
        self.keep(weights)
        return F.dropout(weights, dropout_p).view_as(scores).to(value.dtype) @ value

    @property
    def attentions(self):
        return [at_least_float32(weights.detach()) for weights in self.weights]

    @property
    def gradients(self):
        """Raises RuntimeError without gradients=True or before a backward pass."""
        if not self.keep_gradients or any(weights.grad is None for weights in self.weights):
            raise RuntimeError("no gradients yet: use AttentionRecorder(model, gradients=True), then a backward pass")
        return [weights.grad for weights in self.weights]


# ---- maps/methods.py: Methods that join the attention of a model's layers into one matrix, and the maps of such matrices.

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


# ---- rollout.py: Draw where a model's attention looks, or measure how well its maps point at the object.

def rollout_parser():
    parser = maps_parser(__doc__, METHODS, default="rollout")
    add = parser.add_argument_group("the map").add_argument
    add("--head-fusion", choices=("mean", "max", "min"), default="mean", help="how a layer's heads are joined")
    help_text = "set this share of each row, the lowest weights, to zero, say 0.9 if maps are noisy"
    add("--discard-ratio", type=fraction, default=0.0, metavar="F", help=help_text)
    add("--target", metavar="CLASS", help="the class that methods with gradients explain (default: the predicted one)")
    add("--layers", action="store_true", help="also draw every layer and head by itself")
    add("--matrix", action="store_true", help="also draw the method's whole matrix from tokens to tokens")
    help_text = (
        "also draw the matrix of these layers' attention, numbered from 1; with --evaluate, their heads are rows"
    )
    add("--layer", type=at_least(1), nargs="+", metavar="N", default=[], help=help_text)
    add("--patches", action="store_true", help="also draw the image cut into the patches that a ViT sees")
    return parser


def draw_maps(args, model, checkpoint, chosen, out):
    """Write the maps of each chosen image, and a panel of all images; returns the paths."""
    classes = checkpoint["classes"]
    methods = chosen_methods(args, METHODS, default="rollout")
    label = methods[0] if len(methods) == 1 else "rollout-all"
    options = {"head_fusion": args.head_fusion, "discard_ratio": args.discard_ratio}
    device = next(model.parameters()).device
    inputs = normalised(torch.stack([explained.pixels for explained in chosen]), checkpoint, device)  # (B, 3, S, S)
    targets = None
    if args.target is not None:
        targets = torch.full((len(chosen),), find_class(args.target, classes), device=device)
    matrices, logits, recorder = attention_matrices(model, inputs, methods, targets=targets, **options)
    maps = {method: model_maps(model, matrices[method], recorder.pooling) for method in methods}
    by_image = [{method: maps[method][i].cpu().numpy() for method in methods} for i in range(len(chosen))]
    drawn = {method: matrices[method] for method in methods if args.matrix}  # {title: matrices (B, N, N)}
    check_layers(args, recorder.attentions)
    for layer in args.layer:
        drawn[f"layer-{layer}"] = fuse_heads(recorder.attentions[layer - 1], args.head_fusion)
    captions = [caption_of(*pair, classes) for pair in zip(chosen, logits.softmax(1).cpu(), strict=True)]

    look = {"interpolation": args.interpolation, "dpi": args.dpi}
    written = []

    def new_path(name):
        written.append(out / name)
        return written[-1]

    for explained, caption, found in zip(chosen, captions, by_image, strict=True):
        draw_panel(new_path(f"{explained.name}-{label}.{args.format}"), [explained.shown], [caption], [found], **look)
        for method, one_map in found.items():
            save_map(new_path(f"{explained.name}-{method}.npy"), one_map)
    if len(chosen) > 1:
        shown = [explained.shown for explained in chosen]
        draw_panel(new_path(f"panel-{label}.{args.format}"), shown, captions, by_image, **look)
    for i, (explained, caption) in enumerate(zip(chosen, captions, strict=True)):
        if args.layers:
            layers = maps_of_layers(model, recorder, i)
            draw_layers(new_path(f"{explained.name}-layers.{args.format}"), explained.shown, caption, layers, **look)
        for title, matrix in drawn.items():
            path, words = new_path(f"{explained.name}-{title}-matrix.{args.format}"), re.sub("[_-]", " ", title)
            draw_matrix(path, matrix[i].cpu().numpy(), f"{words}\n{caption}", dpi=args.dpi)
        if args.patches:
            draw_patches(new_path(f"{explained.name}-patches.{args.format}"), model, explained.pixels, dpi=args.dpi)
    return written


def attention_explainers(model, args, image):
    """The chosen methods, the heads of --layer and what the report leaves open, as evaluate takes them.

    The last is the model's mode, and whether the class token's row or its column of the report's matrix is the map.
    A name includes the options that are not the defaults, so that several evaluations share one table. The normalised
    image (1, C, H, W) tells how many heads there are.
    """
    options = {"head_fusion": args.head_fusion, "discard_ratio": args.discard_ratio}
    suffix = f" ({args.head_fusion}, discard {args.discard_ratio:g})" if tuple(options.values()) != ("mean", 0) else ""

    def explainer(method):
        return lambda images, classes: attention_maps(model, images, [method], targets=classes, **options)[0][method]

    def one_head(layer, head):
        def explain(images, classes):
            recorder = attention_matrices(model, images, ())[2]
            return model_maps(model, recorder.attentions[layer - 1][:, head - 1], recorder.pooling)

        return explain

    def in_training_mode(join):
        return lambda images, classes: maps_in_training_mode(model, images, join=join)

    found = {method + suffix: explainer(method) for method in chosen_methods(args, METHODS, default="rollout")}

    if "report" in found:
        found["report, column"] = explainer("report_column")
        found["report, training mode"] = in_training_mode(report)
        found["report, column, training mode"] = in_training_mode(report_column)
    if "rollout" in found:
        found["rollout, training mode"] = in_training_mode(rollout)
    if args.layer:
        attentions = attention_matrices(model, image, ())[2].attentions
        check_layers(args, attentions)
    for layer in args.layer:
        for head in range(1, attentions[layer - 1].shape[1] + 1):
            found[f"layer {layer}, head {head}"] = one_head(layer, head)
    return found


def check_layers(args, attentions):
    """Raises UserError if a layer of --layer does not exist."""
    if args.layer and max(args.layer) > len(attentions):
        raise UserError(f"--layer {max(args.layer)}: the model has {len(attentions)} layers with attention")


def main(argv=None):
    """Draw or evaluate as the command line (or argv) says; returns the paths of the files written."""
    args = rollout_parser().parse_args(argv)
    checkpoint, model, chosen, dataset = open_for_maps(args)
    out = output_folder(args)
    if args.evaluate:
        first = images_at(dataset.test.images, torch.tensor([0]))
        image = normalised(first, checkpoint, next(model.parameters()).device)  # (1, C, H, W)
        written = evaluate_checkpoint(args, checkpoint, model, dataset, attention_explainers(model, args, image), out)
    else:
        written = draw_maps(args, model, checkpoint, chosen, out)
    for path in written:
        print(f"  {path}")
    return written

if __name__ == "__main__":
    if "ipykernel" in sys.modules:
        result = main(ARGUMENTS)
    else:
        run_script(main)
