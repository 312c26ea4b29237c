# killed-by: the_scale_is_what_the_file_keeps | change when stored in fp16
"""Chooses levels for an fp32 scale, and the file keeps fp16. Every weight is read with a scale that its level was not
chosen for, and GPTQ compensates for errors that are not the final ones.
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
        scale = (span / config.max_level).clamp(min=SMALLEST_SCALE)
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
