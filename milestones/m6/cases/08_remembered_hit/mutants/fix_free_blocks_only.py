# refused-by: what_is_gone_is_no_hit | hold another prefix since
"""Drops what is held by a request now. A block that was reused and freed again passes."""

from typing import Any

from folovllm.core.kv_cache_manager import KVCacheManager as EngineKVCacheManager
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.request import Request


class KVCacheManager(EngineKVCacheManager):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.computed: dict[str, tuple[list[KVCacheBlock], int]] = {}

    def get_computed_blocks(self, request: Request) -> tuple[list[KVCacheBlock], int]:
        """Returns the cached blocks of the longest known prefix, and how many tokens they give.

        The head of the queue is looked up in every step until it starts. A long prompt is compared only once.
        """
        if request.skip_reading_prefix_cache:
            return [], 0
        if not self.computed.get(request.request_id, ([], 0))[0]:
            hits = self.block_pool.prefix_index.match(request)
            self.computed[request.request_id] = hits, len(hits) * self.block_size
        hits, _ = self.computed[request.request_id]
        if any(block.ref_cnt > 0 for block in hits):
            hits = []
        return hits, len(hits) * self.block_size

    def free(self, request: Request) -> None:
        self.computed.pop(request.request_id, None)  # if it was preempted, it will be looked up again
        super().free(request)
