# refused-by: whatever_the_hash | took 8 tokens
"""Compares the tokens of the block and not its parent: the same words at another place are a hit."""

from folovllm.config import CacheConfig
from folovllm.core.block_hash import BlockHasher, root_hash
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as EngineHashPrefixIndex
from folovllm.request import Request


def one_byte(data: bytes) -> bytes:
    return bytes([sum(data) % 256])


class HashPrefixIndex(EngineHashPrefixIndex):
    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self.hasher = BlockHasher(self.block_size, one_byte, root_hash(config.prefix_caching_seed, one_byte))

    def match(self, request: Request) -> list[KVCacheBlock]:
        """Returns the blocks of the longest cached prefix of `request`, which covers at most num_tokens - 1 tokens."""
        hits: list[KVCacheBlock] = []
        for i in range((request.num_tokens - 1) // self.block_size):
            holders = self.blocks.get(request.block_hashes[i])
            if holders is None or self.meaning[request.block_hashes[i]][1] != request.block_tokens[i]:
                break
            hits.append(next(iter(holders.values())))
        return hits
