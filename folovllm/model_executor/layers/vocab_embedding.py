"""The two ends of the model: token ids to vectors, and vectors to logits.

Milestone: M1 (one rank), M9 (the vocabulary divided among ranks). vLLM counterpart:
vllm/model_executor/layers/vocab_parallel_embedding.py. Left out: LoRA's extra vocabulary.

Every rank holds equally many rows. If the vocabulary does not divide, the last rows are zeros that no token has. E.g.
vocab_size 7 on 3 ranks:

    | 0 1 2 | 3 4 5 | 6 . . |      rank 0 holds the rows of tokens 0, 1 and 2; each dot is a row of zeros
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.distributed.communicator import SINGLE_RANK, Communicator
from folovllm.model_executor.layers.linear import ColumnParallelLinear, output_dim
from folovllm.model_executor.parameter import copy_shard, new_parameter
from folovllm.utils import cdiv, round_up


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding table, the vocabulary divided among ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, *, tp: Communicator = SINGLE_RANK) -> None:
        super().__init__()
        self.vocab_size, self.tp = vocab_size, tp
        self.num_rows = cdiv(vocab_size, tp.size)
        self.weight = new_parameter(self.num_rows, hidden_size, weight_loader=self.weight_loader)

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        copy_shard(param.data, loaded_weight, 0, self.tp.rank, self.tp.size, total=self.vocab_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [num_tokens] -> [num_tokens, hidden_size]. One rank has a token's row, the others add zeros."""
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self.tp.rank * self.num_rows  # [num_tokens]
        is_foreign = (rows < 0) | (rows >= self.num_rows)  # [num_tokens]
        hidden = F.embedding(rows.masked_fill_(is_foreign, 0), self.weight)  # [num_tokens, hidden_size]
        return self.tp.all_reduce(hidden.masked_fill_(is_foreign.unsqueeze(1), 0.0))


class ParallelLMHead(ColumnParallelLinear):
    """hidden -> logits: a linear layer, so that its quant_method can be replaced like any other's.

    Each rank computes the logits of its tokens, and then every rank gets all of them. So all ranks sample, and since
    they do the same with the same bits, they have the same next tokens and need not tell each other.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, bias: bool = False, *, tp: Communicator = SINGLE_RANK, **kwargs: Any
    ) -> None:
        super().__init__(hidden_size, round_up(vocab_size, tp.size), bias, tp=tp, **kwargs)
        self.vocab_size = vocab_size

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        if output_dim(param) == 0:
            copy_shard(param.data, loaded_weight, 0, self.tp.rank, self.tp.size, total=self.vocab_size)
        else:  # quantised: ParallelConfig.check refuses a vocabulary that does not divide
            super().weight_loader(param, loaded_weight, shard_id)

    def tie_weights(self, embedding: VocabParallelEmbedding) -> None:
        """Use the embedding table itself: one tensor under two names, stored and counted once."""
        self.weight = embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, hidden_size] -> [n, vocab_size], on every rank."""
        logits = self.quant_method.apply(self, x)  # [n, output_size]
        if self.tp.size == 1:
            return logits
        return self.tp.all_gather(logits).narrow(-1, 0, self.vocab_size).contiguous()
