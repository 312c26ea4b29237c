"""GPTQ checkpoints in the linear layers' `quant_method` slot.

Milestone: M7, M9 (several ranks). vLLM counterpart: vllm/model_executor/layers/quantization/gptq.py (GPTQConfig and
GPTQLinearMethod). Left out: quantised embeddings.

Ranks that share the inputs of a layer (row-parallel) may cut through a group, and under act-order every rank may have
inputs of every group. So such a rank loads the scales and zeros of all groups, keeps those that its inputs use, and
numbers them anew. E.g. g_idx [0, 0, 0, 1, 1, 1, 2, 2] on 2 ranks, with groups of 3 inputs:

    rank 0: g_idx [0, 0, 0, 1], groups 0 and 1      rank 1: g_idx [0, 0, 1, 1], groups 1 and 2
"""

from fractions import Fraction
from typing import Any

import torch
from torch import nn

from folovllm.gptq_config import WORD_BITS, GPTQConfig
from folovllm.model_executor.layers.linear import LinearBase, LinearMethodBase, RowParallelLinear
from folovllm.model_executor.layers.quantization.kernels import GPTQKernel, KernelOptions
from folovllm.model_executor.layers.quantization.quantized_linear import check_g_idx, groups_in_order, tensor_layout
from folovllm.model_executor.layers.quantization.select import get_kernel
from folovllm.model_executor.parameter import TensorMismatchError, copy_shard, load_whole, new_parameter
from folovllm.model_executor.weight_utils import WeightsError


class GPTQQuantization:
    """The `quant_config` of a GPTQ model: all linear layers, and the head if the checkpoint quantised that too."""

    def __init__(self, config: GPTQConfig, kernel: str = "dequant", options: KernelOptions | None = None) -> None:
        self.config = config
        self.kernel = get_kernel(kernel, config, options)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if prefix == "lm_head" and not self.config.lm_head:
            return None
        return GPTQLinearMethod(self.config, self.kernel, prefix)

    def plan(self, model: nn.Module, num_ranks: int = 1) -> None:
        """Tell the kernel how many weights are coming. Call it before `model` is loaded.

        `num_ranks` ranks share this machine's memory, and each loads about as many.
        """
        layers = quantized_layers(model)
        self.kernel.plan(num_ranks * sum(layer.input_size * layer.output_size for layer in layers))

    def randomise(self, model: nn.Module, generator: torch.Generator) -> None:
        """Gives every quantised layer random weights instead of those of a checkpoint (load_format="dummy")."""
        for layer in quantized_layers(model):
            layer.quant_method.randomise(layer, generator)  # type: ignore[attr-defined]

    def finish(self, model: nn.Module) -> None:
        """Let the kernel finish its packing. Call it after the layers of `model` were processed."""
        self.kernel.finish(model)


def quantized_layers(model: nn.Module) -> list[LinearBase]:
    layers = (module for module in model.modules() if isinstance(module, LinearBase))
    return [layer for layer in layers if isinstance(layer.quant_method, GPTQLinearMethod)]


class GPTQLinearMethod(LinearMethodBase):
    """Holds the four tensors of the checkpoint; a kernel multiplies with them."""

    def __init__(self, config: GPTQConfig, kernel: GPTQKernel, prefix: str) -> None:
        self.config, self.kernel, self.prefix = config, kernel, prefix

    def create_weights(self, layer: LinearBase) -> None:
        parts = layer.output_parts()
        shapes = self._shapes(layer, list(parts.values()))
        # The layers' loaders place a tensor by `output_dim` and `packed_factor`: outputs lie along axis 1, and in
        # qzeros one 32-bit word holds several of them.
        for name, dtype, packed in (
            ("qweight", torch.int32, 1),
            ("qzeros", torch.int32, Fraction(WORD_BITS, self.config.bits)),
            ("scales", torch.float32, 1),  # holds fp16 and bf16 alike, exactly
        ):
            loader = load_whole if name != "qweight" and shares_inputs(layer) else layer.weight_loader
            param = new_parameter(*shapes[name], weight_loader=loader, dtype=dtype)
            param.output_dim, param.packed_factor = 1, packed  # type: ignore[attr-defined]
            setattr(layer, name, param)
        # q, k and v were quantised separately, so under act-order each has its own groups of inputs.
        loader = _g_idx_loader(layer, shapes["scales"][0])
        g_idx = new_parameter(len(parts), layer.input_size, weight_loader=loader, dtype=torch.int32)
        layer.g_idx = g_idx  # [parts, input_size]

    def _shapes(self, layer: LinearBase, output_sizes: list[int]) -> dict[str, tuple[int, ...]]:
        """With the groups of all ranks that share the inputs of `layer`."""
        input_size, num_groups = layer.input_size, self.config.num_groups(whole_input_size(layer))
        try:
            for size in output_sizes:  # each part is packed separately
                tensor_layout(self.config, input_size, size)
        except TensorMismatchError as error:
            raise WeightsError(f"{self.prefix}: {error}; to fix it: correct bits in quantization_config") from None
        layout = tensor_layout(self.config, input_size, sum(output_sizes))
        shapes = {name: shape for name, (shape, _) in layout.items()}
        return shapes | {name: (num_groups, *shapes[name][1:]) for name in ("qzeros", "scales")}

    def randomise(self, layer: LinearBase, generator: torch.Generator) -> None:
        """Random levels around a zero in their middle. As for plain random weights, activations keep their size."""
        params: Any = layer
        params.qweight.data.random_(-(2**31), 2**31, generator=generator)
        zeros = torch.full(
            params.scales.shape, 2 ** (self.config.bits - 1), dtype=torch.int32, device=params.scales.device
        )
        params.qzeros.data.copy_(self.kernel.words.pack_zeros(zeros))
        deviation = ((4**self.config.bits - 1) / 12) ** 0.5  # of levels that are drawn evenly
        params.scales.data.fill_(layer.input_size**-0.5 / deviation)
        params.g_idx.data.copy_(groups_in_order(layer.input_size, self.config))

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        if shares_inputs(layer):
            keep_own_groups(layer)
        self.kernel.process(layer)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply(layer, x)  # type: ignore[arg-type]


def shares_inputs(layer: LinearBase) -> bool:
    """Whether other ranks have other inputs of `layer`."""
    return isinstance(layer, RowParallelLinear) and layer.tp.size > 1


def whole_input_size(layer: LinearBase) -> int:
    """The inputs of all ranks."""
    return layer.input_size * layer.tp.size if shares_inputs(layer) else layer.input_size


def keep_own_groups(layer: LinearBase) -> None:
    """Drops the groups that no input of this rank belongs to, and numbers the others anew, in their old order."""
    params: Any = layer
    used, g_idx = params.g_idx.data.unique(return_inverse=True)  # [groups that are used], [1, input_size]
    params.g_idx.data.copy_(g_idx)
    for param in (params.qzeros, params.scales):
        param.data = param.data[used.long()]


def _g_idx_loader(layer: LinearBase, num_groups: int) -> Any:
    rows = {shard_id: row for row, shard_id in enumerate(layer.output_parts())}
    rank, world = (layer.tp.rank, layer.tp.size) if shares_inputs(layer) else (0, 1)

    def load(param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        copy_shard(param.data[rows[shard_id]], loaded_weight, dim=0, rank=rank, world=world)
        check_g_idx(loaded_weight, num_groups)

    return load
