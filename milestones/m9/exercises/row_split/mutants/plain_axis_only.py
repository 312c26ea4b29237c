# killed-by: the_axis_of_the_inputs_may_be_the_first | was refused on rank 1 of 2
"""Cuts along axis 1, whatever the layout. Plain weights load, and a GPTQ checkpoint does not."""

from typing import Any

import torch
from torch import nn

from folovllm.model_executor.layers.linear import RowParallelLinear as _Real
from folovllm.model_executor.layers.linear import output_dim  # noqa: F401
from folovllm.model_executor.parameter import copy_shard, load_whole


class RowParallelLinear(_Real):
    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        if param.dim() > 1:
            copy_shard(param.data, loaded_weight, 1, self.tp.rank, self.tp.size)
            return
        load_whole(param, loaded_weight)
        if self.tp.rank > 0:
            param.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.quant_method.apply(self, x))
