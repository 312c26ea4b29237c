# killed-by: freed_blocks_are_reused_in_the_given_order | the end of a sequence must be
"""Gives the blocks to enqueue one by one. Each goes before the last, so the beginning of a sequence is reused first.

LMCache issue 443 asks what happens if an early block of a prompt is evicted before the later ones: those are still in
memory, and no request can use them. vLLM frees in reverse for that reason (its RFC 2614, third rule of eviction).
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
        for block in ordered_blocks:
            if block.is_null:
                continue
            assert block.ref_cnt > 0, f"{block} freed twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self.enqueue([block])
