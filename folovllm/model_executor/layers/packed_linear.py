"""Linear layers whose weights were packed once, after loading, into the layout that the CPU's matmul wants.

Milestone: M1 (`linear_backend="auto"`; M4 adds kernels of our own). vLLM counterpart: the oneDNN path of
vllm/model_executor/layers/utils.py (dispatch_cpu_unquantized_gemm).

`F.linear` gets its weight row by row and oneDNN reorders it on every call; for one token that costs more than the
multiplication. torch has the packing operators, but only under private names, so they stand behind one probe.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod

_BATCH_HINT = 1  # the batch size that the packed layout is chosen for: decode is where packing pays


class PackedLinearMethod(LinearMethodBase):
    """Multiplies with `layer.packed_weight`; the plain weight is gone unless an embedding shares it."""

    def create_weights(self, layer: LinearBase) -> None:
        raise NotImplementedError("a packed layer is made from a loaded plain one, by pack_linears")

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, layer.packed_weight, layer.bias, "none", [], "")


def pack_linears(model: nn.Module) -> int:
    """Pack every plain linear layer of `model` that can be; how many were."""
    layers = [m for m in model.modules() if isinstance(m, LinearBase) and _is_packable(m)]
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Module) and _keeps_its_weight(m)}
    for layer in layers:
        assert isinstance(layer.weight, torch.Tensor)
        layer.packed_weight = _pack(layer.weight.detach())
        layer.quant_method = PackedLinearMethod()
        if id(layer.weight) not in shared:
            layer.register_parameter("weight", None)
    return len(layers)


def _is_packable(layer: LinearBase) -> bool:
    plain = type(layer.quant_method) is UnquantizedLinearMethod
    return plain and isinstance(layer.weight, torch.Tensor) and packing_works(layer.weight.dtype, layer.weight.device)


def _keeps_its_weight(module: nn.Module) -> bool:
    """An embedding looks rows up in its table, so a head tied to it must leave the table as it is."""
    return not isinstance(module, LinearBase) and isinstance(getattr(module, "weight", None), nn.Parameter)


@lru_cache
def packing_works(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's private packing operators are there and right. bf16 on a CPU only: fp32 gains nothing."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return False
    weight = torch.arange(-64, 64, dtype=torch.float32).view(8, 16).to(dtype)  # [8, 16], exact in bf16
    x = torch.eye(16, dtype=dtype)  # picks out the columns
    try:
        got = torch.ops.mkldnn._linear_pointwise(x, _pack(weight), None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(got, F.linear(x, weight))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [output_size, input_size] -> an opaque oneDNN tensor."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
