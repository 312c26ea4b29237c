# killed-by: a_gap_ends_the_hit | where those of block 2 belong
"""Goes on behind a block that is not known. The table gets shorter, and every block behind the gap is one too early.

LMCache issue 443 asks about it: when a block in the middle is evicted, those behind it are of no use.
"""

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
                parent = name
                continue
            hits.append(next(iter(self.blocks[name].values())))
            parent = name
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
