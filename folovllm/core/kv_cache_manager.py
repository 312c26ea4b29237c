"""KVCacheManager: gives requests the blocks they need, and takes them back.

Milestone: M1 (one page per request), M3 (block tables that grow). vLLM counterpart: vllm/v1/core/kv_cache_manager.py.
Left out: several KV groups, KV connectors, lookahead for drafts (the argument is there).

Row 1: no torch. The contiguous cache of M1 is this same code with block_size = max_model_len.
"""

from collections.abc import Sequence

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock, cdiv
from folovllm.request import Request


class KVCacheManager:
    """Block tables of all requests that hold blocks: request id -> its blocks, in the order of its tokens."""

    def __init__(self, block_size: int, max_model_len: int, block_pool: BlockPool) -> None:
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.block_pool = block_pool
        self.req_to_blocks: dict[str, list[KVCacheBlock]] = {}

    @property
    def usage(self) -> float:
        return self.block_pool.usage

    def get_computed_blocks(self, request: Request) -> tuple[list[KVCacheBlock], int]:
        """Cached blocks of the longest known prefix, and how many tokens they hold. Touches nothing.

        A request that wants prompt_logprobs must compute its whole prompt, so it never reads the cache.
        """
        if request.sampling_params.prompt_logprobs is not None:
            return [], 0
        blocks = self.block_pool.prefix_index.match(request)
        return blocks, len(blocks) * self.block_size

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock] = (),
        num_lookahead_tokens: int = 0,
        full_sequence_must_fit: bool = False,
    ) -> list[KVCacheBlock] | None:
        """Blocks for `num_new_tokens` more tokens of `request`, or None, with nothing changed, if they do not fit.

        Returns only the newly taken blocks: an empty list is success, None is failure. E.g. block_size 4, 6 tokens
        computed (2 blocks owned): 2 more tokens need no block, a third needs one.

        `full_sequence_must_fit`: refuse unless the whole known sequence would fit, not only this step's part.
        """
        if num_new_tokens <= 0:
            raise ValueError(f"num_new_tokens must be at least 1, got {num_new_tokens}")
        owned = self.req_to_blocks.get(request.request_id, [])
        assert not (owned and new_computed_blocks), "prefix hits are adopted at admission, when nothing is owned yet"
        num_computed = request.num_computed_tokens + len(new_computed_blocks) * self.block_size
        num_slots = min(num_computed + num_new_tokens + num_lookahead_tokens, self.max_model_len)
        num_held = len(owned) + len(new_computed_blocks)
        # Adopting a hit that nobody holds takes it out of the free queue: it costs a free block too.
        num_evictable_hits = sum(block.ref_cnt == 0 for block in new_computed_blocks)

        def fits(slots: int) -> bool:
            return self._num_new_blocks(slots, num_held) + num_evictable_hits <= self.block_pool.get_num_free_blocks()

        if full_sequence_must_fit and not fits(min(request.num_tokens, self.max_model_len)):
            return None
        if not fits(num_slots):
            return None

        self.block_pool.touch(new_computed_blocks)
        new_blocks = self.block_pool.get_new_blocks(self._num_new_blocks(num_slots, num_held))
        table = self.req_to_blocks.setdefault(request.request_id, [])
        table += [*new_computed_blocks, *new_blocks]
        num_known = min(num_computed + num_new_tokens, request.num_tokens)
        self.block_pool.prefix_index.insert(request, table, num_known // self.block_size)
        return new_blocks

    def free(self, request: Request) -> None:
        """Give back all blocks of `request`; one without blocks is fine.

        In reverse, so that the end of a sequence is reused before its beginning, which others may share.
        """
        self.block_pool.free_blocks(self.req_to_blocks.pop(request.request_id, [])[::-1])

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        """Block table per KV group; there is one group."""
        return ([block.block_id for block in self.req_to_blocks.get(request_id, [])],)

    def num_reserved_slots(self) -> int:
        """Token slots in the blocks that requests hold."""
        return sum(map(len, self.req_to_blocks.values())) * self.block_size

    def check_integrity(self) -> None:
        """Assert that pool and tables agree (linear in the number of blocks: for tests and idle engines)."""
        self.block_pool.check_integrity(self.req_to_blocks.values())

    def _num_new_blocks(self, num_slots: int, num_held: int) -> int:
        return max(cdiv(num_slots, self.block_size) - num_held, 0)
