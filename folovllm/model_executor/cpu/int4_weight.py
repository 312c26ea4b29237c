"""Int4Weight: the weights of a linear layer in the order of csrc/int4_layout.h, 4 bits each.

Milestone: M7. vLLM counterpart: the repacking in
vllm/model_executor/layers/quantization/kernels/mixed_precision/marlin.py (gptq_marlin_repack). Left out: 8 bits.

Two bits and three fit into four as well: their levels are moved so that the middle one is 8 whatever the width. Inputs
are sorted by their group here, once; what a call does about act-order is to fetch its inputs in that order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear
from folovllm.utils import cdiv, round_up

MAX_BITS = 4
MAX_GROUP = 128  # inputs
BLOCK = 32  # outputs that lie together
_CHUNK = 4  # inputs that lie together
_MIDDLE = 8  # the level that stands for 0 where zeros are symmetric


@dataclass(frozen=True)
class Int4Weight:
    """An empty tensor stands for none."""

    levels: torch.Tensor  # [blocks, groups, chunks, 64] uint8
    scales: torch.Tensor  # [blocks, groups, 32] fp32
    zeros: torch.Tensor  # [blocks, groups, 32] int8, less 8; empty: all 0
    perm: torch.Tensor  # [groups * chunks * 4] int32: the input of each place, -1 for none; empty: as they come
    output_size: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.levels, self.scales, self.zeros, self.perm]


@dataclass(frozen=True)
class Int4Part:
    """One multiplication of an int4 layer: its 4 bits, and what goes with them. An empty tensor stands for none."""

    weight: Int4Weight
    bias: torch.Tensor  # [32 * blocks] fp32
    packed: torch.Tensor  # the same weights as packed bf16 [blocks, pairs of inputs, 32, 2]
    output_size: int  # of the multiplication: half the weight's if SiLU-mul is part of it

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that csrc/decoder_stack.cpp has for them."""
        weight = self.weight
        bits = {"levels": weight.levels, "scales": weight.scales, "zeros": weight.zeros, "perm": weight.perm}
        return bits | {"bias": self.bias, "packed": self.packed}

    def multiply(self, ops: Any, x: torch.Tensor, gated: bool, max_int4_rows: int) -> torch.Tensor:
        """x [num_tokens, input_size] -> [num_tokens, output_size]; with 4 bits if x has up to `max_int4_rows` rows."""
        w, size = self.weight, self.output_size
        out: torch.Tensor = ops.linear_mixed.default(
            x, w.levels, w.scales, w.zeros, w.perm, self.bias, self.packed, size, gated, max_int4_rows
        )
        return out


def interleave_halves(blocks: torch.Tensor) -> torch.Tensor:
    """[a0, a1, ..., b0, b1, ...] -> [a0, b0, a1, b1, ...] along the first axis, in place."""
    return blocks.copy_(blocks.clone().unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1))


def pack_int4(linear: QuantizedLinear, bits: int, ops: Any) -> Int4Weight:
    """From levels of 2, 3 or 4 bits. `ops`: our C++ operators."""
    assert bits <= MAX_BITS
    middle = 2 ** (bits - 1)
    order = input_order(linear.g_idx, linear.scales.shape[0])  # [groups, places]
    pieces = _pieces(order.shape[1])
    order = split_groups(order, pieces)
    scales, zeros = (t.repeat_interleave(pieces, dim=0) for t in (linear.scales.float(), linear.zeros - middle))
    zeros = _in_blocks(zeros.to(torch.int8))
    return Int4Weight(
        levels=ops.pack_int4(linear.levels.t().contiguous(), order, _MIDDLE - middle),
        scales=_in_blocks(scales),
        zeros=zeros if zeros.any() else zeros.new_empty(0),
        perm=order.new_empty(0) if _is_as_it_comes(order, linear.g_idx.numel()) else order.flatten(),
        output_size=linear.levels.shape[0],
    )


def input_order(g_idx: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The inputs of each group in ascending order, and -1 up to whole chunks: [num_groups, places] int32.

    E.g. g_idx [1, 0, 0, 1, 0] -> [[1, 2, 4, -1], [0, 3, -1, -1]].
    """
    group = g_idx.long()
    counts = group.bincount(minlength=num_groups)  # [num_groups]
    places = round_up(int(counts.max()), _CHUNK)
    by_group = group.argsort(stable=True)  # [input_size]
    rank = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group[by_group]]  # within its group
    order = torch.full((num_groups, places), -1, dtype=torch.int32)
    order[group[by_group], rank] = by_group.int()
    return order


def split_groups(order: torch.Tensor, pieces: int) -> torch.Tensor:
    """Each group as several: [groups, places] -> [groups * pieces, fewer places], -1 up to whole chunks."""
    places = cdiv(order.shape[1], pieces * _CHUNK) * _CHUNK
    padded = F.pad(order, (0, pieces * places - order.shape[1]), value=-1)
    return padded.view(-1, places).contiguous()


def _pieces(places: int) -> int:
    """Into how many a group is split: a kernel takes MAX_GROUP inputs at most, and rounds x by the largest of a group.

    One more here and there, if no place then stays empty. E.g. 576 places -> 6 of 96, not 5 of 116.
    """
    fewest = cdiv(places, MAX_GROUP)
    return next((n for n in range(fewest, 2 * fewest) if places % (n * _CHUNK) == 0), fewest)


def _is_as_it_comes(order: torch.Tensor, input_size: int) -> bool:
    return order.numel() == input_size and torch.equal(order.flatten(), torch.arange(input_size, dtype=torch.int32))


def _in_blocks(table: torch.Tensor) -> torch.Tensor:
    """[num_groups, output_size] -> [blocks, num_groups, 32], zeros beyond the last output."""
    padded = F.pad(table, (0, -table.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()
