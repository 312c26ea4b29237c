"""m6/lru: which cached block is forgotten first. Your class decides where in the free queue a block goes."""

from collections.abc import Iterable, Sequence

from folovllm.core.block_pool import BlockPool as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock


class BlockPool(Reference):
    """Your pool. get_new_blocks takes from the head of the queue and calls evict; free_blocks calls enqueue."""

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Adds a holder to each block. One that was free leaves the queue. The null block stays where it is."""
        raise NotImplementedError("m6/lru: touch")

    def enqueue(self, freed: Sequence[KVCacheBlock]) -> None:
        """Puts blocks that have just become free into the queue, in the given order.

        Those without a hash go to the head, those with a hash to the tail. If self.free_uncached_first is False, all go
        to the tail.
        """
        raise NotImplementedError("m6/lru: enqueue")

    def evict(self, block: KVCacheBlock) -> None:
        """Makes the prefix index forget `block`, which was free and has a hash. Afterwards it has none."""
        raise NotImplementedError("m6/lru: evict")
