"""Plans: TOML files that say which runs a table consists of. campaign.py describes their keys."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from experiments.runs import Group, group_runs, warn
from experiments.scripts import script_parser
from training.arguments import as_flag, given_arguments
from training.flags import flag_kind
from training.records import read_text

PLAN_KEYS = {"title": str, "rows": list, "measurements": list, "baseline": str, "seeds": int, "paired": bool}
COMMAND_KEYS = {"name": str, "script": str, "arguments": (str, list)}
ROW_KEYS = COMMAND_KEYS | {"seeds": int, "against": str, "init_from": str, "not_run": str, "published": str}
MEASUREMENT_KEYS = COMMAND_KEYS | {"checkpoint": str}
REQUIRED_KEYS = ("title", "name", "script")


class PlanRow(NamedTuple):
    """A row of a plan: one command, run with several seeds."""

    name: str
    script: str
    arguments: list[str]
    given: dict  # the flags in `arguments`, {name: value}
    seeds: int
    against: str | None  # the row that it is compared with
    init_from: str | None  # the row whose weights, of the same seed, it starts from
    not_run: str | None  # why it is not run
    published: str | None  # the accuracy that others report for it


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
    paired: bool  # whether rows with one seed share what is random, beside what they compare


def check_keys(table, keys):
    for key, value in table.items():
        if key not in keys:
            raise UserError(f"unknown key {key}; choose from {', '.join(keys)}")
        if not isinstance(value, keys[key]) or (key == "seeds" and value < 1):
            raise UserError(f"{key} cannot be {value!r}")
    if missing := [key for key in keys if key not in table and key in REQUIRED_KEYS]:
        raise UserError(f"{', '.join(missing)} missing")


def parse_arguments(table, keys):
    """(name, script, arguments as a list) of a row or measurement. Raises UserError."""
    check_keys(table, keys)
    name, arguments = table["name"], table.get("arguments", "")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError("a name may have letters, digits, . _ and - only, since files are named after it")
    try:
        arguments = shlex.split(arguments) if isinstance(arguments, str) else list(map(str, arguments))
    except ValueError as error:
        raise UserError(f"arguments = {arguments!r}: {error}") from error
    return name, table["script"], arguments


def parse_row(table, plan):
    name, script, arguments = parse_arguments(table, ROW_KEYS)
    parser, init_from = script_parser(script), table.get("init_from")
    given = given_arguments(parser, arguments)
    if init_from:
        given_arguments(parser, ["--init-from", init_from])  # raises UserError if the script does not have this flag
    if taken := [as_flag(flag) for flag in given if flag == "seed" or flag_kind(flag) == "start"]:
        raise UserError(f"remove {', '.join(taken)}: campaign.py sets this itself")
    seeds, against = table.get("seeds", plan.get("seeds", 1)), table.get("against", plan.get("baseline"))
    against = None if against == name else against
    texts = table.get("not_run"), table.get("published")
    return PlanRow(name, script, arguments, given, seeds, against, init_from, *texts)


def parse_measurement(table, plan):
    name, script, arguments = parse_arguments(table, MEASUREMENT_KEYS)
    checkpoint = table.get("checkpoint")
    script_parser(script).parse_args([*([checkpoint] if checkpoint else []), *arguments])
    return Measurement(name, script, arguments, checkpoint)


def parse_tables(plan, kind, parse):
    """What `parse` makes of each of the plan's tables of a kind. Raises UserError that says which table is wrong."""
    parsed = []
    for number, table in enumerate(plan.get(f"{kind}s", []), 1):
        if not isinstance(table, dict):
            raise UserError(f"{kind} {number} must be a table, which begins with [[{kind}s]]")
        try:
            parsed.append(parse(table, plan))
        except UserError as error:
            name = f" ({table['name']})" if "name" in table else ""
            raise UserError(f"{kind} {number}{name}: {error}") from error
    return parsed


