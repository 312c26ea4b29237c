# killed-by: a_collision_ends_publishing | can never be hit
"""Leaves out the block whose name is taken and publishes those behind it, under a parent that has no name."""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.core.prefix_index import num_published, root_of
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def match(self, request: Request) -> list[KVCacheBlock]:
        hits, parent = [], root_of(request)
        for i in range((request.num_tokens - 1) // self.block_size):
            name = request.block_hashes[i]
            if name not in self.blocks or self.meaning[name] != (parent, request.block_tokens[i]):
                break
            hits.append(next(iter(self.blocks[name].values())))
            parent = name
        return hits

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        for i in range(num_published(blocks, num_full_blocks), num_full_blocks):
            parent = blocks[i - 1].block_hash if i else root_of(request)
            name, meaning = request.block_hashes[i], (parent, request.block_tokens[i])
            if self.meaning.get(name, meaning) != meaning:
                continue
            blocks[i].block_hash = name
            self.meaning[name] = meaning
            self.children.setdefault(parent, {})[request.block_tokens[i]] = name
            self.blocks.setdefault(name, {})[blocks[i].block_id] = blocks[i]
