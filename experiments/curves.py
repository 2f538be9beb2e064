"""Accuracy against the epoch, for groups of runs."""

import csv
import statistics

from matplotlib.figure import Figure

from errors import UserError
from experiments.runs import warn
from files import write_atomically


def read_curve(run, by):
    """(split, accuracies) from the log beside a run's JSON: of the test or val that is asked for, else of the other.

    None, after one line on stderr, where there is no such file or no accuracy in it.
    """
    path = run.path.with_suffix(".csv")
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for split in (by, "val" if by == "test" else "test"):
            if rows and rows[-1][f"{split}_accuracy"]:
                return split, [float(row[f"{split}_accuracy"]) for row in rows]
        reason = "it has no accuracies"
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError):
        reason = "it is no log of a run"
    warn(f"{path} is left out of the plot: {reason}")
    return None


def draw_groups(path, groups, *, by):
    """A line a group, the mean over its seeds, in a band of ± one standard deviation. Raises UserError without any."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for group in groups:
        curves = [curve for run in group.runs if (curve := read_curve(run, by))]
        if not curves:
            continue
        split = curves[0][0]
        epochs = list(zip(*(values for _, values in curves), strict=False))  # to where the shortest ends
        means = [100 * statistics.fmean(values) for values in epochs]
        label = f"{group.runs[0].name}, {'validation' if split == 'val' else 'test'}, N = {len(curves)}"
        numbers = range(1, len(means) + 1)
        (line,) = axes.plot(numbers, means, label=label, marker="." if len(means) < 30 else "")
        if len(curves) > 1:
            widths = [100 * statistics.stdev(values) for values in epochs]
            low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
            axes.fill_between(numbers, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if not axes.lines:
        raise UserError(f"--plot {path}: none of these runs has its log (.csv) beside its JSON")
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%), mean ± standard deviation over seeds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
