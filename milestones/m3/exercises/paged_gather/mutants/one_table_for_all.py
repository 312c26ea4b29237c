# killed-by: each_request_reads_its_own | request 1
"""Uses the first row of the block table for every request. One request alone is always right.

This is how a prompt leaks: the answer to one user continues the text of another.
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
            blocks = metadata.block_table[0][positions // metadata.block_size].long()  # [seq_len]
            slots = blocks * metadata.block_size + positions % metadata.block_size  # [seq_len]
            mask = positions > torch.arange(seq_len - q_len, seq_len)[:, None]  # [q_len, seq_len]
            metadata.prepared.append((slots, mask))

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        output = torch.empty_like(query)  # [num_tokens, num_heads, head_size]
        for i, (slots, mask) in enumerate(metadata.prepared):
            rows = slice(metadata.query_start_loc[i], metadata.query_start_loc[i + 1])
            key, value = self.by_slot(kv_cache)[:, slots].float()  # each [seq_len, num_kv_heads, head_size]
            output[rows] = self._attend(query[rows], key, value, mask)
        return output
