"""What README.md says is true: its commands, its files, its flags, and its numbers."""

import json
import re
from pathlib import Path

import pytest
import torch

import campaign
import compare
import rollout
import train_cct
import train_resnet_attn
import train_vit

README = Path("README.md").read_text()


def test_flags_exist():
    training = [train_vit.vit_parser(), train_cct.cct_parser(), train_resnet_attn.resnet_parser()]
    others = [campaign.campaign_parser(), compare.compare_parser()]
    parsers = [*training, *others, rollout.rollout_parser()]  # attribute.py has no flag of its own
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


def test_files_exist():
    named = set(re.findall(r"[\w/-]+\.(?:py|txt)\b", README)) - {"classes.txt"}
    found = {path.name for path in Path().glob("*")} | {path.name for path in Path().glob("*/*.py")}
    assert {Path(name).name for name in named} <= found


def test_python_blocks_run(folder_flags, tmp_path, monkeypatch, capsys):
    """The four blocks, with a run that takes a second instead of the one that they name."""
    blocks = re.findall(r"(?:^    (?:import|from) .*\n(?:\n?    .*\n)*)", README, re.M)
    assert len(blocks) == 4
    blocks = ("\n".join(line[4:] for line in block.splitlines()) for block in blocks)
    own_attention, notebook, loading, recording = blocks
    exec(own_attention, scope := {})
    try:
        train_vit.main([*folder_flags, "--attention", "mean", "--run-name", "own"])
    finally:
        del scope["ATTENTIONS"]["mean"]
    exec(notebook.replace('"--dataset", "shapes"', ", ".join(map(repr, folder_flags))), scope := {})
    assert scope["results"]["epochs"] == 2
    exec(loading.replace("checkpoints/vit", str(tmp_path / "runs" / "mine")), scope := {})
    assert not scope["model"].training and scope["checkpoint"]["epoch"] == 2
    exec(recording, scope := {"model": scope["model"], "images": torch.zeros(2, 3, 32, 32)})
    assert scope["matrices"].shape == (2, 65, 65)


def test_commands_are_of_scripts_that_exist():
    assert {name for name in re.findall(r"python (\w+\.py)", README)} == {
        *("train_vit.py", "train_cct.py", "train_resnet_attn.py"),
        *("rollout.py", "attribute.py", "campaign.py", "compare.py"),
    }


def tables_of_maps():
    """(header, rows) of the tables that give a file of results/maps/ in their header."""
    for block in re.findall(r"(?:^\|.*\n)+", README, re.M):
        header, _, *rows = ([cell.strip() for cell in line.strip("| \n").split("|")] for line in block.splitlines())
        if any((Path("results/maps") / f"{cell.strip('`')}.json").exists() for cell in header):
            yield header, rows


@pytest.mark.parametrize(("header", "rows"), list(tables_of_maps()))
def test_tables_of_maps_come_from_results(header, rows):
    """Either a file with measures as columns, or a measure with files as columns; a row a method."""
    assert len(rows) > 2
    for name, *cells in rows:
        for column, cell in zip(header[1:], cells, strict=True):
            file, measure = (header[0], column) if header[0].startswith("`") else (column, header[0])
            scores = json.loads((Path("results/maps") / f"{file.strip('`')}.json").read_text())["scores"][name]
            assert cell == ("{:.3f} ± {:.3f}".format(*scores[measure]) if measure in scores else "-")


@pytest.mark.parametrize("row", re.findall(r"^\| .*`results/[\w.-]+`.*$", README, re.M))
def test_numbers_come_from_results(row):
    result = json.loads(Path(re.search(r"`(results/[\w.-]+)`", row)[1]).read_text())
    for said in (
        f"{result['test_accuracy']:.2%}",
        f"{result['params']:,}",
        result["device"],
        f"{result['epochs']} epochs",
    ):
        assert said.replace("%", " %") in row, said


def test_tables_are_what_results_give():
    assert compare.filled_tables(README, "results") == README
