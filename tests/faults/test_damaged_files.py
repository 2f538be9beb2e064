"""Files of a run that are damaged, or are something else: named in one line, or replaced."""

import pytest

import compare
import rollout
import train_vit
from errors import UserError
from maps.commands import read_table

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


@pytest.mark.parametrize("text", JSON)
def test_a_damaged_result_is_named(text, run, capsys):
    (run / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="result.json is damaged .*: delete it, and the run is finished anew"):
        train_vit.main(["--resume", str(run)])
    compare.main([str(run)])
    assert "result.json is left out" in capsys.readouterr().err


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
