"""Twenty steps of each script end where they ended when tests/data/same_results.json was written.

So a change that was meant to move code alone has moved no number. To record the weights of another kind of processor:
`PYTHONPATH=.:tests python tests/test_same_results.py`; with --losses the losses are recorded again as well.
"""

import csv
import hashlib
import importlib
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import write_images

RECORD = Path("tests/data/same_results.json")
SMALL_VIT = "--embed-dim 16 --depth 2 --num-heads 2"
COMMANDS = {
    "vit report": f"train_vit --recipe report {SMALL_VIT} --milestones 1",
    "vit strong": f"train_vit --recipe strong {SMALL_VIT} --aa rand --mixup 0.8 --cutmix 1 --model-ema-decay 0.9",
    "cct report": "train_cct --recipe report --model cct_2_3x2",
    "cct strong": "train_cct --recipe strong --model cct_nano_once --drop-path 0.1 --clip-grad 1 --reprob 0.5",
    "resnet survey": "train_resnet_attn --recipe survey --width 8 --attention graph --attention-gamma --num-heads 4"
    " --clip-grad none --seed 0",
    "resnet strong": "train_resnet_attn --recipe strong --width 8 --attention classic --cutout 12",
    "xresnet woof": "train_resnet_attn --recipe woof --model xresnet18 --stem-widths 8 8 8"
    " --image-size 72 --attention simple",
}


def this_machine():
    """What decides the last bits: the kind of processor and the version of torch."""
    try:
        found = dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    except OSError:
        found = {}
    return f"{'-'.join(found.values())}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def twenty_steps(command, folder):
    """(train and test loss, SHA-256 of the weights) of a run on 160 images, one thread, float32."""
    script, *flags = command.split()
    run = Path(folder, "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    where = ["--dataset", "folder", "--data-dir", f"{folder}/images", "--cache-dir", f"{folder}/cache"]
    run_flags = ["--epochs", "1", "--batch-size", "8", "--amp", "off", "--device", "cpu", "--workers", "0"]
    try:
        importlib.import_module(script).main(
            [*flags, *where, *run_flags, "--out-dir", str(folder), "--run-name", "run", "--overwrite"]
        )
    finally:
        torch.set_num_threads(threads)
    with open(run / "log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    digest = hashlib.sha256()
    for weights in (checkpoint["weights"], checkpoint["ema"] or {}):
        for name, value in sorted(weights.items()):
            digest.update(name.encode() + value.numpy().tobytes())
    return [float(row["train_loss"]), float(row["test_loss"])], digest.hexdigest()


def write_dataset(folder):
    classes = ("ant", "bee", "cat", "dog")
    write_images(folder / "images" / "train", classes=classes, count=40, size=(96, 80))
    write_images(folder / "images" / "test", classes=classes, count=5, size=(96, 80))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    write_dataset(folder)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_twenty_steps_end_where_they_did(name, folder):
    """To the bit on a kind of processor that is on record; elsewhere the losses agree."""
    recorded = json.loads(RECORD.read_text())
    losses, digest = twenty_steps(COMMANDS[name], folder)
    assert losses == pytest.approx(recorded["losses"][name], rel=0.02)
    if this_machine() in recorded["weights"]:
        assert digest == recorded["weights"][this_machine()][name]


if __name__ == "__main__":
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"losses": {}, "weights": {}}
    with tempfile.TemporaryDirectory() as place:
        write_dataset(Path(place))
        found = {name: twenty_steps(command, place) for name, command in COMMANDS.items()}
    if "--losses" in sys.argv or not record["losses"]:
        record["losses"] = {name: losses for name, (losses, _) in found.items()}
    record["weights"][this_machine()] = {name: digest for name, (_, digest) in found.items()}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
