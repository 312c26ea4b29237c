# killed-by: new_tokens_behind_cached_ones | is at position seq_len - q_len + i
"""Aligns the causal mask at the beginning: query i sees the keys 0 to i, whatever is cached.

torch's scaled_dot_product_attention documents is_causal=True as this upper left mask. flash-attention changed to the
lower right one in version 2.1: with cached keys only that one is causal.
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
            mask = positions > torch.arange(q_len)[:, None]  # [q_len, seq_len]
            metadata.prepared.append((slots, mask))

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        output = torch.empty_like(query)  # [num_tokens, num_heads, head_size]
        for i, (slots, mask) in enumerate(metadata.prepared):
            rows = slice(metadata.query_start_loc[i], metadata.query_start_loc[i + 1])
            key, value = self.by_slot(kv_cache)[:, slots].float()  # each [seq_len, num_kv_heads, head_size]
            output[rows] = self._attend(query[rows], key, value, mask)
        return output
