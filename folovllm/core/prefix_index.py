"""The prefix index: which blocks hold which prefix of tokens.

Milestone: M6. vLLM counterpart: BlockHashToBlockMap in vllm/v1/core/block_pool.py. Left out: several KV groups.

Row 1: no torch. There are three indexes behind one interface:
- `NullPrefixIndex` is prefix caching switched off. Every lookup misses, so no caller asks "is caching on?".
- `HashPrefixIndex` is vLLM's way: one dictionary from a block's hash to the blocks that hold it.
- `TriePrefixIndex` (prefix_trie.py) goes from block to block through a tree of tokens. It has the same hits.

An index never evicts. The free queue of the block pool alone decides which block is reused next, and the pool tells the
index before it happens.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping

from folovllm.config import CacheConfig
from folovllm.core.block_hash import (
    BYTES_PER_TOKEN,
    BlockHash,
    BlockHasher,
    extra_keys,
    get_hash_function,
    root_hash,
)
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.parts import load_part
from folovllm.request import Request

Holders = Mapping[int, KVCacheBlock]  # block id -> block: all blocks that hold the same prefix; the first one is hit


class PrefixIndex(ABC):
    """Finds, remembers and forgets the blocks that hold a prefix."""

    @abstractmethod
    def hash_new_blocks(self, request: Request) -> None:
        """Names the full blocks of `request` that have no name yet. The request calls this after each new token."""

    @abstractmethod
    def match(self, request: Request) -> list[KVCacheBlock]:
        """Returns the blocks of the longest cached prefix of `request`, which covers at most num_tokens - 1 tokens.

        The last token is computed again even if it is cached: its logits are needed, and they are not stored.
        """

    @abstractmethod
    def match_partial(
        self, request: Request, hit_blocks: list[KVCacheBlock], not_yet_computed: Container[int] = ()
    ) -> tuple[KVCacheBlock | None, int]:
        """Returns a block that follows `hit_blocks` and begins like the rest of `request`, and the shared tokens.

        Blocks whose id is in `not_yet_computed` are passed over. Returns (None, 0) if no block fits.
        """

    @abstractmethod
    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        """Publishes the first `num_full_blocks` blocks of `request`: later lookups can hit them."""

    @abstractmethod
    def remove(self, block: KVCacheBlock) -> None:
        """Forgets a published block, because it is about to hold other tokens."""

    @abstractmethod
    def check_integrity(self, blocks: list[KVCacheBlock]) -> None:
        """Asserts that the index knows exactly those of `blocks`, all blocks of the pool, that have a hash."""


class NullPrefixIndex(PrefixIndex):
    """Prefix caching switched off: every lookup misses and nothing is published."""

    def hash_new_blocks(self, request: Request) -> None:
        """Does nothing: without lookups, blocks need no names."""

    def match(self, request: Request) -> list[KVCacheBlock]:
        return []

    def match_partial(
        self, request: Request, hit_blocks: list[KVCacheBlock], not_yet_computed: Container[int] = ()
    ) -> tuple[KVCacheBlock | None, int]:
        return None, 0

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        """Does nothing."""

    def remove(self, block: KVCacheBlock) -> None:
        """Does nothing: no block was ever published."""

    def check_integrity(self, blocks: list[KVCacheBlock]) -> None:
        """Does nothing: there is nothing to check."""


Root = tuple[bytes]  # stands for the empty prefix, per extra keys; as a tuple it is never equal to a hash


# What a block hash stands for: the prefix that the parent stands for, followed by the block's own tokens (packed).
Meaning = tuple[BlockHash | Root, bytes]


class HashPrefixIndex(PrefixIndex):
    """One dictionary from a block's hash to the blocks that hold it, as in vLLM.

        request    [ 5 9 2 7 | 1 1 8 4 | 6 3 ]
        hashes          h0        h1              h1 names all 8 tokens: h0 is part of what it is the hash of

        blocks     h0 -> {3}   h1 -> {7, 9}                 9 is a copy of 7: both requests computed it
        meaning    h0 -> (root, 5 9 2 7)   h1 -> (h0, 1 1 8 4)
        children   root -> {5 9 2 7: h0}   h0 -> {1 1 8 4: h1}

    If equal hashes are trusted to mean equal prefixes, `blocks` is all that is needed, and vLLM trusts sha256. This
    index does not. `meaning` keeps the tokens and the parent of each hash, and a block is a hit only if both are the
    request's own. The parent was checked in the same way, so by induction the whole prefix is equal. A block whose hash
    already has another meaning is not published. So a weak hash costs hits and never gives a wrong token.

    A hash keeps its meaning while it has blocks or children. If it lost the meaning with its last block, a colliding
    prefix could take the hash over, and with it the children that were computed behind the first prefix.

    `children` serves the hits that end inside a block: a hash says nothing about the first tokens of its block.
    """

    def __init__(self, config: CacheConfig) -> None:
        assert isinstance(config.block_size, int), "resolve() first"
        hash_function = get_hash_function(config.prefix_caching_hash_algo)
        root = root_hash(config.prefix_caching_seed, hash_function)
        self.block_size = config.block_size
        self.hasher = BlockHasher(config.block_size, hash_function, root)
        self.blocks: dict[BlockHash, dict[int, KVCacheBlock]] = {}
        self.meaning: dict[BlockHash, Meaning] = {}
        self.children: dict[BlockHash | Root, dict[bytes, BlockHash]] = {}

    def hash_new_blocks(self, request: Request) -> None:
        self.hasher(request)

    def match(self, request: Request) -> list[KVCacheBlock]:
        hits: list[KVCacheBlock] = []
        parent: BlockHash | Root = root_of(request)
        for i in range((request.num_tokens - 1) // self.block_size):
            block_hash = request.block_hashes[i]
            holders = self.blocks.get(block_hash)
            if holders is None or self.meaning[block_hash] != (parent, request.block_tokens[i]):
                break
            hits.append(next(iter(holders.values())))
            parent = block_hash
        return hits

    def match_partial(
        self, request: Request, hit_blocks: list[KVCacheBlock], not_yet_computed: Container[int] = ()
    ) -> tuple[KVCacheBlock | None, int]:
        children = self.children.get(_last_hash(hit_blocks) or root_of(request), {})
        candidates = ((tokens, self.blocks.get(block_hash, {})) for tokens, block_hash in children.items())
        return longest_partial_hit(candidates, rest_of_block(request, hit_blocks, self.block_size), not_yet_computed)

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        first = num_published(blocks, num_full_blocks)
        parent: BlockHash | Root = _last_hash(blocks[:first]) or root_of(request)
        for i in range(first, num_full_blocks):
            block, block_hash, tokens = blocks[i], request.block_hashes[i], request.block_tokens[i]
            meaning = (parent, tokens)
            if self.meaning.get(block_hash, meaning) != meaning:
                break  # a collision
            block.block_hash = block_hash  # first: if Ctrl-C strikes below, `remove` can clean up
            self.meaning[block_hash] = meaning
            self.children.setdefault(parent, {})[tokens] = block_hash
            self.blocks.setdefault(block_hash, {})[block.block_id] = block
            parent = block_hash

    def remove(self, block: KVCacheBlock) -> None:
        assert block.block_hash is not None, f"{block} is not published"
        holders = self.blocks.get(block.block_hash, {})
        holders.pop(block.block_id, None)
        if not holders:
            self.blocks.pop(block.block_hash, None)
            self._forget_unused(block.block_hash)

    def _forget_unused(self, block_hash: BlockHash) -> None:
        """Forgets the meaning of `block_hash` if it has neither blocks nor children, and of the parents it leaves so.

        The topmost parent goes first: a call that is interrupted can be made again, and finds the rest.
        """
        if block_hash not in self.meaning or block_hash in self.children:
            return
        unused = [block_hash]
        while self._is_last_use(unused[-1]):
            unused.append(self.meaning[unused[-1]][0])  # type: ignore[arg-type]
        for name in reversed(unused):
            parent, tokens = self.meaning[name]
            siblings = self.children.get(parent, {})
            siblings.pop(tokens, None)
            if not siblings:
                self.children.pop(parent, None)
            del self.meaning[name]

    def _is_last_use(self, block_hash: BlockHash) -> bool:
        """Whether the parent of `block_hash` has neither blocks nor other children."""
        parent, tokens = self.meaning[block_hash]
        siblings = self.children.get(parent, {})
        return parent in self.meaning and parent not in self.blocks and len(siblings) == (tokens in siblings)

    def check_integrity(self, blocks: list[KVCacheBlock]) -> None:
        published = {block.block_id: block.block_hash for block in blocks if block.block_hash is not None}
        known = {block_id: block_hash for block_hash, holders in self.blocks.items() for block_id in holders}
        assert published == known, f"hashes of blocks {sorted(published)}, index knows {sorted(known)}"
        for holders in self.blocks.values():
            assert holders and all(blocks[block_id] is block for block_id, block in holders.items())
        assert self.meaning.keys() >= self.blocks.keys(), "a hash without a meaning"
        links = {block_hash: (parent, tokens) for parent, children in self.children.items()
                 for tokens, block_hash in children.items()}  # fmt: skip
        assert links == self.meaning, "children and meanings disagree"
        for parent in self.children:
            assert isinstance(parent, tuple) or parent in self.meaning, "a parent without a meaning"
        for block_hash in self.meaning:
            assert block_hash in self.blocks or block_hash in self.children, "a hash that leads nowhere was kept"


def make_prefix_index(config: CacheConfig, parts: Mapping[str, str] | None = None) -> PrefixIndex:
    """Returns the index that a resolved config asks for; `parts` may replace either kind."""
    assert isinstance(config.block_size, int), "resolve() first"
    if not config.enable_prefix_caching:
        return NullPrefixIndex()
    index: PrefixIndex = load_part(f"core.prefix_index.{config.prefix_index}", parts)(config)
    return index


# ---- shared by the indexes


def num_published(blocks: list[KVCacheBlock], num_full_blocks: int) -> int:
    """Returns how many of the first `num_full_blocks` blocks are published. These are always the leading ones.

    Counts from the end: a running request has a single new block, behind many old ones.
    """
    first = num_full_blocks
    while first > 0 and blocks[first - 1].block_hash is None:
        first -= 1
    return first


def rest_of_block(request: Request, hit_blocks: list[KVCacheBlock], block_size: int) -> list[int]:
    """Returns the tokens of the block behind `hit_blocks`, without the request's last token."""
    start = len(hit_blocks) * block_size
    return request.all_token_ids[start : min(start + block_size, request.num_tokens - 1)]


