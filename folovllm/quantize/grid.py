"""The grid: which 2**bits values the weights of a group may take, and rounding to it.

Milestone: M7. vLLM counterpart: none. Left out: a search for the scale with the least error (GPTQModel's `mse`).
Source: Frantar et al. 2022, "GPTQ", section 4: asymmetric min-max grids; the symmetric form is the format's custom.

    asym, 2 bits, weights -0.3 .. 0.9:   level 0    1    2    3     scale 0.4, zero 1
                                              -0.4  0.0  0.4  0.8
    sym: zero is the middle level 2**(bits - 1), and the grid reaches as far as the largest |weight|.
"""

from dataclasses import dataclass
from typing import Self

import torch

from folovllm.gptq_config import GPTQConfig

SMALLEST_SCALE = 2.0**-24  # the smallest number that fp16 has


@dataclass(frozen=True)
class Grid:
    """The grids of one group, one grid per output."""

    scale: torch.Tensor  # [output_size] fp32
    zero: torch.Tensor  # [output_size] fp32, whole numbers
    max_level: int

    @classmethod
    def find(cls, weight: torch.Tensor, config: GPTQConfig) -> Self:
        """Returns the grid of one group's weights [output_size, group_length]: the smallest that covers them and
        zero.
        """
        low, high = weight.amin(1).clamp(max=0.0), weight.amax(1).clamp(min=0.0)  # [output_size]
        if config.sym:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        span = torch.where(high > low, high - low, 1.0)  # for a group of zeros any scale will do
        # The scale is rounded to fp16, as in the checkpoint, before it is used: GPTQ then compensates for the final
        # error.
        scale = (span / config.max_level).clamp(SMALLEST_SCALE).to(torch.float16).float()
        if config.sym:
            return cls(scale, torch.full_like(scale, 2 ** (config.bits - 1)), config.max_level)
        # v1 stores zero - 1, and readers differ on what -1 means. So a group without negative weights gives up one
        # level.
        zero = torch.round(-low / scale).clamp(config.zero_offset, config.max_level)
        return cls(scale, zero, config.max_level)

    def levels(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the nearest level of each weight [output_size, n] or [output_size], as whole numbers in fp32."""
        scale, zero = self._like(weight)
        return (torch.round(weight / scale) + zero).clamp_(0, self.max_level)

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the values that the levels stand for, in the same shape."""
        scale, zero = self._like(levels)
        return (levels - zero) * scale

    def _like(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.scale, self.zero) if x.dim() == 1 else (self.scale[:, None], self.zero[:, None])
