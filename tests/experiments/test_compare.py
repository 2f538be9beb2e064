"""compare.py on results that were made up: groups, closed-form statistics, tests, scores, tables, plots, bad input."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import compare
from errors import UserError
from experiments.plans import fitting_runs, read_plan
from experiments.runs import group_runs, read_runs
from experiments.scripts import all_arguments, script_parser
from experiments.statistics import (
    Comparison,
    compare_accuracies,
    holm,
    seeds_to_see,
    summarise,
    verdicts,
    welch_interval,
)
from experiments.tables import PUBLISHED, parameter_score
from models import build_model
from training.arguments import given_arguments
from training.outputs import count_parameters


def write_measured(root, name, seed, accuracy, *, dataset="cifar10", curve=(), **changes):
    """A result as a training script leaves it, at root/name-seed-K.json, and a log beside it if there is a curve."""
    args = {"recipe": "report", "dataset": dataset, "seed": seed, "epochs": 2, "lr": 0.1, "device": None}
    result = {
        **{"script": "train_vit.py", "args": args | changes.pop("args", {}), "params": 1_000_000, "data_hash": "aa"},
        **{"dataset_name": dataset, "epochs": 2, "seed": seed, "test_accuracy": accuracy, "val_accuracy": None},
        **{"device": "AMD EPYC", "precision": "bf16", "seconds": 90, **changes},
    }
    path = root / f"{name}-seed-{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    if curve:
        lines = ["epoch,val_accuracy,test_accuracy", *(f"{epoch},,{value}" for epoch, value in enumerate(curve, 1))]
        path.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def measured(tmp_path):
    """Two rows of a plan with three seeds each, and a single run of another name."""
    for seed, (plain, better) in enumerate([(0.50, 0.60), (0.52, 0.61), (0.54, 0.65)]):
        write_measured(tmp_path, "drop/plain", seed, plain, curve=(plain / 2, plain))
        write_measured(tmp_path, "drop/better", seed, better, curve=(better / 2, better), args={"lr": 0.2})
    write_measured(tmp_path, "alone", 0, 0.4321, params=12_345)
    return tmp_path


@pytest.fixture
def plan(tmp_path):
    rows = [("plain", 0.1), ("better", 0.2), ("open", 0.3)]
    row = '[[rows]]\nname = "{}"\nscript = "train_vit.py"\narguments = "--lr {}"\n'
    path = tmp_path / "drop.toml"
    path.write_text('title = "A title"\nbaseline = "plain"\nseeds = 3\n' + "".join(row.format(*each) for each in rows))
    return path


def lines_of(capsys, *argv):
    compare.main(list(map(str, argv)))
    return capsys.readouterr().out.splitlines()


def test_folds_have_no_interval_and_no_p(tmp_path, capsys):
    folds = {"dataset": "folder", "folds": 5}
    for seed in range(5):
        write_measured(tmp_path, "folds/plain", seed, 0.5 + seed / 100, args=folds)
        write_measured(tmp_path, "folds/better", seed, 0.6 + seed / 100, args=folds | {"lr": 0.2})
    said = "\n".join(lines_of(capsys, "plain", "better", "--results", tmp_path))
    assert "folds/better - folds/plain: +10.00 points, without p: folds share their training images" in said
    assert "verdict" not in said and "permutation" not in said and re.search(r"52\.00 ± 1\.58 % +- +5", said)


def test_a_run_without_a_test_counts_by_its_validation_images_alone(tmp_path, capsys):
    write_measured(tmp_path, "shut", 0, None, val_accuracy=0.7, dataset="cifar100")
    assert "70.00 %" in lines_of(capsys, "--results", tmp_path, "--by", "val")[1]
    assert "%" not in lines_of(capsys, "--results", tmp_path)[1]
    assert not any("shut" in line for line in lines_of(capsys, "--results", tmp_path, "--score"))


# Statistics


def test_mean_deviation_and_interval_are_the_textbooks():
    mean, deviation, (low, high) = summarise([1.0, 2.0, 3.0])
    assert (mean, deviation) == (2.0, 1.0)
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6) and mean - low == pytest.approx(high - mean)
    assert summarise([0.5]) == (0.5, None, None)


def test_welch_interval_is_the_textbooks():
    """With equal variances and numbers its degrees of freedom are n + m - 2: here 4, whose quantile is 2.776."""
    low, high = welch_interval([4.0, 5.0, 6.0], [1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(3) and (high - low) / 2 == pytest.approx(2.776445 * math.sqrt(2 / 3))
    assert welch_interval([1.0], [1.0, 2.0]) is None and welch_interval([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("seeds", "paired", "floor"),
    [(3, True, 0.25), (5, True, 0.0625), (6, True, 0.03125), (3, False, 0.1), (4, False, 2 / 70)],
)
def test_the_smallest_p_that_so_many_seeds_can_give(seeds, paired, floor):
    high, low = ({seed: base + seed / 1000 for seed in range(seeds)} for base in (0.9, 0.1))
    comparison = compare_accuracies(high, low, paired=paired)
    assert comparison.floor == pytest.approx(floor) and comparison.difference == pytest.approx(0.8)
    assert comparison.p_value == (pytest.approx(floor) if floor <= 0.05 else None)


def test_p_values_are_counted_out():
    differences = dict(enumerate([1.0, 2.0, 3.0, 4.0, 5.0, -1.0]))
    # their sum is 14; three of the 64 ways to put signs before 1 2 3 4 5 1 reach it: 16, and 14 with either 1 taken off
    assert compare_accuracies(differences, dict.fromkeys(range(6), 0.0), paired=True).p_value == pytest.approx(
        2 * 3 / 64
    )
    a, b = {0: 1.0, 1: 5.0, 2: 6.0, 3: 7.0}, {0: 2.0, 1: 3.0, 2: 4.0, 3: 0.0}
    # seven of the 70 halves of 0 ... 7 add up to 19 or more: 4567 3567 2567 1567 3467 2467 3457
    assert compare_accuracies(a, b, paired=False).p_value == pytest.approx(2 * 7 / 70)


def test_pairs_are_of_the_seeds_that_both_have():
    comparison = compare_accuracies({0: 0.5, 1: 0.7, 5: 0.9}, {1: 0.6, 0: 0.5, 2: 0.1}, paired=True)
    assert comparison.difference == pytest.approx(0.05) and comparison.floor == 0.5
    assert compare_accuracies({0: 0.5}, {1: 0.5}, paired=True) is None


def test_a_single_run_is_never_tested():
    comparison = compare_accuracies({0: 0.9}, {seed: seed / 100 for seed in range(39)}, paired=False)
    assert comparison.p_value is None and verdicts([comparison])[0].startswith("none, N is too small")


@pytest.mark.parametrize(
    ("effect", "paired", "count"), [(1, True, 10), (0.5, True, 34), (1, False, 17), (0.5, False, 64)]
)
def test_the_seeds_that_would_show_a_difference_are_the_textbooks(effect, paired, count):
    """Cohen's d of 1 and 0.5, 80 % power, 5 % two-sided: 10 and 34 pairs, 17 and 64 per group."""
    deviation = 0.01 / effect * (1 if paired else math.sqrt(2))  # two single runs differ by more than one varies
    assert seeds_to_see(0.01, deviation, paired) == count
    values = {seed: 0.5 + 0.003 * seed for seed in range(5)}
    base = {seed: 0.4 + 0.003 * (seed * 2 % 5) for seed in range(5)}
    differences = [values[seed] - base[seed] for seed in range(5)]
    expected = seeds_to_see(0.005, summarise(differences)[1], paired=True)
    assert compare_accuracies(values, base, paired=True).enough == expected


