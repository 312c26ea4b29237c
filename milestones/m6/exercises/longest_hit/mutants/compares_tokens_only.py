# killed-by: the_parent_decides_too | behind another prefix
"""Compares the tokens of each block and not its parent, so two prefixes that end alike are taken for one."""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.core.prefix_index import num_published, root_of
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def match(self, request: Request) -> list[KVCacheBlock]:
        hits = []
        for i in range((request.num_tokens - 1) // self.block_size):
            name = request.block_hashes[i]
            if name not in self.blocks or self.meaning[name][1] != request.block_tokens[i]:
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
