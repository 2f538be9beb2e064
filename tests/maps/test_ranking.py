"""Ranked methods: intervals and tests against closed forms, and what cannot be ranked."""

import json

import numpy as np
import pytest
from scipy.stats import t as student

import compare
from errors import UserError
from maps.ranking import mean_and_intervals, ranking_text


def test_intervals_over_images_and_over_seeds_are_their_closed_forms():
    generator = np.random.default_rng(0)
    one = generator.random((3, 50)) + generator.random((1, 50)) + 0.3 * generator.random((3, 1))
    mean, images, seeds, p = mean_and_intervals([one])
    of_images, of_seeds = (one.mean(axis).std(ddof=1) / len(one.mean(axis)) ** 0.5 for axis in (0, 1))
    assert mean == pytest.approx(one.mean())
    assert images == pytest.approx(student.ppf(0.975, 49) * of_images)
    assert seeds == pytest.approx(student.ppf(0.975, 2) * of_seeds)
    rest = one - one.mean(0) - one.mean(1)[:, None] + one.mean()
    parts = np.array([of_images**2, of_seeds**2, (rest**2).sum() / 98 / 150])
    variance = parts[0] + parts[1] - parts[2]  # of the mean of a crossed design, by the expected mean squares
    assert p == pytest.approx(2 * student.sf(mean / variance**0.5, variance**2 / (parts**2 / [49, 2, 98]).sum()))
    # two sets of images that agree: the same mean, from twice the images and seeds
    _, halved, _, smaller = mean_and_intervals([one, one])
    assert halved == pytest.approx(images / 2**0.5, rel=0.02) and smaller < p
    assert mean_and_intervals([one[:1]])[2:] == (None, None)
    assert mean_and_intervals([0 * one]) == (0, 0, 0, 1) and mean_and_intervals([0 * one + 1])[3] == 0


def test_p_is_rarely_small_if_there_is_no_difference():
    """Images that are hard for all seeds, and seeds that are good for all images: p < 0.05 in about 5 of 100 cases."""
    generator, found = np.random.default_rng(0), []
    for _ in range(400):
        groups = [
            generator.normal(0, 1, (1, 40)) + generator.normal(0, 0.2, (3, 1)) + generator.normal(0, 1, (3, 40))
            for _ in range(2)
        ]
        found.append(mean_and_intervals(groups)[3] < 0.05)
    assert 0.01 < np.mean(found) < 0.08


def write(folder, name, values, *, dataset="shapes", split="test", ranked_by="pointing", redrawn=0.2):
    rows = {method: {"pointing": [float(np.mean(v)), 0.01], "saco": [0.5, 0.1]} for method, v in values.items()}
    rows["good"]["pointing_redrawn"] = [redrawn, 0.01]
    rows["centred gaussian"] = {"pointing": [0.3, 0.01]}
    record = {"model": "vit", "dataset_name": dataset, "split": split, "ranked_by": ranked_by}
    record["images"] = len(values["good"])
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record | {"scores": rows, "values": values}))


def test_methods_are_ranked_best_first(tmp_path, capsys):
    for seed in range(3):
        values = {"bad": [0, 1, 0, 0, seed % 2, 0], "good": [1, 1, 1, 0, 1, 1], "here": [1] * 6}
        write(tmp_path / "a", f"even-{seed}", values, dataset="even", redrawn=0.5)
        del values["here"]  # a method that not all evaluations have
        write(tmp_path / "a", f"shapes-{seed}", values)
    compare.main(["--maps", str(tmp_path / "a")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["good", "*", "0.833"] and lines[2].split()[:2] == ["bad", "0.222"]
    assert float(lines[1].split()[5]) == pytest.approx(0.611, abs=1e-3) and float(lines[1].split()[6]) < 0.05
    assert lines[1].split()[-1] == "0.350" and lines[2].split()[-1] == "-"  # pointing_redrawn
    assert lines[4].startswith("* finds the object with redrawn weights")
    assert lines[6].split() == ["pointing", "vit,", "even", "vit,", "shapes"] and "here" not in "".join(lines)


def test_evaluations_that_cannot_be_ranked_are_named(tmp_path):
    values = {"good": [1, 0.5]}
    write(tmp_path / "a", "one", values)
    write(tmp_path / "a", "two", {"good": [1, 0, 0]})
    write(tmp_path / "b", "one", values)
    write(tmp_path / "b", "two", values, dataset="cifar10", ranked_by="saco")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "e.json").write_text("[]")
    for name, message in {
        "a": "vit on shapes are not of the same images",
        "b": "pointing ranks methods where there are masks, saco elsewhere",
        "c.json": "c.json is no evaluation.json of rollout.py",
        "e.json": "e.json is no evaluation.json of rollout.py",
        "d": "name runs with an evaluation",
    }.items():
        with pytest.raises(UserError, match=message):
            ranking_text([tmp_path / name])
    text = ranking_text([tmp_path / "b" / "one.json"])  # one seed: no interval over seeds, no p
    assert text.splitlines()[1].split()[3] == "-"
