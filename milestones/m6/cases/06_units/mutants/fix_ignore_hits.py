# refused-by: a_hit_takes_a_free_block | Cannot get
"""Leaves the hits out. A request is then admitted whose hits are the last free blocks, and the pool runs dry."""

from collections.abc import Sequence

from folovllm.core.kv_cache_manager import KVCacheManager as EngineKVCacheManager
from folovllm.core.kv_cache_utils import KVCacheBlock


class KVCacheManager(EngineKVCacheManager):
    def fits(self, num_slots: int, num_held: int, hits: Sequence[KVCacheBlock]) -> bool:
        """Whether the pool has enough free blocks for `num_slots` slots in all, of which `num_held` blocks are there.

        A cached block that no request holds is one of the free blocks, until the request that hits it takes it.
        """
        num_new = self.num_new_blocks(num_slots, num_held)
        num_evictable = 0
        return num_new + num_evictable <= self.block_pool.get_num_free_blocks()
