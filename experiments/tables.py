"""Groups of runs as text: aligned for the terminal, Markdown for README.md."""

import statistics

from experiments.runs import summarise
from experiments.significance import compare_accuracies, verdicts

MINUTES = "minutes a run"  # on a GPU; a CPU says nothing with its name alone


def aligned(rows):
    """Lists of strings, the first of them the heads, as lines with aligned columns: numbers right, the rest left."""
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        numbers = all(cell[:1] in "0123456789+-" for cell in cells[1:])
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def markdown(rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def percent(value):
    return f"{100 * value:.2f}"


def interval_text(interval, form="{:.2f}"):
    """A pair of fractions in per cent; - where it is None."""
    return "-" if interval is None else " to ".join(form.format(100 * end) for end in interval)


def spread(values):
    """What runs of a group have in common, or from where to where they go."""
    values = sorted(set(values))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}-{values[-1]:,}"


def group_cells(group, by):
    """The cells of a group in every table, by their heads."""
    values = list(group.accuracies(by).values())
    results = [run.result for run in group.runs]
    cells = dict.fromkeys(("dataset", "epochs", "parameters", f"{by} accuracy", "95 % interval", "N", MINUTES), "-")
    cells["device"] = "-"
    if results:
        cells["dataset"] = results[0]["dataset_name"]
        cells["epochs"] = spread(result["epochs"] for result in results)
        cells["parameters"] = spread(result["params"] for result in results)
        cells["device"] = ", ".join(sorted({result["device"] for result in results}))
        if len({result["device"] for result in results}) == 1 and results[0].get("device_type") == "cuda":
            cells[MINUTES] = f"{statistics.fmean(result['seconds'] for result in results) / 60:.1f}"
    if values:
        mean, deviation, interval = summarise(values)
        cells[f"{by} accuracy"] = percent(mean) + (f" ± {percent(deviation)} %" if len(values) > 1 else " %")
        cells["95 % interval"] = interval_text(interval)
        cells["N"] = str(len(values))
    elif not results:
        cells[f"{by} accuracy"] = "not yet measured"
    return {"name": group.name, **cells}


def groups_table(groups, *, by="test", layout=aligned):
    """One line a group: what was run, mean ± standard deviation over seeds, its 95 % interval, N, on a GPU its time."""
    rows = [group_cells(group, by) for group in groups]
    if all(cells[MINUTES] == "-" for cells in rows):
        for cells in rows:
            del cells[MINUTES]
    return layout([list(rows[0]), *(list(cells.values()) for cells in rows)])


def comparison_table(pairs, *, by="test"):
    """groups_table of pairs (group, the baseline that it is held against, or None), and below it their differences."""
    text = groups_table([group for group, _, _ in pairs], by=by)
    names, comparisons = [], []
    for group, base, paired in pairs:
        comparison = base and compare_accuracies(group.accuracies(by), base.accuracies(by), paired=paired)
        if not comparison:
            continue
        datasets = {run.result["dataset_name"] for run in group.runs + base.runs}
        if len(datasets) > 1:
            text += f"\n{group.name} and {base.name} are not compared: {' and '.join(sorted(datasets))}"
            continue
        names.append((f"{group.name} - {base.name}", "paired" if paired else "unpaired"))
        comparisons.append(comparison)
    if not comparisons:
        return text
    rows = [["difference", "seeds", "points", "95 % interval", "verdict"]]
    for name, comparison, verdict in zip(names, comparisons, verdicts(comparisons), strict=True):
        difference = f"{100 * comparison.difference:+.2f}"
        rows.append([*name, difference, interval_text(comparison.interval, "{:+.2f}"), verdict])
    text += "\n\n" + aligned(rows)
    if tested := sum(comparison.p_value is not None for comparison in comparisons):
        correction = f", corrected for {tested} comparisons (Holm)" if tested > 1 else ""
        text += f"\np: two-sided permutation test over seeds, exact up to a million permutations{correction}"
    return text
