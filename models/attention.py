"""Attention over tokens: attend(), and the modules that are built on it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from errors import UserError


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
