"""What a campaign does with several plans: their order, measurements, forecasts, dry runs."""

import json
import sys
from pathlib import Path

import pytest
from test_campaign import PLAN, calls, names, workplace  # noqa: F401

import campaign
from errors import UserError
from experiments import jobs, scripts
from experiments.dry import implied_flags
from experiments.jobs import Job, expected_minutes
from experiments.plans import read_plan
from experiments.runs import read_runs

OTHER = """
title = "Other"
[[rows]]
name = "one"
script = "train_fake.py"
not_run = "too long"
[[rows]]
name = "two"
script = "train_fake.py"
"""
MEASURED = """
title = "Measured"
[[measurements]]
name = "speed"
script = "measure_fake"
arguments = "--steps 3"
[[measurements]]
name = "map"
script = "map_fake.py"
checkpoint = "q/two"
"""
MEASURE_FAKE = """
import json, sys
from pathlib import Path
from training.flags import Parser

def measure_parser():
    parser = Parser(None)
    for flag in ("--out", "--steps", "--device", "--data-dir"):
        parser.add_argument(flag)
    return parser

if __name__ == "__main__":
    Path(measure_parser().parse_args().out).write_text(json.dumps(sys.argv[1:]))
"""
MAP_FAKE = """
import json, sys
from pathlib import Path
from training.flags import Parser

def map_parser():
    parser = Parser(None)
    parser.add_argument("checkpoint")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--device")
    return parser

if __name__ == "__main__":
    args = map_parser().parse_args()
    folder = Path(args.checkpoint) / "maps"
    folder.mkdir(exist_ok=True)
    if args.evaluate:
        (folder / "evaluation.json").write_text(json.dumps(sys.argv[1:]))
"""

ALL = ["p.toml", "q.toml", "m.toml"]


@pytest.fixture
def three_plans(workplace, monkeypatch):  # noqa: F811
    """The workplace of test_campaign.py with three plans."""
    for name, text in (("q.toml", OTHER), ("m.toml", MEASURED)):
        Path(name).write_text(text)
    for name, text in (("measure_fake.py", MEASURE_FAKE), ("map_fake.py", MAP_FAKE)):
        Path(name).write_text(text)
    monkeypatch.setitem(scripts.SCRIPTS, "measure_fake", "measure_parser")
    monkeypatch.setitem(scripts.SCRIPTS, "map_fake.py", "map_parser")
    return workplace


def parsed(*flags):
    return campaign.campaign_parser().parse_args(list(map(str, flags)))


def test_plans_are_done_in_order_and_what_is_done_once(three_plans, capfd):
    campaign.main([*ALL, "--device", "cpu"])
    assert [line.partition("--out-dir checkpoints/")[2].split(" --resume")[0] for line in calls()] == [
        *("p --run-name plain-seed-0", "p --run-name other-seed-0"),
        *("p --run-name plain-seed-1", "p --run-name other-seed-1", "q --run-name two-seed-0"),
    ]
    said = capfd.readouterr().out
    assert "run 7 of 7: m/map," in said and said.count("A title (p)") == 1 and "Other (q)" in said
    speed, drawn = (json.loads(Path("results/m", name).read_text()) for name in ("speed-cpu.json", "map.json"))
    assert speed == ["--out", "results/m/speed-cpu.json", "--device", "cpu", "--steps", "3"]
    assert drawn == ["checkpoints/q/two-seed-0", "--evaluate", "--device", "cpu"]
    campaign.main([*ALL, "--device", "cpu"])
    assert not Path("calls.txt").exists() and "--- run" not in capfd.readouterr().out


def test_the_list_of_plans(three_plans, capsys):
    campaign.main([*ALL, "--device", "cpu", "--list"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "none", "none", "-", "too", "long"] in lines
    assert ["map", "none", "1", "-", "map_fake.py", "q/two"] in lines
    assert ["plain", "none", "0", "1", "-", "train_fake.py", "--lr", "0.1"] in lines


def test_a_map_waits_for_its_run(three_plans, capfd):
    campaign.main(["m.toml", "--device", "cpu"])
    assert "m/map needs the run in checkpoints/q/two-seed-0" in capfd.readouterr().out and names("results/m") == [
        "speed-cpu.json"
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("m.toml", "--steps 3", "--stpes 3", "m.toml: measurement 1 (speed): unrecognized arguments"),
        ("m.toml", '"map"', '"speed"', "m.toml: two rows are named speed"),
    ],
)
def test_bad_measurements(three_plans, file, old, new, said):
    Path(file).write_text(Path(file).read_text().replace(old, new, 1))
    with pytest.raises(UserError) as error:
        campaign.main(ALL)
    assert str(error.value).startswith(said)


