"""What a user sees: the one exception that stands for a mistake of theirs, how a script ends, progress bars."""

import sys


class UserError(ValueError):
    """A mistake that the user can correct: one line that names the flag or file, its value, and what would be right."""


def bar_disabled():
    """The `disable` of a tqdm bar: show it in a notebook, and wherever stderr is a terminal."""
    return False if "ipykernel" in sys.modules else None  # None: tqdm looks at stderr


def run_script(main):
    """Call main() as a script: a UserError becomes `error: ...` on stderr and exit code 2; a bug keeps its traceback.

    Ctrl-C exits with 130; a KeyboardInterrupt that carries an `exit_code` (SIGTERM: 143) exits with that.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))
