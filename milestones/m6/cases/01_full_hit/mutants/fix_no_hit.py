# refused-by: every_length_around_a_block | took 0 tokens from the cache
"""Takes a full hit for a miss: the whole prompt is computed again (a patch that a reader of nano-vllm #144 may try)."""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as EngineHashPrefixIndex
from folovllm.core.prefix_index import root_of
from folovllm.request import Request


class HashPrefixIndex(EngineHashPrefixIndex):
    def match(self, request: Request) -> list[KVCacheBlock]:
        hits: list[KVCacheBlock] = []
        parent: bytes | tuple[bytes] = root_of(request)
        for block_hash, tokens in zip(request.block_hashes, request.block_tokens, strict=True):
            holders = self.blocks.get(block_hash)
            if holders is None or self.meaning[block_hash] != (parent, tokens):
                break
            hits.append(next(iter(holders.values())))
            parent = block_hash
        return [] if len(hits) * self.block_size == request.num_tokens else hits
