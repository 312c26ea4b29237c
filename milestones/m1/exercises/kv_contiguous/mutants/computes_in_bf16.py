# killed-by: a_cache_in_bf16_is_computed_in_float32 | were rounded to bf16 on the way
"""Computes in the dtype of the cache. In float32 it is right, so tests in float32 do not see it.

A learner of this exercise passed all checks with it.
"""

import torch

from folovllm.attention.backend import AttentionMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend


class Backend(TorchNaiveBackend):
    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        by_slot = kv_cache.flatten(1, 2)  # [2, num_slots, kv heads, size]
        by_slot[0, metadata.slot_mapping] = key
        by_slot[1, metadata.slot_mapping] = value

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        out, start = torch.empty_like(query), metadata.query_start_loc
        for i, seq_len in enumerate(metadata.seq_lens):
            if seq_len > metadata.block_size:
                raise ValueError("a request is longer than its page; use preset='m1' or 'm2'")
            rows, page = slice(start[i], start[i + 1]), int(metadata.block_table[i, 0])
            q_len = start[i + 1] - start[i]
            q = query[rows].transpose(0, 1)  # [heads, q_len, size]
            k, v = kv_cache[:, page, :seq_len]  # each [seq_len, kv heads, size]
            group = self.spec.num_queries_per_kv
            k = k.transpose(0, 1).repeat_interleave(group, dim=0)  # [heads, seq_len, size]
            v = v.transpose(0, 1).repeat_interleave(group, dim=0)  # [heads, seq_len, size]
            scores = q @ k.transpose(1, 2) * self.spec.scale  # [heads, q_len, seq_len]
            sees = torch.ones(q_len, seq_len, dtype=torch.bool).tril(seq_len - q_len)  # [q_len, seq_len]
            scores.masked_fill_(~sees, float("-inf"))
            out[rows] = (scores.softmax(dim=-1) @ v).transpose(0, 1).to(out.dtype)
        return out
