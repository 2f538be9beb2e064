"""What a campaign does on a machine that is lent for minutes: parts, measurements, forecasts, carrying on elsewhere."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import same_weights
from test_campaign import PLAN, calls, names, workplace  # noqa: F401

import campaign
from campaigning import carrying
from campaigning.forecast import Forecast
from campaigning.jobs import Job, open_jobs
from comparing.plans import read_parts, read_plan
from errors import UserError

PARTS = 'title = "All"\n' + "".join(
    f'[[parts]]\nplan = "{plan}"\n{more}'
    for plan, more in (("p.toml", "seeds = 1\n"), ("q.toml", ""), ("p.toml", ""), ("m.toml", ""))
)
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
from training.flag_types import Parser

def measure_parser():
    parser = Parser(allow_abbrev=False)
    for flag in ("--out", "--steps", "--device", "--data-dir"):
        parser.add_argument(flag)
    return parser

if __name__ == "__main__":
    Path(measure_parser().parse_args().out).write_text(json.dumps(sys.argv[1:]))
"""
MAP_FAKE = """
import json, sys
from pathlib import Path
from training.flag_types import Parser

def map_parser():
    parser = Parser(allow_abbrev=False)
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


@pytest.fixture
def parts(workplace, monkeypatch):  # noqa: F811
    """The workplace of test_campaign.py with three plans, and all.toml, which is made of them."""
    for name, text in (("all.toml", PARTS), ("q.toml", OTHER), ("m.toml", MEASURED)):
        Path(name).write_text(text)
    for name, text in (("measure_fake.py", MEASURE_FAKE), ("map_fake.py", MAP_FAKE)):
        Path(name).write_text(text)
    monkeypatch.setitem(campaign.SCRIPTS, "measure_fake", "measure_parser")
    monkeypatch.setitem(campaign.SCRIPTS, "map_fake.py", "map_parser")
    return workplace


def parsed(*flags):
    return campaign.campaign_parser().parse_args(list(map(str, flags)))


def test_parts_are_done_in_order_and_what_is_done_once(parts, capfd):
    campaign.main(["all.toml", "--device", "cpu"])
    assert [line.partition("--out-dir checkpoints/")[2].split(" --resume")[0] for line in calls()] == [
        *("p --run-name plain-seed-0", "p --run-name other-seed-0", "q --run-name two-seed-0"),
        *("p --run-name plain-seed-1", "p --run-name other-seed-1"),
    ]
    said = capfd.readouterr().out
    assert "run 7 of 7: m/map," in said and said.count("A title (p)") == 1 and "Other (q)" in said
    speed, drawn = (json.loads(Path("results/m", name).read_text()) for name in ("speed-cpu.json", "map.json"))
    assert speed == ["--out", "results/m/speed-cpu.json", "--device", "cpu", "--steps", "3"]
    assert drawn == ["checkpoints/q/two-seed-0", "--evaluate", "--device", "cpu"]
    campaign.main(["all.toml", "--device", "cpu"])
    assert not Path("calls.txt").exists() and "--- run" not in capfd.readouterr().out


def test_the_list_of_parts(parts, capsys):
    campaign.main(["all.toml", "--device", "cpu", "--list"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "none", "none", "-", "too", "long"] in lines
    assert ["map", "none", "1", "-", "map_fake.py", "q/two"] in lines
    assert ["plain", "none", "0", "1", "-", "train_fake.py", "--lr", "0.1"] in lines


def test_a_map_waits_for_its_run(parts, capfd):
    campaign.main(["m.toml", "--device", "cpu"])
    assert "m/map waits for checkpoints/q/two-seed-0" in capfd.readouterr().out and names("results/m") == [
        "speed-cpu.json"
    ]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("all.toml", 'plan = "q.toml"', 'plan = "z.toml"', "z.toml cannot be read"),
        ("all.toml", 'plan = "q.toml"', 'paln = "q.toml"', "all.toml, part 2: unknown key paln"),
        ("all.toml", "[[parts]]", "[[rows]]\n[[parts]]", "all.toml: where there are parts"),
        ("m.toml", "q/two", "q/three", "all.toml: q/three, for map, is no row of a part"),
        ("m.toml", "--steps 3", "--stpes 3", "m.toml, measurement 1 (speed): unrecognized arguments"),
        ("m.toml", '"map"', '"speed"', "m.toml: two rows are named speed"),
    ],
)
def test_bad_parts_and_measurements(parts, file, old, new, said):
    Path(file).write_text(Path(file).read_text().replace(old, new, 1))
    with pytest.raises(UserError) as error:
        campaign.main(["all.toml"])
    assert str(error.value).startswith(said)


def test_a_plan_made_of_others_is_no_table(parts):
    with pytest.raises(UserError, match="all.toml is made of other plans: p.toml, q.toml"):
        read_plan("all.toml", campaign.script_parser)


# Forecasts


def write_log(folder, seconds):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("seconds\n" + "".join(f"{value}\n" for value in seconds))


def test_times_follow_from_epochs_and_from_finished_runs(parts, monkeypatch):
    """Of four epochs, without the first, which compiles; by another seed on such a device; with what it starts from."""
    Path("p.toml").write_text(PLAN + 'init_from = "plain"\n')
    [(plan, _)] = read_parts("p.toml", campaign.script_parser)
    plain, other = plan.rows
    args = parsed("p.toml", "--device", "cpu")
    forecast = Forecast({"p": {"plain": {}, "other": {}}}, args)
    folder = Path("checkpoints/p")
    assert forecast.minutes(Job(plan, plain, 0)) is None
    write_log(folder / "plain-seed-0", [100])
    assert forecast.minutes(Job(plan, plain, 0)) is None
    write_log(folder / "plain-seed-0", [100, 12])
    assert forecast.minutes(Job(plan, plain, 0)) == pytest.approx(2 * 12 / 60)
    assert forecast.minutes(Job(plan, other, 0)) is None
    write_log(folder / "other-seed-0", [1, 30, 30, 30])
    assert forecast.minutes(Job(plan, other, 0)) == pytest.approx(2 * 12 / 60)
    for name in ("result.json", "last.pt"):
        (folder / "plain-seed-0" / name).touch()
    assert forecast.minutes(Job(plan, other, 0)) == 0
    campaign.main(["p.toml", "--seeds", "1", "--device", "cpu", "--out-dir", "elsewhere"])
    [run] = [run for run in campaign.read_runs("results") if run.name == "p/plain"]
    forecast.found["p"]["plain"][0] = run
    assert forecast.minutes(Job(plan, plain, 1)) is None  # it was on "none"
    monkeypatch.setattr(forecast, "device", "none")
    assert forecast.minutes(Job(plan, plain, 1)) == 1 and forecast.minutes(Job(plan, other, 1)) is None


def test_the_first_that_fits_is_next(parts):
    [(plan, _)] = read_parts("p.toml", campaign.script_parser)
    args = parsed("p.toml", "--device", "cpu")
    jobs = open_jobs(read_parts("p.toml", campaign.script_parser), {"p": {"plain": {}, "other": {}}}, args)
    forecast = Forecast({"p": {"plain": {}, "other": {}}}, args)
    for job, seconds in zip(jobs[:3], (600, 300, 60), strict=True):
        write_log(Path("checkpoints/p") / f"{job.row.name}-seed-{job.seed}", [1, seconds, seconds])  # one is left
    assert [forecast.next_job(jobs[:3], left).name for left in (30, 7, 3, 0.5)] == [
        *("p/plain, seed 0", "p/other, seed 0", "p/plain, seed 1", "p/plain, seed 0")
    ]
    assert forecast.next_job(jobs, 0.5) is jobs[3]  # whose time is not known


def test_a_run_is_left_for_a_shorter_one(parts, capfd):
    """plain turns out to need ten minutes when its epochs are written; other is known to need one."""
    script = Path("train_fake.py").read_text()
    Path("train_fake.py").write_text(
        script.replace(
            "        time.sleep(20)",
            "        (folder / 'log.csv').write_text('seconds\\\\n5\\\\n600\\\\n600\\\\n')\n        time.sleep(20)",
        ).replace("\\\\n", "\\n")
    )
    Path("p.toml").write_text(PLAN.replace("--lr 0.1", "--lr 0.1 --wait 0").replace("seeds = 2", "seeds = 1"))
    write_log(Path("checkpoints/p/other-seed-0"), [1, 60, 60])
    started = time.monotonic()
    campaign.main(["p.toml", "--minutes", "5", "--device", "cpu"])
    assert time.monotonic() - started < 15
    assert [line.partition("--run-name ")[2].split()[0] for line in calls()] == [
        *("plain-seed-0", "other-seed-0", "plain-seed-0")
    ]
    said = capfd.readouterr().out
    assert "run 1 of 2: p/plain, seed 0, time not known yet" in said and "other, seed 0, some 1.0 minutes" in said
    assert "p/plain, seed 0 needs 10.0 minutes more, 5.0 are left: p/other, seed 0 first" in said.replace("4.9", "5.0")


# Carrying on elsewhere


@pytest.fixture
def tiny_plan(folder_flags, tmp_path):
    """A plan of two rows of train_vit.py, the second starting from nothing; four epochs each."""
    at = folder_flags.index("--out-dir")
    flags = json.dumps([*folder_flags[:at], *folder_flags[at + 2 :], "--epochs", "4", "--val-fraction", "0.2"])
    row = '[[rows]]\nname = "{0}"\nscript = "train_vit.py"\narguments = {1}\n'
    plan = tmp_path / "tiny.toml"
    plan.write_text('title = "Tiny"\n' + row.format("a", flags) + row.format("b", flags[:-1] + ', "--lr", "0.1"]'))
    return plan


def test_a_campaign_goes_on_in_another_folder(tiny_plan, tmp_path, capfd, monkeypatch):
    """The first row is finished and the second cut; elsewhere it ends with the weights of a run that was not cut."""
    monkeypatch.setattr(carrying, "PIECE", 60_000)

    def places(name):
        return ["--out-dir", tmp_path / name / "runs", "--results", tmp_path / name / "results"]

    def run(*flags):
        campaign.main([str(tiny_plan), *map(str, flags)])

    run(*places("whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "here")
    for path in ("results/tiny/b-seed-0.json", "results/tiny/b-seed-0.csv"):
        (tmp_path / "here" / path).unlink()
    shutil.rmtree(tmp_path / "here" / "runs" / "tiny" / "b-seed-0")
    carried = tmp_path / "carried"
    run(*places("here"), "--minutes", "0.0005", "--carry-out", carried)
    assert "stopped in epoch 1 after step" in capfd.readouterr().out
    assert names(tmp_path / "here" / "results" / "tiny") == ["a-seed-0.csv", "a-seed-0.json"]
    pieces = list(carried.glob("carry-*"))
    assert set(carried.iterdir()) == {*pieces, carried / "carry.json", carried / "results.tar"}
    assert len(pieces) > 1 and max(path.stat().st_size for path in pieces) == 60_000
    run(*places("there"), "--carry-in", carried)
    said = capfd.readouterr().out
    assert "run 1 of 1: tiny/b, seed 0" in said and "carried in from" in said
    there, whole = (tmp_path / name / "runs" / "tiny" for name in ("there", "whole"))
    assert same_weights(there / "b-seed-0" / "last.pt", whole / "b-seed-0" / "last.pt")
    assert names(tmp_path / "there" / "results" / "tiny") == names(tmp_path / "whole" / "results" / "tiny")
    result = json.loads((tmp_path / "there" / "results" / "tiny" / "b-seed-0.json").read_text())
    assert (result["args"]["lr"], result["seed"], result["epochs"], result["dataset_name"]) == (0.1, 0, 4, "pets")
    kept = torch.load(there / "a-seed-0" / "last.pt", weights_only=True)
    assert kept["optimizer"] == {} and set(names(there / "a-seed-0")) == {"last.pt", "log.csv", "result.json"}
    trained = torch.load(whole / "a-seed-0" / "last.pt", weights_only=True)["weights"]
    assert all(torch.equal(kept["weights"][name], trained[name]) for name in trained)

    for gone, further in (("result.json", True), ("last.pt", False)):  # what has come further here stays
        (there / "b-seed-0" / gone).unlink()
        run(*places("there"), "--carry-in", carried, "--list")
        epoch = torch.load(there / "b-seed-0" / "last.pt", weights_only=True)["epoch"]
        assert (epoch == 4) == further
    pieces[0].write_bytes(b"?" + pieces[0].read_bytes()[1:])
    with pytest.raises(UserError, match=rf"--carry-in .*: {pieces[0].name} is damaged"):
        run(*places("new"), "--carry-in", carried)
    pieces[0].unlink()
    with pytest.raises(UserError, match=f"{pieces[0].name} is missing, one of {len(pieces)} pieces"):
        run(*places("new"), "--carry-in", carried)
    with pytest.raises(UserError, match="there is no carry.json"):
        run(*places("new"), "--carry-in", tmp_path)
    assert not (tmp_path / "new" / "runs").exists()
    assert names(tmp_path / "new" / "results" / "tiny") == ["a-seed-0.csv", "a-seed-0.json"]  # as all results


def test_what_is_needed_goes_along_first(parts, monkeypatch):
    """Of seed 0 plain is finished and other, which starts from it, cut; of seed 1 both are finished."""
    Path("p.toml").write_text(PLAN + 'init_from = "plain"\n')
    [part] = plan_parts = read_parts("p.toml", campaign.script_parser)
    args = parsed("p.toml", "--device", "cpu")
    for name in ("plain-seed-0", "plain-seed-1", "other-seed-1", "other-seed-0"):
        folder = Path("checkpoints/p", name)
        folder.mkdir(parents=True)
        (folder / "last.pt").touch()
        if name != "other-seed-0":
            (folder / "result.json").touch()
    monkeypatch.setattr(
        carrying, "carried_run", lambda run: {"last.pt": bytes(200 if run.name == "other-seed-0" else 100)}
    )
    order = ["plain-seed-0", "other-seed-0", "other-seed-1", "plain-seed-1"]
    for most, taken in ((500, order), (300, order[:2]), (200, [order[0], order[2]]), (99, [])):
        monkeypatch.setattr(carrying, "MOST", most)
        members, left_behind = carrying.runs_to_carry(plan_parts, [Job(part.plan, part.plan.rows[1], 0)], args)
        assert list(members) == [f"p/{name}/last.pt" for name in taken]
        assert [path.name for path in left_behind] == [name for name in order if name not in taken]


def test_pieces_of_before_stay_until_those_that_follow_are_complete(parts, monkeypatch):
    monkeypatch.setattr(carrying, "carried_run", lambda run: {"last.pt": b"first"})
    campaign.main(["p.toml", "--seeds", "1", "--device", "cpu", "--carry-out", "carried"])
    before = carrying.read_pieces(Path("carried"))
    assert before == {f"p/{name}-seed-0/last.pt": b"first" for name in ("plain", "other")}
    write = carrying.write_atomically

    def no_manifest(path, *args):
        if path.name == "carry.json":
            raise OSError("no room")
        write(path, *args)

    monkeypatch.setattr(carrying, "carried_run", lambda run: {"last.pt": b"second"})
    again = "carried", read_parts("p.toml", campaign.script_parser), [], parsed("p.toml")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(carrying, "write_atomically", no_manifest)
        carrying.carry_out(*again)
    assert carrying.read_pieces(Path("carried")) == before and len(names("carried")) == 4
    carrying.carry_out(*again)
    assert set(carrying.read_pieces(Path("carried")).values()) == {b"second"} and len(names("carried")) == 3


def test_results_are_there_before_the_minutes_are_up(parts, monkeypatch):
    """A machine that is taken away while a run is at work leaves those of the runs before."""
    monkeypatch.setattr(campaign, "carry_out", lambda *args: None)
    campaign.main(["p.toml", "--device", "cpu", "--carry-out", "carried"])
    with pytest.raises(UserError, match="there is no carry.json that --carry-out wrote to its end"):
        campaign.main(["p.toml", "--list", "--carry-in", "carried", "--results", "elsewhere"])
    assert names("elsewhere/p") == names("results/p") and len(names("results/p")) == 8


# Dry runs


def test_a_dry_run_tries_every_row_and_keeps_nothing(tmp_path, capfd, monkeypatch):
    plan = tmp_path / "dry.toml"
    tiny = "--embed-dim 16 --depth 2 --num-heads 2 --epochs 160 --dataset cifar10"
    small = "--recipe survey --width 8 --epochs 30 --image-size 16"
    rows = [
        ("vit", "train_vit.py", tiny, ""),
        ("trunk", "train_resnet_attn.py", small, ""),
        ("then", "train_resnet_attn.py", f"{small} --attention graph --freeze trunk", 'init_from = "trunk"\n'),
    ]
    text = "".join(f'[[rows]]\nname = "{n}"\nscript = "{s}"\narguments = "{a}"\n{more}' for n, s, a, more in rows)
    plan.write_text(
        f'title = "Dry"\n{text}[[measurements]]\nname = "map"\nscript = "rollout.py"\ncheckpoint = "dry/vit"\n'
    )
    campaign.main([str(plan), "--dry", "--device", "cpu", "--results", str(tmp_path / "results")])
    said = capfd.readouterr().out
    assert "dry run 4 of 4: dry/map" in said and "the trunk is that of" in said and said.count("epoch 1/1") == 3
    assert not (tmp_path / "results").exists()
    plan.write_text(plan.read_text().replace("graph --freeze", "graph --patch-size 99 --freeze"))
    with pytest.raises(UserError, match=r"dry/then, seed 0: .*patch"):
        campaign.main([str(plan), "--dry", "--device", "cpu"])


@pytest.mark.slow
def test_the_headline_runs_dry(capfd):
    campaign.main(["plans/headline.toml", "--dry", "--device", "cpu"])
    said = capfd.readouterr().out
    total = int(said.partition("dry run 1 of ")[2].partition(":")[0])
    assert total > 40 and f"dry run {total} of {total}: maps/cct6-cifar10-strong" in said
