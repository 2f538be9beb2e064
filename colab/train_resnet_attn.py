# train_resnet_attn.py and all that it imports from its project in one file, written by colab/bundle.py: edit it there.
# In a notebook cell it takes its arguments from this list, and as a script from the command line.
ARGUMENTS = ["--dataset", "shapes"]


import argparse
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
import contextlib
from contextlib import contextmanager, suppress
import copy
import csv
import ctypes
from dataclasses import dataclass, replace
import datetime
import difflib
import errno
import functools
from functools import cache, partial
import hashlib
import importlib
import importlib.util
import io
import itertools
from itertools import islice, starmap
import json
import math
from multiprocessing import parent_process
import os
from pathlib import Path
import pickle
import platform
import random
import re
import secrets
import signal
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
from textwrap import shorten
import threading
from threading import Lock
import time
import traceback
from types import UnionType
from typing import NamedTuple, get_args, get_origin
from urllib.parse import urlparse
import zipfile

from PIL import Image, ImageOps
from PIL.Image import Resampling
from matplotlib.figure import Figure
import numpy as np
import torch
from torch import distributed, nn
from torch.autograd import DeviceType
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import cross_entropy, one_hot
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
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


# ---- models/pretrained.py: torchvision's ViT-B/16 and timm's for fine-tuning on small images, and weights that others have published.

VIT_B_16 = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1


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


def load_trunk(model, weights, *, flag="--init-from", replaced=()):
    """Put the trunk's tensors of a state dict into a TrunkAndHead. Returns the names in it that were left out.

    Tensors named in `replaced` may differ in shape and are then left out too. Raises UserError, which names the flag,
    if others do (see check_shapes).
    """
    own = model.state_dict()
    names = dict.fromkeys([*trunk_names(own), *trunk_names(weights)])
    check_shapes(weights, own, [name for name in names if name not in replaced], flag=flag)
    taken = {name: weights[name] for name in names if shape_of(weights, name) == shape_of(own, name)}
    model.load_state_dict(own | taken)
    return [name for name in weights if name not in taken]


def load_imagenet_trunk(model):
    """Put torchvision's ImageNet weights into the trunk of a ResNet. Returns the names that were left out.

    These are the head's, and with the "cifar" stem the first convolution's. Raises UserError if the weights cannot be
    downloaded, and if the model's width is not 64 or its images do not have 3 channels.
    """
    if model.conv1.out_channels != 64:
        raise UserError(f"--pretrained: the weights require --width 64, not {model.conv1.out_channels}")
    if model.conv1.in_channels != 3:
        raise UserError(f"--pretrained: the weights require --channels 3, not {model.conv1.in_channels}")
    values = download_weights(torchvision.models.get_model_weights(f"resnet{model.depth}").IMAGENET1K_V1)
    # older files lack BatchNorm's counters
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return load_trunk(model, counters | values, flag="--pretrained", replaced=("conv1.weight",))


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

def random_flip(images, generator, *, p=0.5):
    """Mirror each of the images (B, C, H, W) left to right with probability p."""
    count = len(images)
    flipped = torch.rand(count, generator=generator) < p
    source = (torch.arange(count) + count * flipped).to(images.device, non_blocking=True)
    return torch.cat([images, images.flip(3)]).index_select(0, source)


def padded_crop(images, generator, *, padding, fill=0):
    """Shift each of the images (B, C, H, W) by up to `padding` pixels in each direction, all offsets equally likely.

    Pads all four sides with grey level `fill`, then crops to the old size (He et al. 2016, section 4.2).
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count, 1, 1), generator=generator)
    top, left = offsets.to(images.device, non_blocking=True)
    padded = F.pad(images, (padding,) * 4, value=fill)
    first_rows = padded.shape[2] * torch.arange(count * channels, device=images.device).view(count, channels, 1)
    starts = (first_rows + top + torch.arange(height, device=images.device)) * padded.shape[3] + left  # (B, C, H)
    rows = padded.flatten().unfold(0, width, 1)  # a view: row i holds the `width` pixels from pixel i on
    return rows.index_select(0, starts.flatten()).view(images.shape)


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


def random_crop_boxes(count, size, generator, *, scale, ratio):
    """Boxes (count, 4) in images of one `size` (H, W) (Szegedy et al. 2015); the whole image if none of ten fits."""
    sizes = torch.tensor(size).expand(count, 2)
    sides = random_sides(sizes, generator, scale=scale, ratio=ratio, largest=sizes, fallback=sizes)
    return place_boxes(sides, sizes, torch.rand(2, count, generator=generator).T)


def interpolation_matrices(start, length, size):
    """Matrices (B, size, size) that enlarge `length` pixels from `start` on, of a row of `size`, to the whole row.

    Bilinear, pixel centres at halves, border pixels repeated; start and length are (B,).
    """
    pixels = torch.arange(size, device=start.device)
    source = ((pixels + 0.5) * (length / size)[:, None] - 0.5).clamp(min=0)  # (B, size)
    source = torch.minimum(source, (length - 1)[:, None]) + start[:, None]
    return (1 - (source[:, :, None] - pixels).abs()).clamp(min=0)  # (B, to, from)


def resized_crop(images, boxes):
    """Crop a box from each of the images (B, C, H, W) uint8 and enlarge it to (H, W), bilinearly, as uint8.

    boxes is (B, 4): top, left, height, width. Two small matrix products per image replace a gather.
    """
    height, width = images.shape[2:]
    top, left, h, w = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = interpolation_matrices(top, h, height)[:, None]  # (B, 1, H, H)
    columns = interpolation_matrices(left, w, width)[:, None]  # (B, 1, W, W)
    return (rows @ images.float() @ columns.mT).round_().byte()


def random_resized_crop(images, generator, *, scale, ratio):
    """resized_crop of the images (B, C, H, W) with random_crop_boxes."""
    return resized_crop(images, random_crop_boxes(len(images), images.shape[2:], generator, scale=scale, ratio=ratio))


def nearest_affine(images, matrices, *, fill):
    """Transform images (B, C, H, W) by matrices, taking the nearest pixel, or `fill` outside the image.

    matrices (B, 2, 3), float64 on the host, map (x, y, 1) in the result to (x, y) in the source, both in pixels from
    the image's centre. The float32 operations are those of torchvision's `affine`, in the same order, so that a point
    halfway between two pixels is rounded alike. There is no matrix product, since a device may round its factors.
    """
    count, channels, height, width = images.shape
    device = images.device
    half = torch.tensor([width, height]) / 2
    scaled = (matrices.float() / half[:, None]).to(device, non_blocking=True)[..., None, None]  # (B, 2, 3, 1, 1)
    x = torch.arange(width, device=device) - (width - 1) / 2
    y = (torch.arange(height, device=device) - (height - 1) / 2)[:, None]
    column, row = (
        # from -1 to 1 across the image, then in pixels of the image with a border of one pixel
        (x * a + y * b).add_(c).add_(1).mul_(side / 2).sub_(0.5).round_().clamp_(-1, side).add_(1)
        for (a, b, c), side in zip(scaled.permute(1, 2, 0, 3, 4), (width, height))
    )
    source = row.mul_(width + 2).add_(column).long()  # (B, H, W); exact in float32 up to 16 million pixels
    framed = F.pad(images, (1, 1, 1, 1), value=fill).flatten(2)
    source = source.view(count, 1, -1).expand(-1, channels, -1)
    return framed.gather(2, source).view(images.shape)


def rotations(angles):
    """Matrices (B, 2, 3) for nearest_affine that rotate counter-clockwise by angles (B,) in degrees."""
    cos, sin, zero = angles.deg2rad().cos(), angles.deg2rad().sin(), torch.zeros_like(angles)
    return torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)


def random_rotation(images, generator, *, degrees, fill=0):
    """Rotate each of the images (B, C, H, W) by an angle uniform in [-degrees, degrees], taking the nearest pixel."""
    angles = torch.empty(len(images), dtype=torch.float64).uniform_(-degrees, degrees, generator=generator)
    return nearest_affine(images, rotations(angles), fill=fill)


def normalize(images, mean, std):
    """(images / 255 - mean) / std as float, for images (B, C, H, W) uint8.

    mean and std are tensors (C,) on the images' device, as fractions of 255.
    """
    scale, offset = 1 / (255 * std), -mean / std
    return images.float().mul_(scale[:, None, None]).add_(offset[:, None, None])


def erase(images, boxes):
    """Set a box of each of the normalised images (B, C, H, W) to 0, which is the mean.

    boxes is (B, 4): top, left, height, width; a box may be empty or extend beyond the border.
    """
    top, left, height, width = boxes.to(images.device, non_blocking=True)[:, :, None].unbind(1)
    rows = torch.arange(images.shape[2], device=images.device) - top
    columns = torch.arange(images.shape[3], device=images.device) - left
    rows, columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)  # (B, H), (B, W)
    kept = ~(rows[:, :, None] & columns[:, None])  # (B, H, W)
    return images * kept[:, None]  # much faster than where() and masked_fill()


def random_erasing(images, generator, *, p, scale=(0.02, 1 / 3), ratio=(0.3, 3.3)):
    """Erase a rectangle of each of the normalised images (B, C, H, W) with probability p (Zhong et al. 2020).

    Drawn as in torchvision: the share of the area is uniform in scale, height / width is log-uniform in ratio, and both
    sides are smaller than the image's. Nothing is erased if none of ten draws fits.
    """
    count, (low, high) = len(images), ratio
    sizes = torch.tensor(images.shape[2:]).expand(count, 2)
    limits = {"largest": sizes - 1, "fallback": torch.zeros_like(sizes)}
    erased = torch.rand(count, 1, generator=generator) < p
    # random_sides takes width / height
    sides = random_sides(sizes, generator, scale=scale, ratio=(1 / high, 1 / low), **limits)
    return erase(images, place_boxes(sides, sizes, torch.rand(2, count, generator=generator).T) * erased)


def cutout(images, generator, *, size):
    """Erase a square of `size` pixels of each of the normalised images (B, C, H, W) (DeVries & Taylor 2017).

    Its centre is uniform over the image's pixels; the part beyond the border is ignored.
    """
    centres = (torch.rand(len(images), 2, generator=generator) * torch.tensor(images.shape[2:])).long()
    return erase(images, torch.cat([centres - size // 2, torch.full_like(centres, size)], dim=1))


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


def detach_worker(worker):
    """Keep Ctrl-C and SIGTERM from a worker: training finishes its step, saves, and then ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker has inherited training's handler
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def free_memory(device):
    """Free bytes on the host, or on a CUDA device if it has fewer; 8 GiB if the host's are unknown."""
    free = 8 * 2**30
    with suppress(OSError):  # Windows and macOS have no such file
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def place_images(images, device):
    """A tensor of images on the device, or as it is, on the host, if a GPU has not a third more memory free."""
    if device.type == "cuda" and images.nbytes > 3 / 4 * torch.cuda.mem_get_info(device)[0]:
        print(f"images of {images.nbytes / 2**30:.2f} GiB stay on the host: {device} has no room for them")
        return images
    return images.to(device)


@contextmanager
def images_in_memory():
    """A context, or a function's decorator, in which running out of memory is a UserError."""
    try:
        yield
    except Exception as error:
        if not is_memory_error(error):
            raise
        raise UserError("the images do not fit into memory: use a smaller --image-size, or fewer images") from error


def crop_batches(images, *, scale, ratio, seed, device, cache_gib=None, workers=None):
    """A function from keys [(indices, epoch, step), ...] to an iterator over batches, each as from Crops.cut.

    LargeImages of up to cache_gib (default: a quarter of the free memory) are decoded once and kept on the GPU, or on
    the host without one. Larger ones are decoded in every epoch by `workers` processes (default: one per core, at most
    16).
    """
    budget = free_memory(device) / 4 if cache_gib is None else cache_gib * 2**30
    buffer = None
    if images.num_bytes <= budget:
        workers, buffer = 0, images.decode_all()
        buffer = place_images(buffer, device) if device.type == "cuda" else buffer
    else:
        workers = min(os.cpu_count(), 16) if workers is None else workers
        needed, limit = images.num_bytes / 2**30, budget / 2**30
        print(f"images of {needed:.2f} GiB exceed --cache-gib {limit:.2f}: {workers} workers decode them every epoch")
    return batches_by_workers(Crops(images, scale=scale, ratio=ratio, seed=seed, buffer=buffer), device, workers)


def batches_by_workers(crops, device, workers):
    """A function from keys to an iterator over crops.cut of each, in `workers` processes, or in this one if it is 0."""
    if not workers:
        return partial(starmap, crops.cut)
    pending = []  # the keys of the epoch under way; the loader's sampler
    loader = DataLoader(
        crops,
        batch_size=None,
        sampler=pending,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        worker_init_fn=detach_worker,
        generator=torch.Generator(),  # leaves the global generator alone
    )

    def stream(keys):
        pending[:] = keys
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    return stream


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


def warn_of_seen_images(name):
    """Warn on stderr if weights trained on ImageNet have seen the test images of the dataset `name`."""
    if name in IMAGENETTES:
        seen = f"most test images of {name} are training images of ImageNet, which the weights have seen"
        print(f"warning: --pretrained: {seen}", file=sys.stderr)


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

# torchvision's names
OPERATIONS = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize", "Identity", "Invert"),
)
AFFINE, SIGNED, WITHOUT_INVERT = 5, 9, 14  # the first 5 move pixels, the first 9 have a sign, the last is Invert
IDENTITY = OPERATIONS.index("Identity")
# Cubuk et al. 2019, table 7: operation, probability and index of the magnitude (0 to 9), for both stages
CIFAR10_POLICY = (
    ("Invert", 0.1, 0, "Contrast", 0.2, 6),
    ("Rotate", 0.7, 2, "TranslateX", 0.3, 9),
    ("Sharpness", 0.8, 1, "Sharpness", 0.9, 3),
    ("ShearY", 0.5, 8, "TranslateY", 0.7, 9),
    ("AutoContrast", 0.5, 0, "Equalize", 0.9, 0),
    ("ShearY", 0.2, 7, "Posterize", 0.3, 7),
    ("Color", 0.4, 3, "Brightness", 0.6, 7),
    ("Sharpness", 0.3, 9, "Brightness", 0.7, 9),
    ("Equalize", 0.6, 0, "Equalize", 0.5, 0),
    ("Contrast", 0.6, 7, "Sharpness", 0.6, 5),
    ("Color", 0.7, 7, "TranslateX", 0.5, 8),
    ("Equalize", 0.3, 0, "AutoContrast", 0.4, 0),
    ("TranslateY", 0.4, 3, "Sharpness", 0.2, 6),
    ("Brightness", 0.9, 6, "Color", 0.2, 8),
    ("Solarize", 0.5, 2, "Invert", 0.0, 0),
    ("Equalize", 0.2, 0, "AutoContrast", 0.6, 0),
    ("Equalize", 0.2, 0, "Equalize", 0.6, 0),
    ("Color", 0.9, 9, "Equalize", 0.6, 0),
    ("AutoContrast", 0.8, 0, "Solarize", 0.2, 8),
    ("Brightness", 0.1, 3, "Color", 0.7, 0),
    ("Solarize", 0.4, 5, "AutoContrast", 0.9, 0),
    ("TranslateY", 0.9, 9, "TranslateY", 0.7, 9),
    ("AutoContrast", 0.9, 0, "Solarize", 0.8, 3),
    ("Equalize", 0.8, 0, "Invert", 0.1, 0),
    ("TranslateY", 0.7, 9, "AutoContrast", 0.9, 0),
)


def move(images, operation, magnitude, *, fill):
    """Shear, translate or rotate images (n, 3, H, W), all by one gather; operation and magnitude are (n,)."""
    height, width = images.shape[2:]
    amounts = torch.zeros(AFFINE, len(images), dtype=torch.float64).scatter_(0, operation[None], magnitude[None])
    shear_x, shear_y, right, down, angle = amounts
    matrices = rotations(angle)
    matrices[:, 0, 1] += shear_x  # about the upper left corner
    matrices[:, 1, 0] += shear_y
    matrices[:, 0, 2] += shear_x * (height / 2) - right.trunc()
    matrices[:, 1, 2] += shear_y * (width / 2) - down.trunc()
    return nearest_affine(images, matrices, fill=fill)


def blend(degenerate, images, magnitude):
    """Move images away from the degenerate ones if the magnitude is above 0, towards them if it is below."""
    return torch.lerp(degenerate, images.float(), 1 + magnitude).clamp_(0, 255).byte()


def grey(images):
    """The luminance (n, 1, H, W) of images (n, C, H, W), rounded down to whole levels, as float."""
    if images.shape[1] == 1:
        return images.float()  # so that `color` changes nothing, as in torchvision
    red, green, blue = images.float().split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def brightness(images, magnitude):
    return blend(torch.zeros_like(magnitude), images, magnitude)


def color(images, magnitude):
    return blend(grey(images), images, magnitude)


def contrast(images, magnitude):
    return blend(grey(images).mean((2, 3), keepdim=True), images, magnitude)


