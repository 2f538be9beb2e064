"""Engines: a plan's runs on a cluster, by submitit (SLURM) or Ray. campaign.py remains the ledger."""

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time

from errors import UserError, import_optional
from experiments.jobs import do_job, open_lock, run_folder, start_of
from experiments.scripts import is_locked, project_path
from training.interrupt import StopRequests

TRIES = 50  # how often a run is resumed after a time limit, a preemption or the death of its machine


def key_values(text):
    """A flag's type: "key=value key=value" as a dict, with numbers where they are numbers."""
    words = shlex.split(text)
    if wrong := [word for word in words if "=" not in word]:
        raise argparse.ArgumentTypeError(f"must be key=value, as num_gpus=1, not {wrong[0]}")
    options = dict(word.split("=", 1) for word in words)
    return {key: json.loads(value) if value.replace(".", "").isdecimal() else value for key, value in options.items()}


def do_on_worker(job, args, folder):
    """do_job on a worker, which sees the files of `folder`, where campaign.py runs, under the same path."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray stops a task by it; ignored if nohup started Ray
    return do_job(job, args, math.inf)


# An engine is a function of a folder for its own files and of its options. It returns submit(arguments of do_on_worker,
# one tuple per job), which returns futures, and cancel(future), which asks a run to save and end.


class RequeuedJob:
    """do_on_worker as submitit runs it: a job that runs out of time or is preempted saves, and is requeued."""

    def __call__(self, *arguments):
        try:
            return do_on_worker(*arguments)
        except KeyboardInterrupt:
            time.sleep(2)  # before a preemption, SLURM may send SIGTERM first
            sys.exit("stopped")

    def checkpoint(self, *arguments):
        """Called at submitit's signal, before it puts the job back into the queue and exits."""
        signal.raise_signal(signal.SIGTERM)  # which run_command passes on to the training
        with contextlib.suppress(ChildProcessError):
            os.wait()  # until it has saved
        return import_optional("submitit").helpers.DelayedSubmission(self, *arguments)


def submitit_engine(folder, options):
    """Job arrays of SLURM; the options are those of submitit's update_parameters, or cluster=local: this machine."""
    submitit = import_optional("submitit")
    cluster = options.pop("cluster", "slurm")
    executor = submitit.AutoExecutor(folder, cluster, **{f"{cluster}_max_num_timeout": TRIES})
    executor.update_parameters(**{"timeout_min": 60} | options)
    print(f"the output of the runs is in {folder}")

    def submit(calls):
        with submitit.helpers.environment_variables(PYTHONPATH=project_path(), PYTHONSAFEPATH=1):
            try:
                return executor.map_array(RequeuedJob(), *zip(*calls, strict=True))
            except submitit.core.utils.FailedJobError as error:
                raise UserError(f"--engine submitit: {' '.join(str(error).split())}") from error

    return submit, lambda job: job.cancel(check=False)


def ray_engine(folder, options):
    """A task per run, on the cluster of RAY_ADDRESS or else this machine; the options are those of Ray's tasks."""
    ray = import_optional("ray")
    ray.init(ignore_reinit_error=True)
    # a GPU per run if there are any, and a run's share of its machine's cores: Ray's default is one thread
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]]
    gpus = options.setdefault("num_gpus", int(any("GPU" in machine for machine in machines)))
    runs = [(machine["CPU"], machine.get("GPU", 0) // gpus if gpus else 1) for machine in machines]
    cores = options.setdefault("num_cpus", max(1, min((cpus // count for cpus, count in runs if count), default=1)))
    print(f"each run takes {gpus:g} GPUs and {cores:g} CPU cores", flush=True)
    options = {"max_retries": TRIES, "runtime_env": {"env_vars": {"PYTHONPATH": project_path()}}} | options
    task = ray.remote(do_on_worker).options(**options)

    def submit(calls):
        return [task.remote(*arguments).future() for arguments in calls]

    return submit, lambda future: ray.cancel(future.object_ref)


ENGINES = {"submitit": submitit_engine, "ray": ray_engine}


def do_jobs_on_cluster(jobs, found, args, again, *, deadline):
    """do_jobs of campaign.py on a cluster: returns the names of the jobs that failed, and adds results to found.

    A run waits for the one that it starts from. Ctrl-C and the deadline let the runs save and end.
    """
    waiting, running, failed = [job for job in jobs if job.seed is not None], {}, []
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} measurements are left to a campaign without --engine")
    try:
        submit, cancel = ENGINES[args.engine](os.path.join(args.out_dir, args.engine), dict(args.engine_options))
    except (AssertionError, ConnectionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--engine {args.engine}: {' '.join(str(error).split())}") from error
    with StopRequests() as stop:
        while (waiting or running) and not stop.wanted() and time.monotonic() < deadline:
            unfinished = [*waiting, *running.values()]
            if ready := [job for job in waiting if start_of(job) not in unfinished]:
                waiting = [job for job in waiting if job not in ready]
                running |= zip(submit([(job, args, os.getcwd()) for job in ready]), ready, strict=True)
            for future in [future for future in running if future.done()]:
                job, error = running.pop(future), future.exception()
                if error:
                    print(error, file=sys.stderr)
                code, result = (1, None) if error else future.result()
                if result:
                    found[job.plan.name][job.row.name][job.seed] = result
                else:
                    failed.append(job.name)
                said = "done" if result else f"failed, exit code {code}"
                print(f"--- {said}: {job.name}; runs to do: {len(waiting) + len(running)}", flush=True)
            time.sleep(1)
        for future in running:
            cancel(future)
        for job in running.values():
            with open_lock(run_folder(job, args)) as lock:  # a run holds it until it has saved
                while is_locked(lock):
                    time.sleep(0.1)
        if waiting or running:
            print(f"stopped, {len(waiting) + len(running)} runs are missing; to resume: {again}")
        stop.end()
    return failed
