"""Text that others may have written: results, plans, records of images, evaluations."""

import json
from pathlib import Path

from errors import regular_file

LARGEST_TEXT = 64 * 2**20  # bytes of a file; the longest result has some thousand


def read_text(path):
    """The text of a file. Raises OSError or ValueError if it cannot be read, never ends, or is above LARGEST_TEXT."""
    with open(regular_file(Path(path)), "rb") as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise ValueError(f"it has more than {LARGEST_TEXT // 2**20} MiB")
    return content.decode().replace("\r\n", "\n")


def read_json(path):
    """The value in a JSON file. Raises OSError or ValueError, also if it is nested too deep or is not valid UTF-8."""
    try:
        value = json.loads(read_text(path))
        json.dumps(value, ensure_ascii=False).encode()  # raises ValueError for half of a character, as in \\ud800
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return value
