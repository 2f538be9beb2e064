"""What there is to do of plans, a training run or a measurement at a time, and how it is done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from experiments.plans import Measurement, Plan, PlanRow, by_name, misfit, run_name
from experiments.runs import read_run
from files import make_folder, write_atomically
from training.device import pick_device


class Job(NamedTuple):
    """One seed of a row, or a measurement, whose seed is None."""

    plan: Plan
    row: PlanRow | Measurement
    seed: int | None = None

    @property
    def name(self):
        return f"{self.plan.name}/{self.row.name}" + ("" if self.seed is None else f", seed {self.seed}")


def wanted_seeds(row, seeds):
    """The seeds of a row: as many as asked for, or as its plan says; none where it is not run."""
    return range(0 if row.not_run else seeds or row.seeds)


def open_jobs(plans, found, args):
    """The Jobs that are open, in the order of the plans, and in a plan all rows with one seed before the next seed.

    found is {plan's name: fitting_runs}, args are those of campaign.py.
    """
    jobs = []
    for plan in plans:
        wanted = {row.name: wanted_seeds(row, args.seeds) for row in plan.rows}
        for seed in range(max(map(len, wanted.values()), default=0)):
            rows = [row for row in plan.rows if seed in wanted[row.name] and seed not in found[plan.name][row.name]]
            jobs += [Job(plan, row, seed) for row in rows]
        measurements = [Job(plan, measurement) for measurement in plan.measurements]
        jobs += [job for job in measurements if not measured_file(job, args).exists()]
    return jobs


def run_folder(job, args):
    return Path(args.out_dir) / job.plan.name / run_name(job.row.name, job.seed)


def is_trained(folder):
    """Whether a finished run's weights are there."""
    return (folder / "result.json").exists() and (folder / "last.pt").exists()


def start_of(job):
    """The Job whose run a job's starts from; None where it starts from scratch."""
    return Job(job.plan, by_name(job.plan.rows, job.row.init_from), job.seed) if job.row.init_from else None


def kept_result(job, row, args):
    """Where the result of a row is kept, for a job's seed."""
    return Path(args.results) / job.plan.name / f"{run_name(row.name, job.seed)}.json"


def run_command(command, deadline=None):
    """The exit code of a command. A signal that asks to stop is passed on, and raised when the command has ended.

    At the deadline (of time.monotonic()) the command is stopped; then the exit code is None. The command has a session
    of its own: otherwise Ctrl-C would reach it twice, and the second time ends it without saving.
    """
    process, received = subprocess.Popen(command, start_new_session=True), []

    def pass_on(signum, frame):
        received.append(signum)
        if os.name == "posix":  # on Windows Ctrl-C reaches it by itself
            process.send_signal(signal.SIGTERM)

    stops = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {stop: signal.signal(stop, pass_on) for stop in stops if signal.getsignal(stop) != signal.SIG_IGN}
    late = False
    try:
        while process.poll() is None:
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if not late and os.name == "posix" and deadline is not None and time.monotonic() > deadline:
                    late = True
                    process.send_signal(signal.SIGTERM)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if received:
        interrupt = KeyboardInterrupt()
        interrupt.exit_code = 128 + received[0]
        raise interrupt
    return None if late else process.returncode


def do_run(job, args, deadline):
    """Train one seed of a row, or go on with it; (exit code, the run in results/, None where it is not finished).

    The run that it starts from is trained before, where its checkpoint is not there; but not where results of other
    rows have started from it: they would be compared as if from one trunk. That is said, with exit code 2.
    """
    out_dir, folder, start = Path(args.out_dir) / job.plan.name, run_folder(job, args), start_of(job)
    if start and not is_trained(run_folder(start, args)):
        others = [row for row in job.plan.rows if row.init_from == start.row.name and row != job.row]
        if others := [path for row in others if (path := kept_result(job, row, args)).exists()]:
            where = f"the weights of {start.name}, that are not in {run_folder(start, args)} any more"
            print(f"{others[0]} started from {where}: {job.name}, has to start from the same", file=sys.stderr)
            return 2, None
        code, run = do_run(start, args, deadline)
        if not run:
            return code, None
    minutes = max(1e-4, (deadline - time.monotonic()) / 60) if deadline else None
    finished = folder / "result.json"
    gone = finished.exists() and not (folder / "last.pt").exists()
    stale = finished.exists() and (old := read_run(finished, out_dir)) and misfit(job.row, old.result)
    command = [sys.executable, job.row.script]
    ours = {"--device": args.device, "--data-dir": args.data_dir, "--minutes": minutes}
    for flag, value in (ours | {"--init-from": start and run_folder(start, args)}).items():
        command += [flag, str(value)] if value else []
    command += [*job.row.arguments, "--seed", str(job.seed), "--out-dir", str(out_dir), "--run-name", folder.name]
    code = run_command([*command, *(["--overwrite"] if stale or gone else ["--resume", "auto"])])
    if code or not finished.exists():
        return code or 0, None
    target = kept_result(job, job.row, args)
    make_folder(target.parent)
    write_atomically(target.with_suffix(".csv"), lambda file: file.write((folder / "log.csv").read_bytes()))
    write_atomically(target, lambda file: file.write(finished.read_bytes()))
    return code, read_run(target, Path(args.results))


def measured_file(job, args):
    """Where a measurement is kept; that of a speed has the kind of device in its name."""
    kind = "" if job.row.checkpoint else f"-{pick_device(args.device).type}"
    return Path(args.results) / job.plan.name / f"{job.row.name}{kind}.json"


def checkpoint_folder(job, args):
    """Of the run that a measurement is of: the first seed of PLAN/ROW."""
    plan, _, name = job.row.checkpoint.partition("/")
    return Path(args.out_dir) / plan / run_name(name, 0)


def do_measurement(job, args, deadline):
    """Measure it; (exit code, whether it is done). What needs a run that is not here is said, and stays open, as does
    what is not done at the deadline."""
    target, row = measured_file(job, args), job.row
    make_folder(target.parent)
    places = {"--device": args.device, "--data-dir": None if row.script == "benchmarks.augment" else args.data_dir}
    if not row.checkpoint:
        command, written = [sys.executable, "-m", row.script, "--out", str(target)], target
    else:
        folder = checkpoint_folder(job, args)
        if not is_trained(folder):
            print(f"{job.name} waits for {folder}, which is not there or not finished")
            return 0, False
        command, written = [sys.executable, row.script, str(folder), "--evaluate"], folder / "maps" / "evaluation.json"
    for flag, value in places.items():
        command += [flag, str(value)] if value else []
    code = run_command([*command, *row.arguments], deadline)
    if code == 0 and written != target:
        write_atomically(target, lambda file: file.write(written.read_bytes()))
    return code or 0, code == 0


def do_job(job, args, deadline):
    """(exit code, the run in results/, True for a measurement that is done, or None or False)."""
    return do_measurement(job, args, deadline) if job.seed is None else do_run(job, args, deadline)