def longest_partial_hit(
    candidates: Iterable[tuple[bytes, Holders]], wanted: list[int], not_yet_computed: Container[int]
) -> tuple[KVCacheBlock | None, int]:
    """Returns the block, among (packed tokens, holders) pairs, that shares the most leading tokens with `wanted`."""
    best, most = None, 0
    for tokens, holders in candidates if wanted else ():
        length = common_length(tokens, wanted)
        if length > most:
            block = next((block for block in holders.values() if block.block_id not in not_yet_computed), None)
            best, most = (block, length) if block else (best, most)
    return best, most


def common_length(packed: bytes, token_ids: list[int]) -> int:
    """Returns how many leading tokens two sequences share, one of them packed."""
    for i, token_id in enumerate(token_ids):
        at = i * BYTES_PER_TOKEN
        if packed[at : at + BYTES_PER_TOKEN] != token_id.to_bytes(BYTES_PER_TOKEN, "little", signed=True):
            return i
    return len(token_ids)


def root_of(request: Request) -> Root:
    """Returns the parent of the first block of `request`.

    Requests with different extra keys (a salt, for example) start from different roots, so they never share.
    """
    return (extra_keys(request),)


def _last_hash(blocks: list[KVCacheBlock]) -> BlockHash | None:
    return blocks[-1].block_hash if blocks else None
