"""Files of torch.save: written with a digest, opened without running code, and whatever is wrong with them one line."""

import contextlib
import hashlib
import os
import pickle
import zipfile
from textwrap import shorten

import torch

from errors import UserError, regular_file

DIGEST_SIZE = 32  # bytes


def digest_of(file, size):
    """The digest of the first `size` bytes of an open file."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    file.seek(0)
    for start in range(0, size, 2**20):
        digest.update(file.read(min(2**20, size - start)))
    return digest.digest()


def write_archive(file, checkpoint):
    """torch.save, and after it a digest of the whole file: the comment that a zip archive may end in."""
    torch.save(checkpoint, file)
    file.seek(-2, os.SEEK_END)
    file.write(DIGEST_SIZE.to_bytes(2, "little"))  # the length of the comment
    file.write(digest_of(file, file.tell()))


@contextlib.contextmanager
def read_from_outside(what_is_wrong):
    """A context in which any exception is a UserError: what a damaged or crafted file raises is open-ended."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to switch weights_only off
            reason = "not of torch.save, or more than tensors and plain types"
        raise UserError(f"{what_is_wrong} ({shorten(reason, 200, placeholder=' ...')})") from error


def read_archive(path, what_is_wrong, device="cpu"):
    """What torch.save wrote to a file, of tensors and plain types. Raises UserError if it is damaged or another file.

    The digest is checked, or in files without one the zip's checksums, which miss what is wrong in its directory;
    torch.load checks neither. Files of a torch from before 2020 are no zip, and have nothing to check.
    """
    with read_from_outside(what_is_wrong):
        damaged = None
        with open(regular_file(path), "rb") as file:
            if file.read(2) == b"PK":
                archive = zipfile.ZipFile(file)
                if sum(part.file_size for part in archive.infolist()) > os.path.getsize(path):  # torch compresses none
                    raise UserError(f"{path} is damaged (it would fill the memory with more than it holds)")
                right = digest_of(file, os.path.getsize(path) - DIGEST_SIZE) if archive.comment else b""
                damaged = archive.testzip() if right == archive.comment == b"" else right != archive.comment
        if damaged:
            raise UserError(f"{path} is damaged (its checksum is wrong)")
        return torch.load(path, map_location=device, weights_only=True)
