"""Bugs that other engines really had, and that scheduling and paging invite: each test says whose, and where to read.

The ones about prefix hits run on a toy index (a dictionary of token prefixes) put in the place of the null object, so
that the core is held to them before M6 brings the real index.
"""

from typing import Any

import pytest

from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.request import Request, RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import block_ids, caching_core, free_ids, make_core, make_request

pytestmark = pytest.mark.m3


def small_pool(**args: Any) -> tuple[EngineCore, Request, Request]:
    """4 usable blocks of 4: b (8 prompt tokens) is preempted in the second step, when it has generated one token."""
    core = make_core(**({"num_kv_blocks": 5} | args))
    a, b = make_request("a", 7, max_tokens=4), make_request("b", 8, max_tokens=4)
    helpers.add_all(core, [a, b])
    core.step()
    core.step()
    assert b.status == RequestStatus.PREEMPTED and b.num_output_tokens == 1
    return core, a, b


# ---- phases that are guessed


def test_a_resumed_request_is_not_taken_for_a_decode() -> None:
    """nano-vllm issue 144, first half: "has no output yet" was used for "is a prefill", wrong after a preemption.

    Also vllm-gaudi pull 524 and nano-vllm pull 103. Here b has an output and still computes prompt and output again.
    """
    core, _, b = small_pool()
    while b.status == RequestStatus.PREEMPTED:
        output = helpers.schedule_and_run(core)
    assert output.num_scheduled_tokens == {"b": 9} and b.num_prompt_tokens == 8
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(b.prompt_token_ids, 4)


def test_a_resume_counts_output_as_known_tokens() -> None:
    """R2.15: with num_prompt_tokens for num_tokens in pass 2, the last output would never be computed."""
    core, _, b = small_pool()
    while b.status == RequestStatus.PREEMPTED:
        core.step()
    assert (b.num_computed_tokens, b.num_tokens, len(block_ids(core, "b"))) == (9, 10, 3)


def test_the_token_sampled_by_a_resumed_prefill_is_kept() -> None:
    """nano-vllm pull 217: after a re-prefill the sampled token was thrown away, and the length no longer matched."""
    core, _, b = small_pool()
    lengths = [b.num_output_tokens]
    while not b.is_finished:
        core.step()
        lengths.append(b.num_output_tokens)
    assert lengths[-4:] == [1, 2, 3, 4], "one token per step, from the step of the resume on"


def test_preemption_starts_again_from_zero() -> None:
    """The learner's classic: computed tokens not reset, so the resumed request reads blocks it no longer has."""
    core, _, b = small_pool()
    assert (b.num_computed_tokens, block_ids(core, "b"), b.num_output_tokens) == (0, [], 1)
    helpers.drive(core)


def test_finished_requests_are_not_kept_in_the_batch() -> None:
    """The learner's classic: a finished request stays in `running` and is scheduled once more."""
    core = make_core()
    core.add_request(make_request("a", 3, max_tokens=1))
    core.step()
    assert core.scheduler.running == [] and core.scheduler.schedule().num_scheduled_tokens == {}


def test_prompts_do_not_starve_decodes() -> None:
    """Prefill-first scheduling: a stream of new prompts keeps a running request from its next token."""
    core = make_core(max_num_seqs=64, num_kv_blocks=400)
    old = make_request("old", 3, max_tokens=13)
    core.add_request(old)
    for i in range(12):
        core.add_request(make_request(f"new{i}", 15, max_tokens=1))
        core.add_request(make_request(f"more{i}", 15, max_tokens=1))
        core.step()
        assert old.num_output_tokens == i + 1


def test_the_victim_is_the_latest_not_the_oldest() -> None:
    """The learner's classic: preempting the oldest request, which has the most to lose, and may never finish."""
    _, a, _ = small_pool()
    assert a.num_preemptions == 0 and a.status == RequestStatus.RUNNING


# ---- counts that are stale, hits that are too long


def test_tokens_are_counted_after_the_hit_is_known() -> None:
    """nano-vllm pulls 210 and 207: the count was taken before the cache lookup, and ran past the block table."""
    core, _ = caching_core(num_kv_blocks=9)
    prompt = list(range(100, 110))
    core.add_request(make_request("a", prompt, max_tokens=1))
    core.step()
    core.add_request(make_request("b", prompt, max_tokens=2))
    output = helpers.schedule_and_run(core)
    (new,) = output.scheduled_new_reqs
    assert (new.num_computed_tokens, output.num_scheduled_tokens) == (8, {"b": 2})
    assert len(new.block_ids[0]) == 3


def test_a_resumed_request_that_hits_its_own_blocks_counts_right() -> None:
    """nano-vllm pull 211: the same stale count on the way back from a preemption."""
    core, _ = caching_core(num_kv_blocks=6)
    a, b = make_request("a", 9, max_tokens=3), make_request("b", 8, max_tokens=4)
    helpers.add_all(core, [a, b])
    core.step()  # a: 3 blocks, b: 2; the pool is full
    assert helpers.schedule_and_run(core).preempted_req_ids == {"b"}
    while b.status == RequestStatus.PREEMPTED:
        output = helpers.schedule_and_run(core)
    (resumed,) = output.scheduled_cached_reqs
    assert (resumed.resumed, resumed.num_computed_tokens, output.num_scheduled_tokens) == (True, 8, {"b": 1})
    assert b.num_cached_tokens == 0, "what the user is told is the hit of the first admission"
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(b.prompt_token_ids, 4)


