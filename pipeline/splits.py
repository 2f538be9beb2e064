"""Splits that a dataset does not come with: of every class the same share, and images of one object on one side."""

import re
import sys
from functools import partial

import numpy as np
import torch

from errors import UserError


def made_splits(
    splits, classes, name, *, val_fraction=0.0, test_fraction=0.2, split_seed=0, group_by=None, folds=None, seed=0
):
    """{name: Split} with those that a dataset does not come with: test images out of "all", validation out of "train".

    By split_seed, val_fraction of each class's training images is split off, and test_fraction of "all", or of so many
    folds the one of number seed % folds. group_by is that of group_numbers. Raises UserError if a split is left
    without a class, or if a value has no effect.
    """
    if folds and "all" not in splits:
        raise UserError(f"--folds {folds}: {name} has test images of its own; --folds needs class folders alone")
    if group_by and "all" not in splits and not val_fraction:
        raise UserError(f"--group-by {group_by}: {name} has test images of its own, and there is no --val-fraction")
    divide = partial(split_by_class, classes=classes, group_by=group_by)
    if "all" in splits:
        share, flag = (folds, "--folds") if folds else (test_fraction, "--test-fraction")
        parts = divide(splits["all"], share, seed=(split_seed, 0), flag=flag, part=seed % (folds or 1))
        splits = dict(zip(("test", "train"), parts))
    elif test_fraction != 0.2:  # not the default
        print(f"warning: --test-fraction {test_fraction}: {name} has test images of its own", file=sys.stderr)
    if val_fraction:
        if "val" in splits:
            raise UserError(f"--val-fraction {val_fraction}: {name} has validation images of its own")
        parts = divide(splits["train"], val_fraction, seed=(split_seed, 1), flag="--val-fraction")
        splits["val"], splits["train"] = parts
    return splits


def some_of_each_class(split, classes, count, *, seed):
    """`count` images of each class of a Split. Raises UserError for a class that has fewer."""
    rng, labels, kept = np.random.default_rng(seed), split.labels.numpy(), []
    for label, name in enumerate(classes):
        members = rng.permutation((labels == label).nonzero()[0])
        if len(members) < count:
            raise UserError(f"--train-per-class {count}: class {name} has {len(members)} training images")
        kept += members[:count].tolist()
    return split.pick(torch.tensor(sorted(kept)))


def split_by_class(split, fraction, classes, *, seed, flag, group_by=None, part=0):
    """Two Splits, the first with `fraction` of every class (at least one image), the second with the rest.

    If fraction is a whole number, the first is fold number `part` of so many. group_by is that of group_numbers.
    """
    rng, labels, flag = np.random.default_rng(seed), split.labels.numpy(), f"{flag} {fraction}"
    classes = {name: (labels == label).nonzero()[0] for label, name in enumerate(classes)}  # {name: indices}
    if group_by or fraction >= 1:
        shares = [fraction, 1 - fraction] if fraction < 1 else [1 / fraction] * fraction
        groups = group_numbers(split.names, group_by) if group_by else np.arange(len(labels))
        counts = np.zeros((groups.max() + 1, len(classes)), int)
        np.add.at(counts, (groups, labels), 1)
        parts = place_groups(counts, shares, rng)[groups]
        for name, members in classes.items():
            if len({*parts[members]}) < len(shares):
                flag += f" with --group-by {group_by}" if group_by else ""
                found = f"images: {len(members)}, groups: {len({*groups[members]})}"
                raise UserError(f"{flag} leaves a split without class {name} ({found})")
        return split.pick(torch.from_numpy(parts == part)), split.pick(torch.from_numpy(parts != part))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for name, members in classes.items():
        count = max(1, round(fraction * len(members)))
        if count >= len(members):
            raise UserError(f"{flag} leaves no training image of class {name}, which has {len(members)}")
        chosen[rng.permutation(members)[:count]] = True
    return split.pick(chosen), split.pick(~chosen)


def group_numbers(names, group_by):
    """(N,) int: files in which a regular expression finds the same text have one number, whatever their class.

    The text is that of its first group in parentheses, or all that it matches if it has none. Raises UserError for an
    expression that cannot be compiled, and for a file in which it finds nothing.
    """
    try:
        found = [re.search(group_by, name) for name in map(str, names)]
    except re.error as error:
        raise UserError(f"--group-by {group_by}: not a regular expression ({error})") from error
    texts = [match and match[min(1, match.re.groups)] for match in found]
    if None in texts:
        raise UserError(f"--group-by {group_by}: it finds nothing in {names[texts.index(None)]}")
    return np.unique(texts, return_inverse=True)[1]


def place_groups(counts, shares, rng):
    """(G,) the part of each group, for counts (G, classes) of its images and the share of all images of each part.

    The largest group comes first, equal ones in random order; each goes to the part that lacks most of its classes.
    """
    totals, parts = counts.sum(0), np.empty(len(counts), int)
    lack = np.outer(shares, totals)  # (parts, classes): images
    for group in sorted(rng.permutation(len(counts)), key=lambda group: -counts[group].sum()):
        parts[group] = (lack @ (counts[group] / totals + 1e-9)).argmax()  # 1e-9: among equals, the smallest part
        lack[parts[group]] -= counts[group]
    return parts