# Forecasts


def write_log(folder, seconds):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("seconds\n" + "".join(f"{value}\n" for value in seconds))


def test_times_follow_from_epochs_and_from_finished_runs(three_plans, monkeypatch):
    """Of four epochs, without the first, which compiles; by another seed on such a device; with what it starts from."""
    Path("p.toml").write_text(PLAN + 'init_from = "plain"\n')
    plan = read_plan("p.toml")
    plain, other = plan.rows
    args = parsed("p.toml", "--device", "cpu")
    found = {"p": {"plain": {}, "other": {}}}
    folder = Path("checkpoints/p")

    def minutes(row, seed):
        return expected_minutes(Job(plan, row, seed), found, args)

    assert minutes(plain, 0) is None
    write_log(folder / "plain-seed-0", [100])
    assert minutes(plain, 0) is None
    write_log(folder / "plain-seed-0", [100, 12])
    assert minutes(plain, 0) == pytest.approx(2 * 12 / 60)
    assert minutes(other, 0) is None
    write_log(folder / "other-seed-0", [1, 30, 30, 30])
    assert minutes(other, 0) == pytest.approx(2 * 12 / 60)
    for name in ("result.json", "last.pt"):
        (folder / "plain-seed-0" / name).touch()
    assert minutes(other, 0) == 0
    campaign.main(["p.toml", "--seeds", "1", "--device", "cpu", "--out-dir", "elsewhere"])
    [run] = [run for run in read_runs("results") if run.name == "p/plain"]
    found["p"]["plain"][0] = run
    assert minutes(plain, 1) is None  # it was on "none"
    monkeypatch.setattr(jobs, "device_name", lambda device: "none")
    assert minutes(plain, 1) == 1 and minutes(other, 1) is None
    # a finished run of another command is trained again: its log says nothing about that
    (folder / "plain-seed-0" / "result.json").write_text(json.dumps(run.result | {"args": {"lr": 0.7}}))
    write_log(folder / "plain-seed-0", [1, 1, 1, 1])
    assert minutes(plain, 0) == 1
    (folder / "plain-seed-0" / "last.pt").unlink()
    assert minutes(plain, 0) == 1


# Dry runs


def test_a_dry_run_takes_what_follows_from_the_dataset_that_it_replaces(tmp_path):
    plan = tmp_path / "p.toml"
    row = '[[rows]]\nname = "a"\nscript = "train_resnet_attn.py"\narguments = "--recipe strong --dataset imagewoof"'
    plan.write_text(f'title = "T"\n{row}\n')
    flags = ["--recipe", "strong", "--model", "xresnet50", "--image-size", "128"]
    assert implied_flags(read_plan(plan).rows[0]) == flags


def test_a_dry_run_tries_every_row_and_keeps_nothing(tmp_path, capfd, monkeypatch):
    plan = tmp_path / "dry.toml"
    tiny = "--embed-dim 16 --depth 2 --num-heads 2 --epochs 160 --dataset folder --data-dir photos --folds 9"
    tiny += " --group-by x --log wandb"
    small = "--recipe survey --width 8 --epochs 30 --image-size 16"
    rows = [
        ("vit", "train_vit.py", tiny, ""),
        ("shapes", "train_vit.py", "--dataset shapes --embed-dim 16 --num-heads 2", ""),
        ("trunk", "train_resnet_attn.py", small, ""),
        ("then", "train_resnet_attn.py", f"{small} --attention graph --freeze trunk", 'init_from = "trunk"\n'),
    ]
    text = "".join(f'[[rows]]\nname = "{n}"\nscript = "{s}"\narguments = "{a}"\n{more}' for n, s, a, more in rows)
    plan.write_text(
        f'title = "Dry"\n{text}[[measurements]]\nname = "map"\nscript = "rollout.py"\ncheckpoint = "dry/vit"\n'
    )
    monkeypatch.setitem(sys.modules, "wandb", None)  # a dry run is not logged
    campaign.main([str(plan), "--dry", "--device", "cpu", "--results", str(tmp_path / "results")])
    said = capfd.readouterr().out
    assert "dry run 5 of 5: dry/map" in said and "weights of" in said and said.count("epoch 1/1") == 4
    assert "recipe quick: folder" in said  # of the row on shapes
    assert not (tmp_path / "results").exists()
    plan.write_text(plan.read_text().replace("graph --freeze", "graph --patch-size 99 --freeze"))
    with pytest.raises(UserError, match=r"dry/then, seed 0: .*patch"):
        campaign.main([str(plan), "--dry", "--device", "cpu"])
