# killed-by: a_hit_block_is_not_evicted | overwritten under its holder
"""Counts the new holder of a hit and leaves the block in the free queue, from where it is handed out again.

mini-sglang pull 52: the node that a request had just matched was not locked, and could be evicted under it.
"""

from collections.abc import Iterable, Sequence

from folovllm.core.block_pool import BlockPool as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(Reference):
    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self.num_free_cached_blocks -= block.block_hash is not None
            block.ref_cnt += 1

    def enqueue(self, freed: Sequence[KVCacheBlock]) -> None:
        cached = [block for block in freed if block.block_hash is not None]
        plain = [block for block in freed if block.block_hash is None]
        self.num_free_cached_blocks += len(cached)
        if self.free_uncached_first:
            self.free_block_queue.prepend_n(plain)
            self.free_block_queue.append_n(cached)
        else:
            self.free_block_queue.append_n(freed)

    def evict(self, block: KVCacheBlock) -> None:
        self.prefix_index.remove(block)
        block.block_hash = None
        self.num_free_cached_blocks -= 1
