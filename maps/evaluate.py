"""How good a map is: measured by the object's mask, and by deleting and inserting the patches that it ranks."""

import itertools

import torch
import torch.nn.functional as F

from maps.randomise import maps_while_redrawn, rank_correlation

STEPS = 10  # of deletion, insertion and SaCo, each with a tenth of the patches


def comparable(maps):
    """Maps (B, H, W) as shares of their maximum, rounded to 1e-6, so that rounding errors do not break ties."""
    maps = maps.double().clamp(min=0)
    return (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)).mul(1e6).round() / 1e6


def to_pixels(maps, size):
    """Maps (B, h, w) enlarged to size (H, W) by bilinear interpolation."""
    return F.interpolate(maps[:, None].double(), size, mode="bilinear", align_corners=False)[:, 0]


def pointing_game(maps, masks):
    """(B,): 1 if the map's maximum lies in the mask (Zhang et al. 2016); the share of them if there are several."""
    highest = maps == maps.amax((1, 2), keepdim=True)
    return (highest & masks).sum((1, 2)).double() / highest.sum((1, 2))


def mass_ratio(maps, masks):
    """(B,): the share of the map's mass inside the mask, divided by the mask's share of the image; 1 if uniform."""
    inside = (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-30)
    return inside / masks.double().mean((1, 2))


def average_precision(maps, masks):
    """(B,): average precision of the map as a score of pixels in the mask; the mask's share for a uniform map."""
    scores, order = maps.flatten(1).sort(dim=1, descending=True)  # (B, H * W)
    hits = masks.flatten(1).gather(1, order).double()
    count = scores.shape[1]
    positions = torch.arange(count, device=maps.device)
    precision = hits.cumsum(1) / (positions + 1)  # of the pixels up to each position
    # pixels with the same score pass a threshold together: each takes the precision at the last of them
    is_last = torch.ones_like(scores, dtype=torch.bool)
    is_last[:, :-1] = scores[:, :-1] != scores[:, 1:]
    last = torch.where(is_last, positions, count).flip(1).cummin(1).values.flip(1)  # the next such position
    return (precision.gather(1, last) * hits).sum(1) / hits.sum(1)


def segmentation(maps, masks):
    """Pixel accuracy (B,) and mean IoU (B,) of object and background, if pixels above the map's mean are the object."""
    chosen = maps > maps.mean((1, 2), keepdim=True)
    accuracy = (chosen == masks).double().mean((1, 2))
    ious = []
    for a, b in ((chosen, masks), (~chosen, ~masks)):
        ious.append((a & b).sum((1, 2)).double() / (a | b).sum((1, 2)).clamp(min=1))
    return accuracy, (ious[0] + ious[1]) / 2


def against_masks(maps, masks, outlines, others=None):
    """{measure: (B,)} of maps (B, h, w), enlarged to the size of masks, outlines and others (B, H, W) bool."""
    maps = comparable(to_pixels(maps.cpu(), masks.shape[1:]))  # on the CPU: not all devices have float64
    accuracy, miou = segmentation(maps, masks)
    return {
        "pointing": pointing_game(maps, masks),
        "pointing_filled": pointing_game(maps, outlines),
        **({} if others is None else {"pointing_other": pointing_game(maps, others)}),
        "mass_ratio": mass_ratio(maps, masks),
        "average_precision": average_precision(maps, masks),
        "pixel_accuracy": accuracy,
        "miou": miou,
    }


def over_patches(model, maps):
    """Maps (B, h, w) averaged over each of the model's patches: (B, rows, columns). Padding does not count."""
    padding = getattr(model, "padding", (0, 0, 0, 0)) if maps.shape[1:] != model.grid else (0, 0, 0, 0)
    inside = F.pad(torch.ones_like(maps), padding)
    return F.adaptive_avg_pool2d(F.pad(maps, padding), model.grid) / F.adaptive_avg_pool2d(inside, model.grid)


@torch.no_grad()
def by_removal(model, images, maps, classes):
    """{"deletion", "insertion": curves (B, STEPS + 1) (Petsiuk et al. 2018), "saco": (B,)}.

    The curves are the probabilities of `classes` (B,) while the patches of normalised images (B, C, H, W) are replaced
    by the mean colour, the most relevant first, and while they are inserted into an image of the mean colour. maps is
    (B, rows, columns), one value per patch. For saco, each tenth of the patches is replaced by itself.
    """

    def probability(inputs):
        probabilities = model(inputs).float().softmax(1).expand(len(classes), -1)
        return probabilities.gather(1, classes[:, None])[:, 0]

    # the argsort of an argsort is each patch's rank, (B, rows * columns); 0 is the most relevant
    height, width = images.shape[2:]
    _, right, _, bottom = getattr(model, "padding", (0, 0, 0, 0))
    rank = maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    ends = [round(step / STEPS * rank.shape[1]) for step in range(STEPS + 1)]
    parts = [((low <= rank) & (rank < high)).unflatten(1, maps.shape[1:]) for low, high in itertools.pairwise(ends)]
    whole, empty = probability(images), probability(torch.zeros_like(images[:1]))  # zero is the mean colour
    deletion, insertion, drops, removed = [whole], [empty], [], 0
    for part in parts:
        part = F.interpolate(part[:, None].float(), (height + bottom, width + right), mode="nearest")
        part = part[..., :height, :width]  # (B, 1, H, W)
        drops.append(whole - probability(images * (1 - part)))
        removed = removed + part
        if len(drops) < STEPS:
            deletion.append(probability(images * (1 - removed)))
            insertion.append(probability(images * removed))
    shares = torch.stack([(maps * part).sum((1, 2)) for part in parts], 1)
    curves = {"deletion": torch.stack([*deletion, empty], 1), "insertion": torch.stack([*insertion, whole], 1)}
    return curves | {"saco": saco(shares, torch.stack(drops, 1))}


