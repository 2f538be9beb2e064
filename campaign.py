"""Do the runs of a plan that results/ does not have yet, and print the plan's table.

    python campaign.py plans/cct2-cifar10.toml --minutes 50    stops cleanly; the same command resumes
    python campaign.py plans/*.toml --list                     which results exist, and which are missing
    python campaign.py mine.toml --tune "lr=1e-4..1e-2"        search the best values of flags, with Optuna

A plan is a TOML file: a title, rows, the number of seeds per row, and the row that the others are compared with.

    title = "ViT on CIFAR-10, with and without dropout"
    baseline = "report"        # or, in a row, against = "report"; optional
    seeds = 3                  # a row may have its own; the default is 1
    paired = true              # compare seed by seed; optional (see docs/experiments.md)

    [[rows]]
    name = "report"
    script = "train_vit.py"
    arguments = "--epochs 5"   # or a list of strings

All rows are run with seed 0 before any is run with seed 1. A row with init_from = "another row" starts from the weights
of the other row's run with the same seed. A row with not_run = "reason" is listed, but not run; published = "89.17" is
an accuracy that others report. [[measurements]] are benchmarks, or rollout.py with checkpoint = "plan/row".
"""

import math
import shlex
import sys
import time

from errors import UserError, aligned, command_line, run_script
from experiments.dry import dry_run
from experiments.engines import ENGINES, do_jobs_on_cluster, key_values
from experiments.jobs import Job, do_job, expected_minutes, measurement_file, missing_jobs, wanted_seeds
from experiments.plans import fitting_runs, plan_pairs, read_plan
from experiments.runs import read_runs
from experiments.tables import comparison_table
from experiments.tuning import tune_plan
from files import make_folder
from training.flags import Parser
from training.values import at_least, positive


def campaign_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("plans", nargs="+", metavar="PLAN", help="TOML files; their runs are done in this order")
    add("--list", action="store_true", help="show which results exist and which are missing, and stop")
    add("--dry", action="store_true", help="try each row for one epoch of a few images, and keep nothing")
    add("--seeds", type=at_least(1), metavar="N", help="run seeds 0 to N-1 of each row (default: as in the plan)")
    add("--tune", metavar="RANGES", help='search values of a row, as in "lr=1e-4..1e-2 opt=adamw,muon" (Optuna)')
    add("--trials", type=at_least(1), metavar="N", default=20, help="number of values that --tune tries")
    add("--minutes", type=positive, metavar="M", help="save and stop after M minutes, say before Colab ends")
    add("--engine", choices=ENGINES, help="do the runs on a cluster: submitit for SLURM, or ray")
    add("--engine-options", type=key_values, default={}, metavar="TEXT", help="what a run needs, say 'num_gpus=1'")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first available)")
    add("--data-dir", metavar="DIR", help="where the images are, or are downloaded to (default: datasets)")
    add("--out-dir", metavar="DIR", default="checkpoints", help="runs are written to DIR/PLAN")
    add("--results", metavar="DIR", default="results", help="results are kept in DIR/PLAN")
    return parser


def state_table(plan, found, args):
    """What --list prints: the seeds of each row with and without results, and the minutes that the latter need.

    found is {plan's name: {row's name: {seed: run}}}.
    """
    rows = [["row", "done", "missing", "minutes", "command"]]
    for row in plan.rows:
        existing = found[plan.name][row.name]
        missing = [seed for seed in wanted_seeds(row, args.seeds) if seed not in existing]
        minutes = [expected_minutes(Job(plan, row, seed), found, args) for seed in missing]
        known = f"{sum(minutes):.1f}" if missing and None not in minutes else "-"
        done, missing = (" ".join(map(str, sorted(seeds))) or "none" for seeds in (existing, missing))
        rows.append([row.name, done, missing, known, row.not_run or shlex.join([row.script, *row.arguments])])
    for row in plan.measurements:
        done, missing = ("1", "none") if measurement_file(Job(plan, row), args).exists() else ("none", "1")
        command = shlex.join([row.script, *filter(None, [row.checkpoint]), *row.arguments])
        rows.append([row.name, done, missing, "-", command])
    return aligned(rows)


def do_jobs(jobs, found, args, again, *, deadline):
    """Do the jobs until the deadline (a value of time.monotonic()), and add their results to found.

    again is the command that resumes. Returns the names of the jobs that failed.
    """
    failed, done = [], 0
    for number, job in enumerate(jobs, 1):
        code, result = 0, None
        if time.monotonic() < deadline:
            minutes = expected_minutes(job, found, args)
            expected = "time not known yet" if minutes is None else f"about {minutes:.1f} minutes"
            print(f"--- run {number} of {len(jobs)}: {job.name}, {expected}", flush=True)
            try:
                code, result = do_job(job, args, deadline)
            except KeyboardInterrupt:
                print(f"stopped in {job.name}; to resume: {again}")
                raise
        if result:
            done += 1
            if job.seed is not None:
                found[job.plan.name][job.row.name][job.seed] = result
        elif code:
            failed.append(job.name)
            print(f"failed, exit code {code}: {job.name}", file=sys.stderr, flush=True)
        elif job.seed is not None or time.monotonic() >= deadline:  # not a measurement that needs an unfinished run
            print(f"the minutes are up, {len(jobs) - done} of {len(jobs)} runs are missing; to resume: {again}")
            break
    return failed


def main(argv=None):
    """Do the missing runs of the plans; raises UserError at the end if any of them failed."""
    began = time.monotonic()
    args = campaign_parser().parse_args(argv)
    if args.trials != 20 and args.tune is None:
        raise UserError(f"--trials {args.trials} needs --tune")
    if not args.engine and args.engine_options:
        raise UserError(f"--engine-options needs --engine {' or '.join(ENGINES)}")
    modes = [f"--{name}" for name in ("list", "dry", "tune", "engine") if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} exclude each other")
    plans = list({plan.name: plan for plan in map(read_plan, args.plans)}.values())
    if args.dry:
        rows = [Job(plan, row, 0) for plan in plans for row in plan.rows]
        return dry_run(rows + [Job(plan, row) for plan in plans for row in plan.measurements], args)
    again = shlex.join(["python", "campaign.py", *(command_line() if argv is None else argv)])
    deadline = began + 60 * args.minutes if args.minutes else math.inf
    if args.tune is not None:
        plans = tune_plan(plans, args, again, deadline)
    measured = read_runs(make_folder(args.results))
    found = {plan.name: fitting_runs(plan, measured) for plan in plans}
    if args.list:
        for plan in plans:
            print(f"{plan.title} ({plan.name})\n{state_table(plan, found, args)}\n")
        return
    jobs = missing_jobs(plans, found, args)
    failed = (do_jobs_on_cluster if args.engine else do_jobs)(jobs, found, args, again, deadline=deadline)
    for plan in (plan for plan in plans if plan.rows):
        print(f"\n{plan.title} ({plan.name})\n{comparison_table(plan_pairs(plan, found[plan.name]))}")
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
