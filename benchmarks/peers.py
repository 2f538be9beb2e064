"""What a user would use instead: others' models, loaders and loops, as in their documentation and examples."""

import itertools
from importlib.util import find_spec

import torch
import torch.nn.functional as F
import torchvision.transforms as v1
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image


def installed(*packages):
    """Whether all of these packages are installed; prints which are not."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        print(f"not installed: {', '.join(missing)} (pip install -r benchmarks/requirements.txt)")
    return not missing


class PilImages(Dataset):
    """The images of a Split as PIL images, after `transform` if given, and their labels."""

    def __init__(self, split, transform=None):
        self.images, self.labels, self.transform = split.images, split.labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = to_pil_image(self.images[index])
        return self.transform(image) if self.transform else image, int(self.labels[index])


def torchvision_loader(dataset, transforms, batch_size):
    """A DataLoader without workers that applies the transforms image by image."""
    transform = v1.Compose([*transforms, v1.Normalize(dataset.mean, dataset.std)])
    return DataLoader(PilImages(dataset.train, transform), batch_size, shuffle=True)


def timm_loader(dataset, batch_size, **options):
    """timm's loader, without workers."""
    from timm.data import create_loader

    options |= {"is_training": True, "use_prefetcher": False, "num_workers": 0, "color_jitter": None}
    images, size = PilImages(dataset.train), tuple(dataset.train.images.shape[1:])
    return create_loader(images, size, batch_size, mean=dataset.mean, std=dataset.std, **options)


def peer_training(model, loader, device, steps, *, dtype=torch.float32, make=torch.optim.AdamW, mix=None, reads=False):
    """A function without arguments that trains `steps` steps of a plain loop and returns their number of images.

    dtype is that of autocast; mix(images, labels) gives mixed images and soft targets; with `reads`, each step reads
    the loss and the number of correct images from the device.
    """
    model = model.to(device).train()
    optimizer = make(model.parameters(), lr=1e-3)

    def run():
        count = 0
        for images, labels in itertools.islice(loader, steps):
            images, labels = images.to(device), labels.to(device)
            count += len(labels)
            if mix:
                images, labels = mix(images, labels)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if reads:
                loss.item()
                (logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum().item()
        return count

    return run


class ReportBlock(nn.Module):
    """A block of the ViT report on (B, N, dim): torch's attention, which also returns its weights."""

    def __init__(self, dim=256, num_heads=8, drop=0.2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        first, second = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.mlp = nn.Sequential(first, nn.GELU(), nn.Dropout(drop), second, nn.Dropout(drop))

    def forward(self, x):
        n = self.norm1(x)
        x = x + self.attn(n, n, n, need_weights=True, average_attn_weights=True)[0]
        return x + self.mlp(self.norm2(x))


class ReportViT(nn.Module):
    """The report's model: images (B, 3, 32, 32) to logits (B, num_classes), by patches of 4 x 4."""

    def __init__(self, num_classes=10, dim=256):
        super().__init__()
        self.embed = nn.Linear(48, dim)
        self.cls_token, self.positions = (nn.Parameter(torch.randn(1, count, dim)) for count in (1, 65))
        self.drop = nn.Dropout(0.2)
        self.blocks = nn.Sequential(*(ReportBlock(dim) for _ in range(6)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, images):
        x = self.embed(F.unfold(images, 4, stride=4).mT)  # (B, 64, dim)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions  # (B, 65, dim)
        return self.head(self.norm(self.blocks(self.drop(x))[:, 0]))  # (B, num_classes)


def timm_vit():
    """timm's ViT, with the report's size."""
    from timm.models.vision_transformer import VisionTransformer

    size = {"img_size": 32, "patch_size": 4, "num_classes": 10, "embed_dim": 256, "depth": 6, "num_heads": 8}
    return VisionTransformer(**size, mlp_ratio=2, pos_drop_rate=0.2, proj_drop_rate=0.2)


def vit_pytorch_vit():
    """vit-pytorch's ViT, with the report's size."""
    from vit_pytorch import ViT

    size = {"image_size": 32, "patch_size": 4, "num_classes": 10, "dim": 256, "depth": 6, "heads": 8, "dim_head": 32}
    return ViT(**size, mlp_dim=512, dropout=0.2, emb_dropout=0.2)


def vit_pytorch_cct(num_classes):
    """vit-pytorch's CCT-6/3x1."""
    from vit_pytorch.cct import CCT

    tokenizer = {"n_conv_layers": 1, "kernel_size": 3, "stride": 1, "padding": 1}
    layers = {"num_layers": 6, "num_heads": 4, "mlp_ratio": 2, "positional_embedding": "learnable"}
    return CCT(img_size=32, embedding_dim=256, num_classes=num_classes, **tokenizer, **layers)


def one_hot(num_classes):
    return lambda images, labels: (images, F.one_hot(labels, num_classes).float())


def plain_resnet18(num_classes):
    """torchvision's ResNet18, with the stem for small images."""
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
