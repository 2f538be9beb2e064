"""A block of the user's own: the class that --attention FILE.py:Class names. Its file runs only if a flag names it."""

import importlib.util
import sys
import traceback
from pathlib import Path

from torch import nn

from errors import UserError
from training.values import is_own_class


def load_own_class(text):
    """The class of nn.Module that FILE.py:Class names; its file runs here. Raises UserError if there is none."""
    flag, (file, _, name) = f"--attention {text}", text.rpartition(":")
    if not Path(file).is_file():
        raise UserError(f"{flag}: there is no file {file}")
    module_name = f"own_{Path(file).stem}"  # a file data.py must not stand for the project's own
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # where dataclasses and torch.compile look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        last_line = traceback.format_exception_only(error)[-1].strip()
        raise UserError(f"{flag}: {file} cannot be imported: {last_line}") from error
    found = getattr(module, name, None)
    if found is None:
        there = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module_name]
        raise UserError(f"{flag}: {file} has no class {name}, only {', '.join(there) or 'imports'}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{flag}: {name} must be a class that inherits from nn.Module")
    return found


def confirmed_attention(saved, given, where="the checkpoint"):
    """The --attention of a checkpoint: if it is a class of the user's own, the one `given`, as its file may have moved.

    Raises UserError if such a class is not given again, so that opening a checkpoint runs no file unasked, and if
    another attention is given.
    """
    own = is_own_class(saved)
    if own and not given:
        raise UserError(f"{where}: its attention is your own, and no file runs unasked: give --attention {saved} again")
    same_class = own and is_own_class(given) and saved.rpartition(":")[2] == given.rpartition(":")[2]
    if given and given != saved and not same_class:
        raise UserError(f"{where} is another run: --attention is {saved} there and {given} here")
    return given or saved


def with_own_class(model_args, given):
    """The keyword arguments of a model, with the class itself for an attention FILE.py:Class that is `given` again."""
    attention = confirmed_attention(model_args.get("attention"), given)
    return model_args | {"attention": load_own_class(attention)} if is_own_class(attention) else model_args
