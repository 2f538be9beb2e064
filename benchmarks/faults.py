"""Harm runs in all the ways of tests/faults, and count what was tried: the table of docs/reliability.md."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from errors import UserError, run_script
from files import write_json
from training.device import device_name
from training.flags import Parser


def faults_parser():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help="also write what was tried to this JSON file")
    return parser


def sums_of_faults(lines):
    """{what: {"times": how often, and the largest of each thing measured}} of what the tests noted (see tried)."""
    found = {}
    for line in map(json.loads, lines):
        row = found.setdefault(line.pop("what"), {"times": 0})
        row["times"] += line.pop("count")
        row |= {name: max(value, row.get(name, value)) for name, value in line.items()}
    return found


def main(argv=None):
    args = faults_parser().parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "tried")
        log.touch()
        command = [sys.executable, "-m", "pytest", "tests/faults", "-m", "slow or not slow"]
        if subprocess.run(command, env=os.environ | {"FAULTS_LOG": str(log)}).returncode:
            raise UserError("a test of tests/faults failed, or the folder is not here: no table")
        found = sums_of_faults(log.read_text().splitlines())
    for what, row in found.items():
        print(f"{row['times']:7,}  {what}", *(f"{name} {value:g}" for name, value in row.items() if name != "times"))
    if args.out:
        machine = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "seconds": round(time.monotonic() - began)}
        write_json(args.out, machine | {"faults": found})


if __name__ == "__main__":
    run_script(main)
