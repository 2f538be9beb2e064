"""Measured runs: the JSON files in results/, and groups of those that differ in nothing but the seed."""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from errors import UserError

# every key that is used here and in the files beside this one, with the types that it may have
NEEDED = {
    "script": str,
    "args": dict,
    "params": int,
    "dataset_name": str,
    "data_hash": str,
    "epochs": int,
    "seed": int,
    "test_accuracy": (int, float),
    "val_accuracy": (int, float, type(None)),
    "device": str,
    "seconds": (int, float),
}
# arguments that may differ within a group
FREE_OF_GROUP = ("seed", "device", "minutes", "save_minutes", "save_epochs", "summary")


OTHERS = ("maps", "speed")  # folders of results/ that hold other measurements


class MeasuredRun(NamedTuple):
    """A file of results/: its path, the name of its group (`plan/row`, or a file's stem without -seed-K), the JSON."""

    path: Path
    name: str
    result: dict


class Group(NamedTuple):
    name: str
    runs: list[MeasuredRun]

    def accuracies(self, by):
        """{seed: accuracy} of those runs that have it; `by` is test (the last epoch's, as a fraction) or val."""
        found = {run.result["seed"]: run.result[f"{by}_accuracy"] for run in self.runs}
        return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def read_run(path, folder):
    """The run in a JSON file of the results' folder; None, after one line on stderr, where there is none in it."""
    name = re.sub(r"-seed-\d+$", "", path.relative_to(folder).with_suffix("").as_posix())
    try:
        result = json.loads(path.read_text())
        wrong = [key for key, kind in NEEDED.items() if not isinstance(result[key], kind)]
        if not wrong:
            return MeasuredRun(path, name, result)
        reason = f"{', '.join(wrong)} cannot be that"
    except KeyError as error:
        reason = f"it has no {error.args[0]}"
    except OSError as error:
        reason = error.strerror
    except (ValueError, TypeError):
        reason = "it is no JSON of a run"
    warn(f"{path} is left out: {reason}")
    return None


def read_runs(folder):
    """All runs below a folder but for those of OTHERS, by name and seed. Raises UserError where there is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--results {folder}: there is no such folder")
    paths = [path for path in sorted(folder.rglob("*.json")) if path.relative_to(folder).parts[0] not in OTHERS]
    runs = [run for path in paths if (run := read_run(path, folder))]
    return sorted(runs, key=lambda run: (run.name, run.result["seed"]))


def group_runs(runs):
    """Groups of runs of one name, script, images and arguments but for the seed; a seed counts once in a group."""
    groups = {}
    for run in runs:
        args = {name: value for name, value in run.result["args"].items() if name not in FREE_OF_GROUP}
        what = [run.result[key] for key in ("script", "params", "dataset_name", "data_hash")]
        group = groups.setdefault((run.name, json.dumps([args, what], sort_keys=True)), Group(run.name, []))
        if any(run.result["seed"] == other.result["seed"] for other in group.runs):
            warn(f"{run.path} is left out: seed {run.result['seed']} of {run.name} is there already")
        else:
            group.runs.append(run)
    return list(groups.values())


def find_group(groups, name, folder):
    """The group that a user's name means: its name, the last part of it, or a file of it. Raises UserError."""
    if by_path := [group for group in groups if any(run.path == Path(name) for run in group.runs)]:
        return by_path[0]
    path = Path(name)
    if path.is_relative_to(folder):
        path = path.relative_to(folder)
    key = path.as_posix().removesuffix(".json")
    found = [group for group in groups if group.name == key] or [
        group for group in groups if group.name.endswith(f"/{key}")
    ]
    if not found:
        raise UserError(f"{name}: there is no such run in {folder}; `python compare.py` lists those that there are")
    if len(found) > 1:
        files = ", ".join(str(group.runs[0].path) for group in found)
        raise UserError(f"{name} stands for {len(found)} groups of runs; name a file of one: {files}")
    return found[0]


def summarise(values):
    """(mean, standard deviation, 95 % interval by Student's t) of a list; the latter two are None for one value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None, None
    deviation = statistics.stdev(values)
    half = float(student.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean, deviation, (mean - half, mean + half)
