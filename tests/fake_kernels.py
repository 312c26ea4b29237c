"""Stand-ins for the launches of our Triton kernels: they check what the kernels rely on, and compute nothing.

On a GPU a kernel gets addresses. It cannot know whether a tensor lies on another device, has another dtype or other
strides: it reads something else. So each launch is checked here against what the kernels' comments say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton

from folovllm.attention.backends import triton_paged
from folovllm.model_executor.layers.quantization import triton_gptq

OPTIONS = {"num_warps", "num_stages"}  # of a launch, besides the arguments of the kernel
MOST_PROGRAMS = 2**16 - 1  # along the second and the third axis of a grid
ALIGNMENT = 16  # bytes; Triton compiles a kernel once more for a pointer that is not a multiple of it

INT32 = dict.fromkeys(("table_ptr", "start_ptr", "lens_ptr", "tiles_ptr", "singles_ptr", "words_ptr"), torch.int32)
OTHERS = {"slot_mapping_ptr": torch.int64, "zeros_ptr": torch.uint8} | dict.fromkeys(
    ("part_ptr", "parts_ptr", "lse_ptr"), torch.float32
)
EXPECTED_DTYPES = INT32 | OTHERS
# Pointer -> the axes from which on it must be contiguous. Not named: contiguous as a whole.
CONTIGUOUS_FROM = {"q_ptr": 2, "key_ptr": 1, "value_ptr": 1, "table_ptr": 1, "x_ptr": 1}
# Argument -> the tensor and the axis whose stride it is.
STRIDES = {
    "q_token_stride": ("q_ptr", 0),
    "q_head_stride": ("q_ptr", 1),
    "out_token_stride": ("out_ptr", 0),
    "table_stride": ("table_ptr", 0),
    "slot_stride": ("k_ptr", 1),  # of [num_blocks, block_size, num_kv_heads, head_size]
    "key_stride": ("key_ptr", 0),
    "value_stride": ("value_ptr", 0),
    "x_stride": ("x_ptr", 0),
}


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    dtype: torch.dtype  # of `out` or of `q`


class CheckedKernel(triton.JITFunction):
    """Takes the place of a kernel. It is one to `isinstance`, since what is none counts as interpreted."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel_name, self.parameters, self.launches = kernel.__name__, list(kernel.arg_names), launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.parameters, args, strict=False))
            assert not given.keys() & kwargs.keys()
            given |= {name: value for name, value in kwargs.items() if name not in OPTIONS}
            assert list(given) == self.parameters or set(given) == set(self.parameters), (self.kernel_name, list(given))
            check_launch(self.kernel_name, grid, given)
            dtype = given["q_ptr" if self.kernel_name == "single_kernel" else first_tensor(given)].dtype
            self.launches.append(Launch(self.kernel_name, grid, dtype))

        return launch


def first_tensor(given: dict[str, Any]) -> str:
    return next(name for name in given if name.endswith("_ptr"))


def check_launch(kernel: str, grid: tuple[int, ...], given: dict[str, Any]) -> None:
    assert all(isinstance(n, int) and n > 0 for n in grid) and max(grid[1:], default=1) <= MOST_PROGRAMS, (kernel, grid)
    for name, value in given.items():
        where = f"{kernel}: {name}"
        if name.endswith("_ptr"):
            assert isinstance(value, torch.Tensor) or name == "bias_ptr", where
            if value is not None:
                check_pointer(where, name, value)
        elif name in STRIDES:
            pointer, axis = STRIDES[name]
            assert value == given[pointer].stride(axis), where
        elif name == "scale":
            assert isinstance(value, float), where
        elif name != "DOT_DTYPE":
            assert type(value) is int, (where, value)


def check_pointer(where: str, name: str, tensor: torch.Tensor) -> None:
    assert tensor.device.type == "cuda", f"{where} is on {tensor.device}"
    assert tensor.dtype == EXPECTED_DTYPES.get(name, tensor.dtype), f"{where} is {tensor.dtype}"
    first = CONTIGUOUS_FROM.get(name, 0)
    assert tensor[(0,) * first].is_contiguous() if tensor.numel() else True, f"{where} has strides {tensor.stride()}"
    if tensor.dtype in (torch.int32, torch.int64):
        assert tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0, f"{where} begins at an odd address"


def check_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Replaces every kernel by its stand-in. Returns the list to which each launch is added."""
    launches: list[Launch] = []
    for name in ("chunk_kernel", "single_kernel", "merge_kernel", "write_kernel"):
        monkeypatch.setattr(triton_paged.kernels, name, CheckedKernel(getattr(triton_paged.kernels, name), launches))
    for name in ("gemv_kernel", "tile_kernel", "merge_kernel"):
        monkeypatch.setattr(triton_gptq, name, CheckedKernel(getattr(triton_gptq, name), launches))
    return launches