def sharpness(images, magnitude):
    """Blend with a blur of 3 x 3 pixels whose centre weighs 5 and the others 1; the border does not change."""
    rows = images.short()
    rows = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]  # (n, 3, H - 2, W)
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # (n, 3, H - 2, W - 2)
    blurred = images.float()
    inner = blurred[:, :, 1:-1, 1:-1]
    inner.mul_(4).add_(around).div_(13).round_()  # in place: also in `blurred`
    return blend(blurred, images, magnitude)


def posterize(images, bits):
    lost = (8 - bits).byte()
    return images >> lost << lost


def solarize(images, threshold):
    return images ^ 255 * (images >= threshold).byte()  # 255 - v is v ^ 255; torch.where is much slower


def autocontrast(images, magnitude):
    """Stretch each channel to 0..255; a channel with a single value does not change."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = low == high
    scale = 255 / torch.where(flat, 255, high - low)
    return (images - torch.where(flat, 0, low)).mul(scale).byte()


def equalize(images, magnitude):
    """Flatten each channel's histogram with a look-up table of 256 levels, in integers as in Pillow."""
    levels = images.flatten(2).long()  # (n, 3, H * W)
    histogram = levels.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, torch.ones_like(levels))
    below = histogram.cumsum(2) - histogram
    step = below.gather(2, levels.amax(2, keepdim=True)) // 255  # without the pixels of the highest level
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255).byte()
    table = torch.where(step > 0, table, torch.arange(256, dtype=torch.uint8, device=images.device))
    return table.gather(2, levels).view(images.shape)


def identity(images, magnitude):
    return images


def invert(images, magnitude):
    return 255 - images


# OPERATIONS[AFFINE:]; each takes images (n, C, H, W) uint8 and magnitudes (n, 1, 1, 1) float
CHANGES = (brightness, color, contrast, sharpness, posterize, solarize, autocontrast, equalize, identity, invert)


def apply_operation(images, operation, magnitude, *, fill):
    """Apply to each of the images (B, C, H, W) uint8 its own operation, with its own magnitude.

    operation (B,) int64, indices in OPERATIONS, and magnitude (B,) float64 are on the host, so that the host never
    waits for the device. `fill` is the grey level outside the images.
    """
    device = images.device
    operation, order = operation.sort(stable=True)
    magnitude = magnitude[order]
    counts = operation.bincount(minlength=len(OPERATIONS)).tolist()
    counts = [sum(counts[:AFFINE]), *counts[AFFINE:]]  # the affine operations are one group
    groups = images.index_select(0, order.to(device, non_blocking=True)).split(counts)
    magnitudes = magnitude.float().to(device, non_blocking=True).view(-1, 1, 1, 1).split(counts)
    done = []
    if moved := counts[0]:
        done.append(move(groups[0], operation[:moved], magnitude[:moved], fill=fill))
    for change, group, amount in zip(CHANGES, groups[1:], magnitudes[1:], strict=True):
        if len(group):
            done.append(change(group, amount))
    return torch.cat(done).index_select(0, order.argsort().to(device, non_blocking=True))


def apply_operations(images, operations, magnitudes, *, fill):
    """apply_operation for each stage; operations and magnitudes are (B, stages)."""
    for operation, magnitude in zip(operations.T, magnitudes.T):
        images = apply_operation(images, operation, magnitude, fill=fill)
    return images


def magnitude_table(bins, *, shear, right, down, degrees, enhance, bits):
    """Magnitudes (len(OPERATIONS), bins), from no change to the largest; posterize removes up to `bits` bits."""
    largest = (shear, shear, right, down, degrees, enhance, enhance, enhance, enhance)
    table = torch.zeros(len(OPERATIONS), bins)
    table[:SIGNED] = torch.stack([torch.linspace(0, end, bins) for end in largest])
    table[OPERATIONS.index("Posterize")] = 8 - torch.linspace(0, bits, bins).round()
    table[OPERATIONS.index("Solarize")] = torch.linspace(255, 0, bins)
    return table.double()


def usual_magnitudes(bins, size):
    """The magnitude_table of AutoAugment and RandAugment for images of `size` (H, W)."""
    down, right = (150 / 331 * side for side in size)
    return magnitude_table(bins, shear=0.3, right=right, down=down, degrees=30, enhance=0.9, bits=4)


def wide_magnitudes(bins):
    """The magnitude_table of TrivialAugment."""
    return magnitude_table(bins, shear=0.99, right=32, down=32, degrees=135, enhance=0.99, bits=6)


def signed_magnitudes(table, operations, bins, generator):
    """Magnitudes from a table; those of operations with a sign are negative with probability 1/2."""
    negative = (torch.rand(operations.shape, generator=generator) < 0.5) & (operations < SIGNED)
    magnitudes = table[operations, bins]
    return torch.where(negative, -magnitudes, magnitudes)


def draw_auto_augment(count, size, generator):
    """Operations and magnitudes (count, 2) of AutoAugment: a row of the policy per image, with its probabilities."""
    rows = [((OPERATIONS.index(a), b, c), (OPERATIONS.index(d), e, f)) for a, b, c, d, e, f in CIFAR10_POLICY]
    chosen = torch.tensor(rows)[torch.randint(len(rows), (count,), generator=generator)]  # (count, 2, 3)
    operations, probabilities, bins = chosen.unbind(2)
    applied = torch.rand(count, 2, generator=generator) < probabilities
    operations = torch.where(applied, operations.long(), IDENTITY)
    return operations, signed_magnitudes(usual_magnitudes(10, size), operations, bins.long(), generator)


def draw_rand_augment(count, size, generator, *, num_ops, magnitude):
    """Operations and magnitudes (count, num_ops) of RandAugment, each operation equally likely."""
    operations = torch.randint(WITHOUT_INVERT, (count, num_ops), generator=generator)
    return operations, signed_magnitudes(usual_magnitudes(31, size), operations, magnitude, generator)


def draw_trivial_augment(count, generator):
    """Operations and magnitudes (count, 1) of TrivialAugment, each operation and each magnitude equally likely."""
    operations, bins = (torch.randint(high, (count, 1), generator=generator) for high in (WITHOUT_INVERT, 31))
    return operations, signed_magnitudes(wide_magnitudes(31), operations, bins, generator)


def auto_augment(images, generator, *, fill):
    """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019) on images (B, 3, H, W) uint8."""
    return apply_operations(images, *draw_auto_augment(len(images), images.shape[2:], generator), fill=fill)


def rand_augment(images, generator, *, num_ops=2, magnitude=9, fill):
    """RandAugment (Cubuk et al. 2020) on images (B, 3, H, W) uint8; magnitude is an integer from 0 to 30."""
    drawn = draw_rand_augment(len(images), images.shape[2:], generator, num_ops=num_ops, magnitude=magnitude)
    return apply_operations(images, *drawn, fill=fill)


def trivial_augment(images, generator, *, fill):
    """TrivialAugment with its wide ranges (Müller & Hutter 2021) on images (B, 3, H, W) uint8."""
    return apply_operations(images, *draw_trivial_augment(len(images), generator), fill=fill)


POLICIES = {"auto": auto_augment, "rand": rand_augment, "trivial": trivial_augment}


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


def mix_in(split, extra, *, share, seed):
    """(a Split of both, options of Batches) so that extra images replace a share of the images of each batch.

    Which are replaced, and by which, follows from (seed, epoch); an epoch has as many steps as without.
    """
    images, labels = (torch.cat(pair) for pair in zip(split[:2], extra[:2]))  # the real ones first
    real, count = len(split.labels), len(extra.labels)

    def reorder(order, epoch):
        generator = torch.Generator().manual_seed(seed_for("extra", seed, epoch))
        replaced = (torch.arange(real + 1, dtype=torch.float64) * share).floor().diff() > 0  # (real,), evenly spread
        drawn = torch.randperm(count, generator=generator)[torch.arange(int(replaced.sum())) % count]
        return order.masked_scatter(replaced, real + drawn)

    return split._replace(images=images, labels=labels), {"length": real, "reorder": reorder}


# ---- pipeline/batches.py: Batches of images on the device: their order and their augmentation.

RATIO = (3 / 4, 4 / 3)  # of a random resized crop without --ratio: as in torchvision


class Batches:
    """Batches of a Split on a device: `steps_per_epoch`, and batches(epoch, start_step) of (images, labels).

    Images come as (B, 3, H, W) float, normalised; labels as (B,) int64, or (B, classes) float after mix. The uint8
    images of the Split lie where place_images puts them; LargeImages come through `crops`, from crop_batches, Shards
    with their labels. With a seed, the order follows from (seed, epoch) and everything else from (seed, epoch, step):
    transform(images, generator) of uint8 images for each of transforms, the same of normalised images for
    float_transforms, then mix(images, labels), which draws from torch's global generator. Without a seed, images come
    in order and unchanged. An epoch takes the first `length` images, by default all; reorder(order, epoch) may replace
    some of their indices. With drop_last, an incomplete last batch is left out, unless it is the only one.
    """

    def __init__(
        self,
        split,
        *,
        batch_size,
        mean,
        std,
        device,
        seed=None,
        length=None,
        reorder=None,
        drop_last=False,
        crops=None,
        transforms=(),
        float_transforms=(),
        mix=None,
    ):
        self.crops, self.images = crops, None if crops else place_images(split.images, torch.device(device))
        self.whole = split.images is not None  # Shards give each of several ranks its part alone
        self.labels, self.length, self.reorder = split.labels.to(device), length or len(split.labels), reorder
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.transforms, self.float_transforms, self.mix = transforms, float_transforms, mix
        complete, left_over = divmod(self.length, batch_size)
        self.steps_per_epoch = complete if complete and (drop_last or not left_over) else complete + 1

    def batches(self, epoch=0, start_step=0):
        generator = torch.Generator()
        order = torch.arange(self.length)
        if self.seed is not None:
            order = torch.randperm(self.length, generator=generator.manual_seed(seed_for("order", self.seed, epoch)))
        if self.reorder:
            order = self.reorder(order, epoch)
        indices = order.to(self.device).split(self.batch_size)[: self.steps_per_epoch]
        on_host = order.split(self.batch_size)[: self.steps_per_epoch]
        if self.crops:
            keys = [(part.numpy(), epoch, step) for step, part in enumerate(on_host)]
            uint8_batches = self.crops(keys[start_step:])
        elif self.images.device == self.labels.device:
            uint8_batches = (self.images[part] for part in indices[start_step:])
        else:
            uint8_batches = (self.images[part].pin_memory() for part in on_host[start_step:])
        for step, images in enumerate(uint8_batches, start_step):
            images, labels = images if isinstance(images, list | tuple) else (images, self.labels[indices[step]])
            images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
            if self.seed is not None:
                generator.manual_seed(seed_for("augmentation", self.seed, epoch, step))
            for transform in self.transforms:
                images = transform(images, generator)  # (B, 3, H, W) uint8
            images = normalize(images, self.mean, self.std)
            for transform in self.float_transforms:
                images = transform(images, generator)
            if self.mix:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(seed_for("mixing", self.seed, epoch, step))
                    images, labels = self.mix(images, labels)  # labels: (B, classes)
            yield images, labels


def image_transforms(args, *, cropped=False):
    """The random transforms of uint8 images that the flags ask for, in order; without --scale if already `cropped`."""
    if args.aa != "none":
        yield partial(POLICIES[args.aa], fill=args.fill)
    if args.hflip:
        yield partial(random_flip, p=args.hflip)
    if args.crop_padding:
        yield partial(padded_crop, padding=args.crop_padding)
    if args.scale and not cropped:
        yield partial(random_resized_crop, scale=args.scale, ratio=args.ratio or RATIO)
    if args.rotate:
        yield partial(random_rotation, degrees=args.rotate, fill=args.fill)


def normalised_transforms(args):
    """The random transforms of normalised images that the flags ask for, in order."""
    if args.reprob:
        yield partial(random_erasing, p=args.reprob)
    if args.cutout:
        yield partial(cutout, size=args.cutout)


def mix_transform(args, num_classes):
    """MixUp or CutMix of a batch, equally often if the flags ask for both; None if they ask for neither."""
    mixes = []
    if args.mixup:
        mixes.append(v2.MixUp(alpha=args.mixup, num_classes=num_classes))
    if args.cutmix:
        mixes.append(v2.CutMix(alpha=args.cutmix, num_classes=num_classes))
    return v2.RandomChoice(mixes) if mixes else None


@images_in_memory()
def training_batches(dataset, args, device):
    """Batches of the training images, shuffled, and augmented as the flags say."""
    crops = None
    if isinstance(dataset.train.images, LargeImages):
        crops = crop_batches(
            dataset.train.images,
            scale=args.scale,
            ratio=args.ratio or RATIO,
            seed=args.seed,
            device=device,
            cache_gib=args.cache_gib,
            workers=args.workers,
        )
    elif dataset.train.images is None:  # in shards
        crops = batches_by_workers(dataset.train, device, dataset.train.workers)
    split, mixed = dataset.train, {}
    if dataset.extra:
        split, mixed = mix_in(split, dataset.extra, share=args.extra_fraction, seed=args.seed)
    return Batches(
        split,
        **mixed,
        batch_size=args.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        seed=args.seed,
        drop_last=args.drop_last,
        crops=crops,
        transforms=tuple(image_transforms(args, cropped=bool(crops))),
        float_transforms=tuple(normalised_transforms(args)),
        mix=mix_transform(args, len(dataset.classes)),
    )


@images_in_memory()
def evaluation_batches(dataset, split, args, device):
    """Batches of a Split in order and unchanged, up to four times as large as in training: no gradient is stored."""
    size = min(256, 4 * args.batch_size)
    return Batches(split, batch_size=size, mean=dataset.mean, std=dataset.std, device=device)


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


# ---- pipeline/proposals.py: What a folder of photographs proposes for flags that are not given.

PARENT = re.compile(r"cifar-?100?(-|$)|image(nette|woof)")  # a folder of such folders is datasets/, not photographs


def holds_images(folder):
    with suppress(OSError):  # read_folder names a folder that cannot be read
        return any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(folder))
    return False


def implied_dataset(given):
    """--dataset; without it "folder" if --data-dir holds class folders of images, else None: the recipe says.

    given has the flags on the command line, {name: value}. Raises UserError for a --data-dir that does not exist,
    unless --dataset says what to download to it.
    """
    root = Path(given.get("data_dir") or "")
    if "dataset" in given or not given.get("data_dir") or given.get("resume", "auto") != "auto":
        return given.get("dataset")
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: there is no such folder; to download images to it, add --dataset cifar10")
    names = subfolders(root)
    if any(PARENT.match(name) for name in names):
        return None
    folders = [root, *(root / name for name in names if name.lower() in SPLITS["train"])]
    found = (folder / name for folder in folders for name in subfolders(folder))
    return "folder" if any(map(holds_images, found)) else None


# ---- data.py: From a dataset's name to its images, classes and splits.

SHAPES = ("shapes", "shapes_even", "shapes_pair", "shapes_shuffled")  # drawn, with a mask of each shape
DATASETS = ("cifar10", "cifar100", *SHAPES, "folder", "webdataset", *IMAGENETTES)
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


def describe(dataset):
    """One line per split: how many images it has, and how many of each class; a warning of repeated ones on stderr."""
    if dataset.repeated and is_first_rank():
        print(f"warning: {dataset.repeated}", file=sys.stderr)
    lines = []
    for key, split in dataset.splits().items():
        if split.images is None:
            lines.append(f"{key:6}{len(split.labels):7,} images per epoch, of {len(split.urls):,} shards")
            continue
        counts = split.labels.bincount(minlength=len(dataset.classes)).tolist()
        if len(set(counts)) == 1:
            each = f"{counts[0]:,} of each of {len(counts)} classes"
        else:
            each = ", ".join(f"{name} {count:,}" for name, count in zip(dataset.classes, counts))
        lines.append(f"{key:6}{len(split.labels):7,} images: {each}")
    return "\n".join(lines)


# ---- training/archives.py: Files of torch.save: written with a digest, opened without running code, and whatever is wrong with them one line.

DIGEST_SIZE = 32  # bytes


def digest_of(file, size):
    """The digest of the first `size` bytes of an open file."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    file.seek(0)
    for start in range(0, size, 2**20):
        digest.update(file.read(min(2**20, size - start)))
    return digest.digest()


def write_archive(file, checkpoint):
    """torch.save, and after it a digest of the whole file: the comment that a zip archive may end in."""
    torch.save(checkpoint, file)
    file.seek(-2, os.SEEK_END)
    file.write(DIGEST_SIZE.to_bytes(2, "little"))  # the length of the comment
    file.write(digest_of(file, file.tell()))


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


# ---- training/sharding.py: --fsdp: weights, gradients and optimiser state divided among ranks (FSDP2), for models that do not fit on one GPU.

def shard_model(model, device, ranks):
    """Divide a model's weights among the ranks, block by block: only one block is whole at any time. Returns it."""
    mesh = init_device_mesh(device.type, (ranks,))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gathered(state):
    """A state dict with whole tensors in place of shards; every rank must call this."""
    return tree_map_only(DTensor, DTensor.full_tensor, state)


