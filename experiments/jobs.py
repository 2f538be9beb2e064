"""Jobs: the training runs and measurements of plans that are missing, how long they take, and how they are done."""

import csv
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from experiments.plans import Measurement, Plan, PlanRow, by_name, misfit, run_name
from experiments.runs import read_run
from experiments.scripts import all_arguments, is_locked, run_command
from files import make_folder, write_atomically
from training.device import device_name, pick_device


class Job(NamedTuple):
    """One seed of a row, or a measurement, which has no seed."""

    plan: Plan
    row: PlanRow | Measurement
    seed: int | None = None

    @property
    def name(self):
        return f"{self.plan.name}/{self.row.name}" + ("" if self.seed is None else f", seed {self.seed}")


def wanted_seeds(row, seeds):
    """The seeds of a row: `seeds` of them, by default as many as the plan says; none if the row is not run."""
    return range(0 if row.not_run else seeds or row.seeds)


def missing_jobs(plans, found, args):
    """The Jobs without a result: plan by plan, and all rows with one seed before the next seed.

    found is {plan's name: {row's name: {seed: run}}}, args are those of campaign.py.
    """
    jobs = []
    for plan in plans:
        wanted = {row.name: wanted_seeds(row, args.seeds) for row in plan.rows}
        for seed in range(max(map(len, wanted.values()), default=0)):
            rows = [row for row in plan.rows if seed in wanted[row.name] and seed not in found[plan.name][row.name]]
            jobs += [Job(plan, row, seed) for row in rows]
        measurements = [Job(plan, measurement) for measurement in plan.measurements]
        jobs += [job for job in measurements if not measurement_file(job, args).exists()]
    return jobs


def run_folder(job, args):
    return Path(args.out_dir) / job.plan.name / run_name(job.row.name, job.seed)


def is_trained(folder):
    """Whether a run is finished and its weights are still there."""
    return (folder / "result.json").exists() and (folder / "last.pt").exists()


def is_replaced(job, folder):
    """Whether a finished run is trained again from the start: its weights are gone, or it does not fit its row."""
    if not is_trained(folder):
        return (folder / "result.json").exists()
    old = read_run(folder / "result.json", folder.parent)
    return bool(old and misfit(job.row, old.result))


def start_of(job):
    """The Job of the run whose weights a job starts from; None if it starts from scratch."""
    return Job(job.plan, by_name(job.plan.rows, job.row.init_from), job.seed) if job.row.init_from else None


def result_file(job, args):
    return Path(args.results) / job.plan.name / f"{run_name(job.row.name, job.seed)}.json"


def measurement_file(job, args):
    """The file of a measurement's result; for a benchmark, its name includes the type of device."""
    device_type = "" if job.row.checkpoint else f"-{pick_device(args.device).type}"
    return Path(args.results) / job.plan.name / f"{job.row.name}{device_type}.json"


def measured_folder(job, args):
    """The folder of the run that is measured: seed 0 of `checkpoint`, PLAN/ROW."""
    plan, _, name = job.row.checkpoint.partition("/")
    return Path(args.out_dir) / plan / run_name(name, 0)


# How long jobs take


def expected_minutes(job, found, args):
    """The minutes until a run is finished, including the run that it starts from; None if that is not known.

    They follow from the run's own epochs, without the first one, which includes compilation; or else from finished
    runs of the same row on the same device. found is as in missing_jobs.
    """
    if job.seed is None:
        return None
    start, before = start_of(job), 0.0
    if start and not is_trained(run_folder(start, args)):
        before = expected_minutes(start, found, args)
    folder = run_folder(job, args)
    own = None if is_replaced(job, folder) else minutes_by_log(job, folder)
    if own is None:
        device = device_name(pick_device(args.device))
        results = [run.result for run in found[job.plan.name][job.row.name].values()]
        seconds = [result["seconds"] for result in results if result["device"] == device]
        own = statistics.fmean(seconds) / 60 if seconds else None
    return None if own is None or before is None else before + own


def log_rows(folder):
    """The rows of a run's log.csv, {column: text}; none before its first epoch has ended."""
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def minutes_by_log(job, folder):
    seconds = [float(row["seconds"]) for row in log_rows(folder)]
    if len(seconds) < 2:
        return None
    epochs = all_arguments(job.row.script, job.row.given)["epochs"]
    return statistics.median(seconds[1:]) * (epochs - len(seconds)) / 60


