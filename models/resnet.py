"""ResNets from torchvision's blocks, also for small images, with attention after one of the stages."""

from functools import partial

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from errors import UserError
from models.attention2d import make_attention2d
from models.pretrained import check_shapes, download_weights, shape_of

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
