"""Files of a run that are damaged, or are something else: named in one line, or replaced."""

import os

import numpy as np
import pytest
import torch

import compare
import rollout
import train_vit
from errors import UserError
from files import write_atomically
from maps.commands import read_table
from training.checkpoint import load_checkpoint, save_checkpoint

JSON = ["", "{", "[]", "3", "null", "{}", '{"scores": 3}', '{"test_accuracy": "high"}', "\0", "é" * 10]


@pytest.mark.parametrize(
    "text",
    [*JSON[:-2], '{"scores": {"a": {"b": 3}}}', '{"scores": {"a": {"b": "xy"}}}', '{"scores": {}, "curves": {"a": 3}}'],
)
def test_a_damaged_evaluation_is_replaced(text, tmp_path):
    (tmp_path / "evaluation.json").write_text(text, encoding="latin-1")
    assert read_table(tmp_path / "evaluation.json") is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "vit"
    flags = ["--dataset", "shapes", "--train-per-class", "2", "--epochs", "1", "--embed-dim", "16", "--depth", "1"]
    train_vit.main([*flags, "--num-heads", "1", "--device", "cpu", "--out-dir", str(folder.parent)])
    return folder


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "device")
    with pytest.raises(UserError, match="device cannot be written [(]it is no regular file"):
        write_atomically(tmp_path / "device", lambda file: file.write(b"x"))
    assert (tmp_path / "device").is_fifo() and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("text", JSON)
def test_a_damaged_result_is_named(text, run, capsys):
    (run / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="result.json is damaged .*: delete it, and the run is finished anew"):
        train_vit.main(["--resume", str(run)])
    compare.main([str(run)])
    assert "result.json is left out" in capsys.readouterr().err


def test_a_finished_run_whose_last_checkpoint_is_damaged_ends_once_more(folder_flags, tmp_path):
    folder = tmp_path / "runs" / "vit"
    result = train_vit.main(folder_flags)
    whole = load_checkpoint(folder)["weights"]
    (folder / "last.pt").write_bytes(b"PK")
    again = train_vit.main(["--resume", str(folder)])
    weights = load_checkpoint(folder)["weights"]
    assert all(weights[name].equal(whole[name]) for name in whole) and again["test_accuracy"] == result["test_accuracy"]


@pytest.mark.parametrize("content", [b"", b"\0" * 1000, b"PK\x03\x04 and no more"])
def test_a_damaged_best_checkpoint_is_named(content, run):
    (run / "best.pt").write_bytes(content)
    (run / "result.json").unlink(missing_ok=True)
    for command, argv in (
        (rollout, [str(run), "--which", "best", "--device", "cpu"]),
        (train_vit, ["--resume", str(run)]),
    ):
        with pytest.raises(UserError, match="best.pt is damaged or no checkpoint"):
            command.main(argv)


def damaged_copies(whole, *, cuts, flips):
    """The bytes of a file, cut at so many lengths, and with so many single bits flipped."""
    yield from (whole[: len(whole) * i // cuts] for i in range(cuts))
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), flips):
        copy = bytearray(whole)
        copy[place] ^= 1 << rng.integers(8)
        yield bytes(copy)


@pytest.mark.parametrize(("cuts", "flips"), [(8, 40), pytest.param(64, 500, marks=pytest.mark.slow)])
def test_of_a_damaged_checkpoint_the_one_before_is_opened(cuts, flips, run, tmp_path, capsys, tried):
    whole = (run / "last.pt").read_bytes()
    (tmp_path / "last.prev.pt").write_bytes(whole)
    before = load_checkpoint(tmp_path)["weights"]
    for copy in damaged_copies(whole, cuts=cuts, flips=flips):
        (tmp_path / "last.pt").write_bytes(copy)
        weights = load_checkpoint(tmp_path)["weights"]
        assert all(weights[name].equal(before[name]) for name in before)
        assert "last.pt is damaged" in capsys.readouterr().err
    tried("a checkpoint that is cut", cuts)
    tried("a checkpoint with a flipped bit", flips)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 99}, "another version of it: format_version"),
        ({"weights": {"w": torch.zeros(3)}}, "do not fit"),
        ({"weights": {"weight": torch.tensor([0, torch.nan])}}, "weights is missing, not finite or makes no sense"),
        ({"model_args": {"embed_dim": 32, "depth": 1, "num_heads": 1}}, "do not fit"),
    ],
)
def test_another_version_and_other_or_infinite_weights_are_one_line(change, said, run, tmp_path, tried):
    save_checkpoint(tmp_path / "vit.pt", load_checkpoint(run) | change)
    with pytest.raises(UserError, match=said):
        rollout.main([str(tmp_path / "vit.pt"), "--device", "cpu"])
    tried("a checkpoint of another version, or with other weights")
