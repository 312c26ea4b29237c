"""Prefix hits through the whole core, on cases worked out by hand. Blocks of 4; the free queue begins 1, 2, 3, ..."""

from collections.abc import Sequence

import pytest

from folovllm.core.kv_cache_utils import PrefixCacheStats
from folovllm.engine.core import EngineCore
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.executor.fake import fake_tokens
from folovllm.outputs import EngineStats
from folovllm.request import Request, RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import block_ids, free_ids, make_core, make_request
from tests.m6.cache_helpers import INDEXES, cached_core, index_of, known_blocks, serve

pytestmark = pytest.mark.m6

P = list(range(100, 110))  # 10 tokens: 2 full blocks and a half


@pytest.fixture(params=INDEXES)
def core(request: pytest.FixtureRequest) -> EngineCore:
    return cached_core(request.param, num_kv_blocks=9)


@pytest.fixture(params=INDEXES)
def partial_core(request: pytest.FixtureRequest) -> EngineCore:
    return cached_core(request.param, num_kv_blocks=9, partial_block_hits=True)


def counts(stats: EngineStats) -> tuple[int, int]:
    return stats.prefix_cache_queries, stats.prefix_cache_hits


def test_a_second_request_computes_only_what_is_new(core: EngineCore) -> None:
    assert serve(core, "a", P, max_tokens=3) == 0
    core.add_request(make_request("b", [*P[:8], 1, 2, 3], max_tokens=1))
    output = helpers.schedule_and_run(core)
    (new,) = output.scheduled_new_reqs
    assert (new.num_computed_tokens, output.num_scheduled_tokens, new.block_ids[0][:2]) == (8, {"b": 3}, [1, 2])
    assert output.block_copies == []
    helpers.assert_nothing_leaked(core)


def test_off_means_off() -> None:
    core = make_core(num_kv_blocks=9)
    for name in "ab":
        request = make_request(name, P, max_tokens=2)
        core.add_request(request)
        helpers.drive(core)
        assert request.num_cached_tokens == 0 and request.block_hashes == []
    pool = core.scheduler.kv_cache_manager.block_pool
    assert all(block.block_hash is None for block in pool.blocks) and pool.num_free_cached_blocks == 0
    assert core.stats().prefix_cache_hits == 0


def test_generated_tokens_are_cached_too(core: EngineCore) -> None:
    """Multi-turn: the next prompt begins with this one and its answer. 5 + 8 tokens, the last without K/V: 3 blocks."""
    answer = fake_tokens(P[:5], 8)
    assert serve(core, "a", P[:5], max_tokens=8) == 0
    assert serve(core, "b", [*P[:5], *answer, 7], max_tokens=1) == 12


def test_two_equal_prompts_of_one_step_share(core: EngineCore) -> None:
    """Published at scheduling time, so the second hits what the first will only fill (vLLM PR 29387)."""
    a, b = make_request("a", P, max_tokens=3), make_request("b", P, max_tokens=3)
    helpers.add_all(core, [a, b])
    assert helpers.schedule_and_run(core).num_scheduled_tokens == {"a": 10, "b": 2}
    assert (block_ids(core, "a"), block_ids(core, "b")) == ([1, 2, 3], [1, 2, 4])
    assert [core.scheduler.kv_cache_manager.block_pool.blocks[i].ref_cnt for i in (1, 2, 3, 4)] == [2, 2, 1, 1]
    helpers.drive(core)
    assert a.output_token_ids == b.output_token_ids == fake_tokens(P, 3)


@pytest.mark.parametrize("index", INDEXES)
def test_in_chunks_equal_prompts_share_what_is_scheduled(index: str) -> None:
    """A budget of 6 per step: a computes 6 tokens, b finds one full block, and has no budget left for the rest."""
    core = cached_core(index, num_kv_blocks=9, enable_chunked_prefill=True, max_num_batched_tokens=6)
    a, b = make_request("a", P, max_tokens=2), make_request("b", P, max_tokens=2)
    helpers.add_all(core, [a, b])
    assert helpers.schedule_and_run(core).num_scheduled_tokens == {"a": 6}
    assert helpers.schedule_and_run(core).num_scheduled_tokens == {"a": 4, "b": 2}
    assert b.num_cached_tokens == 8, "the second block is published by the chunk of this very step"
    helpers.drive(core)
    assert a.output_token_ids == b.output_token_ids == fake_tokens(P, 2)


