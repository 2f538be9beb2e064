"""A search: trials of a plan's row, each with other values of some flags, compared on validation images alone."""

import shlex
import time

from errors import UserError, aligned, import_optional
from experiments.jobs import Job, log_rows, open_lock, run_flags, run_folder
from experiments.scripts import all_arguments, is_locked, run_command, script_parser
from files import make_folder
from training.arguments import as_flag, given_arguments
from training.flags import flag_kind

FIXED = ("dataset", "epochs", "seed", "split_seed", "test_fraction", "val_fraction")  # the same in all trials


def read_range(text, row):
    """(flag's name, the method of Optuna's Trial, its arguments) of `lr=1e-4..1e-2` or `opt=adamw,muon`.

    The scale is logarithmic if a range begins above 0 and spans a factor of 10. Raises UserError.
    """
    flag, _, values = text.partition("=")
    name, (low, is_range, high) = flag.lstrip("-").replace("-", "_"), values.partition("..")
    parts = [low, high] if is_range else values.split(",")
    if high.startswith("."):
        raise UserError(f"--tune {text}: a range has two dots, {flag}=LOW..HIGH")
    parsed = [given_arguments(script_parser(row.script), [f"{as_flag(name)}={part}"])[name] for part in parts]
    if name in row.given or name in FIXED or flag_kind(name) != "run":
        why = f"row {row.name} gives it itself" if name in row.given else "it must be the same in all trials"
        raise UserError(f"--tune {text}: {as_flag(name)} cannot be searched, {why}")
    numbers = all(isinstance(value, (int, float)) for value in parsed)
    if numbers and is_range and parsed[0] >= parsed[1]:
        raise UserError(f"--tune {text}: LOW must be below HIGH in {flag}=LOW..HIGH")
    if not (numbers if is_range else len(parts) == len(set(parts)) > 1):
        raise UserError(f"--tune {text}: neither a range {flag}=LOW..HIGH nor choices {flag}=A,B")
    if not is_range:
        return name, "suggest_categorical", {"choices": parts}
    low, high = parsed
    method = "suggest_int" if isinstance(low, int) else "suggest_float"
    return name, method, {"low": low, "high": high, "log": low > 0 and high >= 10 * low}


def open_study(path, search, epochs):
    """Optuna's study in a file, new or as far as it has come. Raises UserError if it is of another search, a text."""
    optuna = import_optional("optuna", "'optuna>=5'")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lock = optuna.storages.journal.JournalFileOpenLock(str(path))  # needs no symbolic links
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path), lock))
    options = {"direction": "maximize", "pruner": optuna.pruners.MedianPruner(n_warmup_steps=epochs // 3)}
    study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True, **options)
    if (there := study.user_attrs.get("search", search)) != search:
        raise UserError(f"{path} is of another search, {there}, not {search}; to search anew, delete {path.parent}")
    study.set_user_attr("search", search)
    return study


def do_trial(study, number, ranges, job, lock, args, deadline):
    """Train a trial until it is finished, is worse than the median of the others, or the deadline; tell Optuna.

    Its values are new, or those that it had when it was stopped.
    """
    optuna, folder, known = import_optional("optuna"), run_folder(job, args), study.trials[number]
    # with one seed for all, a second process and a resumed search would draw the first values again
    study.sampler = optuna.samplers.TPESampler(seed=number)
    trial, accuracies = optuna.Trial(study, known._trial_id), known.intermediate_values
    for name, method, options in ranges:
        getattr(trial, method)(name, **options)
    values = [f"{as_flag(name)}={value}" for name, value in trial.params.items()]
    print(f"--- trial {number}: {shlex.join(values)}", flush=True)

    def hopeless():
        for epoch, row in enumerate(log_rows(folder), 1):
            if epoch not in accuracies:
                accuracies[epoch] = float(row["val_accuracy"])
                trial.report(accuracies[epoch], epoch)
        return trial.should_prune()

    command = [*run_flags(job, args, deadline), *values, "--skip-test", "--resume", "auto"]
    code = run_command(job.row.script, command, lock=lock, hopeless=hopeless)
    hopeless()
    if code:
        trial.set_user_attr("state", f"failed, exit code {code}")
    if code != 0:  # the sampler takes a failed trial, say one whose loss was not finite, as worse than the others
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        print(f"trial {number} is ended: " + ("it failed" if code else "worse than the median of the others (pruned)"))
    elif time.monotonic() < deadline:
        study.tell(trial, accuracies[max(accuracies)])
    if code and not folder.exists():
        raise UserError(f"trial {number} cannot be trained; its message is above")


def trial_table(trials, names):
    rows = [["trial", *map(as_flag, names), "validation accuracy", "epochs", "state"]]
    for trial in trials:
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in map(trial.params.get, names)]
        accuracy = f"{trial.intermediate_values[trial.last_step]:.2%}" if trial.last_step else "-"
        state = trial.user_attrs.get("state", trial.state.name.lower())
        rows.append([str(trial.number), *values, accuracy, str(trial.last_step or 0), state])
    return aligned(rows)


