"""A GPU without a GPU: torch's FakeTensorMode with the device "cuda", and an account of what crosses to the host.

The GPU's tensors have shapes, dtypes and devices, and no values; the host's are real. So a step that runs here has
three properties:

- no operation mixes the devices: FakeTensorMode raises;
- nothing depends on a value that the GPU has computed, which would make the host wait: `.item()`, `.tolist()`,
  `nonzero()`, indexing with a mask and `if tensor:` raise;
- inside of `FakeGpu.step()`, every copy to the GPU starts from pinned memory and is non-blocking, and the only way back
  is `transfers.to_host`, which is counted.

It cannot see what no operator of torch shows: waits of the allocators (cudaMalloc, the first pinned memory), of Triton
when it loads a kernel for its first launch, and inside of library kernels. On a real GPU, scripts/dev/gpu_steps.py
lists every wait of a step. Triton's kernels cannot run on tensors without values: tests/fake_kernels.py checks each
launch instead. To run what uses this: pytest tests/m4/test_no_hidden_sync.py tests/m4/test_fake_gpu.py

A build of torch without CUDA has no guard for the current CUDA device, which indexing and `.to()` ask for. So two lines
of C++ register one that does nothing, for which the tests need a compiler. (torch does the same itself if it has CUDA
and finds no GPU.)

`OneDevice` checks the first of these properties only, on any device. It serves tests that run on "meta".
"""

import contextlib
import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from folovllm import transfers
from folovllm.csrc.compilers import find_compiler

GPU = torch.device("cuda", 0)
_GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
_ATEN = torch.ops.aten
_COPIES = (_ATEN._to_copy.default, _ATEN.copy_.default)
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)


class HiddenWait(AssertionError):
    """A copy between host and GPU during which the host waits."""


@dataclass
class Account:
    """What crossed between host and GPU during a step."""

    up: list[tuple[int, ...]] = field(default_factory=list)  # shapes that were copied to the GPU
    waits: int = 0  # calls of `to_host`
    down: list[tuple[int, ...]] = field(default_factory=list)  # shapes that these brought back


class FakeGpu(FakeTensorMode):
    """What is built on "cuda" inside of it is fake. `step()` is for what must not wait."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.pinned: dict[int, torch.Tensor] = {}  # by id(); tensors have an equality of their own
        self.account: Account | None = None
        self._is_computing = False  # the mode calls itself for the parts of an operator, which may be tensors of a CPU
        self.equal = True  # what torch.equal answers outside of a step: loaders compare, e.g. whether a head is tied

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_computing and is_of_the_host(args, kwargs):
            return func(*args, **kwargs)
        if func is _ATEN.equal.default and self.account is None:
            return self.equal
        # Or else torch would remember the values that the host has sent, and the GPU would not have to be asked.
        args, kwargs = tree_map_only(torch.Tensor, self._forget_values, (args, kwargs))
        before, self._is_computing = self._is_computing, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._is_computing = before

    @property
    def avoid_device_init(self) -> bool:
        return True  # also if a test pretends that there is a GPU

    def _forget_values(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.from_tensor(tensor)

    @contextlib.contextmanager
    def step(self) -> Iterator[Account]:
        self.account = Account()
        try:
            with _Watch(self.account, self.pinned):
                yield self.account
        finally:
            self.account = None

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone(memory_format=torch.contiguous_format)
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
        if func.namespace == "aten":  # in inference mode `to` and `item` come whole: what they consist of is checked
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        if func is _ATEN._local_scalar_dense.default and args[0].device.type == "cuda":
            raise HiddenWait("Python asks for a value that the GPU has computed: use transfers.to_host")
        if func in _INDEXING:
            self._check_indices(args[0], [i for i in args[1] if i is not None], args[2:3])
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            source = args[1] if func is _ATEN.copy_.default else args[0]
            non_blocking = (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking")) or False
            self._check_copy(source, result, non_blocking)
        return result

    @staticmethod
    def _check_indices(tensor: torch.Tensor, indices: list[torch.Tensor], values: tuple[torch.Tensor, ...]) -> None:
        if tensor.device.type != "cuda":
            return
        if any(t.device.type == "cpu" for t in (*indices, *values)):
            raise HiddenWait(f"{tuple(tensor.shape)} is indexed with, or set to, a tensor of the host: it is copied up")
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise HiddenWait(f"{tuple(tensor.shape)} is indexed with a mask, whose size the host must know")

    def _check_copy(self, source: torch.Tensor, result: torch.Tensor, non_blocking: bool) -> None:
        destination = result.device.type
        if source.device.type == destination or destination == "meta":
            return
        shape = tuple(source.shape)
        if destination == "cpu":
            raise HiddenWait(f"{shape} is copied to the host: use transfers.to_host")
        # What is not contiguous, or broadcast, CUDA first copies into memory that is not pinned.
        is_ready = id(source) in self.pinned and source.is_contiguous() and source.shape == result.shape
        if not non_blocking or not is_ready:
            raise HiddenWait(f"{shape} is copied to the GPU, and the host waits: use transfers.to_device")
        self.account.up.append(shape)


class OneDevice(TorchDispatchMode):
    """AssertionError where an operator is given tensors of two devices. Copies may have them, and numbers (0-dim)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim() > 0 or t.device.type != "cpu"}
        assert len(devices) < 2 or func in _COPIES, f"{func} is given tensors of {sorted(devices)}"
        return func(*args, **(kwargs or {}))


def is_of_the_host(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator has neither fake tensors nor another device than the CPU."""
    return not any(
        isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type != "cpu")
        for leaf in tree_leaves((args, kwargs))
    )


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu | None = None) -> Iterator[FakeGpu]:
    """`gpu`, or a new one. Skips the test if torch has no CUDA and there is no C++ compiler."""
    ensure_device_guard()
    gpu = FakeGpu() if gpu is None else gpu
    monkeypatch.setattr(transfers, "pinned", gpu.pin)
    monkeypatch.setattr(transfers, "_download", gpu.download)
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", _wait)
    with gpu:
        yield gpu


class _Generator(torch.Generator):
    """A fake tensor draws nothing, so the generator of a CPU will do for a GPU."""

    def __new__(cls, device: object = "cpu") -> "_Generator":
        return super().__new__(cls)


def _wait(*args: Any, **kwargs: Any) -> None:
    raise HiddenWait("the host asks the GPU to be done: use transfers.to_host")


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch.cuda tell of a GPU, so that an engine for "cuda" is built as on a machine that has one.

    The memory is small: a KV cache takes all of it, and the block pool knows each block.
    """
    properties, total_bytes = SimpleNamespace(multi_processor_count=132), 2**24
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "is_bf16_supported": True,
        "mem_get_info": (total_bytes, total_bytes),
        "max_memory_allocated": 2**20,
        "memory_reserved": 2**20,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "set_device": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)  # it would initialise CUDA
    monkeypatch.setattr(torch, "Generator", _Generator)


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
