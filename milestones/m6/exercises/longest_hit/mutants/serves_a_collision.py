# killed-by: a_collision_is_no_hit | wrong tokens
"""Trusts that equal names mean equal prefixes, with whatever hash. A collision serves another prompt's cache.

openvino.genai issue 3722: two prompts with the same hash, and the second was answered from the first one's cache.
"""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.core.prefix_index import num_published, root_of
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def match(self, request: Request) -> list[KVCacheBlock]:
        hits = []
        for i in range((request.num_tokens - 1) // self.block_size):
            name = request.block_hashes[i]
            if name not in self.blocks:
                break
            hits.append(next(iter(self.blocks[name].values())))
        return hits

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        first = num_published(blocks, num_full_blocks)
        parent = blocks[first - 1].block_hash if first else root_of(request)
        for i in range(first, num_full_blocks):
            name, meaning = request.block_hashes[i], (parent, request.block_tokens[i])
            if self.meaning.get(name, meaning) != meaning:
                break
            blocks[i].block_hash = name
            self.meaning[name] = meaning
            self.children.setdefault(parent, {})[request.block_tokens[i]] = name
            self.blocks.setdefault(name, {})[blocks[i].block_id] = blocks[i]
            parent = name
