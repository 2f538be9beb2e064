"""Files that are written completely or not at all."""

import contextlib
import os
from pathlib import Path

from errors import UserError


def write_atomically(path, write):
    """write(file) into a temporary file beside path, flushed to the disk, then renamed: path is never half a file.

    Raises UserError if the file cannot be written; an existing file at path then stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error


def make_folder(path):
    """Make a folder to write to, and return it. Raises UserError if nothing can be written there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error
    write_atomically(path / ".writable", lambda file: None)
    (path / ".writable").unlink()
    return path
