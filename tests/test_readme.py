"""What README.md says is true: its commands, its files, its flags, and its numbers."""

import json
import re
from pathlib import Path

import pytest

import train_vit

README = Path("README.md").read_text()


def test_flags_exist():
    known = {flag for action in train_vit.vit_parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


def test_files_exist():
    named = set(re.findall(r"[\w/-]+\.(?:py|txt)\b", README)) - {"classes.txt"}
    found = {path.name for path in Path().glob("*")} | {path.name for path in Path().glob("*/*.py")}
    assert {Path(name).name for name in named} <= found


def test_python_blocks_run(folder_flags, tmp_path, monkeypatch, capsys):
    """The two blocks, with a run that takes a second instead of the one that they name."""
    blocks = re.findall(r"(?:^    (?:import|from) .*\n(?:\n?    .*\n)*)", README, re.M)
    assert len(blocks) == 2
    notebook, loading = ("\n".join(line[4:] for line in block.splitlines()) for block in blocks)
    notebook = notebook.replace('"--dataset", "shapes"', ", ".join(map(repr, folder_flags)))
    exec(notebook, scope := {})
    assert scope["results"]["epochs"] == 2
    exec(loading.replace("checkpoints/vit", str(tmp_path / "runs" / "mine")), scope := {})
    assert not scope["model"].training and scope["checkpoint"]["epoch"] == 2


@pytest.mark.parametrize("row", re.findall(r"^\| .*`results/.*$", README, re.M))
def test_numbers_come_from_results(row):
    result = json.loads(Path(re.search(r"`(results/[\w.-]+)`", row)[1]).read_text())
    for said in (
        f"{result['test_accuracy']:.2%}",
        f"{result['params']:,}",
        result["device"],
        f"{result['epochs']} epochs",
    ):
        assert said.replace("%", " %") in row, said
