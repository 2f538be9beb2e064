"""Methods ranked over the evaluations of several checkpoints: compare.py --maps."""

import math
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from errors import UserError, aligned
from maps.randomise import NOTE, learnt_nothing
from training.checkpoint import is_of_kind
from training.records import read_json

NUMBERS = list[float | int]
RECORD_KINDS = {  # what an evaluation.json must hold
    **dict.fromkeys(("model", "dataset_name", "ranked_by", "split"), str),
    **{"images": object, "values": dict[str, NUMBERS], "scores": dict[str, dict[str, NUMBERS]]},
}
MEASURES = ("average_precision", "saco", "deletion", "insertion", "rank_correlation", "pointing_redrawn")


def read_evaluations(names):
    """{(model, dataset): records of evaluate_checkpoint, one per seed} of files, runs' folders or folders of files.

    Raises UserError if there are none, if they were not ranked by the same measure, or if those of one model and
    dataset are not of the same images.
    """
    groups, images = {}, {}
    for path in map(Path, names):
        own = path / "maps" / "evaluation.json"
        for file in [path] if path.is_file() else [own] if own.exists() else sorted(path.glob("*.json")):
            try:
                record = read_json(file)
                lengths = {len(values) for values in record["values"].values()}
                rows = {name: record["scores"][name].values() for name in record["values"]}
                whole = all(is_of_kind(record[name], kind) for name, kind in RECORD_KINDS.items())
                if not whole or len(lengths) > 1 or not all(map(all, rows.values())):
                    raise ValueError
                key = record["model"], record["dataset_name"]
                same = record["ranked_by"], record["split"], record["images"], *lengths
                groups.setdefault(key, []).append(record)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{file} is no evaluation.json of rollout.py or attribute.py --evaluate") from error
            if images.setdefault(key, same) != same:
                raise UserError(f"--maps: the evaluations of {' on '.join(key)} are not of the same images")
    if not groups:
        raise UserError("--maps: name runs with an evaluation, or folders of such files")
    if len({measure for measure, *_ in images.values()}) > 1:
        raise UserError("--maps: pointing ranks methods where there are masks, saco elsewhere; compare one kind")
    return groups


def mean_and_intervals(arrays):
    """(mean, half of its 95 % interval over images, over seeds, p of a mean of 0) of (seeds, images) arrays.

    Each array counts the same. p is that of a t test in which images and seeds vary, with Satterthwaite's degrees of
    freedom; the last two are None without two seeds each.
    """
    mean = np.mean([array.mean() for array in arrays])
    # the variance of each array's mean, with its degrees of freedom
    over_images = [(array.mean(0).var(ddof=1) / array.shape[1], array.shape[1] - 1) for array in arrays]
    if min(map(len, arrays)) < 2:
        return mean, half_interval(over_images), None, None
    over_seeds = [(array.mean(1).var(ddof=1) / len(array), len(array) - 1) for array in arrays]
    both = []  # what neither explains: it is in each of the two
    for array in arrays:
        rest = array - array.mean(0) - array.mean(1, keepdims=True) + array.mean()
        freedom = (array.shape[0] - 1) * (array.shape[1] - 1)
        both.append(((rest**2).sum() / freedom / array.size, freedom))
    sums = [sum(v for v, _ in terms) for terms in (over_images, over_seeds, both)]
    variance = max(sums[0] + sums[1] - sums[2], sums[0], sums[1])
    t = len(arrays) * abs(mean) / math.sqrt(variance) if variance else math.inf
    p_value = 2 * student.sf(t, freedom_of(variance, over_images + over_seeds + both)) if mean else 1.0
    return mean, half_interval(over_images), half_interval(over_seeds), p_value


def half_interval(terms):
    """Half of the 95 % interval of the mean of means with these variances and degrees of freedom."""
    variance = sum(v for v, _ in terms)
    return student.ppf(0.975, freedom_of(variance, terms)) * math.sqrt(variance) / len(terms)


def freedom_of(variance, terms):
    """Satterthwaite's degrees of freedom of a variance made of terms (variance, degrees of freedom)."""
    spread = sum(v**2 / freedom for v, freedom in terms)
    return variance**2 / spread if spread else 1


def ranking_text(names, layout=aligned):
    """Two tables: the methods that all evaluations have, the best first, and their score for each model and dataset."""
    groups = read_evaluations(names)
    records = [record for group in groups.values() for record in group]
    common = [name for name in records[0]["values"] if all(name in record["values"] for record in records)]
    if not common:
        raise UserError("--maps: these evaluations have no method in common")
    arrays = {name: [np.array([r["values"][name] for r in group]) for group in groups.values()] for name in common}
    found = {name: mean_and_intervals(arrays[name]) for name in common}
    order = sorted(common, key=lambda name: -found[name][0])
    stars = {
        name for group in groups.values() for name in order if all(name in learnt_nothing(r["scores"]) for r in group)
    }

    def mean_of(name, measure):
        means = [
            [r["scores"][name][measure][0] for r in group if measure in r["scores"][name]] for group in groups.values()
        ]
        return f"{np.mean([np.mean(group) for group in means]):.3f}" if all(means) else "-"

    measured = [measure for measure in MEASURES if any(mean_of(name, measure) != "-" for name in order)]
    ranked_by = records[0]["ranked_by"]
    rows = [["", ranked_by, "± images", "± seeds", "above the next", "p", *measured]]
    by_group = [[ranked_by, *map(", ".join, groups)]]
    for name, following in zip(order, [*order[1:], None], strict=True):
        differences = [a - b for a, b in zip(arrays[name], arrays[following], strict=True)] if following else None
        difference, _, _, p_value = mean_and_intervals(differences) if following else [None] * 4
        numbers = [*found[name][:3], difference]
        cells = ["-" if number is None else f"{number:.3f}" for number in numbers]
        cells += ["-" if p_value is None else f"{p_value:.2g}", *(mean_of(name, measure) for measure in measured)]
        rows.append([name + " *" * (name in stars), *cells])
        by_group.append([name, *(f"{array.mean():.3f}" for array in arrays[name])])
    return "\n\n".join([layout(rows), *[NOTE] * bool(stars), layout(by_group)])
