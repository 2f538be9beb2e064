"""Figures of maps: over images, layer by layer and head by head, as matrices, deletion curves; and of predictions."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from errors import UserError
from files import write_atomically
from maps.evaluate import to_pixels
from models.vit import from_patches, to_patches

COLOURS = "inferno"


def save_map(path, one_map):
    """Write a map (rows, columns) as .npy."""
    write_atomically(path, lambda file: np.save(file, one_map))


def save_figure(figure, path, dpi):
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi))


def subplots(rows, columns, *, width, height):
    """(figure, axes (rows, columns)) of this size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(axes, image, title, one_map=None, *, alpha=0.6, interpolation="bilinear"):
    """Draw an image (H, W, C), with a map (rows, columns) over it as shares of the map's maximum; alpha=1 hides it."""
    extent = (0, image.shape[1], image.shape[0], 0)
    axes.imshow(image, extent=extent, cmap="gray", vmin=0, vmax=255)  # the last three for one channel alone
    if one_map is not None:
        shares = one_map / max(one_map.max(), 1e-30)
        axes.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, alpha=alpha, interpolation=interpolation, extent=extent)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def add_colour_bar(figure, grid, *, aspect, label="share of the map's maximum"):
    figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=grid, aspect=aspect, label=label)


def draw_panel(path, images, captions, maps, *, interpolation="bilinear", dpi=150):
    """Write panel_figure to path."""
    save_figure(panel_figure(images, captions, maps, interpolation=interpolation), path, dpi)


def panel_figure(images, captions, maps, *, interpolation="bilinear"):
    """One row per image: the image, then the map of each method over it; a single method is also drawn alone.

    images are (H, W, C) uint8, captions their titles, maps a list of {method: (rows, columns)}.
    """
    methods = list(maps[0])
    columns = [(method, method.replace("_", " "), 0.6) for method in methods]
    if len(methods) == 1:
        columns.insert(0, (methods[0], f"{columns[0][1]}, alone", 1.0))
    width, height = 2.2 * len(columns) + 3, 2.5 * len(images) + 0.1
    figure, grid = subplots(len(images), len(columns) + 1, width=width, height=height)
    for axes_row, image, caption, found in zip(grid, images, captions, maps, strict=True):
        show_image(axes_row[0], image, caption)
        for axes, (method, title, alpha) in zip(axes_row[1:], columns, strict=True):
            show_image(axes, image, title, found[method], alpha=alpha, interpolation=interpolation)
    add_colour_bar(figure, grid, aspect=20 * len(images))
    return figure


def draw_comparison(path, image, caption, maps, *, interpolation="bilinear", dpi=150):
    """The image, and each of {title: map (h, w)} over it, in rows of six."""
    rows = -(-(len(maps) + 1) // 6)
    figure, grid = subplots(rows, 6, width=14, height=2.5 * rows + 0.1)
    for axes, (title, one_map) in itertools.zip_longest(
        grid.flat, [(caption, None), *maps.items()], fillvalue=(None, None)
    ):
        if title is None:
            axes.axis("off")
        else:
            show_image(axes, image, title.replace("_", " "), one_map, interpolation=interpolation)
    add_colour_bar(figure, grid, aspect=20 * rows)
    save_figure(figure, path, dpi)


def draw_attributions(path, image, caption, rows, *, interpolation="bilinear", dpi=150):
    """One row per (title, map (h, w)): the image, the map, the map over the image, and the image masked by the map."""
    figure, grid = subplots(len(rows), 4, width=10, height=2.5 * len(rows) + 0.1)
    for axes, (title, one_map) in zip(grid, rows, strict=True):
        show_image(axes[0], image, caption)
        show_image(axes[1], image, title, one_map, alpha=1.0, interpolation=interpolation)
        show_image(axes[2], image, "over the image", one_map, interpolation=interpolation)
        shares = to_pixels(torch.from_numpy(one_map)[None], image.shape[:2])[0].numpy()
        shares = shares / max(shares.max(), 1e-30)
        show_image(axes[3], (image * shares[:, :, None]).astype("uint8"), "masked by the map")
    add_colour_bar(figure, grid, aspect=20 * len(rows))
    save_figure(figure, path, dpi)


def draw_layers(path, image, caption, layers, *, interpolation="bilinear", dpi=150):
    """The map of every layer (a row) and head (a column) over the image; layers is (L, heads, rows, columns)."""
    depth, heads = layers.shape[:2]
    figure, grid = subplots(depth, heads, width=1.3 * heads + 0.8, height=1.45 * depth + 0.4)
    for layer in range(depth):
        for head in range(heads):
            title = f"layer {layer + 1}, head {head + 1}"
            show_image(grid[layer, head], image, title, layers[layer, head], interpolation=interpolation)
    add_colour_bar(figure, grid, aspect=10 * depth, label="share of each\nmap's maximum")
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path, dpi)


