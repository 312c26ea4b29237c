"""Rotary position embedding, neox style (the two halves of a head form the pairs), with linear and Llama 3 scaling.

Milestone: M1. vLLM counterpart: vllm/model_executor/layers/rotary_embedding.py. Left out: yarn, dynamic, partial and
interleaved (GPT-J) variants. Source: Su et al. 2021, "RoFormer", section 3.4.2; the Llama 3.1 scaling is Meta's.

One RotaryEmbedding serves all layers: `cos_sin_at` looks up cos and sin of the step's positions once. The layers only
turn their queries and keys by them, with ApplyRotary, into whose `impl` M4 puts a fused kernel.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from folovllm.hf_config import RopeConfig


class RotaryEmbedding(nn.Module):
    """Holds cos and sin of every position; the table is built at first use, so building a model stays cheap."""

    def __init__(self, head_size: int, max_position: int, rope: RopeConfig) -> None:
        super().__init__()
        self.head_size = head_size
        self.max_position = max_position
        self.rope = rope
        self.cos_sin: torch.Tensor | None = None  # [max_position, 2, head_size], in the model's dtype

    def cos_sin_at(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions [num_tokens], each [num_tokens, 1, head_size]: the 1 is broadcast over heads."""
        if self.cos_sin is None:
            self.cos_sin = cos_sin_table(self.head_size, self.max_position, self.rope, positions.device).to(dtype)
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


def cos_sin_table(head_size: int, max_position: int, rope: RopeConfig, device: torch.device) -> torch.Tensor:
    """[max_position, 2, head_size] fp32: (cos, cos) and (-sin, sin) of position * frequency.

    Always fp32: bf16 has 8 bits of mantissa and could not even tell position 257 from 256.
    """
    positions = torch.arange(max_position, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse_frequencies(head_size, rope).to(device))  # [max_position, head_size / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1)


def inverse_frequencies(head_size: int, rope: RopeConfig) -> torch.Tensor:
    """Radians per token of each pair, [head_size / 2] fp32: theta^(-2i / head_size), then stretched."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


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
