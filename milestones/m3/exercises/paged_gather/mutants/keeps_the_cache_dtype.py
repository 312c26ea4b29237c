# killed-by: a_cache_in_bf16 | wants K and V in float32
"""Hands K and V to `_attend` as they are in the cache. With a float32 cache nothing is seen; real models use bf16.

A learner of this exercise passed all checks with it, and `folovllm generate --mine` then ended in a RuntimeError.
"""

import torch

from folovllm.attention.backend import AttentionMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend as Reference


class TorchNaiveBackend(Reference):
    def prepare(self, metadata: AttentionMetadata) -> None:
        metadata.prepared = []
        for i, seq_len in enumerate(metadata.seq_lens):
            q_len = metadata.query_start_loc[i + 1] - metadata.query_start_loc[i]
            positions = torch.arange(seq_len)  # [seq_len]
            blocks = metadata.block_table[i][positions // metadata.block_size].long()  # [seq_len]
            slots = blocks * metadata.block_size + positions % metadata.block_size  # [seq_len]
            mask = positions > torch.arange(seq_len - q_len, seq_len)[:, None]  # [q_len, seq_len]
            metadata.prepared.append((slots, mask))

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        output = torch.empty_like(query)  # [num_tokens, num_heads, head_size]
        for i, (slots, mask) in enumerate(metadata.prepared):
            rows = slice(metadata.query_start_loc[i], metadata.query_start_loc[i + 1])
            key, value = self.by_slot(kv_cache)[:, slots]  # each [seq_len, num_kv_heads, head_size]
            output[rows] = self._attend(query[rows], key, value, mask)
        return output
