"""How good generated images are: in the features of a classifier that was trained on real ones, and beside these."""

import warnings

import torch
from torch import nn
from torchvision.utils import make_grid

from data import Split
from errors import UserError, aligned, import_optional
from files import write_json
from maps.draw import save_figure, subplots
from maps.images import checkpoint_dataset, images_at
from maps.predictions import predict_logits
from models import build_model
from pipeline.extra import read_extra
from training.checkpoint import load_checkpoint, rebuild_model

MOST = 10_000  # images of each set
NEIGHBOURS = 5  # Naeem et al. 2020
EVALUATION = ("quality.json", "nearest.png")  # what measure_quality writes
PAIRS = 50  # generated images shown beside their nearest training image


def open_classifier(args, classes, device, *, count):
    """(checkpoint, model, dataset) of the run --classifier, to evaluate `count` images.

    Raises UserError if it knows other classes, or these in another order, and if there are too few images.
    """
    import_optional("torchmetrics")
    checkpoint = load_checkpoint(args.classifier, device=device)
    if checkpoint["classes"] != classes:
        raise UserError(f"--classifier {args.classifier}: its classes are {', '.join(checkpoint['classes'])}")
    model = rebuild_model(checkpoint, build_model).to(device)
    dataset = checkpoint_dataset(checkpoint, data_dir=args.data_dir, cache_dir=args.cache_dir)
    counts = {"generated": count, "training": len(dataset.train.labels), "test": len(dataset.test.labels)}
    for what, number in counts.items():
        if number < NEIGHBOURS + 2:
            raise UserError(f"--classifier: {number} {what} images are too few; it needs {NEIGHBOURS + 2}")
    return checkpoint, model, dataset


def measure_quality(folder, checkpoint, model, dataset):
    """{set of images: its scores}, for the generated images in a folder and for training images, beside test images.

    The features are the inputs of the last layer of a classifier, `model`, trained on the dataset. Also written to
    quality.json in the folder, with nearest.png: generated images above the training images nearest to them.
    """
    generated = Split(*read_extra(folder, dataset.classes, dataset.test.images))
    count = min(len(generated.labels), len(dataset.test.labels), len(dataset.train.labels), MOST)
    sets = {"test images": dataset.test, "training images": dataset.train, "generated images": generated}
    sets = {name: evenly_spread(split, count) for name, split in sets.items()}
    found = {name: features_and_logits(model, checkpoint, split.images) for name, split in sets.items()}
    real, _ = found.pop("test images")
    scores = {name: feature_scores(real, features) for name, (features, _) in found.items()}
    for name, (_, logits) in found.items():
        scores[name]["recognised"] = (logits.argmax(1) == sets[name].labels).double().mean().item()
    draw_nearest(folder / "nearest.png", generated, dataset)
    record = {"classifier": checkpoint["model"], "trained_on": dataset.train.hash(), "images": count, "scores": scores}
    write_json(folder / "quality.json", record)
    return scores


def evenly_spread(split, count):
    """`count` images of a Split, those of large ones cropped."""
    indices = torch.linspace(0, len(split.labels) - 1, count).round().long()
    return split.pick(indices)._replace(images=images_at(split.images, indices))