def test_holm_by_hand():
    assert (
        holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([0.9, 0.8]) == [1, 1] and holm([]) == []
    )


@pytest.mark.parametrize(("paired", "comparisons", "seeds"), [(False, 1, 4), (True, 1, 6), (False, 6, 5), (True, 6, 8)])
def test_how_many_seeds_would_do(paired, comparisons, seeds):
    """So many give each comparison of a table a verdict if it can have one, and one seed fewer gives none."""
    for number in (seeds - 1, seeds):
        low, high = ({seed: base + seed / 1000 for seed in range(number)} for base in (0.1, 0.9))
        lines = verdicts([compare_accuracies(high, low, paired=paired) for _ in range(comparisons)])
        assert all(line.startswith("better" if number == seeds else "none") for line in lines)
        assert number == seeds or all(line.endswith(f"; {seeds} seeds per row would do") for line in lines)


def test_no_verdict_where_the_correction_puts_it_out_of_reach():
    """Four seeds against four reach 0.029 alone, and 0.057 beside another comparison; too few are not counted."""
    strong, weak = Comparison(0.1, None, 2 / 70, 2 / 70), Comparison(-0.1, None, 0.25, None)
    small = "none, N is too small: p cannot go below"
    assert verdicts([strong, weak]) == ["better, p = 0.029", f"{small} 0.25; 5 seeds per row would do"]
    assert verdicts([strong, strong]) == [f"{small} 0.0571; 5 seeds per row would do"] * 2
    six = Comparison(-0.1, None, 2 / 924, 0.01)
    assert verdicts([six, six._replace(p_value=0.3)]) == ["worse, p = 0.02", "no difference shown, p = 0.3"]


