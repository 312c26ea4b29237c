# killed-by: one_token_is_left_to_compute | a query of no token
"""Hits every token of a prompt that is known completely. The step then has a query of length zero and no logits.

nano-vllm issue 144 (second half) and pull 199: flash attention refused seqlen_q = 0.
"""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.core.prefix_index import num_published, root_of
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def match(self, request: Request) -> list[KVCacheBlock]:
        hits, parent = [], root_of(request)
        for i in range(request.num_tokens // self.block_size):
            name = request.block_hashes[i]
            if name not in self.blocks or self.meaning[name] != (parent, request.block_tokens[i]):
                break
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
