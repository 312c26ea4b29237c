# refused-by: what_is_new_is_found | gives [] and 0 tokens
"""Gives a request that has waited no hits at all."""

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
        if request.request_id in self.computed:
            return [], 0
        hits = self.block_pool.prefix_index.match(request)
        self.computed[request.request_id] = hits, len(hits) * self.block_size
        return self.computed[request.request_id]

    def free(self, request: Request) -> None:
        self.computed.pop(request.request_id, None)  # if it was preempted, it will be looked up again
        super().free(request)