def sharded_like(tensor, parameter):
    """This rank's shard of a whole tensor, as a parameter is sharded; the tensor itself if its shape is another."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def sharded_weights(weights, model):
    """Whole weights as shards, for model.load_state_dict."""
    own = model.state_dict()
    return {name: sharded_like(tensor, own[name]) for name, tensor in weights.items()}


def sharded_state(state, optimizer):
    """An optimiser's whole state as shards, for its load_state_dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {name: sharded_like(tensor, parameters[number]) for name, tensor in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": shards}


# ---- training/ranks.py: Several processes (ranks) that train one model, started by torchrun: what each does, and what they agree on.

def rank_and_ranks():
    """(this process's number, the number of processes); (0, 1) without torchrun."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def join_ranks():
    """Join the processes that torchrun started, if it did. All but the first one are silent from here on.

    Messages that are on the CPU go by gloo, so that they do not wait for a GPU.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        both = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=datetime.timedelta(hours=1))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 until the process ends


def leave_ranks():
    if rank_and_ranks()[1] > 1:
        dist.barrier()
        dist.destroy_process_group()


def from_first_rank(function, *arguments, **options):
    """What function(*arguments, **options) returns on the first rank, or the UserError that it raises, on all of them.

    It must be picklable.
    """
    rank, ranks = rank_and_ranks()
    try:
        value = [function(*arguments, **options) if rank == 0 else None]
    except UserError as error:
        value = [error]
    if ranks > 1:
        dist.broadcast_object_list(value)
    if isinstance(value[0], UserError):
        raise value[0]
    return value[0]


def first_rank_first(function, *arguments):
    """function(*arguments) on each machine's first rank, then on the others, which find its downloads and caches."""
    waits = rank_and_ranks()[1] > 1 and os.environ["LOCAL_RANK"] != "0"
    if waits:
        dist.barrier()
    value = function(*arguments)
    if rank_and_ranks()[1] > 1 and not waits:
        dist.barrier()
    return value


def any_rank(*flags):
    """For each of the flags, whether it is true on any rank. Every rank must call this at the same place."""
    if rank_and_ranks()[1] > 1:
        flags = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags]


def warn_of(run, text):
    """Print a warning on stderr, each text once per run."""
    if text not in run.warnings and rank_and_ranks()[0] == 0:
        print(f"warning: {text}", file=sys.stderr)
    run.warnings.add(text)


def rank_words():
    """What a rank's dropout is seeded by, beside the batch; nothing on the first rank."""
    rank, _ = rank_and_ranks()
    return (rank,) if rank else ()


def own_rows(count):
    """The slice of a batch of `count` images that this rank takes; with fewer images than ranks, some take the first
    one again, in place of none: every rank has to take part in every step."""
    rank, ranks = rank_and_ranks()
    each, more = divmod(count, ranks)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more)) if rank < count else slice(0, 1)


def shared_steps(batches, epoch, start_step, *, accumulate):
    """The steps of an epoch: lists of (images, labels, weight), this rank's parts of `accumulate` batches or the rest.

    The mean loss of each part, times its weight, added up over the list and averaged over the ranks, is the mean over
    the images of the step. The weight of an image in place of none is 0. Batches that are not `whole` are this rank's
    parts already, and as large as those of the others.
    """
    rank, ranks = rank_and_ranks() if batches.whole else (0, 1)
    left = batches.batches(epoch, start_step)
    while group := list(itertools.islice(left, accumulate)):
        total = sum(len(labels) for _, labels in group)
        parts = []
        for images, labels in group:
            rows = own_rows(len(labels)) if batches.whole else slice(0, len(labels))
            counted = rows.stop - rows.start if rank < len(labels) else 0
            parts.append((images[rows], labels[rows], counted * ranks / total))
        yield parts


def synchronise_last(parts, forward):
    """The parts of a step; gradients are averaged over the ranks in the backward pass of the last one alone."""
    for part in parts:
        last = part is parts[-1]
        if hasattr(forward, "set_requires_gradient_sync"):  # FSDP2
            forward.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if last or not hasattr(forward, "no_sync") else forward.no_sync():  # DDP
            yield part


def rows_of_all_ranks(values, rows, count):
    """values (B, ...), this rank's own_rows, as (count, ...), those of all ranks in order."""
    rank, ranks = rank_and_ranks()
    if ranks == 1:
        return values
    whole = values.new_zeros(count, *values.shape[1:])
    if rank < count:
        whole[rows] = values
    dist.all_reduce(whole)
    return whole


ADDED_BY_RANK = ("loss", "correct", "images")  # of new_sums; the rest is the same on all ranks


def sums_of_all_ranks(sums):
    """What an epoch has added up (see new_sums), over all ranks."""
    if rank_and_ranks()[1] == 1:
        return sums
    totals = {name: torch.as_tensor(sums[name]).clone() for name in ADDED_BY_RANK}
    for total in totals.values():
        dist.all_reduce(total)
    return sums | totals | {"images": totals["images"].item()}


def same_buffers(model):
    """Give a model's buffers, such as BatchNorm's statistics, the values of the first rank."""
    for buffer in model.buffers() if rank_and_ranks()[1] > 1 else ():
        dist.broadcast(buffer, 0)


def check_ranks(args, device):
    """Raises UserError for flags that exclude each other, or the number of ranks."""
    ranks = rank_and_ranks()[1]
    given = {"--fsdp": args.fsdp, "--sync-bn": args.sync_bn}
    for flag in (flag for flag in given if given[flag] and ranks == 1):
        raise UserError(f"{flag} needs several processes: torchrun --nproc-per-node 2 ...")
    if args.batch_size % ranks:
        raise UserError(f"--batch-size {args.batch_size}: {ranks} processes cannot share it equally")
    if args.sync_bn and device.type != "cuda":
        raise UserError(f"--sync-bn needs GPUs, and --device is {device.type}")
    if args.fsdp and args.opt == "muon":
        raise UserError("--fsdp and --opt muon exclude each other: Muon needs whole matrices")
    if args.fsdp and (args.model_ema_decay or args.swa_start):
        raise UserError("--fsdp excludes --model-ema-decay and --swa-start: an average would be whole on each rank")


def shared_forward(model, args, device):
    """The model as training calls it: on several ranks wrapped in DDP, or sharded block by block with --fsdp.

    --sync-bn makes BatchNorm see the whole batch, not each rank's part. Raises UserError (see check_ranks).
    """
    check_ranks(args, device)
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return model
    if args.sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not args.fsdp:
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return shard_model(model, device, ranks)


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


def peak_memory_bytes(device):
    """The most memory held so far: on the GPU, or by the process; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux: ru_maxrss may be that of the parent process
    if status.exists() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(match[1])
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


LONG = 1_000_000  # --compile auto compiles for a GPU from this many training images on, over all epochs


def compiled_forward(model, args, *, device, num_images):
    """What to call in training: the model, compiled as --compile says and shared by ranks, on the same weights.

    auto compiles on CUDA alone, with CUDA graphs, and only for long runs (num_images is per epoch): compiling takes a
    minute or more. On two Zen 5 cores it took four minutes for a ResNet18, whose steps then took an eighth longer. A
    batch of another size than --batch-size, the last of an epoch, goes through the model itself. If nothing can be
    compiled, one line says so.
    """
    model = shared_forward(model, args, device)
    long_run = device.type == "cuda" and args.epochs * num_images >= LONG
    if args.compile == "off" or (args.compile == "auto" and not long_run):
        return model
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        print(f"warning: --compile {args.compile}: {reason}; training without it", file=sys.stderr)
        return model
    if rank_and_ranks()[1] > 1:  # without CUDA graphs, since gradients are averaged in the backward pass
        return torch.compile(model)
    compiled = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)

    def forward(images, *others):
        return (compiled if len(images) == args.batch_size else model)(images, *others)

    return forward


@contextlib.contextmanager
def memory_watched(run):
    """A context in which running out of memory is a UserError, and so are a few other failures (see explained)."""
    try:
        yield
    except Exception as error:
        if said := explained(error, run):
            raise said from error
        raise


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


def as_epoch_and_count(text):
    """(first epoch, batches per step) of a value of --accumulate: K from epoch 0 on, or EPOCH:K."""
    epoch, _, count = text.rpartition(":")
    return int(epoch or 0), int(count)


def epoch_and_count(text):
    """A flag's type: a value of --accumulate, as it is written shortest."""
    epoch, count = as_epoch_and_count(text) if re.fullmatch(r"(\d{1,9}:)?\d{1,9}", text) else (0, 0)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be K or EPOCH:K with K at least 1, not {text}")
    return f"{epoch}:{count}" if epoch else str(count)


def at_least(low, kind=int):
    return number(kind, low=low)


positive = number(above=0)
fraction = number(low=0, below=1)
probability = number(low=0, high=1)
seed = number(int, low=0, high=2**63 - 1)


def is_own_class(value):
    """Whether --attention names a class of the user's own, as FILE.py:Class."""
    return isinstance(value, str) and ".py:" in value


def name_or_class(names):
    """A flag's type: one of the names, or FILE.py:Class, which is not loaded here."""

    def convert(text):
        if text in names or is_own_class(text):
            return text
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(names)}, or FILE.py:Class)")

    return convert


# ---- training/flags.py: The flags that all training scripts share, the types of their values, and the parser that explains them.

# what --help shows; --help-all shows every flag
ESSENTIAL = {
    *("help", "help_all", "recipe", "summary", "dataset", "data_dir", "image_size", "val_fraction", "aa"),
    *("epochs", "batch_size", "lr", "opt", "seed", "device", "run_name", "out_dir", "resume", "overwrite", "minutes"),
    *("model", "pretrained", "init_from", "patch_size", "embed_dim", "depth", "num_heads"),  # of the models
    *("attention", "freeze"),
}
# What a flag is; if not listed, a part of the run: a resumed run must agree with it, and so must results of one group
FLAG_KINDS = {
    # kept when a run is resumed, unless given again; left out of results
    **dict.fromkeys(("data_dir", "cache_dir", "device", "save_minutes", "save_epochs", "init_from"), "place"),
    **dict.fromkeys(("log", "log_steps", "sample_epochs", "on_nan"), "place"),
    # not kept when a run is resumed; left out of results
    **dict.fromkeys(("cache_gib", "workers", "profile", "fsdp", "sync_bn"), "machine"),
    # the same, and not allowed in a plan: they belong to one start
    **dict.fromkeys(("out_dir", "run_name", "resume", "overwrite", "minutes", "skip_test"), "start"),
    **dict.fromkeys(("summary", "help", "help_all"), "start"),
}


def flag_kind(name):
    """ "place", "machine" or "start" (see FLAG_KINDS), or "run" for a part of the run."""
    return FLAG_KINDS.get(name, "run")


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


class TrainingParser(Parser):
    """A parser of many flags whose help shows the ESSENTIAL ones."""

    def __init__(self, script, description):
        super().__init__(description, prog=script, add_help=False, usage="python %(prog)s [FLAGS]")

    def help_text(self, *, everything):
        """The help as text, of all flags or of the ESSENTIAL ones."""
        left_out = [action for action in self._actions if not everything and action.dest not in ESSENTIAL]
        for action in left_out:
            action.help = argparse.SUPPRESS
        return self.format_help() + (f"\n{len(left_out)} more flags: --help-all\n" if left_out else "")


def make_parser(script, description, *, recipes, datasets, policies):
    """A TrainingParser with the flags of every training script; the script (its file) adds those of its model.

    recipes, datasets and policies (of augmentation) are the names that --recipe, --dataset and --aa accept.
    """
    parser = TrainingParser(script, description)
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show the flags that most users set")
    add("--help-all", action="store_true", help="show all flags")
    add("--recipe", choices=recipes, metavar="NAME", help=f"a set of defaults: {', '.join(recipes)}")
    add("--summary", action="store_true", help="print the model, draw the schedule, and stop")
    add_data_flags(parser.add_argument_group("images"), datasets)
    add_augmentation_flags(parser.add_argument_group("augmentation, random for every image"), policies)
    add_optimizer_flags(parser.add_argument_group("training"))
    add_schedule_flags(parser.add_argument_group("schedule and regularisation"))
    add_run_flags(parser.add_argument_group("the run and its folder"))
    return parser


def add_data_flags(group, datasets):
    add = group.add_argument
    add("--dataset", choices=datasets, metavar="NAME", help=", ".join(datasets))
    add("--data-dir", metavar="DIR", help="where the images are, or are downloaded to (default: datasets)")
    add("--dataset-name", metavar="NAME", help="what results call your folder (default: the folder's name)")
    help_text = "resize images, to a square or to HEIGHTxWIDTH; above 64, squares of folders are cropped"
    add("--image-size", type=pixels, metavar="PIXELS", help=help_text)
    add("--channels", type=int, choices=(1, 3), default=3, metavar="N", help="1 reads a folder in grey, 3 in colour")
    help_text = "side of the square cut from the centre of a large test image, as a share of its short side"
    add("--crop-pct", type=number(above=0, high=1), metavar="F", default=0.875, help=help_text)
    help_text = "validate on this share of training images; test at the end"
    add("--val-fraction", type=fraction, metavar="F", default=0.0, help=help_text)
    help_text = "share of the images that become the test set, if a folder has no test/"
    add("--test-fraction", type=number(above=0, below=1), metavar="F", default=0.2, help=help_text)
    add("--train-per-class", type=at_least(1), metavar="N", help="train on only N images per class")
    add("--group-by", metavar="REGEX", help="files in which it finds the same text are kept in one split")
    add("--folds", type=at_least(2), metavar="K", help="cross-validate: test on fold number SEED mod K of a folder")
    add("--split-seed", type=seed, metavar="N", default=0, help="change it to draw other splits")
    add("--cache-dir", metavar="DIR", help="where decoded folders are kept (default: the user's cache folder)")
    help_text = "memory for large images; less if the machine swaps (default: a quarter of what is free)"
    add("--cache-gib", type=at_least(0, float), metavar="GIB", help=help_text)
    help_text = "processes that decode images if memory does not hold them (default: one per core, 16 at most)"
    add("--workers", type=at_least(0), metavar="N", help=help_text)


def add_augmentation_flags(group, policies):
    add = group.add_argument
    add("--hflip", type=probability, metavar="P", default=0.5, help="mirror; 0 if left and right matter, as in digits")
    add("--crop-padding", type=at_least(0), metavar="PIXELS", default=0, help="shift by up to this many pixels")
    help_text = "area of a random resized crop; narrow it if objects are small"
    add("--scale", type=positive, nargs=2, metavar=("MIN", "MAX"), help=help_text)
    add("--ratio", type=positive, nargs=2, metavar=("MIN", "MAX"), help="width / height of that crop")
    add("--rotate", type=at_least(0, float), metavar="DEGREES", default=0.0, help="rotate by up to this angle")
    help_text = f"none, {', '.join(policies)}: a policy of augmentation, for long runs that overfit"
    add("--aa", choices=("none", *policies), default="none", metavar="NAME", help=help_text)
    add("--fill", type=number(int, low=0, high=255), default=0, help="grey level that --aa and --rotate uncover")
    add("--reprob", type=probability, metavar="P", default=0.0, help="erase a random rectangle, in long runs")
    add("--cutout", type=at_least(0), metavar="PIXELS", default=0, help="erase a random square of this side")
    add("--mixup", type=at_least(0, float), metavar="ALPHA", default=0.0, help="blend pairs of images, in long runs")
    help_text = "paste a box of another image; with --mixup, one or the other for each batch"
    add("--cutmix", type=at_least(0, float), metavar="ALPHA", default=0.0, help=help_text)
    add("--extra-data", metavar="DIR", help="class folders of generated images (see generate.py) to mix in")
    add("--extra-fraction", type=number(above=0, high=1), metavar="F", default=0.5, help="their share of each batch")


def add_optimizer_flags(group):
    add = group.add_argument
    add("--epoch-images", type=at_least(1), metavar="N", help="images of an epoch of webdataset's shards")
    add("--epochs", type=at_least(1), metavar="N", help="more are slower and better; 2 give a first look")
    add("--batch-size", type=at_least(1), metavar="N", help="halve it, and --lr with it, if memory runs out")
    add("--lr", type=positive, help="peak learning rate; lower it if the loss explodes")
    help_text = "sgd, adam, adamw or muon, which learns most in few epochs"
    add("--opt", choices=("sgd", "adam", "adamw", "muon"), default="adamw", metavar="NAME", help=help_text)
    help_text = "check a new block: can it learn N training images by heart? Without augmentation and dropout"
    add("--overfit", type=at_least(1), metavar="N", help=help_text)
    add("--seed", type=seed, metavar="N", default=0, help="seed of weights, order, augmentation and dropout")
    add("--device", metavar="NAME", help="cuda, cuda:1, mps or cpu (default: the first available)")
    help_text = "mixed precision; auto takes the type that the device is fast at, off is float32"
    add("--amp", choices=("auto", "bf16", "fp16", "tf32", "off"), default="auto", help=help_text)
    add("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on a GPU, in long runs")
    add("--momentum", type=fraction, default=0.9, help="momentum of sgd")
    add("--opt-betas", type=fraction, nargs=2, metavar="B", default=[0.9, 0.999], help="of adam and adamw")
    add("--opt-eps", type=positive, metavar="E", default=1e-8, help="of adam and adamw")
    add("--weight-decay", type=at_least(0, float), metavar="W", help="raise it if the model overfits")
    add("--decay-all", action=argparse.BooleanOptionalAction, help="also decay biases, normalisation and embeddings")
    help_text = "batches per update of the weights: K, or by epoch from 0, as 0:8 10:4; saves memory"
    add("--accumulate", type=epoch_and_count, nargs="+", metavar="K", default=["1"], help=help_text)
    help_text = "auto scales the recipe's --lr to the batch: linearly for sgd, by the square root for the others"
    add("--lr-scale", choices=("none", "auto"), default="none", help=help_text)
    help_text = "skip an epoch's last batch if it is not full: BatchNorm suffers from a small one"
    add("--drop-last", action=argparse.BooleanOptionalAction, default=False, help=help_text)


