"""Parameters that know how to load themselves.

Milestone: M0. vLLM counterpart: vllm/model_executor/parameter.py and vllm/model_executor/utils.py. Left out: vLLM's
parameter class hierarchy.

A checkpoint holds q_proj, k_proj and v_proj; we hold one qkv_proj. Each layer puts a `weight_loader` on its parameters
that knows where a tensor of the checkpoint belongs, so the model's `load_weights` is one loop without special cases.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# What a plain weight may be stored in. Smaller floats (fp8) need scales, for which a plain layer has no place.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# weight_loader(param, loaded_weight, shard_id): copy a checkpoint tensor into (its part of) param.
WeightLoader = Callable[[nn.Parameter, torch.Tensor, Any], None]


class TensorMismatchError(ValueError):
    """A checkpoint tensor is not what the layer needs; `load_weights` adds the tensor's name."""


class ShapeMismatchError(TensorMismatchError):
    """It has another shape."""

    def __init__(self, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
        super().__init__(f"expected shape {list(expected)}; found {list(found)}")


def new_parameter(*shape: int, weight_loader: WeightLoader, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter, of the default dtype unless told: the checkpoint fills every one of them."""
    param = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    set_weight_loader(param, weight_loader)
    return param


def set_weight_loader(param: nn.Parameter, weight_loader: WeightLoader) -> None:
    param.weight_loader = weight_loader  # type: ignore[attr-defined]


def load_whole(param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
    """The loader of parameters that are neither fused nor sharded."""
    copy_shard(param.data, loaded_weight, dim=0, rank=0, world=1)


def copy_shard(
    target: torch.Tensor, loaded_weight: torch.Tensor, dim: int, rank: int, world: int, total: int | None = None
) -> None:
    """Copy the `rank`-th of `world` equal pieces of `loaded_weight` along `dim` into `target`, converting the dtype.

    E.g. target [3, 8], loaded [6, 8], dim 0, rank 1 of 2 -> rows 3..5. Integers never become floats or the reverse:
    they would be packed weights in the place of plain ones.

    `total` is the size of the whole along `dim` if it does not divide: what is missing at the end becomes 0. E.g.
    target [3, 8], loaded [5, 8], total 5, rank 1 of 2 -> rows 3 and 4, and a row of zeros.
    """
    plain = loaded_weight.dtype in PLAIN_DTYPES
    if target.is_floating_point() != plain or loaded_weight.is_floating_point() != plain:
        kind = "floating-point" if target.is_floating_point() else "integer"
        scaled = ", which needs scales" if loaded_weight.is_floating_point() and not plain else ""
        found = str(loaded_weight.dtype).removeprefix("torch.") + scaled
        raise TensorMismatchError(f"expected {kind} values; found {found}")
    size = target.shape[dim]
    whole = size * world if total is None else total
    expected = tuple(whole if i == dim else n for i, n in enumerate(target.shape))
    if tuple(loaded_weight.shape) != expected:
        raise ShapeMismatchError(expected, tuple(loaded_weight.shape))
    start = min(rank * size, whole)
    present = min(size, whole - start)
    target.narrow(dim, 0, present).copy_(loaded_weight.narrow(dim, start, present))
    if present < size:
        target.narrow(dim, present, size - present).zero_()
