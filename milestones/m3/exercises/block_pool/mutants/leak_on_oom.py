# killed-by: out_of_blocks_changes_nothing | blocks were taken before the check
"""Takes blocks one at a time and finds out on the way that there are too few. Those that it has taken are lost.

Pools that shrink under load have been reported since the first engines, for example in SGLang issue 140 ("KV cache pool
leak detected"); vLLM issue 11562 is the same kind: a change that was made before the check that refused it.
"""

from collections.abc import Sequence

from folovllm.core.block_pool import BlockPool as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(Reference):
    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        blocks = []
        for _ in range(num_blocks):
            block = self.free_block_queue.popleft()  # raises ValueError when the queue is empty
            if block.block_hash is not None:
                self.evict(block)
            block.ref_cnt = 1
            blocks.append(block)
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