def tune_plan(plans, args, again, deadline):
    """Do the missing trials of --tune and print all: [a Plan with the best values], [] if some are missing."""
    plan, rows = plans[0], [row for plan in plans for row in plan.rows]
    if len(rows) != 1 or rows[0].not_run:
        raise UserError(f"--tune needs a plan of one row that is run, not of {len(rows)}")
    row, texts = rows[0], sorted(args.tune.split())
    ranges = [read_range(text, row) for text in texts]
    if len({name for name, *_ in ranges}) < max(1, len(texts)):
        raise UserError(f'--tune "{args.tune}": name each flag once, as in "lr=1e-4..1e-2 opt=adamw,muon"')
    arguments = all_arguments(row.script, row.given)
    if not arguments["val_fraction"] and not arguments["dataset"].startswith(("shapes", "folder", "webdataset")):
        raise UserError(f"--tune needs validation images to choose on: add --val-fraction 0.1 to row {row.name}")
    place = plan._replace(name=f"{plan.name}/tune-{row.name}")
    jobs = [Job(place, row._replace(name=f"trial-{number}"), 0) for number in range(args.trials)]
    path = make_folder(run_folder(jobs[0], args).parent) / "study.jsonl"
    shown = [text + " (log scale)" * options.get("log", False) for text, (*_, options) in zip(texts, ranges)]
    search = f"{shlex.join([row.script, *row.arguments])} with {', '.join(shown)} by TPE, seeded with the trial number"
    study = open_study(path, search, arguments["epochs"])
    if (tested := study.user_attrs.get("tested", args.trials)) < args.trials:
        anew = f"to search anew, delete {path.parent}"
        raise UserError(f"--trials {args.trials}: the test set has been opened for the best of {tested}; {anew}")
    print(f"{args.trials} trials of {search}, in {path}")
    while len(study.trials) < args.trials:
        study.ask()  # if two processes do so at once, those beyond args.trials stay unused
    try:
        for number, job in enumerate(jobs):
            with open_lock(run_folder(job, args)) as lock:
                if time.monotonic() < deadline and not is_locked(lock) and study.trials[number].state.name == "RUNNING":
                    do_trial(study, number, ranges, job, lock, args, deadline)
    except KeyboardInterrupt:
        print(f"stopped in trial {number}; to resume: {again}")
        raise
    trials = [trial for trial in study.trials if trial.params]
    trials.sort(key=lambda trial: (trial.state.name, -trial.intermediate_values.get(trial.last_step, 0)))
    print(trial_table(trials, [name for name, *_ in ranges]))
    done = sum(trial.state.name != "RUNNING" for trial in trials)
    if done < args.trials:
        print(f"{done} of {args.trials} trials are done; to resume, if no other process trains the rest: {again}")
        return []
    if trials[0].state.name != "COMPLETE":
        raise UserError(f"--tune: none of {done} trials was finished")
    best = [*row.arguments, *(f"{as_flag(name)}={value}" for name, value in trials[0].params.items())]
    study.set_user_attr("tested", done)
    row = row._replace(name=f"{row.name}-tuned", arguments=best, given=given_arguments(script_parser(row.script), best))
    title = f"{plan.title}: best of {done} trials on validation images"
    return [plan._replace(title=title, rows=[row], measurements=[])]
