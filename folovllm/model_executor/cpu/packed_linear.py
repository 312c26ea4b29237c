"""Linear layers whose weights were packed once, after loading, into the layout that the CPU's matmul wants.

Milestone: M1 packs for oneDNN; M4 for a kernel of our own, csrc/linear.cpp. vLLM counterpart: the CPU paths of
vllm/model_executor/layers/utils.py (dispatch_cpu_unquantized_gemm).

`F.linear` gets its weight row by row and oneDNN reorders it on every call; for one token that costs more than the
multiplication. torch has the packing operators, but only under private names, so they stand behind one probe. Either
way a layer has its weight once, packed, and the plain one is dropped; a table that an embedding shares stays as well.
"""

from abc import abstractmethod
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.model_executor.huge_pages import HugeArena
from folovllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod

_BATCH_HINT = 1  # the batch size that oneDNN's layout is chosen for: decode is where packing pays
_BLOCK = 32  # outputs that lie together in our own layout


class PackedLinearMethod(LinearMethodBase):
    """Multiplies with `layer.packed_weight` and adds `layer.packed_bias`."""

    def create_weights(self, layer: LinearBase) -> None:
        raise NotImplementedError("a packed layer is made from a loaded plain one, by pack_linears")

    @abstractmethod
    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [output_size, input_size] and bias [output_size] -> packed_weight, packed_bias."""


class OneDnnLinearMethod(PackedLinearMethod):
    """Packed by and for oneDNN; what lies in the tensor is its own affair."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT), bias

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, layer.packed_weight, layer.packed_bias, "none", [], "")


class CppLinearMethod(PackedLinearMethod):
    """Packed for csrc/linear.cpp: at memory speed for a few tokens, as fast as oneDNN for many, from the same bytes."""

    def __init__(self, ops: Any, arena: HugeArena) -> None:
        self._pack_weight = ops.pack_weight.default
        self._linear = ops.linear_packed.default
        self._arena = arena

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if bias is not None:
            bias = F.pad(bias.float(), (0, -len(bias) % _BLOCK))  # [output_size, rounded up to blocks]
        return self._arena.move(self._pack_weight(weight)), bias  # [blocks, pairs of inputs, 32, 2]

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, layer.packed_weight, layer.packed_bias, layer.output_size)


class CppGatedLinearMethod(PackedLinearMethod):
    """The merged gate and up projection of an MLP, which also does the SiLU-mul behind it: half as much to write."""

    def __init__(self, ops: Any) -> None:
        self._linear = ops.linear_silu_packed.default

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """In place: what CppLinearMethod packed, [gate's blocks, then up's, ...] -> gate 0, up 0, gate 1, ..."""
        assert bias is None
        return weight.copy_(weight.clone().unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)), None

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, input_size] -> silu(gate) * up [num_tokens, output_size / 2]."""
        return self._linear(x, layer.packed_weight, layer.output_size // 2)  # type: ignore[operator]


def gate_linear(layer: LinearBase, ops: Any) -> bool:
    """Let a packed gate and up projection do its activation, too; False if it cannot (a bias, halves of odd sizes)."""
    if type(layer.quant_method) is not CppLinearMethod or layer.packed_bias is not None:
        return False
    if layer.output_size % (2 * _BLOCK):
        return False
    layer.quant_method = CppGatedLinearMethod(ops)
    layer.packed_weight, _ = layer.quant_method.pack(layer.packed_weight, None)
    return True


def pack_linears(model: nn.Module, ops: Any | None = None) -> int:
    """Pack every plain linear layer of `model` that can be; how many were. `ops`: our C++ operators, if there are."""
    shared = {id(m.weight) for m in model.modules() if _keeps_its_weight(m)}
    layers = [m for m in model.modules() if isinstance(m, LinearBase)]
    arena = HugeArena()
    return sum(_pack_layer(layer, ops, arena, shared) for layer in layers if _is_plain(layer))


def _pack_layer(layer: LinearBase, ops: Any | None, arena: HugeArena, shared: set[int]) -> bool:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    method = packed_method(weight, ops, arena)
    if method is None:
        return False
    packed = method.pack(weight.detach(), None if bias is None else bias.detach())
    layer.packed_weight, layer.packed_bias = packed  # type: ignore[assignment]
    layer.quant_method = method
    if id(weight) not in shared:
        layer.register_parameter("weight", None)
    return True


def packed_method(weight: torch.Tensor, ops: Any | None, arena: HugeArena) -> PackedLinearMethod | None:
    """The fastest way to multiply with such a weight; None: as it is. bf16 on a CPU only, fp32 gains nothing."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return None
    if ops is not None and ops.has_bf16_dot() and not _has_amx():
        return CppLinearMethod(ops, arena)
    return OneDnnLinearMethod() if onednn_packing_works() else None


def _has_amx() -> bool:
    """Intel's tile unit multiplies batches several times faster, and oneDNN uses it; our kernel does not."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and probe()


def _is_plain(layer: LinearBase) -> bool:
    return type(layer.quant_method) is UnquantizedLinearMethod and isinstance(layer.weight, torch.Tensor)


def _keeps_its_weight(module: nn.Module) -> bool:
    """An embedding looks rows up in its table, so a head tied to it must leave the table as it is."""
    return not isinstance(module, LinearBase) and isinstance(getattr(module, "weight", None), nn.Parameter)


@lru_cache
def onednn_packing_works() -> bool:
    """Whether torch's private packing operators are there and right for bf16."""
    weight = torch.arange(-64, 64, dtype=torch.float32).view(8, 16).bfloat16()  # [8, 16], exact in bf16
    x = torch.eye(16, dtype=torch.bfloat16)  # picks out the columns
    layer, method = nn.Module(), OneDnnLinearMethod()
    try:
        layer.packed_weight, layer.packed_bias = method.pack(weight, None)  # type: ignore[assignment]
        got = method.apply(layer, x)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(got, F.linear(x, weight))
