"""Layers in the `quant_method` slot: each gives what a plain layer of the dequantised weights gives (milestone M7)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from folovllm.distributed.thread_communicator import ThreadGroup
from folovllm.gptq_config import BITS, GPTQConfig
from folovllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from folovllm.model_executor.layers.quantization.gptq import GPTQLinearMethod, GPTQQuantization
from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear
from folovllm.model_executor.layers.quantization.select import get_kernel
from folovllm.model_executor.layers.vocab_embedding import ParallelLMHead
from folovllm.model_executor.parameter import TensorMismatchError
from folovllm.model_executor.weight_utils import WeightsError
from tests.m7.quant_helpers import random_layer

pytestmark = pytest.mark.m7

INPUT = 96  # with groups of 40 the last one is ragged
LAYERS: dict[str, tuple[Callable[..., LinearBase], dict[Any, int]]] = {
    "column": (lambda **k: ColumnParallelLinear(INPUT, 64, **k), {None: 64}),
    "row": (lambda **k: RowParallelLinear(INPUT, 64, **k), {None: 64}),
    "merged": (lambda **k: MergedColumnParallelLinear(INPUT, [64, 64], **k), {0: 64, 1: 64}),
    "qkv": (lambda **k: QKVParallelLinear(INPUT, 16, 4, 2, **k), {"q": 64, "k": 32, "v": 32}),
}


def loaded(kind: str, config: GPTQConfig, bias: bool = False) -> tuple[LinearBase, list[QuantizedLinear]]:
    """A layer whose parts were quantised apart, each with another g_idx, loaded from their packed tensors."""
    make, sizes = LAYERS[kind]
    layer = make(bias=bias, quant_config=GPTQQuantization(config), prefix="model.layers.0.x")
    assert layer.output_parts() == sizes
    parts = [random_layer(config, INPUT, size, seed) for seed, size in enumerate(sizes.values())]
    # In any order, as files have it.
    for shard_id, part in reversed(list(zip(sizes, parts, strict=True))):
        for name, tensor in part.pack(config).items():
            param = getattr(layer, name)
            param.weight_loader(param, tensor, shard_id)
    if layer.bias is not None:
        layer.bias.data = torch.randn(sum(sizes.values()), generator=torch.Generator().manual_seed(9))
    layer.quant_method.process_weights_after_loading(layer)
    return layer, parts


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size,desc_act", [(32, False), (32, True), (-1, False), (40, True)])
def test_gptq_linear_is_the_linear_of_the_dequantised_weights(
    kind: str, bits: int, group_size: int, desc_act: bool
) -> None:
    config = GPTQConfig(bits, group_size, sym=False, desc_act=desc_act)
    layer, parts = loaded(kind, config, bias=True)
    if desc_act and len(parts) > 1:
        assert not torch.equal(parts[0].g_idx, parts[1].g_idx)
    weight = torch.cat([part.dequantize() for part in parts])
    x = torch.randn(5, INPUT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))


def test_in_bf16_too() -> None:
    """Weights are rounded to the dtype of the inputs, as a dequantised checkpoint would be."""
    layer, parts = loaded("qkv", GPTQConfig(4, 32, desc_act=True))
    weight = torch.cat([part.dequantize() for part in parts]).bfloat16()
    x = torch.randn(5, INPUT, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(layer(x), F.linear(x, weight))


def test_parts_come_back_as_they_were_loaded() -> None:
    config = GPTQConfig(3, 32, sym=False, desc_act=True)
    layer, parts = loaded("qkv", config)
    for got, part in zip(layer.quant_method.kernel.layer_parts(layer), parts, strict=True):
        for name in ("levels", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(got, name), getattr(part, name)), name


def test_packed_weights_are_small() -> None:
    """4 bits in groups of 64, 512 x 512: the four tensors against two bytes for each weight."""
    layer = ColumnParallelLinear(512, 512, quant_config=GPTQQuantization(GPTQConfig(4, 64)), prefix="x")
    assert sum(p.nbytes for p in layer.parameters()) < 0.3 * 2 * 512 * 512


def test_only_a_quantised_head_is_quantised() -> None:
    for lm_head, method in ((False, UnquantizedLinearMethod), (True, GPTQLinearMethod)):
        quantization = GPTQQuantization(GPTQConfig(4, 32, lm_head=lm_head))
        head = ParallelLMHead(64, 32, quant_config=quantization, prefix="lm_head")
        assert type(head.quant_method) is method


def test_column_parallel_ranks_hold_their_outputs() -> None:
    config = GPTQConfig(3, 32, sym=False)
    part = random_layer(config, INPUT, 64)
    for rank in range(2):
        tp = ThreadGroup(2).communicator(rank)
        layer = ColumnParallelLinear(INPUT, 64, quant_config=GPTQQuantization(config), prefix="x", tp=tp)
        for name, tensor in part.pack(config).items():
            param = getattr(layer, name)
            param.weight_loader(param, tensor)
        assert torch.equal(
            layer.quant_method.kernel.layer_parts(layer)[0].dequantize(), part.dequantize()[rank * 32 : rank * 32 + 32]
        )


@pytest.mark.parametrize(
    "name,tensor,message",
    [
        ("qweight", torch.zeros(11, 64, dtype=torch.int32), r"expected shape \[12, 64\]; found \[11, 64\]"),
        ("qweight", torch.zeros(12, 64), "expected integer values; found float32"),
        ("qzeros", torch.zeros(3, 64, dtype=torch.int32), r"expected shape \[3, 8\]; found \[3, 64\]"),
        ("scales", torch.zeros(2, 64), r"expected shape \[3, 64\]; found \[2, 64\]"),
        ("scales", torch.zeros(3, 64, dtype=torch.int32), "expected floating-point values; found int32"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), r"expected shape \[96\]; found \[64\]"),
        ("g_idx", torch.full((96,), 3, dtype=torch.int32), r"expected groups 0 .. 2 in g_idx; found 3 .. 3"),
        ("g_idx", torch.full((96,), -1, dtype=torch.int32), r"groups 0 .. 2 in g_idx; found -1 .. -1"),
    ],
)
def test_misfits_are_refused(name: str, tensor: torch.Tensor, message: str) -> None:
    layer = ColumnParallelLinear(INPUT, 64, quant_config=GPTQQuantization(GPTQConfig(4, 32)), prefix="x")
    param = getattr(layer, name)
    with pytest.raises(TensorMismatchError, match=message):
        param.weight_loader(param, tensor)


def test_sizes_that_fill_no_words_are_refused() -> None:
    """q and k together would: each is packed alone, and 48 outputs of 3 bits end within a word."""
    with pytest.raises(WeightsError, match=r"layers.1.qkv_proj: expected .* multiples of 32.*48 outputs.*to fix it"):
        QKVParallelLinear(
            64, 16, 3, 3, quant_config=GPTQQuantization(GPTQConfig(3, 32)), prefix="model.layers.1.qkv_proj"
        )


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="unknown GPTQ kernel 'marlin'; there are dequant"):
        get_kernel("marlin", GPTQConfig(4))