# Groups and tables


def test_the_listing_has_a_line_for_runs_that_differ_in_the_seed_alone(measured, capsys):
    write_measured(measured, "drop/plain", 7, 0.9, args={"lr": 0.7})  # another experiment under that name
    (measured / "maps").mkdir()
    (measured / "maps" / "x.json").write_text("{}")
    out = lines_of(capsys, "--results", measured)
    assert [line.split() for line in out[1:]] == [
        ["alone", "cifar10", "2", "12,345", "43.21", "%", "-", "1", "AMD", "EPYC,", "bfloat16"],
        [
            "drop/better",
            "cifar10",
            "2",
            "1,000,000",
            "62.00",
            "±",
            "2.65",
            "%",
            "55.43",
            "to",
            "68.57",
            "3",
            "AMD",
            "EPYC,",
            "bfloat16",
        ],
        [
            "drop/plain",
            "cifar10",
            "2",
            "1,000,000",
            "52.00",
            "±",
            "2.00",
            "%",
            "47.03",
            "to",
            "56.97",
            "3",
            "AMD",
            "EPYC,",
            "bfloat16",
        ],
        ["drop/plain", "cifar10", "2", "1,000,000", "90.00", "%", "-", "1", "AMD", "EPYC,", "bfloat16"],
    ]
    assert len({line.index("AMD") for line in out[1:]} | {out[0].index("device")}) == 1


def test_nothing_measured_yet(tmp_path, capsys):
    assert lines_of(capsys, "--results", tmp_path) == [f"there are no runs in {tmp_path} yet"]


def test_what_cannot_be_read_is_named_and_left_out(measured, capsys):
    (measured / "broken.json").write_text("{")
    (measured / "list.json").write_text("[]")
    (measured / "empty.json").write_text("{}")
    write_measured(measured, "odd", 0, "much")
    write_measured(measured, "alone-copy", 0, 0.5, params=12_345).rename(measured / "alone.json")
    groups = group_runs(read_runs(measured))
    assert {group.name: len(group.runs) for group in groups} == {"alone": 1, "drop/better": 3, "drop/plain": 3}
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 5 and all(line.startswith(f"warning: {measured}") for line in warnings)
    for said in (
        "broken.json is left out",
        "list.json",
        "it has no script",
        "test_accuracy makes no sense",
        "has the same arguments and seed",
    ):
        assert said in "\n".join(warnings)


def old_and_new(folder, script, command, **changes):
    """Two seeds of one command: a result of today, and one without the arguments that are newer than it."""
    args = all_arguments(script, given_arguments(script_parser(script), command.split()))
    newer = ("compile", "crop_pct", "drop_last", "attention", "pad", "opt_betas")
    old = {name: value for name, value in args.items() if name not in newer}
    if args["gamma"] is None:  # without effect; recorded with its default now
        args["gamma"] = 0.1
    for seed, known in ((0, old), (1, args | changes)):
        path = write_measured(folder, "row", seed, 0.5, script=script)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"args": known | {"seed": seed}}))


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("train_vit.py", "--recipe strong --epochs 5"),
        ("train_cct.py", "--model cct_2_3x2 --epochs 10"),
        ("train_resnet_attn.py", "--recipe woof"),  # which has opt_betas of its own, drop_last and crop_pct
    ],
)
def test_new_seeds_of_a_row_join_those_without_newer_arguments(tmp_path, script, command, capsys):
    old_and_new(tmp_path, script, command)
    [group] = group_runs(read_runs(tmp_path))
    assert list(group.accuracies("test")) == [0, 1]
    old_and_new(tmp_path, script, command, crop_pct=0.7)
    assert len(group_runs(read_runs(tmp_path))) == 2


