"""Do what results/ lacks of a plan, a seed of all its rows before the next, and print its table.

    python campaign.py plans/cct2-cifar10.toml --minutes 50    stops cleanly; the same again goes on
    python campaign.py plans/*.toml --list                     what is there and what is open
    python campaign.py plans/headline.toml --device cuda --minutes 8 --carry-in carried --carry-out carried

A plan is a TOML file: a title, rows, how many seeds each gets, and the row that the others are held against.

    title = "ViT on CIFAR-10, with and without dropout"
    baseline = "report"        # or, in a row, against = "report"; may be left out
    seeds = 3                  # a row may have its own; 1 where it is left out

    [[rows]]
    name = "report"
    script = "train_vit.py"
    arguments = "--epochs 5"   # or a list of strings

A row with init_from = "another row" starts from the weights that the other row's run of the same seed has left; one
with not_run = "why" is not run. [[measurements]] are benchmarks, or rollout.py with checkpoint = "plan/row". A plan may
be made of others instead: [[parts]], each with plan, a file beside it, and seeds, how many are done before the next.
"""

import argparse
import importlib
import shlex
import sys
import time

from campaigning.carrying import carry_in, carry_out, carry_results
from campaigning.dry import dry_run
from campaigning.forecast import Forecast, Leaving
from campaigning.jobs import Job, do_job, measured_file, open_jobs, wanted_seeds
from comparing.plans import fitting_runs, plan_pairs, read_parts
from comparing.runs import read_runs
from comparing.tables import aligned, comparison_table
from errors import UserError, run_script
from files import make_folder
from training.flag_types import Parser, at_least, positive

# what a row or a measurement may run, and who knows its flags
SCRIPTS = {
    **{"train_vit.py": "vit_parser", "train_cct.py": "cct_parser", "train_resnet_attn.py": "resnet_parser"},
    **{"benchmarks.train": "train_parser", "benchmarks.augment": "augment_parser", "rollout.py": "rollout_parser"},
}


def script_parser(script):
    """The parser of a script. Raises UserError for another."""
    if script not in SCRIPTS:
        raise UserError(f"unknown script {script}; there are {', '.join(SCRIPTS)}")
    return getattr(importlib.import_module(script.removesuffix(".py")), SCRIPTS[script])()


def campaign_parser():
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", metavar="PLAN", help="TOML files; their runs are done in this order")
    parser.add_argument("--list", action="store_true", help="say what is there and what is open, and run nothing")
    parser.add_argument("--seeds", type=at_least(1), metavar="N", help="seeds 0 to N-1 of each row (as the plan says)")
    parser.add_argument("--minutes", type=positive, metavar="M", help="save and stop after M minutes")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (the first there is)")
    parser.add_argument("--data-dir", help="where the pictures are, or are downloaded to (datasets)")
    parser.add_argument("--out-dir", default="checkpoints", help="runs are written to OUT_DIR/PLAN (%(default)s)")
    parser.add_argument("--results", default="results", help="results are kept in RESULTS/PLAN (%(default)s)")
    parser.add_argument("--carry-out", metavar="DIR", help="at the end write what another machine goes on with")
    parser.add_argument("--carry-in", metavar="DIR", help="go on with what --carry-out has written")
    parser.add_argument("--dry", action="store_true", help="try each row on a few pictures, keep nothing")
    return parser


def state_table(plan, found, forecast, args):
    """What --list prints: the seeds of each row that are there, those that are open, and how long these should take."""
    rows = [["row", "there", "open", "minutes", "command"]]
    for row in plan.rows:
        still = [seed for seed in wanted_seeds(row, args.seeds) if seed not in found[row.name]]
        minutes = [forecast.minutes(Job(plan, row, seed)) for seed in still]
        there = " ".join(map(str, sorted(found[row.name]))) or "none"
        known = f"{sum(minutes):.1f}" if still and None not in minutes else "-"
        command = shlex.join([row.script, *row.arguments])
        rows.append([row.name, there, " ".join(map(str, still)) or "none", known, row.not_run or command])
    for row in plan.measurements:
        there, still = ("1", "none") if measured_file(Job(plan, row), args).exists() else ("none", "1")
        command = shlex.join([row.script, *filter(None, [row.checkpoint]), *row.arguments])
        rows.append([row.name, there, still, "-", command])
    return aligned(rows)


