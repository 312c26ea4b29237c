"""m9/row_split: the layer whose inputs are divided among the ranks."""

from typing import Any

import torch
from torch import nn

from folovllm.model_executor.layers.linear import RowParallelLinear as _Real
from folovllm.model_executor.layers.linear import output_dim  # noqa: F401 - the axis of the outputs: 0, or 1 for GPTQ
from folovllm.model_executor.parameter import copy_shard, load_whole  # noqa: F401


class RowParallelLinear(_Real):
    """One rank's part: some of the inputs, all outputs. `self.tp` is its end of the group."""

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        """Fills `param` with this rank's piece of the checkpoint's whole tensor."""
        raise NotImplementedError("m9/row_split: weight_loader")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, inputs of this rank] -> [num_tokens, outputs], whole, on every rank."""
        raise NotImplementedError("m9/row_split: forward")
