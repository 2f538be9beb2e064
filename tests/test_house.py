"""The rules of the house that a reader relies on: who imports whom, how large things are, names that are unique."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = {"benchmarks", "experiments", "maps", "models", "pipeline", "training"}
FILES = sorted(path for path in Path().glob("**/*.py") if path.parts[0] in ROOMS or len(path.parts) == 1)
COMMANDS = {path.stem for path in FILES if len(path.parts) == 1} - {"data", "errors", "files", "seeding"}
GROUND = {"errors", "files", "seeding"}
# what each room may import of the project, beside itself
ALLOWED = {
    "errors": set(),
    "seeding": set(),
    "files": {"errors"},
    "models": {"errors"},
    "pipeline": GROUND,
    "training": GROUND,
    "data": GROUND | {"pipeline"},
    "maps": GROUND | {"data", "models", "pipeline", "training"},
    "experiments": GROUND | {"training"},
    "benchmarks": GROUND | {"data", "experiments", "models", "pipeline", "training"},
} | dict.fromkeys(COMMANDS, GROUND | {"data", "experiments", "maps", "models", "pipeline", "training"})


def imports(path):
    """The dotted names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room(path):
    return path.parts[0] if len(path.parts) > 1 else path.stem


def definitions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_reaches_up(path):
    used = {name.split(".")[0] for name in imports(path)} & ALLOWED.keys()
    assert used - {room(path)} <= ALLOWED[room(path)]


def test_models_stand_on_torch_alone():
    for path in FILES:
        if room(path) == "models":
            assert {name.split(".")[0] for name in imports(path)} <= {
                *("torch", "torchvision", "models", "errors"),
                *sys.stdlib_module_names,
            }


def test_names_at_the_top_of_files_are_unique():
    """So that a script and all that it imports can be laid into one cell; two training scripts are never in one."""
    owners = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            targets = getattr(node, "targets", [])
            names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            for name in names | ({node.name} if hasattr(node, "name") else set()):
                owners.setdefault(name, set()).add("train_*.py" if path.name.startswith("train_") else str(path))
    assert not {name: files for name, files in owners.items() if len(files) > 1 and name != "main"}


def test_nothing_reads_its_own_path():
    assert not [path for path in FILES if "__file__" in path.read_text()]


def test_files_and_functions_are_short():
    assert not [str(path) for path in FILES if len(path.read_text().splitlines()) > 250]
    long = [
        (str(path), node.name) for path in FILES for node in definitions(path) if node.end_lineno - node.lineno + 1 > 60
    ]
    assert not long


def test_the_top_is_commands_and_four_files_and_a_run_enters_few():
    """At the top 17 files at most; from train_vit.py's command line to its result 34 modules and 4,700 lines."""
    assert len([path for path in FILES if len(path.parts) == 1]) <= 17
    code = "import sys, train_vit; from models import build_model; build_model('vit'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    entered = [path for path in FILES if ".".join(path.with_suffix("").parts).removesuffix(".__init__") in loaded]
    assert len(entered) <= 34, entered
    assert sum(len(path.read_text().splitlines()) for path in entered) <= 4700
