# killed-by: a_token_goes_to_its_position | (3, 3): 10.0, (3, 4): 11.0
"""Positions counted from 1, as the length of a sequence suggests: the last token stands at seq_len - 1.

nano-vllm had it in its decode step, where the position of the new token was the length of the sequence:
https://github.com/GeeeekExplorer/nano-vllm/pull/67 (commit f5b4840).
"""

import torch

from folovllm.attention.backend import AttentionMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend


class Backend(TorchNaiveBackend):
    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        start = metadata.query_start_loc
        for i, seq_len in enumerate(metadata.seq_lens):
            rows, page = slice(start[i], start[i + 1]), int(metadata.block_table[i, 0])
            first = seq_len - (start[i + 1] - start[i])
            kv_cache[0, page, first + 1 : seq_len + 1] = key[rows]
            kv_cache[1, page, first + 1 : seq_len + 1] = value[rows]

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        out, start = torch.empty_like(query), metadata.query_start_loc
        for i, seq_len in enumerate(metadata.seq_lens):
            if seq_len > metadata.block_size:
                raise ValueError("a request is longer than its page; use preset='m1' or 'm2'")
            rows, page = slice(start[i], start[i + 1]), int(metadata.block_table[i, 0])
            q_len = start[i + 1] - start[i]
            q = query[rows].transpose(0, 1).float()  # [heads, q_len, size]
            k, v = kv_cache[:, page, :seq_len].float()  # each [seq_len, kv heads, size]
            group = self.spec.num_queries_per_kv
            k = k.transpose(0, 1).repeat_interleave(group, dim=0)  # [heads, seq_len, size]
            v = v.transpose(0, 1).repeat_interleave(group, dim=0)  # [heads, seq_len, size]
            scores = q @ k.transpose(1, 2) * self.spec.scale  # [heads, q_len, seq_len]
            sees = torch.ones(q_len, seq_len, dtype=torch.bool).tril(seq_len - q_len)  # [q_len, seq_len]
            scores.masked_fill_(~sees, float("-inf"))
            out[rows] = (scores.softmax(dim=-1) @ v).transpose(0, 1).to(out.dtype)
        return out
