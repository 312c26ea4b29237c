# killed-by: the_example | expected [[20.0]] from each
"""Divides the sum by the number of ranks, as one does with gradients in data-parallel training."""

from typing import Any

import torch
from torch import nn

from folovllm.model_executor.layers.linear import RowParallelLinear as _Real
from folovllm.model_executor.layers.linear import output_dim
from folovllm.model_executor.parameter import copy_shard, load_whole


class RowParallelLinear(_Real):
    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        if param.dim() > 1:
            copy_shard(param.data, loaded_weight, 1 - output_dim(param), self.tp.rank, self.tp.size)
            return
        load_whole(param, loaded_weight)
        if self.tp.rank > 0:
            param.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.quant_method.apply(self, x)) / self.tp.size
