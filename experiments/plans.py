"""Plans: which runs a table is made of. campaign.py says what stands in the TOML file of one."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from experiments.runs import Group, group_runs, warn
from training.arguments import given_arguments

PLAN_KEYS = {"title": str, "rows": list, "measurements": list, "baseline": str, "seeds": int}
ROW_KEYS = {
    **{"name": str, "script": str, "arguments": (str, list), "seeds": int},
    **{"against": str, "init_from": str, "not_run": str},
}
MEASUREMENT_KEYS = {"name": str, "script": str, "arguments": (str, list), "checkpoint": str}
NEEDED_KEYS = ("title", "name", "script")
CAMPAIGNS_OWN = ("seed", "out_dir", "run_name", "resume", "overwrite", "minutes", "summary")
PLACES = ("data_dir", "cache_dir", "cache_gib", "workers")  # where and how fast: result.json leaves them out


# what a row or a measurement may run, and the function that makes its parser
SCRIPTS = {
    **{"train_vit.py": "vit_parser", "train_cct.py": "cct_parser", "train_resnet_attn.py": "resnet_parser"},
    **{"benchmarks.train": "train_parser", "benchmarks.augment": "augment_parser", "rollout.py": "rollout_parser"},
}


class PlanRow(NamedTuple):
    """A row: `given` is what its arguments say, by name; `against` is the row that it is held against, or None, and
    `init_from` the row whose weights, of the same seed, it starts from, or None. `not_run` says why it is not run.
    """

    name: str
    script: str
    arguments: list[str]
    given: dict
    seeds: int
    against: str | None
    init_from: str | None
    not_run: str | None


class Measurement(NamedTuple):
    """What is measured without training: by a benchmark, or by rollout.py on seed 0 of `checkpoint`, PLAN/ROW."""

    name: str
    script: str
    arguments: list[str]
    checkpoint: str | None


class Plan(NamedTuple):
    name: str
    title: str
    rows: list[PlanRow]
    measurements: list[Measurement]


def script_module(script):
    """The module of a script that a plan names. Raises UserError for an unknown one."""
    if script not in SCRIPTS:
        raise UserError(f"unknown script {script}; there are {', '.join(SCRIPTS)}")
    return importlib.import_module(script.removesuffix(".py"))


def script_parser(script):
    """The parser of a script. Raises UserError for an unknown one."""
    return getattr(script_module(script), SCRIPTS[script])()


def check_keys(table, keys, where):
    for key, value in table.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {key}; there are {', '.join(keys)}")
        if not isinstance(value, keys[key]) or (key == "seeds" and value < 1):
            raise UserError(f"{where}: {key} cannot be {value!r}")
    if missing := [key for key in keys if key not in table and key in NEEDED_KEYS]:
        raise UserError(f"{where}: {', '.join(missing)} missing")


def parse_arguments(table, keys, where):
    """(a row's or a measurement's arguments as a list, where it stands). Raises UserError."""
    check_keys(table, keys, where)
    name, arguments = table["name"], table.get("arguments", "")
    where = f"{where} ({name})"
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: files are named by it, so that it must be of letters, digits, . _ and -")
    try:
        return shlex.split(arguments) if isinstance(arguments, str) else list(map(str, arguments)), where
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def parse_row(table, plan, where):
    arguments, where = parse_arguments(table, ROW_KEYS, where)
    name = table["name"]
    try:
        parser = script_parser(table["script"])
        given = given_arguments(parser, arguments)
        if "init_from" in table:
            given_arguments(parser, ["--init-from", table["init_from"]])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if taken := [f"--{flag.replace('_', '-')}" for flag in CAMPAIGNS_OWN if flag in given]:
        raise UserError(f"{where}: {', '.join(taken)} cannot stand in a plan, campaign.py sees to that")
    against = table.get("against", plan.get("baseline"))
    return PlanRow(
        name=name,
        script=table["script"],
        arguments=arguments,
        given=given,
        seeds=table.get("seeds", plan.get("seeds", 1)),
        against=None if against == name else against,
        init_from=table.get("init_from"),
        not_run=table.get("not_run"),
    )


def parse_measurement(table, where):
    arguments, where = parse_arguments(table, MEASUREMENT_KEYS, where)
    checkpoint = table.get("checkpoint")
    try:
        script_parser(table["script"]).parse_args([*([checkpoint] if checkpoint else []), *arguments])
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Measurement(table["name"], table["script"], arguments, checkpoint)


def by_name(rows, name):
    return next(row for row in rows if row.name == name)


def read_toml(path):
    """A plan as it stands in its file, with a list of tables for each of its two kinds. Raises UserError."""
    try:
        plan = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    check_keys(plan, PLAN_KEYS, path)
    kinds = {kind: plan.get(kind, []) for kind in ("rows", "measurements")}
    if not any(kinds.values()):
        raise UserError(f"{path}: there is nothing in it: [[rows]] or [[measurements]]")
    for kind, tables in kinds.items():
        if not all(isinstance(table, dict) for table in tables):
            raise UserError(f"{path}: {kind} are tables, [[{kind}]] starts each")
    return plan | kinds


def read_plan(path):
    """The Plan in a TOML file, its rows' arguments checked by the parser of their script. Raises UserError."""
    plan = read_toml(path)
    rows = [parse_row(table, plan, f"{path}, row {number}") for number, table in enumerate(plan["rows"], 1)]
    measurements = [
        parse_measurement(table, f"{path}, measurement {number}")
        for number, table in enumerate(plan["measurements"], 1)
    ]
    names = [row.name for row in rows]
    everything = names + [measurement.name for measurement in measurements]
    if twice := [name for name in everything if everything.count(name) > 1]:
        raise UserError(f"{path}: two rows are named {twice[0]}")
    for name in (plan.get("baseline"), *(row.against for row in rows), *(row.init_from for row in rows)):
        if name is not None and name not in names:
            raise UserError(
                f"{path}: {name} is no row, to hold others against or to start from; there are {', '.join(names)}"
            )
    if loops := [row.name for row in rows if row.init_from and by_name(rows, row.init_from).init_from]:
        raise UserError(f"{path}: {loops[0]} starts from a row that does not start from scratch")
    return Plan(Path(path).stem, plan["title"], rows, measurements)