def test_an_old_result_fits_a_row_that_names_a_newer_argument(tmp_path, capsys):
    old_and_new(tmp_path / "p", "train_vit.py", "--epochs 5")
    plan = tmp_path / "p.toml"
    command = '"--epochs 5 --attention softmax --no-drop-last"'
    plan.write_text(f'title = "T"\n[[rows]]\nname = "row"\nscript = "train_vit.py"\narguments = {command}\n')
    fitting = fitting_runs(read_plan(plan), read_runs(tmp_path))
    assert list(fitting["row"]) == [0, 1] and not capsys.readouterr().err
    plan.write_text(plan.read_text().replace("--no-drop-last", "--drop-last"))
    assert not fitting_runs(read_plan(plan), read_runs(tmp_path))["row"]


def test_a_recipe_that_no_longer_exists_is_left_as_it_is(tmp_path):
    write_measured(tmp_path, "row", 0, 0.5, args={"recipe": "better"})
    [run] = read_runs(tmp_path)
    assert "attention" not in run.result["args"]


def write_own(folder, seed, accuracy, **changes):
    """A run's folder as training leaves it."""
    path = write_measured(folder, "x", seed, accuracy, curve=(0.1, accuracy), **changes)
    path.with_suffix(".csv").rename(folder / "log.csv")
    path.rename(folder / "result.json")


def test_folders_of_runs_are_compared_where_they_are(tmp_path, capsys, monkeypatch):
    """Seeds belong together by their arguments, whatever their folders are called; there need be no results/."""
    monkeypatch.chdir(tmp_path)
    checkpoints = Path("checkpoints")
    for seed, (name, accuracy) in enumerate([("vit", 0.5), ("vit-2", 0.52), ("again/vit", 0.54)]):
        write_own(checkpoints / name, seed, accuracy)
    for seed in range(3):
        write_own(checkpoints / f"p/row-seed-{seed}", seed, 0.6 + seed / 100, args={"lr": 0.2})
    write_own(checkpoints / "then", 3, 0.9, init_from="vit")  # the same arguments, from a trunk
    names = [checkpoints / name for name in ("vit", "vit-2", "again/vit", "p", "then")]
    out = lines_of(capsys, *names, "--plot", "own.png")
    assert [line.split()[0] for line in out[1:4]] == ["checkpoints/vit", "checkpoints/p/row", "checkpoints/then"]
    assert "52.00 ± 2.00 %" in out[1] and "61.00 ± 1.00 %" in out[2] and "90.00 %" in out[3]
    assert out[6].startswith("checkpoints/p/row - checkpoints/vit") and Image.open("own.png").size == (960, 600)
    write_own(checkpoints / "copy", 0, 0.5)
    out = lines_of(capsys, checkpoints / "vit", checkpoints / "copy")  # each seed counts once
    assert len(out) == 3 and "50.00 %" in out[1]
    shutil.rmtree(checkpoints / "copy")
    absolute = lines_of(capsys, *(tmp_path / name for name in names[:4]))
    assert "52.00 ± 2.00 %" in absolute[1] and "61.00 ± 1.00 %" in absolute[2]
    with pytest.raises(UserError, match=r"checkpoints/again/vit/maps: there is no result.json in it"):
        Path("checkpoints/again/vit/maps").mkdir()
        compare.main(["checkpoints/again/vit/maps"])
    listed = lines_of(capsys, "--results", "checkpoints")
    assert [line.split()[0] for line in listed[1:]] == ["again/vit", "p/row", "then", "vit", "vit-2"]


def test_what_others_report_stands_beside_what_was_measured(measured, plan, capsys):
    plan.write_text(plan.read_text() + 'published = "92.6 (survey)"\n')
    out = lines_of(capsys, "--results", measured, plan)
    assert out[1].split()[-2:] == ["published", "device"]
    assert out[2].endswith("3              -  AMD EPYC, bfloat16") and out[4].endswith("-  92.6 (survey)  -")
    text = compare.filled_tables(f"<!-- table: {plan} -->\n<!-- end table -->\n", measured)
    assert "published" not in text  # the row that has one is not measured


def test_two_groups_side_by_side(measured, capsys):
    out = "\n".join(lines_of(capsys, "--results", measured, "plain", measured / "drop/better-seed-1.json"))
    assert (
        "drop/better - drop/plain  unpaired  +10.00  +4.52 to +15.48                     347  none, N is too small: p cannot go below 0.1"
        in out
    )
    assert "permutation" not in out
    out = "\n".join(lines_of(capsys, "--results", measured, "--paired", "drop/plain", "drop/better"))
    assert (
        "  paired  +10.00  +7.52 to +12.48                      34  none, N is too small: p cannot go below 0.25" in out
    )


