"""ACGAN's losses: each network learns by its own, in one step."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from errors import UserError
from models import build_model
from models.acgan import acgan_loss


def small():
    torch.manual_seed(0)
    return build_model("acgan", num_classes=3, image_size=16, width=8, noise_dim=5)


def draws(images, labels):
    torch.manual_seed(1)
    return torch.randn(len(images), 5), labels[torch.randperm(len(labels))]


@pytest.mark.parametrize("kind", ["hinge", "paper"])
def test_each_network_has_the_gradient_of_its_own_loss_alone(kind):
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 1])
    model = small()
    generator, discriminator = model.generator, model.discriminator.eval()  # no further step of the power iteration
    noise, wanted = draws(images, labels)
    torch.manual_seed(1)
    loss, correct = acgan_loss(model, images, labels, noise_dim=5, kind=kind)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}

    generated = generator(noise, wanted)
    (real, classes), (fake, fake_classes) = discriminator(images), discriminator(generated.detach())
    assert correct.item() == sum(classes.argmax(1).tolist()[i] == label for i, label in enumerate(labels.tolist()))
    fooled, fooled_classes = discriminator(generated)
    ones, zeros = torch.ones(6), torch.zeros(6)
    if kind == "hinge":
        of_discriminator = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
        of_generator = -fooled.mean()
    else:
        of_discriminator = binary_cross_entropy_with_logits(real, ones) + binary_cross_entropy_with_logits(fake, zeros)
        of_discriminator = of_discriminator + cross_entropy(fake_classes, wanted)
        of_generator = binary_cross_entropy_with_logits(fooled, ones)
    of_discriminator = of_discriminator + cross_entropy(classes, labels)
    of_generator = of_generator + cross_entropy(fooled_classes, wanted)
    for part, one_loss in ((discriminator, of_discriminator), (generator, of_generator)):
        prefix = "discriminator." if part is discriminator else "generator."
        names, parameters = zip(*part.named_parameters(), strict=True)
        for name, gradient in zip(names, torch.autograd.grad(one_loss, parameters, retain_graph=True), strict=True):
            torch.testing.assert_close(found[prefix + name], gradient, rtol=1e-4, atol=1e-6)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_generator_is_told_the_class():
    model = small().eval()
    images = list(model.generate(torch.tensor([0, 0, 1]), lambda shape: torch.ones(3, *shape)))[-1]
    assert images.shape == (3, 3, 16, 16) and images.abs().max() <= 1
    assert torch.allclose(images[0], images[1]) and not torch.allclose(images[0], images[2])


def test_a_size_that_does_not_fit_is_said():
    with pytest.raises(UserError, match="--image-size 20: acgan needs squares whose side 8 divides"):
        build_model("acgan", num_classes=2, image_size=20)
