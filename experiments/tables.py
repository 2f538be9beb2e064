"""Groups of runs as text: aligned for the terminal, or Markdown."""

import statistics
from typing import NamedTuple

from errors import aligned
from experiments.statistics import compare_accuracies, summarise, verdicts

REPORTED = "published"  # what others report; columns that no row of a table fills are left out
PRECISIONS = {"off": "float32", "tf32": "TF32", "bf16": "bfloat16", "fp16": "float16"}
MINUTES = "minutes per run"  # on a GPU; a CPU's name alone does not tell how many cores there were


def markdown(rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def percent(value):
    return f"{100 * value:.2f}"


def interval_text(interval, form="{:.2f}"):
    """A pair of fractions in per cent; "-" for None."""
    return "-" if interval is None else " to ".join(form.format(100 * end) for end in interval)


def spread(values):
    """The one value that all runs of a group have, or the smallest and the largest."""
    values = sorted(set(values))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}-{values[-1]:,}"


def group_cells(group, by):
    """The cells of a group in every table, by their headings."""
    values = list(group.accuracies(by).values())
    results = [run.result for run in group.runs]
    headings = ("dataset", "epochs", "parameters", f"{by} accuracy", "95 % interval", "N", REPORTED, MINUTES)
    cells = dict.fromkeys([*headings, "device"], "-")
    cells[REPORTED] = group.published or "-"
    if results:
        cells["dataset"] = results[0]["dataset_name"]
        cells["epochs"] = spread(result["epochs"] for result in results)
        cells["parameters"] = spread(result["params"] for result in results)
        kinds = {f"{result['device']}, {PRECISIONS.get(p := result['precision'], p)}" for result in results}
        cells["device"] = " and ".join(sorted(kinds))
        if len({result["device"] for result in results}) == 1 and results[0].get("device_type") == "cuda":
            cells[MINUTES] = f"{statistics.fmean(result['seconds'] for result in results) / 60:.1f}"
    if values:
        mean, deviation, interval = summarise(values)
        cells[f"{by} accuracy"] = percent(mean) + (f" ± {percent(deviation)} %" if len(values) > 1 else " %")
        cells["95 % interval"] = interval_text(None if group.has_folds else interval)
        cells["N"] = str(len(values))
    elif not results:
        cells[f"{by} accuracy"] = "not measured yet"
    return {"name": group.name, **cells}


def groups_table(groups, *, by="test", layout=aligned):
    """One line per group: what was run, mean ± standard deviation over seeds, 95 % interval, N, minutes on a GPU."""
    rows = [group_cells(group, by) for group in groups]
    for optional in (REPORTED, MINUTES):
        if all(cells[optional] == "-" for cells in rows):
            for cells in rows:
                del cells[optional]
    return layout([list(rows[0]), *(list(cells.values()) for cells in rows)])


def comparison_table(pairs, *, by="test", layout=aligned):
    """groups_table, and below it each group's difference from its baseline.

    pairs are (group, baseline or None, whether seeds are paired).
    """
    text = groups_table([group for group, _, _ in pairs], by=by, layout=layout)
    names, comparisons = [], []
    for group, base, paired in pairs:
        comparison = base and compare_accuracies(group.accuracies(by), base.accuracies(by), paired=paired)
        if not comparison:
            continue
        datasets = {run.result["dataset_name"] for run in group.runs + base.runs}
        if len(datasets) > 1:
            text += f"\n{group.name} and {base.name} are not compared: {' and '.join(sorted(datasets))}"
            continue
        if group.has_folds or base.has_folds:
            difference = f"{100 * comparison.difference:+.2f} points"
            text += f"\n{group.name} - {base.name}: {difference}, without p: folds share their training images"
            continue
        names.append((f"{group.name} - {base.name}", "paired" if paired else "unpaired"))
        comparisons.append(comparison)
    if not comparisons:
        return text
    rows = [["difference", "seeds", "points", "95 % interval", "seeds for half a point", "verdict"]]
    for name, comparison, verdict in zip(names, comparisons, verdicts(comparisons), strict=True):
        difference = f"{100 * comparison.difference:+.2f}"
        interval = interval_text(comparison.interval, "{:+.2f}")
        rows.append([*name, difference, interval, str(comparison.enough or "-"), verdict])
    text += "\n\n" + layout(rows)
    if tested := sum(comparison.p_value is not None for comparison in comparisons):
        correction = f", corrected for {tested} comparisons (Holm)" if tested > 1 else ""
        text += f"\n\np: two-sided permutation test over seeds, exact up to a million permutations{correction}"
    return text


