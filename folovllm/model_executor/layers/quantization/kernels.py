"""How a GPTQ layer multiplies: what GPTQLinearMethod wants of a kernel, and the reference (the others: select.py).

Milestone: M7. vLLM counterpart: MPLinearKernel and choose_mp_linear_kernel
(vllm/model_executor/layers/quantization/kernels/mixed_precision).

A kernel may replace the loaded tensors by its own packing (`process`); the reference leaves them as they are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization.packing import Packing, packing_for
from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear, unpack_loaded


@dataclass(frozen=True)
class KernelOptions:
    """What a kernel may depend on besides the checkpoint: the model's dtype and device, and engine arguments."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    runtime: str = "auto"  # gptq_runtime; only cpu_int4 has a choice
    huge_pages: bool = False  # for the weights of cpu_int4
    packing: type[Packing] = Packing  # the part quantize.packing
    cpu_isa: str = "native"  # the level of the C++ kernels of cpu_int4


class GPTQKernel(ABC):
    """One object serves all layers of a model; what belongs to a layer is kept on the layer."""

    def __init__(self, config: GPTQConfig, options: KernelOptions) -> None:
        self.config, self.options = config, options
        self.words = packing_for(config, options.packing)

    def plan(self, num_weights: int) -> None:  # noqa: B027 - optional
        """Is told how many weights are coming, before they are loaded."""

    def finish(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Is called when all layers of `model` are processed."""

    def process(self, layer: LinearBase) -> None:  # noqa: B027 - optional
        """Repacks `layer` once its tensors are loaded."""

    @abstractmethod
    def apply(self, layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
        """Returns the outputs [num_tokens, output_size] for x [num_tokens, input_size], bias included."""

    def merged_parts(self, layer: LinearBase) -> list[QuantizedLinear]:
        """Returns the layers of `layer_parts`, or all in one piece if their inputs fall into the same groups."""
        g_idx: Any = layer.g_idx  # [parts, input_size]
        if not torch.equal(g_idx, g_idx[:1].expand_as(g_idx)):
            return self.layer_parts(layer)
        qweight, qzeros, scales = (getattr(layer, name) for name in ("qweight", "qzeros", "scales"))
        return [unpack_loaded(qweight, qzeros, scales, g_idx[0], self.words)]

    def layer_parts(self, layer: LinearBase) -> list[QuantizedLinear]:
        """Returns the checkpoint's layers that `layer` holds, in output order.

        Under act-order each of them has groups of its own.
        """
        parts, start, num_words = [], 0, self.config.num_words
        qweight, qzeros, scales, g_idx = (getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx"))
        for row, size in enumerate(layer.output_parts().values()):
            columns, words = slice(start, start + size), slice(num_words(start), num_words(start + size))
            parts.append(
                unpack_loaded(qweight[:, columns], qzeros[:, words], scales[:, columns], g_idx[row], self.words)
            )
            start += size
        return parts


class DequantKernel(GPTQKernel):
    """The reference: the whole weight is dequantised for every call and dropped again. Exact, small and slow."""

    def apply(self, layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
        weight = torch.cat([part.dequantize() for part in self.layer_parts(layer)])  # [output_size, input_size]
        return F.linear(x, weight.to(x.dtype), layer.bias)