def cut_into_patches(model, pixels):
    """An image (C, H, W) uint8 as the model cuts it: (its patches, with white gaps between them; put back together).

    Both are (C, height, width). Raises UserError if the model cuts no patches.
    """
    if not hasattr(model, "patch_size"):
        raise UserError(f"--patches: {type(model).__name__} does not cut an image into patches, as vit does")
    p, grid = model.patch_size, model.grid
    image = F.pad(pixels[None], getattr(model, "padding", (0, 0, 0, 0)), value=128)  # grey for the mean colour
    image = F.interpolate(image, [cells * p for cells in grid], mode="bilinear")  # vit_b_16 enlarges its images
    patches, gap = to_patches(image, p), -(-p // 4)  # (1, N, C * p * p)
    apart = F.pad(patches.unflatten(2, (-1, p, p)), (0, gap, 0, gap), value=255).flatten(2)
    return from_patches(apart, p + gap, grid)[0, :, :-gap, :-gap], from_patches(patches, p, grid)[0]


def draw_patches(path, model, pixels, *, dpi=150):
    """An image (C, H, W) uint8, the patches that the model cuts it into, and these put back together."""
    apart, together = cut_into_patches(model, pixels)
    rows, columns = model.grid
    titles = ("the image", f"{rows} x {columns} patches of {model.patch_size} pixels", "put back together")
    figure, (row,) = subplots(1, 3, width=9, height=3.2)
    for axes, image, title in zip(row, (pixels, apart, together), titles, strict=True):
        show_image(axes, image.permute(1, 2, 0).numpy(), title)
    save_figure(figure, path, dpi)


def draw_matrix(path, matrix, caption, *, dpi=150):
    """A matrix (N, N) of how much each token (a row) takes from each token (a column), on a logarithmic scale."""
    figure, ((axes,),) = subplots(1, 1, width=6, height=5)
    smallest = max(matrix[matrix > 0].min(), matrix.max() * 1e-4)  # zero has no logarithm
    image = axes.imshow(matrix, cmap=COLOURS, norm=LogNorm(smallest, matrix.max(), clip=True), interpolation="nearest")
    axes.set_xlabel("token that is looked at")
    axes.set_ylabel("token that looks")
    axes.set_title(caption, fontsize=9)
    figure.colorbar(image, label="weight (logarithmic)")
    save_figure(figure, path, dpi)


def draw_redrawn(path, curves, layers, caption, *, dpi=150):
    """The rank correlation with the map before, while the weights of these layers are redrawn one after the other."""
    figure, ((axes,),) = subplots(1, 1, width=7, height=4.2)
    found = {name: values["redrawn"] for name, values in curves.items() if "redrawn" in values}
    for number, (name, values) in enumerate(found.items()):
        style = ("-", "--")[number // 10 % 2]
        axes.plot(
            range(len(values) + 1), [1, *values], f"C{number % 10}", linestyle=style, label=name.replace("_", " ")
        )
    axes.set_xticks(range(len(layers) + 1), ["none", *layers], rotation=45, ha="right")
    axes.set(xlabel="redrawn down to", ylabel="rank correlation with the map before")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path, dpi)


def draw_deletion_curves(path, curves, caption, *, dpi=150):
    """The predicted class's probability against the share of patches deleted (left) and inserted (right)."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, measure, better in zip(panels, ("deletion", "insertion"), ("lower", "higher"), strict=True):
        found = {name: values[measure] for name, values in curves.items() if measure in values}
        for number, (name, values) in enumerate(found.items()):
            share = [100 * step / (len(values) - 1) for step in range(len(values))]
            style = ":" if name in ("random", "centred gaussian") else ("-", "--")[number // 10 % 2]
            axes.plot(share, values, f"C{number % 10}", linestyle=style, label=name.replace("_", " "))
        axes.set_xlabel("patches deleted (%)" if measure == "deletion" else "patches inserted (%)")
        axes.grid(alpha=0.3)
        axes.set_title(f"{measure}: {better} is better", fontsize=9)
    panels[0].set_ylabel("probability of the predicted class")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path, dpi)


def draw_sheet(path, images, captions, maps):
    """Images (N, 3, H, W) with captions, and with their maps (h, w) over them if there are any."""
    columns, rows = min(8, len(images)), -(-len(images) // 8)
    figure, grid = subplots(rows, columns, width=1.8 * columns, height=2.1 * rows)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption, one_map in zip(grid.flat, images, captions, maps or [None] * len(images)):
        show_image(axes, image.permute(1, 2, 0).numpy(), caption, one_map, alpha=0.5)
    save_figure(figure, path, 100)


def draw_shares(axes, shares, texts, rows, columns, **labels):
    """Shares (rows, columns) as colours, with texts and names if there is room."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(**labels)
    if len(rows) <= 20:
        axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 5 else 0)
        axes.set_yticks(range(len(rows)), rows)
        for (row, column), text in np.ndenumerate(texts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def draw_evaluation(path, title, found, images):
    """One page of what evaluation() found, with the images (N, 3, H, W) of the surest mistakes."""
    figure = Figure(figsize=(17, 9), layout="constrained")
    figure.suptitle(title)
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1))
    confusion, reliability, *rest = top.subplots(1, 3 if "corruptions" in found else 2)
    counts, classes = np.array(found["confusion"]), found["classes"]
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    right = {name: f" {row['accuracy']:.0%}" for name, row in found["accuracies"].items()}
    rows = [name + right.get(name, "") for name in classes]
    draw_shares(confusion, shares, counts, rows, classes, xlabel="predicted", ylabel="true class, and its accuracy")
    for number, (label, (error, bins)) in enumerate(found["calibrations"].items()):
        count, said, was = np.array(bins).T
        reliability.plot(said, was, f"C{number}", label=f"{label}: calibration error {error:.3f}")
        reliability.scatter(said, was, 400 * count / count.sum(), f"C{number}", alpha=0.5)  # area: images
    reliability.plot([0, 1], [0, 1], "grey", linestyle=":", label="perfect")
    reliability.set(xlabel="probability of the predicted class", ylabel="accuracy")
    reliability.legend()
    for axes in rest:
        names, shares = found["corruptions"], np.array([*found["corruptions"].values()])
        texts, title = (100 * shares).round().astype(int), "accuracy (%) with corruptions of strengths 1 to 5"
        draw_shares(axes, shares, texts, names, range(1, 6), title=title)
    bottom.suptitle("the surest mistakes")
    grid = bottom.subplots(1, len(images), squeeze=False)[0] if len(images) else ()
    for axes, image, (_, true, said, probability) in zip(grid, images, found["mistakes"]):
        show_image(axes, image.permute(1, 2, 0).numpy(), f"true {true}\n{said} ({probability:.0%})")
    save_figure(figure, path, 110)