def add_schedule_flags(group):
    add = group.add_argument
    add("--sched", choices=("multistep", "cosine", "onecycle"), help="steps down, warm-up and cosine, or one cycle")
    help_text = "epochs after which multistep lowers the learning rate (default: 5/8 and 15/16 of all)"
    add("--milestones", type=at_least(1), nargs="+", metavar="EPOCH", help=help_text)
    add("--gamma", type=positive, default=0.1, help="factor by which multistep lowers it")
    help_text = "length of cosine's warm-up; raise it if the first epochs diverge (default: a tenth)"
    add("--warmup-epochs", type=at_least(0, float), metavar="EPOCHS", help=help_text)
    add("--div-factor", type=positive, metavar="F", default=25.0, help="onecycle starts at the peak divided by this")
    add("--smoothing", type=fraction, default=0.0, help="label smoothing")
    add("--class-weights", choices=("none", "balanced"), default="none", help="balanced: rare classes weigh more")
    add("--model-ema-decay", type=fraction, metavar="D", default=0.0, help="evaluate averaged weights, say 0.999")
    help_text = "after this share of the epochs, evaluate the mean of the weights after each epoch (SWA)"
    add("--swa-start", type=fraction, metavar="F", default=0.0, help=help_text)
    help_text = "constant learning rate from --swa-start on (default: the schedule's at that time)"
    add("--swa-lr", type=positive, metavar="LR", help=help_text)
    help_text = "limit the gradient's norm, say to 1, if the loss jumps; none: do not"
    add("--clip-grad", type=number(above=0, optional=True), metavar="NORM", help=help_text)
    add("--clip-value", type=positive, metavar="V", help="limit each element of the gradient")
    add("--on-nan", choices=("stop", "skip", "rollback"), default="stop", help="what to do if the loss is not finite")
    add("--patience", type=at_least(1), metavar="N", help="stop after N epochs without a better validation accuracy")


def add_run_flags(group):
    add = group.add_argument
    add("--run-name", metavar="NAME", help="write to OUT_DIR/NAME (default: the model's name)")
    add("--out-dir", metavar="DIR", default="checkpoints", help="where runs are written, say a mounted drive")
    add("--resume", metavar="RUN", help="a run's folder to resume; auto: resume if it exists, else start it")
    add("--overwrite", action="store_true", help="replace a run of the same name")
    add("--minutes", type=positive, metavar="M", help="save and stop after M minutes, say before Colab ends")
    add("--skip-test", action="store_true", help="leave the test set shut: choose on validation images first")
    add("--save-minutes", type=positive, metavar="M", default=10.0, help="save within an epoch every M minutes")
    add("--save-epochs", type=at_least(1), nargs="*", metavar="N", default=[], help="keep these epochs' checkpoints")
    add("--deterministic", action="store_true", help="the same bits in each run on a GPU, too; slower")
    add("--fsdp", action="store_true", help="with torchrun: divide weights and optimiser among GPUs (FSDP2)")
    add("--sync-bn", action="store_true", help="with torchrun: BatchNorm sees the whole batch")
    add("--log", choices=("tensorboard", "wandb", "trackio"), nargs="*", default=[], help="log to these as well")
    add("--log-steps", action="store_true", help="log each step as well, to steps.csv and to those of --log")
    add("--profile", action="store_true", help="also write where the time of ten steps goes")


# ---- training/loop.py: The hand-written loops: one epoch of training, and one pass over images that evaluates a model.

def new_sums(device):
    """What an epoch adds up, from its first step.

    On the device: the loss summed over images, that of the last step, the number of correct images, and the first step
    whose loss is not finite, with its learning rate. On the host: steps, images, seconds, and the last learning rate.
    """
    return {
        "loss": torch.zeros((), device=device),
        "last_loss": torch.zeros((), device=device),
        "correct": torch.zeros((), dtype=torch.int64, device=device),
        "bad_step": torch.full((), -1, dtype=torch.int64, device=device),
        "bad_lr": torch.zeros((), device=device),
        "step": 0,
        "images": 0,
        "seconds": 0.0,
        "lr": 0.0,
    }


def loss_and_accuracy(sums):
    """The means per image, as floats, the accuracy None if the loss has no such thing: waits for the device."""
    loss, accuracy = (sums[name].item() / (sums["images"] or float("nan")) for name in ("loss", "correct"))
    return loss, None if accuracy < 0 else accuracy


def train_one_epoch(
    *,
    model,
    forward=None,
    batches,
    loss_function,
    optimizer,
    schedule,
    precision,
    seed,
    epoch,
    sums,
    accumulate=("1",),
    clip_grad=None,
    clip_value=None,
    average=None,
    after_step,
):
    """Train from sums["step"] to the end of an epoch (counted from 0), adding to sums (see new_sums).

    forward stands in place of the model itself, if it is compiled or shared (see compiled_forward). loss_function is
    called as classification_loss is. A step is one update of the weights, by the gradient of so many batches (see
    batches_per_step). clip_grad limits the gradient's norm, clip_value each of its elements. average, a WeightAverage,
    follows each update. after_step(sums) is called after each step, and ends the epoch early by returning True.
    Nothing here waits for the device, except an average, --on-nan skip and, in float16, Muon.
    """
    model.train()
    forward = forward or model
    scaler = precision.scaler
    for parts in shared_steps(batches, epoch, sums["step"], accumulate=batches_per_step(accumulate, epoch)):
        optimizer.zero_grad()
        step_loss = torch.zeros_like(sums["loss"])
        for images, labels, weight in synchronise_last(parts, forward):  # (B, 3, H, W); (B,), or (B, classes) if mixed
            torch.manual_seed(seed_for("dropout", seed, epoch, sums["step"], *rank_words()))
            with precision.autocast():
                loss, correct = loss_function(forward, images, labels)  # () and (), as classification_loss
            scaler.scale(loss * weight).backward()
            step_loss += loss.detach() * weight
            if weight:  # without: an image in place of none, see shared_steps
                add_batch(sums, loss.detach(), correct, count=len(labels), lr=schedule.get_last_lr()[0])
            sums["step"] += 1
        sums["last_loss"] = step_loss
        if clip_grad or clip_value:
            scaler.unscale_(optimizer)
        if clip_grad:
            clip_grad_norm_(model.parameters(), clip_grad)
        if clip_value:
            clip_grad_value_(model.parameters(), clip_value)
        scaler.step(optimizer)
        skipped = scaler.update()  # None; with --on-nan skip, whether the update was left out
        if average and not skipped:
            average.after_step(model)
        for _ in parts:  # a schedule counts batches
            schedule.step()
        if after_step(sums):
            break


def classification_loss(forward, images, labels, *, criterion):
    """(the mean loss of a batch (), the number of correct images (); None from a loss that has no such thing).

    criterion(logits, labels) gives that mean for labels (B,), or (B, classes) if images are mixed.
    """
    logits = forward(images)  # (B, classes)
    hard_labels = labels if labels.ndim == 1 else labels.argmax(1)  # (B,): of mixed images, the larger share
    return criterion(logits, labels), (logits.argmax(1) == hard_labels).sum()


def add_batch(sums, loss, correct, *, count, lr):
    """Add one batch of `count` images to sums: its mean loss (), its correct images () and its learning rate."""
    sums["loss"] += loss * count
    sums["correct"] += -count if correct is None else correct  # below zero: the loss has no such thing
    sums["images"] += count
    first_bad = (sums["bad_step"] < 0) & ~loss.isfinite()
    sums["bad_step"] = torch.where(first_bad, sums["step"], sums["bad_step"])
    sums["bad_lr"] = torch.where(first_bad, lr, sums["bad_lr"])
    sums["lr"] = lr


def batches_per_step(accumulate, epoch):
    """How many batches make a step in an epoch, counted from 0, by --accumulate, say ["0:8", "10:4"]."""
    return [count for start, count in [(0, 1), *sorted(map(as_epoch_and_count, accumulate))] if start <= epoch][-1]


@torch.inference_mode()
def validate(*, model, batches, precision):
    """(loss, accuracy, logits): mean cross entropy and accuracy per image, logits (N, classes) float32 on the device.

    The model is in evaluation mode meanwhile, and afterwards in the mode that it was in. Several ranks take a part of
    each batch, and all have the result.
    """
    training = model.training
    same_buffers(model)
    model.eval()
    sums = new_sums(batches.device)
    outputs = []
    for images, labels in batches.batches():  # (B, 3, H, W) and (B,)
        rows = own_rows(len(labels))
        with precision.autocast():
            logits = model(images[rows])  # (B, classes)
        outputs.append(rows_of_all_ranks(logits.float(), rows, len(labels)))
        sums["loss"] += cross_entropy(outputs[-1], labels, reduction="sum")
        sums["correct"] += (outputs[-1].argmax(1) == labels).sum()
        sums["images"] += len(labels)
    model.train(training)
    return *loss_and_accuracy(sums), torch.cat(outputs)  # (N, classes)


# ---- training/optimizer.py: The loss, optimisers, and learning-rate schedules, which count batches.

def make_loss(args, dataset, device):
    """The classification_loss that the flags ask for.

    With --class-weights balanced, an image counts N / (classes x images of its class), of the N training images.
    """
    if args.class_weights == "none":
        criterion = partial(cross_entropy, label_smoothing=args.smoothing)
        return partial(classification_loss, criterion=criterion)
    labels = dataset.train.labels
    counts = labels.bincount(minlength=len(dataset.classes)).clamp(min=1)  # --overfit may leave a class out
    weights = (len(labels) / (len(counts) * counts)).to(device)
    criterion = partial(weighted_cross_entropy, weights=weights, smoothing=args.smoothing)
    return partial(classification_loss, criterion=criterion)


def weighted_cross_entropy(logits, labels, *, weights, smoothing):
    """The sum of the weighted losses of B images, divided by B; of a mixed image, each label has its class's weight.

    torch's own mean divides by the sum of the weights, so that the losses of parts of a batch do not add up to its own.
    """
    shares = weights * (one_hot(labels, len(weights)) if labels.ndim == 1 else labels)  # (B, classes)
    return cross_entropy(logits, shares.lerp(shares.mean(1, keepdim=True), smoothing))


def parameter_groups(model, weight_decay, *, decay_all, leave_out=()):
    """Two groups of the trained parameters for an optimiser: with weight decay, and without.

    leave_out are parameters of another optimiser. Unless decay_all, vectors (biases, normalisation) and the parameters
    named in model.no_weight_decay are not decayed, as is usual since Vaswani et al.'s code; the report decays all.
    """
    left_out = {id(parameter) for parameter in leave_out}
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out or not parameter.requires_grad:
            continue
        skip = not decay_all and (parameter.ndim < 2 or name in model.no_weight_decay)
        (free if skip else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the weights of a model's blocks, AdamW on all the rest, as one optimiser.

    Blocks are the modules in `blocks`, or in `layer1` to `layer4` of a ResNet; a convolution counts as the matrix from
    a patch to the channels. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that one learning
    rate serves both. Raises UserError if nothing in a block is trained.
    """

    def __init__(self, model, *, lr, weight_decay, decay_all):
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        inner = [p for name, p in trained if p.ndim in (2, 4) and name.startswith(("blocks.", "layer"))]
        if not inner:
            raise UserError("--opt muon: no weight matrix of a block is trained here; use --opt adamw")
        self.matrices = {p: nn.Parameter(p.detach().flatten(1)) for p in inner}  # the same memory
        options = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        muon = torch.optim.Muon(self.matrices.values(), **options)
        groups = parameter_groups(model, weight_decay, decay_all=decay_all, leave_out=inner)
        self.parts = {"muon": muon, "adamw": torch.optim.AdamW(groups, lr=lr, fused=True)}
        super().__init__(self.outer_groups(), {})

    def outer_groups(self):
        """What a schedule and a gradient scaler see: the parts' own groups, Muon's with weights in their own shape."""
        muon, adamw = (part.param_groups for part in self.parts.values())
        return [muon[0] | {"params": list(self.matrices)}, *adamw]

    def pass_on(self):
        """Copy to Muon what a schedule has written to the outer groups; AdamW's groups are its own."""
        inner = self.parts["muon"].param_groups[0]
        inner.update(self.param_groups[0] | {"params": inner["params"]})

    def step(self):
        self.pass_on()
        for weight, matrix in self.matrices.items():
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts.values():
            part.step()

    def state_dict(self):
        self.pass_on()
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.param_groups = self.outer_groups()


def make_optimizer(args, model):
    """The optimiser that the flags ask for (--opt, --lr, --weight-decay, --decay-all, --momentum, --opt-betas,
    --opt-eps), of the parameters that are to be trained.

    adam adds weight decay to the gradient, adamw subtracts it from the weights (Loshchilov & Hutter 2019). All except
    muon are torch's fused forms: one pass over the weights per step.
    """
    if args.opt == "muon":
        return MuonWithAdamW(model, lr=args.lr, weight_decay=args.weight_decay, decay_all=args.decay_all)
    groups = parameter_groups(model, args.weight_decay, decay_all=args.decay_all)
    if args.opt == "sgd":
        optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum, fused=True)
        # if a gradient scaler skips the first step, torch would leave these uninitialised
        for group in groups if args.momentum else ():
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.opt]
    return kind(groups, lr=args.lr, betas=tuple(args.opt_betas), eps=args.opt_eps, fused=True)


DEFAULT_MILESTONES = (100 / 160, 150 / 160)  # of the run's length: the report's epochs 100 and 150 of 160


def multistep_schedule(optimizer, *, epochs, steps_per_epoch, milestones=None, gamma=0.1):
    """MultiStepLR that multiplies the learning rate by gamma after each of the milestones, in epochs.

    The default milestones are those of the report, scaled to the length of the run.
    """
    if milestones is None:
        milestones = [max(1, round(share * epochs)) for share in DEFAULT_MILESTONES]
    return MultiStepLR(optimizer, [round(m * steps_per_epoch) for m in milestones], gamma=gamma)


def cosine_factor(step, *, warmup_steps, total_steps):
    """The learning rate after `step` steps, as a share of its peak: linear from zero, then half a cosine to zero."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


def cosine_schedule(optimizer, *, epochs, steps_per_epoch, warmup_epochs):
    """Cosine decay to zero (Loshchilov & Hutter 2017, eq. 5, one cycle) after a linear warm-up from zero."""
    factor = partial(cosine_factor, warmup_steps=warmup_epochs * steps_per_epoch, total_steps=epochs * steps_per_epoch)
    return LambdaLR(optimizer, factor)


def onecycle_schedule(optimizer, *, epochs, steps_per_epoch, peak, div_factor):
    """One cycle (Smith 2018), as in torch and fastai: from peak / div_factor to the peak in 30 % of the steps, then to
    nearly zero, both along a cosine; momentum, or Adam's first beta, goes from 0.95 to 0.85 and back.
    """
    return OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=epochs * steps_per_epoch,
        div_factor=div_factor,
        cycle_momentum=bool(optimizer.defaults.keys() & {"momentum", "betas"}),
    )


class ThenConstant:
    """A schedule whose learning rate is constant from step `start` on: lr, or if that is None the schedule's own."""

    def __init__(self, schedule, *, start, lr):
        self.schedule, self.start, self.lr = schedule, start, lr
        self.get_last_lr = schedule.get_last_lr
        self.state_dict, self.load_state_dict = schedule.state_dict, schedule.load_state_dict

    @property
    def last_epoch(self):
        """The number of steps, as torch's schedules call it."""
        return self.schedule.last_epoch

    def step(self):
        if self.schedule.last_epoch < self.start:
            self.schedule.step()
        else:
            self.schedule.last_epoch += 1
        if self.schedule.last_epoch >= self.start and self.lr:
            for group in self.schedule.optimizer.param_groups:
                group["lr"] = self.lr
            self.schedule._last_lr = [self.lr] * len(self.schedule.optimizer.param_groups)


def swa_epoch(args):
    """The epoch, counted from 0, after which --swa-start averages the weights for the first time."""
    return min(round(args.swa_start * args.epochs), args.epochs - 1)


def make_schedule(args, optimizer, *, steps_per_epoch):
    """The decaying_schedule, and with --swa-start the constant learning rate that follows it (--swa-lr)."""
    schedule = decaying_schedule(args, optimizer, steps_per_epoch=steps_per_epoch)
    if not args.swa_start:
        return schedule
    return ThenConstant(schedule, start=swa_epoch(args) * steps_per_epoch, lr=args.swa_lr)


