"""Packing: the bits lie where AutoGPTQ puts them, and come back (milestone M7)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.gptq_config import BITS, GPTQConfig
from folovllm.model_executor.layers.quantization.packing import (
    Packing,
    ThreeBitPacking,
    packing_for,
)
from folovllm.model_executor.layers.quantization.quantized_linear import unpack_linear
from tests.m7.quant_helpers import pack_by_hand, random_layer

pytestmark = pytest.mark.m7


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """bits, and a matrix of levels whose rows fill whole words."""
    bits = draw(st.sampled_from(BITS))
    unit = GPTQConfig(bits).pack_unit
    rows, columns = unit * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    flat = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns))
    return bits, torch.tensor(flat).view(rows, columns)


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_round_trip_and_the_bits_themselves(case: tuple[int, torch.Tensor]) -> None:
    bits, levels = case
    packing = packing_for(GPTQConfig(bits, checkpoint_format="gptq_v2"))
    packed = packing.pack_rows(levels)
    assert packed.dtype == torch.int32 and packed.shape[0] * 32 == levels.shape[0] * bits
    assert torch.equal(packing.unpack_rows(packed).long(), levels)
    for column in range(levels.shape[1]):
        assert packed[:, column].tolist() == pack_by_hand(levels[:, column].tolist(), bits)
    assert torch.equal(packing.pack_zeros(levels.t()), packed.t())
    assert torch.equal(packing.unpack_zeros(packed.t().contiguous()).long(), levels.t())


def test_nibbles_lowest_first() -> None:
    assert Packing(4).pack_rows(torch.arange(8)[:, None]).item() == 0x76543210
    assert Packing(4).pack_rows(torch.full((8, 1), 15)).item() == -1


def test_three_bits_lie_across_words() -> None:
    """Value 10 has two bits in word 0 and one in word 1; value 21 one in word 1 and two in word 2 (AutoGPTQ)."""
    for value, words in ((10, [0b11 << 30, 0b1, 0]), (21, [0, 0b1 << 31, 0b11])):
        levels = torch.zeros(32, 1, dtype=torch.int64)
        levels[value] = 7
        assert [word % 2**32 for word in ThreeBitPacking(3).pack_rows(levels).flatten().tolist()] == words


def test_a_checkpoint_gets_the_packing_of_its_width() -> None:
    class Mine(Packing):
        pass

    found = {bits: type(packing_for(GPTQConfig(bits), Mine)) for bits in BITS}
    assert found == {2: Mine, 3: ThreeBitPacking, 4: Mine, 8: Mine}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size,desc_act", [(32, False), (32, True), (-1, False), (40, False)])
def test_a_layer_survives_its_four_tensors(bits: int, checkpoint_format: str, group_size: int, desc_act: bool) -> None:
    """96 inputs in groups of 40: the last group is ragged, 16 long."""
    config = GPTQConfig(bits, group_size, sym=False, desc_act=desc_act, checkpoint_format=checkpoint_format)
    layer = random_layer(config, input_size=96, output_size=64)
    tensors = layer.pack(config)
    assert {name: t.dtype for name, t in tensors.items()} == {
        "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32,
    }  # fmt: skip
    back = unpack_linear(tensors, config)
    for name in ("levels", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(back, name), getattr(layer, name)), name


def test_v1_stores_zeros_minus_one() -> None:
    """Symmetric 4 bits: zero 8, so v1 files are full of sevens and v2 files of eights."""
    for checkpoint_format, word in (("gptq", 0x77777777), ("gptq_v2", 0x88888888 - 2**32)):
        config = GPTQConfig(4, 32, checkpoint_format=checkpoint_format)
        layer = random_layer(config, 32, 8)
        layer.zeros.fill_(8)
        assert layer.pack(config)["qzeros"].tolist() == [[word]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zeros_of_zero_in_v1(bits: int) -> None:
    """GPTQModel takes one from each zero by subtracting whole words: 0 borrows from its neighbour, and we give back."""
    v1, v2 = (GPTQConfig(bits, 32, sym=False, checkpoint_format=form) for form in ("gptq", "gptq_v2"))
    layer = random_layer(v2, 64, 64)
    layer.zeros[:, ::3] = 0
    tensors = layer.pack(v2)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    tensors["qzeros"] = ((tensors["qzeros"].long() - ones + 2**31) % 2**32 - 2**31).int()
    assert torch.equal(unpack_linear(tensors, v1).zeros, layer.zeros)


def test_zeros_of_zero_in_three_bits_of_v1() -> None:
    """Value by value there: -1 is 7."""
    config = GPTQConfig(3, 32, sym=False)
    layer = random_layer(config, 32, 32)
    tensors = layer.pack(config)
    layer.zeros[:, ::3] = 0
    tensors["qzeros"] = ThreeBitPacking(3).pack_zeros((layer.zeros - 1) % 8)
    assert torch.equal(unpack_linear(tensors, config).zeros, layer.zeros)


def test_dequantize_is_the_formula() -> None:
    config = GPTQConfig(4, 32, sym=False, desc_act=True)
    layer = random_layer(config, 64, 8)
    weight = layer.dequantize()
    for o, i in ((0, 0), (3, 17), (7, 63)):
        group = int(layer.g_idx[i])
        expected = layer.scales[group, o] * (int(layer.levels[o, i]) - int(layer.zeros[group, o]))
        assert weight[o, i] == expected
