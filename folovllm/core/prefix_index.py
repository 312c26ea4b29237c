"""The prefix index: which block holds which prefix. With caching off a null object, so that nobody asks "is it on?".

Milestone: M6. vLLM counterpart: BlockHashToBlockMap in vllm/v1/core/block_pool.py; the radix tree is SGLang's idea.
Left out: several KV groups; edges of several blocks in the radix tree (a node here is always one block).

Row 1: no torch. Both indexes remember the same thing, a tree with a node for every full block of every known prefix:

    (root) --[5 9 2 7]--> node, blocks {3} --[1 1 8 4]--> node, blocks {7, 9}     9 is a copy of 7: both were computed
                                          \\--[6 6 6 6]--> node, blocks {}         before the other was known
                                                            \\--[2 2 2 2]--> node, blocks {12}
They differ in how they get from a block of a request to its node: the radix tree goes from child to child, comparing
tokens; the hash chain looks the block's hash up in one flat dictionary, wherever in the tree the node is. A node
without blocks (its last one was evicted) stays while a node below it has one: a request that computes that block again
finds what lies behind it. So both indexes have exactly the same hits.

An index never evicts. It is told by the block pool, whose free queue alone decides, which block is about to be reused.
"""

from abc import abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from folovllm.config import CacheConfig
from folovllm.core.block_hash import (
    BYTES_PER_TOKEN,
    BlockHasher,
    BlockPacker,
    extra_keys,
    get_hash_function,
    root_hash,
)
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.parts import load_part
from folovllm.request import Request


class NullPrefixIndex:
    """Prefix caching switched off: every lookup misses, nothing is published, nothing has to be forgotten."""

    def hash_new_blocks(self, request: Request) -> None:
        """Bring the names of `request`'s full blocks up to date; the request calls this after each new token."""

    def match(self, request: Request) -> list[KVCacheBlock]:
        """Blocks that hold the longest cached prefix of `request`, at most num_tokens - 1 tokens."""
        return []

    def match_partial(
        self, request: Request, hit_blocks: list[KVCacheBlock], not_yet_computed: Container[int] = ()
    ) -> tuple[KVCacheBlock | None, int]:
        """A block behind `hit_blocks` that begins like the rest of `request`, and how many tokens they share.

        Never one whose id is in `not_yet_computed`. (None, 0) if there is none.
        """
        return None, 0

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        """Publish the first `num_full_blocks` blocks of `request`."""

    def remove(self, block: KVCacheBlock) -> None:
        """`block` is about to be reused for other tokens: forget it."""

    def check_integrity(self, blocks: list[KVCacheBlock]) -> None:
        """Assert that the index knows exactly those of `blocks`, all there are, that have a hash."""


@dataclass(eq=False, slots=True)
class Node:
    """One full block of a known prefix. `key` is its hash, or in the radix tree its tokens."""

    parent: "Node | None"
    tokens: bytes  # of this block, packed
    key: bytes
    blocks: dict[int, KVCacheBlock] = field(default_factory=dict)  # all that hold it, by id; the first one is hit
    children: dict[bytes, "Node"] = field(default_factory=dict)  # by their tokens


