"""m3/block_pool: the two methods through which every KV block passes. The reference supplies the rest of the class."""

from collections.abc import Sequence

from folovllm.core.block_pool import BlockPool as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(Reference):
    """Your pool. README.md lists the attributes that you need."""

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Takes `num_blocks` blocks from the head of the free queue, and returns them in that order.

        Each has ref_cnt 1 afterwards. A block with a block_hash goes through self.evict(block) first. If the queue has
        fewer blocks, raises ValueError, and nothing has changed: no block is taken, counted or evicted.
        """
        raise NotImplementedError("m3/block_pool: get_new_blocks")

    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        """Drops one reference to each block, and calls self.enqueue once, with the blocks that became free, in order.

        A block is free when its ref_cnt has become 0. The null block (is_null) is passed over. A block whose ref_cnt
        is 0 already was freed twice: raises AssertionError.
        """
        raise NotImplementedError("m3/block_pool: free_blocks")
