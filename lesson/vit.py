"""The whole of a Vision Transformer in one file: the model, the images, the training.

    python lesson/vit.py

draws 9,000 images of four shapes and learns to tell them apart: after five epochs, in about a minute on two CPU cores,
95 % of the validation images are correct. It needs torch alone, so the file can be pasted into one cell of a notebook.
docs/reading.md trains it on CIFAR-10. train_vit.py is the same model and the same training step, made for long runs.

Shapes: B images, N tokens (the class token and one per patch), D numbers per token, d per head, p x p pixels per patch.
"""

import torch
from torch import nn


def to_patches(images, p):
    """Cut images (B, 3, H, W) into square patches, and lay the numbers of each patch out in one row."""
    patches = images.unfold(2, p, p).unfold(3, p, p)  # (B, 3, H/p, W/p, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (B, H/p, W/p, 3, p, p)
    return patches.flatten(3).flatten(1, 2)  # (B, N-1, 3*p*p)


class Attention(nn.Module):
    """Each token takes a weighted mean of the values of all tokens; each head has weights of its own."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)  # queries, keys and values in one matrix product
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)  # a module, so that a hook can read the weights
        nn.init.xavier_uniform_(self.qkv.weight)  # these three as in nn.MultiheadAttention
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        qkv = self.qkv(x)  # (B, N, 3*D)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5  # (B, heads, N, N): query i, key j
        weights = self.softmax(scores)  # none below 0, and each row sums to 1
        mixed = weights @ values  # (B, heads, N, d)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    """Attention mixes the tokens, the MLP works on each token alone. Both add to what is there."""

    def __init__(self, dim, num_heads, drop):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(drop), nn.Linear(2 * dim, dim), nn.Dropout(drop)
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (B, 3, H, W) to logits (B, classes): the class with the largest one is the answer."""

    def __init__(self, num_classes, *, image_size=32, patch_size=4, embed_dim=64, depth=3, num_heads=4, drop=0.1):
        super().__init__()
        num_tokens = (image_size // patch_size) ** 2 + 1
        self.patch_size = patch_size
        self.patch_embed = nn.Linear(3 * patch_size**2, embed_dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, num_tokens, embed_dim))
        self.drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, drop) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        tokens = self.patch_embed(to_patches(images, self.patch_size))  # (B, N-1, D)
        class_token = self.cls_token.expand(len(images), -1, -1)  # (B, 1, D)
        x = torch.cat([class_token, tokens], dim=1)  # (B, N, D)
        x = self.drop(x + self.pos_embed)  # attention alone does not know where a patch was
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # (B, classes), from the class token


def draw_images(count):
    """Squares, discs, crosses and triangles on noise: images (count, 3, 32, 32) from 0 to 1, and labels (count,)."""
    labels = torch.randint(4, (count,))  # (count,)
    size = 4 + 5 * torch.rand(count, 1, 1)  # (count, 1, 1): from the centre to the edge, in pixels
    x = torch.arange(-9, 23) - 14 * torch.rand(count, 1, 1)  # (count, 1, 32): 0 at a random centre
    y = torch.arange(-9, 23)[:, None] - 14 * torch.rand(count, 1, 1)  # (count, 32, 1)
    square = (x.abs() < size) & (y.abs() < size)  # (count, 32, 32)
    disc = x**2 + y**2 < size**2
    cross = square & ((x.abs() < size / 3) | (y.abs() < size / 3))
    triangle = square & (2 * x.abs() < y + size)
    inside = torch.stack([square, disc, cross, triangle])[labels, torch.arange(count), None]  # (count, 1, 32, 32)
    colour = 0.5 + 0.5 * torch.rand(count, 3, 1, 1)
    noise = 0.5 * torch.rand(count, 3, 32, 32)
    return torch.where(inside, colour, noise), labels


def train_one_epoch(model, optimizer, batches):
    """One step per batch; returns the share of images that were classified correctly along the way."""
    model.train()
    correct = []
    for images, labels in batches:  # (B, 3, H, W) and (B,)
        logits = model(images)  # (B, classes)
        loss = nn.functional.cross_entropy(logits, labels)  # one number
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct.append(logits.argmax(dim=1) == labels)  # (B,)
    return torch.cat(correct).float().mean().item()


@torch.no_grad()
def validate(model, batches):
    """The share of images that are classified correctly; no weight changes."""
    model.eval()  # no dropout
    correct = []
    for images, labels in batches:
        logits = model(images)  # (B, classes)
        correct.append(logits.argmax(dim=1) == labels)  # (B,)
    return torch.cat(correct).float().mean().item()


def main(images=None, labels=None, *, epochs=5, batch_size=32, lr=2e-3):
    """Train on images (N, 3, 32, 32) from 0 to 1, or on drawn ones; returns the last validation accuracy."""
    torch.manual_seed(0)
    if images is None:
        images, labels = draw_images(9000)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (images.to(device) - 0.5) / 0.25, labels.to(device)  # mean about 0, standard deviation about 1
    validation, training = torch.randperm(len(images)).tensor_split([1000])  # indices: (1000,) and the rest
    model = ViT(num_classes=int(labels.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for epoch in range(1, epochs + 1):
        order = training[torch.randperm(len(training))]
        train_batches = ((images[i], labels[i]) for i in order.split(batch_size))
        val_batches = ((images[i], labels[i]) for i in validation.split(batch_size))
        train_accuracy = train_one_epoch(model, optimizer, train_batches)
        val_accuracy = validate(model, val_batches)
        print(f"epoch {epoch}: training accuracy {train_accuracy:.1%}, validation accuracy {val_accuracy:.1%}")
    return val_accuracy


if __name__ == "__main__":
    main()
