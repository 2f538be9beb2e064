"""Statistics over seeds: intervals, exact tests of a difference, the correction for several tests, verdicts."""

import itertools
import math
import statistics
import warnings
from typing import NamedTuple

import numpy as np
from scipy.stats import nct, norm, permutation_test, ttest_ind
from scipy.stats import t as student

LEVEL = 0.05
MOST_PERMUTATIONS = 10**6  # exact up to 11 seeds against 11; with more seeds, a random sample of this size


class Comparison(NamedTuple):
    """A difference of means over seeds, with its 95 % interval."""

    difference: float
    interval: tuple[float, float] | None
    floor: float  # the smallest p that this number of seeds can give
    p_value: float | None  # None if the seeds are too few for a test
    paired: bool = False
    enough: int | None = None  # seeds_to_see half a point


def summarise(values):
    """(mean, standard deviation, 95 % interval by Student's t) of a list; the last two are None for a single value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None, None
    deviation = statistics.stdev(values)
    half = float(student.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean, deviation, (mean - half, mean + half)


def welch_interval(a, b):
    """95 % interval of mean(a) - mean(b) with unequal variances (Welch 1947); None if a or b is a single value."""
    if min(len(a), len(b)) < 2:
        return None
    if len(set(a)) == len(set(b)) == 1:  # no variance at all
        return a[0] - b[0], a[0] - b[0]
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # equal values in one of the groups
        low, high = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return float(low), float(high)


def compare_accuracies(accuracies, base, *, paired):
    """A Comparison of {seed: accuracy} with that of the baseline; None if there are no values to compare.

    The permutation test is exact and two-sided. Unpaired, it permutes the values over the two groups. Paired, it
    changes the signs of the differences per seed, of the seeds that both have.
    """
    if paired:
        seeds = sorted(accuracies.keys() & base)
        accuracies, base = ({seed: one[seed] for seed in seeds} for one in (accuracies, base))
    a, b = list(accuracies.values()), list(base.values())
    if not a or not b:
        return None
    if paired:
        difference, deviation, interval = summarise([x - y for x, y in zip(a, b, strict=True)])
    else:
        difference, interval = statistics.fmean(a) - statistics.fmean(b), welch_interval(a, b)
        deviation = math.hypot(statistics.stdev(a), statistics.stdev(b)) if interval else None
    floor = smallest_p(len(a), len(b), paired)
    testable = floor <= LEVEL and min(len(a), len(b)) > 1
    p_value = permutation_p(a, b, paired) if testable else None
    enough = None if deviation is None else seeds_to_see(HALF_POINT, deviation, paired)
    return Comparison(difference, interval, floor, p_value, paired, enough)


HALF_POINT, POWER = 0.005, 0.8


def seeds_to_see(difference, deviation, paired):
    """The smallest number of seeds per row with which a t test at 5 % shows a true difference in 80 of 100 cases.

    deviation is that of one seed's difference: measured if paired, else of the difference of two single runs.
    """
    known = norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER)  # if the deviation were known, (known * deviation / difference)^2
    for count in itertools.count(max(2, math.floor((known * deviation / difference) ** 2))):
        freedom = count - 1 if paired else 2 * count - 2
        shift = difference * math.sqrt(count) / max(deviation, 1e-12)
        if shift > 30 or nct.sf(student.ppf(1 - LEVEL / 2, freedom), freedom, shift) >= POWER:
            return count


def smallest_p(seeds, base_seeds, paired):
    """The smallest p that the exact tests of compare_accuracies can give."""
    if paired:
        return 2.0 ** (1 - seeds)  # two of the 2^n sign changes are as extreme as any difference can be
    return min(1.0, 2 / math.comb(seeds + base_seeds, seeds))  # two of the ways to choose the first group


def enough_seeds(paired, comparisons):
    """The smallest number of seeds per row that can give a verdict in a table of so many comparisons."""
    return next(n for n in itertools.count(2) if comparisons * smallest_p(n, n, paired) <= LEVEL)


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
    """The p values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    # the smallest p is multiplied by n, the next by n - 1 ...; none becomes smaller than the one before
    scaled = [min(1.0, (len(order) - rank) * p_values[index]) for rank, index in enumerate(order)]
    corrected = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [corrected[index] for index in range(len(order))]


def verdicts(comparisons):
    """One line per Comparison of a table: better, worse, no difference shown, or none and why.

    Comparisons with too few seeds to reach LEVEL are not tested and do not count in Holm's correction.
    """
    tested = [comparison for comparison in comparisons if comparison.p_value is not None]
    p_values = dict(zip(tested, holm([comparison.p_value for comparison in tested]), strict=True))
    floors = dict(zip(tested, holm([comparison.floor for comparison in tested]), strict=True))
    lines = []
    for comparison in comparisons:
        p_value, floor = p_values.get(comparison), floors.get(comparison, comparison.floor)
        if p_value is None or floor > LEVEL:
            enough = enough_seeds(comparison.paired, len(comparisons))
            lines.append(f"none, N is too small: p cannot go below {floor:.3g}; {enough} seeds per row would do")
        elif p_value > LEVEL:
            lines.append(f"no difference shown, p = {p_value:.2g}")
        else:
            lines.append(f"{'better' if comparison.difference > 0 else 'worse'}, p = {p_value:.2g}")
    return lines
