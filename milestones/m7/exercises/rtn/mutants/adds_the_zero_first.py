# killed-by: a_tie_does_not_depend_on_the_zero_point | round first, then add the zero
"""Rounds weight / scale + zero. torch.round takes a half to the even number, so ties fall on the other side where the
zero is odd. No error is larger than half a step, and the checkpoint is not the one that another tool writes.
"""

from typing import Self

import torch

from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.grid import SMALLEST_SCALE, Grid


class RtnGrid(Grid):
    """The grids of one group: scale [output_size], zero [output_size], max_level."""

    @classmethod
    def find(cls, weight: torch.Tensor, config: GPTQConfig) -> Self:
        low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
        if config.sym:
            high = torch.maximum(low.abs(), high)
            low = -high
        scale = (high - low) / config.max_level
        scale = scale.half().float().clamp(min=SMALLEST_SCALE)
        zero = torch.round(-low / scale).clamp(config.zero_offset, config.max_level)
        if config.sym:
            zero = torch.full_like(scale, 2 ** (config.bits - 1))
        return cls(scale, zero, config.max_level)

    def levels(self, weight: torch.Tensor) -> torch.Tensor:
        scale, zero = self.scale, self.zero
        if weight.ndim == 2:
            scale, zero = scale[:, None], zero[:, None]
        return (torch.round(weight / scale + zero)).clamp(0, self.max_level)

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        scale, zero = self.scale, self.zero
        if levels.ndim == 2:
            scale, zero = scale[:, None], zero[:, None]
        return (levels - zero) * scale
