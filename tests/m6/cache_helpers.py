"""Builders for tests of prefix caching, and an oracle that recomputes every hit from token lists.

No torch, no weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

from folovllm.config import CacheConfig
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex, PrefixIndex
from folovllm.core.prefix_trie import TriePrefixIndex
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.request import Request
from tests import core_helpers as helpers

INDEXES = ["hash", "trie"]
Index = HashPrefixIndex | TriePrefixIndex
Tokens = tuple[int, ...]
Content = tuple[str | None, Tokens]  # salt, and all tokens from the start of the sequence to the end of the block


def cached_core(index: str = "hash", executor: Any = None, **config_args: Any) -> EngineCore:
    """An engine on the fake executor with prefix caching; blocks of 4, max_model_len 16 unless told otherwise."""
    return helpers.make_core(executor, enable_prefix_caching=True, prefix_index=index, **config_args)


def index_of(core: EngineCore) -> Index:
    index = core.scheduler.kv_cache_manager.block_pool.prefix_index
    assert isinstance(index, Index)
    return index


def make_index(kind: str, block_size: int = 4, **cache: Any) -> Index:
    """An index alone. Kind "weak" is a hash index whose hash has only three values."""
    config = CacheConfig(block_size=block_size, enable_prefix_caching=True, **cache)
    if kind == "trie":
        return TriePrefixIndex(config)
    index = HashPrefixIndex(config)
    if kind == "weak":
        weaken(index, lambda data: bytes([sum(data) % 3]))
    return index


def weaken(index: PrefixIndex, hash_function: Callable[[bytes], bytes]) -> None:
    """From now on blocks are named by `hash_function`; nothing may have been named yet."""
    assert isinstance(index, HashPrefixIndex) and not index.meaning
    index.hasher.hash_function = hash_function
    index.hasher.root = hash_function(b"root")


def named_request(index: PrefixIndex, tokens: Sequence[int], salt: str | None = None) -> Request:
    """A request as the core makes it: its full blocks have names."""
    request = helpers.make_request("r", tokens, cache_salt=salt)
    request.attach_block_hasher(index.hash_new_blocks)
    return request


def serve(core: EngineCore, request_id: str, prompt: Sequence[int], max_tokens: int = 1, **args: Any) -> int:
    """Run one request alone, hold its tokens against those of a cold run; how many of its tokens were cached."""
    request = helpers.make_request(request_id, prompt, max_tokens, **args)
    core.add_request(request)
    outputs = helpers.drive(core)[request_id]
    assert helpers.tokens_of(outputs) == fake_tokens(prompt, max_tokens), request_id
    assert outputs[-1].num_cached_tokens == request.num_cached_tokens
    return request.num_cached_tokens


def known_blocks(index: PrefixIndex) -> dict[int, Tokens]:
    """Returns every block the index knows, by id, with all tokens from the root to the end of the block."""
    if isinstance(index, HashPrefixIndex):
        return {i: _tokens_of_hash(index, name) for name, holders in index.blocks.items() for i in holders}
    assert isinstance(index, TriePrefixIndex)
    return {block_id: _tokens_of_node(node) for block_id, node in index.node_of.items()}


def _tokens_of_hash(index: HashPrefixIndex, name: Any) -> Tokens:
    packed = b""
    while name in index.meaning:
        name, tokens = index.meaning[name]
        packed = tokens + packed
    return _unpack(packed)


def _tokens_of_node(node: Any) -> Tokens:
    packed = b""
    while node.parent is not None:
        packed, node = node.tokens + packed, node.parent
    return _unpack(packed)


def _unpack(packed: bytes) -> Tokens:
    return tuple(int.from_bytes(packed[i : i + 4], "little", signed=True) for i in range(0, len(packed), 4))


class HitOracle:
    """Watches an engine from the outside and knows, for every block, the tokens that its K/V stand for.

    It takes from the pool only which blocks are handed out (whatever they held is lost then), from the manager only
    which tokens are scheduled into which block. What must be hit it finds by comparing whole token lists.
    """

    def __init__(self, core: EngineCore) -> None:
        manager = core.scheduler.kv_cache_manager
        self.manager, self.pool, self.size = manager, manager.block_pool, manager.block_size
        self.contents: dict[int, Content] = {}
        self.of_this_step: dict[int, str] = {}  # block -> request that will only now compute it
        self.queries = self.hits = self.lookups = self.evictions = self.partial_hits = 0
        self._get_new_blocks, self._allocate_slots = self.pool.get_new_blocks, manager.allocate_slots
        self._get_computed_blocks, self._preempt = manager.get_computed_blocks, manager.preempt
        self._end_step, self._record = manager.end_step, manager.record_admission
        self._reset = manager.reset_prefix_cache
        for name in ("allocate_slots", "get_computed_blocks", "preempt", "end_step", "record_admission"):
            setattr(manager, name, getattr(self, name))
        self.pool.get_new_blocks = self.get_new_blocks  # type: ignore[method-assign]
        manager.reset_prefix_cache = self.reset_prefix_cache  # type: ignore[method-assign]

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        blocks = self._get_new_blocks(num_blocks)
        self.evictions += sum(self.contents.pop(block.block_id, None) is not None for block in blocks)
        return blocks

    def allocate_slots(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        start = request.num_computed_tokens + kwargs.get("num_new_computed_tokens", 0)
        new_blocks = self._allocate_slots(request, num_new_tokens, *args, **kwargs)
        if new_blocks is not None:
            table = self.manager.req_to_blocks[request.request_id]
            for i in range(start // self.size, (start + num_new_tokens) // self.size):
                self.contents[table[i].block_id] = self.prefix(request, i + 1)
                self.of_this_step[table[i].block_id] = request.request_id
        return new_blocks

    def preempt(self, request: Request) -> None:
        for block_id in [b for b, request_id in self.of_this_step.items() if request_id == request.request_id]:
            del self.contents[block_id], self.of_this_step[block_id]
        self._preempt(request)

    def end_step(self, has_run: bool) -> None:
        if not has_run:
            for block_id in self.of_this_step:
                self.contents.pop(block_id, None)
        self.of_this_step = {}
        self._end_step(has_run)

    def reset_prefix_cache(self) -> bool:
        done = self._reset()
        if done:
            self.contents = {}
        return done

    def get_computed_blocks(self, request: Request) -> tuple[list[KVCacheBlock], int]:
        blocks, num_tokens = self._get_computed_blocks(request)
        num_whole = self.whole_hits(request)
        assert num_tokens // self.size == num_whole, f"{request}: {num_tokens} tokens hit, {num_whole} blocks are there"
        for i, block in enumerate(blocks[:num_whole]):
            assert self.contents[block.block_id] == self.prefix(request, i + 1), "a block with other tokens was hit"
        if len(blocks) > num_whole:
            (source,) = blocks[num_whole:]
            salt, tokens = self.contents[source.block_id]
            assert source.block_id not in self.of_this_step and salt == request.cache_salt
            assert num_tokens < request.num_tokens and tokens[:num_tokens] == tuple(request.all_token_ids[:num_tokens])
            assert num_tokens % self.size == self.longest_partial(request, num_whole)
        self.lookups += 1
        return blocks, num_tokens

    def record_admission(self, request: Request, num_hit_tokens: int) -> None:
        if request.sampling_params.prompt_logprobs is None and request.num_preemptions == 0:
            self.queries += request.num_tokens
            self.hits += num_hit_tokens
            self.partial_hits += num_hit_tokens % self.size > 0
        self._record(request, num_hit_tokens)

    def prefix(self, request: Request, num_blocks: int) -> Content:
        return request.cache_salt, tuple(request.all_token_ids[: num_blocks * self.size])

    def whole_hits(self, request: Request) -> int:
        if request.sampling_params.prompt_logprobs is not None:
            return 0
        known, n = set(self.contents.values()), 0
        while (n + 1) * self.size < request.num_tokens and self.prefix(request, n + 1) in known:
            n += 1
        return n

    def longest_partial(self, request: Request, num_whole: int) -> int:
        """Most tokens of the block after the whole hits that a block computed earlier begins with."""
        start, mine = num_whole * self.size, request.all_token_ids[:-1]
        lengths = [0]
        for block_id, (salt, tokens) in self.contents.items():
            if block_id not in self.of_this_step and salt == request.cache_salt and len(tokens) == start + self.size:
                length = next((i for i, (a, b) in enumerate(zip(tokens, mine, strict=False)) if a != b), len(mine))
                lengths.append(length - start)
        return max(lengths)

    def check(self, core: EngineCore) -> None:
        """The index knows exactly what the blocks hold, and the counters are right."""
        assert known_blocks(index_of(core)) == {block_id: tokens for block_id, (_, tokens) in self.contents.items()}
        stats = core.stats()
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (self.queries, self.hits)