def test_with_enough_seeds_there_is_a_verdict(measured, capsys):
    for seed in (3, 4):
        write_measured(measured, "drop/plain", seed, 0.5)
        write_measured(measured, "drop/better", seed, 0.6, args={"lr": 0.2})
    out = "\n".join(lines_of(capsys, "--results", measured, "plain", "better"))
    assert "better, p = 0.0079\n\np: two-sided permutation test over seeds, exact" in out  # 2 of 252


def test_rows_that_start_from_one_trunk_are_compared_by_seed(measured, tmp_path, capsys):
    """One point better on every seed, where the seeds lie ten points apart: only pairs can show it."""
    starts = 'script = "train_resnet_attn.py"\narguments = ""\n'
    trunk = f'title = "T"\nseeds = 6\n[[rows]]\nname = "trunk"\n{starts}'
    end = f'[[rows]]\nname = "end"\n{starts}init_from = "trunk"\n'
    path = tmp_path / "p.toml"
    path.write_text(trunk + end + end.replace('"end"', '"block"') + 'against = "end"\n')
    for seed in range(6):
        for name, accuracy in (("trunk", 0.5), ("end", 0.3 + seed / 10), ("block", 0.31 + seed / 10)):
            start = None if name == "trunk" else f"trunk-seed-{seed}"
            write_measured(measured, f"p/{name}", seed, accuracy, script="train_resnet_attn.py", init_from=start)
    lines = lines_of(capsys, "--results", measured, str(path))
    expected = "block - end paired +1.00 +1.00 to +1.00 2 better, p = 0.031"
    assert expected.split() in [line.split() for line in lines]


def test_a_plan_may_say_that_seeds_are_paired(measured, plan, capsys):
    plan.write_text(plan.read_text().replace("seeds = 3", "seeds = 3\npaired = true"))
    out = "\n".join(lines_of(capsys, "--results", measured, plan))
    assert "better - plain  paired  +10.00  +7.52 to +12.48" in out


def test_another_dataset_is_not_compared(measured, capsys):
    write_measured(measured, "hard", 0, 0.3, dataset="cifar100")
    out = lines_of(capsys, "--results", measured, "plain", "hard")
    assert out[-2] == "hard and drop/plain are not compared: cifar10 and cifar100"


def test_by_validation_accuracy(measured, capsys):
    for seed, accuracy in enumerate([0.70, 0.80]):
        write_measured(measured, "tuned", seed, 0.1, val_accuracy=accuracy)
    out = lines_of(capsys, "--results", measured, "--by", "val", "tuned", "alone")
    assert "val accuracy" in out[0] and "75.00 ± 7.07 %" in out[1] and " - " in out[2] and len(out) == 4


def test_a_plan_against_its_baseline(measured, plan, capsys):
    out = lines_of(capsys, "--results", measured, plan)
    assert out[0] == "A title (drop)" and [line.split()[0] for line in out[2:5]] == ["plain", "better", "open"]
    assert "not measured yet" in out[4] and out[7].startswith("better - plain") and len(out) == 9


# README.md


def test_tables_between_markers(measured, plan, tmp_path, capsys):
    readme = tmp_path / "README.md"
    before = f"# Title\n\n<!-- table: {plan} -->\nold\n<!-- end table -->\n\ntext\n"
    readme.write_text(before)
    compare.main(["--readme", str(readme), "--results", str(measured)])
    lines = readme.read_text().splitlines()
    assert lines[2:9] == [
        f"<!-- table: {plan} -->",
        f"A title, `python campaign.py {plan}`:",
        "",
        "| name | dataset | epochs | parameters | test accuracy | 95 % interval | N | device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| plain | cifar10 | 2 | 1,000,000 | 52.00 ± 2.00 % | 47.03 to 56.97 | 3 | AMD EPYC, bfloat16 |",
        "| better | cifar10 | 2 | 1,000,000 | 62.00 ± 2.65 % | 55.43 to 68.57 | 3 | AMD EPYC, bfloat16 |",
    ]
    assert lines[9:] == ["<!-- end table -->", "", "text"]
    assert compare.filled_tables(readme.read_text(), measured) == readme.read_text() != before


