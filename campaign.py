"""Run what results/ lacks of a plan, all rows with one seed before the next seed, and print the plan's table.

    python campaign.py plans/cct2-cifar10.toml --minutes 50    stops cleanly; the same command resumes
    python campaign.py plans/*.toml --list                     which results are there, and which are missing

A plan is a TOML file: a title, rows, the number of seeds per row, and the row that the others are compared with.

    title = "ViT on CIFAR-10, with and without dropout"
    baseline = "report"        # or, in a row, against = "report"; optional
    seeds = 3                  # a row may have its own; the default is 1

    [[rows]]
    name = "report"
    script = "train_vit.py"
    arguments = "--epochs 5"   # or a list of strings

A row with init_from = "another row" starts from the weights of the other row's run with the same seed. A row with
not_run = "reason" is not run. [[measurements]] are benchmarks, or rollout.py with checkpoint = "plan/row".
"""

import argparse
import shlex
import sys
import time

from errors import UserError, run_script
from experiments.dry import dry_run
from experiments.forecast import Forecast
from experiments.jobs import Job, do_job, measured_file, open_jobs, wanted_seeds
from experiments.plans import fitting_runs, plan_pairs, read_plan
from experiments.runs import read_runs
from experiments.tables import aligned, comparison_table
from files import make_folder
from training.arguments import Parser, at_least, positive


def campaign_parser():
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", metavar="PLAN", help="TOML files; their runs are done in this order")
    parser.add_argument("--list", action="store_true", help="show which results exist and which are missing")
    parser.add_argument("--seeds", type=at_least(1), metavar="N", help="seeds 0 to N-1 of each row (the plan's number)")
    parser.add_argument("--minutes", type=positive, metavar="M", help="save and stop after M minutes")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (the first available)")
    parser.add_argument("--data-dir", help="where the images are, or are downloaded to (datasets)")
    parser.add_argument("--out-dir", default="checkpoints", help="runs are written to OUT_DIR/PLAN (%(default)s)")
    parser.add_argument("--results", default="results", help="results are kept in RESULTS/PLAN (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="try each row on a few images, keep nothing")
    return parser


def state_table(plan, found, forecast, args):
    """What --list prints: per row the seeds with results, those without, and how long these should take."""
    rows = [["row", "done", "open", "minutes", "command"]]
    for row in plan.rows:
        still = [seed for seed in wanted_seeds(row, args.seeds) if seed not in found[row.name]]
        minutes = [forecast.minutes(Job(plan, row, seed)) for seed in still]
        done = " ".join(map(str, sorted(found[row.name]))) or "none"
        known = f"{sum(minutes):.1f}" if still and None not in minutes else "-"
        command = shlex.join([row.script, *row.arguments])
        rows.append([row.name, done, " ".join(map(str, still)) or "none", known, row.not_run or command])
    for row in plan.measurements:
        done, still = ("1", "none") if measured_file(Job(plan, row), args).exists() else ("none", "1")
        command = shlex.join([row.script, *filter(None, [row.checkpoint]), *row.arguments])
        rows.append([row.name, done, still, "-", command])
    return aligned(rows)


def do_jobs(jobs, found, args, again, *, deadline):
    """Do the jobs until the deadline (a time of time.monotonic(), or None), adding their results to found.

    Returns the names of the jobs that failed.
    """
    forecast, failed, done = Forecast(found, args), [], 0
    for number, job in enumerate(jobs, 1):
        code, result = 0, None
        if deadline is None or time.monotonic() < deadline:
            minutes = forecast.minutes(job)
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
        elif job.seed is not None or (deadline is not None and time.monotonic() >= deadline):
            print(f"the minutes are up, {len(jobs) - done} of {len(jobs)} runs are open; to resume: {again}")
            break
    return failed


def main(argv=None):
    """Do what is open in the plans; raises UserError at the end if a run failed, after the others are done."""
    began = time.monotonic()
    args = campaign_parser().parse_args(argv)
    plans = list({plan.name: plan for plan in map(read_plan, args.plans)}.values())
    if args.dry:
        rows = [Job(plan, row, 0) for plan in plans for row in plan.rows]
        return dry_run(rows + [Job(plan, row) for plan in plans for row in plan.measurements], args)
    measured = read_runs(make_folder(args.results))
    found = {plan.name: fitting_runs(plan, measured) for plan in plans}
    if args.list:
        forecast = Forecast(found, args)
        for plan in plans:
            print(f"{plan.title} ({plan.name})\n{state_table(plan, found[plan.name], forecast, args)}\n")
        return
    jobs = open_jobs(plans, found, args)
    again = shlex.join(["python", "campaign.py", *(sys.argv[1:] if argv is None else argv)])
    failed = do_jobs(jobs, found, args, again, deadline=began + 60 * args.minutes if args.minutes else None)
    for plan in (plan for plan in plans if plan.rows):
        print(f"\n{plan.title} ({plan.name})\n{comparison_table(plan_pairs(plan, found[plan.name]))}")
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
