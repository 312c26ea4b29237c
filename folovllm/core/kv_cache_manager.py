"""KVCacheManager: gives requests the blocks they need, and takes them back.

Milestone: M1 (one page per request), M3 (block tables that grow), M6 (shared and copied blocks), M9 (steps in flight).
vLLM counterpart: vllm/v1/core/kv_cache_manager.py.
Left out: several KV groups, KV connectors, slots for draft tokens.

Row 1: no torch. The contiguous cache of M1 is this same code with block_size = max_model_len.

Several steps in flight (M9). The manager may hand out, share and copy a block while earlier steps that use it have not
run yet. That is right because every rank of a pipeline runs the steps in the order in which they were scheduled, and
each layer in the order copies, writes, reads. The K/V of a layer are on the ranks of one stage, so whatever step S1
does with a block comes before whatever S2 does with it. E.g. S1 is in flight, and S2 is being scheduled:

    S1 fills block 7 and publishes it; S2 hits it      S2 reads it after S1 has written it.
    S1 fills block 7; S2 copies its first half         S2 copies it after S1 has written it.
    S1 copies block 7; S2 gets it for other tokens     S2 writes it after S1 has copied it.
    S1 writes block 7; its request is aborted or       S2 writes it after S1 has written and read it. The other
    preempted, and S2 gets block 7                     requests of S1 do not hold block 7, or it would not be free.

So no block is held back for the steps in flight. An exception breaks the order: if S1 fails, S2 has read what is not
there. So all steps that are in flight when one fails are undone with it, and the cache is made anew.
"""

from collections import deque
from collections.abc import Sequence

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock, PrefixCacheStats
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.request import Request
from folovllm.utils import cdiv


