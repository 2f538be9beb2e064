"""Plans: which runs a table is made of. campaign.py says what stands in the TOML file of one."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

from comparing.runs import Group, warn
from errors import UserError
from training.arguments import given_arguments

PLAN_KEYS = {"title": str, "rows": list, "baseline": str, "seeds": int}
ROW_KEYS = {"name": str, "script": str, "arguments": (str, list), "seeds": int, "against": str, "init_from": str}
OPTIONAL_KEYS = ("baseline", "seeds", "against", "init_from")
CAMPAIGNS_OWN = ("seed", "out_dir", "run_name", "resume", "overwrite", "minutes", "summary")
PLACES = ("data_dir", "cache_dir", "cache_gib", "workers")  # where and how fast: result.json leaves them out


class PlanRow(NamedTuple):
    """A row: `given` is what its arguments say, by name; `against` is the row that it is held against, or None, and
    `init_from` the row whose weights, of the same seed, it starts from, or None.
    """

    name: str
    script: str
    arguments: list[str]
    given: dict
    seeds: int
    against: str | None
    init_from: str | None


class Plan(NamedTuple):
    name: str
    title: str
    rows: list[PlanRow]


def check_keys(table, keys, where):
    for key, value in table.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {key}; there are {', '.join(keys)}")
        if not isinstance(value, keys[key]) or (key == "seeds" and value < 1):
            raise UserError(f"{where}: {key} cannot be {value!r}")
    if missing := [key for key in keys if key not in table and key not in OPTIONAL_KEYS]:
        raise UserError(f"{where}: {', '.join(missing)} missing")


def parse_row(table, plan, where, script_parser):
    check_keys(table, ROW_KEYS, where)
    name, arguments = table["name"], table["arguments"]
    where = f"{where} ({name})"
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: files are named by it, so that it must be of letters, digits, . _ and -")
    try:
        arguments = shlex.split(arguments) if isinstance(arguments, str) else list(map(str, arguments))
        parser = script_parser(table["script"])
        given = given_arguments(parser, arguments)
        if "init_from" in table:
            given_arguments(parser, ["--init-from", table["init_from"]])
    except ValueError as error:  # a UserError is one too
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
    )


def by_name(rows, name):
    return next(row for row in rows if row.name == name)


def read_plan(path, script_parser):
    """The Plan in a TOML file; script_parser(script) is the parser that checks a row's arguments. Raises UserError."""
    try:
        plan = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    check_keys(plan, PLAN_KEYS, path)
    if not plan["rows"] or not all(isinstance(table, dict) for table in plan["rows"]):
        raise UserError(f"{path}: rows are tables, [[rows]] starts each")
    rows = [
        parse_row(table, plan, f"{path}, row {number}", script_parser) for number, table in enumerate(plan["rows"], 1)
    ]
    names = [row.name for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two rows are named {twice[0]}")
    for name in (plan.get("baseline"), *(row.against for row in rows), *(row.init_from for row in rows)):
        if name is not None and name not in names:
            raise UserError(
                f"{path}: {name} is no row, to hold others against or to start from; there are {', '.join(names)}"
            )
    if loops := [row.name for row in rows if row.init_from and by_name(rows, row.init_from).init_from]:
        raise UserError(f"{path}: {loops[0]} starts from a row that does not start from scratch")
    return Plan(Path(path).stem, plan["title"], rows)


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