def test_a_gpu_has_its_minutes_beside_its_name(measured, plan):
    about = {"device": "NVIDIA T4", "device_type": "cuda"}
    for seed in range(3):
        write_measured(measured, "drop/better", seed, 0.6, args={"lr": 0.2}, seconds=60 * seed, **about)
    lines = compare.filled_tables(f"<!-- table: {plan} -->\n<!-- end table -->\n", measured).splitlines()
    assert lines[3].endswith("| N | minutes per run | device |") and lines[5].endswith("| 3 | - | AMD EPYC, bfloat16 |")
    assert lines[6].endswith("| 3 | 1.0 | NVIDIA T4, bfloat16 |")


def test_a_plan_that_was_never_run_is_one_line(plan, tmp_path):
    text = compare.filled_tables(f"<!-- table: {plan} -->\n<!-- end table -->\n", tmp_path)
    assert text.splitlines()[1:] == [f"Not measured yet: `python campaign.py {plan}`.", "<!-- end table -->"]


def test_a_table_by_validation_accuracy(measured, plan):
    for seed in range(3):
        write_measured(measured, "drop/plain", seed, 0.5, val_accuracy=0.7)
    text = compare.filled_tables(f"<!-- table: {plan} by val -->\n<!-- end table -->\n", measured)
    assert f"<!-- table: {plan} by val -->" in text and "| epochs | parameters | val accuracy |" in text
    assert "| plain | cifar10 | 2 | 1,000,000 | 70.00 ± 0.00 % |" in text


def test_ratios_of_speed_and_what_they_cost(tmp_path):
    about = {"device": "AMD EPYC", "threads": 2, "torch": "2.15", "peak_gflops": {"float32": 400, "bfloat16": 800.4}}
    vit = {"ours": [39, 30, 20], "ours in float32": [14, 16, 15], "timm": [10, 11, 9]}
    shares = {"vit": {"ours": ("bfloat16", 0.491), "ours in float32": ("float32", 0.6)}}
    cost = {"gflop_per_image": {"vit": 1.308}, "share_of_peak": shares, "data_share": {"vit": 0.0091}}
    held = {"vit": {way: 2**30 for way in vit}}
    (tmp_path / "speed").mkdir()
    file = tmp_path / "speed" / "train.json"
    results = {**about, "images_per_second": {"vit": vit, "cct": {"ours": [1], "other": [4]}}}
    for more, rows in (({}, 2), ({**cost, "peak_bytes": held}, 5)):
        file.write_text(json.dumps({**results, **more}))
        text = compare.filled_tables("<!-- speed: train -->\nold\n<!-- end table -->\nafter\n", tmp_path)
        lines = text.splitlines()
        peaks = "400 GFLOP/s in float32, 800 GFLOP/s in bfloat16"
        assert lines[1] == f"AMD EPYC, 2 CPU threads, torch 2.15; matrix product: {peaks}:"
        assert "| what | against | times as fast: ours | times as fast: ours in float32 |" in lines
        assert lines[-1] == "after"
        assert "| vit | timm | 3.0 | 1.5 |" in lines and "| cct | other | 0.2 | - |" in lines
        assert len([line for line in lines if line.startswith(("| vit", "| cct"))]) == rows
    assert "| vit | ours | 1.31 | 49 % in bfloat16 | 0.9 % | 1,024 |" in lines
    assert "| vit | timm | - | - | - | 1,024 |" in lines
    file.write_text("{}")
    with pytest.raises(UserError, match="train.json was not written by a benchmark"):
        compare.filled_tables("<!-- speed: train -->\n<!-- end table -->", tmp_path)
    text = compare.filled_tables("<!-- speed: gpu -->\n<!-- end table -->", tmp_path)
    assert text.splitlines()[1] == "Not measured yet: `gpu`."


# Score and plots


def test_the_score_and_what_was_published():
    assert parameter_score(0.75145, 3_191_397) == pytest.approx(161.2, abs=0.05)
    scores = {point.name: round(parameter_score(point.accuracy, point.params)) for point in PUBLISHED}
    assert scores == {
        "MicroNet": 2131,
        "ZenNet-0.5M": 1980,
        "CondenseNet-86": 1223,
        "HCGNet-A1": 1079,
        "CCT-6/3x1": 212,
        "CCT-7/3x1": 187,
        "CCT-6/3x1, report": 161,
        "CCT-6/3x2": 134,
        "CCT-7/3x2": 128,
        "CCT-4/3x2": 95,
        "CVT-7/4": 81,
        "CVT-6/4": 71,
        "ViT-B/16, report": 13,
        "CCT-2/3x2": -1093,
        "ViT, report": -1282,
    }
    assert list(scores) == sorted(scores, key=scores.get, reverse=True)


