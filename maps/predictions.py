"""A model's predictions of many images, and how good they are: accuracy, calibration, robustness."""

import itertools
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from data import Split
from errors import UserError, bar_disabled, import_optional
from maps.images import normalised, pixels_of
from pipeline.folders import list_images, printable, summary_of
from pipeline.imagenette import READABLE
from training.device import Precision


def image_files(path):
    """The images in a folder and its sub-folders, sorted; of a file, itself. Raises UserError if there are none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    skipped = defaultdict(list)
    found = [Path(file) for file, *_ in list_images(path, skipped, of_class=False)] if path.is_dir() else [path]
    if skipped:
        print(f"warning: not read in {path}: {summary_of(skipped)}", file=sys.stderr)
    return found


def split_of_folder(root, checkpoint):
    """(the images in root's class folders as a Split, {class that the model does not know: images left out})."""
    classes, files = checkpoint["classes"], image_files(root)
    names = [(*file.relative_to(root).parts, "no folder")[0] for file in files]
    names = [name if name in classes else READABLE.get(name, name) for name in names]
    left_out = {name: count for name, count in Counter(names).items() if name not in classes}
    unknown = ", ".join(f"{name} ({count})" for name, count in left_out.items())
    known = [(file, classes.index(name)) for file, name in zip(files, names, strict=True) if name in classes]
    if not known:
        raise UserError(f"{root} has no folder of a class that the model knows ({', '.join(classes)}), but {unknown}")
    if unknown:
        print(f"left out, unknown to the model (images): {unknown}")
    files, labels = zip(*known, strict=True)
    names = np.array([printable(file.relative_to(root)) for file in files])
    return Split(pixels_of(files, checkpoint), torch.tensor(labels), names), left_out


@torch.inference_mode()
def predict_logits(model, checkpoint, images, title="predicting", *, flip=False):
    """Logits (N, classes) float32, on the CPU, of images (N, 3, S, S) uint8; flip: the mean with the mirror images'."""
    args, device, found = checkpoint["args"], next(model.parameters()).device, []
    precision = Precision("off" if args.get("amp") in ("off", "tf32") else "auto", device)
    for pixels in tqdm(
        images.split(min(256, 4 * args.get("batch_size", 64))), title, disable=bar_disabled(), unit="batch"
    ):
        inputs = normalised(pixels, checkpoint, device)  # (B, 3, S, S) float
        with precision.autocast():
            views = [model(view).float() for view in ((inputs, inputs.flip(3)) if flip else (inputs,))]
        found.append(torch.stack(views).mean(0).cpu())  # (B, classes)
    return torch.cat(found)


def accuracy_of(logits, labels):
    """The accuracy with its 95 % interval (Wilson 1927), as fractions."""
    correct, count = int((logits.argmax(1) == labels).sum()), len(labels)
    interval = binomtest(correct, count).proportion_ci(method="wilson")
    return {"accuracy": correct / count, "interval": [*map(float, interval)], "images": count}


def calibration_of(logits, labels, temperature=1.0, *, bins=15):
    """The expected calibration error of logits / temperature (Guo et al. 2017): the mean over images of |accuracy -
    confidence| in their bin, (0, 1/15], (1/15, 2/15] ...; and of each bin (images, mean confidence, accuracy)."""
    confidence, predicted = (logits.double() / temperature).softmax(1).max(1)
    numbers, right = (confidence * bins).ceil(), (predicted == labels).double()
    members = [numbers == number for number in numbers.unique()]
    found = [(int(i.sum()), confidence[i].mean().item(), right[i].mean().item()) for i in members]
    return sum(count * abs(said - was) for count, said, was in found) / len(labels), found


def fit_temperature(logits, labels):
    """The T for which logits / T have the smallest cross entropy (Guo et al. 2017), from 0.05 to 20."""
    found = minimize_scalar(lambda t: cross_entropy(logits.double() / math.exp(t), labels).item(), bounds=(-3, 3))
    return math.exp(found.x)


def evaluation(logits_of, split, val, classes, *, flip=False, corruptions=False):
    """The indices of the surest mistakes, and what else predict.py --evaluate finds, for JSON; shares are fractions.
    logits_of(images, title, flip) as predict_logits; val: the Split for the temperature, or None."""
    (images, labels, names), found = split, {}
    if corruptions:
        found["corruptions"] = robustness(images, labels, logits_of)
    logits = logits_of(images)
    accuracies = {"all images": accuracy_of(logits, labels)}
    if flip:
        accuracies["all images, --tta flip"] = accuracy_of(logits_of(images, flip=True), labels)
    members = {classes[index]: labels == index for index in labels.unique().tolist()}
    calibrations = {"as predicted": calibration_of(logits, labels)}
    if val:
        found["temperature"] = temperature = fit_temperature(logits_of(val.images, "validation"), val.labels)
        calibrations[f"temperature {temperature:.3f}"] = calibration_of(logits, labels, temperature)
    probabilities, predicted = logits.softmax(1).max(1)
    confusion = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2).view(len(classes), -1)
    wrong = [i for i in probabilities.argsort(descending=True).tolist() if predicted[i] != labels[i]][:8]
    mistakes = [(str(names[i]), classes[labels[i]], classes[predicted[i]], probabilities[i].item()) for i in wrong]
    return wrong, found | {
        "classes": classes,
        "accuracies": accuracies | {name: accuracy_of(logits[i], labels[i]) for name, i in members.items()},
        "top5": (logits.topk(min(5, len(classes))).indices == labels[:, None]).any(1).double().mean().item(),
        "confusion": confusion.tolist(),  # true, predicted
        "calibrations": calibrations,
        "mistakes": mistakes,  # image, true, predicted, probability
    }


def robustness(images, labels, logits_of):
    """{name: accuracies for strengths 1 to 5} with the fifteen corruptions of Hendrycks & Dietterich 2019, and with
    none, on 1,000 of the images (N, 3, S, S) uint8 at most, evenly spread."""
    library = import_optional("imagecorruptions", "imagecorruptions-imaug")
    if images.shape[1] != 3 or min(images.shape[2:]) < 32:
        shape = " x ".join(map(str, images.shape[1:]))
        raise UserError(f"--corruptions needs colour images of 32 pixels or more, and the model takes {shape}")
    some = torch.linspace(0, len(labels) - 1, min(1000, len(labels))).round().long()
    found = {"none": [accuracy_of(logits_of(images[some]), labels[some])["accuracy"]] * 5}
    arrays, state = images[some].permute(0, 2, 3, 1).contiguous().numpy(), np.random.get_state()
    for name, strength in itertools.product(library.get_corruption_names(), range(1, 6)):
        np.random.seed(0)  # two corruptions take seeds, the others draw from numpy's generator
        seeds = [{"seed": i} if name in ("impulse_noise", "glass_blur") else {} for i in range(len(some))]
        pixels = [library.corrupt(image, strength, name, **seed) for image, seed in zip(arrays, seeds, strict=True)]
        logits = logits_of(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), f"{name} {strength}")
        found.setdefault(name, []).append(accuracy_of(logits, labels[some])["accuracy"])
    np.random.set_state(state)
    return found
