"""campaign.py: plans and the mistakes in them, what fits, the order of runs, stopping and going on, and failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

import campaign
from errors import UserError
from experiments import scripts
from experiments.plans import read_plan

# a training script of a tenth of a second: one seed fails, one waits to be stopped, the others leave a result
FAKE_SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from training.flags import Parser

def fake_parser():
    parser = Parser(None)
    for flag in ("--lr", "--seed", "--minutes", "--fail", "--wait"):
        parser.add_argument(flag, type=float)
    parser.add_argument("--recipe", choices=("report", "strong"))
    parser.add_argument("--overwrite", action="store_true")
    for flag in ("--data-dir", "--device", "--out-dir", "--run-name", "--resume", "--init-from"):
        parser.add_argument(flag)
    return parser

def chosen_recipe(given):
    return "report", {"epochs": 4}

if __name__ == "__main__":
    args = vars(fake_parser().parse_args())
    folder = Path(args["out_dir"]) / args["run_name"]
    folder.mkdir(parents=True, exist_ok=True)
    with open("calls.txt", "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
    if args["fail"] == args["seed"]:
        sys.exit("error: planted")
    if args["wait"] == args["seed"] and not (folder / "begun").exists():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        (folder / "begun").write_text(str(os.getpid()))
        time.sleep(20)
    if args["minutes"] and args["minutes"] < 0.01:
        sys.exit()
    (folder / "last.pt").touch()
    (folder / "log.csv").write_text("epoch,val_accuracy,test_accuracy,seconds\\n1,,0.5,60\\n")
    (folder / "result.json").write_text(json.dumps({
        "script": "train_fake.py", "args": args, "params": 10, "dataset_name": "fake", "data_hash": "", "epochs": 1,
        "seed": int(args["seed"]), "test_accuracy": 0.5 + args["seed"] / 100, "val_accuracy": None, "device": "none", "precision": "off",
        "seconds": 60.0, "init_from": args["init_from"] and Path(args["init_from"]).name,
    }))
"""
PLAN = """
title = "A title"
baseline = "plain"
seeds = 2
[[rows]]
name = "plain"
script = "train_fake.py"
arguments = "--lr 0.1"
[[rows]]
name = "other"
script = "train_fake.py"
arguments = ["--lr", "0.2", "--recipe", "strong"]
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to be in, with train_fake.py and p.toml, a plan for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{tmp_path}")
    monkeypatch.setitem(scripts.SCRIPTS, "train_fake.py", "fake_parser")
    Path("train_fake.py").write_text(FAKE_SCRIPT)
    Path("p.toml").write_text(PLAN)
    yield tmp_path
    sys.modules.pop("train_fake", None)


def calls():
    lines = Path("calls.txt").read_text().splitlines()
    Path("calls.txt").unlink()
    return lines


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_row_starts_from_another_rows_run_of_the_same_seed(workplace, capfd):
    """Also where that run's result is kept but its checkpoint is not there: then it is trained again."""
    Path("p.toml").write_text(PLAN + 'init_from = "plain"\n')
    campaign.main(["p.toml", "--seeds", "1"])
    assert "--init-from checkpoints/p/plain-seed-0 --lr 0.2" in calls()[1]
    Path("checkpoints/p/plain-seed-0/result.json").unlink()
    Path("results/p/other-seed-0.json").unlink()
    campaign.main(["p.toml", "--seeds", "1"])
    assert [line.partition("--run-name ")[2].split()[0] for line in calls()] == ["plain-seed-0", "other-seed-0"]
    result = json.loads(Path("results/p/other-seed-0.json").read_text())
    Path("results/p/other-seed-0.json").write_text(json.dumps(result | {"init_from": "plain-seed-7"}))
    capfd.readouterr()
    campaign.main(["p.toml", "--seeds", "1", "--list"])
    assert "init_from is plain-seed-7 there and plain-seed-0 in the plan" in capfd.readouterr().err


def test_a_row_does_not_start_from_other_weights_than_those_beside_it(workplace, capfd):
    """Nor is a result replaced by that of a run that was only to leave its weights."""
    more = PLAN.split("[[rows]]")[2].replace("other", "third").replace("0.2", "0.3") + 'init_from = "plain"\n'
    Path("p.toml").write_text(PLAN + f'init_from = "plain"\n[[rows]]{more}')
    campaign.main(["p.toml", "--seeds", "1"])
    Path("checkpoints/p/plain-seed-0/last.pt").unlink()
    Path("results/p/third-seed-0.json").unlink()
    before = len(calls())
    with pytest.raises(UserError, match="1 of 1 runs failed: p/third, seed 0"):
        campaign.main(["p.toml", "--seeds", "1"])
    said = capfd.readouterr().err
    assert "p/third, seed 0 must start from the weights that results/p/other-seed-0.json started from" in said
    assert "p/plain, seed 0, but they are no longer in checkpoints/p/plain-seed-0" in said
    assert before == 3 and not Path("calls.txt").exists()
    Path("results/p/other-seed-0.json").unlink()
    campaign.main(["p.toml", "--seeds", "1"])
    assert [line.split()[-1] for line in calls()] == ["--overwrite", "auto", "auto"]


