import io
import os
import pickle

import numpy as np
import pytest
import torch

from errors import UserError
from files import write_atomically
from models import build_model
from training.checkpoint import FIELDS, FORMAT_VERSION, load_checkpoint, open_checkpoint, rebuild_model, save_checkpoint
from training.outputs import COLUMNS


def small_checkpoint(epoch=1):
    row = dict.fromkeys(COLUMNS) | {"epoch": epoch, "test_accuracy": 0.25}
    return {
        "format_version": FORMAT_VERSION,
        "model": "vit",
        "model_args": {},
        "classes": ["cat", "dog"],
        "image_size": 8,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "weights": {"w": torch.arange(100_000.0)},
        "ema": None,
        "optimizer": {},
        "schedule": {},
        "scaler": {},
        "seed": 0,
        "epoch": epoch,
        "step": 3,
        "sums": {"loss": torch.zeros(()), "images": 5},
        "history": [row],
        "args": {"dataset": "shapes", "data_dir": "datasets"},
    }


def test_it_comes_back_and_the_one_before_is_kept(tmp_path, capsys):
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "last.pt", small_checkpoint(epoch))
    assert torch.equal(load_checkpoint(tmp_path)["weights"]["w"], torch.arange(100_000.0))
    assert f"{tmp_path / 'last.pt'}: vit in epoch 3 after step 3, test 25.00%" in capsys.readouterr().out
    assert open_checkpoint(tmp_path / "last.prev.pt")["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["last.prev.pt", "last.pt"]


def test_every_flipped_bit_in_the_weights_is_found(tmp_path):
    """torch.load itself reads such a file without a word."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, small_checkpoint())
    data = bytearray(path.read_bytes())
    start = bytes(data).index(torch.arange(100_000.0).numpy().tobytes()[4:400])
    for offset in (0, 1234, 399_000):
        damaged = bytearray(data)
        damaged[start + offset] ^= 1 << 4
        path.write_bytes(damaged)
        assert torch.load(path, weights_only=True)["epoch"] == 1
        with pytest.raises(UserError, match="last.pt is damaged"):
            open_checkpoint(path)


@pytest.mark.parametrize("cut", [0, 10, 5000])
def test_a_damaged_last_is_replaced_by_the_one_before_with_a_warning_that_names_both(tmp_path, capsys, cut):
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "last.pt", small_checkpoint(epoch))
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:cut])
    assert load_checkpoint(tmp_path)["epoch"] == 1
    warning = capsys.readouterr().err
    assert "warning:" in warning and str(tmp_path / "last.pt") in warning and str(tmp_path / "last.prev.pt") in warning
    (tmp_path / "last.prev.pt").unlink()
    with pytest.raises(UserError, match="last.pt is damaged"):
        load_checkpoint(tmp_path)


def test_killed_between_the_two_renames(tmp_path):
    for epoch in (1, 2):
        save_checkpoint(tmp_path / "last.pt", small_checkpoint(epoch))
    (tmp_path / "last.pt").unlink()
    assert load_checkpoint(tmp_path)["epoch"] == 1


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def test_a_file_from_a_stranger_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": RunsCode()}, "evil.pt")
    with open("older.pt", "wb") as file:
        pickle.dump({"weights": RunsCode()}, file)
    for name in ("evil.pt", "older.pt"):
        with pytest.raises(UserError, match=f"{name} is "):
            open_checkpoint(name)
    assert not os.path.exists("code-was-run")
    torch.load("evil.pt", weights_only=False)
    assert os.path.exists("code-was-run")  # the file would have


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    for name in ("list.pt", "other.pt"):
        with pytest.raises(UserError, match="no checkpoint of this project"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="there is no checkpoint .*best.pt"):
        load_checkpoint(tmp_path, which="best")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("old")

    def disk_is_full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="log.csv cannot be written .No space left"):
        write_atomically(path, disk_is_full)
    with pytest.raises(KeyError, match="a bug"):
        write_atomically(path, lambda file: {}["a bug"])
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["log.csv"]


@pytest.mark.parametrize("room", [0, 1000, 300_000])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_and_nothing_else(tmp_path, room):
    """Of torch.save, which makes a RuntimeError of the file's OSError wherever that comes."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, small_checkpoint())

    class FullDisk(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr("builtins.open", lambda name, mode: FullDisk(name, "w+"))
        save_checkpoint(path, small_checkpoint(2))
    assert str(caught.value) == f"{path} cannot be written (No space left on device)"
    assert os.listdir(tmp_path) == ["last.pt"] and open_checkpoint(path)["epoch"] == 1


def flipped(path, rng, count):
    """The bytes of a file with one bit flipped: `count` anywhere, and one in every fourth byte of the zip's end."""
    data = path.read_bytes()
    for place in [*rng.integers(0, len(data), count), *range(data.index(b"PK\x01\x02"), len(data), 4)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        yield damaged


def same_contents(a, b):
    weights = [checkpoint.pop("weights")["w"] for checkpoint in (a, b)]
    return torch.equal(*weights) and a == b


def test_a_flipped_bit_anywhere_is_found_or_without_effect(tmp_path):
    """Of an older file, which has no digest, too: whatever is raised is one line, and last.prev.pt is opened."""
    small = small_checkpoint() | {"weights": {"w": torch.arange(100.0)}, "sums": {}}
    save_checkpoint(tmp_path / "last.pt", small)
    refused = []
    for damaged in flipped(tmp_path / "last.pt", np.random.default_rng(0), 200):
        (tmp_path / "last.pt").write_bytes(damaged)
        try:
            assert same_contents(open_checkpoint(tmp_path / "last.pt"), dict(small))
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 300 and all("last.pt is damaged" in line and "\n" not in line for line in refused)

    torch.save(small, tmp_path / "older.pt")
    save_checkpoint(tmp_path / "last.prev.pt", small | {"epoch": 0})
    assert same_contents(open_checkpoint(tmp_path / "older.pt"), dict(small))
    for damaged in flipped(tmp_path / "older.pt", np.random.default_rng(1), 200):
        (tmp_path / "last.pt").write_bytes(damaged)
        assert load_checkpoint(tmp_path)["epoch"] in (0, 1)


ODD = [None, 5, -1, "x", [], {}, [None], {"a": None}, {1: 2}, torch.zeros(2, 2), float("nan")]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_or_odd_is_one_line(tmp_path, name):
    path, good = tmp_path / "epoch-1.pt", small_checkpoint()
    for odd in [*ODD, ...]:
        save_checkpoint(path, good | {name: odd} if odd is not ... else {k: v for k, v in good.items() if k != name})
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            assert str(error).startswith(f"{path} is no checkpoint of this project, or") and "\n" not in str(error)
        else:  # a value of the right type: which of these is never what the others are taken for
            assert type(checkpoint[name]) is type(good[name]) or name == "ema"


def test_what_was_saved_under_the_wrong_name_does_not_fit_its_model(tmp_path):
    odd = [{"model": "vit"}, {"model_args": {"depth": "x"}}, {"model_args": {"colour": 1}}, {"model": "no such"}]
    for change in odd:
        with pytest.raises(
            UserError, match="unknown model 'no such'|do not fit its model and model_args [(]"
        ) as caught:
            rebuild_model(small_checkpoint() | change, build_model)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_where_both_are_damaged_both_are_named(tmp_path, capsys):
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / name).write_text("nothing")
    with pytest.raises(UserError, match="last.prev.pt is damaged"):
        load_checkpoint(tmp_path)
    assert "last.pt is damaged or no checkpoint" in capsys.readouterr().err
