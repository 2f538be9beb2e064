"""train_vit.py from end to end: what it writes, how it is stopped and resumed, and what it says to a user's mistake."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, error_line, run_train_vit, same_weights, write_images
from PIL import Image

import compare
import models.vit
import train_cct
import train_resnet_attn
import train_vit
from errors import UserError
from models import build_model
from training.checkpoint import load_checkpoint, rebuild_model
from training.interrupt import Interrupted, Watch


def test_a_run_writes_what_it_promises(folder_flags, tmp_path, capsys):
    result = train_vit.main([*folder_flags, "--val-fraction", "0.25", "--save-epochs", "1"])
    folder = tmp_path / "runs" / "vit"
    assert {path.name for path in folder.iterdir()} == {
        *(
            "last.pt",
            "last.prev.pt",
            "best.pt",
            "epoch-1.pt",
            "log.csv",
            "curves.png",
            "predictions.npz",
            "result.json",
        ),
        "split.csv",
    }
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["dataset_name"] == "pets" and result["images"] == {"train": 36, "val": 12, "test": 12}
    assert result["recipe"] == "report" and result["args"]["lr"] == 5e-4 and "data_dir" not in result["args"]
    assert result["epochs"] == 2 and result["device"] and result["torch"] == torch.__version__
    assert len(result["data_hash"]) == 64 and result["test_accuracy_at_best_val"] is not None

    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert (
        len(rows) == 2 and float(rows[1]["val_accuracy"]) == result["val_accuracy"] and rows[1]["test_accuracy"] == ""
    )
    with np.load(folder / "predictions.npz") as saved:
        assert (saved["logits"].argmax(1) == saved["labels"]).mean() == pytest.approx(result["test_accuracy"])
        assert saved["names"][0].startswith("ant/") and saved["classes"].tolist() == ["ant", "bee", "cat"]
    split = list(csv.DictReader((folder / "split.csv").open()))
    assert len(split) == 60 and {row["split"] for row in split} == {"train", "val", "test"}
    assert Image.open(folder / "curves.png").size == (1200, 480)
    assert (folder / "last.pt").stat().st_size > 10_000

    out = capsys.readouterr().out
    assert out.startswith("recipe report: folder, 2 epochs, batch 8, lr 0.0005")
    assert "8 x 8 patches" in out and "expected end:" in out and f"python rollout.py {folder}" in out
    assert all(str(path) in out for path in folder.iterdir())


def test_without_validation_the_test_set_is_looked_at_and_chooses_nothing(folder_flags, tmp_path, capsys):
    result = train_vit.main(folder_flags)
    folder = tmp_path / "runs" / "vit"
    rows = list(csv.DictReader((folder / "log.csv").open()))
    assert float(rows[-1]["test_accuracy"]) == result["test_accuracy"] and result["test_accuracy_at_best_val"] is None
    assert result["best_on_test"] == max(float(row["test_accuracy"]) for row in rows)
    assert (folder / "best_on_test.pt").exists() and not (folder / "best.pt").exists()
    assert "no result" in capsys.readouterr().out


def test_what_was_saved_can_be_loaded_and_gives_the_same_logits(folder_flags, tmp_path):
    train_vit.main([*folder_flags, "--amp", "off"])
    folder = tmp_path / "runs" / "vit"
    checkpoint = load_checkpoint(folder)
    model = rebuild_model(checkpoint, build_model)
    with np.load(folder / "predictions.npz") as saved:
        logits, names = saved["logits"], saved["names"]
    pixels = np.asarray(Image.open(tmp_path / "pets" / names[0]).crop((4, 0, 36, 32))).transpose(2, 0, 1)
    mean, std = (torch.tensor(checkpoint[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        ours = model((torch.tensor(pixels) / 255 - mean)[None] / std)
    torch.testing.assert_close(ours[0], torch.tensor(logits[0]), rtol=0, atol=1e-5)


def test_one_seed_gives_one_run_and_another_seed_another(folder_flags, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name))
        torch.rand(ord(name))  # what happened before does not matter
        train_vit.main([*folder_flags, "--run-name", name, "--seed", str(seed)])
    runs = tmp_path / "runs"
    assert same_weights(runs / "a/last.pt", runs / "b/last.pt")
    assert not same_weights(runs / "a/last.pt", runs / "c/last.pt")


def stop_after(monkeypatch, steps, action):
    """Lets `action` happen after so many steps of training, counted over all epochs."""
    original, counted = Watch.__call__, []

    def call(watch, sums):
        counted.append(sums["step"])
        if len(counted) == steps:
            action()
        return original(watch, sums)

    monkeypatch.setattr(Watch, "__call__", call)


def test_a_closed_terminal_saves_but_nohup_goes_on(folder_flags, tmp_path, monkeypatch, capsys):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        train_vit.main(folder_flags)
    assert stopped.value.exit_code == 129 and torch.load(tmp_path / "runs/vit/last.pt")["step"] == 2
    captured = capsys.readouterr()
    assert "stopped in epoch 1 after step 2; to resume" in captured.out
    assert captured.err.strip() == "stopping after this step; once more: at once"
    monkeypatch.setattr(signal, "SIGHUP", signal.SIGUSR1)  # to be ignored without harm to pytest's own handler
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert train_vit.main(["--resume", str(tmp_path / "runs/vit")])["epochs"] == 2
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("steps", [1, 4, 6, 9, 12])
@pytest.mark.parametrize("sched", ["multistep", "cosine"])
def test_stopped_anywhere_and_resumed_it_is_the_same_run(folder_flags, tmp_path, monkeypatch, steps, sched):
    """An epoch has six steps: so after the first, inside, at the end of an epoch, in the next, and at the very end."""
    flags = [*folder_flags, "--sched", sched, "--val-fraction", "0.1", "--drop", "0.3"]
    whole = train_vit.main([*flags, "--run-name", "whole"])
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        stop_after(patch, steps, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_vit.main([*flags, "--run-name", "cut"])
    assert stopped.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    checkpoint = torch.load(tmp_path / "runs/cut/last.pt")
    assert checkpoint["epoch"] * 6 + checkpoint["step"] == steps
    resumed = train_vit.main(["--resume", str(tmp_path / "runs" / "cut")])
    assert same_weights(tmp_path / "runs/whole/last.pt", tmp_path / "runs/cut/last.pt")
    rows = [list(csv.DictReader((tmp_path / "runs" / name / "log.csv").open())) for name in ("whole", "cut")]
    for key in ("epoch", "lr", "train_loss", "train_accuracy", "val_loss"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]
    assert resumed["test_accuracy"] == whole["test_accuracy"]


def test_resume_auto_starts_goes_on_and_knows_when_it_is_done(folder_flags, tmp_path, monkeypatch, capsys):
    flags = [*folder_flags, "--run-name", "cell", "--resume", "auto"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        train_vit.main(flags)
    result = train_vit.main(flags)
    assert result["epochs"] == 2
    assert train_vit.main(flags) == result and "is finished: test accuracy" in capsys.readouterr().out


def test_minutes_stop_it_without_an_error(folder_flags, capsys):
    assert train_vit.main([*folder_flags, "--minutes", "0.000001"]) is None
    out = capsys.readouterr().out
    assert "stopped in epoch 1 after step 1; to resume: python train_vit.py --resume" in out
    run = out.split("--resume ")[1].strip()
    assert train_vit.main(["--resume", run])["epochs"] == 2  # the limit was that of one start


def test_patience_ends_a_run_that_does_not_get_better(folder_flags, tmp_path):
    result = train_vit.main(
        [*folder_flags, "--epochs", "50", "--val-fraction", "0.1", "--patience", "2", "--lr", "1e-9"]
    )
    assert result["epochs"] == 3 and result["args"]["epochs"] == 50
    with pytest.raises(UserError, match="--patience 2 needs validation images: --val-fraction"):
        train_vit.main([*folder_flags, "--patience", "2"])


def test_skip_test_leaves_the_test_set_shut_until_the_run_is_resumed(folder_flags, tmp_path, monkeypatch, capsys):
    flags, folder = [*folder_flags, "--val-fraction", "0.2"], tmp_path / "runs" / "shut"
    whole = train_vit.main([*flags, "--run-name", "whole"])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("training.run.validate", None)  # of the test images; the epochs have their own
        shut = train_vit.main([*flags, "--run-name", "shut", "--skip-test"])
        assert train_vit.main(["--resume", str(folder), "--skip-test"]) == shut
    said = capsys.readouterr().out
    assert said.count(f"validation accuracy {whole['val_accuracy']:.2%} after epoch 2, without a test\n") == 2
    assert f"open the test set: python train_vit.py --resume {folder}\n" in said and "test accuracy" not in said
    assert not (folder / "predictions.npz").exists() and shut["test_accuracy"] is None
    compare.main([str(folder), str(tmp_path / "runs" / "whole"), "--by", "val"])
    assert f"{100 * whole['val_accuracy']:.2f} %" in capsys.readouterr().out
    assert train_vit.main(["--resume", str(folder)])["test_accuracy"] == whole["test_accuracy"]
    with pytest.raises(UserError, match="--skip-test needs validation images: --val-fraction 0.1"):
        train_vit.main([*folder_flags, "--skip-test"])


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(folder_flags, tmp_path, monkeypatch):
    original = models.vit.VisionTransformer.forward
    calls = []

    def forward(self, images):
        calls.append(self.training)
        return original(self, images) * (float("nan") if sum(calls) == 9 else 1)

    monkeypatch.setattr(models.vit.VisionTransformer, "forward", forward)
    with pytest.raises(UserError, match="the loss is not finite: epoch 2, step 3, learning rate 5e-05"):
        train_vit.main(folder_flags)
    checkpoint = torch.load(tmp_path / "runs/vit/last.pt")
    assert checkpoint["epoch"] == 1 and all(value.isfinite().all() for value in checkpoint["weights"].values())


def test_a_bug_keeps_its_traceback(folder_flags, tmp_path):
    """A ValueError inside a model is no user's mistake."""
    code = """
import sys, models.vit, train_vit
from errors import run_script
def forward(self, images):
    raise ValueError("planted")
models.vit.VisionTransformer.forward = forward
run_script(train_vit.main)
"""
    process = subprocess.run(
        [sys.executable, "-c", code, *folder_flags], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert process.returncode == 1 and "Traceback" in process.stderr and "ValueError: planted" in process.stderr


def test_weight_decay_leaves_vectors_and_embeddings_alone_unless_told(folder_flags, tmp_path):
    def decays(*flags):
        train_vit.main([*folder_flags, "--overwrite", "--epochs", "1", *flags])
        checkpoint = torch.load(tmp_path / "runs/vit/last.pt")
        return [(group["weight_decay"], len(group["params"])) for group in checkpoint["optimizer"]["param_groups"]]

    total = len(build_model("vit", depth=2).state_dict())
    matrices = 1 + 2 * 4 + 1  # patch embedding, four a block, head
    assert decays("--weight-decay", "0.1") == [(0.1, total)]
    assert decays("--weight-decay", "0.1", "--no-decay-all") == [(0.1, matrices), (0.0, total - matrices)]


def test_the_first_step_comes_within_ten_seconds(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train_vit.py", "--dataset", "shapes", "--out-dir", tmp_path, "--save-minutes", "0.0001"],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
    )
    started = time.monotonic()
    try:
        while not (tmp_path / "vit" / "last.pt").exists():  # written after the first step
            assert time.monotonic() - started < 10 and process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()


def kill_and_resume(tmp_path, *, kills, flags, seconds, script="train_vit.py"):
    """Two runs with the same flags: one left alone, one killed with -9 at random moments and resumed; their last.pt."""
    command = [sys.executable, script, "--out-dir", str(tmp_path), "--save-minutes", "0.01", *flags]
    subprocess.run([*command, "--run-name", "alone"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    moments = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen(
            [*command, "--run-name", "killed", "--resume", "auto"], cwd=REPOSITORY, stdout=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(*seconds))
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was still running
    subprocess.run(
        [*command, "--run-name", "killed", "--resume", "auto"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL
    )
    return tmp_path / "alone" / "last.pt", tmp_path / "killed" / "last.pt"


@pytest.mark.slow
def test_killed_ten_times_and_resumed_the_weights_are_the_same(tmp_path):
    flags = ["--dataset", "shapes", "--epochs", "6"]
    assert same_weights(*kill_and_resume(tmp_path, kills=10, flags=flags, seconds=(4, 12)))


BAD_FLAGS = {
    "--no-such-flag": ["--no-such-flag"],
    "cifar11": ["--dataset", "cifar11"],
    "--epochs: must be at least 1, not 0": ["--epochs", "0"],
    "--epochs: must be at least 1, not -3": ["--epochs", "-3"],
    "--epochs: invalid int value: 'many'": ["--epochs", "many"],
    "--batch-size: must be at least 1, not 0": ["--batch-size", "0"],
    "--lr: must be above 0, not nan": ["--lr", "nan"],
    "--val-fraction: must be at least 0 and below 1, not 1": ["--val-fraction", "1"],
    "--image-size 30 is not divisible by --patch-size 4: use 28 or 32, or --pad": ["--image-size", "30"],
    "--embed-dim 250 is not divisible by --num-heads 8": ["--embed-dim", "250"],
    "--scale 0.9 0.5: the first must not be above": ["--scale", "0.9", "0.5"],
    "--dataset folder needs --data-dir": ["--dataset", "folder"],
    "nowhere: there is no such folder": ["--dataset", "folder", "--data-dir", "nowhere"],
    "--device abacus": ["--device", "abacus"],
    "--resume nowhere: that is no run's folder, and no last.pt": ["--resume", "nowhere"],
    "--run-name '': it must be the name of a folder below --out-dir": ["--run-name", ""],
    "--run-name '../x': it must be the name": ["--run-name", "../x"],
    "--overwrite and --resume exclude each other": ["--resume", "auto", "--overwrite"],
    "--resume there writes to that folder: leave out --run-name": ["--resume", "there", "--run-name", "mine"],
}


@pytest.mark.parametrize("message", BAD_FLAGS)
def test_a_mistake_is_named(message, tmp_path):
    with pytest.raises(UserError) as error:
        where = [] if message.startswith("--resume nowhere") else ["--out-dir", str(tmp_path)]
        train_vit.main([*BAD_FLAGS[message], *where])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_and_exit_code_2(folder_flags, tmp_path):
    assert "--epochs: must be at least 1" in error_line(run_train_vit("--epochs", 0))
    (tmp_path / "pets" / "ant" / "000.png").write_bytes(b"no image")
    assert "ant/000.png cannot be decoded" in error_line(run_train_vit(*folder_flags))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(folder_flags):
    with pytest.raises(UserError, match="--device cuda: this machine, or this build of torch, has none"):
        train_vit.main([*folder_flags, "--device", "cuda"])


def test_resuming_another_run_names_what_differs(folder_flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        train_vit.main(folder_flags)
    run = tmp_path / "runs" / "vit"
    before = (run / "last.pt").read_bytes()
    with pytest.raises(
        UserError, match="is another run: --lr is 0.0005 there and 0.1 here; --depth is 2 there and 3 here"
    ):
        train_vit.main(["--resume", str(run), "--depth", "3", "--lr", "0.1"])
    checkpoint = torch.load(run / "last.pt")
    torch.save(checkpoint | {"model": "cct_6_3x1"}, run / "last.pt")
    with pytest.raises(UserError, match="train_vit.py does not train the model there, cct_6_3x1"):
        train_vit.main(["--resume", str(run)])
    (run / "last.pt").write_bytes(before)
    write_images(tmp_path / "pets", classes=("dodo",), count=20)
    with pytest.raises(UserError, match="has the classes ant, bee, cat, the images ant, bee, cat, dodo"):
        train_vit.main(["--resume", str(run)])
    shutil.rmtree(tmp_path / "pets" / "dodo")
    for path in (tmp_path / "pets" / "ant").iterdir():
        Image.new("RGB", (32, 32)).save(path)
    with pytest.raises(UserError, match="the training images are not those of the run to resume"):
        train_vit.main(["--resume", str(run)])
    assert (run / "last.pt").read_bytes() == before


def test_what_can_be_resumed_and_what_starts_anew(folder_flags, tmp_path, monkeypatch, capsys):
    """last.pt stands for its folder; a name is looked for where runs are written; more epochs are a new run."""
    monkeypatch.chdir(tmp_path)
    flags = [flag if flag != str(tmp_path / "runs") else "checkpoints" for flag in folder_flags]
    assert train_vit.main([*flags, "--minutes", "0.000001"]) is None
    for wrong in ("vit", "elsewhere/vit"):
        with pytest.raises(UserError, match=f"--resume {wrong}: that is no run's .*; use --resume checkpoints/vit$"):
            train_vit.main(["--resume", wrong])
    with pytest.raises(UserError, match="--resume .*log.csv: that is no run's folder, and no last.pt$"):
        train_vit.main(["--resume", "checkpoints/vit/log.csv"])
    assert train_vit.main(["--resume", "checkpoints/vit/last.pt"])["epochs"] == 2
    with pytest.raises(
        UserError, match="--epochs is 2 there and 3 here; .* a new run, its flags and --init-from checkpoints/vit$"
    ):
        train_vit.main(["--resume", "checkpoints/vit", "--epochs", "3"])
    last = torch.load("checkpoints/vit/last.pt")
    more = [*flags, "--lr", "1e-12", "--epochs", "1", "--init-from"]
    for number, start in enumerate(["checkpoints/vit", "checkpoints/vit/last.pt"], 2):
        assert train_vit.main([*more, start])
        assert "left out: nothing" in capsys.readouterr().out
        new = torch.load(f"checkpoints/vit-{number}/last.pt")
        assert new["mean"] == last["mean"]
        assert all(torch.allclose(new["weights"][name], last["weights"][name]) for name in last["weights"])
    shutil.rmtree(tmp_path / "pets" / "cat")
    assert train_vit.main([*more, "checkpoints/vit", "--minutes", "0.000001"]) is None
    assert "left out: head.weight, head.bias" in capsys.readouterr().out
    shutil.rmtree("checkpoints/vit")
    assert train_vit.main(["--resume", "checkpoints/vit-4"])["init_from"] == "vit"
    assert torch.load("checkpoints/vit-4/last.pt")["mean"] == last["mean"]


@pytest.mark.parametrize("text", ["<!DOCTYPE html><title>Not found</title>", "a text", "", "PK\x03\x04 no zip"])
def test_init_from_a_file_that_holds_no_weights(text, folder_flags, tmp_path):
    (tmp_path / "page.pt").write_text(text)
    with pytest.raises(UserError, match="--init-from .*page.pt: it is neither a checkpoint nor a file of weights") as e:
        train_vit.main([*folder_flags, "--init-from", str(tmp_path / "page.pt")])
    assert "\n" not in str(e.value) and "weights_only" not in str(e.value)


def test_a_damaged_checkpoint_goes_on_from_the_one_before(folder_flags, tmp_path, monkeypatch, capsys):
    train_vit.main([*folder_flags, "--run-name", "whole"])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
        train_vit.main(folder_flags)
    run = tmp_path / "runs" / "vit"
    data = bytearray((run / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "last.pt").write_bytes(data)
    train_vit.main(["--resume", str(run)])
    assert "last.pt is damaged" in (warning := capsys.readouterr().err) and "last.prev.pt" in warning
    assert same_weights(tmp_path / "runs/whole/last.pt", run / "last.pt")


def test_a_name_that_is_taken_and_a_folder_that_cannot_be_written(folder_flags, tmp_path):
    train_vit.main([*folder_flags, "--epochs", "1", "--run-name", "mine"])
    before = (tmp_path / "runs/mine/last.pt").read_bytes()
    with pytest.raises(UserError, match="--run-name mine: .* exists; use --resume .*, or --overwrite"):
        train_vit.main([*folder_flags, "--run-name", "mine"])
    with pytest.raises(UserError, match="--image-size 30"):
        train_vit.main([*folder_flags, "--run-name", "mine", "--overwrite", "--image-size", "30"])
    assert (tmp_path / "runs/mine/last.pt").read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        train_vit.main([*folder_flags, "--out-dir", str(tmp_path / "pets/ant/000.png")])


def test_a_misspelt_flag_is_answered_with_the_one_that_was_meant():
    for flag, meant in (("--epoch", "--epochs"), ("--qqq=3", None), ("--embed-dims=3", "--embed-dim")):
        with pytest.raises(UserError) as caught:
            train_vit.main([flag, "5"])
        assert str(caught.value).endswith(f"; did you mean {meant}?") if meant else "mean" not in str(caught.value)


def test_summary_trains_nothing(tmp_path, capsys):
    assert train_vit.main(["--summary", "--dataset", "cifar100", "--out-dir", str(tmp_path)]) is None
    assert "3,218,276" in capsys.readouterr().out and list(tmp_path.iterdir()) == [tmp_path / "schedule.png"]


def test_memory_used_up_in_an_epoch_or_in_judging_it_is_one_line(folder_flags, monkeypatch):
    for part in ("train_one_epoch", "validate"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="--batch-size 8 does not fit"):
            patch.setattr(train_vit, part, lambda **options: torch.empty(2**60))
            train_vit.main([*folder_flags, "--batch-size", "8", "--run-name", part])


def test_the_minutes_count_from_the_start_of_the_script(folder_flags, monkeypatch, capsys):
    load = train_vit.dataset_of
    monkeypatch.setattr(train_vit, "dataset_of", lambda *args: time.sleep(1.5) or load(*args))
    assert train_vit.main([*folder_flags, "--epochs", "1000", "--minutes", "0.025"]) is None
    assert "stopped in epoch 1 after step 1;" in capsys.readouterr().out


def test_summary_of_torchvisions_vit_counts_its_attention(tmp_path, capsys):
    assert train_vit.main(["--summary", "--model", "vit_b_16", "--out-dir", str(tmp_path)]) is None
    (total,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    assert total.split()[-2:] == ["85,806,346", "17,563,067,904"]


def test_help_all_names_every_flag_that_design_promises(capsys):
    assert train_vit.main(["--help-all"]) is None
    text = capsys.readouterr().out
    promised = "dataset data-dir run-name out-dir resume overwrite val-fraction split-seed save-epochs save-minutes"
    assert all(f"--{name}" in text for name in (promised + " minutes patience").split())


@pytest.mark.parametrize("script", [train_vit, train_cct, train_resnet_attn])
def test_help_is_one_screen_with_the_defaults_of_the_recipe(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    script.main(["--help"])
    text = capsys.readouterr().out
    flags = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.M)) - {"--help", "--help-all"}
    assert 10 < len(flags) <= 26 and len(text.splitlines()) <= 60
    assert "--weight-decay" not in text and "more flags: --help-all" in text
    script.main(["--help", "--dataset", "shapes", "--lr", "0.5"])
    shapes = capsys.readouterr().out
    epochs = script.RECIPES["quick"]["epochs"]
    assert re.search(rf"--epochs .*?\(default: {epochs}\)", shapes, re.S) and f"(default: {epochs})" not in text
    for recipe in script.RECIPES:
        assert recipe in text


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (["--warmup-epochs", "2"], "--warmup-epochs has no effect here: it needs --sched cosine"),
        (["--sched", "cosine", "--gamma", "0.2"], "--gamma has no effect here: it needs --sched multistep"),
        (["--momentum", "0.8"], "--momentum has no effect here: it needs --opt sgd"),
        (["--opt", "sgd", "--sched", "onecycle", "--momentum", "0.8"], "--momentum has no effect here"),
        (["--opt", "muon", "--opt-eps", "1e-6"], "--opt-eps has no effect here: it needs --opt adam or adamw"),
        (["--fill", "9"], "--fill has no effect here: it needs --aa or --rotate"),
        (
            ["--attention", "identity", "--num-heads", "2"],
            "--num-heads has no effect here: it needs an --attention with",
        ),
        (["--test-fraction", "0.3"], "--test-fraction has no effect here: it needs --dataset folder"),
    ],
)
def test_a_flag_without_effect_is_refused(flags, needed, tmp_path):
    with pytest.raises(UserError, match=needed):
        train_vit.main([*flags, "--out-dir", str(tmp_path)])


def test_a_checkpoint_from_before_a_flag_existed_resumes(folder_flags, tmp_path):
    train_vit.main([*folder_flags, "--minutes", "0.000001"])
    path = tmp_path / "runs/vit/last.pt"
    checkpoint = torch.load(path)
    for name in ("reprob", "cutout", "model_ema_decay", "profile"):
        del checkpoint["args"][name]
    checkpoint["sums"]["pictures"] = checkpoint["sums"].pop("images")
    del checkpoint["sums"]["step"]
    torch.save(checkpoint, path)
    assert train_vit.main(["--resume", str(path.parent)])["epochs"] == 2


def test_a_short_strong_run_of_vit_b_16_is_light_on_a_folder_too(image_folder):
    given = {"recipe": "strong", "epochs": 5, "model": "vit_b_16"}
    for more, size in (({"dataset": "cifar10"}, 32), ({"dataset": "folder", "data_dir": str(image_folder)}, 224)):
        _, defaults = train_vit.chosen_recipe(given | more)
        assert defaults["image_size"] == size and defaults["aa"] == "none" and not defaults["mixup"]
    assert "image_size" not in train_vit.LIGHT
