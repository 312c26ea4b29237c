"""The prefix index as a trie: a tree of blocks, walked from child to child by comparing tokens.

Milestone: M6. vLLM counterpart: none; SGLang's RadixAttention is the well-known tree. Left out: path compression. An
edge here is always one full block, which is what makes this a trie. An edge of a radix tree holds several blocks, and
is split where two prefixes part.

Row 1: no torch. There is a node for every full block of every known prefix:

    (root) --[5 9 2 7]--> node, blocks {3} --[1 1 8 4]--> node, blocks {7, 9}     9 is a copy of 7: both requests
                                          \\--[6 6 6 6]--> node, blocks {}         computed it
                                                            \\--[2 2 2 2]--> node, blocks {12}

The last block of 6 6 6 6 was evicted. Its node stays while a node below it has a block, so that a request which
computes those tokens again makes what lies behind them reachable.
"""

from collections.abc import Container
from dataclasses import dataclass, field

from folovllm.config import CacheConfig
from folovllm.core.block_hash import BlockPacker, extra_keys
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import PrefixIndex, longest_partial_hit, num_published, rest_of_block
from folovllm.request import Request


@dataclass(eq=False, slots=True)
class Node:
    """One full block of a known prefix, or a root."""

    parent: "Node | None"
    tokens: bytes  # of this block, packed; of a root its extra keys
    blocks: dict[int, KVCacheBlock] = field(default_factory=dict)  # all that hold it, by id; the first one is hit
    children: dict[bytes, "Node"] = field(default_factory=dict)  # by their tokens


class TriePrefixIndex(PrefixIndex):
    """Finds a block as the child, with the request's own tokens, of the block before it. Needs no hash."""

    def __init__(self, config: CacheConfig) -> None:
        assert isinstance(config.block_size, int), "resolve() first"
        self.block_size = config.block_size
        self.packer = BlockPacker(config.block_size)
        self.roots: dict[bytes, Node] = {}  # one tree per extra keys, so requests with different salts never share
        self.node_of: dict[int, Node] = {}  # block id -> its node

    def hash_new_blocks(self, request: Request) -> None:
        """Packs the tokens of the new full blocks: in the trie, they are the name."""
        self.packer(request)

    def match(self, request: Request) -> list[KVCacheBlock]:
        hits: list[KVCacheBlock] = []
        node = self.roots.get(extra_keys(request))
        for i in range((request.num_tokens - 1) // self.block_size):
            node = node.children.get(request.block_tokens[i]) if node else None
            if node is None or not node.blocks:
                break
            hits.append(next(iter(node.blocks.values())))
        return hits

    def match_partial(
        self, request: Request, hit_blocks: list[KVCacheBlock], not_yet_computed: Container[int] = ()
    ) -> tuple[KVCacheBlock | None, int]:
        node = self.node_of[hit_blocks[-1].block_id] if hit_blocks else self.roots.get(extra_keys(request))
        candidates = ((child.tokens, child.blocks) for child in node.children.values()) if node else ()
        return longest_partial_hit(candidates, rest_of_block(request, hit_blocks, self.block_size), not_yet_computed)

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        first = num_published(blocks, num_full_blocks)
        if first == num_full_blocks:
            return
        node = self.node_of[blocks[first - 1].block_id] if first else self._root(request)
        for i in range(first, num_full_blocks):
            block, tokens = blocks[i], request.block_tokens[i]
            child = node.children.get(tokens) or Node(node, tokens)
            block.block_hash = tokens  # first: if Ctrl-C strikes below, `remove` can clean up
            self.node_of[block.block_id] = child
            if node.parent is None:
                self.roots[node.tokens] = node
            node.children[tokens] = child
            child.blocks[block.block_id] = block
            node = child

    def _root(self, request: Request) -> Node:
        extra = extra_keys(request)
        return self.roots.get(extra) or Node(None, extra)

    def remove(self, block: KVCacheBlock) -> None:
        """Drops the block's node if it leads to no block any more, and then the nodes above that led only to it."""
        node = self.node_of.get(block.block_id)
        if node is None:
            return  # its insertion was interrupted
        node.blocks.pop(block.block_id, None)
        while not node.blocks and not node.children:
            if node.parent is None:
                self.roots.pop(node.tokens, None)
                break
            node.parent.children.pop(node.tokens, None)
            node = node.parent
        del self.node_of[block.block_id]

    def check_integrity(self, blocks: list[KVCacheBlock]) -> None:
        published = {block.block_id for block in blocks if block.block_hash is not None}
        assert published == self.node_of.keys(), f"hashes {sorted(published)}, index {sorted(self.node_of)}"
        for block_id in published:
            assert self.node_of[block_id].blocks.get(block_id) is blocks[block_id]
            assert blocks[block_id].block_hash == self.node_of[block_id].tokens
        for node in self._all_nodes():
            assert node.blocks or node.children, "a node that leads nowhere was kept"
            assert all(self.node_of.get(block_id) is node for block_id in node.blocks), "a stale block"

    def _all_nodes(self) -> list[Node]:
        """Returns every node, roots included."""
        nodes = list(self.roots.values())
        for node in nodes:  # the list grows while it is read
            nodes += node.children.values()
        return nodes
