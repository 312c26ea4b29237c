"""The stand-in for a GPU finds what it is there to find."""

from collections.abc import Callable, Iterator

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


@pytest.fixture(params=[False, True], ids=["", "inference mode"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """The engine runs in inference mode, where operators arrive whole that consist of others."""
    with torch.inference_mode(request.param):
        yield


@pytest.mark.usefixtures("mode")
def test_mixed_devices_raise(gpu: FakeGpu) -> None:
    x = torch.zeros(3, 3, device=GPU)
    for act in (lambda: x + torch.zeros(3), lambda: torch.nn.functional.linear(x, torch.zeros(3, 3))):
        with pytest.raises(RuntimeError, match="same device"):
            act()


@pytest.mark.usefixtures("mode")
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


@pytest.mark.usefixtures("mode")
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
        lambda x: x.copy_(transfers.pinned(torch.zeros(3)), non_blocking=True),  # broadcast on the host
        lambda x: transfers.pinned(torch.zeros(3, 2)).t().to(GPU, non_blocking=True),  # made contiguous on the host
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.__setitem__(x > 0, torch.zeros(6, device=GPU)),  # which of the six are taken depends on the mask
        lambda x: torch.cuda.synchronize(),
        lambda x: transfers.to_device([1, 2], GPU).tolist(),  # although the host knows what it has sent
    ],
)
def test_a_hidden_copy_raises(gpu: FakeGpu, act: Callable[[torch.Tensor], object]) -> None:
    x = torch.zeros(2, 3, device=GPU)
    with gpu.step(), pytest.raises(HiddenWait):
        act(x)


def test_the_host_is_real(gpu: FakeGpu) -> None:
    """Loaders look at the values of a file, and the engine at its own lists."""
    values = torch.tensor([3, 4]) * 2
    assert values.tolist() == [6, 8] and values[values > 6].numel() == 1
    up = values.to(GPU) + 1
    assert up.device == GPU
    with pytest.raises(DataDependentOutputException):
        up.cpu().tolist()


def test_lists_are_packed_into_one_copy(gpu: FakeGpu) -> None:
    lists = [[1, 2, 3], [], np.arange(5), [7]]
    with gpu.step() as account:
        tensors = transfers.to_device_packed(lists, GPU, np.int32)
    assert account.up == [(4 + 0 + 8 + 4,)]
    assert [t.storage_offset() for t in tensors] == [0, 4, 4, 12]  # multiples of 16 bytes
    assert [t.tolist() for t in transfers.to_device_packed(lists, "cpu", np.int32)] == [list(x) for x in lists]


def test_a_buffer_of_two_axes_keeps_what_is_behind(gpu: FakeGpu) -> None:
    buffer = torch.zeros(4, 8, dtype=torch.int32, device=GPU)
    values = np.arange(12, dtype=np.int32).reshape(3, 4)[:, :2]
    with gpu.step() as account:
        transfers.copy_to(buffer, values)
    assert account.up == [(3, 2)]
    on_the_host = torch.full((4, 8), -1)
    transfers.copy_to(on_the_host, values)
    assert on_the_host[:3, :2].tolist() == values.tolist() and int(on_the_host.sum()) == values.sum() - 26


@pytest.mark.usefixtures("mode")
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
