"""Block ids, preemptions and resumes on canonical cases (R2.14 to R2.17, R3.2), every one worked out by hand.

Blocks of 4 tokens; the pool starts with the free queue 1, 2, 3, ...
"""

from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.parts import variants
from folovllm.request import Request, RequestStatus, TokenLogprobs
from tests import core_helpers as helpers
from tests.core_helpers import block_ids, free_ids, make_core, make_request

pytestmark = pytest.mark.m3


def run(core: EngineCore) -> tuple[dict[str, int], set[str]]:
    """One step: what was scheduled and who was preempted."""
    output = helpers.schedule_and_run(core)
    return dict(output.num_scheduled_tokens), set(output.preempted_req_ids)


def cached_data(output: SchedulerOutput) -> dict[str, tuple[list[int], int, bool]]:
    return {c.request_id: (c.new_block_ids[0], c.num_computed_tokens, c.resumed) for c in output.scheduled_cached_reqs}


@pytest.mark.parametrize(
    ("free_uncached_first", "free_afterwards"), [(True, [3, 2, 1, 4, 5, 6, 7, 8]), (False, [4, 5, 6, 7, 8, 3, 2, 1])]
)
def test_life_of_a_block_table(free_uncached_first: bool, free_afterwards: list[int]) -> None:
    """6 prompt tokens and 4 generated, of which the last has no K/V: 9 slots, 3 blocks."""
    core = make_core(num_kv_blocks=9, free_uncached_first=free_uncached_first)
    core.add_request(make_request("a", 6, max_tokens=4))
    tables = []
    for _ in range(3):
        run(core)
        tables.append(block_ids(core, "a"))
    assert tables == [[1, 2], [1, 2], [1, 2]]  # positions 0-5, 6, 7
    (cached,) = helpers.schedule_and_run(core).scheduled_cached_reqs  # position 8; finishes
    assert (cached.new_block_ids, cached.num_computed_tokens) == (([3],), 8)
    assert free_ids(core) == free_afterwards


def test_the_last_block_is_taken_only_when_a_token_needs_it() -> None:
    """8 prompt tokens fill 2 blocks; with max_tokens=1 the sampled token is never computed, so no third is taken."""
    core = make_core(num_kv_blocks=5)
    core.add_request(make_request("a", 8, max_tokens=1))
    core.add_request(make_request("b", 8, max_tokens=1))
    assert run(core) == ({"a": 8, "b": 8}, set())
    helpers.assert_nothing_leaked(core)


def full_pool(prompt_a: int, prompt_b: int, **args: Any) -> tuple[EngineCore, Request, Request]:
    """4 usable blocks; after one step a holds 1 and 2, b holds 3 and 4."""
    core = make_core(**({"num_kv_blocks": 5} | args))
    a, b = make_request("a", prompt_a, max_tokens=4), make_request("b", prompt_b, max_tokens=4)
    helpers.add_all(core, [a, b])
    assert run(core) == ({"a": prompt_a, "b": prompt_b}, set())
    assert (block_ids(core, "a"), block_ids(core, "b")) == ([1, 2], [3, 4])
    return core, a, b


def test_fcfs_the_latest_admitted_is_preempted() -> None:
    """a needs a third block: b loses 3 and 4, freed in reverse, so a gets 4."""
    core, a, b = full_pool(8, 7)
    assert run(core) == ({"a": 1}, {"b"})
    assert block_ids(core, "a") == [1, 2, 4] and free_ids(core) == [3]
    assert (b.status, b.num_computed_tokens, b.num_tokens, b.num_preemptions) == (RequestStatus.PREEMPTED, 0, 8, 1)
    # b's 8 known tokens need 2 blocks: it waits until a has finished (its 4th token), then computes all 8 again.
    assert [run(core) for _ in range(2)] == [({"a": 1}, set())] * 2
    assert free_ids(core) == [4, 2, 1, 3] and a.is_finished
    resumed = helpers.schedule_and_run(core)
    assert resumed.num_scheduled_tokens == {"b": 8} and resumed.scheduled_new_reqs == []
    assert cached_data(resumed) == {"b": ([4, 2], 0, True)}, "all blocks, to replace the worker's table"
    helpers.drive(core)
    for request in (a, b):
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, 4)
    assert core.stats().num_preemptions == 1