def test_n_completions_share_the_prompt(core: EngineCore) -> None:
    params = make_request("x", 1, max_tokens=3).sampling_params.replace(n=3, temperature=1.0)
    parent = ParentRequest(Request("p", P, params))
    children = parent.children()
    helpers.add_all(core, children)
    output = helpers.schedule_and_run(core)
    assert list(output.num_scheduled_tokens.values()) == [10, 2, 2]
    tables = [block_ids(core, child.request_id) for child in children]
    assert {tuple(table[:2]) for table in tables} == {(1, 2)} and len({table[2] for table in tables}) == 3
    helpers.drive(core)
    assert [child.output_token_ids for child in children] == [fake_tokens(P, 3)] * 3


def test_prompt_logprobs_skip_reading_but_write(core: EngineCore) -> None:
    serve(core, "a", P)
    assert serve(core, "b", P, prompt_logprobs=1) == 0
    assert counts(core.stats()) == (10, 0), "b did not ask"
    core.scheduler.reset_prefix_cache()
    assert serve(core, "c", P, prompt_logprobs=1) == 0
    assert serve(core, "d", P) == 8, "what c computed is cached"


def test_salts_keep_users_apart(core: EngineCore) -> None:
    assert [serve(core, f"r{i}", P, cache_salt=salt) for i, salt in enumerate(["x", "y", None, "x"])] == [0, 0, 0, 8]


# ---- preemption, aborts


@pytest.mark.parametrize("index", INDEXES)
def test_a_preempted_request_resumes_through_its_cached_blocks(index: str) -> None:
    """4 usable blocks. b (8 tokens and 1 generated) gives way to a; of its two blocks one is reused by a."""
    core = cached_core(index, num_kv_blocks=5)
    a, b = make_request("a", 8, max_tokens=3), make_request("b", 7, max_tokens=4)
    helpers.add_all(core, [a, b])
    core.step()
    core.step()
    assert b.status == RequestStatus.PREEMPTED and b.num_output_tokens == 1 and free_ids(core) == [3]
    while b.status == RequestStatus.PREEMPTED:
        output = helpers.schedule_and_run(core)
    (resumed,) = output.scheduled_cached_reqs
    assert resumed.resumed and resumed.num_computed_tokens == 4 and resumed.new_block_ids[0][0] == 3
    assert output.num_scheduled_tokens == {"b": 4} and b.num_cached_tokens == 0, "the first admission is what is told"
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(b.prompt_token_ids, 4)
    stats = core.stats()
    assert counts(stats) == (15, 0) and stats.prefix_cache_hit_rate == 0.0
    assert (stats.preempted_prefix_cache_queries, stats.preempted_prefix_cache_hits) == (8, 4), "kept apart"


@pytest.mark.parametrize("moment", ["before", "execute", "sample"])
@pytest.mark.parametrize("partial", [False, True])
def test_abort_in_the_middle(moment: str, partial: bool) -> None:
    """The request whose blocks others share goes away. A step that was scheduled runs: what it computes is good."""
    core = cached_core(num_kv_blocks=12, partial_block_hits=partial)
    serve(core, "old", [*P[:6], 1, 2, 3])
    a, b = make_request("a", P, max_tokens=5), make_request("b", P, max_tokens=5)
    helpers.add_all(core, [a, b])
    if moment == "before":
        core.abort_requests(["a"])
    output = core.scheduler.schedule()
    if moment == "execute":
        core.abort_requests(["a"])
    handle = core.executor.execute(output)
    if moment == "sample":
        core.abort_requests(["a"])
    core.scheduler.update_from_output(output, core.executor.sample(handle))
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(P, 5)
    assert serve(core, "c", [*P, 1]) >= 8
    helpers.assert_nothing_leaked(core)


# ---- eviction


