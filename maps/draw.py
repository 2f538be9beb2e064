"""Images of maps: beside the photograph, layer by layer and head by head, and as matrices."""

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from files import write_atomically
from maps.evaluate import to_pixels

COLOURS = "inferno"


def save_figure(figure, path, dpi):
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=dpi))


def show_map(axes, one_map, size, *, interpolation, alpha=1.0):
    """Draw a map (rows, columns), as shares of its maximum, over an area of `size` (height, width) pixels."""
    shares = one_map / max(one_map.max(), 1e-30)
    extent = (0, size[1], size[0], 0)
    axes.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, alpha=alpha, interpolation=interpolation, extent=extent)


def show_image(axes, image, title):
    axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_panel(path, images, captions, maps, *, interpolation="bilinear", dpi=150):
    """One row per image: the image, then for each method the map over it; for a single method the map alone as well.

    images are (H, W, 3) uint8, captions their titles, maps a list of {method: (rows, columns)}.
    """
    methods = list(maps[0])
    columns = [("over", method) for method in methods]
    if len(methods) == 1:
        columns.insert(0, ("alone", methods[0]))
    figure = Figure(figsize=(2.2 * len(columns) + 3, 2.5 * len(images) + 0.1), layout="constrained")
    grid = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    for axes_row, image, caption, found in zip(grid, images, captions, maps, strict=True):
        show_image(axes_row[0], image, caption)
        for axes, (kind, method) in zip(axes_row[1:], columns, strict=True):
            name = method.replace("_", " ")
            show_image(axes, image, name if kind == "over" else f"{name}, alone")
            alpha = 0.6 if kind == "over" else 1.0
            show_map(axes, found[method], image.shape[:2], interpolation=interpolation, alpha=alpha)
    scale = ScalarMappable(Normalize(0, 1), COLOURS)
    figure.colorbar(scale, ax=grid, aspect=20 * len(images), label="share of the map's maximum")
    save_figure(figure, path, dpi)


def draw_attributions(path, image, caption, rows, *, interpolation="bilinear", dpi=150):
    """A row for each (title, map (h, w)): the image, the map alone, the map over it, and the image masked by it."""
    figure = Figure(figsize=(10, 2.5 * len(rows) + 0.1), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    size = image.shape[:2]
    for axes, (title, one_map) in zip(grid, rows, strict=True):
        show_image(axes[0], image, caption)
        show_image(axes[1], image, title)
        show_map(axes[1], one_map, size, interpolation=interpolation)
        show_image(axes[2], image, "over the image")
        show_map(axes[2], one_map, size, interpolation=interpolation, alpha=0.6)
        shares = to_pixels(torch.from_numpy(one_map)[None], size)[0].numpy()
        shares = shares / max(shares.max(), 1e-30)
        show_image(axes[3], (image * shares[:, :, None]).astype("uint8"), "masked by it")
    scale = ScalarMappable(Normalize(0, 1), COLOURS)
    figure.colorbar(scale, ax=grid, aspect=20 * len(rows), label="share of the map's maximum")
    save_figure(figure, path, dpi)


def draw_layers(path, image, caption, layers, *, interpolation="bilinear", dpi=150):
    """The map of every layer (a row) and head (a column) over the image; layers is (L, heads, rows, columns)."""
    depth, heads = layers.shape[:2]
    figure = Figure(figsize=(1.3 * heads + 0.8, 1.45 * depth + 0.4), layout="constrained")
    grid = figure.subplots(depth, heads, squeeze=False)
    for layer in range(depth):
        for head in range(heads):
            show_image(grid[layer, head], image, f"layer {layer + 1}, head {head + 1}")
            show_map(grid[layer, head], layers[layer, head], image.shape[:2], interpolation=interpolation, alpha=0.6)
    scale = ScalarMappable(Normalize(0, 1), COLOURS)
    figure.colorbar(scale, ax=grid, aspect=10 * depth, label="share of each\nmap's maximum")
    figure.suptitle(caption, fontsize=9)
    save_figure(figure, path, dpi)


def draw_matrix(path, matrix, caption, *, dpi=150):
    """A whole matrix (N, N) of how much each token takes from each, on a logarithmic scale."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    smallest = max(matrix[matrix > 0].min(), matrix.max() * 1e-4)
    image = axes.imshow(matrix, cmap=COLOURS, norm=LogNorm(smallest, matrix.max(), clip=True), interpolation="nearest")
    axes.set_xlabel("token of the input")
    axes.set_ylabel("token of the last layer")
    axes.set_title(caption, fontsize=9)
    figure.colorbar(image, label="share of the row (logarithmic)")
    save_figure(figure, path, dpi)


def draw_deletion_curves(path, curves, caption, *, dpi=150):
    """Deletion and insertion: the predicted class's probability against the share of patches that went or came."""
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
