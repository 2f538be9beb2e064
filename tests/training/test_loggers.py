"""--log-steps and --log: every row once, whatever stops the run; and what the loggers themselves then hold."""

import csv
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import run_train_vit

import train_vit
from errors import UserError
from training.checkpoint import save_checkpoint
from training.interrupt import Interrupted, Watch
from training.loggers import RunLog


def after_steps(monkeypatch, steps, action):
    """Calls `action` after so many steps of training; every step is read from the device at once."""
    original, counted = Watch.__call__, []

    def call(watch, sums):
        counted.append(sums)
        wanted = original(watch, sums)
        if len(counted) == steps:
            action()
        return wanted

    monkeypatch.setattr(Watch, "REFRESH_SECONDS", -1)
    monkeypatch.setattr(Watch, "__call__", call)


def crash():
    raise RuntimeError("crash")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("crashed_after", [1, 7])
def test_steps_are_there_once_each_after_a_stop_and_a_crash(folder_flags, tmp_path, monkeypatch, crashed_after):
    """An epoch has six steps. The run saves after step 2, crashes some steps later, amid a line, and is resumed."""
    flags = [*folder_flags, "--log-steps", "--drop", "0.3", "--mixup", "0.8"]
    whole = train_vit.main([*flags, "--run-name", "whole"])
    assert "log_steps" not in whole["args"] and "log" not in whole["args"]
    cut = tmp_path / "runs/cut"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        after_steps(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_vit.main([*flags, "--run-name", "cut"])
    assert len(rows_of(cut / "steps.csv")) in (2, 3)  # the signal is seen after this step or the next
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        after_steps(patch, crashed_after, crash)
        patch.setattr("training.run.save_checkpoint", lambda path, checkpoint: None)
        train_vit.main(["--resume", str(cut)])
    with open(cut / "steps.csv", "a") as file:
        file.write("2,1")
    train_vit.main(["--resume", str(cut)])
    assert (cut / "steps.csv").read_bytes() == (tmp_path / "runs/whole/steps.csv").read_bytes()
    rows = rows_of(cut / "steps.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(str(e), str(s)) for e in (1, 2) for s in range(1, 7)]
    sizes = [8, 8, 8, 8, 8, 8]
    for epoch, row in enumerate(rows_of(cut / "log.csv")):
        mine = rows[6 * epoch : 6 * epoch + 6]
        mean = sum(float(r["loss"]) * size for r, size in zip(mine, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(float(row["train_loss"]), rel=1e-5) and mine[-1]["lr"] == row["lr"]
    train_vit.main([*folder_flags, "--run-name", "cut", "--overwrite", "--epochs", "1"])
    assert not (cut / "steps.csv").exists()


def test_the_steps_before_a_loss_that_is_not_finite_can_be_read(folder_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "REFRESH_SECONDS", -1)
    with pytest.raises(UserError, match="the loss is not finite: epoch 1, step"):
        train_vit.main([*folder_flags, "--log-steps", "--lr", "1e9"])
    rows = rows_of(tmp_path / "runs/vit/steps.csv")
    assert 1 < len(rows) <= 6 and rows[-1]["loss"] in ("nan", "inf") and float(rows[0]["loss"]) < 10


def test_a_step_is_noted_without_waiting_and_a_full_disk_is_one_line(tmp_path):
    args = SimpleNamespace(log=[], log_steps=True)
    log = RunLog(SimpleNamespace(args=args, schedule=SimpleNamespace(last_epoch=1), folder=tmp_path / "gone", epoch=0))
    loss = torch.tensor(2.0)
    log.note({"step": 1, "lr": 0.1, "last_loss": loss})
    assert log.noted[0][-1] is loss
    with pytest.raises(UserError, match="steps.csv cannot be written .No such file"):
        log.fetch()


class Recorded:
    """A stand-in for W&B or trackio: what init and log were given."""

    def __init__(self, fails_at=None):
        self.inits, self.logged, self.finished, self.fails_at = [], [], 0, fails_at

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, values, step):
        if step == self.fails_at:
            raise OSError("the server is gone")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_what_a_logger_gets(folder_flags, tmp_path, monkeypatch):
    """A run that is stopped in its second epoch and resumed: one log, each row once."""
    fake = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        after_steps(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_vit.main([*folder_flags, "--log", "wandb", "--log-steps", "--val-fraction", "0.1"])
    result = train_vit.main(["--resume", str(tmp_path / "runs/vit"), "--log", "wandb", "trackio"])
    first, second, trackio = fake.inits
    assert first["id"] == second["id"] and first["name"] == second["name"] == trackio["name"] == f"vit-{first['id']}"
    assert {init["resume"] for init in fake.inits} == {"allow"} and first["dir"] == tmp_path / "runs/vit"
    assert trackio.keys() == {"project", "name", "config", "resume", "embed"} and trackio["embed"] is False
    assert first["project"] == "pets" and first["config"]["lr"] == 5e-4 and fake.finished == 3
    # after the stop each row came twice: to both loggers
    steps, epochs = ([(s, v) for s, v in fake.logged if key in v] for key in ("step_loss", "val_loss"))
    twice = [step for step, values in steps]
    assert sorted({*twice}) == list(range(1, 13)) and all(twice.count(s) == 1 for s in range(1, 8))
    rows = rows_of(tmp_path / "runs/vit/log.csv")
    for step, values in epochs:
        row = rows[step // 6 - 1]
        assert {name: str(value) for name, value in values.items()} == {n: text for n, text in row.items() if text}
    assert [step for step, _ in epochs] == [6, 12, 12]
    final = [(s, v) for s, v in fake.logged if "final_test_accuracy" in v]
    assert final == [(12, {"final_test_accuracy": result["test_accuracy"]})] * 2


def test_a_logger_that_fails_is_left_out_with_one_warning(folder_flags, monkeypatch, capsys):
    fake = Recorded(fails_at=6)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    assert train_vit.main([*folder_flags, "--log", "trackio"])["epochs"] == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: --log trackio: the server is gone; the run continues without it"]
    assert not fake.logged and not fake.finished


def test_a_logger_that_is_missing_or_does_not_start_is_one_line(folder_flags, tmp_path, monkeypatch):
    train_vit.main([*folder_flags, "--epochs", "1", "--run-name", "mine"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed: pip install wandb"):
        train_vit.main([*folder_flags, "--run-name", "mine", "--overwrite", "--log", "wandb"])
    assert (tmp_path / "runs/mine/result.json").exists()  # not yet overwritten
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=lambda **options: 1 / 0))
    for again in ([], ["--run-name", "mine", "--overwrite"]):
        with pytest.raises(UserError, match="--log trackio does not start: division by zero"):
            train_vit.main([*folder_flags, "--log", "trackio", *again])
    assert (tmp_path / "runs/mine/result.json").exists() and (tmp_path / "runs/mine/last.pt").exists()
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/runs")
    with pytest.raises(UserError, match="--log trackio logs on this machine alone: unset TRACKIO_SPACE_ID"):
        train_vit.main([*folder_flags, "--log", "trackio"])
    with pytest.raises(UserError, match="--log.*invalid choice: 'mlflow'"):
        train_vit.main([*folder_flags, "--log", "mlflow"])


def test_without_the_flags_nothing_of_them_is_imported(folder_flags):
    unwanted = "{'training.loggers', 'wandb', 'trackio', 'tensorboard'}"
    code = f"import sys, train_vit; train_vit.main({folder_flags}); assert not {unwanted} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_tensorboard_holds_each_row_once_after_a_kill(folder_flags, tmp_path, monkeypatch):
    """Killed between the log and the checkpoint of epoch 2, which is then trained and logged again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def killed(path, checkpoint):
        if checkpoint["epoch"] == 2:
            raise KeyboardInterrupt
        save_checkpoint(path, checkpoint)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.run.save_checkpoint", killed)
        train_vit.main([*folder_flags, "--log", "tensorboard", "--log-steps"])
    time.sleep(1.5)  # TensorBoard writes every second
    result = train_vit.main(["--resume", str(tmp_path / "runs/vit")])
    files = sorted((tmp_path / "runs/vit/tensorboard").iterdir())
    assert len(files) == 2 and "train_loss" in str(files[0].read_bytes())
    log = EventAccumulator(str(files[0].parent)).Reload()
    rows = rows_of(tmp_path / "runs/vit/log.csv")
    for name in ("train_loss", "test_accuracy", "lr"):
        found = [(event.step, event.value) for event in log.Scalars(name)]
        assert found == [(6 * (n + 1), pytest.approx(float(row[name]), rel=1e-6)) for n, row in enumerate(rows)]
    steps = rows_of(tmp_path / "runs/vit/steps.csv")
    assert [event.step for event in log.Scalars("step_loss")] == list(range(1, 13))
    assert [event.value for event in log.Scalars("step_loss")] == pytest.approx([float(row["loss"]) for row in steps])
    assert [(e.step, e.value) for e in log.Scalars("final_test_accuracy")] == [
        (12, pytest.approx(result["test_accuracy"]))
    ]
    assert "lr: 0.0005" in str(log.Tensors("arguments/text_summary")[0].tensor_proto)
    train_vit.main([*folder_flags, "--epochs", "1", "--overwrite"])
    assert not (tmp_path / "runs/vit/tensorboard").exists()


def stopped_and_resumed(folder_flags, folder, logger, env):
    """A run by two processes without a terminal to ask on; their outputs."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    stopped = run_train_vit(*folder_flags, "--log", logger, "--log-steps", "--minutes", "0.00001", env=env)
    assert stopped.returncode == 0 and "stopped in epoch 1 after step 1" in stopped.stdout, stopped.stderr
    resumed = run_train_vit("--resume", folder, env=env)
    assert resumed.returncode == 0, resumed.stderr
    return stopped, resumed


def records_in(data):
    """The records of a .wandb file: blocks of 32 KiB as in LevelDB's log, the first with a header of seven bytes."""
    place, record = 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline(folder_flags, tmp_path):
    """Two parts with one id, as `wandb sync` takes them; together each step once."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    folder = tmp_path / "runs/vit"
    env = {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home"), "WANDB_API_KEY": ""}
    stopped_and_resumed(folder_flags, folder, "wandb", env)
    parts = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and len({part.name.rpartition("-")[2] for part in parts}) == 1
    steps, epochs, config = [], [], ""
    for part in parts:
        (file,) = part.glob("run-*.wandb")
        for record in map(Record.FromString, records_in(file.read_bytes())):
            config += str(record.run.config)
            values = {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
            if "step_loss" in values:
                steps.append(record.history.step.num)
            if "train_loss" in values:
                epochs.append((record.history.step.num, values["train_loss"]))
    rows = rows_of(folder / "log.csv")
    assert steps == list(range(1, 13)) and epochs == [(6, rows[0]["train_loss"]), (12, rows[1]["train_loss"])]
    assert re.search(r'"embed_dim"\s+value_json: "16"', config)


@pytest.mark.slow
def test_trackio_stays_local_and_continues_its_run(folder_flags, tmp_path):
    pytest.importorskip("trackio")
    place, folder = tmp_path / "trackio", tmp_path / "runs/vit"
    env = {"TRACKIO_DIR": str(place), "HF_HUB_OFFLINE": "1"}
    stopped, resumed = stopped_and_resumed(folder_flags, folder, "trackio", env)
    name = re.search(r"Created new run: (vit-\w+)", stopped.stdout)[1]
    assert f"Resumed existing run: {name}" in resumed.stdout and "pace" not in stopped.stdout + resumed.stdout
    database = sqlite3.connect(place / "pets.db")
    rows = database.execute("select run_name, step, json(metrics) from metrics order by id").fetchall()
    assert {row[0] for row in rows} == {name}
    assert [step for _, step, values in rows if "step_loss" in values] == list(range(1, 13))
    assert [step for _, step, values in rows if "train_loss" in values] == [6, 12]
    assert [step for _, step, values in rows if "final_test_accuracy" in values] == [12]
    assert '"embed_dim":16' in "".join(row[0] for row in database.execute("select json(config) from configs"))
