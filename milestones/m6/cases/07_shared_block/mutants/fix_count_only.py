# refused-by: the_last_holder_frees_a_block | 4 free after the first
"""Counts down, and puts the block into the queue at once."""

from collections.abc import Sequence

from folovllm.core.block_pool import BlockPool as EngineBlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(EngineBlockPool):
    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        """Takes blocks back from a request. `enqueue` gives the free ones their place in the queue."""
        freed = []
        for block in ordered_blocks:
            if block.is_null or block.ref_cnt == 0:
                continue
            block.ref_cnt -= 1
            freed.append(block)
        self.enqueue(freed)