def announcement(job, minutes):
    return f"{job.name}, " + ("time not known yet" if minutes is None else f"some {minutes:.1f} minutes")


def do_jobs(jobs, found, args, again, *, began, after_each):
    """Do jobs until the minutes are up, those that fit into them first, and leave in the list what is open then.

    The minutes count from `began`. In the last fifth of them, at most two, nothing is begun that is not known to fit:
    a first step, which may compile, cannot be cut. Results are added to found. after_each() is called after each job
    that is done. Returns the names of the jobs that failed.
    """
    forecast, total, failed = Forecast(found, args), len(jobs), []
    deadline = began + 60 * args.minutes if args.minutes else None
    last_minutes = min(2, args.minutes / 5) if args.minutes else 0
    queue = list(jobs)
    while queue:
        minutes_left = (deadline - time.monotonic()) / 60 if deadline else float("inf")
        job = forecast.next_job(queue, minutes_left)
        leaving = Leaving(forecast, job, queue, deadline)
        needed = forecast.minutes(job)
        up = minutes_left <= last_minutes and (needed is None or needed > minutes_left)
        if not up:
            number = total - len(queue) + 1
            print(f"--- run {number} of {total}: {announcement(job, needed)}", flush=True)
            try:
                code, done = do_job(job, args, deadline, leaving)
            except KeyboardInterrupt:
                print(f"stopped in {job.name}; go on: {again}")
                raise
            late = deadline is not None and time.monotonic() > deadline
            up = (job.seed is not None or late) and not (code or done or leaving.left)
        if up:
            print(f"the minutes are up, {len(jobs)} of {total} runs are open; go on: {again}")
            break
        if code:
            failed.append(job.name)
            print(f"failed, exit code {code}: {job.name}", file=sys.stderr, flush=True)
        if done:
            jobs.remove(job)
        if done and job.seed is not None:
            found[job.plan.name][job.row.name][job.seed] = done
        if done:
            after_each()
        if not leaving.left:
            queue.remove(job)
    return failed


def main(argv=None):
    """Do what is open of the plans; raises UserError at the end where a run failed, and the others are done."""
    began = time.monotonic()
    args = campaign_parser().parse_args(argv)
    parts = [part for path in args.plans for part in read_parts(path, script_parser)]
    plans = list({part.plan.name: part.plan for part in parts}.values())
    if args.dry:
        rows = [Job(plan, row, 0) for plan in plans for row in plan.rows]
        return dry_run(rows + [Job(plan, row) for plan in plans for row in plan.measurements], args)
    if args.carry_in:
        carry_in(args.carry_in, args)
    measured = read_runs(make_folder(args.results))
    found = {plan.name: fitting_runs(plan, measured) for plan in plans}
    if args.list:
        forecast = Forecast(found, args)
        for plan in plans:
            print(f"{plan.title} ({plan.name})\n{state_table(plan, found[plan.name], forecast, args)}\n")
        return

    def keep_results():
        if args.carry_out:
            carry_results(args.carry_out, parts, args)

    keep_results()  # or say now that it cannot be
    jobs = open_jobs(parts, found, args)
    total = len(jobs)
    again = shlex.join(["python", "campaign.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        failed = do_jobs(jobs, found, args, again, began=began, after_each=keep_results)
    finally:
        if args.carry_out:
            carry_out(args.carry_out, parts, jobs, args)
    for plan in (plan for plan in plans if plan.rows):
        print(f"\n{plan.title} ({plan.name})\n{comparison_table(plan_pairs(plan, found[plan.name]))}")
    if failed:
        raise UserError(f"{len(failed)} of {total} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
