"""The scripts that plans and results name: their parsers, their arguments, and how they are run."""

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from errors import UserError
from training.arguments import EFFECT_CONDITIONS
from training.interrupt import Interrupted

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
    known = [name for name in args if name in EFFECT_CONDITIONS]
    return args | {name: None for name in known if not EFFECT_CONDITIONS[name][0](argparse.Namespace(**args))}


def is_locked(file):
    """Whether another process holds the lock of an open file; if not, this one holds it now, where there are locks."""
    with contextlib.suppress(OSError):  # a mounted drive may have no locks
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def project_path():
    """PYTHONPATH for a process that imports from this project; its working folder may be another one."""
    project = str(Path(importlib.util.find_spec("errors").origin).parent)
    return os.pathsep.join([project, os.environ.get("PYTHONPATH", project)])


def run_command(script, arguments, deadline=math.inf, *, lock=None, hopeless=None, stop_once=False):
    """The exit code of a script; None if it was stopped at the deadline, a value of time.monotonic(), or as hopeless().

    The script inherits `lock`, an open file, which stays locked until it ends, even if this process is killed before. A
    signal that stops this process is passed on to the script, and raised once the script has ended. The script has
    a session of its own: otherwise Ctrl-C would reach it twice, and the second one ends it without saving. With
    stop_once, the first signal alone is passed on: clusters send several.
    """
    environment = os.environ | {"PYTHONPATH": project_path()}
    command = [sys.executable, "-P", "-m", script.removesuffix(".py"), *arguments]
    inherited = [lock.fileno()] if lock and fcntl else []
    process = subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=inherited)
    received = []

    def pass_on(signum, frame):
        received.append(signum)
        if os.name == "posix" and not (stop_once and received[1:]):  # on Windows, Ctrl-C reaches the command anyway
            process.send_signal(signal.SIGTERM)

    stops = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {stop: signal.signal(stop, pass_on) for stop in stops if signal.getsignal(stop) != signal.SIG_IGN}
    late = False
    try:
        while process.poll() is None:
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                over = time.monotonic() > deadline or (hopeless and hopeless())
                if not late and os.name == "posix" and over:
                    late = True
                    process.send_signal(signal.SIGTERM)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if received:
        raise Interrupted(received[0])
    return None if late and process.returncode else process.returncode
