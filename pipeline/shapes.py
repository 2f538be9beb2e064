"""The built-in datasets: shapes drawn on textured backgrounds, with a mask of each shape.

Ten classes, 32 x 32 pixels, generated from fixed seeds in a few seconds; nothing is downloaded or stored. Sizes, angles
and colours are random. Centres are uniform over a square with a margin of 4 pixels, so the border cuts some shapes.

In `shapes` the shape is brighter than its background. `shapes_even` has the same images, but every second one, drawn by
lot, is inverted: brightness says nothing of where the shape is. In `shapes_pair` a smaller red and a smaller blue shape
of two classes stand side by side, and the label is that of the red one. `shapes_shuffled` are the images of `shapes`
with the training labels shuffled: they can be memorised, but say nothing of a shape.

All arithmetic is IEEE in a fixed order, and the random bits are PCG64's, so the images are the same on every machine.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

SIZE = 32
COUNTS = {"train": 20_000, "val": 2_000, "test": 2_000}
MARGIN = 4
COVERAGE = (0.08, 0.25)  # fractions of the image: a mask covers at least the first, its outline at most the second
CHUNK = 100  # images drawn together: they fit into the processor's cache
# cosine and sine of 256 directions, rounded so that they are the same with every libm
DIRECTIONS = np.round([[np.cos(a), np.sin(a)] for a in np.arange(256) * (2 * np.pi / 256)], 6).astype(np.float32)
CENTRES = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
Y, X = CENTRES[:, None], CENTRES[None, :]


class ShapeSet(NamedTuple):
    images: torch.Tensor  # (N, 3, 32, 32) uint8
    labels: torch.Tensor  # (N,) int64
    masks: torch.Tensor  # (N, 32, 32) bool: the pixels of the shape
    outlines: torch.Tensor  # (N, 32, 32) bool: the mask with its hole filled
    others: torch.Tensor | None = None  # (N, 32, 32) bool: in shapes_pair, the pixels of the other shape alone


def length(x, y):
    return np.sqrt(x * x + y * y)


def box(x, y, width, height):
    return np.maximum(abs(x) - width, abs(y) - height)


def half_planes(x, y, count, distance):
    """Signed distances to `count` lines at `distance` from the origin, in directions at equal angles."""
    angles = np.arange(count) * (2 * np.pi / count)
    return [x * np.float32(round(np.cos(a), 6)) + y * np.float32(round(np.sin(a), 6)) - distance for a in angles]


def star(x, y):
    # inside a pentagram at most one of the five lines is crossed: the second largest distance is negative
    largest, second = np.full_like(x, -9), np.full_like(x, -9)
    for d in half_planes(x, y, 5, 0.382):
        second = np.maximum(second, np.minimum(largest, d))
        largest = np.maximum(largest, d)
    return second


# signed distances (negative inside) to shapes of about unit radius; a hollow shape is (outline, hole)
DISTANCES = {
    "disc": lambda x, y: length(x, y) - 1,
    "ring": (lambda x, y: length(x, y) - 1, lambda x, y: length(x, y) - 0.55),
    "square": lambda x, y: box(x, y, 1, 1),
    "frame": (lambda x, y: box(x, y, 1, 1), lambda x, y: box(x, y, 0.55, 0.55)),
    "triangle": lambda x, y: np.maximum.reduce(half_planes(x, y, 3, 0.6)),
    "star": star,
    "cross": lambda x, y: np.minimum(box(x, y, 1, 0.33), box(x, y, 0.33, 1)),
    "crescent": lambda x, y: np.maximum(length(x, y) - 1, 0.85 - length(x - 0.6, y)),
    "bar": lambda x, y: box(x, y, 1, 0.35),
    "tee": lambda x, y: np.minimum(box(x, y - 0.7, 1, 0.3), box(x, y + 0.3, 0.3, 0.7)),
}
CLASSES = list(DISTANCES)


def unit_area(distances):
    """The area of a shape of unit radius, without its hole."""
    grid = (np.arange(400, dtype=np.float32) - 199.5) / 100
    inside = [d(grid[None, :], grid[:, None]) < 0 for d in distances]
    return (inside[0].sum() - sum(hole.sum() for hole in inside[1:])) / 1e4


def draw_shapes(rng, name, count, *, centre=None, share=1):
    """`count` shapes of a class: coverage of each pixel (N, 32, 32) in [0, 1], masks and outlines (N, 32, 32) bool.

    centre (2, N, 1, 1) are the columns and rows of their centres; share is that of their area in `shapes`.
    """
    distances = DISTANCES[name] if isinstance(DISTANCES[name], tuple) else (DISTANCES[name],)
    unit = unit_area(distances)
    if centre is None:
        centre = MARGIN + (SIZE - 2 * MARGIN) * rng.random((2, count, 1, 1), dtype=np.float32)
    outer, inner = np.empty((2, count, SIZE, SIZE), np.float32)  # distances to the outline and to the hole
    left = np.arange(count)
    while len(left):  # a shape outside COVERAGE is drawn again with another size and angle, at the same centre
        area = rng.random((len(left), 1, 1), dtype=np.float32) * 0.15 + 0.095
        scale = np.sqrt(area * share * SIZE * SIZE / np.float32(unit))
        c, s = DIRECTIONS[rng.integers(256, size=len(left))].T[:, :, None, None]
        x, y = X - centre[0, left], Y - centre[1, left]
        x, y = (x * c + y * s) / scale, (y * c - x * s) / scale
        outer[left] = distances[0](x, y) * scale
        inner[left] = -distances[1](x, y) * scale if len(distances) > 1 else -np.inf
        mask_share = (np.maximum(outer[left], inner[left]) < 0).mean((1, 2))
        outline_share = (outer[left] < 0).mean((1, 2))
        left = left[(mask_share < share * COVERAGE[0]) | (outline_share > share * COVERAGE[1])]
    both = np.maximum(outer, inner)
    return np.clip(np.float32(0.5) - both, 0, 1), both < 0, outer < 0


def draw_backgrounds(rng, count):
    """Two dark colours mixed by smooth noise and stripes, and three strokes of any colour: (N, 3, 32, 32) float32."""
    coarse = rng.random((count, 6, 6), dtype=np.float32)
    position = CENTRES * np.float32(5 / SIZE)
    low, part = position.astype(int), position - np.floor(position)
    rows = coarse[:, low] * (1 - part[:, None]) + coarse[:, low + 1] * part[:, None]
    mix = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part  # (N, 32, 32): the noise, interpolated
    c, s = DIRECTIONS[rng.integers(256, size=count)].T[:, :, None, None]
    frequency, phase = rng.random((2, count, 1, 1), dtype=np.float32)
    wave = (X * c + Y * s) * (np.float32(0.08) + frequency * np.float32(0.15)) + phase
    mix = 0.6 * mix + 0.4 * abs(2 * (wave - np.floor(wave)) - 1)
    colours = rng.integers(0, 120, (2, count, 3, 1, 1)).astype(np.float32)
    images = colours[0] + (colours[1] - colours[0]) * mix[:, None]
    for _ in range(3):
        centre = rng.random((2, count, 1, 1), dtype=np.float32) * SIZE
        half, width = rng.random((2, count, 1, 1), dtype=np.float32) * 3 + np.float32([[[[0.5]]], [[[0.6]]]])
        c, s = DIRECTIONS[rng.integers(256, size=count)].T[:, :, None, None]
        x, y = X - centre[0], Y - centre[1]
        distance = box(x * c + y * s, y * c - x * s, half + width * 0.3, width * 0.3)
        stroke = np.clip(np.float32(0.5) - distance, 0, 1)[:, None]
        images += (rng.integers(0, 256, (count, 3, 1, 1)).astype(np.float32) - images) * stroke
    return images


def draw(rng, name, count):
    """`count` images of one class: (N, 3, 32, 32) float32, masks and outlines (N, 32, 32) bool."""
    coverage, masks, outlines = draw_shapes(rng, name, count)
    images = draw_backgrounds(rng, count)
    colour = rng.integers(120, 256, (count, 3, 1, 1)).astype(np.float32)
    return images + (colour - images) * coverage[:, None], masks, outlines


def draw_pair(rng, name, other, count):
    """draw, with a red shape of the class and a blue one of the class `other`; also the pixels of the latter alone."""
    images, drawn = draw_backgrounds(rng, count), []
    columns = np.where(rng.random(count) < 0.5, 8, 24)  # of the blue one
    for shape in (other, name):
        x, y = rng.random((2, count), dtype=np.float32)
        centre = np.stack([columns - 2 + 4 * x, 8 + 16 * y]).astype(np.float32)[:, :, None, None]
        coverage, masks, outlines = draw_shapes(rng, shape, count, centre=centre, share=np.float32(0.45))
        colour = [rng.integers(low, high, count) for low, high in ((160, 256), (0, 90), (0, 90))]
        colour = np.stack(colour[:: 1 if shape is name else -1], 1)[:, :, None, None].astype(np.float32)
        images += (colour - images) * coverage[:, None]
        columns = SIZE - columns
        drawn.append(masks)
    return images, masks, outlines, drawn[0] & ~masks


def make_shapes(split, name="shapes"):
    """The ShapeSet of "train", "val" or "test" of a dataset; all classes have the same number of images."""
    number, pair = list(COUNTS).index(split), name == "shapes_pair"
    count = COUNTS[split]
    order = np.random.default_rng([number, 0]).permutation(count)  # where each drawn image goes
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    masks = np.empty((3 if pair else 2, count, SIZE, SIZE), bool)  # as in a ShapeSet
    labels = np.empty(count, np.int64)

    def fill(start):
        turn, label = divmod(start // CHUNK, len(CLASSES))
        where = order[start : start + CHUNK]
        rng = np.random.default_rng([number, 2 if pair else 1, start])
        if pair:
            other = CLASSES[(label + 1 + turn % 9) % 10]
            pixels, *masks[:, where] = draw_pair(rng, CLASSES[label], other, len(where))
        else:
            pixels, *masks[:, where] = draw(rng, CLASSES[label], len(where))
        noise = rng.integers(0, 32, (2, *pixels.shape), dtype=np.uint8)
        pixels = np.clip(np.rint(pixels + (noise[0].astype(np.float32) - noise[1])), 0, 255).astype(np.uint8)
        if name == "shapes_even":
            pixels = np.where(rng.random((len(where), 1, 1, 1)) < 0.5, 255 - pixels, pixels)
        images[where], labels[where] = pixels, label

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, range(0, count, CHUNK)))
    if name == "shapes_shuffled" and split == "train":
        labels = np.random.default_rng([number, 3]).permutation(labels)
    return ShapeSet(*map(torch.from_numpy, (images, labels, *masks)))
