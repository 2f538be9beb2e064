"""A parser whose mistakes are one line, and the types of its flags: numbers within a range."""

import argparse

from errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, and no exit from a notebook."""

    def error(self, message):
        raise UserError(message)


def at_least(low, kind=int):
    """A flag's type: a number not below low."""

    def convert(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type by it
    return convert


def between(low, high):
    """A flag's type: a whole number from low to high."""

    def convert(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    convert.__name__ = "int"
    return convert


def fraction(text):
    """A flag's type: a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def positive(text):
    """A flag's type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def positive_fraction(text):
    positive(text)
    return fraction(text)


def share(text):
    """A flag's type: a number above 0, up to 1."""
    positive(text)
    return probability(text)


def probability(text):
    """A flag's type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value
