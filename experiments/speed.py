"""What benchmarks/ has written down, as Markdown."""

import json
import statistics
from pathlib import Path

from errors import UserError
from experiments.tables import markdown


def ratio_rows(tables):
    """How many times as fast as the others our ways are, by the medians of the rounds: a row for each of the others.

    tables is {what: {way: images a second in each round}}. The first way is ours, and so is one whose name goes on
    from its name, "ours in float32".
    """
    medians = {job: {way: statistics.median(rounds) for way, rounds in ways.items()} for job, ways in tables.items()}
    ours = list(dict.fromkeys(way for ways in tables.values() for way in ways if way.startswith(next(iter(ways)))))
    rows = [["what", "against", *(f"times as fast: {way}" for way in ours)]]
    for job, ways in medians.items():
        for peer in (way for way in ways if way not in ours):
            ratios = [f"{ways[way] / ways[peer]:.1f}" if way in ways else "-" for way in ours]
            rows.append([job, peer, *ratios])
    return rows


def cost_rows(results):
    """What our training steps make of the machine: the share of its matrix product, and the memory beside others'."""
    rows = [["what", "way", "GFLOP per image", "of the peak", "data and augmentation", "MiB at most"]]
    for job, peaks in results["peak_bytes"].items():
        for way, held in peaks.items():
            dtype, share = results["share_of_peak"][job].get(way, (None, None))
            peak = f"{100 * share:.0f} % in {dtype}" if dtype else "-"
            work = f"{results['gflop_per_image'][job]:.2f}" if dtype else "-"
            data = f"{100 * results['data_share'][job]:.1f} %" if way == "ours" else "-"
            rows.append([job, way, work, peak, data, f"{held / 2**20:,.0f}"])
    return rows


def speed_text(path):
    """The tables of a file of a benchmark, below the machine that it was measured on. Raises UserError."""
    if not Path(path).exists():
        return f"`{Path(path).stem}`: not yet measured"
    try:
        results = json.loads(Path(path).read_text())
        text = f"{results['device']}, {results['threads']} CPU threads, torch {results['torch']}"
        if peaks := results.get("peak_gflops"):
            text += "; matrix product: " + ", ".join(f"{peak:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
        text += f":\n\n{markdown(ratio_rows(results['images_per_second']))}"
        if "peak_bytes" in results:
            text += f"\n\n{markdown(cost_rows(results))}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} was not written by a benchmark ({type(error).__name__}: {error})") from error
    return text
