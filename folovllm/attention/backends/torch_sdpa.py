"""torch_sdpa: torch's fused attention on keys and values gathered from the blocks.

Milestone: M4. vLLM counterpart: vllm/v1/attention/backends/cpu_attn.py (its SDPA path). Left out: nested tensors.

The kernel inside `scaled_dot_product_attention` is tiled like torch_flash, but it does not know blocks: it needs the K
and V of a sequence in one piece. So each step first copies them out of the blocks, and in decode that copy costs more
than the attention itself. cpu_paged avoids the copy by reading the blocks in place.

Requests with the same number of new tokens and about as many keys share one call:

    new tokens   1    1    1   20   20         groups   (1, 64)    requests 0, 2     padded to 41 keys
    keys        33  300   41   20   20                  (1, 512)   request 1
                                                        (20, 64)   requests 3, 4
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from folovllm.attention.backend import AttentionMetadata
from folovllm.attention.backends.block_major import BlockMajorBackend
from folovllm.transfers import to_device

_SMALLEST_BUCKET = 64  # keys; padding fewer than this costs less than one more call
# Keys gathered for one call. The copied keys should still be in the processor's cache when they are read: in decode of
# 32 x 256 and 32 x 2,048 tokens, calls of 4,096 keys took 0.4 of the time of one call for all keys.
_MOST_KEYS = 4096


@dataclass(frozen=True)
class SdpaGroup:
    """Requests that run in one call: each has q_len new tokens, and their K and V are padded to one length."""

    rows: torch.Tensor  # [num_reqs, q_len] rows of the flat batch
    slots: torch.Tensor  # [num_reqs * max_len]
    mask: torch.Tensor | None  # [num_reqs, 1, q_len, max_len] True where a query may look
    is_causal: bool


class TorchSdpaBackend(BlockMajorBackend):
    """Groups the requests of a step by shape, gathers their keys and values, and calls torch once per group."""

    name = "torch_sdpa"

    def prepare(self, metadata: AttentionMetadata) -> None:
        start, lens = metadata.query_start_loc, metadata.seq_lens
        members: dict[tuple[int, int], list[int]] = {}
        for i in range(metadata.num_reqs):
            members.setdefault((start[i + 1] - start[i], _bucket(lens[i])), []).append(i)
        calls = []
        for (q_len, bucket), requests in members.items():
            per_call = max(1, _MOST_KEYS // bucket)
            calls += [(q_len, requests[i : i + per_call]) for i in range(0, len(requests), per_call)]
        metadata.prepared = make_groups(metadata, calls)

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        by_slot = self.by_slot(kv_cache)
        output = torch.empty_like(query)  # [num_tokens, num_heads, head_size]
        for group in metadata.prepared:
            num_reqs = group.rows.shape[0]
            gathered = by_slot.index_select(1, group.slots)  # [2, num_reqs * max_len, num_kv_heads, head_size]
            key, value = gathered.unflatten(1, (num_reqs, -1)).transpose(2, 3)  # each [num_reqs, kv_heads, len, size]
            output[group.rows] = self._attend_group(query[group.rows], key, value, group)
        return output

    def _attend_group(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: SdpaGroup
    ) -> torch.Tensor:
        """Returns the attention of one group. `query` and the result are [num_reqs, q_len, num_heads, head_size]."""
        scale = self.spec.scale
        if query.shape[1] == 1:
            # Each head has one query, and one mask serves them all. So the heads that share a KV head are passed as its
            # queries, and K and V are read once per KV head.
            q = query.view(-1, self.spec.num_kv_heads, self.spec.num_queries_per_kv, self.spec.head_size)
            return F.scaled_dot_product_attention(q, key, value, attn_mask=group.mask, scale=scale).view(query.shape)
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),  # [num_reqs, num_heads, q_len, head_size]
            key,
            value,
            attn_mask=group.mask,
            is_causal=group.is_causal,
            scale=scale,
            enable_gqa=self.spec.num_queries_per_kv > 1,
        )
        return out.transpose(1, 2)


def make_groups(metadata: AttentionMetadata, calls: list[tuple[int, list[int]]]) -> list[SdpaGroup]:
    """Returns a group for each (q_len, requests). What the device must know of all requests is copied to it once."""
    order = [i for _, requests in calls for i in requests]
    numbers = [order, [metadata.query_start_loc[i] for i in order], [metadata.seq_lens[i] for i in order]]
    by_call = to_device(numbers, metadata.block_table.device).split([len(requests) for _, requests in calls], dim=1)
    return [make_group(metadata, *call, *columns) for call, columns in zip(calls, by_call, strict=True)]


def make_group(
    metadata: AttentionMetadata,
    q_len: int,
    requests: list[int],
    numbers: torch.Tensor,
    first_rows: torch.Tensor,
    lens: torch.Tensor,
) -> SdpaGroup:
    """Returns where the rows and the keys of these requests are. Each request has q_len new tokens.

    On the device are the numbers of the requests, their first rows and their lengths, all [num_reqs] int64.
    """
    device, block_size, seq_lens = lens.device, metadata.block_size, [metadata.seq_lens[i] for i in requests]
    lens = lens.unsqueeze(1)  # [num_reqs, 1]
    positions = torch.arange(max(seq_lens), device=device)  # [max_len]
    # Padding repeats the last token of the sequence itself. The mask gives it the weight 0, but 0 * NaN is NaN: slots
    # behind the end of a sequence may hold anything and must not even be multiplied by zero.
    own = torch.minimum(positions, lens - 1)  # [num_reqs, max_len]
    table = metadata.block_table.index_select(0, numbers)  # [num_reqs, max_blocks_per_req]
    block_ids = table.gather(1, own // block_size).long()  # [num_reqs, max_len]
    mask, is_causal = visible(q_len, seq_lens, positions, lens)
    rows = first_rows.unsqueeze(1) + torch.arange(q_len, device=device)  # [num_reqs, q_len]
    return SdpaGroup(rows, (block_ids * block_size + own % block_size).flatten(), mask, is_causal)


def visible(
    q_len: int, seq_lens: list[int], positions: torch.Tensor, lens: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Returns (mask, is_causal) of a group. The mask is True where a query may see a key, and None if none is needed.

    `is_causal=True` saves the mask and half of the work, but it aligns the triangle with the *top left* corner, as if
    the first query were the first token of the sequence. That is right only for a whole prompt. For 2 new tokens of a
    sequence of 4:

                is_causal     wanted
                x . . .       x x x .
                x x . .       x x x x
    """
    same = all(length == seq_lens[0] for length in seq_lens)
    if same and q_len == 1:
        return None, False
    if same and q_len == seq_lens[0]:
        return None, True
    query_positions = lens - q_len + torch.arange(q_len, device=lens.device)  # [num_reqs, q_len]
    return (positions <= query_positions.unsqueeze(-1)).unsqueeze(1), False  # [num_reqs, 1, q_len, max_len]


def _bucket(seq_len: int) -> int:
    """Returns the power of two that holds `seq_len`, so at most half of a group's keys are padding. E.g. 300 -> 512."""
    return max(_SMALLEST_BUCKET, 1 << (seq_len - 1).bit_length())
