# killed-by: unowned_slots_never_leak | a slot was
"""Reads whole blocks and hides what lies behind the end of the sequence with the mask. The weight 0 times NaN is NaN.

vLLM pulls 936 and 47305: kernels loaded the unwritten end of the last block and relied on the mask.
"""

import torch

from folovllm.attention.backend import AttentionMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend as Reference


class TorchNaiveBackend(Reference):
    def prepare(self, metadata: AttentionMetadata) -> None:
        metadata.prepared = []
        for i, seq_len in enumerate(metadata.seq_lens):
            q_len = metadata.query_start_loc[i + 1] - metadata.query_start_loc[i]
            num_blocks = -(-seq_len // metadata.block_size)
            positions = torch.arange(num_blocks * metadata.block_size)  # [all slots of the blocks]
            blocks = metadata.block_table[i][positions // metadata.block_size].long()  # [seq_len]
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
