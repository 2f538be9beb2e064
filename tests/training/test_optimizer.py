"""The loss, the optimisers, and the average of the weights."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from errors import UserError
from models import build_model
from training.optimizer import MuonWithAdamW, cosine_schedule, make_loss, make_optimizer, parameter_groups

SMALL = {"image_size": 16, "num_classes": 3}


def loss_of(labels, *, class_weights="balanced", smoothing=0.0, classes=4):
    dataset = SimpleNamespace(train=SimpleNamespace(labels=torch.tensor(labels)), classes=[*range(classes)])
    args = SimpleNamespace(class_weights=class_weights, smoothing=smoothing)
    return make_loss(args, dataset, "cpu").keywords["criterion"]


RARE = [0] * 5 + [1] * 3 + [2] * 2  # none of class 3, as --overfit may leave it
LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 2, 0, 2])


def test_a_loss_without_weights_is_torchs_own():
    loss = loss_of(RARE, class_weights="none", smoothing=0.1)
    assert loss.func is cross_entropy and loss.keywords == {"label_smoothing": 0.1} and not loss.args


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_image_has_the_weight_of_its_class(smoothing):
    """N / (classes x images of the class), as scikit-learn's class_weight="balanced"."""
    weights = torch.tensor([10 / (4 * 5), 10 / (4 * 3), 10 / (4 * 2), 10 / 4])
    each = cross_entropy(LOGITS, LABELS, label_smoothing=smoothing, reduction="none")
    loss = loss_of(RARE, smoothing=smoothing)
    torch.testing.assert_close(loss(LOGITS, LABELS), (weights[LABELS] * each).sum() / 6)
    if not smoothing:  # torch's own mean divides by the sum of the weights
        theirs = cross_entropy(LOGITS, LABELS, weights)
        torch.testing.assert_close(loss(LOGITS, LABELS), theirs * weights[LABELS].sum() / 6)
    halves = (loss(LOGITS[:3], LABELS[:3]) + loss(LOGITS[3:], LABELS[3:])) / 2
    torch.testing.assert_close(loss(LOGITS, LABELS), halves)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_mixed_image_is_the_mix_of_its_losses(smoothing):
    loss, other = loss_of(RARE, smoothing=smoothing), LABELS.flip(0)
    mixed = 0.3 * one_hot(LABELS, 4) + 0.7 * one_hot(other, 4)
    torch.testing.assert_close(loss(LOGITS, mixed), 0.3 * loss(LOGITS, LABELS) + 0.7 * loss(LOGITS, other))
    torch.testing.assert_close(loss(LOGITS, one_hot(LABELS, 4).float()), loss(LOGITS, LABELS))


def test_balanced_classes_need_no_weights():
    loss, plain = loss_of([0, 1, 2, 3] * 5), loss_of(RARE, class_weights="none")
    torch.testing.assert_close(loss(LOGITS, LABELS), plain(LOGITS, LABELS))


def small_model():
    torch.manual_seed(0)
    return build_model("cct_2_3x2", **SMALL)


def flags(**others):
    defaults = {"opt": "adamw", "lr": 0.01, "weight_decay": 0.1, "decay_all": False}
    return SimpleNamespace(**defaults | {"momentum": 0.8, "opt_betas": [0.7, 0.9], "opt_eps": 1e-6} | others)


@pytest.mark.parametrize("opt", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("decay_all", [True, False])
def test_each_parameter_is_in_one_group_with_its_decay(opt, decay_all):
    model = small_model()
    optimizer = make_optimizer(flags(opt=opt, decay_all=decay_all), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) == len(decays)
    for name, parameter in model.named_parameters():
        free = not decay_all and (parameter.ndim < 2 or name == "pos_embed")
        assert decays[id(parameter)] == (0 if free else 0.1), name


@pytest.mark.parametrize(
    ("opt", "reference"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.8, weight_decay=0.1)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.7, 0.9), eps=1e-6, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.7, 0.9), eps=1e-6, weight_decay=0.1)),
    ],
)
def test_steps_are_torchs(opt, reference):
    models = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    models[1].load_state_dict(models[0].state_dict())
    optimizers = make_optimizer(flags(opt=opt, decay_all=True), models[0]), reference(models[1].parameters())
    for _ in range(3):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_a_first_step_that_is_skipped_leaves_no_momentum_of_nothing():
    """As a scaler of gradients has it done after an overflow: the fused step is told, and returns at once."""
    weight = torch.nn.Parameter(torch.ones(4))
    model = SimpleNamespace(named_parameters=lambda: [("weight", weight)], no_weight_decay=())
    optimizer = make_optimizer(flags(opt="sgd", decay_all=True), model)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    weight.grad = torch.full((4,), torch.inf)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4))
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], torch.zeros(4))


