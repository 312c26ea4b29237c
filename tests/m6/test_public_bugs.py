"""Bugs of other engines' prefix caches, one test each: whose it was, and what cannot happen here.

tests/m3/test_core_public_bugs.py holds the core to the same list with a toy index; here both real indexes are in place.
Collisions (openvino.genai issue 3722) and names without a parent are in test_prefix_index.py and test_block_hash.py.
"""

import random

import pytest

from folovllm.core.block_pool import BlockPool
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.request import RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import block_ids, free_ids, make_request
from tests.m6.cache_helpers import INDEXES, cached_core, index_of, known_blocks, make_index, named_request, serve

pytestmark = pytest.mark.m6

P = list(range(100, 110))


@pytest.fixture(params=INDEXES)
def core(request: pytest.FixtureRequest) -> EngineCore:
    return cached_core(request.param, num_kv_blocks=9)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("length", [4, 8, 12])
def test_a_full_hit_leaves_a_token(index: str, length: int, partial: bool) -> None:
    """nano-vllm issue 144 (second half) and pull 199, vLLM pull 11186: a query of length zero, or one token too few.

    11186 computed only the last *token* again, into a block that others held. The whole last block is computed, or its
    copied part extended, in a block of the request's own.
    """
    core = cached_core(index, num_kv_blocks=12, partial_block_hits=partial)
    prompt = list(range(length))
    serve(core, "a", prompt)
    core.add_request(make_request("b", prompt, max_tokens=3))
    output = helpers.schedule_and_run(core)
    assert output.num_scheduled_tokens == {"b": 1 if partial else 4}
    last = block_ids(core, "b")[length // 4 - 1]
    assert core.scheduler.kv_cache_manager.block_pool.blocks[last].ref_cnt == 1 and last != length // 4
    helpers.drive(core)
    assert serve(core, "c", [*prompt, 1]) == length, "a's last block is as it was"


def test_a_resumed_request_is_not_taken_for_a_decode(core: EngineCore) -> None:
    """nano-vllm issue 144, first half: a request that comes back with outputs computes several tokens, not one."""
    a, b = make_request("a", 15, max_tokens=1), make_request("b", P, max_tokens=6)
    helpers.add_all(core, [b])
    for _ in range(3):
        core.step()
    assert core.reset_prefix_cache(reset_running=True) and b.num_output_tokens == 3
    core.add_request(a)
    assert helpers.schedule_and_run(core).num_scheduled_tokens == {"b": 13, "a": 15}
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(P, 6)


def test_the_count_of_a_waiting_request_is_not_kept(core: EngineCore) -> None:
    """vLLM issue 18957: how much was cached was remembered from an earlier step; the blocks were others' by then."""
    serve(core, "old", P)
    a, b = make_request("a", 15, max_tokens=2), make_request("b", [*P[:8], *range(5)], max_tokens=3)
    helpers.add_all(core, [a, make_request("c", 14, max_tokens=2), b])
    assert core.scheduler.kv_cache_manager.get_computed_blocks(b)[1] == 8, "when it came"
    core.step()
    assert b.status == RequestStatus.WAITING and core.scheduler.kv_cache_manager.get_computed_blocks(b)[1] == 0
    helpers.drive(core)
    assert b.num_cached_tokens == 0 and b.output_token_ids == fake_tokens(b.prompt_token_ids, 3)


def test_tokens_are_counted_after_the_hit(core: EngineCore) -> None:
    """nano-vllm pulls 210 and 207: the count was taken before the lookup and ran past the block table."""
    serve(core, "a", P)
    core.add_request(make_request("b", P, max_tokens=2))
    output = helpers.schedule_and_run(core)
    (new,) = output.scheduled_new_reqs
    assert (new.num_computed_tokens, output.num_scheduled_tokens, len(new.block_ids[0])) == (8, {"b": 2}, 3)


@pytest.mark.parametrize("index", INDEXES)
def test_a_resumed_hit_is_counted_anew(index: str) -> None:
    """nano-vllm pull 211: the same on the way back from a preemption. vLLM issue 25780: the rate must not count it."""
    core = cached_core(index, num_kv_blocks=6)
    a, b = make_request("a", 9, max_tokens=3), make_request("b", 8, max_tokens=4)
    helpers.add_all(core, [a, b])
    core.step()
    assert helpers.schedule_and_run(core).preempted_req_ids == {"b"}
    while b.status == RequestStatus.PREEMPTED:
        output = helpers.schedule_and_run(core)
    (resumed,) = output.scheduled_cached_reqs
    assert (resumed.resumed, resumed.num_computed_tokens, output.num_scheduled_tokens) == (True, 8, {"b": 1})
    helpers.drive(core)
    assert core.stats().prefix_cache_hits == 0 and core.stats().preempted_prefix_cache_hits == 8


def test_a_hit_in_the_step_that_computes_it(core: EngineCore) -> None:
    """vLLM PR 29387: the second of two equal prompts reads what the first one writes in this very step."""
    requests = [make_request(f"r{i}", P, max_tokens=3) for i in range(3)]
    helpers.add_all(core, requests)
    assert helpers.schedule_and_run(core).num_scheduled_tokens == {"r0": 10, "r1": 2, "r2": 2}
    helpers.drive(core)
    assert all(request.output_token_ids == fake_tokens(P, 3) for request in requests)


def test_an_evicted_block_is_no_hit(core: EngineCore) -> None:
    """mini-sglang's dirty radix value: the tree still named a page that held other tokens by then."""
    for i in range(12):
        serve(core, f"a{i}", [*P, i])
        serve(core, f"b{i}", list(range(200 + 20 * i, 215 + 20 * i)))
        helpers.check(core)
    assert core.stats().prefix_cache_hits > 0


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("index", INDEXES)
def test_eviction_in_blocks_of_any_size(index: str, block_size: int) -> None:
    """mini-sglang: eviction counted tokens where it freed pages, wrong as soon as a page held more than one token."""
    needed = -(-16 // block_size)
    core = cached_core(index, num_kv_blocks=1 + needed + needed // 2, block_size=block_size)
    for i in range(20):
        prompt = [*range(i % 3 * 50, i % 3 * 50 + 9), i]
        assert serve(core, f"r{i}", prompt, max_tokens=3) % block_size == 0
        helpers.assert_nothing_leaked(core)


def test_a_shared_block_is_not_freed_under_its_other_holder(core: EngineCore) -> None:
    """mini-sglang pull 142 and its reference-count assertion: a table named pages that were in the pool again.

    There a request's own copy was exchanged for the known page. Here a table is append-only: equal blocks coexist.
    """
    a, b = make_request("a", P, max_tokens=1), make_request("b", P, max_tokens=6)
    own = make_request("own", P, max_tokens=6, prompt_logprobs=1)
    helpers.add_all(core, [a, b, own])
    core.step()
    assert a.is_finished and not set(block_ids(core, "b")) & set(free_ids(core))
    assert not set(block_ids(core, "b")) & set(block_ids(core, "own")), "computed again, and kept"
    helpers.drive(core)
    assert b.output_token_ids == own.output_token_ids == fake_tokens(P, 6)


def test_a_referenced_block_is_never_evicted() -> None:
    """The learner's classic: the least recently used block is taken whether or not somebody holds it."""
    rng = random.Random(0)
    index = make_index("hash")
    pool, held = BlockPool(12, index), []
    for i in range(300):
        if held and (rng.random() < 0.45 or pool.get_num_free_blocks() < 3):
            pool.free_blocks(held.pop(rng.randrange(len(held)))[::-1])
            continue
        request = named_request(index, [i % 7] * 4 + [i % 3] * 4 + [0])
        hits = index.match(request)
        pool.touch(hits)
        in_use = {block.block_id for table in held for block in table} | {block.block_id for block in hits}
        new = pool.get_new_blocks(2 - len(hits))
        assert not in_use & {block.block_id for block in new}
        index.insert(request, [*hits, *new], 2)
        held.append([*hits, *new])
        pool.check_integrity(held)


def test_a_block_that_is_held_and_in_the_queue_is_noticed() -> None:
    """The same by a bug of the pool's own: taking such a block fails at once, not tokens later."""
    pool = BlockPool(3)
    pool.blocks[1].ref_cnt = 1
    with pytest.raises(AssertionError, match="free and held"):
        pool.get_new_blocks(1)


def test_the_size_of_the_cache_is_counted_once_per_block(core: EngineCore) -> None:
    """SGLang issue 35270: shared pages were counted twice, and free + cached came to more than the pool has."""
    requests = [make_request(f"r{i}", [*P, i], max_tokens=2 + i) for i in range(4)]
    helpers.add_all(core, requests)
    pool = core.scheduler.kv_cache_manager.block_pool
    while core.has_unfinished_requests():
        core.step()
        held = {i for request in core.scheduler.running for i in block_ids(core, request.request_id)}
        cached = [i for i in free_ids(core) if i in known_blocks(index_of(core))]
        assert pool.num_free_cached_blocks == len(cached) and len(free_ids(core)) + len(held) == 8


def test_the_last_sampled_token_has_no_kv() -> None:
    """R6.8: 100 + 60 tokens are 10 blocks of 16, of which 9 are full of computed tokens."""
    core = cached_core(max_model_len=256, block_size=16, num_kv_blocks=17)
    serve(core, "a", list(range(100)), max_tokens=60)
    assert len(known_blocks(index_of(core))) == 9


def test_an_evictable_hit_costs_a_block(core: EngineCore) -> None:
    """R6.22: 8 usable blocks; c's 2 hits and 2 new ones are 4 blocks, 3 are free."""
    serve(core, "old", P[:9])
    helpers.add_all(core, [make_request("a", 11, max_tokens=2), make_request("b", 7, max_tokens=2)])
    core.step()
    core.add_request(make_request("c", [*P[:8], *range(5)], max_tokens=1))
    before = free_ids(core)
    assert len(before) == 3
    output = core.scheduler.schedule()
    assert set(output.num_scheduled_tokens) == {"a", "b"} and free_ids(core) == before, "nothing was touched"
    core.scheduler.update_from_output(output, core.executor.sample(core.executor.execute(output)))
    assert list(helpers.drive(core)) == ["c"]
