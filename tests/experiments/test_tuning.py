"""campaign.py --tune: ranges, trials, resuming, several processes, pruning, the test set, and mistakes."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY

import campaign
from errors import UserError
from experiments import scripts
from experiments.plans import PlanRow
from experiments.tuning import read_range

optuna = pytest.importorskip("optuna")

# a training script of a tenth of a second, whose validation accuracy is --good, and --good - 0.1 after its first epoch
FAKE_SCRIPT = """
import json, signal, sys, time
from pathlib import Path
from training.flags import Parser, at_least, positive

def fake_parser():
    parser = Parser(None)
    for flag in ("--good", "--seed", "--minutes", "--fail-below", "--refuse-below", "--wait", "--slow-from"):
        parser.add_argument(flag, type=float)
    parser.add_argument("--size", type=at_least(1))
    parser.add_argument("--lr", type=positive)
    parser.add_argument("--opt", choices=("adamw", "muon"))
    parser.add_argument("--own")
    parser.add_argument("--val-fraction", type=float, default=0.0)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--skip-test", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    for flag in ("--data-dir", "--device", "--out-dir", "--run-name", "--resume"):
        parser.add_argument(flag)
    return parser

def chosen_recipe(given):
    return "report", {"epochs": 3}

if __name__ == "__main__":
    args = vars(fake_parser().parse_args())
    folder = Path(args["out_dir"]) / args["run_name"]
    with open("calls.txt", "a") as file:
        file.write(f"{args['run_name']} {args['good']} {' '.join(sys.argv[1:])}\\n")
    number = int(args["run_name"].split("-")[1]) if args["skip_test"] else -1
    if args["refuse_below"] and args["good"] < args["refuse_below"]:
        sys.exit("error: refused")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "last.pt").touch()
    if args["fail_below"] and args["good"] < args["fail_below"]:
        sys.exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args["wait"] == number and not (folder / "begun").exists():
        (folder / "begun").touch()
        while not Path("go").exists():
            time.sleep(0.05)
    if args["minutes"] and args["minutes"] < 0.02:
        time.sleep(60 * args["minutes"])
        sys.exit()
    slow = args["slow_from"] is not None and number >= args["slow_from"]
    lines = ["epoch,val_accuracy,test_accuracy,seconds\\n"]
    for epoch in (1, 2, 3):
        lines.append(f"{epoch},{args['good'] - 0.1 * (epoch == 1)},,60\\n")
        (folder / "log.csv").write_text("".join(lines))
        time.sleep(2.5 if slow else 0)
    if not args["skip_test"]:
        (folder / "result.json").write_text(json.dumps({
            "script": "train_fake.py", "args": args, "params": 10, "dataset_name": "fake", "data_hash": "",
            "epochs": 3, "seed": int(args["seed"]), "test_accuracy": 0.777, "val_accuracy": args["good"],
            "device": "none", "precision": "off", "seconds": 60.0, "init_from": None,
        }))
