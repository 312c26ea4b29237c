# refused-by: only_what_was_not_computed_is_forgotten | 5 of
"""Forgets the last full block only. A chunk may fill several."""

from folovllm.core.kv_cache_manager import KVCacheManager as EngineKVCacheManager
from folovllm.request import Request


class KVCacheManager(EngineKVCacheManager):
    def preempt(self, request: Request) -> None:
        """Takes all blocks of `request`, which waits again. It may hit them later, if they are still cached then.

        `self._published` has what was published in the step that is being scheduled: request id -> blocks.
        """
        for block in self._published.pop(request.request_id, [])[-1:]:
            self.block_pool.unpublish([block])
        self.free(request)
