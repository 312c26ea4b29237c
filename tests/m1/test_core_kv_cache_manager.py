"""KVCacheManager: who gets how many blocks (R1.11 to R1.13). Hits come from a stub index until M6 has a real one."""

import pytest

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.kv_cache_utils import KVCacheBlock, kv_bytes_per_token, make_kv_cache_config
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.request import Request
from tests.core_helpers import make_config, make_request

pytestmark = pytest.mark.m1


class StubIndex(NullPrefixIndex):
    """Answers every lookup with `hits` and remembers what is published."""

    def __init__(self) -> None:
        self.hits: list[KVCacheBlock] = []
        self.published: list[tuple[str, int]] = []

    def match(self, request: Request) -> list[KVCacheBlock]:
        return self.hits

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        self.published.append((request.request_id, num_full_blocks))


def make_manager(num_blocks: int, block_size: int = 4, max_model_len: int = 16) -> KVCacheManager:
    return KVCacheManager(block_size, max_model_len, BlockPool(num_blocks, StubIndex()))


def state(manager: KVCacheManager) -> tuple[list[int], list[int], dict[str, list[int]]]:
    """All that allocate_slots could change."""
    pool = manager.block_pool
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    tables = {request_id: [b.block_id for b in blocks] for request_id, blocks in manager.req_to_blocks.items()}
    return free, [block.ref_cnt for block in pool.blocks], tables


def new_ids(blocks: list[KVCacheBlock] | None) -> list[int]:
    assert blocks is not None
    return [block.block_id for block in blocks]


def cached_blocks(manager: KVCacheManager, n: int) -> list[KVCacheBlock]:
    """n blocks that nobody holds but that are worth a hit, at the tail of the free queue."""
    blocks = manager.block_pool.get_new_blocks(n)
    for block in blocks:
        block.block_hash = b"%d" % block.block_id
    manager.block_pool.free_blocks(blocks[::-1])
    return blocks


def test_a_request_grows_block_by_block() -> None:
    manager, request = make_manager(6), make_request("a", 6)
    assert new_ids(manager.allocate_slots(request, 6)) == [1, 2]  # positions 0..5 of 0..7
    request.num_computed_tokens = 6
    assert new_ids(manager.allocate_slots(request, 1)) == []  # 6
    request.num_computed_tokens = 7
    assert new_ids(manager.allocate_slots(request, 1)) == []  # 7
    request.num_computed_tokens = 8
    assert new_ids(manager.allocate_slots(request, 1)) == [3]  # 8: a new block
    assert manager.get_block_ids("a") == ([1, 2, 3],)
    manager.check_integrity()


@pytest.mark.parametrize("num_new_tokens", [0, -1])
def test_nothing_to_allocate_is_an_error(num_new_tokens: int) -> None:
    manager = make_manager(3)
    with pytest.raises(ValueError, match="at least 1"):
        manager.allocate_slots(make_request("a", 3), num_new_tokens)
    assert manager.req_to_blocks == {}


def test_failure_changes_nothing() -> None:
    manager = make_manager(4)
    first, second = make_request("a", 8), make_request("b", 8)
    manager.allocate_slots(first, 8)
    before = state(manager)
    assert manager.allocate_slots(second, 8) is None  # needs 2, 1 is free
    first.num_computed_tokens = 8
    assert manager.allocate_slots(first, 5) is None  # needs 2 more
    assert state(manager) == before


def test_full_sequence_must_fit() -> None:
    """The first chunk of 4 fits into the one free block, the whole prompt of 8 does not."""
    manager = make_manager(4)
    manager.allocate_slots(make_request("a", 8), 8)
    before, request = state(manager), make_request("b", 8)
    assert manager.allocate_slots(request, 4, full_sequence_must_fit=True) is None
    assert state(manager) == before
    assert new_ids(manager.allocate_slots(request, 4)) == [3]


def test_full_sequence_counts_output_of_a_resumed_request() -> None:
    manager, request = make_manager(3), make_request("a", 8)
    request.append_output_token_id(1)  # 9 tokens: 3 blocks, 2 are free
    assert manager.allocate_slots(request, 4, full_sequence_must_fit=True) is None


def test_slots_are_capped_at_max_model_len() -> None:
    """Near the end of the context: 15 computed and 5 more are 16 slots, not 20."""
    manager, request = make_manager(6), make_request("a", 15)
    manager.allocate_slots(request, 15)
    request.num_computed_tokens = 15
    assert new_ids(manager.allocate_slots(request, 5)) == []


def test_free_is_in_reverse_and_of_the_unknown_a_no_op() -> None:
    manager, request = make_manager(6), make_request("a", 12)
    manager.allocate_slots(request, 12)
    manager.free(request)
    assert state(manager)[0] == [3, 2, 1, 4, 5]
    manager.free(request)
    manager.free(make_request("never seen", 3))
    assert state(manager)[0] == [3, 2, 1, 4, 5]


def test_a_hit_is_adopted_and_only_the_rest_is_new() -> None:
    manager = make_manager(6)
    hits = cached_blocks(manager, 2)  # blocks 1 and 2; the queue is 3 4 5 2 1
    request = make_request("a", 10)
    assert new_ids(manager.allocate_slots(request, 2, hits)) == [3]
    assert manager.get_block_ids("a") == ([1, 2, 3],)
    assert state(manager)[0] == [4, 5]
    manager.check_integrity()


