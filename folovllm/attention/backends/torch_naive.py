"""torch_naive: attention as the formula says it, one request after the other. All other backends are compared with it.

Milestone: M1. vLLM counterpart: none; the reference implementations in its kernel tests come nearest.

The backend gathers the keys and values of a sequence slot by slot, builds the mask, and computes the softmax and the
weighted sum. It is right for any mix of query lengths.
"""

import torch

from folovllm.attention.backend import AttentionMetadata, sequence_slots
from folovllm.attention.backends.block_major import BlockMajorBackend


class TorchNaiveBackend(BlockMajorBackend):
    """One request after the other: gather its keys and values, multiply, mask, softmax, multiply."""

    name = "torch_naive"

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Computes, for each request, the slots of its tokens and the mask of its queries."""
        start, lens = metadata.query_start_loc, metadata.seq_lens
        metadata.prepared = [
            (
                sequence_slots(metadata.block_table[i], lens[i], metadata.block_size),
                causal_mask(start[i + 1] - start[i], lens[i], metadata.block_table.device),
            )
            for i in range(metadata.num_reqs)
        ]

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        by_slot = self.by_slot(kv_cache)
        output = torch.empty_like(query)  # [num_tokens, num_heads, head_size]
        start = metadata.query_start_loc
        for i, (slots, mask) in enumerate(metadata.prepared):
            rows = slice(start[i], start[i + 1])
            # Only the slots of this sequence are read: the rest of its last block may hold anything.
            key, value = by_slot.index_select(1, slots).float()  # each [seq_len, num_kv_heads, head_size]
            output[rows] = self._attend(query[rows], key, value, mask)
        return output

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the attention of one request, in the shape of `query` [q_len, num_heads, head_size].

        `key` and `value` are [seq_len, num_kv_heads, head_size] in fp32, and so are all sums.
        """
        q_len, num_kv_heads, head_size = query.shape[0], self.spec.num_kv_heads, self.spec.head_size
        group = self.spec.num_queries_per_kv
        q = (query.float() * self.spec.scale).view(q_len, num_kv_heads, group, head_size)
        # All queries that share a KV head are rows of one matrix: one product per KV head, and K is never repeated.
        q = q.permute(1, 2, 0, 3).reshape(num_kv_heads, group * q_len, head_size)
        scores = torch.bmm(q, key.permute(1, 2, 0))  # [num_kv_heads, group * q_len, seq_len]
        if mask is not None:
            scores.view(num_kv_heads, group, q_len, -1).masked_fill_(mask, float("-inf"))
        out = torch.bmm(scores.softmax(dim=-1), value.transpose(0, 1))  # [num_kv_heads, group * q_len, head_size]
        out = out.view(num_kv_heads, group, q_len, head_size).permute(2, 0, 1, 3)
        return out.reshape(query.shape).to(query.dtype)


def causal_mask(q_len: int, seq_len: int, device: torch.device) -> torch.Tensor | None:
    """Returns a mask that is True where query i may *not* see key j, or None for a single query, which sees every key.

    The queries are the last q_len positions, so query i is at position seq_len - q_len + i. E.g. q_len 2, seq_len 4:

        . . . X
        . . . .
    """
    if q_len == 1:
        return None
    query_positions = torch.arange(seq_len - q_len, seq_len, device=device).unsqueeze(1)  # [q_len, 1]
    return torch.arange(seq_len, device=device) > query_positions  # [q_len, seq_len]
