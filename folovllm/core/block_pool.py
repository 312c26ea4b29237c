"""BlockPool: all blocks of the KV cache, how many requests hold each, and which are free.

Milestone: M1 (one page per request), M3 (blocks of 16), M6 (cached blocks). vLLM counterpart:
vllm/v1/core/block_pool.py.

Row 1: no torch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from folovllm.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock
from folovllm.core.prefix_index import NullPrefixIndex, PrefixIndex


class BlockPool:
    """Hands out blocks, counts the references to them, and takes them back.

    Block 0 is the null block: it pads block tables and is never handed out, so `num_blocks - 1` blocks are usable.
    """

    def __init__(
        self, num_blocks: int, prefix_index: PrefixIndex | None = None, free_uncached_first: bool = True
    ) -> None:
        assert num_blocks >= 2, "the null block and at least one more"
        self.num_blocks = num_blocks
        self.blocks = [KVCacheBlock(i) for i in range(num_blocks)]
        self.free_block_queue = FreeKVCacheBlockQueue(self.blocks)
        self.null_block = self.free_block_queue.popleft()
        self.null_block.is_null = True
        self.prefix_index = prefix_index or NullPrefixIndex()
        self.free_uncached_first = free_uncached_first
        self.num_free_cached_blocks = 0  # free blocks that can still be hit

    def get_num_free_blocks(self) -> int:
        return self.free_block_queue.num_free_blocks

    @property
    def usage(self) -> float:
        """The share of the usable blocks that are held, 0..1."""
        return 1.0 - self.get_num_free_blocks() / (self.num_blocks - 1)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Takes `num_blocks` from the head of the free queue. Raises ValueError, with nothing taken, if there are
        fewer.

        A cached block at the head is evicted before it is handed out. This is the only eviction there is.
        """
        if num_blocks > self.get_num_free_blocks():
            raise ValueError(f"Cannot get {num_blocks} free blocks from the pool, it has {self.get_num_free_blocks()}")
        blocks = self.free_block_queue.popleft_n(num_blocks)
        for block in blocks:
            assert block.ref_cnt == 0, f"{block} was free and held"
            if block.block_hash is not None:
                self.evict(block)
            block.ref_cnt = 1
        return blocks

    def evict(self, block: KVCacheBlock) -> None:
        """Makes the prefix index forget a free cached block, because the block is about to hold other tokens."""
        self._forget(block)
        self.num_free_cached_blocks -= 1

    def _forget(self, block: KVCacheBlock) -> None:
        self.prefix_index.remove(block)
        block.block_hash = None

    def unpublish(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Makes the prefix index forget blocks, held or free, because their K/V were never computed. Unpublished ones
        stay as they are.
        """
        for block in blocks:
            if block.block_hash is not None:
                self._forget(block)
                self.num_free_cached_blocks -= block.ref_cnt == 0

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached block. Returns False, with nothing changed, while a request holds a block."""
        if self.get_num_free_blocks() < self.num_blocks - 1:
            return False
        self.unpublish(self.blocks)
        return True

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Adds a reference to cached blocks. Free ones leave the queue, so that they are not reused."""
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                self.free_block_queue.remove(block)
                self.num_free_cached_blocks -= block.block_hash is not None
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        """Drops a reference to each block. A block without references becomes free, and `enqueue` gives it its place.

        The order is kept: of two blocks that are freed here, the first given is reused first.
        """
        freed = []
        for block in ordered_blocks:
            if block.is_null:
                continue
            assert block.ref_cnt > 0, f"{block} freed twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                freed.append(block)
        self.enqueue(freed)

    def enqueue(self, freed: Sequence[KVCacheBlock]) -> None:
        """Puts blocks that have just become free into the queue, whose head is reused next.

        A block without a hash can never be hit again. It goes to the head of the queue, because its memory is still in
        the processor's cache. A block with a hash goes to the tail and remains a cache entry until it reaches the head.
        Requests free the end of a sequence before its beginning. So the least recently used blocks are evicted first,
        and of one sequence first the part that the fewest requests can share.
        """
        cached = [block for block in freed if block.block_hash is not None]
        self.num_free_cached_blocks += len(cached)
        if self.free_uncached_first:
            self.free_block_queue.prepend_n([block for block in freed if block.block_hash is None])
            freed = cached
        self.free_block_queue.append_n(freed)

    def check_integrity(self, block_tables: Iterable[Sequence[KVCacheBlock]]) -> None:
        """Asserts that every block is either free or held, and that the counts match `block_tables`, which are all
        tables there are.
        """
        held = Counter(block.block_id for table in block_tables for block in table if not block.is_null)
        free_blocks = self.free_block_queue.get_all_free_blocks()
        free = [block.block_id for block in free_blocks]
        assert self.num_free_cached_blocks == sum(block.block_hash is not None for block in free_blocks)
        assert len(free) == len(set(free)) == self.get_num_free_blocks(), f"free queue is inconsistent: {free}"
        assert not held.keys() & set(free), f"blocks both held and free: {sorted(held.keys() & set(free))}"
        assert len(held) + len(free) == self.num_blocks - 1, f"blocks lost: {len(held)} held + {len(free)} free"
        for block in self.blocks[1:]:
            assert block.ref_cnt == held[block.block_id], f"{block}: {held[block.block_id]} tables hold it"
        self.prefix_index.check_integrity(self.blocks)