def test_an_evictable_hit_costs_a_free_block_too() -> None:
    """3 blocks are free, 2 of them the hit itself, and 2 more are needed: less than 3, more than the 1 that remains."""
    manager = make_manager(4)
    hits = cached_blocks(manager, 2)
    before = state(manager)
    assert manager.allocate_slots(make_request("a", 15), 7, hits) is None
    assert state(manager) == before, "hits must not be touched before the capacity test"


def test_a_hit_that_somebody_holds_costs_nothing() -> None:
    manager = make_manager(5)
    holder = make_request("a", 8)
    manager.allocate_slots(holder, 8)
    hits = list(manager.req_to_blocks["a"])
    assert new_ids(manager.allocate_slots(make_request("b", 15), 7, hits)) == [3, 4]
    assert [block.ref_cnt for block in hits] == [2, 2]
    manager.free(holder)
    manager.check_integrity()
    assert manager.block_pool.get_num_free_blocks() == 0


def test_hits_of_a_request_that_owns_blocks_are_our_bug() -> None:
    manager, request = make_manager(6), make_request("a", 4)
    hits = cached_blocks(manager, 1)
    manager.allocate_slots(request, 4)
    request.num_computed_tokens = 4
    with pytest.raises(AssertionError):
        manager.allocate_slots(request, 1, hits)


def test_get_computed_blocks_touches_nothing() -> None:
    manager = make_manager(6)
    index = manager.block_pool.prefix_index
    assert isinstance(index, StubIndex)
    index.hits = cached_blocks(manager, 2)
    before = state(manager)
    assert manager.get_computed_blocks(make_request("a", 10)) == (index.hits, 8)
    assert manager.get_computed_blocks(make_request("b", 10, prompt_logprobs=1)) == ([], 0)
    assert state(manager) == before


def test_only_full_blocks_of_known_tokens_are_published() -> None:
    """Never the partial one, never unknown tokens: room for 10 tokens is two blocks and a half, 7 of them are known."""
    manager, request = make_manager(6), make_request("a", 7)
    index = manager.block_pool.prefix_index
    assert isinstance(index, StubIndex)
    manager.allocate_slots(request, 10)
    assert index.published == [("a", 1)]
    request.append_output_token_id(5)
    request.num_computed_tokens = 7
    manager.allocate_slots(request, 1)
    assert index.published == [("a", 1), ("a", 2)]


@pytest.mark.parametrize("block_size", range(1, 17))
def test_any_block_size_up_to_max_model_len(block_size: int) -> None:
    """One token at a time up to 16: a block is taken exactly at every multiple of the block size."""
    manager, request = make_manager(17, block_size), make_request("a", 15)
    taken_at = []
    for position in range(16):
        request.num_computed_tokens = position
        if new_ids(manager.allocate_slots(request, 1)):
            taken_at.append(position)
    assert taken_at == list(range(0, 16, block_size))
    assert manager.num_reserved_slots() == len(taken_at) * block_size


def test_the_contiguous_cache_is_one_page_per_request() -> None:
    config = make_config(max_model_len=16, block_size="max_model_len", max_num_seqs=2)
    kv = make_kv_cache_config(config, available_bytes=2**30)
    assert (kv.num_blocks, kv.block_size) == (3, 16)  # 2 requests and the null page
    manager = make_manager(kv.num_blocks, kv.block_size)
    a, b = make_request("a", 3), make_request("b", 15)
    assert new_ids(manager.allocate_slots(a, 3)) == [1]
    assert new_ids(manager.allocate_slots(b, 15)) == [2]
    a.num_computed_tokens = 15
    assert new_ids(manager.allocate_slots(a, 1)) == []
    assert manager.allocate_slots(make_request("c", 1), 1) is None


def test_number_of_blocks() -> None:
    per_token = kv_bytes_per_token(layers=1, kv_heads=1, head_dim=1, dtype_bytes=4)
    assert per_token == 8

    def num_blocks(available: int, **args: int) -> int:
        return make_kv_cache_config(make_config(max_num_seqs=3, **args), available).num_blocks

    assert num_blocks(2**30) == 3 * 4 + 1  # no more than 3 requests of 16 tokens could use, and the null block
    assert num_blocks(10 * 4 * per_token) == 10
    assert num_blocks(10 * 4 * per_token + 31) == 10
    assert num_blocks(2**30, kv_cache_memory=7 * 4 * per_token) == 7
    assert num_blocks(2**30, kv_cache_memory=7 * 4 * per_token, num_kv_blocks=100) == 100


def test_a_cache_too_small_for_one_request_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"max_model_len=16 needs 4 blocks of 4 tokens.*there are 4 .*at most 12"):
        make_kv_cache_config(make_config(num_kv_blocks=4), available_bytes=2**30)
    with pytest.raises(ValueError, match="there are 0 "):
        make_kv_cache_config(make_config(), available_bytes=0)
    assert make_kv_cache_config(make_config(num_kv_blocks=5), available_bytes=0).num_usable_blocks == 4
