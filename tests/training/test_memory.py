"""A batch that does not fit into memory: one line, with what would."""

from types import SimpleNamespace

import pytest
import torch

from errors import UserError, is_memory_error
from training import device as devices
from training.device import memory_watched
from training.memory import memory_error

GIB = 2**30


class FakeGpu:
    """Stands in for torch.cuda: a card of 10 GiB, 1 GiB held, and half a GiB per image in a pass."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self):
        self.peak, self.emptied = 9 * GIB, 0

    def mem_get_info(self, device):
        return 9 * GIB, 10 * GIB

    def get_device_name(self, device):
        return "Fake"

    def max_memory_allocated(self, device):
        return self.peak

    def memory_allocated(self, device):
        return GIB

    def empty_cache(self):
        self.emptied += 1

    def reset_peak_memory_stats(self, device):
        self.peak = GIB + 8 * GIB // 2


@pytest.fixture
def run(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    return SimpleNamespace(
        args=SimpleNamespace(batch_size=64),
        dataset=SimpleNamespace(test=SimpleNamespace(images=torch.zeros(1, 3, 4, 4))),
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        precision=SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False)),
        device=SimpleNamespace(type="cuda"),
        folder=tmp_path,
        model_args={"image_size": 4},
    )


def failing():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_batch_too_large_for_a_gpu_is_one_line_that_says_what_fits(run, monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(devices.torch, "cuda", FakeGpu())
    monkeypatch.setattr(devices.torch, "zeros", lambda *size, device: zeros(*size))
    (run.folder / "last.pt").touch()
    with pytest.raises(UserError) as caught, memory_watched(run):
        failing()
    assert str(caught.value) == (
        "--batch-size 64 does not fit into the 10.0 GiB of Fake: it took 9.0 GiB and needed more; 16 should fit"
        f"; {run.folder}/last.pt holds what was done"
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_where_the_weights_take_all_no_batch_fits(run, monkeypatch):
    zeros, gpu = torch.zeros, FakeGpu()
    gpu.mem_get_info = lambda device: (300, 10 * GIB)  # bytes; the weights take 4 * 98
    monkeypatch.setattr(devices.torch, "cuda", gpu)
    monkeypatch.setattr(devices.torch, "zeros", lambda *size, device: zeros(*size))
    with pytest.raises(UserError, match="it took 9.0 GiB and needed more$"), memory_watched(run):
        failing()


def test_on_a_processor_there_is_no_estimate(run):
    run.device = torch.device("cpu")
    with pytest.raises(UserError, match="^--batch-size 64 does not fit$"), memory_watched(run):
        torch.empty(2**60)


@pytest.mark.parametrize(
    ("attention", "said"), [("softmax", "; a larger --patch-size takes less, too$"), ("none", "fit$")]
)
def test_the_patch_size_is_named_where_it_counts(run, attention, said):
    run.device, run.model_args = torch.device("cpu"), {"patch_size": 4, "attention": attention}
    with pytest.raises(UserError, match=f"^--batch-size 64 does not .*{said}"), memory_watched(run):
        torch.empty(2**60)


def test_other_errors_stay_what_they_are(run):
    assert not is_memory_error(RuntimeError("shapes differ")) and is_memory_error(MemoryError())
    with pytest.raises(RuntimeError, match="shapes differ"), memory_watched(run):
        raise RuntimeError("shapes differ")


def test_what_the_failed_pass_held_is_let_go(run):
    """Its activations are locals of frames that the traceback keeps: they are dropped before anything is measured."""
    run.device, dropped = torch.device("cpu"), []

    class Activation:
        def __del__(self):
            dropped.append(1)

    def forward():
        activation = Activation()  # noqa: F841
        failing()

    try:
        forward()
    except torch.OutOfMemoryError as error:
        memory_error(error, run)
        assert dropped
