"""Packing levels of 2, 3, 4 or 8 bits into 32-bit words, and back.

Milestone: M7. vLLM counterpart: vllm/model_executor/layers/quantization/utils/quant_utils.py (pack_rows).
Left out: words of other sizes.

Down each column the bits form one stream, the lowest first; nothing else is needed for AutoGPTQ's layout of any width:

    4 bits: word 0 = | v7 | v6 | v5 | v4 | v3 | v2 | v1 | v0 |          8 values fill 1 word
    3 bits: word 0 = | v10 (its 2 low bits) | v9 | ... | v1 | v0 |      32 values fill 3 words,
            word 1 = | v21 (1 low bit) | v20 | ... | v10 (1 high bit) |      v10 and v21 lie across two
            word 2 = | v31 | ... | v22 | v21 (its 2 high bits) |
"""

import math

import torch

WORD_BITS = 32
_WORD_MASK = 2**WORD_BITS - 1


def packing_period(bits: int) -> tuple[int, int]:
    """(values, words): the fewest values that fill whole words. E.g. 4 -> (8, 1), 3 -> (32, 3)."""
    common = math.gcd(WORD_BITS, bits)
    return WORD_BITS // common, bits // common


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [n, columns] in 0 .. 2**bits - 1 -> int32 [n * bits / 32, columns]; n fills whole words."""
    num_values, num_words = packing_period(bits)
    values = values.to(torch.int64).unflatten(0, (-1, num_values))  # [periods, num_values, columns]
    words = values.new_zeros(values.shape[0], num_words, values.shape[2])  # int64: room for what a shift pushes out
    for i in range(num_values):
        word, shift = divmod(i * bits, WORD_BITS)
        words[:, word] |= values[:, i] << shift
        if shift + bits > WORD_BITS:  # the rest of a value that does not fit
            words[:, word + 1] |= values[:, i] >> (WORD_BITS - shift)
    return _to_int32(words).flatten(0, 1)


def unpack_rows(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: int32 [n * bits / 32, columns] -> uint8 [n, columns]."""
    return _unpack_by_words(packed, bits) if bits == 3 else _unpack_by_bytes(packed, bits)


def _unpack_by_bytes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Where no value lies across two bytes: several times as fast, and models are loaded often."""
    parts = packed.contiguous().unsqueeze(-1).view(torch.uint8)  # [words, columns, 4], the lowest byte first
    values = torch.stack([parts >> shift & (2**bits - 1) for shift in range(0, 8, bits)], dim=1)
    return values.permute(0, 3, 1, 2).flatten(0, 2)  # [words, 4 bytes, values of a byte, columns] -> [n, columns]


def _unpack_by_words(packed: torch.Tensor, bits: int) -> torch.Tensor:
    num_values, num_words = packing_period(bits)
    words = packed.unflatten(0, (-1, num_words)).to(torch.int64) & _WORD_MASK  # [periods, num_words, columns]
    values = torch.empty(words.shape[0], num_values, words.shape[2], dtype=torch.uint8, device=packed.device)
    for i in range(num_values):
        word, shift = divmod(i * bits, WORD_BITS)
        value = words[:, word] >> shift
        if shift + bits > WORD_BITS:
            value = value | (words[:, word + 1] << (WORD_BITS - shift))
        values[:, i] = (value & (2**bits - 1)).to(torch.uint8)
    return values.flatten(0, 1)


def pack_columns(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Along the rows instead: [rows, n] -> int32 [rows, n * bits / 32]."""
    return pack_rows(values.t(), bits).t().contiguous()


def unpack_columns(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n * bits / 32] -> uint8 [rows, n]."""
    return unpack_rows(packed.t(), bits).t()


def add_one_to_each(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Every value in int32 `packed` plus one, as whole words are added: what a value overflows by, the next one gets.

    That undoes a subtraction by words, in which a 0 borrowed from its neighbour. E.g. 4 bits: values (3, 0) are the
    word 0x03, less 0x11 is -0x0E, and plus 0x11 is 0x03 again; one by one, 0 - 1 would have to be 15.
    """
    ones = int(pack_rows(torch.ones(packing_period(bits)[0], 1), bits)[0])
    return _to_int32(packed.to(torch.int64) + ones)


def _to_int32(words: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of each, as the signed number with these bits. E.g. 0xFFFFFFFF -> -1."""
    low = words & _WORD_MASK
    return torch.where(low >= 2 ** (WORD_BITS - 1), low - 2**WORD_BITS, low).to(torch.int32)
