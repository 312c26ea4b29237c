# killed-by: every_output_has_its_own_grid | have the scales
"""Takes one minimum and one maximum over all outputs of the group: per-tensor quantisation. With 4 bits a single large
row leaves the others two or three levels.
"""

from typing import Self

import torch

from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.grid import SMALLEST_SCALE, Grid


class RtnGrid(Grid):
    @classmethod
    def find(cls, weight: torch.Tensor, config: GPTQConfig) -> Self:
        low, high = weight.amin().expand(len(weight)).clamp(max=0.0), weight.amax().expand(len(weight)).clamp(min=0.0)
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
