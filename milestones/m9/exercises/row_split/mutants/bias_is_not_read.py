# killed-by: a_wrong_shape_is_refused_on_every_rank | rank 1 of 2 loaded a weight [3, 4] and a bias [4]
"""Ranks other than 0 do not look at the bias of the checkpoint. A wrong one then stops rank 0 alone, and the others
wait for it.
"""

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
        elif self.tp.rank == 0:
            load_whole(param, loaded_weight)
        else:
            param.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(self.quant_method.apply(self, x))
