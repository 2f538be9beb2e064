"""ACGAN (Odena et al. 2017): a generator told the class, and a discriminator that also classifies."""

import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, interpolate, one_hot, softplus
from torch.nn.utils.parametrizations import spectral_norm

from errors import UserError


class ClassNorm(nn.Module):
    """BatchNorm of (B, dim, H, W) with a gain and a bias for each class (Dumoulin et al. 2017)."""

    def __init__(self, dim, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, affine=False)
        self.gain, self.bias = nn.Embedding(num_classes, dim), nn.Embedding(num_classes, dim)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x, labels):
        return self.gain(labels)[:, :, None, None] * self.norm(x) + self.bias(labels)[:, :, None, None]


class Generator(nn.Module):
    """Noise (B, noise_dim) and labels (B,) to images (B, 3, S, S) in -1 ... 1.

    The class stands beside the noise, as in Odena et al., and in each normalisation.
    """

    def __init__(self, *, num_classes, image_size, width, noise_dim):
        super().__init__()
        self.shape, dims = (4 * width, image_size // 8, image_size // 8), (4 * width, 2 * width, width, width)
        self.num_classes = num_classes
        self.first = nn.Linear(noise_dim + num_classes, math.prod(self.shape))
        self.norms = nn.ModuleList([ClassNorm(dim, num_classes) for dim in dims])
        self.convs = nn.ModuleList([nn.Conv2d(dim, out, 3, padding=1) for dim, out in zip(dims, (*dims[1:], 3))])

    def forward(self, noise, labels):
        x = torch.cat([noise, one_hot(labels, self.num_classes)], dim=1)  # (B, noise_dim + classes)
        x = self.first(x).unflatten(1, self.shape)  # (B, 4 * width, S / 8, S / 8)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(x, labels).relu()
            x = conv(x if conv is self.convs[-1] else interpolate(x, scale_factor=2.0))
        return x.tanh()  # (B, 3, S, S)


class Discriminator(nn.Module):
    """Images (B, 3, S, S) to (how real they are (B,), class logits (B, classes)), with spectral normalisation.

    Without BatchNorm (Miyato et al. 2018), so that real and generated images can share a batch.
    """

    def __init__(self, *, num_classes, width, drop):
        super().__init__()
        dims = (3, width, 2 * width, 4 * width)
        layers = []
        for dim, out_dim in zip(dims, dims[1:]):
            layers += [spectral_norm(nn.Conv2d(dim, out_dim, 3, padding=1)), nn.LeakyReLU(0.2)]
            layers += [spectral_norm(nn.Conv2d(out_dim, out_dim, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
            layers += [nn.Dropout(drop)]
        self.layers = nn.Sequential(*layers)
        self.real = spectral_norm(nn.Linear(4 * width, 1))
        self.classes = nn.Linear(4 * width, num_classes)

    def forward(self, images):
        x = self.layers(images).sum((2, 3))  # (B, 4 * width): a mean would leave little of a 1-Lipschitz signal
        return self.real(x)[:, 0], self.classes(x)


class Acgan(nn.Module):
    """Both networks, trained in the same step, each by its own loss (see acgan_loss).

    Raises UserError for an image size that 8 does not divide.
    """

    no_weight_decay = ()

    def __init__(self, *, num_classes, image_size=32, width=64, drop=0.0, noise_dim=128):
        super().__init__()
        if not isinstance(image_size, int) or image_size % 8:
            raise UserError(f"--image-size {image_size}: acgan needs squares whose side 8 divides")
        self.noise_dim = noise_dim
        options = {"num_classes": num_classes, "width": width}
        self.generator = Generator(**options, image_size=image_size, noise_dim=noise_dim)
        self.discriminator = Discriminator(**options, drop=drop)

    def forward(self, images, noise, labels):
        """The discriminator's answers, each (scores (B,), class logits (B, classes)): to real images; to images
        generated from noise (B, noise_dim) and labels (B,), for its own loss; and to them, for the generator's.
        """
        generated = self.generator(noise, labels)  # (B, 3, S, S)
        scores, logits = self.discriminator(torch.cat([images, generated.detach()]))
        fixed = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        for_generator = functional_call(self.discriminator, fixed, generated)  # its loss trains the generator alone
        count = len(images)
        return (scores[:count], logits[:count]), (scores[count:], logits[count:]), for_generator

    def generate(self, labels, draw):
        """Yields images (B, 3, S, S) of labels (B,); draw(shape) is normal noise."""
        yield self.generator(draw((self.noise_dim,)), labels)


def acgan_loss(forward, images, labels, *, noise_dim, kind):
    """(the sum of both networks' losses (), how many real images are classified right ()).

    kind is "hinge" (Lim & Ye 2017) or "paper", the log-likelihoods of Odena et al. 2017, the generator's in the form
    that does not saturate (Goodfellow et al. 2014). Both losses include the cross entropy of the class; with "hinge"
    the discriminator learns it from real images alone, or both networks could agree on a sign for it, say a colour.
    """
    noise = torch.randn(len(images), noise_dim, device=images.device)
    wanted = labels[torch.randperm(len(labels), device=labels.device)]  # (B,): as frequent as in the images
    answers = [[part.float() for part in answer] for answer in forward(images, noise, wanted)]
    (real, classes), (generated, generated_classes), (for_generator, generator_classes) = answers
    if kind == "hinge":
        loss = (1 - real).relu().mean() + (1 + generated).relu().mean() - for_generator.mean()
    else:
        loss = softplus(-real).mean() + softplus(generated).mean() + softplus(-for_generator).mean()
        loss = loss + cross_entropy(generated_classes, wanted)
    loss = loss + cross_entropy(classes, labels) + cross_entropy(generator_classes, wanted)
    return loss, (classes.argmax(1) == labels).sum()
