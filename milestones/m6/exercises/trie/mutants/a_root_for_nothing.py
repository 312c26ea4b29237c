# killed-by: a_root_comes_with_its_first_child | leads nowhere
"""Makes the root before it knows whether there is anything to publish. No eviction ever removes an empty root."""

from folovllm.core.block_hash import extra_keys
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import num_published
from folovllm.core.prefix_trie import Node
from folovllm.core.prefix_trie import TriePrefixIndex as Reference
from folovllm.request import Request


class TriePrefixIndex(Reference):
    def match(self, request: Request) -> list[KVCacheBlock]:
        hits, node = [], self.roots.get(extra_keys(request))
        for tokens in request.block_tokens[: (request.num_tokens - 1) // self.block_size]:
            node = node.children.get(tokens) if node else None
            if node is None or not node.blocks:
                break
            hits.append(next(iter(node.blocks.values())))
        return hits

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        first, extra = num_published(blocks, num_full_blocks), extra_keys(request)
        if first:
            node = self.node_of[blocks[first - 1].block_id]
        else:
            node = self.roots.setdefault(extra, Node(None, extra))
        for i in range(first, num_full_blocks):
            tokens = request.block_tokens[i]
            node = node.children.setdefault(tokens, Node(node, tokens))
            blocks[i].block_hash = tokens
            node.blocks[blocks[i].block_id] = blocks[i]
            self.node_of[blocks[i].block_id] = node

    def remove(self, block: KVCacheBlock) -> None:
        node = self.node_of.pop(block.block_id)
        del node.blocks[block.block_id]
        while not node.blocks and not node.children:
            if node.parent is None:
                del self.roots[node.tokens]
                break
            del node.parent.children[node.tokens]
            node = node.parent