def test_a_full_hit_leaves_a_token_to_compute() -> None:
    """nano-vllm issue 144, second half, and pull 199; vLLM pulls 11186 and 17999: a query of length zero.

    8 tokens, both blocks cached: the second one is computed again, into a block of its own.
    """
    core, _ = caching_core(num_kv_blocks=9)
    prompt = list(range(100, 108))
    core.add_request(make_request("a", prompt, max_tokens=1))
    core.step()
    core.add_request(make_request("b", prompt, max_tokens=3))
    output = helpers.schedule_and_run(core)
    assert output.num_scheduled_tokens == {"b": 4} and output.scheduled_new_reqs[0].num_computed_tokens == 4
    helpers.drive(core)


def test_a_hit_in_the_step_that_computes_it() -> None:
    """vLLM PR 29387: two equal prompts admitted together. The second one's hit is written in this very step."""
    core, _ = caching_core(num_kv_blocks=9)
    prompt = list(range(100, 110))
    a, b = make_request("a", prompt, max_tokens=3), make_request("b", prompt, max_tokens=3)
    helpers.add_all(core, [a, b])
    output = helpers.schedule_and_run(core)
    assert output.num_scheduled_tokens == {"a": 10, "b": 2}
    assert block_ids(core, "a")[:2] == block_ids(core, "b")[:2] and block_ids(core, "a")[2] != block_ids(core, "b")[2]
    helpers.drive(core)
    assert a.output_token_ids == b.output_token_ids == fake_tokens(prompt, 3)


def test_a_shared_block_is_not_freed_under_its_other_holder() -> None:
    """mini-sglang pull 142 and its reference-count assertion: pages went back to the pool while a table named them."""
    core, _ = caching_core(num_kv_blocks=9)
    prompt = list(range(100, 110))
    a, b = make_request("a", prompt, max_tokens=1), make_request("b", prompt, max_tokens=6)
    helpers.add_all(core, [a, b])
    core.step()
    assert a.is_finished and not set(block_ids(core, "b")) & set(free_ids(core))
    core.add_request(make_request("c", 15, max_tokens=1))  # would reuse what a gave back
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(prompt, 6)


def test_an_evicted_block_is_no_longer_a_hit() -> None:
    """mini-sglang's stale radix value: the index still named a page that held other tokens by then."""
    core, index = caching_core(num_kv_blocks=5)
    prompt = list(range(100, 110))
    for name, tokens in [("a", prompt), ("b", list(range(200, 215))), ("c", prompt)]:
        core.add_request(make_request(name, tokens, max_tokens=1))
        assert helpers.tokens_of(helpers.drive(core)[name]) == fake_tokens(tokens, 1)
    assert all(block.block_hash is not None for block in index.blocks.values())


def test_blocks_are_taken_only_for_who_is_scheduled() -> None:
    """nano-vllm pull 207's review: allocating before the budget was checked left blocks with a request that waits."""
    core = make_core(max_num_batched_tokens=16, num_kv_blocks=9)
    helpers.add_all(core, [make_request("a", 10), make_request("b", 7)])
    core.scheduler.schedule()
    assert block_ids(core, "b") == [] and len(free_ids(core)) == 8 - 3


def test_a_resume_that_cannot_finish_its_prompt_is_not_begun() -> None:
    """vLLM issue 25538: first chunks of a preempted request fitted, the rest did not, so it was preempted on and on."""
    preemptions = {}
    for reserve in (True, False):
        core = make_core(
            num_kv_blocks=5, enable_chunked_prefill=True, max_num_batched_tokens=4, reserve_full_sequence=reserve
        )
        helpers.add_all(core, [make_request("a", 4, max_tokens=10), make_request("b", 11, max_tokens=4)])
        helpers.drive(core)
        preemptions[reserve] = core.stats().num_preemptions
    assert preemptions[True] < preemptions[False]


# ---- off by one


@pytest.mark.parametrize("block_size", range(1, 9))
@pytest.mark.parametrize("prompt_len", range(1, 10))
def test_positions_count_from_zero(prompt_len: int, block_size: int) -> None:
    """nano-vllm commit f5b4840, pull 67: the first generated token was computed at position len, not len - 1.

    Prompt tokens are at 0 .. prompt_len - 1, so the first output is computed at prompt_len: what is computed by then.
    """
    core = make_core(block_size=block_size, num_kv_blocks=40)
    core.add_request(make_request("a", prompt_len, max_tokens=4))
    starts = [helpers.schedule_and_run(core) for _ in range(4)]
    assert starts[0].scheduled_new_reqs[0].num_computed_tokens == 0
    positions = [output.scheduled_cached_reqs[0].num_computed_tokens for output in starts[1:]]
    assert positions == [prompt_len, prompt_len + 1, prompt_len + 2]
    helpers.assert_nothing_leaked(core)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 8])
