# killed-by: a_cached_block_is_evicted_before_it_is_reused | still serves it under its old name
"""Hands out a cached block without telling the prefix index, which goes on serving it under its old name.

nano-vllm issue 163: the map from hashes to blocks kept the old name of a block that was being filled anew.
"""

from collections.abc import Sequence

from folovllm.core.block_pool import BlockPool as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(Reference):
    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        if num_blocks > self.get_num_free_blocks():
            raise ValueError(f"{num_blocks} blocks asked for, {self.get_num_free_blocks()} free")
        blocks = self.free_block_queue.popleft_n(num_blocks)
        for block in blocks:
            block.ref_cnt = 1
        return blocks

    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        freed = []
        for block in ordered_blocks:
            if block.is_null:
                continue
            assert block.ref_cnt > 0, f"{block} freed twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        self.enqueue(freed)