def decaying_schedule(args, optimizer, *, steps_per_epoch):
    """The schedule that the flags ask for (--sched, --epochs, --milestones, --gamma, --warmup-epochs, --div-factor)."""
    length = {"epochs": args.epochs, "steps_per_epoch": steps_per_epoch}
    if args.sched == "multistep":
        return multistep_schedule(optimizer, **length, milestones=args.milestones, gamma=args.gamma)
    if args.sched == "onecycle":
        return onecycle_schedule(optimizer, **length, peak=args.lr, div_factor=args.div_factor)
    warmup_epochs = 0.1 * args.epochs if args.warmup_epochs is None else args.warmup_epochs
    return cosine_schedule(optimizer, **length, warmup_epochs=warmup_epochs)


# ---- training/outputs.py: What a run leaves behind to look at: log.csv, curves.png, split.csv, predictions.npz and result.json.

COLUMNS = (  # of log.csv
    *("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy"),
    *("seconds", "images_per_second", "peak_memory_bytes"),
)
NAN_COUNTS = ("skipped_updates", "rollbacks")  # of --on-nan, also in the rows of a history if there were any


def print_header(args, precision):
    """The first lines of a run: its recipe, and what it runs on."""
    epochs = "1 epoch" if args.epochs == 1 else f"{args.epochs} epochs"
    print(f"recipe {args.recipe}: {args.dataset}, {epochs}, batch {args.batch_size}, lr {args.lr:g}")
    print(f"{device_name(precision.device)}, {precision.dtype}, torch {torch.__version__}")


def print_model(name, model, cells):
    """A model's size, and the grid of what it attends to: cells are its patches, tokens or positions."""
    print(f"{name}, {count_parameters(model):,} parameters, a grid of {model.grid[0]} x {model.grid[1]} {cells}")


def epoch_line(row, epochs):
    """One aligned line for the terminal."""
    width = len(str(epochs))
    splits = "   ".join(
        f"{split} {row[f'{split}_loss']:.4f}" + ("" if (a := row[f"{split}_accuracy"]) is None else f" {a:7.2%}")
        for split in ("train", "val", "test")
        if row[f"{split}_loss"] is not None
    )
    speed = f"{row['seconds']:7.1f} s {row['images_per_second']:7,.0f} images/s"
    counts = "".join(f"   {name.replace('_', ' ')}: {row[name]}" for name in NAN_COUNTS if name in row)
    return f"epoch {row['epoch']:{width}}/{epochs}   lr {row['lr']:.2e}   {splits}   {speed}{counts}"


def warn_if_constant(run, split, logits=None):
    """Warn if logits (N, classes) name one class alone, and labels several; not in the first of several epochs."""
    one_class = logits is not None and len(logits.argmax(1).unique()) == 1
    if one_class and (run.epoch or run.args.epochs == 1) and len(run.dataset.splits()[split].labels.unique()) > 1:
        advice = "try a lower --lr, --clip-grad 1 or --class-weights balanced"
        warn_of(run, f"the model predicts the same class for every image; {advice}")


def largest_gradient(run):
    """What an error says of the last step's gradients: which has the largest element, of several infinite the last."""
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    if run.args.fsdp or not gradients:
        return ""
    sizes = torch.stack([gradient.abs().max() for gradient in gradients.values()])
    sizes = sizes.nan_to_num(math.inf, posinf=math.inf).tolist()
    size, _, name = max(zip(sizes, range(len(sizes)), gradients))
    return f"; at step {run.sums['step']} the largest gradient was {size:.2g}, of {name}"


def accuracy_text(result):
    """The accuracy of a finished run, or with --overfit how many images it learnt; of a generator, its loss."""
    if "test_accuracy" not in result:
        return f"training loss {result['train_loss']:.4f} after epoch {result['epochs']}"
    if result["test_accuracy"] is None:  # --skip-test
        return f"validation accuracy {result['val_accuracy']:.2%} after epoch {result['epochs']}, without a test"
    if not (count := result["args"].get("overfit")):
        accuracy, balanced = result["test_accuracy"], result.get("test_balanced_accuracy")  # older results have none
        differs = balanced is not None and not math.isclose(accuracy, balanced)  # so the classes are unbalanced
        recalls = f"; balanced accuracy {balanced:.2%}, the mean over classes" if differs else ""
        return f"test accuracy {accuracy:.2%} after epoch {result['epochs']}{recalls}"
    learnt = round(count * result["test_accuracy"])
    advice = "" if learnt == count else "; more --epochs or another --lr may do it, else look for a mistake"
    return f"{learnt} of {count} images learnt by heart{advice}"


def write_log(path, history):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def draw_curves(path, history, args):
    """Loss and accuracy against the epoch of a run with the arguments args; a dotted line where multistep acted.

    A training loss with label smoothing, mixed labels or weights, and an accuracy on mixed images, are other quantities
    than those on validation and test images: they have axes of their own.
    """
    epochs = [row["epoch"] for row in history]
    stepped = args.sched == "multistep"
    falls = [row["epoch"] for before, row in itertools.pairwise(history) if stepped and row["lr"] < before["lr"]]
    mixed, how = args.mixup or args.cutmix, f", label smoothing {args.smoothing:g}" if args.smoothing else ""
    how += (", mixed labels" if mixed else "") + (", classes weighted" if args.class_weights != "none" else "")
    other = {"train_loss": f"training loss{how}"} if how else {}
    other |= {"train_accuracy": "training accuracy on mixed images (%)"} if mixed else {}
    panels = [([name], label) for name, label in other.items()]
    generates = "noise_steps" in vars(args)
    for quantity, label in (("loss", "loss" if generates else "loss (cross entropy)"), ("accuracy", "accuracy (%)")):
        names = [f"{split}_{quantity}" for split in ("train", "val", "test")]
        panels += [(names, label)] if any(history[-1][name] is not None for name in names) else []
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (names, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in (n for n in names if history[-1][n] is not None and (n not in other or names == [n])):
            split, _, quantity = name.partition("_")
            values = [row[name] * (100 if quantity == "accuracy" else 1) for row in history]
            colour = {"train": "C0", "val": "C2", "test": "C1"}[split]
            axes.plot(epochs, values, colour, label=split, marker="." if len(epochs) < 30 else "")
        for epoch in falls:
            label_once = "learning rate fell" if epoch == falls[0] else None
            axes.axvline(epoch - 0.5, color="grey", linestyle=":", label=label_once)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def write_split(path, dataset):
    """Write split.csv: which image is in which split."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "class", "split"))
    for key, split in dataset.splits().items():
        writer.writerows((name, dataset.classes[y], key) for name, y in zip(split.names, split.labels.tolist()))
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_predictions(path, logits, dataset):
    """Write predictions.npz: logits (N, classes) float32, labels (N,), names (N,) of the test images, and classes."""
    labels, names = dataset.test.labels.numpy(), dataset.test.names
    arrays = {"logits": logits.cpu().numpy(), "labels": labels, "names": names, "classes": np.array(dataset.classes)}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def git_commit(script):
    """(commit, whether the tree is clean) of the working folder; (None, None) if git does not track the script."""

    def git(*command):
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", script)
        return git("rev-parse", "HEAD"), not git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None, None


def count_parameters(model, leave_out=None):
    """The number of a model's parameters, without the one named leave_out."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name != leave_out)


def balanced_accuracy(logits, labels):
    """The mean recall of the classes that occur in labels (N,), for logits (N, classes)."""
    correct = logits.argmax(1).to(labels.device) == labels
    return statistics.fmean(correct[labels == label].double().mean().item() for label in labels.unique())


def write_result(run, **measured):
    """Write result.json: how a run was made, and what was measured; accuracies are fractions. Returns it as a dict."""
    args, history, dataset = vars(run.args), run.history, run.dataset
    commit, clean = git_commit(run.script)
    result = {
        "script": run.script,
        "recipe": args["recipe"],
        "args": {name: value for name, value in args.items() if flag_kind(name) == "run"},
        "model": args["model"],
        "init_from": Path(args["init_from"]).name if args.get("init_from") else None,
        "params": count_parameters(run.model),
        "trained_params": sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad),
        "params_without_embedding": count_parameters(run.model, leave_out="pos_embed"),
        "dataset_name": dataset.name,
        "images": {key: len(split.labels) for key, split in dataset.splits().items()},
        "num_classes": len(dataset.classes),
        "extra": run.extra_record,
        "data_hash": dataset.whole_hash or run.data_hashes["train"],  # folds of one set of images are one group
        "epochs": len(history),
        "seed": args["seed"],
        "split_seed": args["split_seed"],
        "val_accuracy": history[-1]["val_accuracy"],
        **measured,
        **{name: count for name in NAN_COUNTS if (count := sum(row.get(name, 0) for row in history))},
        "weights": "raw" if run.evaluated_model is run.model else run.average.kind,
        "ranks": rank_and_ranks()[1],
        "precision": run.precision.amp,
        "seconds": sum(row["seconds"] for row in history),
        "images_per_second": statistics.median(row["images_per_second"] for row in history),
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "device": device_name(run.device),
        "device_type": run.device.type,
        "torch": torch.__version__,
        "commit": commit,
        "clean": clean,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(run.folder / "result.json", result)
    return result


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


def make_checkpoint(run):
    """The state of a run (see training/run.py) at one moment, as a dict of tensors and plain Python types.

    Raises UserError if a weight is not finite: such a run could not be resumed.
    """
    weights, optimizer = run.model.state_dict(), run.optimizer.state_dict()
    if run.args.fsdp:
        weights, optimizer = gathered(weights), gathered(optimizer)
    if not all_finite(run.model.parameters()):
        raise UserError(f"weights are not finite {position(run.epoch, run.sums['step'])}: lower --lr, or --clip-grad 1")
    return {
        "format_version": FORMAT_VERSION,
        "model": run.args.model,
        "model_args": run.model_args,
        "classes": list(run.dataset.classes),
        "image_size": run.args.image_size,
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "data_hashes": run.data_hashes,
        "weights": weights,
        "ema": run.average.model.state_dict() if run.average and run.average.model else None,
        "optimizer": optimizer,
        # without the milestones: they follow from the arguments, and are no plain type
        "schedule": {name: value for name, value in run.schedule.state_dict().items() if name != "milestones"},
        "scaler": run.precision.scaler.state_dict(),
        "seed": run.args.seed,
        "epoch": run.epoch,
        "step": run.sums["step"],
        "sums": sums_of_all_ranks(run.sums),
        "history": run.history,
        "log_id": run.log_id,
        "args": vars(run.args),
    }


def save_checkpoint(path, checkpoint):
    """Write a checkpoint to path; an existing last.pt becomes last.prev.pt."""
    path = Path(path)
    previous = path.with_name("last.prev.pt") if path.name == "last.pt" else None
    write_atomically(path, lambda file: write_archive(file, checkpoint), previous=previous)


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


def has_checkpoint(folder):
    return (folder / "last.pt").exists() or (folder / "last.prev.pt").exists()


def folder_to_resume(path, out_dir):
    """The folder of the run that --resume names, by its folder or its last.pt. Raises UserError if there is none."""
    folder = path.parent if path.name == "last.pt" else path
    if has_checkpoint(folder):
        return folder
    reason = "there is no last.pt in it" if path.is_dir() else "that is no run's folder, and no last.pt"
    there = Path(out_dir) / path.name
    raise UserError(f"--resume {path}: {reason}" + (f"; use --resume {there}" if has_checkpoint(there) else ""))


def evaluated_weights(checkpoint):
    """The weights that a checkpoint's accuracies belong to: the averaged ones if there are any."""
    return checkpoint["ema"] or checkpoint["weights"]


def check_same_images(checkpoint, run):
    """Raises UserError if a run's dataset is not the one that the checkpoint was trained on."""
    dataset, then, now = run.dataset, checkpoint.get("data_hashes"), run.data_hashes
    if checkpoint["classes"] != list(dataset.classes):
        there, here = ", ".join(checkpoint["classes"]), ", ".join(dataset.classes)
        raise UserError(f"the run to resume has the classes {there}, the images {here}")
    if not isinstance(then, dict):  # an older checkpoint: all it knows of the images is their statistics
        here, there = [dataset.mean, dataset.std], [checkpoint["mean"], checkpoint["std"]]
        then = now if torch.allclose(torch.tensor(here), torch.tensor(there), rtol=0, atol=1e-6) else {}
    names = {"train": "training", "val": "validation", "test": "test", "extra": "extra"}
    if changed := [name for key, name in names.items() if then.get(key) != now.get(key)]:
        raise UserError(f"the {changed[0]} images are not those of the run to resume: an image or its class is another")


def load_weights(model, weights, *, sharded):
    """Load whole weights, of which each rank keeps its shards if the model is `sharded` (--fsdp)."""
    if sharded:
        weights = sharded_weights(weights, model)
    model.load_state_dict(weights)


def restore_training(checkpoint, run):
    """Restore a run's weights, optimiser, schedule, scaler and position from a checkpoint."""
    with read_from_outside(f"--resume {run.folder}: the checkpoint does not fit the run"):
        load_weights(run.model, checkpoint["weights"], sharded=run.args.fsdp)
        if checkpoint["ema"]:
            run.average.load(checkpoint["ema"], epoch=checkpoint["epoch"], step=checkpoint["step"])
        state = checkpoint["optimizer"]
        if run.args.fsdp:
            state = sharded_state(state, run.optimizer)
        run.optimizer.load_state_dict(state)
        run.schedule.load_state_dict(checkpoint["schedule"])
        if checkpoint["scaler"]:
            run.precision.scaler.load_state_dict(checkpoint["scaler"])
        run.epoch, run.history, run.log_id = checkpoint["epoch"], checkpoint["history"], checkpoint.get("log_id")
        if run.epoch != len(run.history):
            raise ValueError(f"{run.epoch} epochs, and a history of {len(run.history)}")
        for name, value in checkpoint["sums"].items():
            name = "images" if name == "pictures" else name  # as older versions called it
            if name not in ADDED_BY_RANK or is_first_rank():  # which has the others' share as well
                run.sums[name] = value.to(run.device) if torch.is_tensor(value) else value
        run.sums["step"] = checkpoint["step"]


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


# ---- training/folder.py: A run's folder: its name, what may lie there already, and a run that is replaced.

CHECKPOINTS = ("last.pt", "last.prev.pt", "best.pt", "best_on_test.pt", "epoch-*.pt")
MADE_OF_WEIGHTS = (  # what other commands make of the weights that are replaced
    *("maps/*.npy", "maps/*.png", "maps/*.pdf", "maps/evaluation.json", "predict/*.json", "predict/*.png"),
    *("model.onnx", "model.pt2", "model.safetensors"),
)
LOGS = ("log.csv", "steps.csv", "tensorboard/events.*")
FILES = ("curves.png", "samples.png", "predictions.npz", "split.csv", "result.json")
WRITTEN = (*CHECKPOINTS, *MADE_OF_WEIGHTS, *LOGS, *FILES)
LOCKS = {}  # {folder: file} of this process: closing any file of a folder would end the lock


def choose_folder(given, *, default_name, default_dir):
    """(the run's folder, whether it holds a run to resume), from the flags on the command line.

    Without --run-name the folder is the first of vit, vit-2, vit-3 ... that does not exist. Raises UserError if the
    name is taken, or if there is nothing to resume.
    """
    resume = given.get("resume")
    if resume and given.get("overwrite"):
        raise UserError("--overwrite and --resume exclude each other")
    if resume and resume != "auto":
        if "run_name" in given or "out_dir" in given:
            raise UserError(f"--resume {resume} writes to that folder: leave out --run-name and --out-dir")
        return folder_to_resume(Path(resume), default_dir), True
    name = given.get("run_name", default_name)
    if not Path(name).parts or {*Path(name).parts} & {"..", "/"}:
        raise UserError(f"--run-name {name!r}: it must be the name of a folder below --out-dir")
    out_dir = Path(given.get("out_dir", default_dir))
    folder = out_dir / name
    if resume:
        if not has_checkpoint(folder) and (folder / "result.json").exists():
            raise UserError(f"--resume auto: {folder} is finished, but has no last.pt; --overwrite alone replaces it")
        return folder, has_checkpoint(folder)
    if is_taken(folder) and not given.keys() & {"overwrite", "summary"}:
        if "run_name" in given:
            raise UserError(f"--run-name {folder.name}: {folder} exists; use --resume {folder}, or --overwrite")
        numbers = itertools.count(2)
        while is_taken(folder):
            folder = out_dir / f"{default_name}-{next(numbers)}"
        print(f"{out_dir / default_name} exists: this run is written to {folder}")
    return folder, False


def is_taken(folder):
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def lock(folder):
    """Refuse a run's folder to other processes until unlock(folder), or until this process ends.

    The lock is on a hidden file beside the folder. Raises UserError, with the holder, if another process has it. Does
    nothing where the system or the drive has no locks.
    """
    path, file = Path(os.path.abspath(folder)), None
    if path in LOCKS:
        return
    try:
        import fcntl  # not on Windows

        file = open(path.with_name(f".{path.name}.lock"), "a+b", buffering=0)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked workers would inherit
        LOCKS[path] = file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except (ImportError, OSError) as error:
        if file and path not in LOCKS and error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(f"{folder}: another run writes to it ({file.read(100).decode()})") from error


def unlock(folder):
    if file := LOCKS.pop(Path(os.path.abspath(folder)), None):
        file.close()


def prepare_folder(folder, *, resuming, start_log=None):
    """Make the run's folder, call start_log(), and then remove a run to be replaced; if that raises, it remains."""
    make_folder(folder)
    if is_first_rank():
        lock(folder)
    old = [] if resuming or not is_first_rank() else [path for pattern in WRITTEN for path in folder.glob(pattern)]
    if start_log:
        start_log()
    for path in old:
        path.unlink()
    for below in (folder / "maps", folder / "predict", folder / "tensorboard"):
        if old and below.is_dir() and not any(below.iterdir()):
            below.rmdir()


def finished_result(folder, epoch, *, skip_test):
    """A finished run's results, printed and returned; None if its test, or what follows this epoch, is to come."""
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = read_json(path)
        if epoch < result.get("epochs", 0) or (result.get("test_accuracy", 0) is None and not skip_test):
            return None
        print(f"{folder} is finished: {accuracy_text(result)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the run is finished anew") from error
    return result


# ---- training/arguments.py: How the defaults, a recipe, the command line and a resumed run combine to the arguments of a run.

HEADLESS = ("none", "identity", "depthwise", "sagan", "simple")  # --attention without heads
# {flag: (when it has an effect, what it needs)}; given without that, it is refused
EFFECT_CONDITIONS = {
    **dict.fromkeys(("milestones", "gamma"), (lambda args: args.sched == "multistep", "--sched multistep")),
    "warmup_epochs": (lambda args: args.sched == "cosine", "--sched cosine"),
    "div_factor": (lambda args: args.sched == "onecycle", "--sched onecycle"),
    "momentum": (lambda args: args.opt == "sgd" and args.sched != "onecycle", "--opt sgd, without --sched onecycle"),
    **dict.fromkeys(("opt_betas", "opt_eps"), (lambda args: args.opt in ("adam", "adamw"), "--opt adam or adamw")),
    "ratio": (lambda args: args.scale, "--scale"),
    "swa_lr": (lambda args: args.swa_start, "--swa-start"),
    "fill": (lambda args: args.aa != "none" or args.rotate, "--aa or --rotate"),
    "test_fraction": (lambda args: args.dataset == "folder" and not args.folds, "--dataset folder, without --folds"),
    **dict.fromkeys(("folds", "group_by"), (lambda args: args.dataset == "folder", "--dataset folder")),
    "channels": (lambda args: args.dataset in ("folder", "webdataset") or args.channels == 3, "--dataset folder"),
    "extra_fraction": (lambda args: args.extra_data, "--extra-data"),
    "label_drop": (lambda args: args.model == "ddpm", "--model ddpm"),
    "gan_loss": (lambda args: args.model == "acgan", "--model acgan"),
    "epoch_images": (lambda args: args.dataset == "webdataset", "--dataset webdataset"),
    **dict.fromkeys(
        ("overfit", "val_fraction", "class_weights", "extra_data", "train_per_class"),
        (lambda args: args.dataset != "webdataset", "images that are not in shards"),
    ),
    **dict.fromkeys(("attention_after", "attention_in"), (lambda args: args.attention != "none", "--attention")),
    "attention_gamma": (lambda args: args.attention not in HEADLESS, "--attention graph, graph_v2 or classic"),
    "num_heads": (lambda args: args.attention not in HEADLESS, "an --attention with heads"),
    "attn_drop": (lambda args: args.attention not in ("identity", "depthwise"), "an --attention with weights"),
}
# what --overfit leaves out, unless it is given: what makes it harder to learn images by heart
WITH_OVERFIT = {
    **dict.fromkeys(("hflip", "rotate", "crop_padding", "reprob", "cutout", "mixup", "cutmix", "smoothing"), 0),
    **dict.fromkeys(("drop", "attn_drop", "drop_path", "weight_decay", "model_ema_decay", "swa_start"), 0),
    "val_fraction": 0,
    **{"aa": "none", "scale": None},
}


class Start(NamedTuple):
    """What start_run found out. `args` is None if there is nothing to train; then `result` is what main returns."""

    script: str
    model_flags: dict
    args: argparse.Namespace | None = None
    folder: object = None
    checkpoint: dict | None = None  # of the run to resume
    result: dict | None = None
    began: float = 0.0  # time.monotonic() when the script began, from which --minutes count

    def model_args(self, num_classes, *, plain=False):
        """The keyword arguments of the model that the flags ask for; plain ones are those that a checkpoint holds."""
        names = self.model_flags[self.args.model.partition(":")[0]]  # timm:NAME is of the family timm
        grey = {"in_channels": self.args.channels} if self.args.channels != 3 else {}
        model_args = {name: getattr(self.args, name) for name in names} | grey | {"num_classes": num_classes}
        if plain or not is_own_class(model_args.get("attention")):
            return model_args
        return with_own_class(model_args, model_args["attention"])

    def input_shape(self):
        """(C, H, W) of an image."""
        return image_shape(self.args.channels, self.args.image_size)


def start_run(parser, argv, *, chosen_recipe, model_flags):
    """Read the command line (argv, or the process's own): a Start, with all arguments of a new or a resumed run.

    chosen_recipe(given) gives a recipe's name and its defaults; model_flags is {model: the flags that it accepts}.
    Raises UserError for a mistake on the command line, before anything is written.
    """
    began = time.monotonic()
    given = given_arguments(parser, argv)
    recipe, defaults = chosen_recipe(given)
    start = Start(parser.prog, model_flags, began=began)
    if given.get("help") or given.get("help_all"):
        parser.set_defaults(**defaults, recipe=recipe)
        print(parser.help_text(everything="help_all" in given))
        return start
    model = given.get("model", defaults["model"])
    if model.partition(":")[0] not in model_flags:
        raise UserError(f"--model {model}: choose from {', '.join(model_flags)}")
    names = {"default_name": model.replace(":", "-"), "default_dir": parser.get_default("out_dir")}
    join_ranks()
    folder, resuming = from_first_rank(choose_folder, given, **names)
    if not resuming:
        args = complete_arguments(parser, given | {"recipe": recipe}, defaults)
        check_effects(given, args)
        check_model_flags(given, model_flags, args.model)
        return start._replace(args=args, folder=folder)
    checkpoint = load_checkpoint(folder)
    if checkpoint["model"].partition(":")[0] not in model_flags:
        raise UserError(f"--resume {folder}: {start.script} does not train the model there, {checkpoint['model']}")
    args = resumed_arguments(parser, given, checkpoint, folder)
    if result := finished_result(folder, checkpoint["epoch"], skip_test=given.get("skip_test")):
        return start._replace(result=result)
    return start._replace(args=args, folder=folder, checkpoint=checkpoint)


def given_arguments(parser, argv):
    """The flags on the command line alone, as a dict, without any default."""
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), argparse.SUPPRESS))
    return {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value != argparse.SUPPRESS}


