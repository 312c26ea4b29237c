"""m7/rtn: which values the weights of a group may take, and rounding to them."""

from typing import Self

import torch

from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.grid import SMALLEST_SCALE, Grid  # noqa: F401 - the least scale that fp16 can hold


class RtnGrid(Grid):
    """The grids of one group: scale [output_size], zero [output_size], max_level."""

    @classmethod
    def find(cls, weight: torch.Tensor, config: GPTQConfig) -> Self:
        """Returns cls(scale, zero, max_level) for the weights [output_size, group_length] of one group.

        Each output's grid is the smallest that covers its weights and zero. The scale is one that fp16 can hold.
        """
        raise NotImplementedError("m7/rtn: find")

    def levels(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the nearest level of each weight [output_size, n] or [output_size]: fp32, 0 .. max_level."""
        raise NotImplementedError("m7/rtn: levels")

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        """Returns the values that the levels stand for, in the same shape."""
        raise NotImplementedError("m7/rtn: values")
