"""A run's folder: its name, what may lie there already, and a run that is replaced."""

import errno
import itertools
import os
import socket
from pathlib import Path

from errors import UserError
from files import is_first_rank, make_folder
from training.checkpoint import folder_to_resume, has_checkpoint
from training.outputs import accuracy_text

CHECKPOINTS = ("last.pt", "last.prev.pt", "best.pt", "best_on_test.pt", "epoch-*.pt")
MADE_OF_WEIGHTS = (  # what other commands make of the weights that are replaced
    *("maps/*.npy", "maps/*.png", "maps/*.pdf", "maps/evaluation.json", "predict/*.json", "predict/*.png"),
    *("model.onnx", "model.pt2", "model.safetensors"),
)
LOGS = ("log.csv", "steps.csv", "tensorboard/events.*")
FILES = ("curves.png", "samples.png", "predictions.npz", "split.csv", "result.json")
WRITTEN = (*CHECKPOINTS, *MADE_OF_WEIGHTS, *LOGS, *FILES)
LOCKS = {}  # {folder: file} of this process: closing any file of a folder would end the lock


def choose_folder(given, *, default_name, default_dir):
    """(the run's folder, whether it holds a run to resume), from the flags on the command line.

    Without --run-name the folder is the first of vit, vit-2, vit-3 ... that does not exist. Raises UserError if the
    name is taken, or if there is nothing to resume.
    """
    resume = given.get("resume")
    if resume and given.get("overwrite"):
        raise UserError("--overwrite and --resume exclude each other")
    if resume and resume != "auto":
        if "run_name" in given or "out_dir" in given:
            raise UserError(f"--resume {resume} writes to that folder: leave out --run-name and --out-dir")
        return folder_to_resume(Path(resume), default_dir), True
    name = given.get("run_name", default_name)
    if not Path(name).parts or {*Path(name).parts} & {"..", "/"}:
        raise UserError(f"--run-name {name!r}: it must be the name of a folder below --out-dir")
    out_dir = Path(given.get("out_dir", default_dir))
    folder = out_dir / name
    if resume:
        if not has_checkpoint(folder) and (folder / "result.json").exists():
            raise UserError(f"--resume auto: {folder} is finished, but has no last.pt; --overwrite alone replaces it")
        return folder, has_checkpoint(folder)
    if is_taken(folder) and not given.keys() & {"overwrite", "summary"}:
        if "run_name" in given:
            raise UserError(f"--run-name {folder.name}: {folder} exists; use --resume {folder}, or --overwrite")
        numbers = itertools.count(2)
        while is_taken(folder):
            folder = out_dir / f"{default_name}-{next(numbers)}"
        print(f"{out_dir / default_name} exists: this run is written to {folder}")
    return folder, False


def is_taken(folder):
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def lock(folder):
    """Refuse a run's folder to other processes until unlock(folder), or until this process ends.

    The lock is on a hidden file beside the folder. Raises UserError, with the holder, if another process has it. Does
    nothing where the system or the drive has no locks.
    """
    path, file = Path(os.path.abspath(folder)), None
    if path in LOCKS:
        return
    try:
        import fcntl  # not on Windows

        file = open(path.with_name(f".{path.name}.lock"), "a+b", buffering=0)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked workers would inherit
        LOCKS[path] = file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    except (ImportError, OSError) as error:
        if file and path not in LOCKS and error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(f"{folder}: another run writes to it ({file.read(100).decode()})") from error


def unlock(folder):
    if file := LOCKS.pop(Path(os.path.abspath(folder)), None):
        file.close()


def prepare_folder(folder, *, resuming, start_log=None):
    """Make the run's folder, call start_log(), and then remove a run to be replaced; if that raises, it remains."""
    make_folder(folder)
    if is_first_rank():
        lock(folder)
    old = [] if resuming or not is_first_rank() else [path for pattern in WRITTEN for path in folder.glob(pattern)]
    if start_log:
        start_log()
    for path in old:
        path.unlink()
    for below in (folder / "maps", folder / "predict", folder / "tensorboard"):
        if old and below.is_dir() and not any(below.iterdir()):
            below.rmdir()


def finished_result(folder, epoch, *, skip_test):
    """A finished run's results, printed and returned; None if its test, or what follows this epoch, is to come."""
    path = folder / "result.json"
    if not path.exists():
        return None
    from training.records import read_json  # only if there is one

    try:
        result = read_json(path)
        if epoch < result.get("epochs", 0) or (result.get("test_accuracy", 0) is None and not skip_test):
            return None
        print(f"{folder} is finished: {accuracy_text(result)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the run is finished anew") from error
    return result