def run_name(row_name, seed):
    """What a run's folder and file are called."""
    return f"{row_name}-seed-{seed}"


def misfit(row, result):
    """Why a result is not one of a row; None where it is."""
    wanted = {"script": row.script}
    found = {"script": result["script"]}
    for name in row.given.keys() - set(PLACES):
        flag = f"--{name.replace('_', '-')}"
        wanted[flag], found[flag] = row.given[name], result["args"].get(name)
    if row.init_from:
        wanted["init_from"], found["init_from"] = run_name(row.init_from, result["seed"]), result.get("init_from")
    different = [name for name in sorted(wanted) if found[name] != wanted[name]]
    return "; ".join(f"{name} is {found[name]} there and {wanted[name]} in the plan" for name in different) or None


def fitting_runs(plan, runs):
    """{row's name: {seed: run}} of a plan; a run with a row's name that does not fit the row is named and left out."""
    found = {row.name: {} for row in plan.rows}
    for row in plan.rows:
        for run in runs:
            if run.name != f"{plan.name}/{row.name}":
                continue
            seed = run.result["seed"]
            reason = misfit(row, run.result)
            if not run.path.stem.endswith(f"-seed-{seed}"):
                reason = f"seed is {seed} there"
            if reason:
                warn(f"{run.path} is not counted: it does not fit {plan.name}'s row {row.name} ({reason})")
            else:
                found[row.name][seed] = run
        if len(group_runs(found[row.name].values())) > 1:
            warn(f"the runs of {plan.name}'s row {row.name} differ in more than their seed")
    return found


def plan_pairs(plan, found):
    """(group, the group that it is held against, or None, whether by seed) for each row: what comparison_table takes.

    Rows are compared seed by seed where both start from the same trained row.
    """
    groups = {name: Group(name, list(runs.values())) for name, runs in found.items()}
    starts = {row.name: row.init_from for row in plan.rows}
    return [
        (groups[row.name], groups.get(row.against), bool(row.init_from) and starts.get(row.against) == row.init_from)
        for row in plan.rows
    ]
