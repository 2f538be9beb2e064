import math

import numpy as np
import pytest
import torch

from data import Split
from errors import UserError
from maps.predictions import accuracy_of, calibration_of, evaluation, fit_temperature, robustness


def logits_for(probabilities):
    """Logits of two classes whose softmax gives these probabilities of class 0."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log()


def test_calibration_error_by_hand():
    """Two images in (0.6, 0.667], off by |0.65 - 1/2|; one in (0.867, 0.933], by 0.1; one in (0.933, 1], by 1."""
    logits = torch.cat([logits_for([0.64, 0.66, 0.9]), torch.tensor([[0.0, 60.0]]).double()])
    error, bins = calibration_of(logits, torch.tensor([0, 1, 0, 0]))
    assert error == pytest.approx((2 * 0.15 + 0.1 + 1) / 4)
    assert [count for count, _, _ in bins] == [2, 1, 1]
    assert np.array(bins)[:, 1] == pytest.approx([0.65, 0.9, 1]) and [row[2] for row in bins] == [0.5, 1, 0]


def test_calibrated_predictions_have_no_error():
    logits = logits_for([0.8] * 10)
    assert calibration_of(logits, torch.tensor([0] * 8 + [1] * 2))[0] == pytest.approx(0)


@pytest.mark.parametrize(("confidence", "right"), [(0.99, 70), (0.6, 90), (0.8, 80)])
def test_temperature_has_a_closed_form(confidence, right):
    """Of two classes with one gap z between logits, the best is the T for which sigmoid(z / T) is the accuracy."""
    logits, labels = logits_for([confidence] * 100).float(), torch.tensor([0] * right + [1] * (100 - right))
    temperature = fit_temperature(logits, labels)
    share = right / 100
    assert temperature == pytest.approx(
        math.log(confidence / (1 - confidence)) / math.log(share / (1 - share)), rel=1e-3
    )
    assert calibration_of(logits, labels, temperature)[0] < 1e-3


def test_wilson_interval():
    """The example of 8 of 10 in Wilson's closed form; and no interval outside [0, 1]."""
    z, n, p = 1.959963984540054, 10, 0.8
    centre, half = (p + z * z / 2 / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    found = accuracy_of(torch.eye(2)[[0] * 8 + [1] * 2], torch.zeros(10, dtype=torch.long))
    assert found["accuracy"] == 0.8 and found["images"] == 10
    assert found["interval"] == pytest.approx([(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)])
    assert accuracy_of(torch.eye(2)[[0]], torch.tensor([0]))["interval"][1] == pytest.approx(1)


def test_evaluation_by_hand():
    """Four images of classes b, b, c, a of six; the first and the last are wrong, the last more surely."""
    logits = torch.zeros(4, 6)
    for row, (said, size) in enumerate([(0, 1.0), (1, 2.0), (2, 3.0), (5, 4.0)]):
        logits[row, said] = size
    logits[0, 1], logits[3, 0] = 0.5, -1
    split = Split(torch.arange(4), torch.tensor([1, 1, 2, 0]), np.array(["w", "x", "y", "z"]))
    wrong, found = evaluation(
        lambda images, title="", flip=False: logits.roll(2, 1) if flip else logits, split, None, [*"abcdef"], flip=True
    )
    assert wrong == [3, 0]
    assert [row[:3] for row in found["mistakes"]] == [("z", "a", "f"), ("w", "b", "a")]
    assert found["mistakes"][0][3] == pytest.approx(logits[3].softmax(0)[5].item())
    accuracies = {name: row["accuracy"] for name, row in found["accuracies"].items()}
    assert accuracies == {"all images": 0.5, "all images, --tta flip": 0, "a": 0, "b": 0.5, "c": 1}
    assert found["confusion"][1] == [1, 1, 0, 0, 0, 0] and found["confusion"][0] == [0, 0, 0, 0, 0, 1]
    assert found["top5"] == 0.75  # class a is the sixth of the last image


def test_corruptions_are_the_same_each_time_and_leave_numpy_alone():
    pytest.importorskip("imagecorruptions")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, seen = torch.tensor([0, 1, 1]), {}

    def logits_of(pixels, title="none"):
        seen.setdefault(title, []).append(pixels.clone())
        return torch.eye(2)[[0, 0, 1]]

    state = np.random.get_state()[1].copy()
    found = robustness(images, labels, logits_of)
    robustness(images, labels, logits_of)
    assert len(found) == 16 and set(map(len, found.values())) == {5} and found["fog"] == [2 / 3] * 5
    for title, (first, second) in seen.items():
        assert first.equal(second) and first.shape == images.shape and first.dtype == torch.uint8, title
        assert title == "none" or not first.equal(images), title
    assert np.array_equal(np.random.get_state()[1], state)
    with pytest.raises(UserError, match="images of 32 pixels or more, and the model takes 3 x 16 x 16"):
        robustness(images[..., :16, :16], labels, logits_of)


def test_corruptions_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imagecorruptions", None)
    with pytest.raises(UserError, match="pip install imagecorruptions-imaug"):
        robustness(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([0]), None)