@pytest.mark.parametrize(
    "name", ["cvt_7_4", "cvt_6_4", "cct_2_3x2", "cct_4_3x2", "cct_6_3x2", "cct_7_3x2", "cct_7_3x1"]
)
def test_published_sizes_are_those_of_the_models(name):
    family, layers, rest = name.split("_")
    [point] = [point for point in PUBLISHED if point.name == f"{family.upper()}-{layers}/{rest}"]
    assert point.params == count_parameters(build_model(name))


def test_scores_are_of_cifar100_with_both_counts(measured, capsys):
    for seed, accuracy in enumerate([0.71, 0.73]):
        write_measured(measured, "hard", seed, accuracy, dataset="cifar100", params_without_embedding=800_000)
    write_measured(measured, "harder", 0, 0.75, dataset="cifar100")
    out = lines_of(capsys, "--results", measured, "--score", "--plot", measured / "score.png")
    assert out[1].split() == ["harder", "75.00", "%", "1", "1,000,000", "500", "-", "-", "here"]
    assert out[2].split() == ["hard", "72.00", "%", "2", "1,000,000", "200", "800,000", "250", "here"]
    assert (
        len(out) == 4 + len(PUBLISHED)
        and out[-1].endswith("score.png")
        and Image.open(measured / "score.png").size == (960, 660)
    )
    lines_of(capsys, "--results", measured / "drop", "--score", "--plot", measured / "published.png")


def test_curves(measured, capsys, tmp_path):
    plot = tmp_path / "curves.png"
    lines_of(capsys, "--results", measured, "plain", "better", "alone", "--plot", plot)
    assert Image.open(plot).size == (960, 600)
    with pytest.raises(UserError, match=r"--plot .*none of these runs has its log"):
        compare.main(["--results", str(measured), "alone", "--plot", str(plot)])
    (measured / "alone-seed-0.csv").write_text("epoch,test_accuracy\n1,much\n")
    with pytest.raises(UserError):
        compare.main(["--results", str(measured), "alone", "--plot", str(plot)])
    err = capsys.readouterr().err
    assert (
        f"warning: {measured / 'alone-seed-0.csv'} is left out of the plot: No such file" in err
        and "is not the log of" in err
    )


BAD_COMPARISONS = {
    "nothing: there is no such folder, and no such run in": ["nothing"],
    "matches 2 groups of runs; name a file of one": ["plain"],
    "x.toml cannot be read": ["x.toml"],
    "speed.toml has no rows to compare": ["plans/speed.toml"],
    "no effect: names of runs with --score": ["alone", "--score"],
    "no effect: names of runs with --readme": ["alone", "--readme", "README.md"],
    "no effect: --plot without names of runs": ["--plot", "x.png"],
    "no effect: --plot with --readme": ["--plot", "x.png", "--readme", "README.md"],
    "no effect: --paired without names of runs": ["--paired"],
    "no effect: --paired with --score": ["--paired", "--score"],
    "--paired needs the names of two runs": ["--paired", "alone", "plans/nano.toml"],
    "no effect: --by with --score": ["--by", "val", "--score"],
    "no effect: --by with --readme": ["--by", "val", "--readme", "README.md"],
    "no effect: --score with --readme": ["--score", "--readme", "README.md"],
    "--readme README.txt cannot be read": ["--readme", "README.txt"],
    "there is no line <!-- table": ["--readme", "requirements.txt"],
    "invalid choice: 'train'": ["--by", "train"],
    "there is no such folder": ["--results", "nowhere"],
}


@pytest.mark.parametrize("said", BAD_COMPARISONS)
def test_bad_input_is_one_line(measured, said):
    write_measured(measured, "other/plain", 0, 0.5)
    with pytest.raises(UserError) as error:
        compare.main(["--results", str(measured), *BAD_COMPARISONS[said]])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_marker_that_is_not_closed(measured, plan):
    with pytest.raises(UserError, match=r"is not followed by <!-- end table -->"):
        compare.filled_tables(f"<!-- table: {plan} -->\ntext\n", measured)
