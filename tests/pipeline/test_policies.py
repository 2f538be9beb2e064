import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torchvision.transforms import InterpolationMode
from torchvision.transforms import autoaugment as reference

from data import load_dataset
from pipeline.policies import (
    CIFAR10_POLICY,
    OPERATIONS,
    POLICIES,
    SIGNED,
    apply_operation,
    apply_operations,
    draw_auto_augment,
    draw_rand_augment,
    draw_trivial_augment,
    usual_magnitudes,
    wide_magnitudes,
)

BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")  # where torchvision's rounding may differ


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(height=32, width=32):
    """Noise, and what has few levels: black, white, one other level, two levels, ramps."""
    noise = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=generator())
    flat = torch.tensor([0, 255, 77], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, height, width)
    two = 100 * (noise[:1] > 9).byte()
    ramps = torch.arange(height * width).remainder(64).byte().expand(1, 3, -1).view(1, 3, height, width)
    return torch.cat([noise, flat, two, ramps, noise[:1] // 4 + 90])


def all_cases(size):
    """Every operation at every magnitude of the three policies, both ways: indices and magnitudes, (cases,) each."""
    tables = torch.cat([usual_magnitudes(10, size), usual_magnitudes(31, size), wide_magnitudes(31)], dim=1)
    cases = []
    for index, row in enumerate(tables):
        magnitudes = row.unique()
        if index < SIGNED:
            magnitudes = torch.cat([magnitudes, -magnitudes])
        cases += [(index, magnitude) for magnitude in magnitudes.tolist()]
    operations, magnitudes = zip(*cases, strict=True)
    return torch.tensor(operations), torch.tensor(magnitudes, dtype=torch.float64)


def torchvisions(images, name, magnitude):
    return reference._apply_op(images, name, magnitude, InterpolationMode.NEAREST, [100.0] * images.shape[-3])


def assert_operations_equal_torchvisions(images):
    """All cases at once, in random order, each on all the images."""
    operations, magnitudes = all_cases(images.shape[2:])
    order = torch.randperm(len(operations), generator=generator())
    operations, magnitudes = operations[order], magnitudes[order]
    count = len(images)
    ours = apply_operation(
        images.repeat(len(order), 1, 1, 1),
        operations.repeat_interleave(count),
        magnitudes.repeat_interleave(count),
        fill=100,
    )
    for index, magnitude, changed in zip(operations.tolist(), magnitudes.tolist(), ours.split(count), strict=True):
        name = OPERATIONS[index]
        difference = (changed.int() - torchvisions(images, name, magnitude).int()).abs().max()
        assert difference <= (name in BLENDS), (name, magnitude, difference)


@pytest.mark.parametrize("size", [(32, 32), (20, 28), (33, 25)])
def test_operations_equal_torchvisions_on_random_images(size):
    assert_operations_equal_torchvisions(random_images(*size))
    assert_operations_equal_torchvisions(random_images(*size)[:, :1].contiguous())  # of one channel


def test_operations_equal_torchvisions_on_real_images(cifar10_dir):
    images = load_dataset("cifar10", data_dir=cifar10_dir, image_size=32).test.images[:16]
    assert_operations_equal_torchvisions(images)
    assert_operations_equal_torchvisions(images[:, :, 3:, 4:21].contiguous())


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_magnitudes_are_torchvisions(size):
    spaces = [
        (reference.AutoAugment()._augmentation_space(10, size), usual_magnitudes(10, size)),
        (reference.RandAugment()._augmentation_space(31, size), usual_magnitudes(31, size)),
        (reference.TrivialAugmentWide()._augmentation_space(31), wide_magnitudes(31)),
    ]
    for space, table in spaces:
        for name, (magnitudes, signed) in space.items():
            assert torch.equal(table[OPERATIONS.index(name)], magnitudes.double().expand(table.shape[1])), name
            assert signed == (OPERATIONS.index(name) < SIGNED)
    assert set(spaces[1][0]) == set(spaces[2][0]) == set(OPERATIONS[:14])


def test_the_table_of_sub_policies_is_torchvisions():
    theirs = reference.AutoAugment(reference.AutoAugmentPolicy.CIFAR10).policies
    assert tuple((a, p, m or 0, b, q, n or 0) for (a, p, m), (b, q, n) in theirs) == CIFAR10_POLICY


def assert_drawn_at(expected, operations, magnitudes):
    """A chi-square test of what each image drew in all stages against a table of probabilities."""
    drawn = [(*o, *m) for o, m in zip(operations.tolist(), magnitudes.tolist(), strict=True)]
    counts = dict.fromkeys((key for key, probability in expected.items() if probability), 0)
    for key in drawn:
        counts[key] += 1  # a KeyError is something that must not be drawn
    wanted = [len(drawn) * expected[key] for key in counts]
    assert chisquare(list(counts.values()), wanted).pvalue > 0.01


def both_ways(index, magnitude):
    return [(magnitude, 0.5), (-magnitude, 0.5)] if index < SIGNED else [(magnitude, 1.0)]


def test_auto_augment_draws_each_sub_policy_and_sign_at_its_rate():
    table, expected = usual_magnitudes(10, (32, 32)).tolist(), {}
    for row in CIFAR10_POLICY:
        halves = []
        for name, probability, level in (row[:3], row[3:]):
            index = OPERATIONS.index(name)
            ways = [((index, m), probability * share) for m, share in both_ways(index, table[index][level])]
            halves.append([*ways, ((OPERATIONS.index("Identity"), 0.0), 1 - probability)])
        for (first, m), p in halves[0]:
            for (second, n), q in halves[1]:
                key = (first, second, m, n)
                expected[key] = expected.get(key, 0) + p * q / len(CIFAR10_POLICY)
    assert_drawn_at(expected, *draw_auto_augment(50_000, (32, 32), generator()))


def test_rand_augment_draws_each_operation_and_sign_at_its_rate():
    table = usual_magnitudes(31, (32, 32))[:, 9].tolist()
    single = {(index, m): share / 14 for index in range(14) for m, share in both_ways(index, table[index])}
    expected = {(a, b, m, n): p * q for (a, m), p in single.items() for (b, n), q in single.items()}
    assert_drawn_at(expected, *draw_rand_augment(50_000, (32, 32), generator(), num_ops=2, magnitude=9))


def test_trivial_augment_draws_each_operation_magnitude_and_sign_at_its_rate():
    expected = {}
    for index, row in enumerate(wide_magnitudes(31)[:14].tolist()):
        for magnitude in row:
            for signed, share in both_ways(index, magnitude):
                expected[index, signed] = expected.get((index, signed), 0) + share / 14 / 31
    assert_drawn_at(expected, *draw_trivial_augment(50_000, generator()))


def test_neighbours_and_stages_are_drawn_independently():
    operations, _ = draw_rand_augment(20_000, (32, 32), generator(), num_ops=2, magnitude=9)
    signs = draw_trivial_augment(20_000, generator())[1].sign()[:, 0].long() + 1
    for a, b, kinds in (
        (operations[:, 0], operations[:, 1], 14),
        (operations[::2, 0], operations[1::2, 0], 14),
        (signs[::2], signs[1::2], 3),
    ):
        table = (kinds * a + b).bincount(minlength=kinds**2).view(kinds, kinds)
        assert chi2_contingency(table.numpy()).pvalue > 0.01


def test_each_image_gets_what_it_drew():
    """A whole policy against torchvision's functions, image by image and stage by stage."""
    images = random_images().repeat(12, 1, 1, 1)
    operations, magnitudes = draw_auto_augment(len(images), (32, 32), generator(5))
    ours = POLICIES["auto"](images, generator(5), fill=100)
    for stage in range(2):
        done = apply_operations(images, operations[:, :stage], magnitudes[:, :stage], fill=100)
        after = apply_operations(images, operations[:, : stage + 1], magnitudes[:, : stage + 1], fill=100)
        for image, index, magnitude, changed in zip(done, operations[:, stage], magnitudes[:, stage], after):
            expected = torchvisions(image, OPERATIONS[index], magnitude.item())
            assert (changed.int() - expected.int()).abs().max() <= 1
    assert torch.equal(after, ours)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_policy_follows_from_its_generator_alone(policy):
    images = random_images()[:1].expand(64, -1, -1, -1)
    before = images.clone()
    state = torch.get_rng_state()
    first = policy(images, generator(), fill=0)
    torch.rand(1)
    assert torch.equal(policy(images, generator(), fill=0), first)
    assert not torch.equal(policy(images, generator(1), fill=0), first)
    torch.set_rng_state(state)
    policy(images, generator(), fill=0)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, before)
    assert len({image.numpy().tobytes() for image in first}) > 20


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (70, 3, 24, 40), (70, 3, 2, 1)])
def test_shape_and_type_stay(policy, shape):
    changed = policy(torch.full(shape, 7, dtype=torch.uint8), generator(), fill=128)
    assert changed.shape == shape and changed.dtype == torch.uint8 and changed.is_contiguous()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_nothing_is_asked_of_the_device(policy):
    """Tensors on meta have no values, so that a copy to the host, or a shape that hangs on values, is an error."""
    assert policy(torch.empty(200, 3, 32, 32, dtype=torch.uint8, device="meta"), generator(), fill=0).is_meta


def test_rand_augment_with_other_numbers():
    images = random_images()[:1].expand(64, -1, -1, -1)
    assert torch.equal(POLICIES["rand"](images, generator(), num_ops=0, fill=0), images)
    weak, strong = (POLICIES["rand"](images, generator(), magnitude=m, fill=0).float() for m in (1, 30))
    assert (weak - images).abs().mean() < (strong - images).abs().mean()