"""
PLAN = '{}title = "A title"\n[[rows]]\nname = "one"\nscript = "train_fake.py"\narguments = "--val-fraction 0.1 {}"\n'
TUNE = ["p.toml", "--tune", "good=0.2..0.9 opt=adamw,muon", "--trials"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder to be in, with train_fake.py and p.toml, a plan of one row for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    paths = [str(REPOSITORY), str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setitem(scripts.SCRIPTS, "train_fake.py", "fake_parser")
    Path("train_fake.py").write_text(FAKE_SCRIPT)
    Path("p.toml").write_text(PLAN.format("", ""))
    yield tmp_path
    sys.modules.pop("train_fake", None)


def calls():
    """[(name of a run, its --good)] of the calls of the fake script since the last call of this function."""
    lines = Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []
    Path("calls.txt").unlink(missing_ok=True)
    return [(line.split()[0], float(line.split()[1])) for line in lines]


def study(folder="checkpoints/p/tune-one"):
    path = f"{folder}/study.jsonl"
    backend = optuna.storages.journal.JournalFileBackend(path, optuna.storages.journal.JournalFileOpenLock(path))
    return optuna.load_study(study_name="tune", storage=optuna.storages.JournalStorage(backend))


def trials(*folder):
    return study(*folder).trials


def states(*found):
    return [trial.state.name for trial in found or trials()]


def campaign_process(*argv):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below nohup\n"
        "import campaign, errors; from experiments.scripts import SCRIPTS\n"
        "SCRIPTS['train_fake.py'] = 'fake_parser'; errors.run_script(campaign.main)"
    )
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], **pipe)


def wait_for(path, process):
    started = time.monotonic()
    while not Path(path).exists():
        assert time.monotonic() - started < 60 and process.poll() is None
        time.sleep(0.05)


# The search


def test_the_best_values_are_trained_anew_and_only_then_is_the_test_set_opened(workplace, capfd):
    campaign.main([*TUNE, "4"])
    done, said = calls(), capfd.readouterr().out
    assert [name for name, _ in done] == [f"trial-{n}-seed-0" for n in range(4)] + ["one-tuned-seed-0"]
    best = max(good for _, good in done[:4])
    assert done[4][1] == best and len({good for _, good in done[:4]}) == 4
    before, _, after = said.partition("--- run 1 of 1: p/one-tuned, seed 0")
    assert "77.7" not in before and "A title: best of 4 trials on validation images (p)" in after and "77.70" in after
    result = json.loads(Path("results/p/one-tuned-seed-0.json").read_text())
    assert result["args"]["good"] == best and not result["args"]["skip_test"] and result["seed"] == 0
    table = re.findall(r"^ +(\d)  +([\d.]+)  (\w+) +([\d.]+)% +3  complete$", before, re.M)
    assert [float(good) for _, good, *_ in table] == sorted((round(good, 4) for _, good in done[:4]), reverse=True)
    assert all(float(accuracy) == pytest.approx(100 * float(good), abs=0.01) for _, good, _, accuracy in table)
    assert "TPE, seeded with the trial number" in before
    assert "TPE, seeded with the trial number" in Path("checkpoints/p/tune-one/study.jsonl").read_text()
    # the same command does nothing more, and more trials would choose by that test
    campaign.main([*TUNE, "4"])
    assert calls() == [] and "best of 4 trials" in capfd.readouterr().out
    with pytest.raises(UserError, match="^--trials 5: the test set has been opened for the best of 4; to search anew,"):
        campaign.main([*TUNE, "5"])
    assert calls() == [] and len(trials()) == 4


def test_the_seeds_of_the_plan_are_for_the_best_values(workplace):
    Path("p.toml").write_text(PLAN.format("seeds = 2\n", ""))
    campaign.main([*TUNE, "1"])
    assert [name for name, _ in calls()] == ["trial-0-seed-0", "one-tuned-seed-0", "one-tuned-seed-1"]


def test_values_follow_from_the_trials_number_and_what_is_known(workplace):
    """However often the search was stopped: a sampler that starts anew with one seed would draw its first values."""
    campaign.main([*TUNE, "13", "--out-dir", "whole"])
    whole = [good for name, good in calls() if "trial" in name]
    for number in (4, 11, 13):
        campaign.main([*TUNE, str(number)])
        study().set_user_attr("tested", 13)  # as if it had been stopped before its test
    parts = [good for name, good in calls() if "trial" in name]
    assert parts == whole and len(set(whole)) == 13


def test_minutes_stop_within_a_trial_which_is_resumed(workplace, capfd):
    campaign.main([*TUNE, "2", "--minutes", "0.015"])
    said = capfd.readouterr().out
    (first,) = calls()
    assert "0 of 2 trials are done; to resume, if no other process trains the rest: python campaign.py p.toml" in said
    assert states() == ["RUNNING"] * 2 and "--- run" not in said and said.count("running") == 1
    campaign.main([*TUNE, "2"])
    assert calls()[0] == first and states() == ["COMPLETE"] * 2


def test_a_signal_stops_within_a_trial_which_is_resumed(workplace):
    Path("p.toml").write_text(PLAN.format("", "--wait 1"))
    process = campaign_process(*TUNE, 3)
    wait_for("checkpoints/p/tune-one/trial-1-seed-0/begun", process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    assert "stopped in trial 1; to resume: python campaign.py p.toml --tune" in out
    stopped = calls()[1]
    campaign.main([*TUNE, "3"])
    assert calls()[:2] == [stopped, ("trial-2-seed-0", trials()[2].params["good"])] and states() == ["COMPLETE"] * 3


def test_a_trial_of_a_killed_search_is_left_to_its_process_and_then_taken_up(workplace, capfd):
    Path("p.toml").write_text(PLAN.format("", "--wait 0"))
    process = campaign_process(*TUNE, 2)
    wait_for("checkpoints/p/tune-one/trial-0-seed-0/begun", process)
    process.kill()
    process.wait()
    campaign.main([*TUNE, "2"])
    assert states() == ["RUNNING", "COMPLETE"] and "1 of 2 trials are done" in capfd.readouterr().out
    Path("go").touch()  # its training goes on to its end
    with open("checkpoints/p/tune-one/.trial-0-seed-0.lock", "w") as lock:
        while scripts.is_locked(lock):
            time.sleep(0.05)
    campaign.main([*TUNE, "2"])
    assert states() == ["COMPLETE"] * 2 and [name for name, _ in calls()].count("trial-1-seed-0") == 1


@pytest.mark.slow
def test_two_processes_share_one_search(workplace):
    """Each trial is done once; if both train the best values at once, the second is refused as any campaign is."""
    Path("p.toml").write_text(PLAN.format("", "--wait 0"))
    processes = [campaign_process(*TUNE, 10)]
    wait_for("checkpoints/p/tune-one/trial-0-seed-0/begun", processes[0])
    processes.append(campaign_process(*TUNE, 10))
    wait_for("checkpoints/p/tune-one/trial-1-seed-0", processes[1])
    Path("go").touch()
    said = [process.communicate(timeout=120) for process in processes]
    for process, (_, err) in zip(processes, said, strict=True):
        late = "one-tuned, seed 0 is still trained in checkpoints/p/one-tuned-seed-0, by another campaign" in err
        assert process.returncode == (2 if late else 0), said
    shares = [re.findall(r"--- trial (\d+)", out) for out, _ in said]
    assert sorted(map(int, shares[0] + shares[1])) == list(range(10)) and all(shares)
    assert len({trial.params["good"] for trial in trials()}) == 10 and len(trials()) == 10
    done = [name for name, _ in calls()]
    assert all(done.count(f"trial-{number}-seed-0") == 1 for number in range(10)) and "one-tuned-seed-0" in done
    assert Path("results/p/one-tuned-seed-0.json").exists()


def test_a_trial_below_the_median_is_stopped_early(workplace, capfd):
    """From the sixth trial on each epoch takes 2.5 seconds, so that there is something to stop."""
    Path("p.toml").write_text(PLAN.format("", "--slow-from 5"))
    campaign.main([*TUNE, "7"])
    found = trials()
    middle = sorted(trial.params["good"] for trial in found[:5])[2]
    for trial in found[5:]:
        worse = trial.params["good"] < middle
        assert trial.state.name == ("PRUNED" if worse else "COMPLETE")
        assert trial.last_step < 3 if worse else trial.last_step == 3
    assert {"PRUNED", "COMPLETE"} == set(states(*found))
    said = capfd.readouterr().out
    assert re.search(r"% +[12]  pruned$", said, re.M) and " is ended: worse than the median of the others" in said


def test_a_failed_trial_counts_and_one_that_cannot_begin_stops_the_search(workplace, capfd):
    Path("p.toml").write_text(PLAN.format("", "--fail-below 0.5"))
    campaign.main([*TUNE, "4"])
    failed = [trial for trial in trials() if trial.params["good"] < 0.5]
    assert 0 < len(failed) < 4 and states(*failed) == ["PRUNED"] * len(failed)
    assert capfd.readouterr().out.count("0  failed, exit code 2") == len(failed)
    Path("p.toml").write_text(PLAN.format("", "--fail-below 2"))
    with pytest.raises(UserError, match="none of 2 trials was finished"):
        campaign.main([*TUNE, "2", "--out-dir", "elsewhere"])
    Path("p.toml").write_text(PLAN.format("", "--refuse-below 2"))
    with pytest.raises(UserError, match="trial 0 cannot be trained; its message is above"):
        campaign.main([*TUNE, "2", "--out-dir", "third"])
    assert "error: refused" in capfd.readouterr().err
    with pytest.raises(UserError, match="trial 1 cannot be trained"):
        campaign.main([*TUNE, "2", "--out-dir", "third"])
    assert states(*trials("third/p/tune-one")) == ["PRUNED"] * 2


@pytest.mark.parametrize("changed", ["row", "ranges"])
def test_another_search_is_not_mixed_with_the_first(workplace, changed):
    campaign.main([*TUNE, "1"])
    calls()
    if changed == "row":
        Path("p.toml").write_text(PLAN.format("", "--size 3"))
    values = TUNE[2] if changed == "row" else "good=0.2..0.8 opt=adamw,muon"
    with pytest.raises(
        UserError, match=r"tune-one/study.jsonl is of another search, train_fake.py .*delete check"
    ) as e:
        campaign.main(["p.toml", "--tune", values, "--trials", "2"])
    assert "\n" not in str(e.value) and calls() == []


# Ranges and mistakes


def test_ranges_have_the_flags_type_and_wide_ones_a_log_scale(workplace):
    row = PlanRow("one", "train_fake.py", [], {}, 1, None, None, None, None)
    wide = {"low": 1e-4, "high": 1e-2, "log": True}
    assert read_range("lr=1e-4..1e-2", row) == read_range("--lr=1e-4..1e-2", row) == ("lr", "suggest_float", wide)
    assert read_range("lr=0.1..0.9", row)[2] == {"low": 0.1, "high": 0.9, "log": False}
    assert read_range("good=0..9", row)[2] == {"low": 0.0, "high": 9.0, "log": False}  # a log scale has no 0
    assert read_range("size=2..8", row) == ("size", "suggest_int", {"low": 2, "high": 8, "log": False})
    assert read_range("size=2,8,4", row) == ("size", "suggest_categorical", {"choices": ["2", "8", "4"]})


MISTAKES = {
    "": 'name each flag once, as in "lr=1e-4..1e-2 opt=adamw,muon"',
    "lr=0.1..0.2 --lr=0.3..0.4": "name each flag once",
    "lrr=0.1..0.2": "unrecognized arguments: --lrr=0.1; did you mean --lr?",
    "lr=0.2..0.1": "--tune lr=0.2..0.1: LOW must be below HIGH in lr=LOW..HIGH",
    "lr=0.1..0.1": "LOW must be below HIGH",
    "lr=0.1...2": "a range has two dots, lr=LOW..HIGH",
    "own=a,a": "--tune own=a,a: neither a range own=LOW..HIGH nor choices own=A,B",
    "lr=0.1..0.2..0.3": "argument --lr: invalid float value: '0.2..0.3'",
    "lr=0.1": "neither a range",
    "lr": "argument --lr: invalid float value: ''",
    "lr=": "argument --lr: invalid float value: ''",
    "lr=..1": "argument --lr: invalid float value: ''",
    "lr=0..1": "argument --lr: must be above 0, not 0",
    "lr=a..b": "argument --lr: invalid float value: 'a'",
    "size=1.5..3": "argument --size: invalid int value: '1.5'",
    "opt=adamw,adam": "argument --opt: invalid choice: 'adam'",
    "opt=adamw,adamw": "neither a range",
    "own=a..b": "neither a range",
    "good=0.1..0.2 size=1..4": "--tune size=1..4: --size cannot be searched, row one gives it itself",
    "val_fraction=0.1..0.2": "--val-fraction cannot be searched, row one gives it itself",
    "seed=1..3": "--seed cannot be searched, it must be the same in all trials",
    "data-dir=a,b": "--data-dir cannot be searched, it must be the same in all trials",
    "minutes=1..2": "--minutes cannot be searched",
}


@pytest.mark.parametrize("tune", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_trained(workplace, tune):
    Path("p.toml").write_text(PLAN.format("", "--size 3"))
    with pytest.raises(UserError) as error:
        campaign.main(["p.toml", "--tune", tune])
    assert MISTAKES[tune] in str(error.value) and "\n" not in str(error.value)
    assert calls() == [] and not Path("checkpoints").exists()


def test_a_row_without_validation_images_and_more_than_one_row_are_refused(workplace):
    Path("p.toml").write_text(PLAN.format("", "").replace("--val-fraction 0.1", ""))
    with pytest.raises(UserError, match="--tune needs validation images to choose on: add --val-fraction 0.1 to row o"):
        campaign.main([*TUNE, "2"])
    other = PLAN.format("", "").partition("[[rows]]")[2].replace('"one"', '"two"')
    Path("p.toml").write_text(PLAN.format("", "") + f"[[rows]]{other}")
    with pytest.raises(UserError, match="--tune needs a plan of one row that is run, not of 2"):
        campaign.main([*TUNE, "2"])
    assert calls() == []


def test_without_optuna_the_message_says_what_to_install(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install 'optuna>=5'"):
        campaign.main([*TUNE, "2"])


# Real runs


def real_campaign(folder, flags, *argv):
    """campaign.py as a user runs it, on a plan of one row of train_vit.py: a Popen."""
    arguments = json.dumps(["--dataset", "folder", "--data-dir", "pets", "--cache-dir", "cache", *TINY, *flags])
    row = f'name = "tiny"\nscript = "train_vit.py"\narguments = {arguments}\n'
    (folder / "real.toml").write_text(f'title = "Real"\n[[rows]]\n{row}')
    command = [sys.executable, REPOSITORY / "campaign.py", "real.toml", *argv]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
def test_the_test_set_stays_shut_in_real_trials(image_folder, tmp_path):
    """And the best trial, trained anew with its seed and values, is the same run, up to the test set's accuracy."""
    flags = ["--epochs", "2", "--batch-size", "8", "--val-fraction", "0.2"]
    done = finished(real_campaign(tmp_path, flags, "--tune", "lr=1e-4..1e-2 crop-padding=1..3", "--trials", "2"))
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.partition("--- run 1 of 1: real/tiny-tuned, seed 0")
    assert before.count("open the test set: python train_vit.py") == 2
    assert "accuracy" in before and not re.search(r"test accuracy|best_on_test|test +\d\.\d", before)
    assert "test accuracy" in after and "best of 2 trials on validation images" in after
    folder = tmp_path / "checkpoints" / "real" / "tune-tiny"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files if path.parent.name == "trial-1-seed-0"} == {
        *("last.pt", "last.prev.pt", "best.pt", "log.csv", "curves.png", "split.csv", "result.json"),
    }
    for path in files:
        if path.name == "log.csv":
            rows = list(csv.DictReader(path.open()))
            assert [row["test_accuracy"] + row["test_loss"] for row in rows] == ["", ""]
        elif path.name == "result.json":
            assert json.loads(path.read_text())["test_accuracy"] is None
        elif path.suffix != ".pt":
            assert b"test_accuracy" not in path.read_bytes()
    found = trials(folder)
    best = max(found, key=lambda trial: trial.value)
    result = json.loads((tmp_path / "results" / "real" / "tiny-tuned-seed-0.json").read_text())
    assert result["val_accuracy"] == best.value and result["args"]["lr"] == best.params["lr"]
    assert result["args"]["crop_padding"] == best.params["crop_padding"] and result["test_accuracy"] is not None