def test_a_plan_is_done_seed_by_seed_once(workplace, capfd):
    campaign.main(["p.toml", "--device", "cpu", "--data-dir", "d"])
    done = calls()
    assert [line.partition("--run-name ")[2].split()[0] for line in done] == [
        "plain-seed-0",
        "other-seed-0",
        "plain-seed-1",
        "other-seed-1",
    ]
    assert done[3] == (
        "--device cpu --data-dir d --lr 0.2 --recipe strong --seed 1 "
        "--out-dir checkpoints/p --run-name other-seed-1 --resume auto"
    )
    assert names("results/p") == [
        f"{row}-seed-{k}.{end}" for row in ("other", "plain") for k in (0, 1) for end in ("csv", "json")
    ]
    out = capfd.readouterr().out
    assert "--- run 4 of 4: p/other, seed 1" in out and "A title (p)\nname" in out
    assert "plain  fake          1          10  50.50 ± 0.71 %" in out and "other - plain  unpaired   +0.00" in out

    campaign.main(["p.toml"])
    assert not Path("calls.txt").exists() and "50.50" in capfd.readouterr().out
    campaign.main(["p.toml", "--seeds", "3"])
    assert [line.split("--run-name ")[1] for line in calls()] == [
        "plain-seed-2 --resume auto",
        "other-seed-2 --resume auto",
    ]


def test_list_says_what_is_there_and_runs_nothing(workplace, capfd):
    campaign.main(["p.toml", "--seeds", "1"])
    calls()
    capfd.readouterr()
    campaign.main(["p.toml", "--list"])
    assert not Path("calls.txt").exists()
    assert [line.split() for line in capfd.readouterr().out.splitlines()[2:4]] == [
        ["plain", "0", "1", "-", "train_fake.py", "--lr", "0.1"],
        ["other", "0", "1", "-", "train_fake.py", "--lr", "0.2", "--recipe", "strong"],
    ]


def test_a_result_that_does_not_fit_is_named_and_replaced_by_the_new_one_alone(workplace, capfd):
    campaign.main(["p.toml"])
    calls()
    path = Path("results/p/other-seed-1.json")
    old = path.read_text()
    Path("p.toml").write_text(PLAN.replace("0.2", "0.3"))
    campaign.main(["p.toml", "--minutes", "0.005"])  # ends before the first run does
    assert path.read_text() == old
    err = capfd.readouterr().err
    assert (
        f"warning: {path} does not count: it does not fit p's row other (--lr is 0.2 there and 0.3 in the plan)" in err
    )
    assert calls()[0].endswith("--run-name other-seed-0 --overwrite")
    campaign.main(["p.toml"])
    assert len(calls()) == 2 and json.loads(path.read_text())["args"]["lr"] == 0.3


def test_seeds_of_different_recipes_are_warned_of(workplace, capfd):
    campaign.main(["p.toml"])
    assert "differ" not in capfd.readouterr().err
    path = Path("results/p/plain-seed-1.json")
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"args": result["args"] | {"recipe": "strong"}}))  # the plan leaves it open
    campaign.main(["p.toml", "--list"])
    assert "the runs of p's row plain differ in more than their seed" in capfd.readouterr().err


def test_a_result_of_another_seed_does_not_fit(workplace, capfd):
    campaign.main(["p.toml"])
    Path("results/p/plain-seed-0.json").rename("results/p/plain-seed-1.json")
    campaign.main(["p.toml", "--list"])
    said = capfd.readouterr()
    assert "seed is 0 there" in said.err and said.out.splitlines()[-3].split()[:4] == ["plain", "none", "0", "1"]


def test_a_failure_is_named_and_the_others_go_on(workplace, capfd):
    Path("p.toml").write_text(PLAN.replace("--lr 0.1", "--lr 0.1 --fail 0"))
    with pytest.raises(UserError, match="1 of 4 runs failed: p/plain, seed 0"):
        campaign.main(["p.toml"])
    said = capfd.readouterr()
    assert said.err.splitlines()[:2] == ["error: planted", "failed, exit code 1: p/plain, seed 0"]
    assert len(names("results/p")) == 6 and "A title" in said.out


def test_the_minutes_end_it_cleanly_and_are_handed_on(workplace, capfd):
    campaign.main(["p.toml", "--minutes", "0.005"])
    out = capfd.readouterr().out
    assert "the minutes are up, 4 of 4 runs are missing; to resume: python campaign.py p.toml --minutes 0.005" in out
    assert "not measured yet" in out and 0 < float(calls()[0].split("--minutes ")[1].split()[0]) <= 0.005
    campaign.main(["p.toml", "--minutes", "5"])
    assert len(calls()) == 4


