"""Int4Weight: the weights of a linear layer in the order of csrc/int4.cpp, 4 bits each.

Milestone: M7. vLLM counterpart: the repacking of its GPTQ kernels (e.g. gptq_marlin_repack). Left out: 8 bits.

Two bits and three fit into four as well: their levels are moved so that the middle one is 8 whatever the width. Inputs
are sorted by their group here, once; what a call does about act-order is to fetch its inputs in that order.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear

MAX_BITS = 4
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


def interleave_halves(blocks: torch.Tensor) -> torch.Tensor:
    """[a0, a1, ..., b0, b1, ...] -> [a0, b0, a1, b1, ...] along the first axis, in place."""
    return blocks.copy_(blocks.clone().unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1))


def merge_parts(parts: list[QuantizedLinear]) -> list[QuantizedLinear]:
    """One part of them all, if their inputs fall into the same groups; else as they are."""
    if any(not torch.equal(part.g_idx, parts[0].g_idx) for part in parts):
        return parts
    levels = torch.cat([part.levels for part in parts])  # [output_size, input_size]
    scales = torch.cat([part.scales for part in parts], dim=1)  # [num_groups, output_size]
    zeros = torch.cat([part.zeros for part in parts], dim=1)
    return [QuantizedLinear(levels, scales, zeros, parts[0].g_idx)]


def pack_int4(linear: QuantizedLinear, bits: int) -> Int4Weight:
    """From levels of 2, 3 or 4 bits."""
    assert bits <= MAX_BITS
    middle = 2 ** (bits - 1)
    order = input_order(linear.g_idx, linear.scales.shape[0])  # [groups, places]
    zeros = _in_blocks((linear.zeros - middle).to(torch.int8))
    return Int4Weight(
        levels=_pack_levels(linear.levels + (_MIDDLE - middle), order),
        scales=_in_blocks(linear.scales.float()),
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
    places = -(-int(counts.max()) // _CHUNK) * _CHUNK
    by_group = group.argsort(stable=True)  # [input_size]
    rank = torch.arange(len(group)) - (counts.cumsum(0) - counts)[group[by_group]]  # within its group
    order = torch.full((num_groups, places), -1, dtype=torch.int32)
    order[group[by_group], rank] = by_group.int()
    return order


def _is_as_it_comes(order: torch.Tensor, input_size: int) -> bool:
    return order.numel() == input_size and torch.equal(order.flatten(), torch.arange(input_size, dtype=torch.int32))


def _pack_levels(levels: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """levels [output_size, input_size], 0 .. 15 -> [blocks, groups, chunks, 64]."""
    padded = F.pad(levels, (0, 1, 0, -len(levels) % BLOCK), value=_MIDDLE)  # input -1 is one of zeros, as is output n
    ordered = padded[:, order.flatten().long()]  # [blocks * 32, groups * places]
    split = ordered.view(-1, 2, BLOCK // 2, order.shape[0], order.shape[1] // _CHUNK, 2, 2)
    nibbles = split.permute(0, 3, 4, 2, 6, 5, 1)  # [blocks, groups, chunks, lane, parity, pair, half]
    low, high = nibbles.unbind(-1)
    return (low | high << 4).flatten(3).contiguous()


def _in_blocks(table: torch.Tensor) -> torch.Tensor:
    """[num_groups, output_size] -> [blocks, num_groups, 32], zeros beyond the last output."""
    padded = F.pad(table, (0, -table.shape[1] % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()
