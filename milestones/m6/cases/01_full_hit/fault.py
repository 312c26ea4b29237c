"""Case 1: the prefix index that the engine of the report ran with. Mend `match`."""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as EngineHashPrefixIndex
from folovllm.core.prefix_index import root_of
from folovllm.request import Request


class HashPrefixIndex(EngineHashPrefixIndex):
    def match(self, request: Request) -> list[KVCacheBlock]:
        """Returns the blocks of the longest known prefix of `request`."""
        hits: list[KVCacheBlock] = []
        parent: bytes | tuple[bytes] = root_of(request)
        for block_hash, tokens in zip(request.block_hashes, request.block_tokens, strict=True):
            holders = self.blocks.get(block_hash)
            if holders is None or self.meaning[block_hash] != (parent, tokens):
                break
            hits.append(next(iter(holders.values())))
            parent = block_hash
        return hits