def features_and_logits(model, checkpoint, images):
    """The inputs (N, D) of the last linear layer, float64, and the logits (N, classes), both on the CPU."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    last = [module for module in linear if module.out_features == len(checkpoint["classes"])][-1]
    kept = []
    handle = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].cpu().double()))
    try:
        logits = predict_logits(model, checkpoint, images, "classifying")
    finally:
        handle.remove()
    return torch.cat(kept), logits


def feature_scores(real, other):
    """{name: score} of features (N, D) beside those of real images (N, D).

    The Fréchet distance (Heusel et al. 2017) and 1,000 times the kernel distance (Bińkowski et al. 2018), both by
    torchmetrics; precision and recall (Kynkäänniemi et al. 2019); density and coverage (Naeem et al. 2020).
    """
    frechet, kernel = (import_optional(f"torchmetrics.image.{name}", "torchmetrics") for name in ("fid", "kid"))
    passing = nn.Identity()  # what torchmetrics takes for a network gives back the features
    passing.num_features = real.shape[1]
    warnings.filterwarnings("ignore", "Metric `Kernel")  # it keeps all features; these are few
    metrics = {
        "frechet": frechet.FrechetInceptionDistance(passing),
        "kernel": kernel.KernelInceptionDistance(passing, subset_size=min(1000, len(real), len(other))),
    }
    for metric in metrics.values():
        metric.set_dtype(torch.float64)
        metric.update(real, real=True)
        metric.update(other, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the kernel distance draws subsets
        scores = {
            "frechet": metrics["frechet"].compute().item(),
            "kernel": 1000 * metrics["kernel"].compute()[0].item(),
        }
    distances = torch.cdist(real, other)  # (real, other)
    radius, other_radius = neighbour_distances(real), neighbour_distances(other)  # (N,)
    inside = distances <= radius[:, None]
    return scores | {
        "precision": inside.any(0).double().mean().item(),
        "recall": (distances <= other_radius).any(1).double().mean().item(),
        "density": inside.double().sum(0).mean().item() / NEIGHBOURS,
        "coverage": inside.any(1).double().mean().item(),
    }


def neighbour_distances(features):
    """(N,) the distance of each of the features (N, D) to the NEIGHBOURS-th nearest other one."""
    return torch.cdist(features, features).kthvalue(NEIGHBOURS + 1, dim=1).values


def nearest_images(images, others):
    """(distances (N,), indices (N,)) of the nearest of `others` to each of images (N, C, H, W) uint8, also mirrored;
    a distance is the root of the mean squared difference of pixels in 0 ... 1."""
    flat = images.flatten(1).float() / 255
    found = torch.full((len(flat),), torch.inf), torch.zeros(len(flat), dtype=torch.long)
    for start in range(0, len(others), 1000):
        chunk = others[start : start + 1000]
        both = torch.minimum(*(torch.cdist(flat, view.flatten(1).float() / 255) for view in (chunk, chunk.flip(3))))
        distance, index = both.min(1)
        found = [torch.where(distance < found[0], new, old) for new, old in zip((distance, index + start), found)]
    return found[0] / flat.shape[1] ** 0.5, found[1]


def draw_nearest(path, generated, dataset):
    """Draw PAIRS generated images, each above the training image nearest to it, and their distances beside those of
    as many test images: a generator that copies would have shorter ones."""
    some, test = (evenly_spread(split, min(PAIRS, len(split.labels))).images for split in (generated, dataset.test))
    train = images_at(dataset.train.images, torch.arange(len(dataset.train.labels)))
    (distances, indices), (of_test, _) = (nearest_images(images, train) for images in (some, test))
    order = distances.argsort()
    pairs = torch.cat([some[order], train[indices[order]]], dim=2)  # (N, C, 2 H, W)
    sheet = make_grid(pairs, 10, padding=2, pad_value=255)
    figure, axes = subplots(1, 2, width=10, height=5.5)
    axes[0, 0].imshow(sheet.permute(1, 2, 0).numpy())
    axes[0, 0].set_title("generated, and below each the nearest training image", fontsize=9)
    axes[0, 0].axis("off")
    axes[0, 1].hist([distances.numpy(), of_test.numpy()], label=["generated images", "test images"])
    axes[0, 1].set(xlabel="distance to the nearest training image", ylabel="images")
    axes[0, 1].legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    save_figure(figure, path, dpi=120)


def quality_text(scores):
    """The scores of measure_quality as a table."""
    first = next(iter(scores.values()))
    rows = [[name, *(f"{score:.3f}" for score in row.values())] for name, row in scores.items()]
    return "in the features of the classifier, beside test images:\n" + aligned([["images", *first], *rows])
