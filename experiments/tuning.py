"""A search: trials of a plan's row, each with other values of some flags, compared on validation images alone."""

import csv
import shlex
import time

from errors import UserError, aligned, import_optional
from experiments.jobs import Job, open_lock, run_flags, run_folder
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
    name, is_range = flag.lstrip("-").replace("-", "_"), ".." in values
    parts = values.split(".." if is_range else ",")
    parsed = [given_arguments(script_parser(row.script), [f"{as_flag(name)}={part}"])[name] for part in parts]
    if name in row.given or name in FIXED or flag_kind(name) != "run":
        why = f"row {row.name} gives it itself" if name in row.given else "it must be the same in all trials"
        raise UserError(f"--tune {text}: {as_flag(name)} cannot be searched, {why}")
    numbers = len(parts) == 2 and all(isinstance(value, (int, float)) for value in parsed)
    if not (numbers and parsed[0] < parsed[1] if is_range else len(parts) == len(set(parts)) > 1):
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
    backend = optuna.storages.journal.JournalFileBackend(str(path), lock)
    options = {"study_name": "tune", "direction": "maximize", "load_if_exists": True}
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=epochs // 3)
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), pruner=pruner, **options)
    if "search" not in study.user_attrs:
        study.set_user_attr("search", search)
    if (there := study.user_attrs["search"]) != search:
        raise UserError(f"{path} is of another search, {there}, not {search}; to search anew, delete {path.parent}")
    return study


def trial_job(plan, number):
    return Job(plan, plan.rows[0]._replace(name=f"trial-{number}"), 0)


def next_trial(study, plan, ranges, args):
    """(a trial that was stopped, or a new one; its lock, held); None if none is left for this process."""
    optuna = import_optional("optuna")
    with open_lock(run_folder(trial_job(plan, 0), args).with_name("study")) as choosing:
        while is_locked(choosing):
            time.sleep(0.1)
        trials = study.get_trials(deepcopy=False)
        numbers = [trial.number for trial in trials if trial.state.name == "RUNNING"]
        new = sum(trial.state.name != "FAIL" for trial in trials) < args.trials
        for number in numbers + [len(trials)] * new:
            lock = open_lock(run_folder(trial_job(plan, number), args))
            # another process may have finished it since the trials were read
            if not is_locked(lock) and (number == len(trials) or study.trials[number].state.name == "RUNNING"):
                # with one seed for all, a second process and a resumed search would draw the first values again
                study.sampler = optuna.samplers.TPESampler(seed=number)
                trial = optuna.Trial(study, trials[number]._trial_id) if number < len(trials) else study.ask()
                for name, method, options in ranges:
                    getattr(trial, method)(name, **options)
                return trial, lock
            lock.close()
    return None


def do_trial(trial, lock, plan, args, deadline):
    """Train a trial until it is finished, is worse than the median of the others, or the deadline; tell Optuna."""
    job, state, accuracies = trial_job(plan, trial.number), import_optional("optuna").trial.TrialState, []
    folder = run_folder(job, args)
    values = [f"{as_flag(name)}={value}" for name, value in trial.params.items()]
    print(f"--- trial {trial.number}: {shlex.join(values)}", flush=True)

    def hopeless():
        known = trial.study.trials[trial.number].intermediate_values
        if (folder / "log.csv").exists():
            with open(folder / "log.csv", newline="") as file:
                accuracies[:] = [float(row["val_accuracy"]) for row in csv.DictReader(file)]
        for epoch, accuracy in enumerate(accuracies, 1):
            if epoch not in known:
                trial.report(accuracy, epoch)
        return trial.should_prune()

    with lock:
        command = [*run_flags(job, args, deadline), *values, "--skip-test", "--resume", "auto"]
        code = run_command(job.row.script, command, lock=lock, hopeless=hopeless)
        hopeless()
        if code and not folder.exists():
            trial.study.tell(trial, state=state.FAIL)
            raise UserError(f"trial {trial.number} cannot be trained; its message is above")
        if code:
            trial.set_user_attr("state", f"failed, exit code {code}")
        if code != 0:  # the sampler takes a failed trial, say one whose loss was not finite, as worse than the others
            trial.study.tell(trial, state=state.PRUNED)
        elif time.monotonic() < deadline:
            trial.study.tell(trial, accuracies[-1])


def trial_table(trials, names):
    rows = [["trial", *map(as_flag, names), "validation accuracy", "epochs", "state"]]
    for trial in trials:
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in map(trial.params.get, names)]
        accuracy = f"{trial.intermediate_values[trial.last_step]:.2%}" if trial.last_step else "-"
        state = trial.user_attrs.get("state", trial.state.name.lower())
        rows.append([str(trial.number), *values, accuracy, str(trial.last_step or 0), state])
    return aligned(rows)


def tune_plan(plans, args, again, deadline, has_validation_images):
    """Do the missing trials of --tune and print all of them: [a Plan with the best values], [] if some are missing.

    has_validation_images(arguments) tells whether a run has some; again is the command that resumes. Raises UserError.
    """
    plan, rows = plans[0], [row for plan in plans for row in plan.rows]
    if len(rows) != 1 or rows[0].not_run:
        raise UserError(f"--tune needs a plan of one row that is run, not of {len(rows)}")
    row, texts = rows[0], sorted(args.tune.split())
    ranges = [read_range(text, row) for text in texts]
    names = [name for name, *_ in ranges]
    if not names or len(set(names)) < len(names):
        raise UserError(f'--tune "{args.tune}": name each flag once, as in "lr=1e-4..1e-2 opt=adamw,muon"')
    arguments = all_arguments(row.script, ({"data_dir": args.data_dir} if args.data_dir else {}) | row.given)
    if not has_validation_images(arguments):
        raise UserError(f"--tune needs validation images to choose on: add --val-fraction 0.1 to row {row.name}")
    trial_plan = plan._replace(name=f"{plan.name}/tune-{row.name}")
    path = make_folder(run_folder(trial_job(trial_plan, 0), args).parent) / "study.jsonl"
    shown = [text + " (log scale)" * options.get("log", False) for text, (*_, options) in zip(texts, ranges)]
    search = f"{shlex.join([row.script, *row.arguments])} with {', '.join(shown)} by TPE, seeded with the trial number"
    study = open_study(path, search, arguments["epochs"])
    print(f"{args.trials} trials of {search}, in {path}")
    while time.monotonic() < deadline and (found := next_trial(study, trial_plan, ranges, args)):
        try:
            do_trial(*found, trial_plan, args, deadline)
        except KeyboardInterrupt:
            print(f"stopped in trial {found[0].number}; to resume: {again}")
            raise
    done = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    done.sort(key=lambda trial: (trial.state.name != "COMPLETE", -trial.intermediate_values.get(trial.last_step, 0)))
    others = [trial for trial in study.trials if trial.state.name in ("RUNNING", "FAIL")]
    print(trial_table(done + others, names))
    if len(done) < args.trials or any(trial.state.name == "RUNNING" for trial in others):
        print(f"{len(done)} of {args.trials} trials are done; to resume, if no other process trains the rest: {again}")
        return []
    if done[0].state.name != "COMPLETE":
        raise UserError(f"--tune: none of {len(done)} trials was finished")
    best = [*row.arguments, *(f"{as_flag(name)}={value}" for name, value in done[0].params.items())]
    row = row._replace(name=f"{row.name}-tuned", arguments=best, given=given_arguments(script_parser(row.script), best))
    title = f"{plan.title}: best of {len(done)} trials on validation images"
    return [plan._replace(title=title, rows=[row], measurements=[])]
