"""Small tensors between the host and the device: everything that a step copies up, and the one wait for its results.

Milestone: M4. vLLM counterparts: `CpuGpuBuffer` in vllm/v1/utils.py and `_to_list` in
vllm/v1/worker/gpu_model_runner.py. Left out: a second stream for the copies, and steps that overlap: vLLM's async
scheduling prepares the next step while the GPU still computes.

A GPU works through a queue. The host puts kernels and copies into it and runs ahead, so the GPU never idles, as long as
nothing makes the host wait. Three things do:

    a copy from pageable memory    CUDA copies it into pinned memory of its own first, and waits
    a value that Python needs      `.item()`, `.tolist()`, `if tensor:` wait until the GPU has computed it
    a size that depends on values  `nonzero()` and indexing with a mask, for the same reason

So a step copies its inputs up with `to_device` and waits once, in `to_host`, for all that the host has to know.
tests/m4/test_no_hidden_sync.py counts.
"""

from collections.abc import Sequence

import numpy as np
import torch

from folovllm.utils import round_up

_ALIGNMENT = 16  # bytes


def to_device(
    values: Sequence[object] | np.ndarray | torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Returns `values` as a tensor on `device`. The host does not wait for the copy to a GPU.

    On a CPU the result may share the memory of an array or a tensor, as in torch.as_tensor.
    """
    device = torch.device(device)
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return pinned(host).to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def to_device_packed(
    lists: Sequence[Sequence[int] | np.ndarray], device: torch.device | str, dtype: np.dtype | type
) -> list[torch.Tensor]:
    """Returns each list as a tensor [its length] on `device`. All of them go up in one copy.

    Each tensor begins at a multiple of 16 bytes, as if it had been allocated alone. Triton compiles a kernel anew for a
    pointer that does not. E.g. int32 lists of 3 and 2 numbers: [a, a, a, -, b, b, -, -].
    """
    size = _ALIGNMENT // np.dtype(dtype).itemsize
    starts = np.cumsum([0, *(round_up(len(values), size) for values in lists)]).tolist()
    host = np.zeros(starts[-1], dtype=dtype)
    for start, values in zip(starts, lists, strict=False):
        host[start : start + len(values)] = values
    packed = to_device(host, device)  # [sum of the lengths, rounded up]
    return [packed[start : start + len(values)] for start, values in zip(starts, lists, strict=False)]


def copy_to(buffer: torch.Tensor, values: np.ndarray) -> None:
    """Copies `values` to the beginning of `buffer` along each axis. `buffer` is not smaller, and keeps its address.

    `buffer` is on a GPU. On a CPU numpy writes to the same memory, which takes less time than an operator of torch's.

    The next copy to the same addresses cannot come too early: the GPU's queue keeps the order of the host's calls, so
    all kernels that read the old values come first. The pinned memory is another one for each step.
    """
    region = tuple(slice(n) for n in values.shape)
    host = torch.as_tensor(values, dtype=buffer.dtype)
    buffer[region].copy_(pinned(host) if buffer.device.type == "cuda" else host, non_blocking=True)


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors in the memory of the host. On a GPU all copies are queued first, and then it waits once.

    The tensors are on one device, which need not be the current one.
    """
    return list(tensors) if all(t.device.type == "cpu" for t in tensors) else _download(tensors)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy in memory that the GPU reads by itself.

    torch's allocator of pinned memory notes every copy that reads it, and gives it to another tensor only when the GPU
    has made the copy. A pinned buffer of our own, written anew in every step, would have no such protection: the host
    runs ahead, and would overwrite what the GPU has not read yet. A tensor that is not contiguous would be copied once
    more, into memory that is not pinned.
    """
    return tensor.contiguous().pin_memory()


def _download(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    device = tensors[0].device
    assert all(t.device == device for t in tensors), "the wait below is for one device"
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.cuda.current_stream(device).record_event().synchronize()  # an event of the current device may be another's
    return copies