def test_the_least_recently_used_goes_first_and_of_it_the_tail(core: EngineCore) -> None:
    """8 usable blocks. x and y leave 3 cached blocks each; then y is used again, so x's blocks are the older ones."""
    x, y = list(range(200, 213)), list(range(300, 313))
    for name, prompt in [("x", x), ("y", y), ("x2", x), ("y2", y)]:
        serve(core, name, prompt)
    assert len(known_blocks(index_of(core))) == 6 == core.scheduler.kv_cache_manager.block_pool.num_free_cached_blocks
    serve(core, "z", list(range(400, 413)))  # 4 blocks: the 2 plain ones, then x's third and second
    assert [serve(core, f"p{i}", p) for i, p in enumerate(([*y[:12], 0], [*x[:12], 0]))] == [12, 4]


def test_a_hit_makes_a_block_young_again(core: EngineCore) -> None:
    x, y = list(range(200, 209)), list(range(300, 309))
    serve(core, "x", x)
    serve(core, "y", y)
    assert serve(core, "x2", x) == 8
    serve(core, "z", list(range(400, 415)))
    serve(core, "z2", list(range(500, 509)))  # 7 blocks, one of them twice: 4 plain ones, then y's two
    assert [serve(core, f"p{i}", p) for i, p in enumerate((x, y))] == [8, 0]


# ---- statistics


def test_counters_and_rates(core: EngineCore) -> None:
    assert [serve(core, name, P) for name in "abc"] == [0, 8, 8]
    stats = core.stats()
    assert counts(stats) == (30, 16) and stats.prefix_cache_hit_rate == pytest.approx(16 / 30)


def test_the_rate_is_of_the_last_1000_requests() -> None:
    stats = PrefixCacheStats()
    assert stats.hit_rate == 0.0
    for _ in range(1000):
        stats.record(10, 0, is_resumed=False)
    for i in range(1, 1001):
        stats.record(10, 5, is_resumed=False)
        stats.record(1000, 1000, is_resumed=True)
        assert stats.hit_rate == pytest.approx(0.5 * i / 1000)
    assert (stats.queries, stats.hits, stats.preempted_hits) == (20_000, 5_000, 1_000_000)


def test_a_request_that_waits_is_counted_once(core: EngineCore) -> None:
    """R6.15: counted at admission. c looks up in every step until there is room for it."""
    helpers.add_all(core, [make_request("a", 15, max_tokens=1), make_request("b", 13, max_tokens=3)])
    core.add_request(make_request("c", 15, max_tokens=1))
    core.scheduler.max_num_seqs = 2
    helpers.drive(core)
    assert counts(core.stats()) == (43, 0)


# ---- reset


def test_reset_forgets_everything(core: EngineCore) -> None:
    serve(core, "a", P)
    assert core.reset_prefix_cache() and not known_blocks(index_of(core))
    assert serve(core, "b", P) == 0 and core.stats().prefix_cache_hits == 0


def test_reset_is_refused_while_blocks_are_in_use(core: EngineCore) -> None:
    serve(core, "a", P)
    core.add_request(make_request("b", [*P, 1], max_tokens=3))
    core.step()
    known = set(known_blocks(index_of(core)))
    assert not core.reset_prefix_cache() and set(known_blocks(index_of(core))) == known
    helpers.drive(core)
    assert core.reset_prefix_cache()


def test_reset_with_running_requests_sends_them_back_in_order(core: EngineCore) -> None:
    requests = [make_request(name, P[:n], max_tokens=5) for name, n in (("a", 6), ("b", 7), ("c", 5))]
    helpers.add_all(core, requests)
    core.step()
    assert core.reset_prefix_cache(reset_running=True)
    assert helpers.ids(core.scheduler.waiting) == ["a", "b", "c"] and not known_blocks(index_of(core))
    helpers.drive(core)
    for request in requests:
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, 5)


# ---- hits that end inside a block


def copies(core: EngineCore, name: str, prompt: Sequence[int]) -> tuple[int, list[tuple[int, int]], list[int]]:
    """Schedule and run the first step of a request: computed tokens, copies, its table."""
    core.add_request(make_request(name, prompt, max_tokens=2))
    output = helpers.schedule_and_run(core)
    return (
        output.scheduled_new_reqs[0].num_computed_tokens,
        output.block_copies,
        output.scheduled_new_reqs[0].block_ids[0],
    )


