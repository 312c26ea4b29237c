r"""torch_flash: FlashAttention in plain torch, to be read. Tiles, and a softmax that never sees its whole row.

Milestone: M4. vLLM counterpart: the flash-attn kernels under vllm/v1/attention/backends/flash_attn.py.
Sources: Dao et al. 2022 (FlashAttention, algorithm 1), Dao 2023 (FlashAttention-2, section 3.1), Milakov and Gimelshein
2018 (online softmax), Dao et al. 2023 (Flash-Decoding, for `merge_partials`).

torch_naive writes the scores of a sequence down as one matrix [queries, keys]. At 8,192 tokens and 9 heads in fp32 that
is 2.4 GB, written, read by softmax, written and read again. Here only one tile of it exists at a time:

                          keys, BLOCK_KV at a time, found through the block table
                          0         BLOCK_KV  2*BLOCK_KV 3*BLOCK_KV   seq_len
                          +---------+---------+---------+---------+
      q_len new tokens,   |   all   |   all   | \       |    -    |    "all"  every query sees every key: no mask
      BLOCK_Q at a time   |         |         |   \     |         |    "\"    the diagonal passes through: mask
      (the *last* q_len   +---------+---------+-----\---+---------+    "-"    every key is in the future: never read
      positions)          |   all   |   all   |   all   | \       |
                          |         |         |         |   \     |
                          +---------+---------+---------+-----\---+
                            ----- one row of tiles, left to right ----->   carrying (m, l, O) per query

A real kernel keeps the tile in on-chip memory; torch keeps it in a tensor that is small and stays in the processor's
cache. The numbers that flow are the same.

**The softmax.** For one query with scores s_0 .. s_n-1, softmax needs max(s) before the first exp, and the sum of all
exps before the first division. But a partial answer can be corrected later. After some of the keys hold

    m = max of the scores seen        l = sum exp(s_j - m)        O = sum exp(s_j - m) * v_j

When a tile brings a larger maximum m', the old terms carry exp(-m) and should carry exp(-m'). One factor mends all:

    exp(s_j - m') = exp(s_j - m) * exp(m - m')

so l and O are multiplied by exp(m - m') and the tile's own terms added. In the end O / l is the answer, exactly. E.g.
scores [1, 3] then [5], values [10, 20] then [30]:

    after tile 0   m = 3   l = e^-2 + 1 = 1.135             O = 10 e^-2 + 20 = 21.353
    after tile 1   m = 5   l = 1.135 e^-2 + 1 = 1.154       O = 21.353 e^-2 + 30 = 32.890      O / l = 28.509
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from folovllm.attention.backend import AttentionMetadata, sequence_slots
from folovllm.attention.backends.block_major import BlockMajorBackend
from folovllm.utils import cdiv

# Stands for "no key seen yet". A true -inf would give exp(-inf - -inf) = NaN for a query that sees nothing of a tile.
LOWEST = torch.finfo(torch.float32).min


class SoftmaxState(NamedTuple):
    """The (m, l, O) of every query of a tile, over the keys seen so far, in fp32."""

    row_max: torch.Tensor  # [num_kv_heads, group * num_rows, 1] m: the largest score
    row_sum: torch.Tensor  # [num_kv_heads, group * num_rows, 1] l: the sum of exp(score - m)
    acc: torch.Tensor  # [num_kv_heads, group * num_rows, head_size] O: the sum of exp(score - m) * value


class TorchFlashBackend(BlockMajorBackend):
    """Computes attention tile by tile, one request after the other.

    The methods stand in the order in which they call each other: from the flat batch down to one tile.
    """

    name = "torch_flash"

    # The tiles of a kernel hold 64 to 128 rows, which is what fits into on-chip memory. Here each tile costs a dozen
    # calls into torch, and larger tiles spread that cost.
    BLOCK_Q = 128
    BLOCK_KV = 256
    # The parts that the keys of a query tile are cut into. More than one part gives no speed here, where nothing runs
    # in parallel; it shows that the parts can be merged.
    NUM_SPLITS = 1

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Computes the slots of each request's tokens. A kernel looks up each block on its way; torch is faster in
        bulk.
        """
        metadata.prepared = [
            sequence_slots(metadata.block_table[i], length, metadata.block_size)
            for i, length in enumerate(metadata.seq_lens)
        ]

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        by_slot = self.by_slot(kv_cache)
        output = torch.empty_like(query)  # [num_tokens, num_heads, head_size]
        start = metadata.query_start_loc
        for i, slots in enumerate(metadata.prepared):
            for first in range(start[i], start[i + 1], self.BLOCK_Q):
                rows = slice(first, min(first + self.BLOCK_Q, start[i + 1]))
                # The new tokens are the last of the sequence: a row n rows before the end is n tokens before the end.
                position = metadata.seq_lens[i] - (start[i + 1] - first)
                output[rows] = self.attend_query_tile(query[rows], by_slot, slots, position)
        return output

    def attend_query_tile(
        self, query: torch.Tensor, by_slot: torch.Tensor, slots: torch.Tensor, position: int
    ) -> torch.Tensor:
        """Returns the attention of one tile of queries, in the shape of `query`.

        `query` is [num_rows, num_heads, head_size], and its first row is at `position` of the sequence.
        """
        last = position + query.shape[0]
        # Causal skipping: keys after the tile's last query are cut off here and never read.
        q = group_queries(query.float() * self.spec.scale, self.spec.num_kv_heads)
        out, _ = self.attend_split(q, by_slot, slots[:last], position, query.shape[0])
        return ungroup_queries(out, query.shape[0])

    def attend_split(
        self, q: torch.Tensor, by_slot: torch.Tensor, slots: torch.Tensor, position: int, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes one row of tiles with the keys cut into at most NUM_SPLITS parts, each attended to on its own.

        This is split-KV. A decode step has one query per sequence, so it has one row of tiles and nothing to run in
        parallel. A GPU kernel therefore splits the *keys*: each unit takes a part, and the partial results are merged.
        Arguments and results are those of `attend_tiles`.
        """
        size = cdiv(slots.shape[0], self.NUM_SPLITS)
        parts = [
            self.attend_tiles(q, by_slot, slots[first : first + size], position, num_rows, first)
            for first in range(0, slots.shape[0], size)
        ]
        return parts[0] if len(parts) == 1 else self.merge_partials(*zip(*parts, strict=True))

    def attend_tiles(
        self,
        q: torch.Tensor,
        by_slot: torch.Tensor,
        slots: torch.Tensor,
        position: int,
        num_rows: int,
        first_key: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes one row of tiles: the queries `q` over the keys in `slots`, one tile after the other.

            q         [num_kv_heads, group * num_rows, head_size], fp32, scaled; row r of each head is at position + r
            by_slot   [2, num_slots, num_kv_heads, head_size]
            slots     [num_keys]: where the keys at positions first_key, first_key + 1, ... are

        Returns (out, lse). `out` is shaped like `q`, and `lse` [num_kv_heads, group * num_rows] is the log of the sum
        of exp(score). With `lse`, results over different keys can be merged (`merge_partials`). A query that sees no
        key gets out 0 and lse -inf.
        """
        state = self.start_softmax(q)
        for tile_start in range(0, slots.shape[0], self.BLOCK_KV):
            # Only the sequence's own slots are read: the rest of its last block may hold anything.
            tile_slots = slots[tile_start : tile_start + self.BLOCK_KV]  # [tile]
            key, value = by_slot.index_select(1, tile_slots).float()  # [tile, num_kv_heads, head_size]
            scores = torch.bmm(q, key.permute(1, 2, 0))  # [num_kv_heads, group * num_rows, tile]
            self.mask_future(scores, first_key + tile_start, position, num_rows)
            state = self.update_softmax(state, scores, value.transpose(0, 1))
        return self.finish_softmax(state)

    def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
        """Sets to -inf, in place, the scores that a query may not see: those of keys after its own position.

        `scores` is [num_kv_heads, group * num_rows, tile], and the tile's keys are at first_key + 0, 1, ... Most tiles
        end before the first query and need no mask at all. E.g. queries at positions 6 and 7, keys 4 .. 7:

            . . . X
            . . . .
        """
        tile, device = scores.shape[-1], scores.device
        if first_key + tile - 1 <= position:
            return
        key_positions = torch.arange(first_key, first_key + tile, device=device)  # [tile]
        query_positions = torch.arange(position, position + num_rows, device=device).unsqueeze(1)  # [num_rows, 1]
        by_row = scores.view(scores.shape[0], -1, num_rows, tile)  # [num_kv_heads, group, num_rows, tile]
        by_row.masked_fill_(key_positions > query_positions, float("-inf"))

    def start_softmax(self, q: torch.Tensor) -> SoftmaxState:
        """Returns the state of the queries `q` [num_kv_heads, group * num_rows, head_size] before the first key."""
        row_max = torch.full_like(q[..., :1], LOWEST)  # [num_kv_heads, group * num_rows, 1]
        return SoftmaxState(row_max, torch.zeros_like(row_max), torch.zeros_like(q))

    def update_softmax(self, state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
        """Returns the state after one more tile of keys. It may overwrite `scores`, which are not needed afterwards.

        scores   [num_kv_heads, group * num_rows, tile], -inf where a query does not see a key
        value    [num_kv_heads, tile, head_size]
        """
        row_max, row_sum, acc = state
        new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))  # [num_kv_heads, group * num_rows, 1]
        p = scores.sub_(new_max).exp_()  # [num_kv_heads, group * num_rows, tile]: 0 to 1, whatever the scores were
        correction = torch.exp(row_max - new_max)  # [num_kv_heads, group * num_rows, 1]: 1 if the maximum stayed
        row_sum = row_sum * correction + p.sum(dim=-1, keepdim=True)  # [num_kv_heads, group * num_rows, 1]
        acc = torch.baddbmm(acc * correction, p, value)  # acc * correction + p @ value
        return SoftmaxState(new_max, row_sum, acc)

    def finish_softmax(self, state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (out, lse) of `attend_tiles`.

        FlashAttention-2 divides once at the end, not per tile. The sum is at least 1 wherever a key was seen, since the
        largest score contributes exp(0): the clamp only turns 0 / 0 into 0.
        """
        row_max, row_sum, acc = state
        return acc / row_sum.clamp(min=1.0), (row_max + row_sum.log()).squeeze(-1)

    def merge_partials(
        self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes attention over all keys from `out` [..., head_size] and `lse` [...] of parts of the keys.

        It is the correction of the online softmax once more: part i holds the share exp(lse_i - lse) of all the
        weight. Returns (out, lse), so merged parts can be merged again. Parts that saw no key (lse -inf) have no
        weight.
        """
        stacked = torch.stack(list(lses))  # [num_parts, ...]
        lse = torch.logsumexp(stacked, dim=0)  # [...]
        # Where no part saw any key the shares would be exp(-inf - -inf) = NaN.
        shares = (stacked - lse.clamp(min=LOWEST)).exp().unsqueeze(-1)  # [num_parts, ..., 1]
        return (torch.stack(list(outs)) * shares).sum(dim=0), lse


def group_queries(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[num_rows, num_heads, head_size] -> [num_kv_heads, group * num_rows, head_size].

    With grouped-query attention (GQA), the `group` query heads that share a KV head become rows of one matrix, so a
    tile of K and V is read once for all of them and never repeated. E.g. 4 heads on 2 KV heads, rows a and b: KV head 0
    gets [h0a, h0b, h1a, h1b].
    """
    num_rows, num_heads, head_size = query.shape
    grouped = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    return grouped.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_size)


def ungroup_queries(out: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Undoes `group_queries`: [num_kv_heads, group * num_rows, head_size] -> [num_rows, num_heads, head_size]."""
    num_kv_heads, _, head_size = out.shape
    return out.view(num_kv_heads, -1, num_rows, head_size).permute(2, 0, 1, 3).reshape(num_rows, -1, head_size)
