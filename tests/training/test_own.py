"""--attention FILE.py:Class: it trains, resumes and is drawn, and no checkpoint or plan runs its file unasked."""

import re
import shutil

import pytest
import torch
from conftest import TINY, same_weights

import attribute
import campaign
import rollout
import train_cct
import train_resnet_attn
import train_vit
from errors import UserError
from experiments.plans import misfit, read_plan
from models import build_model
from training.checkpoint import load_checkpoint, rebuild_model

BLOCK = """
from models.attention import MultiHeadAttention
open("trace", "a").write("run ")

class MyBlock(MultiHeadAttention):
    def __init__(self, spec):
        super().__init__(spec)
        self.mine = self.proj.weight.new_ones(1)

class Other(MultiHeadAttention):
    pass
"""
OWN = "my_block.py:MyBlock"


@pytest.fixture
def block(tmp_path, monkeypatch):
    """Works in tmp_path, with my_block.py in it; returns how often that has run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_block.py").write_text(BLOCK)
    trace = tmp_path / "trace"
    return lambda: trace.read_text().count("run") if trace.exists() else 0


def test_a_run_is_trained_resumed_and_drawn_by_an_own_class(block, folder_flags, tmp_path, capsys):
    flags = [*folder_flags, "--attention", OWN]
    result = train_vit.main([*flags, "--run-name", "whole"])
    whole, vit = tmp_path / "runs" / "whole", tmp_path / "runs" / "vit"
    assert result["args"]["attention"] == OWN and f"rollout.py {whole} --attention {OWN}" in capsys.readouterr().out
    train_vit.main([*flags, "--minutes", "0.00001"])
    assert f"--resume {vit} --attention {OWN}" in capsys.readouterr().out
    ran = block()
    assert ran == 2 and load_checkpoint(vit)["model_args"]["attention"] == OWN
    for attempt in (
        lambda: train_vit.main(["--resume", str(vit)]),
        lambda: rollout.main([str(whole), "--index", "0"]),
        lambda: attribute.main([str(whole), "--index", "0"]),
        lambda: rebuild_model(load_checkpoint(whole), build_model),
    ):
        with pytest.raises(UserError, match=f": its attention is your own, .* give --attention {OWN} again$"):
            attempt()
    for main, argv in ((train_vit.main, ["--resume", str(vit)]), (rollout.main, [str(whole), "--index", "0"])):
        for other in ("my_block.py:Other", "softmax"):
            with pytest.raises(UserError, match=f"--attention is {OWN} there and {other} here"):
                main([*argv, "--attention", other])
    assert block() == ran  # a checkpoint is opened and refused without running the file
    (tmp_path / "moved").mkdir()
    shutil.move("my_block.py", "moved/renamed.py")
    moved = ["--attention", "moved/renamed.py:MyBlock"]
    train_vit.main(["--resume", str(vit), *moved])
    assert same_weights(whole / "last.pt", vit / "last.pt")
    assert len(rollout.main([str(whole), "--index", "0", *moved])) == 2
    assert len(attribute.main([str(whole), "--index", "0", "--method", "saliency", *moved])) == 2


def test_build_model_takes_a_class_and_runs_no_file(block):
    with pytest.raises(UserError, match=f"--attention {OWN}: choose from softmax"):
        build_model("vit", attention=OWN)
    assert not block()
    mine = type("Mine", (torch.nn.Identity,), {})
    assert all(isinstance(layer.attn, mine) for layer in build_model("cct_2_3x2", attention=mine).blocks)
    assert isinstance(build_model("resnet18", width=4, attention=mine).attention.block.attn, mine)
    with pytest.raises(UserError, match="--attention Mine: choose from none, sagan, simple"):
        build_model("xresnet18", attention=mine)


@pytest.mark.parametrize("script", [train_cct, train_resnet_attn])
def test_the_other_scripts_take_it_too(block, script, folder_flags, tmp_path):
    own = ["--model", "cct_2_3x2"] if script is train_cct else ["--width", "4", "--lr", "0.01"]
    flags = [*folder_flags[: -len(TINY)], "--device", "cpu", "--epochs", "1", "--run-name", "own", *own]
    script.main([*flags, "--attention", OWN])
    names = [name for name in load_checkpoint(tmp_path / "runs" / "own")["weights"] if name.endswith("attn.qkv.weight")]
    assert len(names) == (2 if script is train_cct else 1) and block() == 1
    assert len(rollout.main([str(tmp_path / "runs" / "own"), "--index", "0", "--attention", OWN])) == 2


def test_a_plan_names_it_and_reading_the_plan_does_not_run_it(block, folder_flags, tmp_path, capfd):
    plan = tmp_path / "own.toml"
    row = f'[[rows]]\nname = "mine"\nscript = "train_vit.py"\narguments = "--attention {OWN} {" ".join(TINY)}"\n'
    measured = '[[measurements]]\nname = "map"\nscript = "rollout.py"\ncheckpoint = "own/mine"\n'
    plan.write_text(f'title = "Own"\n{row}{measured}arguments = "--attention {OWN}"\n')
    assert read_plan(plan).rows[0].given["attention"] == OWN and not block()
    campaign.main([str(plan), "--dry", "--device", "cpu", "--results", str(tmp_path / "results")])
    assert block() == 2 and "dry run 2 of 2: own/map" in capfd.readouterr().out
    result = train_vit.main([*folder_flags, "--attention", OWN])
    assert misfit(read_plan(plan).rows[0], result) is None


@pytest.mark.parametrize(
    ("attention", "said"),
    {
        "no.py:MyBlock": "--attention no.py:MyBlock: there is no file no.py",
        "my_block.py:Mine": "my_block.py has no class Mine, only MyBlock, Other",
        "numbers.py:pi": "numbers.py:pi: pi must be a class that inherits from nn.Module",
        "numbers.py:Plain": "Plain must be a class that inherits from nn.Module",
        "broken.py:A": "broken.py cannot be imported: SyntaxError: ",
        "failing.py:A": "failing.py cannot be imported: ZeroDivisionError: division by zero",
        "leaving.py:A": "leaving.py cannot be imported: SystemExit: 3",
        "my_block.py": "--attention: invalid choice: 'my_block.py' .*, or FILE.py:Class",
    }.items(),
)
def test_mistakes_are_one_line(block, folder_flags, tmp_path, attention, said):
    texts = {"numbers": "pi = 3\nclass Plain:\n    pass", "broken": "class A(:", "failing": "1 / 0"}
    for name, text in (texts | {"leaving": "raise SystemExit(3)"}).items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(UserError) as error:
        train_vit.main([*folder_flags, "--attention", attention])
    assert re.search(said, str(error.value)) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