def complete_arguments(parser, given, recipe):
    """All arguments: the parser's defaults, overridden by the recipe's, overridden by those given. Raises UserError."""
    defaults = vars(parser.parse_args([]))
    changes = {name: value for name, value in WITH_OVERFIT.items() if name in defaults and given.get("overfit")}
    args = argparse.Namespace(**{**defaults, **recipe, **changes, **given})
    for name in ("scale", "ratio"):
        low, high = getattr(args, name) or (0, 1)
        if low > high:
            raise UserError(f"--{name} {low} {high}: the first must not be above the second")
    if args.scale and args.scale[1] > 1:
        raise UserError(f"--scale {args.scale[0]} {args.scale[1]}: a crop cannot be larger than the image (1)")
    if args.dataset == "folder" and not args.data_dir:
        raise UserError("--dataset folder needs --data-dir, the folder of class folders")
    if args.dataset == "webdataset" and not (args.epoch_images and args.data_dir and isinstance(args.image_size, int)):
        raise UserError("--dataset webdataset needs --data-dir, --epoch-images and a square --image-size")
    if len({text.rpartition(":")[0] for text in args.accumulate}) < len(args.accumulate):
        raise UserError(f"--accumulate {' '.join(args.accumulate)}: two numbers of batches for one epoch")
    args.data_dir = args.data_dir or "datasets"
    if args.lr_scale == "auto":
        args.lr = scaled_rate(args, given, recipe)
    return args


def scaled_rate(args, given, recipe):
    """The recipe's learning rate for the batch size that the flags ask for. Raises UserError if they contradict it.

    Proportional to the batch for sgd (Goyal et al. 2017), to its square root for the others (Krizhevsky 2014).
    """
    if "lr" in given:
        raise UserError("--lr-scale auto and --lr exclude each other: the one computes what the other gives")
    if len(args.accumulate) > 1:
        raise UserError(f"--lr-scale auto needs one batch size; --accumulate {' '.join(args.accumulate)} has several")
    batch = args.batch_size * batches_per_step(args.accumulate, 0)
    ratio = batch / recipe["batch_size"]
    how, factor = ("", ratio) if args.opt == "sgd" else ("the square root of ", math.sqrt(ratio))
    rate = recipe["lr"] * factor
    print(f"lr {rate:.3g}: the recipe's {recipe['lr']:g} times {how}{batch}/{recipe['batch_size']}")
    return rate


def as_flag(name):
    return f"--{name.replace('_', '-')}"


def check_effects(given, args):
    """Raises UserError for a flag that has no effect with the other values."""
    for name in given:
        has_effect, needed = EFFECT_CONDITIONS.get(name, (None, None))
        if needed and not has_effect(args):
            raise UserError(f"{as_flag(name)} has no effect here: it needs {needed}")


def check_model_flags(given, model_flags, model):
    """Raises UserError for a flag given that only other models accept; model_flags is {model: the flags it accepts}.

    --image-size is a flag of the images as well, and fits every model.
    """
    for name in given:
        users = [other for other, flags in model_flags.items() if name in flags]
        if users and model.partition(":")[0] not in users and name != "image_size":
            raise UserError(f"{as_flag(name)}: {model} does not take it")


def resumed_arguments(parser, given, checkpoint, folder):
    """The arguments of a checkpoint, changed by those of `given` that may change.

    Arguments that are newer than the checkpoint take their defaults. Raises UserError for one that may not change.
    """

    def kind(name):
        in_order = name == "workers" and checkpoint["args"]["dataset"] == "webdataset"  # its order depends on them
        return "run" if in_order else flag_kind(name)

    saved = {name: value for name, value in checkpoint["args"].items() if kind(name) in ("run", "place")}
    saved = vars(parser.parse_args([])) | saved
    if is_own_class(saved.get("attention")):
        saved["attention"] = confirmed_attention(saved["attention"], given.get("attention"), f"--resume {folder}")
    parser.check_values(saved)
    different = [
        f"{as_flag(name)} is {saved[name]} there and {value} here"
        for name, value in given.items()
        if kind(name) == "run" and saved[name] != value
    ]
    if different:
        if "epochs" in given and "init_from" in saved:
            different.append(f"to train its weights for longer, start a new run, its flags and --init-from {folder}")
        raise UserError(f"--resume {folder} is another run: {'; '.join(different)}")
    return argparse.Namespace(**saved | {name: value for name, value in given.items() if kind(name) != "run"})


# ---- training/profiling.py: Where the time of ten steps goes, by torch.profiler.

WAIT, MEASURED = 5, 10  # steps


class StepProfiler:
    """A torch.profiler that skips the first WAIT steps and measures the MEASURED ones after them.

    A trace for Perfetto or chrome://tracing goes to trace.json.gz in the folder, ten lines to the screen. step() is
    called after each step, close() at the end.
    """

    def __init__(self, folder, device):
        self.path, self.device, self.done = folder / "trace.json.gz", device, False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        plan = schedule(wait=WAIT - 2, warmup=2, active=MEASURED, repeat=1)
        self.profiler = profile(activities=activities, schedule=plan, on_trace_ready=self.write)
        self.profiler.start()
        self.step = self.profiler.step

    def write(self, profiler):
        profiler.export_chrome_trace(str(self.path))
        where = "device" if self.device.type == "cuda" else "cpu"
        rows = profiler.key_averages()
        if where == "device":  # the kernels alone: their callers' rows hold the same time again
            rows = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
        times = {row.key: (getattr(row, f"self_{where}_time_total"), row.count) for row in rows}
        total = sum(spent for spent, _ in times.values())
        print(f"{MEASURED} steps of {total / MEASURED / 1e3:.1f} ms on the {where}; the trace is in {self.path}")
        for name, (spent, count) in sorted(times.items(), key=lambda item: -item[1][0])[:10]:
            share, milliseconds, calls = spent / total, spent / MEASURED / 1e3, count / MEASURED
            name = "outside of operations" if name.startswith("ProfilerStep") else name
            print(f"{share:6.1%} {milliseconds:9.2f} ms per step {calls:7.1f} calls  {name[:70]}")
        self.done = True

    def close(self):
        self.profiler.stop()
        if not self.done:
            print(f"warning: --profile needs {WAIT + MEASURED} steps in an epoch; no trace", file=sys.stderr)


# ---- training/numerics.py: --on-nan: updates by a gradient that is not finite are skipped, or the run goes back to its last checkpoint.

MOST_IN_A_ROW, MOST_ROLLBACKS = 20, 3
COUNTED = ("loss", "correct", "images", "bad_step", "bad_lr")  # of new_sums: what a skipped step takes back


def not_finite(run, detail, *, what="the loss is not finite"):
    """The UserError that stops a run: at the first step whose loss was not finite, else at the present one."""
    bad_step, bad_lr = run.sums["bad_step"].item(), run.sums["bad_lr"].item()
    step, lr = (bad_step + 1, bad_lr) if bad_step >= 0 else (run.sums["step"], run.sums["lr"])
    where = f"epoch {run.epoch + 1}, step {step}, learning rate {lr:.3g}{detail}"
    return UserError(f"{what}: {where}; what was saved before is kept; try a lower --lr or --clip-grad 1")


class SkippingScaler(torch.amp.GradScaler):
    """The gradient scaler of --on-nan skip, for all precisions: it leaves out updates whose gradient is not finite.

    Weights, optimiser, averages, buffers (BatchNorm's statistics) and the epoch's sums are then as before the step. In
    float16 it scales as torch's does, else by 1, which changes no bit. It waits for the device in each step.
    """

    def __init__(self, run):
        super().__init__(run.device.type, init_scale=1.0)
        if run.precision.scaler.is_enabled():
            self.load_state_dict(run.precision.scaler.state_dict())
        self.run, self.in_a_row = run, 0
        self.sums, self.buffers = None, copy.deepcopy(list(run.model.buffers()))  # before the step

    def scale(self, loss):
        if self.sums is None:  # a step's first batch, which is not yet added to the sums
            self.sums = copy.deepcopy({name: self.run.sums[name] for name in COUNTED})
        return super().scale(loss)

    def update(self):
        """Whether the update was left out. Raises UserError after MOST_IN_A_ROW of them."""
        scale, sums, buffers = self.get_scale(), self.run.sums, list(self.run.model.buffers())
        super().update()
        skipped = self.get_scale() < scale
        if self.run.precision.amp != "fp16":
            super().update(scale)
        if skipped:
            sums.update(self.sums, skipped_updates=sums.get("skipped_updates", 0) + 1)
            for buffer, before in zip(buffers, self.buffers, strict=True):
                buffer.copy_(before)
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row == MOST_IN_A_ROW:
            what = f"the gradient is not finite in {MOST_IN_A_ROW} updates in a row"
            raise not_finite(self.run, largest_gradient(self.run), what=what)
        self.sums, self.buffers = None, copy.deepcopy(buffers)
        return skipped


def roll_back(run, detail):
    """Take weights, optimiser, averages and sums from last.pt; leave out the batches since then, and save.

    So PaLM continued after a spike of its loss (Chowdhery et al. 2022, section 5.1). The schedule goes on. Raises
    UserError if there is no checkpoint, and after MOST_ROLLBACKS.
    """
    path, sums = run.folder / "last.pt", run.sums
    done = sum(counts.get("rollbacks", 0) for counts in [*run.history, sums])
    if done == MOST_ROLLBACKS or not path.exists():
        raise not_finite(run, f"{detail}; rolled back {done} times" if done else f"; there is no {path} yet")
    checkpoint = open_checkpoint(path, run.device)
    said = f"back to the weights {position(checkpoint['epoch'], checkpoint['step'])}, without the batches since then"
    warn_of(run, f"the loss is not finite: epoch {run.epoch + 1}, step {sums['step']}: {said}")
    kept = {"seconds": sums["seconds"], "rollbacks": sums.get("rollbacks", 0) + 1}
    now = {"sums": checkpoint["sums"] | kept, "step": sums["step"], "schedule": run.schedule.state_dict()}
    rates = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
    sums.update(new_sums(run.device))
    restore_training(checkpoint | now, run)
    for group, values in zip(run.optimizer.param_groups, rates, strict=True):
        group.update(values)
    run.write()


# ---- training/interrupt.py: What happens between two steps: the progress bar, saving by the clock, and stopping when asked to.

