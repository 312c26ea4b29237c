"""The prefix index: which block holds which prefix. Until M6 only its null object, so that nobody asks "is it on?".

Milestone: M6 (the hash chain and the radix tree). vLLM counterpart: BlockHashToBlockMap in vllm/v1/core/block_pool.py.

Row 1: no torch.
"""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.request import Request


class NullPrefixIndex:
    """Prefix caching switched off: every lookup misses, nothing is published, nothing has to be forgotten."""

    def match(self, request: Request) -> list[KVCacheBlock]:
        """Blocks that hold the longest cached prefix of `request`, at most num_tokens - 1 tokens."""
        return []

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        """Publish the first `num_full_blocks` blocks of `request`."""

    def remove(self, block: KVCacheBlock) -> None:
        """`block` is about to be reused for other tokens: forget it."""
