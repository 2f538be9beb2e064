"""The results of benchmarks/ as Markdown."""

import statistics
from pathlib import Path

from errors import UserError
from experiments.tables import markdown
from training.records import read_json


def ratio_rows(tables):
    """How many times as fast as each of the others our ways are, by the medians of the rounds: one row per other way.

    tables is {what: {way: images per second in each round}}. Ours are the first way and those whose name begins with
    its name, such as "ours in float32".
    """
    medians = {what: {way: statistics.median(rounds) for way, rounds in ways.items()} for what, ways in tables.items()}
    ours = list(dict.fromkeys(way for ways in tables.values() for way in ways if way.startswith(next(iter(ways)))))
    rows = [["what", "against", *(f"times as fast: {way}" for way in ours)]]
    for what, ways in medians.items():
        for peer in (way for way in ways if way not in ours):
            ratios = [f"{ways[way] / ways[peer]:.1f}" if way in ways else "-" for way in ours]
            rows.append([what, peer, *ratios])
    return rows


def cost_rows(results):
    """Each way's share of the machine's peak in matrix products, its time for data, and its peak memory."""
    rows = [["what", "way", "GFLOP per image", "share of peak", "data and augmentation", "peak memory (MiB)"]]
    for what, peaks in results["peak_bytes"].items():
        for way, peak_bytes in peaks.items():
            dtype, share = results["share_of_peak"][what].get(way, (None, None))
            peak = f"{100 * share:.0f} % in {dtype}" if dtype else "-"
            work = f"{results['gflop_per_image'][what]:.2f}" if dtype else "-"
            data = f"{100 * results['data_share'][what]:.1f} %" if way == "ours" else "-"
            rows.append([what, way, work, peak, data, f"{peak_bytes / 2**20:,.0f}"])
    return rows


def fault_rows(faults):
    """How often each fault was tried, and the largest of each thing that was measured then."""
    rows = [["what happens", "times", "measured, at most"]]
    for what, found in faults.items():
        measured = ", ".join(f"{name} {value:g}" for name, value in found.items() if name != "times")
        rows.append([what, f"{found['times']:,}", measured])
    return rows


def speed_text(path):
    """The machine and the tables of a benchmark's JSON file. Raises UserError if the file is something else."""
    path = Path(path)
    if not path.exists():
        return f"Not measured yet: `{path.stem}`."
    try:
        results = read_json(path)
        text = f"{results['device']}, {results['threads']} CPU threads, torch {results['torch']}"
        if "faults" in results:
            return f"{text}, {results['seconds'] / 60:.0f} minutes:\n\n{markdown(fault_rows(results['faults']))}"
        if peaks := results.get("peak_gflops"):
            text += "; matrix product: " + ", ".join(f"{peak:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
        text += f":\n\n{markdown(ratio_rows(results['images_per_second']))}"
        if "peak_bytes" in results:
            text += f"\n\n{markdown(cost_rows(results))}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was not written by a benchmark ({type(error).__name__}: {error})") from error
    return text
