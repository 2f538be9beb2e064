"""A dry run: each row of a plan trains for one epoch on a few images, which shows whether it runs at all."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from errors import UserError
from experiments.jobs import flags_of, measured_folder, run_folder, start_of
from experiments.scripts import all_arguments, script_module

TINY_RUN = ("--dataset", "folder", "--epochs", "1", "--batch-size", "4", "--lr", "1e-5", "--workers", "0", "--log")
FOR_NOISE = {"group_by": ("--group-by", ".+"), "folds": ("--folds", "2")}  # in place of what suits a user's files
SHORT_ROUNDS = ("--rounds", "2", "--seconds", "0.01")
SHORT_MEASUREMENTS = {
    "benchmarks.train": ("--models", "cct_2_3x2", "--dataset", "shapes", "--batch-size", "2", *SHORT_ROUNDS),
    "benchmarks.augment": ("--batch-size", "4", *SHORT_ROUNDS),
    "rollout.py": ("--evaluate", "--num-images", "2", "--method", "rollout"),
}


def write_noise(folder):
    """Ten classes of five noise images, 32 x 32 pixels, of which one becomes a test image."""
    generator = np.random.default_rng(0)
    for label in range(10):
        place = folder / f"class-{label}"
        place.mkdir(parents=True)
        for number in range(5):
            Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(place / f"{number}.png")


def implied_flags(row):
    """What follows from a row's dataset, which TINY_RUN replaces, as flags."""
    args = all_arguments(row.script, row.given)
    return flags_of({f"--{flag}": args[flag.replace("-", "_")] for flag in ("recipe", "model", "image-size")})


def dry_run(jobs, args):
    """Do the jobs in a temporary folder, in this process. Raises UserError that names the first one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder, "images"))
        places = argparse.Namespace(out_dir=Path(folder, "runs"))
        device = ["--device", args.device] if args.device else []
        data = ["--data-dir", f"{folder}/images", "--cache-dir", f"{folder}/cache"]
        for number, job in enumerate(jobs, 1):
            print(f"--- dry run {number} of {len(jobs)}: {job.name}", flush=True)
            if job.seed is not None:
                run, start = run_folder(job, places), start_of(job)
                arguments = [*implied_flags(job.row), *job.row.arguments, *TINY_RUN, *data]
                arguments += [word for flag, words in FOR_NOISE.items() if flag in job.row.given for word in words]
                arguments += ["--out-dir", str(run.parent), "--run-name", run.name]
                arguments += ["--init-from", str(run_folder(start, places))] if start else []
            else:
                measured = [str(measured_folder(job, places)), *data] if job.row.checkpoint else []
                arguments = [*measured, *job.row.arguments, *SHORT_MEASUREMENTS[job.row.script]]
            try:
                script_module(job.row.script).main([*arguments, *device])
            except UserError as error:
                raise UserError(f"{job.name}: {error}") from error
