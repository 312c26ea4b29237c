"""`linear_backend="auto"`: the same model, with C++ under its layers where that is faster.

Milestone: M4. vLLM counterpart: CustomOp (vllm/model_executor/custom_op.py), whose layers choose their own kernel.
Left out: fp16. Whole layers: fast_layers.py.

Model files know nothing of this. A linear layer multiplies through its `quant_method`; norms, activations and rotations
compute through their `impl`, a plain function on tensors with the same signature as the operator that can replace it.
"""

from typing import Any

import torch
from torch import nn

from folovllm.csrc.build import load_ops
from folovllm.model_executor.layers.activation import SiluAndMul
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.packed_linear import gate_linear, pack_linears
from folovllm.model_executor.layers.quantization.cpu_int4 import gate_int4
from folovllm.model_executor.layers.rotary_embedding import ApplyRotary
from folovllm.model_executor.models.llama import LlamaMLP

FUSED = {RMSNorm: "rms_norm", SiluAndMul: "silu_and_mul", ApplyRotary: "rotary_"}  # of csrc/fused_ops.cpp
DTYPES = (torch.float32, torch.bfloat16)


def use_fast_ops(model: nn.Module) -> None:
    """Swap in what this machine is fastest with. Without a compiler that is oneDNN's packing alone."""
    weight = next(model.parameters())
    if weight.device.type != "cpu":
        return  # the kernels are the CPU's
    ops = load_ops()
    pack_linears(model, ops)
    if ops is not None and weight.dtype in DTYPES:
        fuse_layers(model, ops)
        fuse_mlps(model, ops)


def fuse_layers(model: nn.Module, ops: Any) -> None:
    """Put the operators into the layers' `impl`."""
    for module in model.modules():
        name = FUSED.get(type(module))
        if name is not None:
            module.impl = getattr(ops, name).default  # the overload itself: a microsecond less per call


def fuse_mlps(model: nn.Module, ops: Any) -> None:
    """Move the activation of packed MLPs into the multiplication before it."""
    for module in model.modules():
        if isinstance(module, LlamaMLP) and (gate_linear(module.gate_up_proj, ops) or gate_int4(module.gate_up_proj)):
            module.act_fn = nn.Identity()  # type: ignore[assignment]
