"""QuantizedLinear: one linear layer in levels, scales and zeros, and its four tensors in an AutoGPTQ checkpoint.

Milestone: M7. vLLM counterpart: none; vLLM's kernels read the packed tensors directly.

    qweight  int32  [words of input_size, output_size]   levels, packed along the inputs
    qzeros   int32  [num_groups, words of output_size]   zeros (minus one in v1), packed along the outputs
    scales   fp16   [num_groups, output_size]
    g_idx    int32  [input_size]                          the group of each input
                                                      weight[o, i] = scales[g, o] * (level[o, i] - zeros[g, o])
                                                                     with g = g_idx[i]
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from folovllm.gptq_config import WORD_BITS, GPTQConfig
from folovllm.model_executor.layers.quantization.packing import Packing, packing_for
from folovllm.model_executor.parameter import PLAIN_DTYPES, ShapeMismatchError, TensorMismatchError
from folovllm.model_executor.weight_utils import WeightsError, refuse

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
_BOTH_AGAIN = "the weights and quantization_config belong to different models: download both again"


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer, unpacked: its tensors can be read and computed with."""

    levels: torch.Tensor  # [output_size, input_size] uint8
    scales: torch.Tensor  # [num_groups, output_size] fp32, values that fp16 can hold
    zeros: torch.Tensor  # [num_groups, output_size] int32
    g_idx: torch.Tensor  # [input_size] int32

    def dequantize(self) -> torch.Tensor:
        """Returns the weight that it stands for, [output_size, input_size] fp32."""
        group = self.g_idx.long()
        weight = self.levels.t().float()  # [input_size, output_size], as tables by group lie, too
        weight -= self.zeros.float()[group]
        weight *= self.scales[group]
        return weight.t()

    def outputs(self, start: int, size: int) -> "QuantizedLinear":
        """Returns the layer of the outputs start .. start + size alone, e.g. k of a fused qkv."""
        columns = slice(start, start + size)
        return QuantizedLinear(self.levels[columns], self.scales[:, columns], self.zeros[:, columns], self.g_idx)

    def pack(self, config: GPTQConfig, packing: type[Packing] = Packing) -> dict[str, torch.Tensor]:
        """Returns the four tensors of this layer in a checkpoint."""
        stored_zeros = self.zeros - config.zero_offset
        assert int(stored_zeros.min()) >= 0 and int(stored_zeros.max()) <= config.max_level
        words = packing_for(config, packing)
        return {
            "qweight": words.pack_rows(self.levels.t()),
            "qzeros": words.pack_zeros(self.zeros),
            "scales": self.scales.to(torch.float16).contiguous(),
            "g_idx": self.g_idx.to(torch.int32).clone(),  # parts share it, and safetensors writes no tensor twice
        }


def unpack_linear(
    tensors: Mapping[str, torch.Tensor], config: GPTQConfig, packing: type[Packing] = Packing
) -> QuantizedLinear:
    """Returns the layer that four tensors of a checkpoint describe.

    Raises TensorMismatchError if they do not fit each other.
    """
    output_size, input_size = tensors["scales"].shape[-1], tensors["g_idx"].numel()
    for leaf, (shape, floating) in tensor_layout(config, input_size, output_size).items():
        check_tensor(leaf, tensors[leaf], shape, floating)
    check_g_idx(tensors["g_idx"], config.num_groups(input_size))
    words = packing_for(config, packing)
    return unpack_loaded(tensors["qweight"], tensors["qzeros"], tensors["scales"], tensors["g_idx"], words)


def unpack_loaded(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, words: Packing
) -> QuantizedLinear:
    """Returns what `unpack_linear` returns, from tensors that were checked when they were loaded."""
    levels = words.unpack_rows(qweight).t()  # [output_size, input_size]
    return QuantizedLinear(levels, scales.float(), words.unpack_zeros(qzeros), g_idx)


