"""C++ passes in place of norms, activations and rotations, and the MLP whose activation is part of its matmul.

Milestone: M4. vLLM counterpart: CustomOp (vllm/model_executor/custom_op.py), whose layers choose their own kernel.
Left out: fp16.

The layers compute through their `impl`, a plain function on tensors with the same signature as the operator that can
replace it (csrc/fused_ops.cpp).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from folovllm.model_executor.cpu.int4_kernel import gate_int4
from folovllm.model_executor.cpu.packed_linear import gate_linear
from folovllm.model_executor.cpu.replacement import Replacement
from folovllm.model_executor.layers.activation import SiluAndMul
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.rotary_embedding import ApplyRotary
from folovllm.model_executor.models.llama import LlamaMLP

FUSED = {RMSNorm: "rms_norm", SiluAndMul: "silu_and_mul", ApplyRotary: "rotary_"}  # layer -> its operator


def fuse_ops(model: nn.Module, ops: Any) -> Iterator[Replacement]:
    """Puts the operators into the layers' `impl`. A subclass may compute something else, so it stays as it is."""
    for module in model.modules():
        name = FUSED.get(type(module))
        if name is not None:
            module.impl = getattr(ops, name).default  # the overload itself: a microsecond less per call
            yield Replacement("fused_ops", f"{type(module).__name__} in torch", f"csrc {name}", "one pass over memory")
        elif isinstance(module, tuple(FUSED)):
            yield Replacement("fused_ops", type(module).__name__, None, "it is a class of its own")


def fuse_mlps(model: nn.Module, ops: Any) -> Iterator[Replacement]:
    """Moves the activation of packed MLPs into the multiplication before it."""
    for module in model.modules():
        if isinstance(module, LlamaMLP):
            yield _fuse_mlp(module, ops)


def _fuse_mlp(mlp: LlamaMLP, ops: Any) -> Replacement:
    before = f"{type(mlp).__name__}'s gate_up_proj, then act_fn"
    if type(mlp).forward is not LlamaMLP.forward or type(mlp.act_fn) is not SiluAndMul:
        return Replacement("fused_mlp", before, None, "it computes something else than LlamaMLP")
    linear_reason = gate_linear(mlp.gate_up_proj, ops)
    reason = linear_reason and gate_int4(mlp.gate_up_proj, linear_reason)
    if reason is not None:
        return Replacement("fused_mlp", before, None, reason)
    mlp.act_fn = nn.Identity()  # type: ignore[assignment]
    method = type(mlp.gate_up_proj.quant_method).__name__
    return Replacement("fused_mlp", before, f"{method} with SiLU-mul inside", "half as much to write between the two")
