"""ResNets of torchvision's blocks, with its names and weights, for small images too, and attention after a stage."""

from functools import partial

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from errors import UserError
from models.attention2d import make_attention2d
from models.pretrained import shape_of

STAGES = ("layer1", "layer2", "layer3", "layer4")


def trunk_names(weights):
    """Those names in a state dict that belong to the trunk, neither to a module `attention` nor to the head `fc`."""
    return [name for name in weights if not {"attention", "fc"} & set(name.split("."))]


class TrunkAndHead(nn.Module):
    """Images (B, 3, H, W) to logits: a trunk, perhaps with modules `attention` in it, and a head `fc` on its mean."""

    no_weight_decay = ()
    class_token = False  # all positions count alike for the head

    def freeze_trunk(self):
        """Keep the trunk as it is from here on, the statistics of its normalisation too."""
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
    """Put the trunk's tensors of a state dict into a TrunkAndHead; returns the names in it that were left out.

    Those in `replaced` may differ, and then are left out as well. Raises UserError that names the weights' flag and the
    first tensors that differ otherwise.
    """
    own = model.state_dict()
    names = dict.fromkeys([*trunk_names(own), *trunk_names(weights)])
    different = [name for name in names if shape_of(weights, name) != shape_of(own, name)]
    wrong = [
        f"{name} ({shape_of(weights, name)} there, {shape_of(own, name)} here)"
        for name in different
        if name not in replaced
    ]
    if wrong:
        raise UserError(f"{flag}: another trunk, it differs in {', '.join(wrong[:3])}{' ...' if wrong[3:] else ''}")
    taken = {name: weights[name] for name in names if name not in different}
    model.load_state_dict(own | taken)
    return [name for name in weights if name not in taken]


def load_imagenet_trunk(model):
    """Put torchvision's ImageNet weights into the trunk of a ResNet; returns the names that were left out.

    These are the head's, and the first convolution's where the stem is another. The weights are downloaded into torch's
    cache when they are not there. Raises UserError where that fails, and for another width than 64.
    """
    weights = torchvision.models.get_model_weights(f"resnet{model.depth}").IMAGENET1K_V1
    if model.conv1.out_channels != 64:
        raise UserError(f"--pretrained: the weights are of --width 64, not {model.conv1.out_channels}")
    try:
        values = weights.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: what came is another file
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(f"--pretrained: {weights.url} cannot be downloaded ({error}): put it into {folder}") from error
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    return load_trunk(model, counters | values, flag="--pretrained", replaced=("conv1.weight",))


def stage_grids(image_size, stem_stride):
    """{stage: (rows, columns)} of the feature maps of an image, its size a number of pixels or (height, width)."""
    sizes = (image_size, image_size) if isinstance(image_size, int) else image_size
    return {name: tuple(-(-size // (stem_stride * 2**i)) for size in sizes) for i, name in enumerate(STAGES)}


def node_grid(grids, stage, *, flag="--attention-after", patch_size=1, instead=()):
    """(rows, columns) of the nodes that attention after a stage has, from the grids of all (see stage_grids).

    Raises UserError for a stage that does not exist, a patch size that does not divide its map, and a single node: that
    names the last stage which leaves more, and what could be done `instead`.
    """
    if stage not in grids:
        raise UserError(f"{flag} {stage}: there are {', '.join(grids)}")
    rows, columns = grids[stage]
    if patch_size < 1 or rows % patch_size or columns % patch_size:
        where = f"the feature map of {rows} x {columns} after {stage}"
        raise UserError(f"--patch-size {patch_size} does not divide {where}")
    if rows == columns == patch_size:
        ways = [f"{flag} {name}" for name in grids if max(grids[name]) > patch_size][-1:] + list(instead)
        ways += ["a smaller --patch-size"] if patch_size > 1 else []
        raise UserError(
            f"{flag} {stage}: nothing to attend to, the feature map of {rows} x {columns} is a single node;"
            f" {' or '.join(ways) or 'a larger image'} would do"
        )
    return rows // patch_size, columns // patch_size


def residual_stage(block, in_channels, planes, *, count, stride):
    """One of the four stages: `count` of torchvision's blocks, of which the first has the stride."""
    channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != channels:
        conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))
    blocks = [block(in_channels, planes, stride, shortcut)] + [block(channels, planes) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


class ResNet(TrunkAndHead):
    """torchvision's ResNet (He et al. 2016) on images (B, 3, H, W), with attention after one of its stages.

    image_size is a number of pixels or (height, width). The stem is "imagenet", torchvision's, or "cifar" (3x3, no
    stride, no pooling), the default up to 64 pixels. width is the first stage's number of channels, or a quarter of it
    in resnet50. attention and its options are make_attention2d's. `grid` is (rows, columns) of the nodes of attention,
    or of the last feature map. The trunk starts alike for one seed, whatever the attention.
    Raises UserError for an unknown stem, stage or attention, and for nodes that the map does not bear (see node_grid).
    """

    def __init__(
        self,
        *,
        depth=18,
        image_size=32,
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
            largest = image_size if isinstance(image_size, int) else max(image_size)
            stem = "cifar" if largest <= 64 else "imagenet"
        if stem not in grids:
            raise UserError(f"--stem {stem}: there are {', '.join(grids)}")
        if width < 1:
            raise UserError(f"--width {width}: must be at least 1")
        self.grid = grids[stem]["layer4"]
        if attention != "none":
            wider = stem == "imagenet" and max(grids["cifar"].get(attention_after, (1, 1))) > patch_size
            instead = ["--stem cifar"] if wider else []
            self.grid = node_grid(grids[stem], attention_after, patch_size=patch_size, instead=instead)

        block, counts = RESNET_BLOCKS[depth]
        kernel_size, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
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
        self.attention = make_attention2d(
            attention,
            channels.get(attention_after),
            patch_size=patch_size,
            num_heads=num_heads,
            gamma=attention_gamma,
            symmetric=symmetric,
        )

    def forward(self, images):
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions and pooling like it better
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for name in STAGES:
            x = getattr(self, name)(x)
            if name == self.attention_after:
                x = self.attention(x)
        return self.fc(self.avgpool(x).flatten(1))  # (B, num_classes)


RESNET_BLOCKS = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}
RESNETS = {f"resnet{depth}": partial(ResNet, depth=depth) for depth in RESNET_BLOCKS}