def test_a_block_is_taken_when_the_length_is_one_past_a_multiple(block_size: int) -> None:
    """The `len % block_size == 1` against `== 0` question (nano-vllm's may_append), with 1 % 1 == 0 as its own trap.

    When the sequence has `length` tokens, the one computed now is at position length - 1: a multiple of the block size
    means the first slot of a new block.
    """
    core, request = make_core(block_size=block_size, num_kv_blocks=40), make_request("a", 1, max_tokens=15)
    core.add_request(request)
    core.step()
    while not request.is_finished:
        length = request.num_tokens
        (cached,) = helpers.schedule_and_run(core).scheduled_cached_reqs
        assert len(cached.new_block_ids[0]) == ((length - 1) % block_size == 0), length


def test_the_last_sampled_token_has_no_kv() -> None:
    """R3.10: a finished sequence of 160 tokens has published 9 blocks of 16, not 10."""
    core, index = caching_core(max_model_len=256, block_size=16, num_kv_blocks=17)
    request = make_request("a", 100, max_tokens=60)
    core.add_request(request)
    helpers.drive(core)
    assert request.num_tokens == 160 and len(index.blocks) == 9


# ---- mistakes that this design invites


def test_an_evictable_hit_is_counted_and_not_touched_too_early() -> None:
    """R3.9, through the scheduler: c's hit is free, and with it nothing is left for c's own blocks."""
    core, _ = caching_core(num_kv_blocks=5)
    prompt = list(range(100, 108))
    core.add_request(make_request("a", prompt, max_tokens=1))
    core.step()  # leaves 2 blocks, free and cached
    core.add_request(make_request("b", list(range(200, 207)), max_tokens=2))
    core.step()  # holds the 2 others
    core.add_request(make_request("c", [*prompt, 1, 2], max_tokens=1))  # 2 hits + 1 new = 3 > 2
    before = free_ids(core)
    output = core.scheduler.schedule()
    assert output.num_scheduled_tokens == {"b": 1} and free_ids(core) == before
    runner_output = core.executor.sample(core.executor.execute(output))
    core.scheduler.update_from_output(output, runner_output)
    assert list(helpers.drive(core)) == ["c"]


def test_no_new_blocks_is_success() -> None:
    """R3.4: `if not new_blocks` for `is None` would preempt at every step inside a block."""
    core = make_core()
    core.add_request(make_request("a", 5, max_tokens=3))
    helpers.drive(core)
    assert core.stats().num_preemptions == 0


def test_the_tail_of_a_sequence_is_reused_before_its_head() -> None:
    """R3.6: freed head first, a shared prefix would be the first thing to be overwritten."""
    core, index = caching_core(num_kv_blocks=9, free_uncached_first=False)
    core.add_request(make_request("a", 12, max_tokens=1))
    core.step()
    assert free_ids(core) == [4, 5, 6, 7, 8, 3, 2, 1]
    core.add_request(make_request("b", 15, max_tokens=1))
    core.step()  # 4 5 6 7, and back to the tail
    core.add_request(make_request("c", 5, max_tokens=2))
    core.step()
    assert block_ids(core, "c") == [8, 3], "of a's blocks the last one is reused"
    assert {block.block_id: len(prefix) for prefix, block in index.blocks.items() if block.block_id < 4} == {1: 4, 2: 8}


def test_nothing_is_emitted_in_mid_prompt() -> None:
    """R2.12: three chunks of 3 tokens emit nothing, the last chunk emits the first token."""
    core = make_core(max_num_batched_tokens=3, enable_chunked_prefill=True)
    core.add_request(make_request("a", 10, max_tokens=1))
    assert [len(core.step()) for _ in range(4)] == [0, 0, 0, 1]


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    """R2.16: c needs one block, and one is free, once b has lost its two and a has taken one of them."""
    core = make_core(num_kv_blocks=5, scheduling_policy="priority", max_num_seqs=2)
    helpers.add_all(core, [make_request("a", 8, priority=1), make_request("b", 7, priority=2)])
    core.step()
    core.add_request(make_request("c", 2, priority=0))
    output = helpers.schedule_and_run(core)
    assert (output.preempted_req_ids, output.num_scheduled_tokens) == ({"b"}, {"a": 1}) and len(free_ids(core)) == 1


def test_block_0_is_nobodys() -> None:
    """R3.7: padding in block tables points at block 0, so every other request would overwrite one that held it."""
    core = make_core(num_kv_blocks=9)
    helpers.add_all(core, [make_request(f"r{i}", 7, max_tokens=5) for i in range(9)])
    seen: set[int] = set()
    while core.has_unfinished_requests():
        core.step()
        seen |= {i for request in core.scheduler.running for i in block_ids(core, request.request_id)}
    assert seen == set(range(1, 9))
