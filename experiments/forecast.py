"""How long runs should take."""

import csv
import statistics

from experiments.jobs import is_trained, run_folder, start_of
from experiments.plans import script_module
from training.device import device_name, pick_device


def epochs_of(row):
    """How many epochs a row asks for, or its recipe."""
    return row.given.get("epochs") or script_module(row.script).chosen_recipe(row.given)[1]["epochs"]


class Forecast:
    """minutes(job) is what is left of a run's time: by its own epochs but the first, or else by finished runs of its
    row on such a device; None where there are neither. What it starts from is counted where that is not there.
    """

    def __init__(self, found, args):
        self.found, self.args = found, args
        self.device = device_name(pick_device(args.device))

    def minutes(self, job):
        if job.seed is None:
            return None
        start = start_of(job)
        before = 0.0
        if start and not is_trained(run_folder(start, self.args)):
            before = self.minutes(start)
        own = self.by_own_epochs(job)
        own = self.by_finished_runs(job) if own is None else own
        return None if own is None or before is None else before + own

    def by_own_epochs(self, job):
        log = run_folder(job, self.args) / "log.csv"
        if not log.exists():
            return None
        with open(log, newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        if len(seconds) < 2:  # the first epoch has compiled the model
            return None
        return statistics.median(seconds[1:]) * (epochs_of(job.row) - len(seconds)) / 60

    def by_finished_runs(self, job):
        results = [run.result for run in self.found[job.plan.name][job.row.name].values()]
        seconds = [result["seconds"] for result in results if result["device"] == self.device]
        return statistics.fmean(seconds) / 60 if seconds else None
