"""Methods ranked over the evaluations of several checkpoints: compare.py --maps."""

import json
import math
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from errors import UserError, aligned

MEASURES = ("average_precision", "saco", "deletion", "insertion", "rank_correlation", "pointing_redrawn")
NOTE = "* finds the object with redrawn weights, too: it shows the image, not what the model has learnt"


def learnt_nothing(table):
    """The methods that point at the object more often than the centre does (by two standard errors), although the
    weights are redrawn: they show the image, and not what the model has learnt."""
    chance = table.get("centred gaussian", {}).get("pointing", (1, 0))[0]
    found = {name: row["pointing_redrawn"] for name, row in table.items() if "pointing_redrawn" in row}
    return [name for name, (mean, error) in found.items() if mean - 2 * error > chance]


def read_evaluations(names):
    """{(model, dataset): records of evaluate_checkpoint, one per seed} of files, runs' folders or folders of files.

    Raises UserError if there are none, if they were not ranked by the same measure, or if those of one model and
    dataset are not of the same images.
    """
    paths = []
    for path in map(Path, names):
        own = path / "maps" / "evaluation.json"
        paths += [path] if path.is_file() else [own] if own.exists() else sorted(path.glob("*.json"))
    groups = {}
    for path in paths:
        try:
            record = json.loads(path.read_text())
            key = record["model"], record["dataset_name"]
            images = record["ranked_by"], record["split"], len(next(iter(record["values"].values())))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is no evaluation.json of rollout.py or attribute.py --evaluate") from error
        groups.setdefault(key, []).append(record | {"same": images})
    if not groups:
        raise UserError(f"--maps: there is no evaluation in {', '.join(map(str, names))}")
    for (model, dataset), records in groups.items():
        if len({record["same"] for record in records}) > 1:
            raise UserError(f"--maps: the evaluations of {model} on {dataset} are not of the same images")
    if len({record["ranked_by"] for records in groups.values() for record in records}) > 1:
        raise UserError(
            "--maps: some evaluations are ranked by pointing, those without masks by saco; compare one kind"
        )
    return groups


def mean_and_intervals(arrays):
    """(mean, half of its 95 % interval over images, over seeds, p of a mean of 0) of (seeds, images) arrays.

    Each array counts the same. p is that of a t test in which images and seeds vary, with Satterthwaite's degrees of
    freedom; the last two are None without two seeds each.
    """
    mean, enough = np.mean([array.mean() for array in arrays]), min(map(len, arrays)) > 1
    terms = {"images": [], "seeds": [], "both": []}  # (variance of the mean, its degrees of freedom) of each array
    for array in arrays:
        seeds, images = array.shape
        rest = array - array.mean(0) - array.mean(1, keepdims=True) + array.mean()
        terms["images"].append((array.mean(0).var(ddof=1) / images, images - 1))
        if enough:
            freedom = (seeds - 1) * (images - 1)
            terms["seeds"].append((array.mean(1).var(ddof=1) / seeds, seeds - 1))
            terms["both"].append(((rest**2).sum() / freedom / array.size, freedom))  # is in each of the other two

    def half(terms):
        variance = sum(v for v, _ in terms)
        return student.ppf(0.975, freedom_of(variance, terms)) * math.sqrt(variance) / len(arrays)

    halves = half(terms["images"]), half(terms["seeds"]) if enough else None
    if not enough:
        return mean, *halves, None
    of_images, of_seeds, of_both = (sum(v for v, _ in terms[key]) for key in terms)
    variance = max(of_images + of_seeds - of_both, of_images, of_seeds)
    if not variance:
        return mean, *halves, float(mean == 0)
    freedom = freedom_of(variance, sum(terms.values(), []))
    return mean, *halves, 2 * student.sf(abs(mean) * len(arrays) / math.sqrt(variance), freedom)


def freedom_of(variance, terms):
    """Satterthwaite's degrees of freedom of a variance that is a sum of terms (variance, degrees of freedom)."""
    spread = sum(v**2 / freedom for v, freedom in terms)
    return variance**2 / spread if spread else 1


def ranking_text(names, layout=aligned):
    """Two tables: the methods that all evaluations have, the best first, and their score for each model and dataset."""
    groups = read_evaluations(names)
    records = [record for group in groups.values() for record in group]
    common = [name for name in records[0]["values"] if all(name in record["values"] for record in records)]
    arrays = {name: [np.array([r["values"][name] for r in group]) for group in groups.values()] for name in common}
    found = {name: mean_and_intervals(arrays[name]) for name in common}
    order = sorted(common, key=lambda name: -found[name][0])
    stars = {
        name for group in groups.values() for name in order if all(name in learnt_nothing(r["scores"]) for r in group)
    }
    shown = [m for m in MEASURES if any(m in r["scores"][name] for r in records for name in order)]
    rows = [["", records[0]["ranked_by"], "± images", "± seeds", "above the next", "p", *shown]]
    by_group = [[records[0]["ranked_by"], *(f"{model}, {dataset}" for model, dataset in groups)]]
    for name, following in zip(order, [*order[1:], None], strict=True):
        mean, *halves, _ = found[name]
        cells = [f"{mean:.3f}", *("-" if half is None else f"{half:.3f}" for half in halves), "-", "-"]
        if following:
            pairs = [a - b for a, b in zip(arrays[name], arrays[following], strict=True)]
            difference, *_, p_value = mean_and_intervals(pairs)
            cells[3:] = f"{difference:.3f}", "-" if p_value is None else f"{p_value:.2g}"
        for measure in shown:
            means = [[r["scores"][name].get(measure, [math.nan])[0] for r in group] for group in groups.values()]
            cells.append(f"{np.mean([np.mean(group) for group in means]):.3f}".replace("nan", "-"))
        rows.append([name + " *" * (name in stars), *cells])
        by_group.append([name, *(f"{array.mean():.3f}" for array in arrays[name])])
    return "\n\n".join([layout(rows), *[NOTE] * bool(stars), layout(by_group)])
