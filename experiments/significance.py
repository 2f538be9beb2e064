"""Is the difference between two groups of runs more than luck? Exact tests over seeds, corrected for their number."""

import itertools
import math
import statistics
from typing import NamedTuple

import numpy as np
from scipy.stats import permutation_test
from scipy.stats import t as student

from experiments.runs import summarise

LEVEL = 0.05
MOST_PERMUTATIONS = 10**6  # exact up to 11 seeds against 11, beyond that so many are drawn


class Comparison(NamedTuple):
    """`floor` is the smallest p that so many seeds can give, `p_value` None where they are too few for a test."""

    difference: float
    interval: tuple[float, float] | None
    floor: float
    p_value: float | None


def welch_interval(a, b):
    """95 % interval of mean(a) - mean(b), with unequal variances (Welch 1947); None where one has a single value."""
    if min(len(a), len(b)) < 2:
        return None
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    difference, total = statistics.fmean(a) - statistics.fmean(b), sum(parts)
    if total == 0:
        return difference, difference
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    half = float(student.ppf(0.975, freedom)) * total**0.5
    return difference - half, difference + half


def compare_accuracies(accuracies, base, *, paired):
    """A Comparison of {seed: accuracy} with that of the baseline; None where there is nothing to compare.

    Exact and two-sided: over all ways to deal the values out to two groups, or, paired, over all signs of the
    differences of the seeds that both have.
    """
    if paired:
        accuracies, base = (
            {seed: one[seed] for seed in sorted(accuracies.keys() & base)} for one in (accuracies, base)
        )
    a, b = list(accuracies.values()), list(base.values())
    if not a or not b:
        return None
    if paired:
        difference, _, interval = summarise([x - y for x, y in zip(a, b, strict=True)])
        floor = 2.0 ** (1 - len(a))
    else:
        difference, interval = statistics.fmean(a) - statistics.fmean(b), welch_interval(a, b)
        floor = min(1.0, 2 / math.comb(len(a) + len(b), len(a)))
    testable = floor <= LEVEL and min(len(a), len(b)) > 1
    return Comparison(difference, interval, floor, permutation_p(a, b, paired) if testable else None)


def permutation_p(a, b, paired):
    test = permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        permutation_type="samples" if paired else "independent",
        n_resamples=MOST_PERMUTATIONS,
        batch=10_000,
        rng=0,
    )
    return float(test.pvalue)


def holm(p_values):
    """The p values of one table, corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    scaled = [min(1.0, (len(order) - rank) * p_values[index]) for rank, index in enumerate(order)]
    corrected = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [corrected[index] for index in range(len(order))]


def verdicts(comparisons):
    """A line for each Comparison of one table: better, worse, no difference shown, or none and why.

    Those with seeds too few for any outcome to reach LEVEL are not tested, and Holm's correction does not count them.
    """
    tested = [comparison for comparison in comparisons if comparison.p_value is not None]
    p_values = iter(holm([comparison.p_value for comparison in tested]))
    floors = iter(holm([comparison.floor for comparison in tested]))
    lines = []
    for comparison in comparisons:
        was_tested = comparison.p_value is not None
        p_value, floor = (next(p_values), next(floors)) if was_tested else (None, comparison.floor)
        if not was_tested or floor > LEVEL:
            lines.append(f"none, N is too small: p cannot go below {floor:.3g}")
        elif p_value > LEVEL:
            lines.append(f"no difference shown, p = {p_value:.2g}")
        else:
            lines.append(f"{'better' if comparison.difference > 0 else 'worse'}, p = {p_value:.2g}")
    return lines
