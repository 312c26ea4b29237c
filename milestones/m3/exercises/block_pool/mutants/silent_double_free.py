# killed-by: a_second_free_is_refused | freed twice without an error
"""Passes over a block that is free already. The bug that freed it twice lives on, and takes blocks from others.

vLLM issue 1584: when beam search ran into "Double free!", a user replaced the error by a return, and it "works".
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
            if block.is_null or block.ref_cnt == 0:
                continue
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        self.enqueue(freed)
