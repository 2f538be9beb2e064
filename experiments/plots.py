"""Figures of compare.py: accuracy per epoch of groups of runs, and accuracy against parameters."""

import csv
import io
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from errors import UserError
from experiments.runs import warn
from experiments.tables import PUBLISHED, scored_groups
from files import write_atomically
from training.records import read_text

ISO_SCORES = (50, 100, 200, 400, 800, 1600)


def read_curve(run, by):
    """(split, accuracies per epoch) from the log beside a run's JSON: of the split `by`, else of the other one.

    None, with a warning on stderr, if there is no such file or it has no accuracies.
    """
    path = run.path.with_name("log.csv") if run.path.name == "result.json" else run.path.with_suffix(".csv")
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        for split in (by, "val" if by == "test" else "test"):
            if rows and rows[-1][f"{split}_accuracy"]:
                return split, [float(row[f"{split}_accuracy"]) for row in rows]
        reason = "it has no accuracies"
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError, csv.Error):
        reason = "it is not the log of a run"
    warn(f"{path} is left out of the plot: {reason}")
    return None


def draw_groups(path, groups, *, by):
    """One line per group, the mean over seeds with a band of ± one standard deviation. Raises UserError without any."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for group in groups:
        curves = [curve for run in group.runs if (curve := read_curve(run, by))]
        if not curves:
            continue
        split = curves[0][0]
        epochs = list(zip(*(values for _, values in curves), strict=False))  # up to the end of the shortest curve
        means = np.array([100 * statistics.fmean(values) for values in epochs])
        label = f"{group.runs[0].name}, {'validation' if split == 'val' else 'test'}, N = {len(curves)}"
        numbers = range(1, len(means) + 1)
        (line,) = axes.plot(numbers, means, label=label, marker="." if len(means) < 30 else "")
        if len(curves) > 1:
            widths = np.array([100 * statistics.stdev(values) for values in epochs])
            band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
            axes.fill_between(numbers, means - widths, means + widths, **band)
    if not axes.lines:
        raise UserError(f"--plot {path}: none of these runs has its log (.csv) beside its JSON")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%), mean ± standard deviation over seeds")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(path)


def draw_scores(path, groups):
    """Accuracy against parameters of our runs and the published ones, with lines of equal score."""
    ours = [(params, 100 * accuracy, group.name) for group, accuracy, params in scored_groups(groups)]
    shown = sorted((point for point in PUBLISHED if point.accuracy > 0.7), key=lambda point: point.accuracy)
    published = [(point.params, 100 * point.accuracy, point.name) for point in shown]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for points, label, marker in ((ours, "measured here", "o"), (published, "published", "^")):
        x, y = [params for params, _, _ in points], [accuracy for _, accuracy, _ in points]
        axes.scatter(x, y, marker=marker, label=label, zorder=3)
    for params, accuracy, name in ours:
        axes.annotate(name, (params, accuracy), (0, 6), textcoords="offset points", fontsize=8, ha="center")
    for index, (params, accuracy, name) in enumerate(published):  # in turn left and right, so that they do not overlap
        offset, side = ((7, -3), "left") if index % 2 else ((-7, -3), "right")
        axes.annotate(name, (params, accuracy), offset, textcoords="offset points", fontsize=8, ha=side)
    axes.set_xscale("log")
    axes.margins(x=0.3, y=0.1)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    params = np.geomspace(left, right, 200)
    for score in ISO_SCORES:
        accuracies = 70 + score * params / 1e8  # parameter_score solved for the accuracy
        axes.plot(params, accuracies, color="grey", linewidth=0.6, linestyle=":")
        end = np.flatnonzero(accuracies < top - 0.03 * (top - bottom))[-1]  # room for its label
        axes.annotate(f"score {score}", (params[end], accuracies[end]), ha="right", va="bottom", fontsize=7)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set(xlabel="trainable parameters", ylabel="CIFAR-100 test accuracy (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} M"))
    axes.xaxis.set_minor_formatter("")
    axes.legend(loc="lower right")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
    print(path)