class PrefixTree(NullPrefixIndex):
    """What both indexes share: the tree, and how it grows and shrinks. They add how a block's node is found."""

    def __init__(self, block_size: int, hasher: BlockPacker) -> None:
        self.block_size = block_size
        self.hasher = hasher
        self.roots: dict[bytes, Node] = {}  # one tree per extra keys: what has another salt is never met
        self.node_of: dict[int, Node] = {}  # block id -> its node

    def hash_new_blocks(self, request: Request) -> None:
        self.hasher(request)

    # ---- lookup

    def match(self, request: Request) -> list[KVCacheBlock]:
        hits: list[KVCacheBlock] = []
        node = self.roots.get(extra_keys(request))
        # The last token is computed again even if it is cached: its logits are needed, and they are nowhere.
        for i in range((request.num_tokens - 1) // self.block_size):
            node = self._child(node, request, i) if node else None
            if node is None or not node.blocks:
                break
            hits.append(next(iter(node.blocks.values())))
        return hits

    def match_partial(
        self, request: Request, hit_blocks: list[KVCacheBlock], not_yet_computed: Container[int] = ()
    ) -> tuple[KVCacheBlock | None, int]:
        """Goes through all children: the hash of a block says nothing about its first tokens."""
        parent = self.node_of[hit_blocks[-1].block_id] if hit_blocks else self.roots.get(extra_keys(request))
        start = len(hit_blocks) * self.block_size
        wanted = request.all_token_ids[start : min(start + self.block_size, request.num_tokens - 1)]
        best, most = None, 0
        for child in parent.children.values() if parent and wanted else ():
            length = _common_length(child.tokens, wanted)
            if length > most:
                block = next((b for b in child.blocks.values() if b.block_id not in not_yet_computed), None)
                best, most = (block, length) if block else (best, most)
        return best, most

    @abstractmethod
    def _child(self, node: Node, request: Request, i: int) -> Node | None:
        """The node of `request`'s block i, below the node of the block before it."""

    # ---- changes

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        first = num_full_blocks  # published are the leading ones: find where they end, without going through them all
        while first > 0 and blocks[first - 1].block_hash is None:
            first -= 1
        if first == num_full_blocks:
            return
        node = self.node_of[blocks[first - 1].block_id] if first else self._root(request)
        for i in range(first, num_full_blocks):
            child = self._child(node, request, i) or self._add_child(node, request, i)
            if child is None:
                break
            node = child
            node.blocks[blocks[i].block_id] = blocks[i]
            self.node_of[blocks[i].block_id] = node
            blocks[i].block_hash = node.key
        self._prune(node)

    def remove(self, block: KVCacheBlock) -> None:
        node = self.node_of.pop(block.block_id)
        del node.blocks[block.block_id]
        self._prune(node)

    def _root(self, request: Request) -> Node:
        extra = extra_keys(request)
        return self.roots.setdefault(extra, Node(None, b"", extra))

    def _prune(self, node: Node) -> None:
        """Drop `node` if it leads to no block any more, and then the nodes above it that led only to it."""
        while not node.blocks and not node.children:
            self._drop(node)
            if node.parent is None:
                break
            node = node.parent

    def _add_child(self, node: Node, request: Request, i: int) -> Node | None:
        """A new node for block i; None if it cannot have one."""
        tokens = request.block_tokens[i]
        child = node.children[tokens] = Node(node, tokens, tokens)
        return child

    def _drop(self, node: Node) -> None:
        if node.parent is None:
            del self.roots[node.key]
        else:
            del node.parent.children[node.tokens]

    # ---- integrity

    def check_integrity(self, blocks: list[KVCacheBlock]) -> None:
        published = {block.block_id for block in blocks if block.block_hash is not None}
        assert published == self.node_of.keys(), f"hashes {sorted(published)}, index {sorted(self.node_of)}"
        for block_id in published:
            assert self.node_of[block_id].blocks.get(block_id) is blocks[block_id]
            assert blocks[block_id].block_hash == self.node_of[block_id].key
        for node in self._all_nodes():
            assert node.blocks or node.children, "a node that leads nowhere was kept"
            assert all(self.node_of.get(block_id) is node for block_id in node.blocks), "a stale block"

    def _all_nodes(self) -> list[Node]:
        """Every node but the roots."""
        nodes = [child for root in self.roots.values() for child in root.children.values()]
        for node in nodes:  # grows while it is read
            nodes += node.children.values()
        return nodes


class RadixPrefixIndex(PrefixTree):
    """A radix tree (trie) of blocks: the next node is the child with the request's tokens."""

    def __init__(self, config: CacheConfig) -> None:
        assert isinstance(config.block_size, int), "resolve() first"
        super().__init__(config.block_size, BlockPacker(config.block_size))

    def _child(self, node: Node, request: Request, i: int) -> Node | None:
        return node.children.get(request.block_tokens[i])


class HashPrefixIndex(PrefixTree):
    """The hash chain: one dictionary from a block's hash to its node. The tree is only kept, not walked.

    Equal hashes are not trusted. A node is a hit only with the request's own tokens and below the node before it, so by
    induction with its whole prefix; a block whose hash is another node's is not published. A weak hash costs hits,
    never a wrong token. (vLLM trusts sha256, and needs neither tokens nor tree.)
    """

    def __init__(self, config: CacheConfig) -> None:
        assert isinstance(config.block_size, int), "resolve() first"
        hash_function = get_hash_function(config.prefix_caching_hash_algo)
        root = root_hash(config.prefix_caching_seed, hash_function)
        super().__init__(config.block_size, BlockHasher(config.block_size, hash_function, root))
        self.nodes: dict[bytes, Node] = {}  # hash -> node

    def _child(self, node: Node, request: Request, i: int) -> Node | None:
        child = self.nodes.get(request.block_hashes[i])
        if child is None or child.parent is not node or child.tokens != request.block_tokens[i]:
            return None
        return child

    def _add_child(self, node: Node, request: Request, i: int) -> Node | None:
        key, tokens = request.block_hashes[i], request.block_tokens[i]
        if key in self.nodes:
            return None  # a collision
        child = self.nodes[key] = node.children[tokens] = Node(node, tokens, key)
        return child

    def _drop(self, node: Node) -> None:
        super()._drop(node)
        if node.parent is not None:
            del self.nodes[node.key]

    def check_integrity(self, blocks: list[KVCacheBlock]) -> None:
        super().check_integrity(blocks)
        assert {id(node) for node in self.nodes.values()} == {id(node) for node in self._all_nodes()}
        assert all(node.key == key for key, node in self.nodes.items())


def make_prefix_index(config: CacheConfig, parts: Mapping[str, str] | None = None) -> NullPrefixIndex:
    """The index that a resolved config asks for. `parts` may replace either kind."""
    assert isinstance(config.block_size, int), "resolve() first"
    if not config.enable_prefix_caching:
        return NullPrefixIndex()
    index: NullPrefixIndex = load_part(f"core.prefix_index.{config.prefix_index}", parts)(config)
    return index


def _common_length(packed: bytes, token_ids: list[int]) -> int:
    """How many tokens two sequences share at their beginning, one of them packed."""
    for i, token_id in enumerate(token_ids):
        at = i * BYTES_PER_TOKEN
        if packed[at : at + BYTES_PER_TOKEN] != token_id.to_bytes(BYTES_PER_TOKEN, "little", signed=True):
            return i
    return len(token_ids)