def campaign_process(waiting):
    """campaign.py p.toml in a process of its own, once the run named `waiting` has begun to wait."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below nohup\n"
        "import campaign, errors; from experiments.scripts import SCRIPTS\n"
        "SCRIPTS['train_fake.py'] = 'fake_parser'; errors.run_script(campaign.main)"
    )
    command = [sys.executable, "-c", code, "p.toml"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    started = time.monotonic()
    while not Path("checkpoints/p", waiting, "begun").exists():
        assert time.monotonic() - started < 20 and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_ends_it_with_its_exit_code(workplace, signum):
    Path("p.toml").write_text(PLAN.replace("--lr 0.1", "--lr 0.1 --wait 1"))
    process = campaign_process("plain-seed-1")
    os.killpg(process.pid, signum)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and err == ""
    assert "stopped in p/plain, seed 1; to resume: python campaign.py p.toml" in out and len(calls()) == 3
    campaign.main(["p.toml"])
    assert len(calls()) == 2 and len(names("results/p")) == 8


def test_a_campaign_that_was_killed_leaves_its_training_alone_in_its_folder(workplace, capfd):
    Path("p.toml").write_text(PLAN.replace("--lr 0.1", "--lr 0.1 --wait 0"))
    process = campaign_process("plain-seed-0")
    process.kill()
    process.wait()
    calls()
    with pytest.raises(UserError, match="1 of 2 runs failed: p/plain, seed 0"):
        campaign.main(["p.toml", "--seeds", "1"])
    assert "p/plain, seed 0 is still trained in checkpoints/p/plain-seed-0" in capfd.readouterr().err
    assert ["other-seed-0" in call for call in calls()] == [True]
    os.kill(int(Path("checkpoints/p/plain-seed-0/begun").read_text()), signal.SIGKILL)
    time.sleep(0.2)
    campaign.main(["p.toml", "--seeds", "1"])
    assert ["plain-seed-0" in call for call in calls()] == [True]


def test_a_campaign_runs_from_any_folder(workplace, tmp_path, monkeypatch, capfd):
    """Also from one whose files have names of the project's."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "errors.py").write_text("raise SystemExit('the wrong file')\n")
    monkeypatch.chdir(elsewhere)
    campaign.main(["../p.toml", "--seeds", "1"])
    assert len(calls()) == 2 and names("results/p")[1] == "other-seed-0.json"
    assert scripts.run_command("benchmarks.augment", ["--help"]) == 0
    assert "--rounds" in capfd.readouterr().out


BAD_PLANS = {
    "is not TOML": ("title = ", "titel: "),
    "unknown key epochs; choose from title, rows": ("seeds = 2", "epochs = 2"),
    "row 1 (plain): unknown key sript; choose from name": ("script", "sript"),
    "row 1: name missing": ('name = "plain"\n', ""),
    "seeds cannot be 0": ("seeds = 2", "seeds = 0"),
    "row 1 (plain): script cannot be 3": ('script = "train_fake.py"', "script = 3"),
    "row 1 (plain): unknown script train_it.py; choose one of train_vit.py": ("train_fake.py", "train_it.py"),
    "row 2 (other): unrecognized arguments: --reciep strong": ('--recipe", ', '--reciep", '),
    "row 2 (other): argument --recipe: invalid choice: 'weak'": ("strong", "weak"),
    "row 1 (plain): remove --seed: campaign.py sets this itself": ("--lr 0.1", "--seed 1"),
    'row 1 (plain): arguments = "--lr \'0.1": No closing quotation': ("--lr 0.1", "--lr '0.1"),
    "row 1 (a/b): a name may have letters, digits, . _ and - only": ('"plain"\nscript', '"a/b"\nscript'),
    "baseline = first is not a row; choose one of plain, other": ('baseline = "plain"', 'baseline = "first"'),
    "against = nobody is not a row": ('name = "other"', 'name = "other"\nagainst = "nobody"'),
    "init_from of plain must name a row of the same script": (
        'script = "train_fake.py"\narguments = "--lr 0.1"',
        'script = "train_cct.py"\ninit_from = "other"',
    ),
    "row 1 (plain): published cannot be 92.6": ('name = "plain"', 'name = "plain"\npublished = 92.6'),
    "two rows are named plain": ('name = "other"', 'name = "plain"'),
}


@pytest.mark.parametrize("said", BAD_PLANS)
def test_bad_plans_are_one_line_before_anything_runs(workplace, said):
    Path("p.toml").write_text(PLAN.replace(*BAD_PLANS[said]))
    with pytest.raises(UserError) as error:
        campaign.main(["p.toml"])
    assert said in str(error.value) and str(error.value).startswith("p.toml") and "\n" not in str(error.value)
    assert not Path("calls.txt").exists()


def test_a_plan_that_is_not_there_and_one_without_rows(workplace):
    with pytest.raises(UserError, match=r"q.toml cannot be read \(No such file or directory\)"):
        campaign.main(["q.toml"])
    Path("p.toml").write_text('title = "x"\nrows = []\n')
    with pytest.raises(UserError, match="p.toml: no runs in it"):
        campaign.main(["p.toml"])


@pytest.mark.parametrize("path", sorted(Path("plans").glob("*.toml")), ids=str)
def test_the_plans_can_be_read(path):
    plan = read_plan(path)
    assert plan.title and len(plan.rows) + len(plan.measurements) > 1