def tensor_layout(config: GPTQConfig, input_size: int, output_size: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Returns each tensor's shape, and whether it is floating-point.

    Raises TensorMismatchError for sizes that do not fill whole words.
    """
    unit = config.pack_unit
    if input_size % unit or output_size % unit:
        expected = f"inputs and outputs in multiples of {unit}, as {config.bits} bits are packed"
        raise TensorMismatchError(f"expected {expected}; found {input_size} inputs and {output_size} outputs")
    groups = config.num_groups(input_size)
    return {
        "qweight": ((config.num_words(input_size), output_size), False),
        "qzeros": ((groups, config.num_words(output_size)), False),
        "scales": ((groups, output_size), True),
        "g_idx": ((input_size,), False),
    }


def check_tensor(leaf: str, tensor: torch.Tensor, shape: tuple[int, ...], floating: bool) -> None:
    if tuple(tensor.shape) != shape:
        raise TensorMismatchError(f"{leaf}: {ShapeMismatchError(shape, tuple(tensor.shape))}")
    integer = torch.int32 if leaf.startswith("q") else tensor.dtype
    if tensor.dtype not in PLAIN_DTYPES if floating else tensor.is_floating_point() or tensor.dtype != integer:
        expected = "floating-point values" if floating else "int32 values"
        raise TensorMismatchError(f"{leaf}: expected {expected}; found {str(tensor.dtype).removeprefix('torch.')}")


def check_g_idx(g_idx: torch.Tensor, num_groups: int) -> None:
    """Raises TensorMismatchError unless every group exists and has an input. All zeros, say, are an unwritten g_idx."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= num_groups:
        raise TensorMismatchError(f"expected groups 0 .. {num_groups - 1} in g_idx; found {low} .. {high}")
    empty = int((torch.bincount(g_idx.flatten().long(), minlength=num_groups) == 0).sum())
    if empty:
        raise TensorMismatchError(
            f"expected inputs in each of the {num_groups} groups of g_idx; found {empty} groups without any: "
            "if the checkpoint was quantised without act-order, quantization_config needs 'desc_act': false"
        )


def settle_g_idx(weights: Iterable[tuple[str, torch.Tensor]], config: GPTQConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the same weights with a g_idx for every quantised layer.

    Without act-order the group of input i is i // group_size, whatever tool wrote the checkpoint: some leave g_idx out
    and some leave it zero. Raises WeightsError if it says something else, for then either g_idx or `desc_act` is wrong.
    """
    if config.desc_act:
        yield from weights
        return
    inputs: dict[str, int] = {}
    stored: dict[str, int] = {}
    for name, tensor in weights:
        layer, _, leaf = name.rpartition(".")
        if leaf == "g_idx":
            stored[layer] = tensor.numel()
            if tensor.any() and not torch.equal(tensor.flatten().long(), groups_in_order(tensor.numel(), config)):
                expected = f"g_idx of {layer} to be i // group_size, as desc_act is false"
                todo = "set 'desc_act': true in quantization_config if the checkpoint was quantised with act-order"
                refuse(expected, "inputs in another order", todo)
            continue
        yield name, tensor
        if leaf == "qweight":
            inputs[layer] = tensor.shape[0] * WORD_BITS // config.bits
            yield f"{layer}.g_idx", groups_in_order(inputs[layer], config).int()
    for layer, count in stored.items():
        if inputs.get(layer) != count:
            found = f"{inputs[layer]} in qweight" if layer in inputs else "no qweight"
            refuse(f"the {count} inputs that g_idx of {layer} has", found, _BOTH_AGAIN)


def groups_in_order(num_inputs: int, config: GPTQConfig) -> torch.Tensor:
    """Returns the group of each input [num_inputs] int64. E.g. 6 inputs in groups of 4 -> [0, 0, 0, 0, 1, 1]."""
    return torch.arange(num_inputs) // max(config.group_length(num_inputs), 1)


def dequantize_weights(
    weights: Iterable[tuple[str, torch.Tensor]], config: GPTQConfig, packing: type[Packing] = Packing
) -> Iterator[tuple[str, torch.Tensor]]:
    """Reads a GPTQ checkpoint as a plain one: each layer's four tensors become its "weight", in fp32.

    The tensors of a layer may lie in different files, so incomplete layers wait for the rest. Raises WeightsError if a
    layer is still incomplete at the end.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in settle_g_idx(weights, config):
        layer, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            yield name, tensor
            continue
        parts = waiting.setdefault(layer, {})
        parts[leaf] = tensor
        if len(parts) == len(LEAVES):
            yield f"{layer}.weight", _dequantize_one(layer, waiting.pop(layer), config, packing)
    for layer, parts in waiting.items():
        missing = ", ".join(leaf for leaf in LEAVES if leaf not in parts)
        refuse(f"{', '.join(LEAVES)} of {layer}", f"no {missing}", "write the checkpoint again with GPTQModel")


def _dequantize_one(
    layer: str, tensors: Mapping[str, torch.Tensor], config: GPTQConfig, packing: type[Packing]
) -> torch.Tensor:
    try:
        return unpack_linear(tensors, config, packing).dequantize()
    except TensorMismatchError as error:
        raise WeightsError(f"layer {layer!r}: {error}; to fix it: {_BOTH_AGAIN}") from None
