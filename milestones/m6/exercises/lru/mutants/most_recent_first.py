# killed-by: the_worthless_first_the_cached_last | reused last
"""Puts every freed block at the head: the most recently used block is evicted first, and the cache never warms up.

It is the rule for memory without a cache (reuse what is warm), applied to blocks that can be hit.
"""

from collections.abc import Iterable, Sequence

from folovllm.core.block_pool import BlockPool as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(Reference):
    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self.free_block_queue.remove(block)
                self.num_free_cached_blocks -= block.block_hash is not None
            block.ref_cnt += 1

    def enqueue(self, freed: Sequence[KVCacheBlock]) -> None:
        self.num_free_cached_blocks += sum(block.block_hash is not None for block in freed)
        self.free_block_queue.prepend_n(list(freed))

    def evict(self, block: KVCacheBlock) -> None:
        self.prefix_index.remove(block)
        block.block_hash = None
        self.num_free_cached_blocks -= 1
