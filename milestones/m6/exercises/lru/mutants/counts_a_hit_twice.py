# killed-by: free_cached_blocks_are_counted | touch of 1 again
"""Takes a block off the count of free cached blocks at every hit, also if it was not free.

SGLang issue 35270 is of that kind: shared pages were counted twice, and free + cached did not add up to the pool.
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
