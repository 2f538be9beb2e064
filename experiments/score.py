"""Accuracy for its price in parameters, on CIFAR-100: the score of the CCT report, here and as published."""

import statistics
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from experiments.tables import aligned, percent
from files import write_atomically

BEST_OF_FOUR = "Hassani et al. 2021, best of 4 runs, head of 10 classes"


class PublishedPoint(NamedTuple):
    name: str
    accuracy: float
    params: int
    source: str


# Accuracies of CCT: the table in github.com/SHI-Labs/Compact-Transformers (200 epochs). Parameters as published,
# to the last one: without the positional embedding for CCT-6/3x1, with it for the other two.
PUBLISHED = (
    PublishedPoint("CondenseNet-86", 0.7636, 520_000, "Huang et al. 2018, table in their repository"),
    PublishedPoint("CCT-6/3x1", 0.7671, 3_168_267, BEST_OF_FOUR),
    PublishedPoint("CCT-7/3x1", 0.7705, 3_760_139, BEST_OF_FOUR),
    PublishedPoint("CCT-6/3x1, report", 0.75145, 3_191_397, "CCT report, its own run, without the embedding"),
    PublishedPoint("CCT-4/3x2", 0.7046, 482_123, BEST_OF_FOUR),
)
ISO_SCORES = (50, 100, 200, 400, 800, 1600)


def parameter_score(accuracy, params):
    """(accuracy in per cent - 70) / millions of parameters * 100: the CCT report's score for CIFAR-100."""
    return (100 * accuracy - 70) / (params / 1e6) * 100


def scored_groups(groups):
    """(group, mean test accuracy, parameters) of the groups on CIFAR-100, the best score first."""
    scored = [
        (group, statistics.fmean(group.accuracies("test").values()), group.runs[0].result["params"])
        for group in groups
        if group.runs[0].result["dataset_name"] == "cifar100"
    ]
    return sorted(scored, key=lambda entry: -parameter_score(*entry[1:]))


def score_table(groups):
    """Scores of all trainable parameters and of those without a learnable positional embedding; then the published."""
    rows = [["name", "test accuracy", "N", "parameters", "score", "without embedding", "score", "source"]]
    for group, accuracy, params in scored_groups(groups):
        fewer = group.runs[0].result.get("params_without_embedding")
        beside = [f"{fewer:,}", f"{parameter_score(accuracy, fewer):.0f}"] if fewer else ["-", "-"]
        score = f"{parameter_score(accuracy, params):.0f}"
        rows.append([group.name, f"{percent(accuracy)} %", str(len(group.runs)), f"{params:,}", score, *beside, "here"])
    for point in PUBLISHED:
        score = f"{parameter_score(point.accuracy, point.params):.0f}"
        accuracy = f"{percent(point.accuracy)} %"
        rows.append([point.name, accuracy, "-", f"{point.params:,}", score, "-", "-", point.source])
    return aligned(rows)


def draw_scores(path, groups):
    """Accuracy against parameters, our runs and the published ones, on lines of equal score."""
    ours = [(params, 100 * accuracy, group.name) for group, accuracy, params in scored_groups(groups)]
    theirs = sorted((point.params, 100 * point.accuracy, point.name) for point in PUBLISHED)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for points, label, marker in ((ours, "measured here", "o"), (theirs, "published", "^")):
        axes.scatter(
            [point[0] for point in points], [point[1] for point in points], marker=marker, label=label, zorder=3
        )
    for params, accuracy, name in ours:
        axes.annotate(name, (params, accuracy), (0, 6), textcoords="offset points", fontsize=8, ha="center")
    for params, accuracy, name in theirs:
        offset, side = ((7, -3), "left") if params == theirs[-1][0] else ((-7, -3), "right")
        axes.annotate(name, (params, accuracy), offset, textcoords="offset points", fontsize=8, ha=side)
    axes.set_xscale("log")
    axes.margins(x=0.3, y=0.1)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    params = np.geomspace(left, right, 200)
    for score in ISO_SCORES:
        accuracies = 70 + score * params / 1e8
        axes.plot(params, accuracies, color="grey", linewidth=0.6, linestyle=":")
        end = np.flatnonzero(accuracies < top - 0.03 * (top - bottom))[-1]  # room for its label
        axes.annotate(f"score {score}", (params[end], accuracies[end]), ha="right", va="bottom", fontsize=7)
    axes.set(
        xlim=(left, right), ylim=(bottom, top), xlabel="trainable parameters", ylabel="CIFAR-100 test accuracy (%)"
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    axes.xaxis.set_minor_formatter("")
    axes.legend(loc="lower right")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