# The CCT report's score for CIFAR-100: accuracy for its cost in parameters

BEST_OF_FOUR = "Hassani et al. 2021, best of 4 runs, head of 10 classes"


class PublishedPoint(NamedTuple):
    name: str
    accuracy: float
    params: int
    source: str


# CVT and CCT: the table in github.com/SHI-Labs/Compact-Transformers (200 epochs), with parameters as published: without
# the positional embedding for CCT-6/3x1, with it for the others. MicroNet's accuracy is that of 36 % of its weights.
# The report's ViT-L and second ViT-B are missing: we have no source for their accuracies.
PUBLISHED = (
    PublishedPoint("MicroNet", 0.8003, 470_776, "OSI AI 2019, their repository, weights before pruning"),
    PublishedPoint("ZenNet-0.5M", 0.799, 500_000, "Lin et al. 2021, table in their repository"),
    PublishedPoint("CondenseNet-86", 0.7636, 520_000, "Huang et al. 2018, table in their repository"),
    PublishedPoint("HCGNet-A1", 0.8187, 1_100_000, "Yang et al. 2020, table in their repository"),
    PublishedPoint("CCT-6/3x1", 0.7671, 3_168_267, BEST_OF_FOUR),
    PublishedPoint("CCT-7/3x1", 0.7705, 3_760_139, BEST_OF_FOUR),
    PublishedPoint("CCT-6/3x1, report", 0.75145, 3_191_397, "CCT report, its own run, without the embedding"),
    PublishedPoint("CCT-6/3x2", 0.7447, 3_326_923, BEST_OF_FOUR),
    PublishedPoint("CCT-7/3x2", 0.7492, 3_853_259, BEST_OF_FOUR),
    PublishedPoint("CCT-4/3x2", 0.7046, 482_123, BEST_OF_FOUR),
    PublishedPoint("CVT-7/4", 0.7301, 3_716_619, BEST_OF_FOUR),
    PublishedPoint("CVT-6/4", 0.7225, 3_190_283, BEST_OF_FOUR),
    PublishedPoint("ViT-B/16, report", 0.81, 85_875_556, "CCT report, pretrained; parameters as counted here"),
    PublishedPoint("CCT-2/3x2", 0.669, 283_723, BEST_OF_FOUR),
    PublishedPoint("ViT, report", 0.50, 1_560_000, "CCT report, 8 layers of width 64"),
)


def parameter_score(accuracy, params):
    """(accuracy in per cent - 70) / millions of parameters * 100."""
    return (100 * accuracy - 70) / (params / 1e6) * 100


def scored_groups(groups):
    """(group, mean test accuracy, parameters) of the groups on CIFAR-100, the best score first."""
    scored = [
        (group, statistics.fmean(group.accuracies("test").values()), group.runs[0].result["params"])
        for group in groups
        if group.runs[0].result["dataset_name"] == "cifar100" and group.accuracies("test")
    ]
    return sorted(scored, key=lambda entry: -parameter_score(*entry[1:]))


def score_cells(accuracy, params):
    return [f"{params:,}", f"{parameter_score(accuracy, params):.0f}"] if params else ["-", "-"]


def score_table(groups):
    """Our scores, with all trainable parameters and without a learnable positional embedding; then the published."""
    rows = [["name", "test accuracy", "N", "parameters", "score", "without embedding", "score", "source"]]
    for group, accuracy, params in scored_groups(groups):
        without = group.runs[0].result.get("params_without_embedding")
        cells = [*score_cells(accuracy, params), *score_cells(accuracy, without)]
        rows.append([group.name, f"{percent(accuracy)} %", str(len(group.runs)), *cells, "here"])
    for name, accuracy, params, source in PUBLISHED:
        rows.append([name, f"{percent(accuracy)} %", "-", *score_cells(accuracy, params), "-", "-", source])
    return aligned(rows)
