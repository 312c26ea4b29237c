"""Case 10: the prefix index that the engine of the report ran with. Mend `match`, and leave the rest as it is.

The server of the report names a block with 64 bits, this test build with 8.
"""

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
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // self.block_size]:
            holders = self.blocks.get(block_hash)
            if holders is None:
                break
            hits.append(next(iter(holders.values())))
        return hits
