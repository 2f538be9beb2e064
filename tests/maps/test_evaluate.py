import pytest
import torch

from maps.evaluate import (
    against_masks,
    area_under,
    average_precision,
    baselines,
    by_removal,
    centred_gaussian,
    comparable,
    mass_ratio,
    mean_and_error,
    over_patches,
    pointing_game,
    saco,
    segmentation,
)


def masks_and_maps(count=20, size=6, levels=5):
    """Random masks, and maps of few levels, so that there are many ties."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(count, size, size, generator=generator) < 0.3
    masks[:, 0, 0] = True
    maps = torch.randint(levels, (count, size, size), generator=generator).double() / levels
    maps[:, 1, 1] = 1
    return maps, masks


def test_a_constant_map_scores_what_the_mask_covers():
    _, masks = masks_and_maps()
    share = masks.double().mean((1, 2))
    for value in (1.0, 0.1, 1 / 3):
        scores = against_masks(torch.full((20, 3, 3), value), masks, masks)
        for measure in ("pointing", "pointing_filled", "average_precision"):
            torch.testing.assert_close(scores[measure], share, rtol=0, atol=1e-12)
        torch.testing.assert_close(scores["mass_ratio"], torch.ones_like(share), rtol=0, atol=1e-5)


def test_a_perfect_map_scores_one():
    _, masks = masks_and_maps()
    scores = against_masks(masks.double(), masks, masks)
    for measure in ("pointing", "average_precision", "pixel_accuracy", "miou"):
        assert scores[measure].tolist() == [1] * 20


def test_pointing_game_by_hand():
    maps = torch.tensor([[[3.0, 1], [2, 0]], [[3, 3], [3, 0]]])
    masks = torch.tensor([[[True, False], [False, False]], [[True, False], [True, True]]])
    assert pointing_game(maps, masks).tolist() == pytest.approx([1, 2 / 3])


def test_average_precision_against_its_definition():
    """The sum over thresholds of the recall that is gained times the precision there."""
    maps, masks = masks_and_maps()
    for item, found in enumerate(average_precision(maps, masks).tolist()):
        expected, before = 0.0, 0.0
        for threshold in sorted(set(maps[item].flatten().tolist()), reverse=True):
            chosen = maps[item] >= threshold
            recall = (chosen & masks[item]).sum().item() / masks[item].sum().item()
            expected += (recall - before) * (chosen & masks[item]).sum().item() / chosen.sum().item()
            before = recall
        assert found == pytest.approx(expected, abs=1e-12)


def test_mass_and_segmentation_by_hand():
    maps = torch.tensor([[[4.0, 1], [1, 2]]])
    masks = torch.tensor([[[True, True], [False, False]]])
    assert mass_ratio(maps, masks).item() == pytest.approx((5 / 8) / (1 / 2))
    accuracy, miou = segmentation(maps, masks)  # the mean is 2: one pixel is above it
    assert accuracy.item() == pytest.approx(3 / 4) and miou.item() == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_comparable_makes_ties_of_rounding_errors():
    maps = torch.tensor([[[0.3, 0.1 + 0.2, 0.2]]], dtype=torch.float64)
    assert maps[0, 0, 0] != maps[0, 0, 1]
    assert comparable(maps)[0, 0].tolist() == pytest.approx([1, 1, 2 / 3], abs=1e-6)
    assert comparable(maps)[0, 0, 0] == comparable(maps)[0, 0, 1]
    assert comparable(torch.zeros(1, 2, 2)).sum() == 0


class Brightness(torch.nn.Module):
    """Its first class's probability is the share of bright pixels."""

    def forward(self, images):
        share = images[:, 0].mean((1, 2)).clamp(1e-9, 1 - 1e-9)
        return torch.stack([share, 1 - share], 1).log()


