"""A prefix index and the blocks that go into it, without a pool or a scheduler: what the checks of M6 look at.

Milestone: M6. vLLM counterpart: none; its tests of prefix caching build a whole KV cache manager.
"""

from collections.abc import Sequence
from typing import Any

from folovllm.config import CacheConfig
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.learn.toy_engine import make_request
from folovllm.request import Request


class Shelf:
    """An index of blocks of 4 and the blocks that go into it, which are handed out as 1, 2, 3, ...

    `cls` is a class of prefix index. With `weak_hash` a hash index has three names for everything.
    """

    def __init__(self, cls: Any, weak_hash: bool = False) -> None:
        self.index = cls(CacheConfig(block_size=4, enable_prefix_caching=True))
        if weak_hash:
            self.index.hasher.hash_function = lambda data: bytes([sum(data) % 3])
        self.blocks = [KVCacheBlock(i) for i in range(120)]
        self.num_used = 1

    def request(self, tokens: Sequence[int], salt: str | None = None) -> Request:
        request = make_request("r", tokens, cache_salt=salt)
        request.attach_block_hasher(self.index.hash_new_blocks)
        return request

    def compute(self, tokens: Sequence[int], salt: str | None = None, hits: Sequence[int] = ()) -> list[int]:
        """A request computes all its tokens behind the blocks `hits`. Returns the block ids of its full blocks."""
        n = len(tokens) // 4
        table = [self.blocks[i] for i in hits]
        table += self.blocks[self.num_used : self.num_used + n - len(hits)]
        self.num_used += n - len(hits)
        self.index.insert(self.request(tokens, salt), table, n)
        return [block.block_id for block in table]

    def hits(self, tokens: Sequence[int], salt: str | None = None) -> list[int]:
        return [block.block_id for block in self.index.match(self.request(tokens, salt))]

    def evict(self, block_id: int) -> None:
        self.index.remove(self.blocks[block_id])
        self.blocks[block_id].block_hash = None

    def check_integrity(self, story: str) -> None:
        try:
            self.index.check_integrity(self.blocks)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{story}: the records of the index disagree: {error}") from None
