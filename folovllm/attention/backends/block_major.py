"""The KV layout that most backends share: blocks one after the other, and inside a block one token after the other.

Milestone: M1. vLLM counterpart: `FlashAttentionBackend.get_kv_cache_shape` in vllm/v1/attention/backends/flash_attn.py,
and the operator reshape_and_cache_flash.

    kv_cache   [2, num_blocks, block_size, num_kv_heads, head_size]     0 is K, 1 is V

    block            0               1               2
    slot         0  1  2  3      4  5  6  7      8  9 10 11             blocks of 4 tokens

Slots run through all blocks without a gap, so K (or V) is also a table of [num_slots, num_kv_heads, head_size]: a slot
is its row number, whatever the block size is.
"""

import torch

from folovllm.attention.backend import AttentionBackend, AttentionMetadata


class BlockMajorBackend(AttentionBackend):
    """Stores and copies keys and values in this layout. A backend that inherits it adds `forward`."""

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        return (2, num_blocks, self.spec.block_size, self.spec.num_kv_heads, self.spec.head_size)

    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        by_slot = self.by_slot(kv_cache)
        by_slot[0].index_copy_(0, metadata.slot_mapping, key)
        by_slot[1].index_copy_(0, metadata.slot_mapping, value)

    def copy_blocks(self, kv_caches: torch.Tensor, copies: list[tuple[int, int]]) -> None:
        for source, destination in copies:
            kv_caches[:, :, destination].copy_(kv_caches[:, :, source])

    def by_slot(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """Returns a view of the cache as [2, num_slots, num_kv_heads, head_size]."""
        return kv_cache.view(2, -1, self.spec.num_kv_heads, self.spec.head_size)
