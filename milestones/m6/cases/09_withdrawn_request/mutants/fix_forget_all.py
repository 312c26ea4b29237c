# refused-by: only_what_was_not_computed_is_forgotten | 0 of
"""Forgets all blocks of the request, also those that earlier steps have computed."""

from folovllm.core.kv_cache_manager import KVCacheManager as EngineKVCacheManager
from folovllm.request import Request


class KVCacheManager(EngineKVCacheManager):
    def preempt(self, request: Request) -> None:
        """Takes all blocks of `request`, which waits again. It may hit them later, if they are still cached then.

        `self._published` has what was published in the step that is being scheduled: request id -> blocks.
        """
        self.block_pool.unpublish(self.req_to_blocks[request.request_id])
        self.free(request)