def test_fcfs_a_request_at_the_end_preempts_itself() -> None:
    core, _, _ = full_pool(7, 8)
    assert run(core) == ({"a": 1}, {"b"})
    assert block_ids(core, "a") == [1, 2] and free_ids(core) == [4, 3]
    assert run(core) == ({"a": 1}, set())  # position 8: block 4
    assert block_ids(core, "a") == [1, 2, 4]


def test_several_victims_keep_their_order_in_the_queue() -> None:
    """Mid-prompt a takes 4 blocks at once from d, then c: they wait as c, d, ahead of e who never ran."""
    core = make_core(
        max_model_len=32, num_kv_blocks=9, max_num_batched_tokens=20, enable_chunked_prefill=True, max_num_seqs=4,
        long_prefill_token_threshold=16, reserve_full_sequence=False, scheduling_policy="fcfs",
    )  # fmt: skip
    core.scheduler.long_prefill_token_threshold = 4
    helpers.add_all(core, [make_request(name, n) for name, n in [("a", 28), ("b", 7), ("c", 7), ("d", 7), ("e", 3)]])
    run(core)  # a 4, b 4, c 4, d 4: one block each
    run(core)  # a 4, b 3, c 3, d 3: two each, the pool is full
    assert free_ids(core) == []
    core.scheduler.long_prefill_token_threshold = 16
    scheduled, preempted = run(core)  # a wants 16 more: 4 blocks
    assert (scheduled, preempted) == ({"a": 16, "b": 1}, {"c", "d"})
    assert helpers.ids(core.scheduler.waiting) == ["c", "d", "e"]


def test_head_of_line_blocking() -> None:
    """b needs 3 blocks, 2 are free; c needs 1 and waits behind b all the same."""
    core = make_core(num_kv_blocks=5)
    helpers.add_all(core, [make_request(name, n, max_tokens=2) for name, n in [("a", 7), ("b", 9), ("c", 1)]])
    assert [run(core)[0] for _ in range(3)] == [{"a": 7}, {"a": 1}, {"b": 9, "c": 1}]


def test_a_step_that_preempted_admits_nobody() -> None:
    """c is more urgent and needs just the one block that is left when b has gone; it must wait for the next step."""
    core = make_core(num_kv_blocks=5, max_num_seqs=2, scheduling_policy="priority")
    helpers.add_all(core, [make_request("a", 8, priority=1), make_request("b", 7, priority=5)])
    run(core)
    core.add_request(make_request("c", 1, priority=0))
    assert run(core) == ({"a": 1}, {"b"})
    assert free_ids(core) == [3] and helpers.ids(core.scheduler.waiting) == ["c", "b"]
    assert run(core) == ({"a": 1, "c": 1}, set())


def victim_scheduled_already() -> EngineCore:
    """running = [a (least urgent), b, c]; the pool is full, and the next step's b needs a block."""
    core = make_core(num_kv_blocks=7, scheduling_policy="priority", enable_chunked_prefill=True)
    core.add_request(make_request("a", 5, priority=9))
    assert run(core)[0] == {"a": 5}  # blocks 1 2
    helpers.add_all(core, [make_request("b", 8, priority=0), make_request("c", 5, priority=1)])
    assert run(core)[0] == {"a": 1, "b": 8, "c": 5}  # b: 3 4, c: 5 6
    assert helpers.ids(core.scheduler.running) == ["a", "b", "c"] and free_ids(core) == []
    return core


def test_a_victim_scheduled_earlier_in_the_step_is_taken_back() -> None:
    """vLLM in 2025 left its tokens in the step and skipped c, because the list had moved under the index (R2.17)."""
    core = victim_scheduled_already()
    assert run(core) == ({"b": 1, "c": 1}, {"a"})
    assert block_ids(core, "b") == [3, 4, 2] and free_ids(core) == [1]


def test_its_tokens_return_to_the_budget() -> None:
    core = victim_scheduled_already()
    core.scheduler.max_num_batched_tokens = 2  # a and b use it up; with a's token back there is one for c
    assert run(core) == ({"b": 1, "c": 1}, {"a"})