# Doing them


def flags_of(values):
    """{flag: value} as a list of arguments, without those that are None."""
    return [part for flag, value in values.items() if value is not None for part in (flag, str(value))]


def run_flags(job, args, deadline, weights=None):
    """The arguments of a job's run: its row's, and its seed, its folder, its minutes and the weights it starts from."""
    folder = run_folder(job, args)
    minutes = None if deadline == math.inf else max(1e-4, (deadline - time.monotonic()) / 60)
    command = flags_of({"--device": args.device, "--data-dir": args.data_dir, "--minutes": minutes})
    command += [*flags_of({"--init-from": weights}), *job.row.arguments]
    return command + flags_of({"--seed": job.seed, "--out-dir": folder.parent, "--run-name": folder.name})


def open_lock(folder):
    """The file whose lock (see is_locked) a run holds while it is trained."""
    make_folder(folder.parent)
    return open(folder.with_name(f".{folder.name}.lock"), "w")


def do_run(job, args, deadline):
    """Train one seed of a row, or resume it. Returns (exit code, its MeasuredRun in results/, or None if unfinished).

    If the checkpoint that it starts from is missing, that run is trained first. But if results of other rows started
    from the missing checkpoint, the exit code is 2: the rows would be compared as if they shared one trunk.
    """
    folder, start, weights = run_folder(job, args), start_of(job), None
    if start:
        weights = run_folder(start, args)
        if not is_trained(weights):
            siblings = [row for row in job.plan.rows if row.init_from == start.row.name and row != job.row]
            files = [result_file(job._replace(row=row), args) for row in siblings]
            if existing := [file for file in files if file.exists()]:
                common = f"the weights that {existing[0]} started from, those of {start.name}"
                print(f"{job.name} must start from {common}, but they are no longer in {weights}", file=sys.stderr)
                return 2, None
            code, run = do_run(start, args, deadline)
            if not run:
                return code, None
    finished = folder / "result.json"
    command = run_flags(job, args, deadline, weights)
    with open_lock(folder) as lock:
        while (busy := is_locked(lock)) and args.engine:  # a run that lost its worker, or another row's trunk
            time.sleep(1)
        if busy:
            print(f"{job.name} is still trained in {folder}, by another campaign or a killed one's", file=sys.stderr)
            return 2, None
        command += ["--overwrite"] if is_replaced(job, folder) else ["--resume", "auto"]
        code = run_command(job.row.script, command, lock=lock, stop_once=bool(args.engine))
    if code or not finished.exists():
        return code or 0, None
    target = result_file(job, args)
    make_folder(target.parent)
    write_atomically(target.with_suffix(".csv"), lambda file: file.write((folder / "log.csv").read_bytes()))
    write_atomically(target, lambda file: file.write(finished.read_bytes()))
    return code, read_run(target, Path(args.results))


def do_measurement(job, args, deadline):
    """Do a measurement. Returns (exit code, whether it is done).

    It is not done if the deadline stops it, or if the run that it measures is not finished.
    """
    target, row = measurement_file(job, args), job.row
    make_folder(target.parent)
    if not row.checkpoint:
        command, written = ["--out", str(target)], target
    else:
        folder = measured_folder(job, args)
        if not is_trained(folder):
            print(f"{job.name} needs the run in {folder}, which is missing or not finished")
            return 0, False
        command, written = [str(folder), "--evaluate"], folder / "maps" / "evaluation.json"
    data_dir = None if row.script == "benchmarks.augment" else args.data_dir  # it needs no images
    command += flags_of({"--device": args.device, "--data-dir": data_dir})
    code = run_command(row.script, [*command, *row.arguments], deadline)
    if code == 0 and written != target:
        write_atomically(target, lambda file: file.write(written.read_bytes()))
    return code or 0, code == 0


def do_job(job, args, deadline):
    """(exit code, result): the MeasuredRun of a training run, True for a measurement; None or False if not done."""
    return do_measurement(job, args, deadline) if job.seed is None else do_run(job, args, deadline)
