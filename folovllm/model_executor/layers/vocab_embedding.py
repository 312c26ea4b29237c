"""The two ends of the model: token ids to vectors, and vectors to logits.

Milestone: M1. vLLM counterpart: vllm/model_executor/layers/vocab_parallel_embedding.py. Left out: LoRA's extra
vocabulary, padding of the vocabulary, and the communication of world > 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.model_executor.layers.linear import ColumnParallelLinear, divide
from folovllm.model_executor.parameter import copy_shard, new_parameter


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding table, the vocabulary divided among ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, *, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.weight = new_parameter(divide(vocab_size, world), hidden_size, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        copy_shard(param.data, loaded_weight, 0, self.rank, self.world)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert self.world == 1, "masking foreign tokens comes with tensor parallelism"
        return F.embedding(input_ids, self.weight)  # [num_tokens, hidden_size]


class ParallelLMHead(ColumnParallelLinear):
    """hidden -> logits: a linear layer, so that its quant_method can be replaced like any other's."""

    def tie_weights(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding table itself: one tensor under two names, stored and counted once."""
        self.weight = embedding.weight
