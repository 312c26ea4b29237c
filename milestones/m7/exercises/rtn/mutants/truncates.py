# killed-by: an_asymmetric_grid_by_hand | expected the nearest
"""Cuts the fraction off instead of rounding, as a cast to an integer does. The error doubles, and all of it points to
zero.
"""

from typing import Self

import torch

from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.grid import SMALLEST_SCALE, Grid


class RtnGrid(Grid):
    @classmethod
    def find(cls, weight: torch.Tensor, config: GPTQConfig) -> Self:
        low, high = weight.amin(1).clamp(max=0.0), weight.amax(1).clamp(min=0.0)
        if config.sym:
            high = torch.maximum(-low, high)
            low = -high
        span = torch.where(high > low, high - low, torch.ones_like(high))
        scale = (span / config.max_level).clamp(min=SMALLEST_SCALE).half().float()
        zero = torch.round(-low / scale).clamp(config.zero_offset, config.max_level)
        if config.sym:
            zero = torch.full_like(scale, 2 ** (config.bits - 1))
        return cls(scale, zero, config.max_level)

    def levels(self, weight: torch.Tensor) -> torch.Tensor:
        scale, zero = (self.scale, self.zero) if weight.dim() == 1 else (self.scale[:, None], self.zero[:, None])
        return ((weight / scale).trunc() + zero).clamp(0, self.max_level)

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        scale, zero = (self.scale, self.zero) if levels.dim() == 1 else (self.scale[:, None], self.zero[:, None])
        return (levels - zero) * scale
