"""Runs side by side, from the JSON files in results/ alone.

    python compare.py                                  all there is, a line for runs that differ in the seed alone
    python compare.py A B                              how far B is above A, and whether that is more than luck
    python compare.py plans/cct2-cifar10.toml          each row of a plan against its baseline
    python compare.py --score --plot score.png         accuracy for its price in parameters, on CIFAR-100
    python compare.py --readme README.md               writes the tables that stand between its markers

Accuracies are the last epoch's, in per cent, mean ± standard deviation over N seeds.
"""

import argparse
import re
from pathlib import Path

from errors import UserError, run_script
from experiments.curves import draw_groups
from experiments.plans import fitting_runs, plan_pairs, read_plan
from experiments.runs import find_group, group_runs, read_runs
from experiments.score import draw_scores, score_table
from experiments.speed import speed_text
from experiments.tables import comparison_table, groups_table, markdown
from files import write_atomically
from training.arguments import Parser

TABLE_START = re.compile(r"<!-- (table|speed): (\S+?)( by val)? -->\n")
TABLE_END = "<!-- end table -->"


def compare_parser():
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="runs by their name (or a file of theirs), the first is the baseline; or plans, each a table of its own",
    )
    parser.add_argument("--by", choices=("test", "val"), default="test", help="which accuracy (%(default)s)")
    parser.add_argument(
        "--paired", action="store_true", help="compare named runs seed by seed, those that start from one trained trunk"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the curves of these runs (with --score: the scores), a PNG"
    )
    parser.add_argument("--score", action="store_true", help="(test accuracy - 70) / millions of parameters * 100")
    parser.add_argument(
        "--readme",
        metavar="FILE",
        help="fill in `<!-- table: PLAN.toml [by val] -->` or `<!-- speed: NAME -->` ... `<!-- end table -->`",
    )
    parser.add_argument("--results", default="results", help="where the results are (%(default)s)")
    return parser


def plan_text(path, measured, *, by):
    plan = read_plan(path)
    groups = [group for group, _, _ in plan_pairs(plan, fitting_runs(plan, measured))]
    paragraphs = [f"{plan.title}, `python campaign.py {path}`:"]
    if begun := [group for group in groups if group.runs]:
        paragraphs.append(groups_table(begun, by=by, layout=markdown))
    if missing := ", ".join(f"`{group.name}`" for group in groups if not group.runs):
        paragraphs.append(f"Not yet measured: {missing}.")
    return "\n\n".join(paragraphs)


def filled_tables(text, results):
    """A Markdown text with the tables between its markers as results/ has them. Raises UserError."""
    measured = read_runs(results)
    before, *parts = TABLE_START.split(text)
    if not parts:
        raise UserError("there is no line <!-- table: PLAN.toml --> in it")
    for kind, name, by_val, part in zip(*(parts[column::4] for column in range(4)), strict=True):
        start = f"<!-- {kind}: {name}{by_val or ''} -->"
        _, end, after = part.partition(TABLE_END)
        if not end:
            raise UserError(f"{start} is not followed by {TABLE_END}")
        if kind == "speed":
            table = speed_text(Path(results) / "speed" / f"{name}.json")
        else:
            table = plan_text(name, measured, by="val" if by_val else "test")
        before += f"{start}\n{table}\n{end}{after}"
    return before


def fill_readme(path, results):
    try:
        text = filled_tables(Path(path).read_text(encoding="utf-8"), results)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--readme {path} cannot be read ({error})") from error
    except UserError as error:
        raise UserError(f"--readme {path}: {error}") from error
    write_atomically(path, lambda file: file.write(text.encode()))


def asked_for(names, measured, groups, results, *, paired):
    """[(title or None, pairs as comparison_table takes them)]: one a plan, and one of the other names together."""
    tables = []
    for plan in (read_plan(name) for name in names if name.endswith(".toml")):
        tables.append((f"{plan.title} ({plan.name})", plan_pairs(plan, fitting_runs(plan, measured))))
    if found := [find_group(groups, name, results) for name in names if not name.endswith(".toml")]:
        tables.append((None, [(group, found[0] if group is not found[0] else None, paired) for group in found]))
    return tables


def main(argv=None):
    args = compare_parser().parse_args(argv)
    if args.names and (args.score or args.readme):
        raise UserError(f"{' '.join(args.names)}: --score and --readme take no names")
    if args.readme:
        return fill_readme(args.readme, args.results)
    measured = read_runs(args.results)
    groups = group_runs(measured)
    if args.score:
        print(score_table(groups))
        if args.plot:
            draw_scores(args.plot, groups)
    elif args.names:
        tables = asked_for(args.names, measured, groups, args.results, paired=args.paired)
        for title, pairs in tables:
            print(*filter(None, [title, comparison_table(pairs, by=args.by)]), sep="\n", end="\n\n")
        if args.plot:
            draw_groups(args.plot, [group for _, pairs in tables for group, _, _ in pairs], by=args.by)
    elif args.plot:
        raise UserError(f"--plot {args.plot} needs names of runs, or --score")
    else:
        print(groups_table(groups, by=args.by) if groups else f"there are no runs in {args.results} yet")


if __name__ == "__main__":
    run_script(main)
