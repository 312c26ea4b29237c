# killed-by: a_free_hit_costs_a_block | 2 + 3 new > 4
"""Compares the free blocks with the new ones alone. Adopting free hits then uses up blocks that were promised.

The review of vLLM pull 11565 describes it: 4 blocks required, 5 free, but 2 of the 5 are the request's own hits.
"""

from collections.abc import Sequence

from folovllm.core.kv_cache_manager import KVCacheManager as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.request import Request


class KVCacheManager(Reference):
    def num_new_blocks(self, num_slots: int, num_held: int) -> int:
        return max(-(-num_slots // self.block_size) - num_held, 0)

    def fits(self, num_slots: int, num_held: int, hits: Sequence[KVCacheBlock]) -> bool:
        return self.num_new_blocks(num_slots, num_held) <= self.block_pool.get_num_free_blocks()

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock] = (),
        full_sequence_must_fit: bool = False,
        num_new_computed_tokens: int | None = None,
    ) -> list[KVCacheBlock] | None:
        if num_new_tokens < 1:
            raise ValueError(f"{num_new_tokens} tokens")
        hits, num_hit_tokens = new_computed_blocks, num_new_computed_tokens
        if num_hit_tokens is None:
            num_hit_tokens = len(hits) * self.block_size
        num_held = len(self.req_to_blocks.get(request.request_id, [])) + num_hit_tokens // self.block_size
        end = request.num_computed_tokens + num_hit_tokens + num_new_tokens
        num_slots = min(end, self.max_model_len)
        must_fit = num_slots
        if full_sequence_must_fit:
            must_fit = max(num_slots, min(request.num_tokens, self.max_model_len))
        if not self.fits(must_fit, num_held, hits):
            return None
        table = self.req_to_blocks.setdefault(request.request_id, [])
        if hits:
            self._adopt(request, table, hits, num_held)
        new_blocks = self.block_pool.get_new_blocks(self.num_new_blocks(num_slots, num_held))
        table += new_blocks
        self._copy(hits[num_held:], new_blocks)
        self._publish(request, table, min(end, request.num_tokens) // self.block_size)
        return new_blocks

    def free(self, request: Request) -> None:
        self._num_full.pop(request.request_id, None)
        self.block_pool.free_blocks(self.req_to_blocks.pop(request.request_id, [])[::-1])