class KVCacheManager:
    """Block tables of all requests that hold blocks: request id -> its blocks, in the order of its tokens."""

    def __init__(
        self, block_size: int, max_model_len: int, block_pool: BlockPool, partial_block_hits: bool = False
    ) -> None:
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.block_pool = block_pool
        self.partial_block_hits = partial_block_hits
        self.req_to_blocks: dict[str, list[KVCacheBlock]] = {}
        self._num_full: dict[str, int] = {}  # leading blocks of a table that were published, or hit
        self.prefix_cache_stats = PrefixCacheStats()
        # These belong to the step that is being scheduled, and with one step at a time until it has run. Its blocks are
        # published already, so that requests of the same step share them; until the step has run they hold nothing.
        self._published: dict[str, list[KVCacheBlock]] = {}  # by the request that computes them
        self._block_copies: list[tuple[int, int]] = []
        self._pinned: list[KVCacheBlock] = []  # sources of copies
        self._in_flight: deque[dict[str, list[KVCacheBlock]]] = deque()  # what each step in flight has published

    @property
    def usage(self) -> float:
        return self.block_pool.usage

    # ---- prefix hits

    def add_request(self, request: Request) -> None:
        """Lets the prefix index name the full blocks of a new request."""
        request.attach_block_hasher(self.block_pool.prefix_index.hash_new_blocks)

    def get_computed_blocks(self, request: Request) -> tuple[list[KVCacheBlock], int]:
        """Returns the cached blocks of the longest known prefix, and how many tokens they give. Changes nothing.

        E.g. blocks of 4: ([b3, b7], 8) are two whole blocks. ([b3, b7, b5], 9): b5 only begins like the third block of
        `request`; its first token will be copied. A request that wants prompt_logprobs never reads the cache.
        """
        if request.skip_reading_prefix_cache:
            return [], 0
        hits = self.block_pool.prefix_index.match(request)
        source, length = self._partial_hit(request, hits) if self.partial_block_hits else (None, 0)
        return [*hits, *([source] if source else [])], len(hits) * self.block_size + length

    def _partial_hit(self, request: Request, hits: list[KVCacheBlock]) -> tuple[KVCacheBlock | None, int]:
        """The block whose beginning can be copied. Copies run before any write, so this step's blocks cannot be it.

        The blocks of a step in flight can, because that step writes them before this one copies.
        """
        not_yet_computed = {block.block_id for blocks in self._published.values() for block in blocks}
        source, length = self.block_pool.prefix_index.match_partial(request, hits, not_yet_computed)
        # The source is held in addition to the blocks that the request needs. If the pool has no block more than those,
        # a request that insisted on the hit would wait forever.
        if source and not self.fits(request.num_tokens, len(hits), [*hits, source]):
            return None, 0
        return source, length

    def record_admission(self, request: Request, num_hit_tokens: int) -> None:
        """Counts a lookup once, when its request is admitted: a head of the queue that must wait looks up every step.

        With prefix caching off nothing is looked up, so nothing is counted.
        """
        if request.skip_reading_prefix_cache or type(self.block_pool.prefix_index) is NullPrefixIndex:
            return
        was_admitted_before = request.num_cached_tokens >= 0
        self.prefix_cache_stats.record(request.num_tokens, num_hit_tokens, is_resumed=was_admitted_before)

    # ---- blocks

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock] = (),
        full_sequence_must_fit: bool = False,
        num_new_computed_tokens: int | None = None,
    ) -> list[KVCacheBlock] | None:
        """Blocks for `num_new_tokens` more tokens of `request`, or None, with nothing changed, if they do not fit.

        Returns only the newly taken blocks: an empty list is success, None is failure. E.g. block_size 4, 6 tokens
        computed (2 blocks owned): 2 more tokens need no block, a third needs one.

        `new_computed_blocks` and `num_new_computed_tokens` (default: all their tokens) are what `get_computed_blocks`
        answered. `full_sequence_must_fit`: refuse unless the whole known sequence would fit, not only this step's part.
        """
        if num_new_tokens <= 0:
            raise ValueError(f"num_new_tokens must be at least 1, got {num_new_tokens}")
        owned = self.req_to_blocks.get(request.request_id, [])
        assert not (owned and new_computed_blocks), "prefix hits are adopted at admission, when nothing is owned yet"
        hits, num_hit_tokens = new_computed_blocks, num_new_computed_tokens
        if num_hit_tokens is None:
            num_hit_tokens = len(hits) * self.block_size
        num_held = len(owned) + num_hit_tokens // self.block_size  # a block hit in part is copied, not held
        num_computed = request.num_computed_tokens + num_hit_tokens
        num_slots = min(num_computed + num_new_tokens, self.max_model_len)
        must_fit = max(num_slots, min(request.num_tokens, self.max_model_len)) if full_sequence_must_fit else num_slots
        if not self.fits(must_fit, num_held, hits):
            return None

        table = self.req_to_blocks.setdefault(request.request_id, [])
        if hits:
            self._adopt(request, table, hits, num_held)
        new_blocks = self.block_pool.get_new_blocks(self.num_new_blocks(num_slots, num_held))
        table += new_blocks
        self._copy(hits[num_held:], new_blocks)
        self._publish(request, table, min(num_computed + num_new_tokens, request.num_tokens) // self.block_size)
        return new_blocks

    def fits(self, num_slots: int, num_held: int, hits: Sequence[KVCacheBlock]) -> bool:
        """Whether the pool has enough free blocks for `num_slots` slots in all, of which `num_held` blocks are there.

        A hit that no request holds is itself one of the free blocks, until it is adopted.
        """
        num_evictable_hits = sum(block.ref_cnt == 0 for block in hits) if hits else 0
        needed = self.num_new_blocks(num_slots, num_held) + num_evictable_hits
        return needed <= self.block_pool.get_num_free_blocks()

    def num_new_blocks(self, num_slots: int, num_held: int) -> int:
        """Returns how many blocks `num_slots` slots need beyond the `num_held` blocks that are there."""
        return max(cdiv(num_slots, self.block_size) - num_held, 0)

    def _adopt(self, request: Request, table: list[KVCacheBlock], hits: Sequence[KVCacheBlock], num_held: int) -> None:
        """Begins the table of `request` with the hits that it shares, and holds those too that it will only copy."""
        self.block_pool.touch(hits)
        table += hits[:num_held]
        self._num_full[request.request_id] = num_held

    def _copy(self, sources: Sequence[KVCacheBlock], new_blocks: Sequence[KVCacheBlock]) -> None:
        """Copy on write: the request continues in its own copy of a block that others hold or may hit.

        The source was touched. It stays pinned until the copy has run, so that the pool does not hand it out before.
        """
        for source, destination in zip(sources, new_blocks, strict=False):  # at most one
            self._block_copies.append((source.block_id, destination.block_id))
            self._pinned.append(source)

    def _publish(self, request: Request, table: list[KVCacheBlock], num_full_blocks: int) -> None:
        """Publishes full blocks of known tokens, never of drafts: they can be hit from now on. Notes which are new."""
        first = self._num_full.get(request.request_id, 0)
        if num_full_blocks <= first:
            return
        self._num_full[request.request_id] = num_full_blocks
        self.block_pool.prefix_index.insert(request, table, num_full_blocks)
        published = [block for block in table[first:num_full_blocks] if block.block_hash is not None]
        self._published.setdefault(request.request_id, []).extend(published)

    def take_block_copies(self) -> list[tuple[int, int]]:
        """(source, destination) ids of the copies that the next step must make before it writes anything."""
        copies, self._block_copies = self._block_copies, []
        return copies

    def free(self, request: Request) -> None:
        """Gives back all blocks of `request`, if it has any.

        They are freed in reverse: the end of a sequence is reused before its beginning, which others may share.
        """
        self._num_full.pop(request.request_id, None)
        self.block_pool.free_blocks(self.req_to_blocks.pop(request.request_id, [])[::-1])

    def preempt(self, request: Request) -> None:
        """Like `free`. What `request` published in the step being scheduled is unpublished: it will not be computed.

        What it published in steps in flight stays: these steps run, with the request or without it.
        """
        self.block_pool.unpublish(self._published.pop(request.request_id, []))
        self.free(request)

    def start_step(self) -> None:
        """Called in a pipeline, when a step is scheduled and another one may follow before it has run.

        What it published is kept apart, in case it does not run. The sources of its copies are free again.
        """
        self._in_flight.append(self._published)
        self._published = {}
        self._unpin()

    def end_step(self, has_run: bool) -> None:
        """Ends a scheduled step. If it has not run, what its blocks hold is unknown: they are unpublished.

        Of several steps in flight, a step that has run is the oldest, and one that has not is the latest. E.g. S1 fills
        block 3, and S2 block 5. After `end_step(True)`, which is about S1, block 3 stays published whatever becomes of
        S2. If S2 fails, `end_step(False)` unpublishes block 5 alone.
        """
        published = self._published
        if self._in_flight:
            published = self._in_flight.popleft() if has_run else self._in_flight.pop()
        if not has_run:
            for blocks in published.values():
                self.block_pool.unpublish(blocks)
        self._published = {}
        self._unpin()

    def _unpin(self) -> None:
        self.block_pool.free_blocks(self._pinned)
        self._pinned = []

    def reset_prefix_cache(self) -> bool:
        """Forgets every cached block. Returns False, and changes nothing, while a request holds a block."""
        return self.block_pool.reset_prefix_cache()

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        """Block table per KV group; there is one group."""
        return ([block.block_id for block in self.req_to_blocks.get(request_id, [])],)

    def num_reserved_slots(self) -> int:
        """Token slots in the blocks that requests hold."""
        return sum(map(len, self.req_to_blocks.values())) * self.block_size

    def check_integrity(self) -> None:
        """Asserts that pool and tables agree. It is linear in the blocks, so it is for tests and idle engines."""
        self.block_pool.check_integrity([*self.req_to_blocks.values(), self._pinned])
