"""Attention over tokens: attend(), and the modules that stand on it."""

import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError


def explicit_attention(q, k, v, dropout_p=0.0):
    """softmax(q kᵀ / √d) v, written out; q, k, v and the result are (B, heads, N, d) (Vaswani et al. 2017, eq. 1)."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
    weights = F.dropout(weights.softmax(dim=-1), dropout_p)
    return weights @ v


FUSED = F.scaled_dot_product_attention


def attend(q, k, v, dropout_p=0.0):
    """Scaled dot-product attention on (B, heads, N, d), fused or written out.

    The rule: written out on a CPU in bfloat16 with at most 400 tokens, fused everywhere else. Forward and backward on
    two Zen 5 cores, 24 to 32 channels a head, the fused kernel took 7 times as long at 17 tokens, 4 to 5 times at 65,
    1.5 to 2.4 times at 257, as long at 577, and less in float32. While torch's function is replaced, to record the
    weights, that is called.
    """
    recorded = F.scaled_dot_product_attention is not FUSED  # somebody has put a function of theirs in its place
    if not recorded and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 400:
        return explicit_attention(q, k, v, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention on (B, N, dim), without dropout of its own.

    Starts as nn.MultiheadAttention does: Xavier-uniform over the stacked qkv weight, zero biases.
    Raises UserError where num_heads does not divide dim.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UserError(f"--embed-dim {dim} is not divisible by --num-heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, d) each
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, dim)


class Mlp(nn.Sequential):
    """Linear, GELU, dropout, Linear, dropout on (B, N, dim)."""

    def __init__(self, dim, hidden_dim, *, drop=0.0):
        super().__init__(
            nn.Linear(dim, hidden_dim), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden_dim, dim), nn.Dropout(drop)
        )


class Block(nn.Module):
    """A pre-norm block on (B, N, dim): attention, then MLP, each with its residual (Dosovitskiy et al. 2021)."""

    def __init__(self, dim, num_heads, *, mlp_ratio=2.0, drop=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MultiHeadAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
