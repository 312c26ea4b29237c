"""Packing levels of 2, 3, 4 or 8 bits into 32-bit words, and back.

Milestone: M7. vLLM counterpart: vllm/model_executor/layers/quantization/utils/quant_utils.py (pack_rows).
Left out: words of other sizes.

Down each column the bits form one stream, the lowest first; nothing else is needed for AutoGPTQ's layout of any width:

    4 bits: word 0 = | v7 | v6 | v5 | v4 | v3 | v2 | v1 | v0 |          8 values fill 1 word
    3 bits: word 0 = | v10 (its 2 low bits) | v9 | ... | v1 | v0 |      32 values fill 3 words,
            word 1 = | v21 (1 low bit) | v20 | ... | v10 (1 high bit) |      v10 and v21 lie across two
            word 2 = | v31 | ... | v22 | v21 (its 2 high bits) |

The levels of a layer are packed down the inputs. Its zero points are packed along the outputs, and a v1 checkpoint
stores each of them minus one.
"""

import torch

from folovllm.gptq_config import WORD_BITS, GPTQConfig

_WORD_MASK = 2**WORD_BITS - 1


class Packing:
    """Packs values of 2, 4 or 8 bits. `zero_offset` is what a stored zero point lacks: 1 in a v1 checkpoint, else 0."""

    def __init__(self, bits: int, zero_offset: int = 0) -> None:
        self.bits, self.zero_offset = bits, zero_offset

    def pack_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Packs integers [n, columns] in 0 .. 2**bits - 1 into int32 [n * bits / 32, columns]; n fills whole words."""
        values = values.to(torch.int64).unflatten(0, (-1, WORD_BITS // self.bits))  # [words, values of one, columns]
        words = torch.zeros_like(values[:, 0])  # [words, columns] int64: the top bit of a word is no sign yet
        for i, shift in enumerate(range(0, WORD_BITS, self.bits)):
            words |= values[:, i] << shift
        return to_int32(words)

    def unpack_rows(self, packed: torch.Tensor) -> torch.Tensor:
        """Unpacks int32 [n * bits / 32, columns] into uint8 [n, columns].

        No value lies across two bytes, so it is done byte by byte. That is several times as fast as with words in
        int64, and models are loaded often.
        """
        parts = packed.contiguous().unsqueeze(-1).view(torch.uint8)  # [words, columns, 4], the lowest byte first
        mask = 2**self.bits - 1
        values = torch.stack([parts >> shift & mask for shift in range(0, 8, self.bits)], dim=1)
        return values.permute(0, 3, 1, 2).flatten(0, 2)  # [words, 4 bytes, values of a byte, columns] -> [n, columns]

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        """Packs zero points [num_groups, n] into int32 [num_groups, n * bits / 32].

        Each is stored minus `zero_offset`, and packed along the row.
        """
        return self.pack_rows((zeros - self.zero_offset).t()).t().contiguous()

    def unpack_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        """Unpacks int32 [num_groups, n * bits / 32] into zero points [num_groups, n] int32.

        GPTQModel subtracts the ones of v1 from whole words, so that a zero of 0 borrows from its neighbour. Adding them
        to whole words gives every value back. E.g. 4 bits: the zeros (3, 0) are the word 0x03, less 0x11 is -0x0E, and
        plus 0x11 is 0x03 again; value by value, 0 - 1 would have to be 15. (AutoGPTQ's kernels read a stored 15 as 16,
        but no tool writes a zero of 16.)
        """
        ones = sum(self.zero_offset << shift for shift in range(0, WORD_BITS, self.bits))
        words = to_int32(packed.to(torch.int64) + ones) if ones else packed  # [num_groups, words]
        return self.unpack_rows(words.t()).t().to(torch.int32)


class ThreeBitPacking(Packing):
    """Packs values of 3 bits, of which some lie across two words: 32 values fill 3 words."""

    def pack_rows(self, values: torch.Tensor) -> torch.Tensor:
        values = values.to(torch.int64).unflatten(0, (-1, WORD_BITS))  # [periods, 32, columns]
        words = values.new_zeros(values.shape[0], 3, values.shape[2])  # int64: room for what a shift pushes out
        for i in range(WORD_BITS):
            word, shift = divmod(3 * i, WORD_BITS)
            words[:, word] |= values[:, i] << shift
            if shift + 3 > WORD_BITS:  # the rest of a value that does not fit
                words[:, word + 1] |= values[:, i] >> (WORD_BITS - shift)
        return to_int32(words).flatten(0, 1)

    def unpack_rows(self, packed: torch.Tensor) -> torch.Tensor:
        words = packed.unflatten(0, (-1, 3)).to(torch.int64) & _WORD_MASK  # [periods, 3, columns]
        values = torch.empty(words.shape[0], WORD_BITS, words.shape[2], dtype=torch.uint8, device=packed.device)
        for i in range(WORD_BITS):
            word, shift = divmod(3 * i, WORD_BITS)
            value = words[:, word] >> shift
            if shift + 3 > WORD_BITS:
                value = value | (words[:, word + 1] << (WORD_BITS - shift))
            values[:, i] = (value & 7).to(torch.uint8)
        return values.flatten(0, 1)

    def unpack_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        """Here GPTQModel subtracts the ones value by value, modulo 8."""
        return (self.unpack_rows(packed.t()).t().to(torch.int32) + self.zero_offset) % 8


def packing_for(config: GPTQConfig, packing: type[Packing] = Packing) -> Packing:
    """Returns the packing of a checkpoint with `config`: an instance of `packing`, unless values lie across words."""
    return (ThreeBitPacking if config.bits == 3 else packing)(config.bits, config.zero_offset)


def to_int32(words: torch.Tensor) -> torch.Tensor:
    """Returns the low 32 bits of each word as the signed number with these bits. E.g. 0xFFFFFFFF -> -1."""
    low = words & _WORD_MASK
    return torch.where(low >= 2 ** (WORD_BITS - 1), low - 2**WORD_BITS, low).to(torch.int32)
