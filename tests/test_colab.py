"""colab/: single files that run without the project, and a notebook whose cells run, and can all be run again."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_images

from colab.bundle import FAMILIES, bundle
from models import model_family

SMALL = ["--epochs", "1", "--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--device", "cpu"]


@pytest.mark.parametrize("script", FAMILIES)
def test_the_single_files_are_fresh(script):
    """After a change: python colab/bundle.py"""
    assert Path("colab", script).read_text() == bundle(script)


@pytest.mark.parametrize("script", [script for script in FAMILIES if script.startswith("train")])
def test_the_families_are_those_that_a_script_may_ask_for(script):
    flags = importlib.import_module(script.removesuffix(".py")).MODEL_FLAGS
    names = [name for name in flags if name != "timm"]  # timm:NAME is made by models.pretrained
    makers = {getattr(make := model_family(name)[name], "func", make) for name in names}
    assert {inspect.getmodule(make).__name__ for make in makers} == set(FAMILIES[script])


def run_alone(folder, script, *flags):
    """What a single file prints in a folder that holds nothing but it and a few images."""
    (folder / script).write_text(Path("colab", script).read_text())
    command = [sys.executable, script, *flags]
    settings = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=True).stdout


def test_single_files_run_in_a_folder_of_their_own(tmp_path):
    write_images(tmp_path / "pets", classes=("ant", "bee"), count=10)
    data = ["--dataset", "folder", "--data-dir", "pets", "--cache-dir", "cache"]
    assert "test accuracy" in run_alone(tmp_path, "train_vit.py", *data, *SMALL)
    run_alone(tmp_path, "rollout.py", "checkpoints/vit", "--index", "0", "--method", "all")
    assert (tmp_path / "checkpoints/vit/maps/0-rollout-all.png").exists()
    for script in ("train_cct.py", "train_resnet_attn.py"):
        assert "--help-all" in run_alone(tmp_path, script, "--help")


def test_a_single_file_is_pasted_into_a_cell(tmp_path):
    """There it takes ARGUMENTS, and not those of the kernel."""
    text = Path("colab/train_vit.py").read_text()
    arguments = [
        "--dataset",
        "folder",
        "--data-dir",
        str(write_images(tmp_path / "pets", classes="ab", count=10)),
        *SMALL,
    ]
    text = re.sub(r"^ARGUMENTS = .*$", f"ARGUMENTS = {arguments!r}", text, flags=re.M)
    cell = "import sys, types\nsys.modules['ipykernel'] = types.ModuleType('ipykernel')\n" + text
    cell += "\nprint(result['epochs'], 'epoch')\n"
    (tmp_path / "kernel.py").write_text(cell)
    command = [sys.executable, "kernel.py", "-f", "kernel.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n1 epoch\n")


@pytest.mark.slow
def test_the_notebook_runs_and_can_be_run_again(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read("colab/attention.ipynb", as_version=4)
    flags = ["--epochs", "1", "--batch-size", "500", "--device", "cpu"]
    for cell in notebook.cells:
        assert not cell.get("outputs"), "the notebook is kept without its outputs"
        cell.source = cell.source.replace("FLAGS = []", f"FLAGS = {flags}").replace('"checkpoints"', f'"{tmp_path}"')
    for times in (1, 2):
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
        printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
        assert printed.count(" is finished: test accuracy") == (0 if times == 1 else 10)
        assert re.search(r"depthwise\S* - \S*softmax\S* +unpaired", printed)
    shown = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(shown) == 2


def test_the_times_on_a_t4_follow_from_what_the_page_assumes():
    """And its GFLOP per image are those that benchmarks.train counted."""
    counted = {}
    for path in Path("results/speed").glob("train*-cpu.json"):
        counted |= json.loads(path.read_text())["gflop_per_image"]
    rows = re.findall(
        r"--epochs (\d+)` \| ([\d.]+) \| (.*) (min|h) \| (.*) (min|h) \|", Path("docs/colab.md").read_text()
    )
    assert len(rows) == 3
    for (epochs, gflop, *times), model in zip(rows, ("vit", "cct_6_3x1", "resnet18"), strict=True):
        assert float(gflop) == round(counted[model], 2)
        for number, unit, rate in ((*times[:2], 0.15 * 65e3), (*times[2:], 0.5 * 8e3)):
            seconds = int(epochs) * 50_000 * float(gflop) / rate
            assert float(number) == pytest.approx(seconds / {"min": 60, "h": 3600}[unit], rel=0.03)