def test_priority_ties_are_broken_by_arrival() -> None:
    core = make_core(num_kv_blocks=5, scheduling_policy="priority")
    helpers.add_all(
        core,
        [make_request("late", 8, priority=1, arrival_time=2.0), make_request("early", 7, priority=1, arrival_time=1.0)],
    )
    assert run(core)[0] == {"early": 7, "late": 8}
    assert run(core) == ({"early": 1}, {"late"})


def test_reserve_full_sequence_keeps_a_long_prompt_out_until_it_fits() -> None:
    """a holds 2 of 4 blocks. b's first chunk of 8 would fit, its 12 tokens do not (R3.11)."""
    for reserve, second_step in [(True, {"a": 1}), (False, {"a": 1, "b": 7})]:
        core = make_core(
            num_kv_blocks=5, enable_chunked_prefill=True, max_num_batched_tokens=8, reserve_full_sequence=reserve
        )
        helpers.add_all(core, [make_request("a", 7, max_tokens=2), make_request("b", 12, max_tokens=2)])
        core.scheduler.max_num_seqs = 1  # so that a is alone in the first step
        run(core)
        core.scheduler.max_num_seqs = 8
        assert run(core)[0] == second_step
        helpers.drive(core)


def test_static_batch_with_a_preemption_ends_before_anybody_comes_back() -> None:
    core, _, _ = full_pool(8, 7, batching="static")
    assert run(core) == ({"a": 1}, {"b"})
    core.add_request(make_request("c", 1, max_tokens=1))  # would fit
    assert [run(core)[0] for _ in range(3)] == [{"a": 1}, {"a": 1}, {"b": 8, "c": 1}]


@pytest.mark.parametrize("reserve_full_sequence", [True, False])
@pytest.mark.parametrize("scheduling_policy", variants("core.request_queue"))
@pytest.mark.parametrize("batching", ["static", "continuous"])
@pytest.mark.parametrize("block_size", range(1, 17))
def test_tokens_do_not_depend_on_block_size_or_batching(
    block_size: int, batching: str, scheduling_policy: str, reserve_full_sequence: bool
) -> None:
    """The same 12 requests through the smallest pool there may be."""
    core = make_core(
        block_size=block_size,
        num_kv_blocks=1 + -(-16 // block_size),
        batching=batching,
        scheduling_policy=scheduling_policy,
        reserve_full_sequence=reserve_full_sequence,
    )
    requests = [make_request(f"r{i}", 1 + i * 5 % 13, max_tokens=1 + i * 7 % 9, priority=i % 3) for i in range(12)]
    expected = {r.request_id: helpers.expected_tokens(r, 16) for r in requests}
    helpers.add_all(core, requests)
    assert {name: helpers.tokens_of(outputs) for name, outputs in helpers.drive(core).items()} == expected
    helpers.assert_nothing_leaked(core)


def test_two_requests_that_both_grow_do_not_preempt_each_other_for_ever() -> None:
    """Together they need twice the pool: one gives way once, and comes back when the other is done."""
    core = make_core(num_kv_blocks=5)
    a, b = make_request("a", 2, max_tokens=14), make_request("b", 2, max_tokens=14)
    helpers.add_all(core, [a, b])
    helpers.drive(core)
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)


def test_a_victim_forgets_half_a_prompts_logprobs() -> None:
    """They are computed again with the prompt."""
    core, _, b = full_pool(8, 7)
    b.prompt_logprobs = [TokenLogprobs([1], [-1.0], rank=1)]
    assert run(core) == ({"a": 1}, {"b"})
    assert b.prompt_logprobs == []


@pytest.mark.parametrize(("rung", "without"), [("m1", ()), ("m2", ()), ("m3", ()), ("m3", ("m2",)), ("m3", ("m3",))])
def test_every_preset_gives_the_same_tokens(rung: str, without: tuple[str, ...]) -> None:
    config = EngineConfig.preset(rung, without, max_model_len=64).resolve(helpers.tiny_arch(), "cpu")
    core = EngineCore(config, helpers.AttendingExecutor())
    requests = [make_request(f"r{i}", 1 + i * 17 % 60, max_tokens=1 + i * 7 % 30) for i in range(40)]
    expected = {request.request_id: helpers.expected_tokens(request, 64) for request in requests}
    helpers.add_all(core, requests)
    assert {name: helpers.tokens_of(outputs) for name, outputs in helpers.drive(core).items()} == expected
    helpers.assert_nothing_leaked(core)
