"""The types of flags: what turns their text into values, or says what would be right."""

import argparse
import math
import re

# the absolute value of a number is 0 or between these, if it has no upper bound of its own
SMALLEST, LARGEST = 1e-30, {float: 1e9, int: 2**31 - 1}


def number(kind=float, *, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf, optional=False):
    """A flag's type: an int or float with low <= value <= high and above < value < below; optional: or "none"."""
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))

    def convert(text):
        if optional and text == "none":
            return None
        value = kind(text)
        if not (low <= value <= high and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        if min(high, below) == math.inf and value and not SMALLEST <= abs(value) <= LARGEST[kind]:
            bound = f"small: 0, or from {SMALLEST:g}" if abs(value) < 1 else f"large: at most {LARGEST[kind]:g}"
            raise argparse.ArgumentTypeError(f"{text} is too {bound}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type by it
    return convert


def pixels(text):
    """A flag's type: the side of a square, or HEIGHTxWIDTH as [height, width]."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or not 1 <= min(sides) <= max(sides) <= 10_000:
        raise argparse.ArgumentTypeError(f"must be at least 1 and at most 10000, or two as 32x64, not {text}")
    return sides if len(set(sides)) == 2 else sides[0]


def as_epoch_and_count(text):
    """(first epoch, batches per step) of a value of --accumulate: K from epoch 0 on, or EPOCH:K."""
    epoch, _, count = text.rpartition(":")
    return int(epoch or 0), int(count)


def epoch_and_count(text):
    """A flag's type: a value of --accumulate, as it is written shortest."""
    epoch, count = as_epoch_and_count(text) if re.fullmatch(r"(\d{1,9}:)?\d{1,9}", text) else (0, 0)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be K or EPOCH:K with K at least 1, not {text}")
    return f"{epoch}:{count}" if epoch else str(count)


def at_least(low, kind=int):
    return number(kind, low=low)


positive = number(above=0)
fraction = number(low=0, below=1)
probability = number(low=0, high=1)
seed = number(int, low=0, high=2**63 - 1)


def is_own_class(value):
    """Whether --attention names a class of the user's own, as FILE.py:Class."""
    return isinstance(value, str) and ".py:" in value


def name_or_class(names):
    """A flag's type: one of the names, or FILE.py:Class, which is not loaded here."""

    def convert(text):
        if text in names or is_own_class(text):
            return text
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(names)}, or FILE.py:Class)")

    return convert