class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal and has saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum):
        super().__init__()
        self.exit_code = 128 + signum


class StopRequests:
    """Ctrl-C, SIGTERM, SIGHUP (the terminal was closed; not with nohup) and a limit in minutes, as a context manager.

    `wanted()` tells whether to stop after this step. The minutes count from now, or from `since`, a time of
    time.monotonic(). A second signal acts as it would without this. Leaving restores the signal handlers.
    """

    def __init__(self, minutes=None, *, since=None):
        self.deadline = (time.monotonic() if since is None else since) + 60 * minutes if minutes else None
        self.signum = self.patience = None
        self.handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in the main thread only
            hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # not on Windows
            for signum in {signal.SIGINT, signal.SIGTERM, hangup}:
                if signum != hangup or signal.getsignal(signum) != signal.SIG_IGN:
                    self.handlers[signum] = signal.signal(signum, self.note)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def note(self, signum, frame):
        self.signum = signum
        self.__exit__()
        if rank_and_ranks()[1] > 1:  # torchrun sends SIGTERM if a rank has died, which the others may wait for
            self.patience = threading.Timer(PATIENCE, os._exit, [128 + signum])
            self.patience.daemon = True
            self.patience.start()
        with contextlib.suppress(OSError, RuntimeError):  # the terminal is gone; the signal came amid another print
            print("\nstopping after this step; once more: at once", file=sys.stderr, flush=True)

    def end(self):
        """Raises Interrupted if a signal asked for the stop."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def asked(self):
        """Whether this process was asked to stop."""
        return self.signum is not None or (self.deadline is not None and time.monotonic() > self.deadline)

    def wanted(self):
        """Whether any rank was asked to stop; all of them have to call this together."""
        wanted = any_rank(self.asked())[0]
        if self.patience:
            self.patience.cancel()
        return wanted


PATIENCE = 20  # seconds that a rank waits for the others after a signal
AGREEMENT = 8  # steps on GPUs after which ranks agree on whether to stop or save: they wait for each other


class Watch:
    """What train_one_epoch calls after each step of one epoch: `watch(sums)`; True asks it to stop.

    A few times per second it reads the sums from the device and shows them in a bar. Every --save-minutes it saves.
    With --log-steps it notes each step, and reads their losses at these times. With --profile it profiles the first
    epoch. Raises UserError, with the epoch, the step, the learning rate and the parameter whose gradient was largest at
    the last refresh, if the loss was not finite: at the next one, at the latest when the epoch ends, and before
    anything is saved. With --on-nan rollback it looks after each step.
    """

    REFRESH_SECONDS = 0.4

    def __init__(self, run, steps_per_epoch, stop):
        self.run, self.stop = run, stop
        self.profiler, self.largest = None, ""
        if run.args.profile and run.epoch == run.first_epoch and is_first_rank():
            self.profiler = StepProfiler(run.folder, run.device)
        self.last_step = self.last_refresh = time.monotonic()
        self.steps = 0
        self.bar = tqdm(
            total=steps_per_epoch,
            initial=run.sums["step"],
            desc=f"epoch {run.epoch + 1}/{run.args.epochs}",
            leave=False,
            disable=bar_disabled() if is_first_rank() else True,
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        self.bar.close()
        if self.profiler:
            self.profiler.close()
        if kind is None and self.run.sums["step"]:
            self.refresh(self.run.sums)
            self.run.trained_at = time.monotonic()
            self.run.sums["seconds"] += self.run.trained_at - self.last_step

    def __call__(self, sums):
        now = time.monotonic()
        sums["seconds"] += now - self.last_step
        self.last_step = now
        if self.profiler:
            self.profiler.step()
        if self.run.log:
            self.run.log.note(sums)
        if self.run.args.on_nan == "rollback" and any_rank(sums["bad_step"].item() >= 0)[0]:
            roll_back(self.run, self.largest)
        if now - self.last_refresh > self.REFRESH_SECONDS:
            self.refresh(sums)
            self.last_refresh = now
        self.steps += 1
        if rank_and_ranks()[1] > 1 and self.run.device.type == "cuda" and self.steps % AGREEMENT:
            return False
        late = now - self.run.last_writing > 60 * self.run.args.save_minutes
        save, stop = any_rank(late, self.stop.asked())
        if save:
            self.refresh(sums)
            self.run.write()
            self.last_step = time.monotonic()  # writing is no part of a step
        return stop

    def refresh(self, sums):
        """Wait for the device; update the bar, or raise if the loss was not finite."""
        if self.run.log:
            self.run.log.fetch()
        if sums["bad_step"].item() >= 0:
            raise not_finite(self.run, self.largest)
        self.largest = largest_gradient(self.run)
        if self.run.precision.scaler.get_scale() < 1:
            warn_of(self.run, "the loss scale is below 1: float16 overflows in most updates; use --amp bf16 or off")
        loss, accuracy = loss_and_accuracy(sums)
        self.bar.set_postfix_str(f"loss {loss:.4f}" + ("" if accuracy is None else f", {accuracy:.1%}"), refresh=False)
        self.bar.update(sums["step"] - self.bar.n)


# ---- training/averaging.py: Averages of the weights, which are evaluated in place of the weights themselves.

class WeightAverage:
    """An average of a model's weights; `model` is the averaged model, None before there is any.

    "ema" (--model-ema-decay) follows each step: an exponential moving average of weights and of buffers; without these,
    the statistics of BatchNorm would belong to other weights. "swa" (--swa-start, Izmailov et al. 2018) is the mean of
    the weights after each of the last epochs; BatchNorm's statistics are computed anew from the training images.
    """

    def __init__(self, model, args):
        self.kind, self.first_epoch = "swa" if args.swa_start else "ema", swa_epoch(args)
        ema = {"multi_avg_fn": get_ema_multi_avg_fn(args.model_ema_decay), "use_buffers": True}
        self.averaged = AveragedModel(model, **(ema if self.kind == "ema" else {})).eval()

    @property
    def model(self):
        return self.averaged.module if self.averaged.n_averaged.item() else None

    def after_step(self, model):
        if self.kind == "ema":
            self.averaged.update_parameters(model)

    def after_epoch(self, model, batches, *, epoch, seed, precision):
        """Add the weights after an epoch, counted from 0; batches are those of training, for BatchNorm's statistics."""
        if self.kind == "swa" and epoch >= self.first_epoch:
            self.averaged.update_parameters(model)
            torch.manual_seed(seed_for("dropout", seed, epoch, batches.steps_per_epoch))
            with precision.autocast():
                update_bn((images for images, _ in batches.batches(epoch)), self.averaged.module)

    def load(self, weights, *, epoch, step):
        """Go back to an average's weights (a state dict) after `epoch` epochs and `step` steps."""
        self.averaged.module.load_state_dict(weights)
        # of an EMA, only whether the count is 0 matters
        self.averaged.n_averaged.fill_(epoch - self.first_epoch if self.kind == "swa" else epoch + step)


def make_average(model, args):
    """The WeightAverage that the flags ask for, or None. Raises UserError if they ask for two."""
    if args.model_ema_decay and args.swa_start:
        raise UserError("--model-ema-decay and --swa-start exclude each other: one average is evaluated")
    return WeightAverage(model, args) if args.model_ema_decay or args.swa_start else None


# ---- training/generating.py: Where training a generator differs from training a classifier, and images from it.

RECORD = "generated.json"


def leave_out(parser, *names):
    """Take flags away from a parser that have no effect in its script; their defaults remain."""
    for action in [action for action in parser._actions if action.dest in names]:
        parser.set_defaults(**{action.dest: action.default})
        action.container._remove_action(action)
        for option in action.option_strings:
            del parser._option_string_actions[option]


def read_record(folder):
    """What generate.py noted of the images in a folder, as a dict; empty if they are from elsewhere."""
    path = Path(folder, RECORD)
    try:
        return {**read_json(path)} if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


def generator_record(folder, data_hashes):
    """read_record of a folder of --extra-data, with the hash of its images.

    A warning on stderr says if the generator has seen other images than those that this run is trained on.
    """
    record = read_record(folder)
    if record.get("trained_on", data_hashes["train"]) != data_hashes["train"]:
        flags = "give both the same --val-fraction, --split-seed, --train-per-class and --image-size"
        print(f"warning: {folder}: its generator was trained on other images than this run; {flags}", file=sys.stderr)
    return record | {"hash": data_hashes["extra"]}


# ---- training/loggers.py: What --log and --log-steps write beside log.csv: steps.csv, and the logs of TensorBoard, W&B and trackio.

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}  # of --log


class TensorBoard:
    """A TensorBoard log of a run, with the methods of W&B's and trackio's: log(values, step=...) and finish()."""

    def __init__(self, module, run):
        done = run.schedule.last_epoch  # steps; what a killed process wrote after them comes again, and is purged
        self.writer = module.SummaryWriter(run.folder / "tensorboard", purge_step=done + 1, flush_secs=1)
        self.writer.add_text("arguments", "".join(f"    {name}: {v}\n" for name, v in vars(run.args).items()), done)
        self.finish = self.writer.close

    def log(self, values, step):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


def open_logger(name, module, run):
    """The log of a run, new or resumed, in one of MODULES: an object with log(values, step=...) and finish()."""
    if name == "tensorboard":
        return TensorBoard(module, run)
    # trackio resumes by the name, W&B by the id; embed would show trackio's page in a notebook, on Colab publicly
    own = {"wandb": {"id": run.log_id, "dir": run.folder}, "trackio": {"embed": False}}[name]
    title = f"{run.folder.name}-{run.log_id}"
    return module.init(project=run.dataset.name, name=title, config=dict(vars(run.args)), resume="allow", **own)


class RunLog:
    """The loggers of --log, and steps.csv of --log-steps, of one run (see training/run.py).

    The loggers get what is saved, whenever a checkpoint is: so a resumed run continues their logs and repeats nothing.
    steps.csv grows meanwhile, and is cut if the run is resumed. A logger that fails is left out, with one warning.
    Raises UserError if a package is missing, or if trackio would write to another machine.
    """

    def __init__(self, run):
        self.run, self.noted, self.unsent, self.loggers = run, [], [], {}
        self.modules = {name: import_optional(MODULES[name], name) for name in run.args.log}
        elsewhere = [name for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL") if name in os.environ]
        if "trackio" in self.modules and elsewhere:
            raise UserError(f"--log trackio logs on this machine alone: unset {elsewhere[0]}")

    def start(self):
        """Begin or continue the logs. Raises UserError if a logger does not start."""
        self.run.log_id = self.run.log_id or secrets.token_hex(4)
        for name, module in self.modules.items():
            try:
                self.loggers[name] = open_logger(name, module, self.run)
            except Exception as error:
                raise UserError(f"--log {name} does not start: {' '.join(str(error).split())}") from error

    def cut_steps(self):
        """Make steps.csv, or cut it to where the run is."""
        path, position = self.run.folder / "steps.csv", (self.run.epoch, self.run.sums["step"])
        rows = re.findall(r"^((\d+),(\d+),.*,.*\n)", path.read_text(), re.M) if path.exists() else []
        kept = [line for line, epoch, step in rows if (int(epoch) - 1, int(step)) <= position]
        write_atomically(path, lambda file: file.write("".join(["epoch,step,lr,loss\n", *kept]).encode()))

    def note(self, sums):
        """Keep what --log-steps says of a step, its loss on the device."""
        if self.run.args.log_steps:
            self.noted.append((self.run.schedule.last_epoch, sums["step"], sums["lr"], sums["last_loss"]))

    def fetch(self):
        """Wait for the device; append the noted steps to steps.csv."""
        if not self.noted:
            return
        path, epoch, lines = self.run.folder / "steps.csv", self.run.epoch + 1, []
        losses = torch.stack([loss for *_, loss in self.noted]).tolist()
        for (done, step, lr, _), loss in zip(self.noted, losses, strict=True):
            lines.append(f"{epoch},{step},{lr},{loss}\n")
            self.unsent.append((done, {"epoch": epoch, "step_lr": lr, "step_loss": loss}))
        self.noted = []
        try:
            with open(path, "a") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror})") from error

    def add(self, row):
        """Keep a row of log.csv for the loggers."""
        self.unsent.append((self.run.schedule.last_epoch, {name: v for name, v in row.items() if v is not None}))

    def send(self):
        """Give the loggers what has been kept."""
        rows, self.unsent = self.unsent, []
        for done, values in rows:
            self.call("log", values, step=done)

    def close(self, values=None):
        """End the logs, after a last row of values."""
        if values:
            self.call("log", values, step=self.run.schedule.last_epoch)
        self.call("finish")

    def call(self, method, *arguments, **options):
        for name, logger in list(self.loggers.items()):
            try:
                getattr(logger, method)(*arguments, **options)
            except Exception as error:
                del self.loggers[name]
                print(f"warning: --log {name}: {error}; the run continues without it", file=sys.stderr)


# ---- training/run.py: A run: what it is made of, how far it has come, and its folder.

WRITING_SHARE = 0.04  # at most this share of the time goes into writing what epochs leave behind
WITHOUT_MAPS = ("none", "identity", "depthwise", "simple")  # --attention that rollout.py cannot draw