def test_the_rest_of_a_block_is_copied(partial_core: EngineCore) -> None:
    """6 of 10 tokens are those of a: block 1 is shared, the first half of block 2 copied into a block of b's own."""
    serve(partial_core, "a", P)
    computed, pairs, table = copies(partial_core, "b", [*P[:6], 1, 2, 3, 4])
    assert (computed, table[0], pairs) == (6, 1, [(2, table[1])]) and table[1] != 2
    helpers.drive(partial_core)
    assert counts(partial_core.stats()) == (20, 6)
    assert serve(partial_core, "c", [*P[:6], 1, 2, 9]) == 8, "b's copy, filled by b, is cached itself"
    assert serve(partial_core, "d", [*P, 1]) == 8, "and a's block is as it was"
    helpers.assert_nothing_leaked(partial_core)


def test_all_but_the_last_token_of_a_whole_prompt(partial_core: EngineCore) -> None:
    """8 tokens, both blocks cached: without copies 4 tokens are computed again, with them 1."""
    serve(partial_core, "a", P[:8])
    computed, pairs, table = copies(partial_core, "b", P[:8])
    assert (computed, pairs) == (7, [(2, table[1])])
    helpers.drive(partial_core)


def test_the_source_is_pinned_until_the_step_has_run(partial_core: EngineCore) -> None:
    """It is free and the next but one to be reused: without the pin c would be given it in the same step."""
    serve(partial_core, "a", P[:8])
    pool = partial_core.scheduler.kv_cache_manager.block_pool
    helpers.add_all(
        partial_core, [make_request("b", [*P[:6], 1, 2], max_tokens=3), make_request("c", 15, max_tokens=1)]
    )
    output = partial_core.scheduler.schedule()
    ((source, destination),) = output.block_copies
    assert source == 2 and pool.blocks[2].ref_cnt == 1 and destination in block_ids(partial_core, "b")
    assert source not in [*block_ids(partial_core, "b"), *block_ids(partial_core, "c"), *free_ids(partial_core)]
    partial_core.scheduler.update_from_output(
        output, partial_core.executor.sample(partial_core.executor.execute(output))
    )
    assert pool.blocks[2].ref_cnt == 0
    helpers.drive(partial_core)
    helpers.assert_nothing_leaked(partial_core)


def test_what_this_step_computes_is_no_source(partial_core: EngineCore) -> None:
    """Copies run before anything is written. Whole blocks of the same step may be shared, parts of them not copied."""
    a, b = make_request("a", P[:8], max_tokens=3), make_request("b", [*P[:6], 1, 2], max_tokens=3)
    helpers.add_all(partial_core, [a, b])
    output = helpers.schedule_and_run(partial_core)
    assert (output.num_scheduled_tokens, output.block_copies) == ({"a": 8, "b": 4}, [])
    helpers.drive(partial_core)
    for request in (a, b):
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, 3)


@pytest.mark.parametrize("index", INDEXES)
def test_a_pool_without_a_block_to_spare_does_without_the_copy(index: str) -> None:
    """4 usable blocks and 13 tokens: all 4 are needed; to hold the source beside them would be to wait for ever."""
    core = cached_core(index, num_kv_blocks=5, partial_block_hits=True)
    serve(core, "a", [*range(8), 8])
    assert serve(core, "b", [*range(6), *range(50, 57)]) == 4
    assert serve(core, "c", [0, 1, 2, 3, 4, 5, 60, 61, 62]) == 6, "9 tokens leave room for it"


def test_several_copies_from_one_source(partial_core: EngineCore) -> None:
    serve(partial_core, "a", P[:8])
    requests = [make_request(f"r{i}", [*P[:5], i, i], max_tokens=3) for i in range(3)]
    helpers.add_all(partial_core, requests)
    output = helpers.schedule_and_run(partial_core)
    assert [source for source, _ in output.block_copies] == [2, 2, 2]
    assert len({destination for _, destination in output.block_copies}) == 3
    helpers.drive(partial_core)
    for request in requests:
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, 3)
    helpers.assert_nothing_leaked(partial_core)
