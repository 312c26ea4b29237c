"""Case 9: the KV cache manager that the engine of the report ran with. Mend `preempt`."""

from folovllm.core.kv_cache_manager import KVCacheManager as EngineKVCacheManager
from folovllm.request import Request


class KVCacheManager(EngineKVCacheManager):
    def preempt(self, request: Request) -> None:
        """Takes all blocks of `request`, which waits again. It may hit them later, if they are still cached then.

        `self._published` has what was published in the step that is being scheduled: request id -> blocks.
        """
        self.free(request)