def saco(shares, drops):
    """(B,) in -1 ... 1: the salience-guided faithfulness coefficient (Wu et al. 2024, algorithm 1).

    shares (B, K) are what a map gives to K groups of patches, the highest first, drops (B, K) how far the probability
    falls without each. Each pair of groups counts by the difference of its shares, as negative if the group with the
    larger share has the smaller drop. 0 if all shares are equal.
    """
    first, second = torch.triu_indices(shares.shape[1], shares.shape[1], offset=1)
    weights = shares[:, first] - shares[:, second]  # (B, K * (K - 1) / 2), none negative
    signs = torch.where(drops[:, first] >= drops[:, second], 1.0, -1.0)
    return (weights * signs.to(weights)).sum(1) / weights.sum(1).clamp(min=1e-30)


def area_under(curves):
    """(B,): the area under curves (B, steps) over the unit interval, by the trapezoidal rule."""
    return torch.trapezoid(curves.double(), dx=1 / (curves.shape[1] - 1), dim=1)


BASELINES = ("uniform", "centred gaussian", "random")


def centred_gaussian(grid):
    """A map (rows, columns) that always points at the centre; its standard deviation is a quarter of each side."""
    rows, columns = (((torch.arange(n) + 0.5) / n - 0.5) * 4 for n in grid)
    return torch.exp(-0.5 * (rows[:, None] ** 2 + columns[None, :] ** 2))


def mean_and_error(values):
    """The mean of (N,) values and its standard error."""
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def evaluate(model, batches, explainers, precision, *, masks, fresh=None):
    """({name: {measure: (N,)}}, {name: {measure: mean curve}}) over all N images.

    batches yields normalised images (B, C, H, W). explainers is {name: function}; each function takes (images,
    predicted classes) and returns maps (B, h, w). masks is as from object_masks. With fresh(), which gives a state dict
    of weights that have learnt nothing, the maps are also compared with those of such weights, others for each batch.
    Before a removal of patches, a map is averaged over each patch; only these forward passes use mixed precision.
    """
    found = {name: {} for name in explainers}
    start = 0
    for images in batches:
        with torch.no_grad():
            classes = model(images).argmax(1)
        drawn = {key: mask[start : start + len(images)] for key, mask in masks.items()}
        maps_of = {name: explain(images, classes) for name, explain in explainers.items()}
        learning = {name: explain for name, explain in explainers.items() if name not in BASELINES}
        redrawn = maps_while_redrawn(model, fresh(), learning, images, classes) if fresh else {}
        for name, maps in maps_of.items():
            scores = against_masks(maps, **drawn) if drawn else {}
            patches = over_patches(model, maps)
            if name != "uniform":  # it does not rank the patches
                with precision.autocast():
                    scores |= by_removal(model, images, patches, classes)
            if name in redrawn:
                stages = [rank_correlation(patches, over_patches(model, other)) for other in redrawn[name]]
                scores |= {"redrawn": torch.stack(stages, 1), "rank_correlation": stages[-1]}
                if drawn:
                    scores["pointing_redrawn"] = against_masks(redrawn[name][-1], **drawn)["pointing"]
            for measure, values in scores.items():
                found[name].setdefault(measure, []).append(values.cpu())
        start += len(images)

    scores, curves = {}, {}
    for name, measures in found.items():
        measures = {measure: torch.cat(values) for measure, values in measures.items()}
        curves[name] = {m: values.mean(0).tolist() for m, values in measures.items() if values.ndim == 2}
        scores[name] = {m: area_under(v) if v.ndim == 2 else v for m, v in measures.items() if m != "redrawn"}
    return scores, curves


def baselines(grid):
    """Explainers that ignore the image, for comparison: uniform, Gaussian, random; maps have the shape `grid`."""

    def repeated(one):
        return lambda images, classes: one.to(images.device).expand(len(images), -1, -1)

    generator = torch.Generator().manual_seed(0)

    def random(images, classes):
        return torch.rand(len(images), *grid, generator=generator).to(images.device)

    explainers = repeated(torch.ones(grid)), repeated(centred_gaussian(grid)), random
    return dict(zip(BASELINES, explainers, strict=True))
