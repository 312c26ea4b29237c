"""Rotary position embedding, neox style (the two halves of a head form the pairs), with every scaling of rope_config.

Milestone: M1. vLLM counterpart: vllm/model_executor/layers/rotary_embedding/base.py. Left out: longrope, and partial
and interleaved (GPT-J) variants. Sources: Su et al. 2021, "RoFormer", section 3.4.2; Peng et al. 2023, "YaRN", section
3; the Llama 3.1 scaling is Meta's.

One RotaryEmbedding serves all layers: `cos_sin_at` looks up cos and sin of the step's positions once. The layers only
turn their queries and keys by them, with ApplyRotary, into whose `impl` M4 puts a fused kernel.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from folovllm.rope_config import RopeConfig

_CHUNK = 4096  # positions computed at once: the table is in memory once, and hardly anything beside it


class RotaryEmbedding(nn.Module):
    """Holds cos and sin of every position.

    The model loader calls `build` with the context length in use, so the table is part of the start-up memory and the
    first token does not wait for it. A RotaryEmbedding that is used alone builds its table at the first lookup.
    """

    def __init__(self, head_size: int, max_position: int, rope: RopeConfig) -> None:
        super().__init__()
        self.head_size = head_size
        self.max_position = max_position
        self.rope = rope
        self.cos_sin: torch.Tensor | None = None  # [max_position, 2, head_size], in the model's dtype

    def build(self, max_position: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compute the table for positions 0 .. max_position - 1.

        Dynamic scaling has two sets of frequencies: up to the original context the plain ones, for longer requests
        those of `max_position`. The rows of the second set follow the first ones (see RopeConfig.long_request_offset).
        """
        self.max_position = max_position
        plain = inverse_frequencies(self.head_size, self.rope)  # [head_size / 2]
        offset = self.rope.long_request_offset(max_position)
        parts = [(max_position if offset is None else offset, plain)]
        if offset is not None:
            parts.append((max_position, dynamic_frequencies(self.head_size, self.rope, max_position)))
        table = torch.empty(sum(n for n, _ in parts), 2, self.head_size, dtype=dtype, device=device)
        start = 0
        for num_positions, frequencies in parts:
            fill_cos_sin(table[start : start + num_positions], frequencies, self.rope.attention_factor)
            start += num_positions
        self.cos_sin = table

    def cos_sin_at(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions [num_tokens], each [num_tokens, 1, head_size]: the 1 is broadcast over heads."""
        if self.cos_sin is None:
            self.build(self.max_position, dtype, positions.device)
        assert self.cos_sin is not None
        cos, sin = self.cos_sin.index_select(0, positions).split(1, dim=1)
        return cos, sin


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x [num_tokens, heads, head_size] by its positions; a new tensor.

    Pair i is (x[i], x[i + half]). The table's sin has its first half negated, so one multiply-add does both members:
        out[i]        = x[i]        * cos[i] - x[i + half] * sin[i]
        out[i + half] = x[i + half] * cos[i] + x[i]        * sin[i]
    """
    swapped = x.unflatten(-1, (2, -1)).flip(-2).view(x.shape)  # [num_tokens, heads, head_size], halves exchanged
    return (x * cos).addcmul_(swapped, sin)


class ApplyRotary(nn.Module):
    """Turns queries and keys. They may be turned in place: use what it returns, and no longer what it was given."""

    impl: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = staticmethod(apply_rotary)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, heads, head_size], cos and sin [num_tokens, 1, head_size] -> as x."""
        return self.impl(x, cos, sin)


def fill_cos_sin(table: torch.Tensor, frequencies: torch.Tensor, attention_factor: float = 1.0) -> None:
    """Write (cos, cos) and (-sin, sin) of position * frequency into `table` [num_positions, 2, head_size].

    Angles are fp32 whatever the table is: bf16 has 8 significant bits and could not even tell position 257 from 256.
    """
    half = frequencies.numel()
    frequencies = frequencies.to(table.device)  # [head_size / 2]
    for start in range(0, len(table), _CHUNK):
        part = table[start : start + _CHUNK]  # [positions, 2, head_size]
        positions = torch.arange(start, start + len(part), dtype=torch.float32, device=table.device)  # [positions]
        angles = torch.outer(positions, frequencies)  # [positions, head_size / 2] fp32
        cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
        part[:, 0, :half], part[:, 0, half:] = cos, cos
        part[:, 1, :half], part[:, 1, half:] = -sin, sin


def inverse_frequencies(head_size: int, rope: RopeConfig) -> torch.Tensor:
    """Radians per token of each pair, [head_size / 2] fp32: theta^(-2i / head_size), then stretched."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3_frequencies(frequencies, rope)
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope.theta**exponents, rope)
    return frequencies


def dynamic_frequencies(head_size: int, rope: RopeConfig, length: int) -> torch.Tensor:
    """Dynamic NTK scaling: the base for a text of `length` tokens, more than the original context. [head_size / 2]."""
    stretch = rope.factor * length / rope.original_max_position_embeddings - (rope.factor - 1)
    base = rope.theta * stretch ** (head_size / (head_size - 2))
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    return 1.0 / base**exponents


def _llama3_frequencies(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Slow pairs, which never completed a turn in the original context, are slowed by `factor`; fast ones stay.

    Turns within the original context:  0 ---- low_freq_factor ---- high_freq_factor ----> many
    frequency:                           / factor        interpolated            unchanged
    """
    # Order of operations as in transformers: at position 2,047 another rounding already turns by 1e-4 radians more.
    turns = rope.original_max_position_embeddings / (2 * math.pi / frequencies)  # [head_size / 2]
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1.0 - keep) * frequencies / rope.factor + keep * frequencies


def _yarn_frequencies(wavelengths: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """As Llama 3, but the ramp is linear in the index of the pair, not in its number of turns.

    pair:       0 ---- turns beta_fast times ---- turns beta_slow times ----> head_size / 2
    frequency:     unchanged            interpolated              / factor
    """
    num_pairs = wavelengths.numel()  # wavelengths: [head_size / 2], in tokens per radian
    low, high = (_pair_with_turns(turns, num_pairs, rope) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    span = high - low or 0.001
    slowed = ((torch.arange(num_pairs, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)  # [head_size / 2]
    keep = 1 - slowed
    return 1.0 / (rope.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _pair_with_turns(turns: float, num_pairs: int, rope: RopeConfig) -> float:
    """The (fractional) index of the pair that turns `turns` times within the original context."""
    ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
    return num_pairs * math.log(ratio) / math.log(rope.theta)
