"""What a user sees: the one exception that stands for a mistake of theirs, tables, how a script ends, progress bars."""

import errno
import importlib
import os
import stat
import sys


class UserError(ValueError):
    """A mistake that the user can correct: one line that names the flag or file, its value, and what would be right.

    Line breaks become spaces, what cannot be printed is escaped, and of a very long message the middle is left out.
    """

    def __init__(self, message):
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(message).splitlines()))
        super().__init__(line if len(line) <= 1000 else f"{line[:500]} ... {line[-400:]}")

    def _render_traceback_(self):
        """What IPython shows in a notebook: the line alone."""
        return [f"error: {self}"]


def regular_file(path):
    """The path of a regular file, as it is. Raises OSError for another one: a pipe or a device may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path


def aligned(rows):
    """Lists of strings, the headings first, as lines with aligned columns: numbers right, the rest left."""
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        numbers = all(cell[:1] in "0123456789+-" for cell in cells[1:])
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def import_optional(name, install=None):
    """A module of a package that few need. Raises UserError, with what pip installs for it, if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = install or name.partition(".")[0]
        raise UserError(f"this needs a package that is not installed: pip install {package} ({error})") from error


def command_line():
    """The arguments of this process; none in a notebook, where they are the kernel's own."""
    folder, name = os.path.split(sys.argv[0])
    from_kernel = "kernel" in name or os.path.basename(folder) == "ipykernel"
    return [] if from_kernel and "ipykernel" in sys.modules else sys.argv[1:]


def is_memory_error(error):
    """Whether an exception says that the memory of a GPU (torch.OutOfMemoryError) or of the host is used up."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return named or isinstance(error, MemoryError) or "out of memory" in str(error)


def bar_disabled():
    """The `disable` of a tqdm bar: show it in a notebook, and wherever stderr is a terminal."""
    return False if "ipykernel" in sys.modules else None  # None: tqdm looks at stderr


def run_script(main):
    """Call main() as a script: a UserError becomes `error: ...` on stderr and exit code 2; a bug keeps its traceback.

    Ctrl-C exits with 130; a KeyboardInterrupt that carries an `exit_code` (SIGTERM: 143) exits with that. Memory that
    is used up is one line, too. Where nobody reads the output any more (`| head`), the script ends without a word.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more as it ends
        sys.exit(141)
    except Exception as error:
        if not is_memory_error(error):
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        print(f"error: the memory is used up: a smaller model, image or batch takes less ({reason})", file=sys.stderr)
        sys.exit(2)
