# killed-by: a_shared_block_stays_with_its_other_holder | one of two holders freed block 1
"""Frees a block for all when one holder gives it back. The other holder's keys and values are soon overwritten.

mini-sglang pull 142: the table of a running request named pages that were in the free pool again.
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
            if block.block_hash is not None:
                self.evict(block)
            block.ref_cnt = 1
        return blocks

    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        freed = []
        for block in ordered_blocks:
            if block.is_null:
                continue
            assert block.ref_cnt > 0, f"{block} freed twice"
            block.ref_cnt = 0
            freed.append(block)
        self.enqueue(freed)