@pytest.mark.slow
def test_a_real_trial_that_was_stopped_resumes_where_it_was(image_folder, tmp_path):
    flags = ["--epochs", "40", "--batch-size", "8", "--val-fraction", "0.2"]
    argv = ["--tune", "lr=1e-4..1e-2", "--trials", "1", "--minutes", "5"]
    process = real_campaign(tmp_path, flags, *argv)
    run = tmp_path / "checkpoints" / "real" / "tune-tiny" / "trial-0-seed-0"
    wait_for(run / "log.csv", process)
    process.send_signal(signal.SIGTERM)
    first = finished(process)
    assert first.returncode == 143 and "stopped in trial 0; to resume: python campaign.py real.toml" in first.stdout
    stopped = int(re.search(r"stopped .*epoch (\d+)", first.stdout)[1])
    second = finished(real_campaign(tmp_path, flags, *argv))
    assert second.returncode == 0 and "--- trial 0: --lr=" in second.stdout
    epochs = [int(epoch) for epoch in re.findall(r"^epoch +(\d+)/40", second.stdout.partition("--- run")[0], re.M)]
    assert stopped <= epochs[0] <= stopped + 1 and epochs[-1] == 40


def test_a_real_folder_without_validation_images_is_refused_by_its_first_trial(image_folder, tmp_path):
    refused = finished(real_campaign(tmp_path, ["--epochs", "1"], "--tune", "lr=1e-4..1e-2"))
    first, last = refused.stderr.strip().splitlines()[-2:]
    assert first == "error: --skip-test needs validation images: --val-fraction 0.1"
    assert last == "error: trial 0 cannot be trained; its message is above" and refused.returncode == 2