def test_muon_without_a_matrix_of_a_block():
    model = small_model()
    model.blocks.requires_grad_(False)
    with pytest.raises(UserError, match="--opt muon: no weight matrix of a block is trained here"):
        make_optimizer(flags(opt="muon"), model)


def test_what_is_frozen_is_in_no_group():
    model = small_model()
    model.blocks[0].requires_grad_(False)
    for opt in ("sgd", "muon"):
        groups = make_optimizer(flags(opt=opt), model).param_groups
        assert not [p for group in groups for p in group["params"] if not p.requires_grad]


def test_muon_takes_the_matrices_of_the_blocks_alone():
    model = small_model()
    optimizer = make_optimizer(flags(opt="muon"), model)
    taken = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name.split(".", 2)[2] for name, p in model.named_parameters() if id(p) in taken}
    assert names == {"attn.qkv.weight", "attn.proj.weight", "mlp.0.weight", "mlp.3.weight"} and len(taken) == 2 * 4


def test_muon_with_adamw_steps_as_the_two_by_themselves():
    model, reference = small_model(), small_model()
    matrices = [p for name, p in reference.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    parts = (
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(parameter_groups(reference, 0.1, decay_all=False, leave_out=matrices), lr=0.01, fused=True),
    )
    optimizer = make_optimizer(flags(opt="muon"), model)
    for seed in range(2):
        for stepped, optimizers in ((model, [optimizer]), (reference, parts)):
            stepped.zero_grad()
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
            stepped.eval()(images).square().mean().backward()
            for one in optimizers:
                one.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_schedule_reaches_both_parts_before_and_after_loading():
    model = small_model()
    optimizer = make_optimizer(flags(opt="muon"), model)
    schedule = cosine_schedule(optimizer, epochs=4, steps_per_epoch=1, warmup_epochs=0)
    model(torch.randn(2, 3, 16, 16)).square().mean().backward()
    optimizer.step()
    schedule.step()
    state = optimizer.state_dict()
    fresh = MuonWithAdamW(small_model(), lr=0.01, weight_decay=0.1, decay_all=False)
    fresh_schedule = cosine_schedule(fresh, epochs=4, steps_per_epoch=1, warmup_epochs=0)
    fresh.load_state_dict(state)
    fresh_schedule.load_state_dict(schedule.state_dict())
    for one, its_schedule in ((optimizer, schedule), (fresh, fresh_schedule)):
        its_schedule.step()
        rates = [group["lr"] for part in one.state_dict().values() for group in part["param_groups"]]
        assert rates == pytest.approx([0.005] * 3)


def test_muon_takes_a_convolution_as_the_matrix_from_a_patch_to_the_channels():
    """Against torch's Muon on weights that were matrices from the start, with a schedule that writes to the groups."""
    torch.manual_seed(0)
    model = build_model("resnet18", width=4, image_size=16)
    optimizer = make_optimizer(flags(opt="muon"), model)
    weights = optimizer.param_groups[0]["params"]
    names = {name for name, p in model.named_parameters() if any(p is weight for weight in weights)}
    assert len(names) == 19 and "conv1.weight" not in names and "layer2.0.downsample.0.weight" in names
    matrices = [torch.nn.Parameter(weight.detach().clone().flatten(1)) for weight in weights]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    schedules = [cosine_schedule(one, epochs=4, steps_per_epoch=1, warmup_epochs=0) for one in (optimizer, muon)]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16)).square().mean().backward()
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.grad = weight.grad.flatten(1).clone()
        for one in (optimizer, muon, *schedules):
            one.step()
    for matrix, weight in zip(matrices, weights, strict=True):
        assert torch.equal(matrix, weight.flatten(1))
