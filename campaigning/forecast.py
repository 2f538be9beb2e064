"""How long runs should take, and which of them to do in the time that is left."""

import csv
import importlib
import statistics
import time

from campaigning.jobs import is_trained, run_folder, start_of
from training.device import device_name, pick_device


def epochs_of(row):
    """How many epochs a row asks for, or its recipe."""
    return (
        row.given.get("epochs")
        or importlib.import_module(row.script.removesuffix(".py")).chosen_recipe(row.given)[1]["epochs"]
    )


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

    def next_job(self, jobs, minutes_left):
        """The first job that fits into the minutes, or of unknown time; where there is none, the first."""
        expected = {job.name: self.minutes(job) for job in jobs}
        fitting = [job for job in jobs if expected[job.name] is None or expected[job.name] <= minutes_left]
        return (fitting or jobs)[0]


class Leaving:
    """Says, asked again and again by run_command, whether to leave a job for a shorter one; `left` is what it said.

    Decided once, when the time that it needs is known by its first epochs: it is left where it does not fit into the
    time until the deadline, and another of the jobs is known to do.
    """

    def __init__(self, forecast, job, jobs, deadline):
        self.forecast, self.job, self.deadline = forecast, job, deadline
        self.others = [other for other in jobs if other is not job]
        self.decided, self.left = deadline is None or forecast.minutes(job) is not None, False

    def __call__(self):
        if self.decided or (needed := self.forecast.minutes(self.job)) is None:
            return False
        self.decided = True
        left = (self.deadline - time.monotonic()) / 60
        times = {other.name: self.forecast.minutes(other) for other in self.others}
        shorter = [name for name, minutes in times.items() if minutes is not None and minutes <= left]
        if needed > left and shorter:
            said = f"{self.job.name} needs {needed:.1f} minutes more, {left:.1f} are left"
            print(f"{said}: {shorter[0]} first", flush=True)
            self.left = True
        return self.left
