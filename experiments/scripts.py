"""The scripts that plans and results name: their parsers, their arguments, and how they are run."""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

from errors import UserError
from training.arguments import EFFECT_CONDITIONS

# {what a row or a measurement may run: the function that makes its parser}
SCRIPTS = {
    "train_vit.py": "vit_parser",
    "train_cct.py": "cct_parser",
    "train_resnet_attn.py": "resnet_parser",
    "benchmarks.train": "train_parser",
    "benchmarks.augment": "augment_parser",
    "rollout.py": "rollout_parser",
}


def script_module(script):
    """The module of a script that a plan names. Raises UserError for an unknown one."""
    if script not in SCRIPTS:
        raise UserError(f"unknown script {script}; choose one of {', '.join(SCRIPTS)}")
    return importlib.import_module(script.removesuffix(".py"))


def script_parser(script):
    """The parser of a script. Raises UserError for an unknown one."""
    return getattr(script_module(script), SCRIPTS[script])()


def all_arguments(script, given):
    """All arguments of a run, from those of its command line or an old result; None for those without effect.

    Missing ones take the recipe's value, or else the parser's default. Raises KeyError for an unknown recipe.
    """
    recipe, defaults = script_module(script).chosen_recipe(given)
    args = vars(script_parser(script).parse_args([])) | defaults | {"recipe": recipe} | given
    namespace = argparse.Namespace(**args)
    without = [name for name in args if name in EFFECT_CONDITIONS and not EFFECT_CONDITIONS[name][0](namespace)]
    return args | dict.fromkeys(without)


def script_command(script):
    """(command, environment) that run a script from any working folder, whatever that folder holds."""
    project = str(Path(importlib.util.find_spec("errors").origin).parent)
    paths = [project, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", script.removesuffix(".py")]
    return command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
