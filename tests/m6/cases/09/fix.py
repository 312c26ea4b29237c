"""Case 9, solved: what this step published for the request is taken back."""

from folovllm.core.kv_cache_manager import KVCacheManager as EngineKVCacheManager
from folovllm.request import Request


class KVCacheManager(EngineKVCacheManager):
    def preempt(self, request: Request) -> None:
        """Takes all blocks of `request`, which waits again. It may hit them later, if they are still cached then.

        `self._published` has what was published in the step that is being scheduled: request id -> blocks.
        """
        self.block_pool.unpublish(self._published.pop(request.request_id, []))
        self.free(request)