def by_name(rows, name):
    return next(row for row in rows if row.name == name)


def check_names(plan, rows, measurements):
    """Raises UserError for names that are not unique, and for references to rows that do not exist."""
    names = [row.name for row in rows]
    all_names = names + [measurement.name for measurement in measurements]
    if repeated := [name for name in all_names if all_names.count(name) > 1]:
        raise UserError(f"two rows are named {repeated[0]}")
    references = [("baseline", plan.get("baseline"))]
    references += [(key, getattr(row, key)) for row in rows for key in ("against", "init_from")]
    for key, name in references:
        if name is not None and name not in names:
            raise UserError(f"{key} = {name} is not a row; choose one of {', '.join(names)}")
    if foreign := [row.name for row in rows if row.init_from and by_name(rows, row.init_from).script != row.script]:
        raise UserError(f"init_from of {foreign[0]} must name a row of the same script")
    if chained := [row.name for row in rows if row.init_from and by_name(rows, row.init_from).init_from]:
        raise UserError(f"init_from of {chained[0]} must name a row that has no init_from itself")


def read_plan(path):
    """The Plan in a TOML file; each row's arguments are checked by its script's parser. Raises UserError."""
    try:
        plan = tomllib.loads(read_text(path))
        check_keys(plan, PLAN_KEYS)
        rows = parse_tables(plan, "row", parse_row)
        measurements = parse_tables(plan, "measurement", parse_measurement)
        if not rows and not measurements:
            raise UserError("no runs in it; add [[rows]] or [[measurements]]")
        check_names(plan, rows, measurements)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:  # of tomllib or the text's encoding
        raise UserError(f"{path} is not TOML: {error}") from error
    return Plan(Path(path).stem, plan["title"], rows, measurements, plan.get("paired", False))


def run_name(row_name, seed):
    """The name of a run's folder and files."""
    return f"{row_name}-seed-{seed}"


def misfit(row, result):
    """Why a result is not of this row; None if it is."""
    values = {"script": (result["script"], row.script)}  # {name: (in the result, in the plan)}
    for name, value in row.given.items():
        if flag_kind(name) == "run":  # results leave out the other kinds
            values[as_flag(name)] = result["args"].get(name), value
    if row.init_from:
        values["init_from"] = result.get("init_from"), run_name(row.init_from, result["seed"])
    different = [name for name, (there, here) in sorted(values.items()) if there != here]
    return "; ".join("{} is {} there and {} in the plan".format(name, *values[name]) for name in different) or None


def fitting_runs(plan, runs):
    """{row's name: {seed: run}} of a plan; warns about runs with a row's name that do not fit the row."""
    found = {row.name: {} for row in plan.rows}
    for row in plan.rows:
        for run in (run for run in runs if run.name == f"{plan.name}/{row.name}"):
            seed = run.result["seed"]
            reason = misfit(row, run.result)
            if not run.path.stem.endswith(f"-seed-{seed}"):
                reason = f"seed is {seed} there"
            if reason:
                warn(f"{run.path} does not count: it does not fit {plan.name}'s row {row.name} ({reason})")
            else:
                found[row.name][seed] = run
        if len(group_runs(found[row.name].values())) > 1:
            warn(f"the runs of {plan.name}'s row {row.name} differ in more than their seed")
    return found


def plan_pairs(plan, found):
    """A plan's rows as comparison_table takes them; found is {row's name: {seed: run}}.

    Seeds are paired if both rows start from the same trained row, or if the plan says so.
    """
    groups = {row.name: Group(row.name, list(found[row.name].values()), row.published) for row in plan.rows}
    starts = {row.name: row.init_from for row in plan.rows}
    same_trunk = {row.name: bool(row.init_from) and starts.get(row.against) == row.init_from for row in plan.rows}
    return [(groups[row.name], groups.get(row.against), plan.paired or same_trunk[row.name]) for row in plan.rows]
