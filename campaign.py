"""Do the runs of a plan that results/ lacks, the first rows first, and print its table.

    python campaign.py plans/cct2-cifar10.toml --minutes 50    stops cleanly; the same again goes on
    python campaign.py plans/*.toml --list                     what is there and what is open

A plan is a TOML file: a title, rows, how many seeds each gets, and the row that the others are held against.

    title = "ViT on CIFAR-10, with and without dropout"
    baseline = "report"        # or, in a row, against = "report"; may be left out
    seeds = 3                  # a row may have its own; 1 where it is left out

    [[rows]]
    name = "report"
    script = "train_vit.py"
    arguments = "--epochs 5"   # or a list of strings

A row with init_from = "another row" starts from the weights that the other row's run of the same seed has left.
"""

import argparse
import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from comparing.plans import by_name, fitting_runs, misfit, plan_pairs, read_plan, run_name
from comparing.runs import read_run, read_runs
from comparing.tables import aligned, comparison_table
from errors import UserError, run_script
from files import make_folder, write_atomically
from training.flag_types import Parser, at_least, positive

# what a row may run, and who knows its flags
SCRIPTS = {"train_vit.py": "vit_parser", "train_cct.py": "cct_parser", "train_resnet_attn.py": "resnet_parser"}


def script_parser(script):
    """The parser of a training script. Raises UserError for another."""
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
    return parser


def wanted_seeds(row, seeds):
    return range(seeds or row.seeds)


def state_table(plan, found, seeds):
    """What --list prints: the seeds of each row that are there, and those that are open."""
    rows = [["row", "there", "open", "command"]]
    for row in plan.rows:
        still = [str(seed) for seed in wanted_seeds(row, seeds) if seed not in found[row.name]]
        there = " ".join(map(str, sorted(found[row.name])))
        rows.append([row.name, there or "none", " ".join(still) or "none", shlex.join([row.script, *row.arguments])])
    return aligned(rows)


def run_command(command):
    """The exit code of a command. A signal that asks to stop is passed on, and raised when the command has ended.

    The command has a session of its own: else Ctrl-C would reach it twice, and the second time ends it without saving.
    """
    process, received = subprocess.Popen(command, start_new_session=True), []

    def pass_on(signum, frame):
        received.append(signum)
        if os.name == "posix":  # on Windows Ctrl-C reaches it by itself
            process.send_signal(signal.SIGTERM)

    stops = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {stop: signal.signal(stop, pass_on) for stop in stops if signal.getsignal(stop) != signal.SIG_IGN}
    try:
        code = process.wait()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if received:
        interrupt = KeyboardInterrupt()
        interrupt.exit_code = 128 + received[0]
        raise interrupt
    return code


def do_run(plan, row, seed, args, deadline):
    """Train one seed of a row, or go on with it; (exit code, the run in results/, None where it is not finished).

    The run that it starts from is trained before, where its checkpoint is not there.
    """
    out_dir = Path(args.out_dir) / plan.name
    folder = out_dir / run_name(row.name, seed)
    start = out_dir / run_name(row.init_from, seed) if row.init_from else None
    if start and not (start / "result.json").exists():
        code, run = do_run(plan, by_name(plan.rows, row.init_from), seed, args, deadline)
        if code or not run:
            return code, None
    minutes = max(1e-4, (deadline - time.monotonic()) / 60) if deadline else None
    finished = folder / "result.json"
    stale = finished.exists() and (old := read_run(finished, out_dir)) and misfit(row, old.result)
    command = [sys.executable, row.script]
    ours = {"--device": args.device, "--data-dir": args.data_dir, "--minutes": minutes, "--init-from": start}
    for flag, value in ours.items():
        command += [flag, str(value)] if value else []
    command += [*row.arguments, "--seed", str(seed), "--out-dir", str(out_dir), "--run-name", folder.name]
    code = run_command([*command, *(["--overwrite"] if stale else ["--resume", "auto"])])
    if code or not finished.exists():
        return code, None
    target = make_folder(Path(args.results) / plan.name) / f"{folder.name}.json"
    write_atomically(target.with_suffix(".csv"), lambda file: file.write((folder / "log.csv").read_bytes()))
    write_atomically(target, lambda file: file.write(finished.read_bytes()))
    return code, read_run(target, Path(args.results))


def main(argv=None):
    """Do what is open of the plans; raises UserError at the end where a run failed, and the others are done."""
    args = campaign_parser().parse_args(argv)
    plans = [read_plan(path, script_parser) for path in args.plans]
    measured = read_runs(make_folder(args.results))
    found = {plan.name: fitting_runs(plan, measured) for plan in plans}
    if args.list:
        for plan in plans:
            print(f"{plan.title} ({plan.name})\n{state_table(plan, found[plan.name], args.seeds)}\n")
        return

    jobs = [
        (plan, row, seed)
        for plan in plans
        for row in plan.rows
        for seed in wanted_seeds(row, args.seeds)
        if seed not in found[plan.name][row.name]
    ]
    again = shlex.join(["python", "campaign.py", *(sys.argv[1:] if argv is None else argv)])
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
    failed = []
    for number, (plan, row, seed) in enumerate(jobs, 1):
        name = f"{plan.name}/{row.name}, seed {seed}"
        code, run = 0, None
        if deadline is None or time.monotonic() < deadline:
            print(f"--- run {number} of {len(jobs)}: {name}", flush=True)
            try:
                code, run = do_run(plan, row, seed, args, deadline)
            except KeyboardInterrupt:
                print(f"stopped in {name}; go on: {again}")
                raise
        if code:
            failed.append(name)
            print(f"failed, exit code {code}: {name}", file=sys.stderr, flush=True)
        elif run:
            found[plan.name][row.name][seed] = run
        else:
            print(f"the minutes are up, {len(jobs) - number + 1} of {len(jobs)} runs are open; go on: {again}")
            break

    for plan in plans:
        print(f"\n{plan.title} ({plan.name})\n{comparison_table(plan_pairs(plan, found[plan.name]))}")
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
