"""Compare runs, from the JSON files in results/ alone.

    python compare.py                                  all runs, one line per group that differs only in the seed
    python compare.py A B                              how far B is above A, and whether that could be luck
    python compare.py checkpoints/a checkpoints/b      the same for folders of runs
    python compare.py plans/cct2-cifar10.toml          each row of a plan against its baseline
    python compare.py --maps checkpoints/a checkpoints/b    methods of rollout.py and attribute.py, the best first
    python compare.py --score --plot score.png         accuracy for its cost in parameters, on CIFAR-100
    python compare.py --readme README.md               fill the tables between the file's markers

Accuracies are the last epoch's, in per cent, mean ± standard deviation over N seeds.
"""

import re
from functools import partial
from pathlib import Path

from errors import UserError, run_script
from experiments.plans import fitting_runs, plan_pairs, read_plan
from experiments.plots import draw_groups, draw_scores
from experiments.runs import find_group, group_runs, own_groups, read_runs
from experiments.speed import speed_text
from experiments.tables import comparison_table, groups_table, markdown, score_table
from files import write_atomically
from maps.ranking import ranking_text
from training.flags import Parser
from training.records import read_text

TABLE_START = re.compile(r"<!-- (table|comparison|speed|faults|maps): (\S+?)( by val)? -->\n")
TABLE_END = "<!-- end table -->"


def compare_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    help_text = "runs (names, files, folders; the first is the baseline), or plans"
    add("names", nargs="*", default=[], metavar="NAME", help=help_text)
    add("--by", choices=("test", "val"), default="test", help="the accuracy; use val to choose between models")
    add("--paired", action="store_true", help="compare the named runs seed by seed, if they start from one trunk")
    add("--plot", metavar="FILE", help="draw the accuracy per epoch of these runs, or with --score the scores, as PNG")
    add("--maps", action="store_true", help="rank methods over the evaluations of these runs, or in these folders")
    add("--score", action="store_true", help="score runs by (test accuracy - 70) / millions of parameters * 100")
    help_text = "fill in this Markdown file: <!-- table: PLAN.toml [by val] -->, <!-- comparison: PLAN.toml --> (with"
    help_text += " its differences), <!-- speed: NAME -->, <!-- faults: NAME --> or <!-- maps: FOLDER --> to "
    help_text += TABLE_END
    add("--readme", metavar="FILE", help=help_text)
    add("--results", metavar="DIR", default="results", help="where the results are")
    return parser


def plan_text(path, measured, *, by, differences=False):
    """The Markdown of a plan: a line with its title, and the table of the rows that have results; then, if asked for,
    that of their differences."""
    plan = read_plan(path)
    pairs = [pair for pair in plan_pairs(plan, fitting_runs(plan, measured)) if pair[0].runs]
    if not pairs:
        return f"Not measured yet: `python campaign.py {path}`."
    groups = [group for group, _, _ in pairs]
    make = partial(comparison_table, pairs) if differences else partial(groups_table, groups)
    return f"{plan.title}, `python campaign.py {path}`:\n\n{make(by=by, layout=markdown)}"


def filled_tables(text, results):
    """A Markdown text with the tables between its markers made from the folder `results`. Raises UserError."""
    measured = read_runs(results)
    before, *parts = TABLE_START.split(text)  # the groups of the pattern are parts as well
    if not parts:
        raise UserError("there is no line <!-- table: PLAN.toml --> in it")
    for kind, name, by_val, part in zip(*(parts[column::4] for column in range(4)), strict=True):
        start = f"<!-- {kind}: {name}{by_val or ''} -->"
        _, end, after = part.partition(TABLE_END)
        if not end:
            raise UserError(f"{start} is not followed by {TABLE_END}")
        if kind in ("speed", "faults"):
            table = speed_text(Path(results) / kind / f"{name}.json")
        elif kind == "maps":
            table = ranking_text([name], markdown)
        else:
            by = "val" if by_val else "test"
            table = plan_text(name, measured, by=by, differences=kind == "comparison")
        before += f"{start}\n{table}\n{end}{after}"
    return before


def fill_readme(path, results):
    try:
        text = filled_tables(read_text(path), results)
    except UserError as error:
        raise UserError(f"--readme {path}: {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--readme {path} cannot be read ({error})") from error
    write_atomically(path, lambda file: file.write(text.encode()))


def named_groups(names, groups, results):
    """The groups of runs that a user names, in their order; runs in folders belong together by their arguments."""
    own = own_groups([Path(name) for name in names if Path(name).is_dir()])
    found = []
    for name in names:
        inside = [group for group in own if any(run.path.is_relative_to(name) for run in group.runs)]
        found += inside if Path(name).is_dir() else [find_group(groups, name, results)]
    return list({id(group): group for group in found}.values())


def chosen_tables(args, measured, groups):
    """[(title or None, pairs for comparison_table)]: one per plan, and one of all other names."""
    tables = []
    for name in (name for name in args.names if name.endswith(".toml")):
        plan = read_plan(name)
        if not plan.rows:
            raise UserError(f"{name} has no rows to compare, only measurements")
        tables.append((f"{plan.title} ({plan.name})", plan_pairs(plan, fitting_runs(plan, measured))))
    if found := named_groups([name for name in args.names if not name.endswith(".toml")], groups, args.results):
        tables.append((None, [(group, found[0] if group is not found[0] else None, args.paired) for group in found]))
    return tables


def check_flags(args):
    """Raises UserError for flags without effect."""
    mode = next((mode for mode in ("readme", "score", "maps", "names") if getattr(args, mode)), None)
    uses = {"score": ("plot",), "maps": ("names",), "names": ("plot", "paired", "by"), None: ("by",)}.get(mode, ())
    for flag in ("names", "score", "maps", "plot", "paired", "by"):
        if getattr(args, flag) != compare_parser().get_default(flag) and flag not in (mode, *uses):
            given = "names of runs" if flag == "names" else f"--{flag}"
            raise UserError(f"no effect: {given} {f'with --{mode}' if mode else 'without names of runs'}")
    if args.paired and len([name for name in args.names if not name.endswith(".toml")]) < 2:
        raise UserError("--paired needs the names of two runs; plans pair seeds by themselves")


def main(argv=None):
    args = compare_parser().parse_args(argv)
    check_flags(args)
    if args.readme:
        return fill_readme(args.readme, args.results)
    if args.maps:
        return print(ranking_text(args.names))
    only_folders = args.names and all(Path(name).is_dir() for name in args.names)
    measured = [] if only_folders else read_runs(args.results)
    groups = group_runs(measured)
    if args.score:
        print(score_table(groups))
        if args.plot:
            draw_scores(args.plot, groups)
    elif args.names:
        tables = chosen_tables(args, measured, groups)
        for title, pairs in tables:
            print(*filter(None, [title, comparison_table(pairs, by=args.by)]), sep="\n", end="\n\n")
        if args.plot:
            draw_groups(args.plot, [group for _, pairs in tables for group, _, _ in pairs], by=args.by)
    else:
        print(groups_table(groups, by=args.by) if groups else f"there are no runs in {args.results} yet")


if __name__ == "__main__":
    run_script(main)
