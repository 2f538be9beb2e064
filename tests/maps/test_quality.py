"""The scores of generated images against their definitions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from data import Split
from maps.quality import NEIGHBOURS, draw_nearest, feature_scores, features_and_logits, nearest_images
from models import build_model

pytest.importorskip("torchmetrics")


def features(seed, count=60, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(count, 4, generator=generator, dtype=torch.float64)


def test_the_frechet_distance_is_its_closed_form():
    real, other = features(0), 2 * features(1, shift=0.5)
    a, b = (np.cov(x.numpy(), rowvar=False) for x in (real, other))
    means = (real.mean(0) - other.mean(0)).square().sum().item()
    expected = means + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert feature_scores(real, other)["frechet"] == pytest.approx(expected, rel=1e-3)


def test_the_kernel_distance_is_its_unbiased_estimate():
    real, other = features(0), features(1, shift=0.5)

    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    expected = within(real) + within(other) - 2 * kernel(real, other).mean()
    assert feature_scores(real, other)["kernel"] == pytest.approx(1000 * expected.item(), rel=1e-4)


def test_precision_recall_density_and_coverage_are_their_definitions():
    real, other = features(0), features(1, count=50, shift=0.8)

    def radius(points, point):
        return sorted((points - point).norm(dim=1).tolist())[NEIGHBOURS]  # the first is the point itself

    inside = [[(x - y).norm().item() <= radius(real, x) for y in other] for x in real]
    inside_other = [[(x - y).norm().item() <= radius(other, y) for y in other] for x in real]
    columns = list(zip(*inside, strict=True))
    scores = feature_scores(real, other)
    assert scores["precision"] == pytest.approx(np.mean([any(column) for column in columns]))
    assert scores["recall"] == pytest.approx(np.mean([any(row) for row in inside_other]))
    assert scores["density"] == pytest.approx(np.mean([sum(column) for column in columns]) / NEIGHBOURS)
    assert scores["coverage"] == pytest.approx(np.mean([any(row) for row in inside]))
    assert 0 < scores["precision"] < 1 and 0 < scores["coverage"] < 1


def test_images_beside_themselves_are_perfect_and_far_ones_are_not():
    same, far = feature_scores(features(0), features(0)), feature_scores(features(0), features(1, shift=100))
    assert same["frechet"] == pytest.approx(0, abs=1e-4) and same["kernel"] <= 0
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert far["precision"] == far["recall"] == far["density"] == far["coverage"] == 0 and far["frechet"] > 1000


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {"width": 8, "attention": "classic"}), ("cct_2_3x2", {}), ("vit", {"depth": 1})]
)
def test_features_are_what_the_last_layer_takes(name, options):
    model = build_model(name, num_classes=3, image_size=32, **options).eval()
    checkpoint = {"classes": ["a", "b", "c"], "args": {"amp": "off"}, "mean": [0.5] * 3, "std": [0.2] * 3}
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    found, logits = features_and_logits(model, checkpoint, images)
    [head] = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 3]
    torch.testing.assert_close(found.float() @ head.weight.T + head.bias, logits, rtol=1e-4, atol=1e-5)


def test_a_copy_is_found_also_if_it_is_mirrored(tmp_path):
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (2300, 3, 8, 8), generator=generator, dtype=torch.uint8)
    other = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    images = torch.cat([train[1500:1501], train[2200:2201].flip(3), other])
    distances, indices = nearest_images(images, train)
    assert indices[:2].tolist() == [1500, 2200] and distances[:2].max() < 1e-3
    expected = (other.float() - train.float()).square().mean((1, 2, 3)).sqrt().min() / 255
    assert distances[2].item() == pytest.approx(expected.item(), rel=1e-4)
    splits = (Split(x, torch.zeros(len(x), dtype=torch.long), np.arange(len(x))) for x in (train, images, train[:20]))
    train, test, generated = splits
    draw_nearest(tmp_path / "nearest.png", generated, SimpleNamespace(train=train, test=test))
    assert Image.open(tmp_path / "nearest.png").size[0] > 500
