"""Case 8, solved: look up again in every step."""

from folovllm.core.kv_cache_manager import KVCacheManager as EngineKVCacheManager
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.request import Request


class KVCacheManager(EngineKVCacheManager):
    def get_computed_blocks(self, request: Request) -> tuple[list[KVCacheBlock], int]:
        """Returns the cached blocks of the longest known prefix, and how many tokens they give.

        The answer is true until the next allocation, so it is not kept.
        """
        if request.skip_reading_prefix_cache:
            return [], 0
        hits = self.block_pool.prefix_index.match(request)
        return hits, len(hits) * self.block_size
