"""A GPU without a GPU: torch's FakeTensorMode with the device "cuda", and an account of what crosses to the host.

Tensors have shapes, dtypes and devices, and no values. So a step that runs here has three properties:

- no operation mixes the devices: FakeTensorMode raises;
- nothing depends on a value that the GPU has computed, which would make the host wait: `.item()`, `.tolist()`,
  `nonzero()`, indexing with a mask and `if tensor:` raise;
- inside of `FakeGpu.step()`, every copy to the GPU starts from pinned memory and is non-blocking, and the only way back
  is `transfers.to_host`, which is counted.

A build of torch without CUDA has no guard for the current CUDA device, which indexing and `.to()` ask for. So two lines
of C++ register one that does nothing (torch does the same itself if it has CUDA and finds no GPU).
"""

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm import transfers
from folovllm.csrc.compilers import find_compiler

GPU = torch.device("cuda", 0)
_GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class HiddenWait(AssertionError):
    """A copy between host and GPU during which the host waits."""


@dataclass
class Account:
    """What crossed between host and GPU during a step."""

    up: list[tuple[int, ...]] = field(default_factory=list)  # shapes that were copied to the GPU
    waits: int = 0  # calls of `to_host`
    down: list[tuple[int, ...]] = field(default_factory=list)  # shapes that these brought back


class FakeGpu(FakeTensorMode):
    """Everything built inside of it is fake. `step()` is for what must not wait."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.pinned: dict[int, torch.Tensor] = {}  # by id(); tensors have an equality of their own
        self.account: Account | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[Account]:
        self.account = Account()
        try:
            with _Watch(self.account, self.pinned):
                yield self.account
        finally:
            self.account = None

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self.pinned[id(copy)] = copy
        return copy

    def download(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Zeros: what the GPU has computed is not known."""
        if self.account is not None:
            self.account.waits += 1
            self.account.down += [tuple(t.shape) for t in tensors]
        with unset_fake_temporarily():
            return [torch.zeros(tuple(t.shape), dtype=t.dtype) for t in tensors]


class _Watch(TorchDispatchMode):
    """Sees every operator before FakeTensorMode does."""

    def __init__(self, account: Account, pinned: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.account, self.pinned = account, pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            non_blocking = (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking")) or False
            self._check(source, result.device, non_blocking)
        return result

    def _check(self, source: torch.Tensor, destination: torch.device, non_blocking: bool) -> None:
        if source.device.type == destination.type or destination.type == "meta":
            return
        shape = tuple(source.shape)
        if destination.type == "cpu":
            raise HiddenWait(f"{shape} is copied to the host: use transfers.to_host")
        if not non_blocking or id(source) not in self.pinned:
            raise HiddenWait(f"{shape} is copied to the GPU, and the host waits: use transfers.to_device")
        self.account.up.append(shape)


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The host's tensors are fake, too. Skips the test if torch has no CUDA and there is no C++ compiler."""
    ensure_device_guard()
    gpu = FakeGpu()
    monkeypatch.setattr(transfers, "pinned", gpu.pin)
    monkeypatch.setattr(transfers, "_download", gpu.download)
    with gpu:
        yield gpu


@cache
def ensure_device_guard() -> None:
    with FakeTensorMode(), contextlib.suppress(RuntimeError):
        torch.zeros(2, device="cuda")[torch.zeros(1, dtype=torch.int64, device="cuda")]
        return
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler, because this torch was built without CUDA")
    home = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
        subprocess.run([compiler, str(source), "-o", str(library), *flags], check=True)
        ctypes.CDLL(str(library))