class Run:
    """One run in training: what is trained, and how far it has come.

    start is a Start of training/arguments.py. `epoch` counts finished epochs, `sums` is what the epoch in progress has
    added up (see new_sums), and `history` has one row of log.csv for each finished epoch.
    """

    def __init__(self, start, model, dataset, *, optimizer, schedule, precision):
        self.folder, self.script, self.args = start.folder, start.script, start.args
        self.model, self.model_args = model, start.model_args(len(dataset.classes), plain=True)
        own = getattr(self.args, "attention", None)
        self.attention_again = f" --attention {own}" if is_own_class(own) else ""
        self.dataset, self.optimizer, self.schedule = dataset, optimizer, schedule
        self.average = make_average(model, self.args)
        self.precision, self.device = precision, precision.device
        self.data_hashes = {split: images.hash() for split, images in dataset.splits().items()}
        self.extra_record = None  # with --extra-data, where its images are from
        if dataset.extra:
            self.extra_record = generator_record(self.args.extra_data, self.data_hashes)
        self.epoch, self.first_epoch, self.sums, self.history = 0, 0, new_sums(self.device), []
        self.log, self.log_id = None, None  # with --log or --log-steps a RunLog, and what the loggers know the run by
        self.unwritten, self.warnings = {}, set()  # checkpoints by the names of their files; what was warned of
        self.last_writing, self.writing_seconds = time.monotonic(), 0.0
        self.trained_at = time.monotonic()  # when the last step ended

    @property
    def evaluated_model(self):
        """The model that is validated, and that is the result: with averaged weights as soon as there are any."""
        averaged = self.average.model if self.average else None
        return self.model if averaged is None else averaged

    def model_to_evaluate(self, batches):
        """The evaluated_model at the end of an epoch of these training batches, whose weights it averages."""
        if self.average:
            options = {"epoch": self.epoch, "seed": self.args.seed, "precision": self.precision}
            self.average.after_epoch(self.model, batches, **options)
        return self.evaluated_model

    def begin(self, checkpoint=None):
        """Restore a checkpoint, or clear the folder for a new run.

        Raises UserError if the images are not those of the run to resume, if the folder cannot be written, and for
        --patience and --skip-test without validation images.
        """
        needing = "--skip-test" if self.args.skip_test else f"--patience {self.args.patience}"
        if (self.args.skip_test or self.args.patience) and not self.dataset.val:
            how = "shards with val in their names" if self.args.dataset == "webdataset" else "--val-fraction 0.1"
            raise UserError(f"{needing} needs validation images: {how}")
        if checkpoint:
            check_same_images(checkpoint, self)
            restore_training(checkpoint, self)
            self.first_epoch = self.epoch
        if self.args.on_nan == "skip":
            self.precision.scaler = SkippingScaler(self)
        if (self.args.log or self.args.log_steps) and is_first_rank():
            self.log = RunLog(self)
        prepare_folder(self.folder, resuming=checkpoint is not None, start_log=self.log and self.log.start)
        if self.args.log_steps and self.log:
            self.log.cut_steps()
        if self.args.dataset == "folder" or self.args.val_fraction:
            write_split(self.folder / "split.csv", self.dataset)

    def remaining_epochs(self):
        """The numbers of the epochs to train, from 0, until all are done or --patience is used up."""
        while self.epoch < self.args.epochs and not self.out_of_patience():
            yield self.epoch

    def write(self):
        """Write what the epochs have left behind and where the run is now."""
        started = time.monotonic()
        for name, checkpoint in self.unwritten.items():
            save_checkpoint(self.folder / name, checkpoint)
        self.unwritten = {}
        if self.history:
            write_log(self.folder / "log.csv", self.history)
            draw_curves(self.folder / "curves.png", self.history, self.args)
        if self.log:
            self.log.send()
        # last: a run killed before this line resumes from the previous last.pt and writes the files above again
        save_checkpoint(self.folder / "last.pt", make_checkpoint(self))
        self.last_writing = time.monotonic()
        self.writing_seconds = self.last_writing - started

    def stop(self, stop):
        """Save, and print how to resume; raises Interrupted if a signal was the reason, else returns None."""
        self.write()
        command = f"python {self.script} --resume {self.folder}{self.attention_again}"
        print(f"stopped {position(self.epoch, self.sums['step'])}; to resume: {command}")
        self.close()
        stop.end()

    def close(self, last=None):
        """Let go of the loggers, with `last` values for them, of the folder and of the other ranks."""
        if self.log:
            self.log.close(last)
        unlock(self.folder)
        leave_ranks()

    def out_of_patience(self):
        """Whether the last --patience epochs brought no better validation accuracy."""
        accuracies = [row["val_accuracy"] for row in self.history]
        patience = self.args.patience
        return bool(patience and accuracies) and len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience

    def end_epoch(self, scores):
        """Print and write what an epoch leaves behind: the checkpoints that it earns, log.csv and curves.png.

        If epochs are short, several are written together (see WRITING_SHARE). scores is {"val" or "test": (loss,
        accuracy, logits)}, as from validate. Raises UserError, and writes nothing, if a loss is not finite.
        """
        sums = sums_of_all_ranks(self.sums)
        row = dict.fromkeys(COLUMNS) | {
            "epoch": self.epoch + 1,
            "lr": sums["lr"],
            "seconds": sums["seconds"] + time.monotonic() - self.trained_at,
            "images_per_second": sums["images"] / sums["seconds"],
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        row |= {name: sums[name] for name in NAN_COUNTS if name in sums}
        for split, (loss, accuracy, *logits) in {"train": loss_and_accuracy(sums), **scores}.items():
            if not math.isfinite(loss):
                raise UserError(f"the {split} loss of epoch {row['epoch']} is not finite: lower --lr, or --clip-grad 1")
            row[f"{split}_loss"], row[f"{split}_accuracy"] = loss, accuracy
            warn_if_constant(self, split, *logits)
        self.history.append(row)
        if self.log:
            self.log.add(row)
        self.epoch, self.sums = self.epoch + 1, new_sums(self.device)

        names = ["best.pt"] if is_best(self.history, "val_accuracy") else []
        if row["val_accuracy"] is None and is_best(self.history, "test_accuracy"):
            names.append("best_on_test.pt")  # the report's choice, which is no result
        if self.epoch in self.args.save_epochs:
            names.append(f"epoch-{self.epoch}.pt")
        waited = time.monotonic() - self.last_writing
        always = self.epoch == self.args.epochs or self.args.on_nan == "rollback"
        due = any_rank(always or self.writing_seconds < WRITING_SHARE * waited)[0]
        if names:
            checkpoint = make_checkpoint(self)
            self.unwritten |= dict.fromkeys(names, checkpoint if due else copy.deepcopy(checkpoint))
        if due:
            self.write()
        print(epoch_line(row, self.args.epochs))
        if self.epoch == self.first_epoch + 1 < self.args.epochs:
            left = datetime.timedelta(seconds=round(row["seconds"] * (self.args.epochs - self.epoch)))
            print(f"expected end: {datetime.datetime.now() + left:%Y-%m-%d %H:%M}, in {left}")

    def finish(self, test):
        """Evaluate the last epoch's weights on the test batches; write predictions.npz and result.json.

        Prints what the folder holds, and returns what result.json holds. With --skip-test, there is no test in it.
        """
        if self.epoch < self.args.epochs:
            print(f"no better validation accuracy in --patience {self.args.patience} epochs: stopped early")
            self.write()
        folder, model = self.folder, self.evaluated_model
        if self.args.skip_test:
            result = write_result(self, test_accuracy=None)
            print(accuracy_text(result))
            print(f"open the test set: python {self.script} --resume {folder}{self.attention_again}")
            self.close()
            return result
        _, test_accuracy, logits = validate(model=model, batches=test, precision=self.precision)
        write_predictions(folder / "predictions.npz", logits, self.dataset)
        averaged = model is not self.model
        raw = validate(model=self.model, batches=test, precision=self.precision)[1] if averaged else None
        at_best_val = None
        if from_first_rank((folder / "best.pt").exists):
            best = open_checkpoint(folder / "best.pt", self.device)
            load_weights(model, evaluated_weights(best), sharded=self.args.fsdp)
            _, at_best_val, _ = validate(model=model, batches=test, precision=self.precision)
        on_test = [row["test_accuracy"] for row in self.history if row["test_accuracy"] is not None]
        result = write_result(
            self,
            test_accuracy=test_accuracy,
            test_balanced_accuracy=balanced_accuracy(logits, self.dataset.test.labels),
            test_accuracy_at_best_val=at_best_val,
            best_on_test=max(on_test, default=None),
            raw_test_accuracy=raw,
        )
        print(accuracy_text(result))
        if raw is not None:
            print(f"test accuracy {raw:.2%} of the last weights, without averaging")
            updates = self.schedule.last_epoch / batches_per_step(self.args.accumulate, 0)
            if (initial := self.args.model_ema_decay**updates) > 0.01:
                print(f"warning: the average still has {initial:.0%} of the first weights: lower --model-ema-decay")
        if at_best_val is not None:
            print(f"test accuracy {at_best_val:.2%} at the best validation accuracy")
        if result["best_on_test"] is not None and not self.args.overfit:
            print(f"best_on_test {result['best_on_test']:.2%} (chosen by looking at the test images: no result)")
        print(*(f"  {path}" for path in sorted(folder.iterdir())), sep="\n")
        drawn = self.args.attention not in WITHOUT_MAPS
        where = "its attention maps: python rollout.py" if drawn else "which pixels it looks at: python attribute.py"
        print(f"draw {where} {folder}{self.attention_again}")
        self.close({"final_test_accuracy": test_accuracy})
        return result


def is_best(history, key):
    values = [row[key] for row in history]
    return values[-1] is not None and values[-1] > max(values[:-1], default=-1)


# ---- training/weights.py: The weights that a run starts from: of another run, or of a file that another program wrote.

STATE_DICT = dict[str, torch.Tensor]


def start_from_weights(path, load, checkpoint):
    """Give load(weights) those of --init-from: of a run's folder, of a checkpoint, or a state dict of another program.

    load returns the names that it left out; they are printed. Returns (mean, std) of the run's images, None for a state
    dict. If `checkpoint` is that of a run to resume, nothing is loaded. Raises UserError if the file is neither.
    """
    if checkpoint:
        return checkpoint["mean"], checkpoint["std"]
    path, found, statistics = Path(path), None, None
    what_is_wrong = f"--init-from {path}: it is neither a checkpoint nor a file of weights"
    if path.is_file() and path.suffix == ".safetensors":
        with read_from_outside(what_is_wrong):
            found = import_optional("safetensors.torch").load_file(path)
    elif path.is_file() and path.name != "last.pt":
        found = read_archive(path, what_is_wrong)
        if isinstance(found, dict) and "format_version" not in found:  # someone's: weights among other things
            found = next((part for part in found.values() if is_of_kind(part, STATE_DICT) and part), found)
    if not is_of_kind(found, STATE_DICT):
        checkpoint = load_checkpoint(path)
        found, statistics = evaluated_weights(checkpoint), (checkpoint["mean"], checkpoint["std"])
    print_taken(path, found, load(found))
    return statistics


def print_taken(source, weights, left_out):
    """Print how many tensors of each part of a state dict were taken, and the names in the model that were left out."""
    parts = Counter(name.removeprefix("module.").split(".")[0] for name in weights)
    taken = ", ".join(f"{part} {count}" for part, count in parts.items())
    print(f"weights of {source}; left out: {', '.join(left_out) or 'nothing'}; tensors in it: {taken}")


# ---- train_resnet_attn.py: Train a ResNet or xResNet with an attention block in it: from scratch, or after a trained trunk.

SURVEY = {
    "dataset": "cifar10",  # the survey
    "model": "resnet18",  # the survey
    "attention": "none",  # the trunk comes first
    "attention_gamma": False,  # the survey's block has none
    "num_heads": 1,  # the survey
    "image_size": 32,  # the survey
    "crop_padding": 4,  # the survey crops; the padding is that of PyTorch Lightning's tutorial
    "hflip": 0.5,  # the survey
    "rotate": 15.0,  # the survey rotates; the angle is ours
    "epochs": 50,  # the survey, for a whole model; 5 for a block on a trained trunk
    "clip_grad": 0.5,  # the survey
    "seed": 42,  # the survey
    "amp": "off",  # the survey
    "batch_size": 64,  # the tutorial, as all below
    "opt": "sgd",
    "momentum": 0.9,
    "lr": 0.1,
    "weight_decay": 5e-4,
    "decay_all": True,
    "sched": "onecycle",
    "div_factor": 25.0,
}
OURS = SURVEY | {"attention_gamma": True, "num_heads": 4, "clip_grad": None, "seed": 0, "amp": "auto"}
WOOF = {  # SimpleSelfAttention's runs of May 2019, and the fastai example that they start from
    "dataset": "imagewoof",
    "model": "xresnet50",
    "attention": "none",
    "image_size": 128,
    "hflip": 0.5,
    "scale": [0.35, 1.0],
    "ratio": [0.75, 4 / 3],
    "crop_padding": 0,
    "rotate": 0.0,
    "epochs": 5,
    "batch_size": 64,
    "drop_last": True,  # fastai; else an epoch of Imagewoof ends in a batch of one image
    "opt": "adamw",  # Adam with decoupled weight decay
    "opt_betas": [0.9, 0.99],
    "opt_eps": 1e-6,
    "lr": 3e-3,
    "weight_decay": 1e-2,
    "decay_all": False,
    "sched": "onecycle",
    "div_factor": 10.0,
    "smoothing": 0.1,
}
STRONG = OURS | {  # ours: the same models
    "rotate": 0.0,
    "cutout": 12,
    "epochs": 50,
    "batch_size": 128,
    "drop_last": True,
    "opt": "muon",
    "lr": 3e-3,
    "weight_decay": 0.05,
    "decay_all": False,
    "sched": "cosine",
    "smoothing": 0.1,
}
SHORT = 30  # below so many epochs, strong leaves out what only helps in long runs
LIGHT = {"cutout": 0}
LARGE = {  # strong on the images of woof
    **{name: WOOF[name] for name in ("model", "image_size", "scale", "ratio", "crop_padding", "epochs", "batch_size")},
    "cutout": 0,
}
RECIPES = {
    "survey": SURVEY,
    "woof": WOOF,
    "strong": STRONG,
    "quick": OURS | {"dataset": "shapes", "epochs": 3, "width": 16, "rotate": 0.0, "attention": "graph"},  # ours
}
RESNET_FLAGS = "image_size stem width attention attention_after patch_size num_heads attention_gamma symmetric"
XRESNET_FLAGS = "image_size stem_widths attention attention_in attention_kernel_size symmetric"
MODEL_FLAGS = dict.fromkeys(RESNETS, RESNET_FLAGS.split()) | dict.fromkeys(XRESNETS, XRESNET_FLAGS.split())


def resnet_parser():
    parser = make_parser("train_resnet_attn.py", __doc__, recipes=RECIPES, datasets=DATASETS, policies=POLICIES)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODEL_FLAGS, metavar="NAME", help=", ".join(MODEL_FLAGS))
    help_text = f"the block: {', '.join(ATTENTIONS2D)}, or your own FILE.py:Class"
    add("--attention", type=name_or_class(ATTENTIONS2D), metavar="NAME", help=help_text)
    add("--attention-after", choices=STAGES, help="the stage that a ResNet's block follows")
    add("--attention-in", choices=STAGES, nargs="+", help="the stages whose last block has it in an xResNet")
    add("--attention-kernel-size", type=at_least(1), metavar="PIXELS", help="of simple, an odd number")
    add("--symmetric", action="store_true", help="make simple's matrix symmetric")
    help_text = "scale a ResNet's block by a weight that starts at 0; the survey's own has none"
    add("--attention-gamma", action=argparse.BooleanOptionalAction, help=help_text)
    add("--patch-size", type=at_least(1), metavar="PIXELS", help="side of a node, in pixels of the feature map")
    add("--num-heads", type=at_least(1), metavar="N", help="must divide the map's width")
    add("--stem", choices=("cifar", "imagenet"), help="the first layers (default: cifar up to 64 pixels)")
    add("--width", type=at_least(1), metavar="N", help="channels of a ResNet's first stage; fewer are faster")
    add("--stem-widths", type=at_least(1), nargs=3, metavar="N", help="channels in the stem of an xResNet")
    add = parser.add_argument_group("what a run starts from").add_argument
    add("--init-from", metavar="RUN", help="take the trunk's weights from a run's folder")
    add("--pretrained", action="store_true", help="take them from torchvision's weights for ImageNet")
    add("--freeze", choices=("trunk",), metavar="trunk", help="train the block and the head alone")
    own = {"attention_after": "layer4", "attention_in": ["layer1"], "attention_kernel_size": 1, "patch_size": 1}
    parser.set_defaults(**own, width=64, stem_widths=[32, 64, 64], **OURS)
    return parser


def chosen_recipe(given):
    """(name, defaults) of the recipe that the flags on the command line ask for."""
    dataset = implied_dataset(given)
    name = given.get("recipe", "quick" if dataset in SHAPES else "survey")
    changes, size = {}, given.get("image_size", WOOF["image_size"])
    if name == "woof" and isinstance(size, int):  # fastai's presize: 32 pixels more than the image size
        changes = {"crop_pct": size / (size + 32)}
    if name == "strong" and (dataset in IMAGENETTES or given.get("epochs", SHORT) < SHORT):
        changes = LARGE if dataset in IMAGENETTES else LIGHT
    return name, RECIPES[name] | changes | ({"dataset": dataset} if dataset else {})


def check_start(args):
    """Raises UserError for flags of what a run starts from that contradict each other or the model."""
    if args.freeze and not args.init_from and not args.pretrained:
        raise UserError("--freeze trunk needs a trained trunk: --init-from RUN or --pretrained")
    if args.init_from and args.pretrained:
        raise UserError("--init-from and --pretrained exclude each other: a run starts from one trunk")
    if args.pretrained and args.model not in RESNETS:
        raise UserError(f"--pretrained: there are no weights for {args.model}, only for {', '.join(RESNETS)}")


def start_from_trunk(model, args, checkpoint):
    """Load the trunk of --init-from or --pretrained, unless the run is resumed, and freeze it if --freeze says so.

    Returns (mean, std) of the images that the trunk was trained on; None if they are not known.
    """
    statistics = None
    if args.init_from:
        statistics = start_from_weights(args.init_from, partial(load_trunk, model), checkpoint)
    if args.pretrained:
        warn_of_seen_images(args.dataset)
        statistics = imagenet_statistics()
        if not checkpoint:
            print(f"weights of ImageNet; left out: {', '.join(load_imagenet_trunk(model))}")
    if args.freeze:
        model.freeze_trunk()
    return statistics


def main(argv=None):
    """Train as argv (or the command line) says; returns what result.json holds, None if the run is not finished."""
    start = start_run(resnet_parser(), argv, chosen_recipe=chosen_recipe, model_flags=MODEL_FLAGS)
    args, checkpoint = start.args, start.checkpoint
    if args is None:  # nothing to train: --help, or the run is finished
        return start.result
    check_start(args)
    precision = Precision(args.amp, pick_device(args.device), deterministic=args.deterministic)
    device = precision.device
    print_header(args, precision)

    # Model
    torch.manual_seed(seed_for("weights", args.seed))
    model = build_model(args.model, **start.model_args(count_classes(args.dataset, args.data_dir))).to(device)
    print_model(args.model, model, "positions")
    statistics = start_from_trunk(model, args, checkpoint)
    # Data: with validation images, the test set is opened once, at the end
    dataset = first_rank_first(dataset_of, args, statistics)
    print(describe(dataset))
    train = training_batches(dataset, args, device)
    test = evaluation_batches(dataset, dataset.test, args, device)
    watched = {"val": evaluation_batches(dataset, dataset.val, args, device)} if dataset.val else {"test": test}

    # Optimiser
    forward = compiled_forward(model, args, device=device, num_images=len(dataset.train.labels))
    optimizer = make_optimizer(args, model)
    schedule = make_schedule(args, optimizer, steps_per_epoch=train.steps_per_epoch)
    run = Run(start, model, dataset, optimizer=optimizer, schedule=schedule, precision=precision)
    train_epoch = partial(
        train_one_epoch,
        model=model,
        forward=forward,
        batches=train,
        loss_function=make_loss(args, dataset, device),
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        seed=args.seed,
        accumulate=args.accumulate,
        clip_grad=args.clip_grad,
        clip_value=args.clip_value,
        average=run.average,
    )
    run.begin(checkpoint)

    # Epochs
    with StopRequests(args.minutes, since=start.began) as stop, memory_watched(run):
        for epoch in run.remaining_epochs():
            with Watch(run, train.steps_per_epoch, stop) as watch:
                train_epoch(epoch=epoch, sums=run.sums, after_step=watch)
            if stop.wanted():
                return run.stop(stop)
            evaluate = partial(validate, model=run.model_to_evaluate(train), precision=precision)
            run.end_epoch({split: evaluate(batches=batches) for split, batches in watched.items()})
    return run.finish(test)

if __name__ == "__main__":
    if "ipykernel" in sys.modules:
        result = main(ARGUMENTS)
    else:
        run_script(main)
