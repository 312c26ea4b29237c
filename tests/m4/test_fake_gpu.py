"""The stand-in for a GPU finds what it is there to find."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from folovllm import transfers
from tests.fake_gpu import GPU, FakeGpu, HiddenWait, fake_gpu

pytestmark = pytest.mark.m4


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


def test_mixed_devices_raise(gpu: FakeGpu) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device=GPU) + torch.zeros(3)


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x[0, 0] > 0),
        lambda x: int(x[0, 0]),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.unique(x),
    ],
)
def test_what_depends_on_a_value_raises(gpu: FakeGpu, act: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        act(torch.zeros(2, 3, device=GPU))


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),  # without a wait, its values may not be there yet
        lambda x: x[[0, 1]],  # the list is copied to the GPU
        lambda x: x.__setitem__([0, 1], 1.0),
        lambda x: x.index_select(0, torch.tensor([0]).to(GPU)),
        lambda x: torch.tensor([1, 2], device=GPU),
        lambda x: torch.from_numpy(np.zeros(3)).to(GPU, non_blocking=True),  # not pinned
        lambda x: x.copy_(torch.zeros(2, 3)),
    ],
)
def test_a_hidden_copy_raises(gpu: FakeGpu, act: Callable[[torch.Tensor], object]) -> None:
    x = torch.zeros(2, 3, device=GPU)
    with gpu.step(), pytest.raises(HiddenWait):
        act(x)


def test_transfers_are_counted(gpu: FakeGpu) -> None:
    buffer = torch.zeros(8, dtype=torch.int64, device=GPU)
    with gpu.step() as account:
        up = transfers.to_device([1, 2, 3], GPU)
        transfers.copy_to(buffer, np.arange(5))
        a, b = transfers.to_host(up + 1, buffer)
        assert (a.tolist(), b.shape, b.device.type) == ([0, 0, 0], (8,), "cpu")
    assert (account.up, account.down, account.waits) == ([(3,), (5,)], [(3,), (8,)], 1)


def test_on_a_cpu_nothing_is_copied() -> None:
    values, buffer = np.arange(3), torch.zeros(4, dtype=torch.int64)
    assert transfers.to_device(values, "cpu").data_ptr() == values.ctypes.data
    (back,) = transfers.to_host(buffer)
    assert back is buffer
    transfers.copy_to(buffer, values)
    assert buffer.tolist() == [0, 1, 2, 0]
    assert transfers.to_device([1.5, 2], "cpu", torch.float32).tolist() == [1.5, 2.0]
