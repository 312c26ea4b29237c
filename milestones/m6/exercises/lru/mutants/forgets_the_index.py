# killed-by: the_index_forgets_what_is_evicted | serves
"""Takes the hash from the block and does not tell the prefix index, which goes on naming it.

nano-vllm issue 163: the old entry stayed in hash_to_block_id when the block was reused.
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
        block.block_hash = None
        self.num_free_cached_blocks -= 1
