"""Linear layers whose weights were packed once, after loading, into the layout that the CPU's matmul wants.

Milestone: M4, for a kernel of our own, csrc/linear.cpp, and for oneDNN. vLLM counterpart: the CPU paths of
vllm/model_executor/layers/utils.py (dispatch_cpu_unquantized_gemm). Left out: fp16.

`F.linear` gets its weight row by row, and oneDNN and MKL reorder it on every call. For one token that costs more than
the multiplication. Our kernel takes over wherever it was built; only a CPU with AMX multiplies bf16 through oneDNN, and
so does a machine without a compiler. torch has oneDNN's packing operators under private names, so they stand behind one
probe. A layer has its weight once, packed, and the plain one is dropped. If an embedding shares the weight, the plain
one stays as well.
"""

from abc import abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.config import KernelConfig
from folovllm.model_executor.cpu.huge_pages import HugeArena
from folovllm.model_executor.cpu.replacement import Replacement
from folovllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod

_BATCH_HINT = 1  # the batch size that oneDNN's layout is chosen for: decode is where packing pays
_BLOCK = 32  # outputs that lie together in our own layout
DTYPES = (torch.float32, torch.bfloat16)  # of csrc/linear.cpp


class PackedLinearMethod(LinearMethodBase):
    """Multiplies with `layer.packed_weight` and adds `layer.packed_bias`."""

    why: str  # what packing this way is good for

    def create_weights(self, layer: LinearBase) -> None:
        raise NotImplementedError("a packed layer is made from a loaded plain one, by pack_linears")

    @abstractmethod
    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight [output_size, input_size] and bias [output_size] -> packed_weight, packed_bias."""


class OneDnnLinearMethod(PackedLinearMethod):
    """Packed by and for oneDNN, in a layout that only oneDNN knows."""

    why = "oneDNN does not reorder the weight in every call"

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT), bias

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, layer.packed_weight, layer.packed_bias, "none", [], "")


class CppLinearMethod(PackedLinearMethod):
    """Packed for csrc/linear.cpp: at memory speed for a few tokens, at the speed of arithmetic for many."""

    why = "packed weights are read at the speed of memory"

    def __init__(self, ops: Any, arena: HugeArena) -> None:
        self._pack_weight = ops.pack_weight.default
        self._linear = ops.linear_packed.default
        self._arena = arena

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if bias is not None:
            bias = F.pad(bias.float(), (0, -len(bias) % _BLOCK))  # [output_size, rounded up to blocks]
        return self._arena.move(self._pack_weight(weight)), bias  # [blocks, steps, 32, inputs of a step]

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, layer.packed_weight, layer.packed_bias, layer.output_size)


class CppGatedLinearMethod(PackedLinearMethod):
    """The merged gate and up projection of an MLP, which also does the SiLU-mul behind it: half as much to write."""

    why = "SiLU-mul happens in the registers of the multiplication"

    def __init__(self, ops: Any) -> None:
        self._linear = ops.linear_silu_packed.default

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reorders in place what CppLinearMethod packed: [gate's blocks, up's] -> [gate 0, up 0, gate 1, ...]."""
        assert bias is None
        return weight.copy_(weight.clone().unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)), None

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, input_size] -> silu(gate) * up [num_tokens, output_size / 2]."""
        return self._linear(x, layer.packed_weight, layer.output_size // 2)  # type: ignore[operator]


def pack_linears(model: nn.Module, ops: Any | None, kernels: KernelConfig, no_ops: str = "") -> Iterator[Replacement]:
    """Packs every plain linear layer of `model` that can be packed.

    `ops` are our C++ operators; without them oneDNN packs, and `no_ops` says why they are missing.
    """
    shared = {id(m.weight) for m in model.modules() if _keeps_its_weight(m)}
    arena = HugeArena(huge_pages=kernels.huge_pages)
    for layer in model.modules():
        if isinstance(layer, LinearBase) and _is_plain(layer):
            yield _pack_layer(layer, packed_method(layer.weight, ops, arena), shared, no_ops)


def _pack_layer(layer: LinearBase, method: PackedLinearMethod | str, shared: set[int], no_ops: str) -> Replacement:
    before, weight, bias = type(layer.quant_method).__name__, layer.weight, layer.bias
    if isinstance(method, str):
        return Replacement("linear_backend", before, None, method)
    assert isinstance(weight, torch.Tensor)
    packed = method.pack(weight.detach(), None if bias is None else bias.detach())
    layer.packed_weight, layer.packed_bias = packed  # type: ignore[assignment]
    layer.quant_method = method
    if id(weight) not in shared:
        layer.register_parameter("weight", None)
    return Replacement("linear_backend", before, type(method).__name__, "; ".join(filter(None, (method.why, no_ops))))


def packed_method(weight: Any, ops: Any | None, arena: HugeArena) -> PackedLinearMethod | str:
    """The fastest way to multiply with such a weight here, or why it stays as it is."""
    if weight.device.type != "cpu":
        return f"packing is for a CPU, and the weight is on {weight.device.type}"
    dtype = str(weight.dtype).removeprefix("torch.")
    if weight.dtype not in DTYPES:
        return f"our kernel multiplies float32 and bfloat16, not {dtype}"
    is_bf16 = weight.dtype is torch.bfloat16
    if ops is not None and not (is_bf16 and _has_amx()):
        return CppLinearMethod(ops, arena)
    if not is_bf16:
        return f"only bfloat16 gains from oneDNN's packing, not {dtype}"
    return OneDnnLinearMethod() if onednn_packing_works() else "this torch has no packing operators of oneDNN"


def gate_linear(layer: LinearBase, ops: Any) -> str | None:
    """Lets a packed gate and up projection do its activation too. Returns why it cannot, or None if it does."""
    if type(layer.quant_method) is not CppLinearMethod:
        return f"{type(layer.quant_method).__name__} has no fused activation"
    if layer.packed_bias is not None:
        return "gate and up have a bias"
    if layer.output_size % (2 * _BLOCK):
        return f"gate and up are no multiples of {_BLOCK} outputs"
    layer.quant_method = CppGatedLinearMethod(ops)
    layer.packed_weight, _ = layer.quant_method.pack(layer.packed_weight, None)
    return None


def _has_amx() -> bool:
    """Intel's tile unit multiplies batches several times faster, and oneDNN uses it; our kernel does not."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and probe()


def _is_plain(layer: LinearBase) -> bool:
    return type(layer.quant_method) is UnquantizedLinearMethod and isinstance(layer.weight, torch.Tensor)


def _keeps_its_weight(module: nn.Module) -> bool:
    """True for an embedding: it looks rows up in its table, so a head that is tied to it must leave the table there."""
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
