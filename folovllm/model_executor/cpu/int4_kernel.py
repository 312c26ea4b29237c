"""The GPTQ kernel `cpu_int4`: weights stay at 4 bits and are unpacked in registers (csrc/int4_kernel.h).

Milestone: M7. vLLM counterpart: IPEXGPTQLinearMethod in vllm/model_executor/layers/quantization/ipex_quant.py, which
runs the kernels of Intel's extension for PyTorch. Left out: 8 bits and fp16, which run on `dequant`; taking act-order's
order into the layer before.

gptq_runtime "memory" keeps 4 bits alone. "speed" also keeps the weights as packed bf16, for batches so large that
unpacking costs more than reading; how large is measured (int4_crossover.py).
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.csrc.build import compiled_for, load_ops
from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.cpu.huge_pages import HugeArena
from folovllm.model_executor.cpu.int4_crossover import ALL_ROWS, find_crossover
from folovllm.model_executor.cpu.int4_weight import (
    BLOCK,
    MAX_BITS,
    Int4Part,
    Int4Weight,
    interleave_halves,
    pack_int4,
)
from folovllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from folovllm.model_executor.layers.quantization.kernels import GPTQKernel, KernelOptions
from folovllm.model_executor.layers.quantization.quantized_linear import LEAVES, QuantizedLinear
from folovllm.utils import available_memory_bytes

DTYPES = (torch.float32, torch.bfloat16)
# Of the free memory, for the bf16 copies of gptq_runtime="auto": the KV cache and other programs want some as well.
MEMORY_SHARE = 0.25


class Int4LinearMethod(LinearMethodBase):
    """Multiplies with `layer.int4_parts`."""

    def __init__(self, kernel: "CpuInt4Kernel", gated: bool = False) -> None:
        self.kernel, self.gated = kernel, gated

    def create_weights(self, layer: LinearBase) -> None:
        raise NotImplementedError("an int4 layer is made from a loaded GPTQ layer, by CpuInt4Kernel")

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, input_size] -> [num_tokens, output_size]; gated: silu(gate) * up, half as wide."""
        kernel, parts = self.kernel, int4_parts(layer)
        outputs = [part.multiply(kernel.ops, x, self.gated, kernel.max_int4_rows) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class CpuInt4Kernel(GPTQKernel):
    """`max_int4_rows`: batches up to this many tokens are multiplied with 4 bits where bf16 is there, too."""

    def __init__(self, config: GPTQConfig, options: KernelOptions) -> None:
        super().__init__(config, options)
        reason = int4_refusal(config, options)
        if reason is not None:
            raise ValueError(f"cpu_int4 {reason}; use gptq_kernel='auto' or 'dequant'")
        ops: Any = load_ops(options.cpu_isa)
        self.ops = ops
        self.max_int4_rows = ALL_ROWS
        self._arena = HugeArena(huge_pages=options.huge_pages)
        self._method = Int4LinearMethod(self)
        # bf16 copies help where large batches are multiplied faster with them: never in fp32, and only if the CPU has
        # dot products of bf16. Without them bf16 is multiplied as fp32, and 4 bits are faster for a batch of any size.
        helps = options.dtype is torch.bfloat16 and "avx512_bf16" in compiled_for(ops)
        self.keeps_bf16 = helps and options.runtime != "memory"

    def plan(self, num_weights: int) -> None:
        if not self.keeps_bf16:
            return
        needed, free = 2 * num_weights, available_memory_bytes()
        if self.options.runtime == "auto":
            self.keeps_bf16 = needed <= MEMORY_SHARE * free
        elif needed + num_weights // 2 > free:
            raise ValueError(
                f"gptq_runtime='speed' keeps bf16 copies of all weights, {needed / 2**30:.1f} GiB beside the 4 bits, "
                f"and {free / 2**30:.1f} GiB are free: use gptq_runtime='memory'"
            )

    def process(self, layer: LinearBase) -> None:
        bias = None if layer.bias is None else layer.bias.detach().float()
        parts, start = [], 0
        for linear in self.merged_parts(layer):
            size = linear.levels.shape[0]
            parts.append(self._store(linear, None if bias is None else bias[start : start + size]))
            start += size
        layer.int4_parts = parts  # type: ignore[assignment]
        layer.quant_method = self._method
        for name in LEAVES:
            layer.register_parameter(name, None)

    def _store(self, linear: QuantizedLinear, bias: torch.Tensor | None) -> Int4Part:
        weight = pack_int4(linear, self.config.bits, self.ops)
        levels, scales, zeros = (self._arena.move(tensor) for tensor in weight.tensors[:3])
        packed = torch.empty(0)
        if self.keeps_bf16:
            packed = self._arena.move(self.ops.int4_to_bf16(*weight.tensors, linear.g_idx.numel()))
        padded = torch.empty(0) if bias is None else F.pad(bias, (0, -len(bias) % BLOCK))
        size = weight.output_size
        return Int4Part(Int4Weight(levels, scales, zeros, weight.perm, size), padded, packed, size)

    def finish(self, model: nn.Module) -> None:
        if not self.keeps_bf16:
            return
        layers: list[Any] = [m for m in model.modules() if getattr(m, "quant_method", None) is self._method]
        self.max_int4_rows = find_crossover(
            self.ops, [(part, layer.input_size) for layer in layers for part in layer.int4_parts]
        )

    def apply(self, layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("process() gave the layer a method of its own")


def int4_refusal(config: GPTQConfig, options: KernelOptions) -> str | None:
    """Why cpu_int4 cannot run this, or None."""
    if config.bits > MAX_BITS:
        return f"holds up to {MAX_BITS} bits, not {config.bits}"
    if options.dtype not in DTYPES:
        return f"computes in float32 and bfloat16, not {str(options.dtype).removeprefix('torch.')}"
    if options.device != "cpu":
        return f"runs on a CPU, not on {options.device}"
    if load_ops(options.cpu_isa) is not None:
        return None
    return "needs the C++ kernels, which were not built (see the warning)"


def int4_parts(layer: nn.Module) -> list[Int4Part]:
    """The multiplications of an int4 layer. The list is empty if `layer` is no int4 layer."""
    return getattr(layer, "int4_parts", [])


def single_int4_part(layer: LinearBase) -> Int4Part | None:
    """The multiplication of an int4 layer. Returns None if it is no int4 layer, or needs several."""
    parts = int4_parts(layer)
    return parts[0] if len(parts) == 1 else None


def gate_int4(layer: LinearBase, otherwise: str = "it is no int4 layer") -> str | None:
    """Lets an int4 gate and up projection do its activation too. Returns why it cannot, or None if it does.

    `otherwise` is the answer for a layer that is not in 4 bits (see gate_linear).
    """
    method, part = layer.quant_method, single_int4_part(layer)
    if type(method) is not Int4LinearMethod:
        return otherwise
    if part is None:
        return "gate and up have inputs in orders of their own"
    if layer.bias is not None:
        return "gate and up have a bias"
    if layer.output_size % (2 * BLOCK):
        return f"gate and up are no multiples of {BLOCK} outputs"
    for blocks in (part.weight.levels, part.weight.scales, part.weight.zeros, part.packed):
        if blocks.numel():
            interleave_halves(blocks)
    layer.int4_parts = [dataclasses.replace(part, output_size=layer.output_size // 2)]  # type: ignore[assignment]
    layer.quant_method = Int4LinearMethod(method.kernel, gated=True)
    return None
