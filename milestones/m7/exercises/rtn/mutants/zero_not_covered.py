# killed-by: the_grid_covers_its_weights_and_zero | it is out of reach
"""Takes the grid from the smallest weight to the largest, as a textbook's min-max quantisation does, and forgets that
zero must be on it. A group of positive weights then has a negative zero point, which the clamp cuts off; the GPTQ
authors' quant.py takes the minimum with zero for this reason.
"""

from typing import Self

import torch

from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.grid import SMALLEST_SCALE, Grid


class RtnGrid(Grid):
    @classmethod
    def find(cls, weight: torch.Tensor, config: GPTQConfig) -> Self:
        low, high = weight.amin(1), weight.amax(1)
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
        return (torch.round(weight / scale) + zero).clamp(0, self.max_level)

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        scale, zero = (self.scale, self.zero) if levels.dim() == 1 else (self.scale[:, None], self.zero[:, None])
        return (levels - zero) * scale
