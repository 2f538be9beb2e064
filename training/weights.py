"""The weights that a run starts from: of another run, or of a file that another program wrote."""

import hashlib
from collections import Counter
from pathlib import Path

import torch

from errors import import_optional
from training.archives import read_archive, read_from_outside
from training.checkpoint import evaluated_weights, is_of_kind, load_checkpoint

STATE_DICT = dict[str, torch.Tensor]


def start_from_weights(path, load, checkpoint):
    """Give load(weights) those of --init-from: of a run's folder, of a checkpoint, or a state dict of another program.

    load returns the names that it left out; they are printed. Returns (mean, std) of the run's images, None for a state
    dict. If `checkpoint` is that of a run to resume, nothing is loaded. Raises UserError if the file is neither.
    """
    if checkpoint:
        return checkpoint["mean"], checkpoint["std"]
    path, found, statistics = Path(path), None, None
    what_is_wrong = f"--init-from {path}: it is neither a checkpoint nor a file of weights"
    if path.is_file() and path.suffix == ".safetensors":
        with read_from_outside(what_is_wrong):
            found = import_optional("safetensors.torch").load_file(path)
    elif path.is_file() and path.name != "last.pt":
        found = read_archive(path, what_is_wrong)
        if isinstance(found, dict) and "format_version" not in found:  # someone's: weights among other things
            found = next((part for part in found.values() if is_of_kind(part, STATE_DICT) and part), found)
    if not is_of_kind(found, STATE_DICT):
        checkpoint = load_checkpoint(path)
        found, statistics = evaluated_weights(checkpoint), (checkpoint["mean"], checkpoint["std"])
    print_taken(path, found, load(found))
    return statistics


def print_taken(source, weights, left_out):
    """Print how many tensors of each part of a state dict were taken, and the names in the model that were left out."""
    parts = Counter(name.removeprefix("module.").split(".")[0] for name in weights)
    taken = ", ".join(f"{part} {count}" for part, count in parts.items())
    print(f"weights of {source}; left out: {', '.join(left_out) or 'nothing'}; tensors in it: {taken}")


def weights_hash(model):
    """SHA-256 of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, values in model.state_dict().items():
        digest.update(name.encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()
