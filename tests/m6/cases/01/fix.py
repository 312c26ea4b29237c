"""Case 1, solved."""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as EngineHashPrefixIndex
from folovllm.core.prefix_index import root_of
from folovllm.request import Request


class HashPrefixIndex(EngineHashPrefixIndex):
    def match(self, request: Request) -> list[KVCacheBlock]:
        """Returns the blocks of the longest known prefix of `request`."""
        hits: list[KVCacheBlock] = []
        parent: bytes | tuple[bytes] = root_of(request)
        for i in range((request.num_tokens - 1) // self.block_size):  # the last token is always computed
            block_hash, tokens = request.block_hashes[i], request.block_tokens[i]
            holders = self.blocks.get(block_hash)
            if holders is None or self.meaning[block_hash] != (parent, tokens):
                break
            hits.append(next(iter(holders.values())))
            parent = block_hash
        return hits
