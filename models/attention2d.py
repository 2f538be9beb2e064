"""Attention over the positions of a feature map (B, C, H, W): graph, classic, SAGAN's and SimpleSelfAttention."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from errors import UserError
from models.attention import AttentionSpec, Block, MultiHeadAttention, attend


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
