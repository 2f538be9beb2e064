"""Where every random number comes from: a purpose and (seed, epoch, step), and nothing else."""

import numpy as np

PURPOSES = ("weights", "order", "augmentation", "dropout", "mixing", "validation", "samples", "extra")


def seed_for(purpose, *numbers):
    """A 64-bit seed for one purpose at one place of a run, say seed_for("dropout", seed, epoch, step).

    No generator is carried along, so a run that is resumed at any step draws the same numbers as one without a stop.
    """
    words = np.random.SeedSequence((PURPOSES.index(purpose), *numbers)).generate_state(2, np.uint32)
    return int(words[0]) << 32 | int(words[1])
