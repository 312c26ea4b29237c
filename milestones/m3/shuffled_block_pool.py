"""A part of your own: a block pool that hands out blocks in random order. The tokens must not notice.

Milestone: M3. vLLM counterpart: none. An example of replacing a part (folovllm/parts.py):

    folovllm generate --part core.block_pool=milestones/m3/shuffled_block_pool.py:ShuffledBlockPool "Once upon"
"""

import random
from typing import Any

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock


class ShuffledBlockPool(BlockPool):
    """Like ours, but the free queue is shuffled before every allocation. (Linear: for experiments only.)"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rng = random.Random(0)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        queue = self.free_block_queue
        blocks = queue.popleft_n(queue.num_free_blocks)
        self.rng.shuffle(blocks)
        queue.append_n(blocks)
        return super().get_new_blocks(num_blocks)
