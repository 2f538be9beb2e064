"""XResNets as in fastai's code of May 2019 (the tweaks of He et al. 2019), with attention inside stages."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError
from models.attention2d import make_attention2d
from models.resnet import STAGES, TrunkAndHead, node_grid, stage_grids


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
