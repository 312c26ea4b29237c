# killed-by: the_zero_point_can_be_stored | expected 1
"""Lets the zero point be 0 in a v1 file, which stores zero - 1. The -1 borrows from the neighbour in its word, and
tools disagree about what they read there: AutoGPTQ pull requests 559 and 640 are the long discussion of it.
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
        zero = torch.round(-low / scale).clamp(0, config.max_level)
        if config.sym:
            zero = torch.full_like(scale, 2 ** (config.bits - 1))
        return cls(scale, zero, config.max_level)

    def levels(self, weight: torch.Tensor) -> torch.Tensor:
        scale, zero = (self.scale, self.zero) if weight.dim() == 1 else (self.scale[:, None], self.zero[:, None])
        return (torch.round(weight / scale) + zero).clamp(0, self.max_level)

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        scale, zero = (self.scale, self.zero) if levels.dim() == 1 else (self.scale[:, None], self.zero[:, None])
        return (levels - zero) * scale
