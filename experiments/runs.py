"""Measured runs: the JSON files in results/, and groups of runs that differ only in the seed."""

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from experiments.scripts import SCRIPTS, all_arguments
from training.archives import read_from_outside
from training.flags import flag_kind
from training.records import read_json

ACCURACIES = ("test_accuracy", "val_accuracy")  # fractions
RESULT_KEYS = {  # the keys of a result that this folder uses, with their types
    **dict.fromkeys(("script", "dataset_name", "data_hash", "device", "precision"), str),
    **dict.fromkeys(("params", "epochs", "seed"), int),
    **dict.fromkeys(ACCURACIES, (int, float, type(None))),
    **{"args": dict, "seconds": (int, float)},
    **dict.fromkeys(("init_from", "device_type"), (str, type(None))),  # older results lack them
    "extra": (dict, type(None)),
}
OTHER_RESULTS = ("faults", "maps", "quality", "speed")  # folders of results/ that hold no runs


class MeasuredRun(NamedTuple):
    """A JSON file of results/: its path, the name of its group (`plan/row`, without -seed-K), and its content."""

    path: Path
    name: str
    result: dict


class Group(NamedTuple):
    name: str
    runs: list[MeasuredRun]
    published: str | None = None  # the accuracy that others report

    @property
    def has_folds(self):
        return any(run.result["args"].get("folds") for run in self.runs)

    def accuracies(self, by):
        """{seed: accuracy as a fraction} of the runs that have it; `by` is "test" (the last epoch's) or "val"."""
        found = {run.result["seed"]: run.result[f"{by}_accuracy"] for run in self.runs}
        return {seed: accuracy for seed, accuracy in found.items() if accuracy is not None}


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def read_run(path, folder):
    """The MeasuredRun in a JSON file below `folder`; None, with a warning on stderr, if the file is not a result.

    Arguments that are newer than it are added (see all_arguments). A result.json is named after its folder.
    """
    name = path.parent if path.name == "result.json" else path.with_suffix("")
    name = re.sub(r"-seed-\d+$", "", name.relative_to(folder).as_posix())
    try:
        result = read_json(path)
        result = {"init_from": None, "device_type": None, "extra": None, **result}
        wrong = [key for key, kind in RESULT_KEYS.items() if not isinstance(result[key], kind)]
        wrong += [key for key in ACCURACIES if not 0 <= (result[key] or 0) <= 1] if not wrong else []
        if not wrong:
            if result["script"] in SCRIPTS:
                # a KeyError: a recipe that no longer exists
                with read_from_outside("its arguments"), contextlib.suppress(KeyError):
                    result["args"] = all_arguments(result["script"], result["args"])
            return MeasuredRun(path, name, result)
        reason = f"{', '.join(wrong)} makes no sense"
    except KeyError as error:
        reason = f"it has no {error.args[0]}"
    except OSError as error:
        reason = error.strerror
    except (ValueError, TypeError):
        reason = "it is not the JSON of a run"
    warn(f"{path} is left out: {reason}")
    return None


def read_runs(folder):
    """All runs below a folder, without OTHER_RESULTS, by name and seed. Raises UserError if there is no folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--results {folder}: there is no such folder")
    paths = [
        path for path in sorted(folder.rglob("*.json")) if not {*path.relative_to(folder).parts} & {*OTHER_RESULTS}
    ]
    runs = [run for path in paths if (run := read_run(path, folder))]
    return sorted(runs, key=lambda run: (run.name, run.result["seed"]))


def group_runs(runs, *, by_name=True):
    """Groups of runs with the same name, script, images, start and arguments except the seed; each seed counts once.

    With by_name=False the names may differ, and the first run's is the group's.
    """
    groups = {}
    for run in runs:
        args = {k: value for k, value in run.result["args"].items() if flag_kind(k) == "run" and k != "seed"}
        what = [run.result[key] for key in ("script", "params", "dataset_name", "data_hash")]
        what += [run.name if by_name else None, re.sub(r"-seed-\d+$", "", run.result.get("init_from") or "")]
        what += [(run.result.get("extra") or {}).get("hash")]
        group = groups.setdefault(json.dumps([args, what], sort_keys=True), Group(run.name, []))
        if same := [other.path for other in group.runs if run.result["seed"] == other.result["seed"]]:
            warn(f"{run.path} is left out: {same[0]} has the same arguments and seed")
        else:
            group.runs.append(run)
    return list(groups.values())


def own_groups(folders):
    """Groups of the runs in folders: those with a result.json in them or one level below. Raises UserError."""
    runs = []
    for folder in folders:
        paths = sorted([*folder.glob("result.json"), *folder.glob("*/result.json")])
        if not paths:
            raise UserError(f"{folder}: there is no result.json in it, nor in a folder in it")
        runs += [run for path in paths if (run := read_run(path, Path(path.anchor)))]
    return group_runs({run.path: run for run in runs}.values(), by_name=False)


def find_group(groups, name, folder):
    """The group that a user names: by its name, the last part of it, or one of its files. Raises UserError."""
    if by_path := [group for group in groups if any(run.path == Path(name) for run in group.runs)]:
        return by_path[0]
    path = Path(name)
    if path.is_relative_to(folder):
        path = path.relative_to(folder)
    key = path.as_posix().removesuffix(".json")
    found = [group for group in groups if group.name == key]
    found = found or [group for group in groups if group.name.endswith(f"/{key}")]
    if not found:
        advice = "`python compare.py` lists the runs"
        raise UserError(f"{name}: there is no such folder, and no such run in {folder}; {advice}")
    if len(found) > 1:
        files = ", ".join(str(group.runs[0].path) for group in found)
        raise UserError(f"{name} matches {len(found)} groups of runs; name a file of one: {files}")
    return found[0]