def test_deletion_and_insertion_by_a_model_that_can_be_computed():
    """Half of the 20 patches are bright. Taking these first, the bright share falls from 1/2 to 0 in five steps."""
    relevance = torch.zeros(1, 4, 5)
    relevance[:, :2] = torch.rand(1, 2, 5) + 1
    images = (relevance > 0).double().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    classes = torch.zeros(1, dtype=torch.int64)
    found = by_removal(Brightness(), images, relevance, classes)
    deletion, insertion = found["deletion"], found["insertion"]
    falling = torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(deletion, falling, rtol=0, atol=1e-6)
    torch.testing.assert_close(insertion, 0.5 - falling, rtol=0, atol=1e-6)
    assert area_under(deletion).item() == pytest.approx(0.1 * (0.25 + 0.4 + 0.3 + 0.2 + 0.1), abs=1e-6)
    worst = by_removal(Brightness(), images, -relevance, classes)
    assert area_under(worst["deletion"]) > area_under(deletion)
    # each bright tenth lowers the bright share by a tenth, each dark one by nothing: all pairs are as the map says
    assert found["saco"].item() == pytest.approx(1) and worst["saco"] < -0.7  # equal drops count as right


def test_saco_is_its_sum_over_pairs():
    shares, drops = torch.tensor([[5.0, 3.0, 1.0], [1.0, 1.0, 1.0]]), torch.tensor([[0.1, 0.4, 0.1], [0.3, 0.2, 0.1]])
    # 5 above 3 with the smaller drop, 5 above 1 with an equal one, 3 above 1 with the larger; equal shares say nothing
    assert saco(shares, drops).tolist() == pytest.approx([(-2 + 4 + 2) / 8, 0])
    generator = torch.Generator().manual_seed(0)
    shares, drops = (torch.rand(50, 10, generator=generator) for _ in range(2))
    shares = shares.sort(1, descending=True).values
    for row, drop, found in zip(shares.tolist(), drops.tolist(), saco(shares, drops).tolist(), strict=True):
        pairs = [(row[i] - row[j], drop[i] >= drop[j]) for i in range(10) for j in range(i + 1, 10)]
        assert found == pytest.approx(sum(w if fits else -w for w, fits in pairs) / sum(w for w, _ in pairs), abs=1e-5)


class Padded(Brightness):
    """Its patches have 6 pixels, the last ones 2 pixels and padding."""

    grid, patch_size, padding = (6, 6), 6, (0, 4, 0, 4)


def test_the_cells_of_a_padded_model_are_its_patches():
    pixels = torch.arange(32.0).expand(1, 32, 32)  # each column's number
    patches = over_patches(Padded(), pixels)
    assert patches[0, 0].tolist() == pytest.approx([2.5, 8.5, 14.5, 20.5, 26.5, 30.5])
    assert torch.equal(over_patches(Padded(), patches), patches)  # one value per patch already
    images = torch.ones(1, 1, 32, 32)
    relevance = torch.zeros(1, 6, 6)
    relevance[0, :4, 0] = torch.tensor([4.0, 3, 2, 1])  # a tenth of 36 patches: four of 6 x 6 pixels
    deletion = by_removal(Padded(), images, relevance, torch.zeros(1, dtype=torch.int64))["deletion"]
    assert deletion[0, 1].item() == pytest.approx(1 - 4 * 36 / 32**2)


def test_a_centred_gaussian_points_at_the_centre_of_any_grid():
    gaussian = centred_gaussian((5, 9))
    assert gaussian.shape == (5, 9) and gaussian.argmax() == 2 * 9 + 4
    assert gaussian[2, 4] / gaussian[2, 4 + 2] == pytest.approx(torch.exp(torch.tensor(0.5 * (2 / 9 * 4) ** 2)).item())


def test_random_maps_are_others_for_every_batch_and_the_same_for_every_evaluation():
    images = torch.zeros(5, 3, 8, 8)
    first, second = (baselines((2, 3))["random"] for _ in range(2))
    maps = first(images, None)
    assert maps.shape == (5, 2, 3) and not torch.equal(maps, first(images, None))
    assert torch.equal(maps, second(images, None))


def test_mean_and_standard_error():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3 and error == pytest.approx((14 / 3) ** 0.5 / 2)
