"""Files that are written completely or not at all."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from errors import UserError


def is_first_rank():
    """Whether this process writes files: of several that torchrun started for one run, only the first one does."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def write_atomically(path, write, *, previous=None):
    """write(file) into a temporary file beside path, flushed to the disk, then renamed: path is never half a file.

    Does nothing unless is_first_rank. An existing file at path is kept as `previous`, if that is given. Raises
    UserError if the file cannot be written; an existing file at path then stays as it was, and the temporary file is
    removed, as it is after any exception.
    """
    if not is_first_rank():
        return
    path = Path(path)
    if not path.name or (path.exists() and not path.is_file()):  # a device, such as /dev/null, would be replaced
        raise UserError(f"{path} cannot be written (it is no regular file)")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error if isinstance(error, OSError) else error.__context__  # torch.save makes a RuntimeError of it
        if isinstance(reason, OSError):
            raise UserError(f"{path} cannot be written ({reason.strerror or reason})") from error
        raise


def write_json(path, value):
    """write_atomically of a value as JSON."""
    write_atomically(path, lambda file: file.write(f"{json.dumps(value, indent=2)}\n".encode()))


def make_folder(path):
    """Make a folder to write to, and return it. Raises UserError if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # its name is unique: other runs may try at the same time
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error
    return path
