# killed-by: physical_blocks_mean_nothing | wherever that is
"""Reads on behind the first block, as in a contiguous cache. Right while the pool hands out neighbours in order.

That is the state of a fresh pool: each test with one request passes, and a busy engine answers nonsense.
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
            slots = metadata.block_table[i][0].long() * metadata.block_size + positions  # [seq_len]
            mask = positions > torch.arange(seq_len - q_len, seq_len)[:, None]  # [q_len, seq_len]
            metadata.prepared.append((slots, mask))

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        output = torch.empty_like(query)  # [num_tokens, num_heads, head_size]
        for i, (slots, mask) in enumerate(metadata.prepared):
            rows = slice(metadata.query_start_loc[i], metadata.query_start_loc[i + 1])
            key, value = self.by_slot(kv_cache)[:, slots].float()  # each [seq_len, num_kv_heads, head_size]
            output[rows] = self._attend(query[rows], key, value, mask)
        return output
