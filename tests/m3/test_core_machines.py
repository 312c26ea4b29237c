"""State machines for BlockPool and KVCacheManager: blocks are conserved, owned by whom the tables say, counted right.

Prefix hits are simulated with a set of published blocks, so that free-but-cached and shared blocks occur before M6.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.request import Request
from tests.core_helpers import make_request

pytestmark = pytest.mark.m3

SETTINGS = settings(max_examples=80, stateful_step_count=30, deadline=None, derandomize=True)


class PublishedBlocks(NullPrefixIndex):
    """A toy index: a set of published blocks, told when one is about to be reused."""

    def __init__(self) -> None:
        self.published: list[KVCacheBlock] = []

    def publish(self, block: KVCacheBlock) -> None:
        if block.block_hash is None:
            block.block_hash = b"%d" % block.block_id
            self.published.append(block)

    def remove(self, block: KVCacheBlock) -> None:
        self.published.remove(block)  # ValueError if it was not there


def snapshot(pool: BlockPool) -> list[tuple[int, int, bytes | None]]:
    """Free queue in order, then counts and hashes of all blocks."""
    free = [(block.block_id, -1, None) for block in pool.free_block_queue.get_all_free_blocks()]
    return free + [(block.block_id, block.ref_cnt, block.block_hash) for block in pool.blocks]


def check_conservation(pool: BlockPool, tables: list[list[KVCacheBlock]], published: list[KVCacheBlock]) -> None:
    """Counted without the pool's own check: free without hash + free but cached + held = all but the null block."""
    free = pool.free_block_queue.get_all_free_blocks()
    held = {block.block_id for table in tables for block in table}
    cached = [block for block in free if block.block_hash is not None]
    plain = [block for block in free if block.block_hash is None]
    assert len(plain) + len(cached) + len(held) == pool.num_blocks - 1
    assert held.isdisjoint(block.block_id for block in free) and 0 not in held | {b.block_id for b in free}
    for block in pool.blocks[1:]:
        assert block.ref_cnt == sum(table.count(block) for table in tables)
        assert (block.block_hash is not None) == (block in published)
    pool.check_integrity(tables)


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, publish and give back."""

    @initialize(num_blocks=st.integers(2, 9), free_uncached_first=st.booleans())
    def start(self, num_blocks: int, free_uncached_first: bool) -> None:
        self.index = PublishedBlocks()
        self.pool = BlockPool(num_blocks, self.index, free_uncached_first)
        self.holders: list[list[KVCacheBlock]] = []

    @rule(n=st.integers(0, 10))
    def take(self, n: int) -> None:
        queue = self.pool.free_block_queue.get_all_free_blocks()
        if n > len(queue):
            before = snapshot(self.pool)
            with pytest.raises(ValueError):
                self.pool.get_new_blocks(n)
            assert snapshot(self.pool) == before
            return
        blocks = self.pool.get_new_blocks(n)
        assert blocks == queue[:n] and all(b.ref_cnt == 1 and b.block_hash is None for b in blocks)
        self.holders.append(blocks)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from([holder for holder in self.holders if holder]))
        for block in holder[: data.draw(st.integers(1, len(holder)))]:
            self.index.publish(block)

    @precondition(lambda self: self.index.published)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        """A new holder of published blocks, some of them free, some in use."""
        blocks = data.draw(st.lists(st.sampled_from(self.index.published), min_size=1, unique_by=id))
        self.pool.touch(blocks)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        queue = self.pool.free_block_queue.get_all_free_blocks()
        freed = [block for block in holder[::-1] if block.ref_cnt == 1]
        plain = [block for block in freed if block.block_hash is None and self.pool.free_uncached_first]
        self.pool.free_blocks(holder[::-1])
        rest = [block for block in freed if block not in plain]
        assert self.pool.free_block_queue.get_all_free_blocks() == plain + queue + rest

    @invariant()
    def conserved(self) -> None:
        if hasattr(self, "pool"):
            check_conservation(self.pool, self.holders, self.index.published)


class ManagerMachine(RuleBasedStateMachine):
    """Requests grow, fail to grow, adopt hits and are freed."""

    @initialize(data=st.data(), max_model_len=st.integers(2, 20), free_uncached_first=st.booleans())
    def start(self, data: st.DataObject, max_model_len: int, free_uncached_first: bool) -> None:
        self.block_size = data.draw(st.integers(1, min(3, max_model_len)) | st.integers(1, max_model_len))
        needed = -(-max_model_len // self.block_size)
        self.index = PublishedBlocks()
        self.pool = BlockPool(1 + needed + data.draw(st.integers(0, needed)), self.index, free_uncached_first)
        self.manager = KVCacheManager(self.block_size, max_model_len, self.pool)
        self.max_model_len = max_model_len
        self.requests: list[Request] = []
        self.num_requests = 0

    @rule(data=st.data(), must_fit=st.booleans())
    def admit(self, data: st.DataObject, must_fit: bool) -> None:
        request = make_request(f"r{self.num_requests}", data.draw(st.integers(1, self.max_model_len - 1)))
        self.num_requests += 1
        most_hits = (request.num_tokens - 1) // self.block_size
        hits: list[KVCacheBlock] = []
        if self.index.published:
            hits = data.draw(st.lists(st.sampled_from(self.index.published), max_size=most_hits, unique_by=id))
        missing = request.num_tokens - len(hits) * self.block_size
        if self.allocate(request, data.draw(st.integers(1, missing)), hits, must_fit):
            self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if request.num_tokens == self.max_model_len:
            return
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_id(1)
        missing = request.num_tokens - request.num_computed_tokens
        self.allocate(request, data.draw(st.integers(1, missing)), [], must_fit=False)

    def allocate(self, request: Request, n: int, hits: list[KVCacheBlock], must_fit: bool) -> bool:
        """allocate_slots against an independent count of what is needed."""
        owned = len(self.manager.req_to_blocks.get(request.request_id, []))
        computed = request.num_computed_tokens + len(hits) * self.block_size
        target = max(computed + n, request.num_tokens if must_fit else 0)
        costs = -(-target // self.block_size) - owned - sum(block.ref_cnt > 0 for block in hits)
        before, free = snapshot(self.pool), self.pool.get_num_free_blocks()
        new_blocks = self.manager.allocate_slots(request, n, hits, full_sequence_must_fit=must_fit)
        assert (new_blocks is not None) == (costs <= free)
        if new_blocks is None:
            assert snapshot(self.pool) == before and owned == len(self.manager.get_block_ids(request.request_id)[0])
            return False
        request.num_computed_tokens = computed + n
        table = self.manager.req_to_blocks[request.request_id]
        assert len(table) == -(-request.num_computed_tokens // self.block_size)
        assert table[owned:] == hits + new_blocks
        return True

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), publish=st.booleans())
    def leave(self, data: st.DataObject, publish: bool) -> None:
        request = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        if publish:  # all but the last block, which may be partial
            for block in self.manager.req_to_blocks[request.request_id][:-1]:
                self.index.publish(block)
        self.manager.free(request)
        self.manager.free(request)

    @invariant()
    def conserved(self) -> None:
        if hasattr(self, "manager"):
            tables = self.manager.req_to_blocks
            assert set(tables) == {request.request_id for request in self.requests}
            check_conservation(self.pool, list(tables.values()), self.index.published)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for request in self.requests:
                self.manager.free(request)
            check_conservation(self.pool, [], self.index.published)
            assert self.manager.usage == 0.0


def test_pool_state_machine() -> None:
    run_state_machine_as_test(PoolMachine, settings=SETTINGS)


def test_manager_state_machine() -> None:
    run_state_machine_as_test(ManagerMachine, settings=SETTINGS)
