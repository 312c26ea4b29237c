"""Case 7, solved: the last holder frees the block."""

from collections.abc import Sequence

from folovllm.core.block_pool import BlockPool as EngineBlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(EngineBlockPool):
    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        """Takes blocks back from a request. `enqueue` gives the free ones their place in the queue."""
        freed = []
        for block in ordered_blocks:
            if block.is_null:
                continue
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        self.enqueue(freed)
