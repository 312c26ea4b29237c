# killed-by: nothing_is_remembered_from_an_earlier_lookup | tokens of another request by now
"""Remembers the first answer for each request, so that one that waits is not looked up again in every step.

vLLM issue 18957: how much was cached was remembered from an earlier step, and the blocks were others' by then.
"""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.core.prefix_index import num_published, root_of
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def match(self, request: Request) -> list[KVCacheBlock]:
        known = self.__dict__.setdefault("known", {})
        if request not in known:
            known[request] = self.look_up(request)
        return list(known[request])

    def look_up(self, request: Request) -> list[KVCacheBlock]:
        hits, parent = [], root_of(request)
        for i in range((request.num_tokens - 1) // self.block_size):
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
