"""What a fix of case 7 must do."""

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.learn.check import Mine, check

VARIANTS = {"an engine that hands out blocks in another order": {"core.block_pool": "checks.py:Backwards"}}


class Backwards(BlockPool):
    """Hands out the block that was freed last, or the one with the highest number."""

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        blocks = self.free_block_queue.popleft_n(self.get_num_free_blocks())
        self.free_block_queue.append_n(blocks[::-1])
        return super().get_new_blocks(num_blocks)


@check("unit", spec="R6.22")
def the_last_holder_frees_a_block(mine: Mine) -> None:
    """A block becomes free when the last of its holders is gone, and not before."""
    pool = mine.cls(5)
    table = pool.get_new_blocks(2)
    pool.touch(table)  # a second holder
    pool.free_blocks(table[::-1])
    free = pool.get_num_free_blocks()
    assert free == 2, f"2 of 4 blocks have two holders: the pool has {free} free after the first is gone, expected 2"
    pool.free_blocks(table[::-1])
    free = pool.get_num_free_blocks()
    assert free == 4, f"both holders are gone: the pool has {free} free, expected 4, or blocks are lost"


@check("unit", spec="R6.22")
def the_order_is_kept(mine: Mine) -> None:
    """Of the blocks that are freed together, the first given is reused first."""
    pool = mine.cls(4)
    table = pool.get_new_blocks(3)
    pool.free_blocks(table[::-1])
    again = [block.block_id for block in pool.get_new_blocks(3)]
    expected = [block.block_id for block in table[::-1]]
    assert again == expected, f"blocks freed in the order {expected} were handed out in the order {again}"
