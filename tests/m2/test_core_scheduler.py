"""Scheduler.schedule() on canonical cases (R2.1 to R2.13), every schedule worked out by hand.

With pages of a whole request (block_size = max_model_len) only budget and seats matter; tests/m3 adds the blocks.
"""

from typing import Any

import pytest

from folovllm.core.sched.output import CachedRequestData
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import TokenLogprobs
from tests import core_helpers as helpers
from tests.core_helpers import make_core, make_request

pytestmark = pytest.mark.m2


def page_core(**args: Any) -> EngineCore:
    return make_core(**({"block_size": "max_model_len"} | args))


def scheduled(core: EngineCore, steps: int) -> list[dict[str, int]]:
    """Run `steps` steps; {request id: tokens} of each, in scheduling order."""
    return [dict(helpers.schedule_and_run(core).num_scheduled_tokens) for _ in range(steps)]


def test_decodes_come_before_new_prompts() -> None:
    core = page_core()
    core.add_request(make_request("a", 5, max_tokens=3))
    assert scheduled(core, 1) == [{"a": 5}]
    core.add_request(make_request("b", 3, max_tokens=3))
    (step,) = scheduled(core, 1)
    assert list(step.items()) == [("a", 1), ("b", 3)]
    assert scheduled(core, 3) == [{"a": 1, "b": 1}, {"b": 1}, {}]


def test_continuous_fills_a_seat_as_soon_as_it_is_free() -> None:
    core = page_core(max_num_seqs=2, batching="continuous")
    helpers.add_all(core, [make_request(name, 4, max_tokens=n) for name, n in [("a", 4), ("b", 2), ("c", 2)]])
    assert scheduled(core, 4) == [{"a": 4, "b": 4}, {"a": 1, "b": 1}, {"a": 1, "c": 4}, {"a": 1, "c": 1}]


def test_static_admits_only_when_nothing_runs() -> None:
    core = page_core(max_num_seqs=2, batching="static")
    helpers.add_all(core, [make_request(name, 4, max_tokens=n) for name, n in [("a", 4), ("b", 2), ("c", 2)]])
    assert scheduled(core, 6) == [{"a": 4, "b": 4}, {"a": 1, "b": 1}, {"a": 1}, {"a": 1}, {"c": 4}, {"c": 1}]


def test_seats() -> None:
    core = page_core(max_num_seqs=3)
    helpers.add_all(core, [make_request(f"r{i}", 2, max_tokens=2) for i in range(5)])
    assert scheduled(core, 4) == [
        {"r0": 2, "r1": 2, "r2": 2},
        {"r0": 1, "r1": 1, "r2": 1},
        {"r3": 2, "r4": 2},
        {"r3": 1, "r4": 1},
    ]


def test_budget_without_chunks_stops_at_the_first_that_does_not_fit() -> None:
    """10 + 7 > 16: b waits, and c, which would fit, may not overtake it (R2.5)."""
    core = page_core(max_num_batched_tokens=16)
    helpers.add_all(core, [make_request(name, n, max_tokens=2) for name, n in [("a", 10), ("b", 7), ("c", 1)]])
    assert scheduled(core, 3) == [{"a": 10}, {"a": 1, "b": 7, "c": 1}, {"b": 1, "c": 1}]


def test_budget_used_up_exactly() -> None:
    core = page_core(max_num_batched_tokens=16)
    helpers.add_all(core, [make_request(name, n, max_tokens=2) for name, n in [("a", 10), ("b", 6), ("c", 1)]])
    assert scheduled(core, 2) == [{"a": 10, "b": 6}, {"a": 1, "b": 1, "c": 1}]


def test_chunked_prefill_takes_what_the_budget_leaves() -> None:
    core = page_core(max_num_batched_tokens=8, enable_chunked_prefill=True)
    helpers.add_all(core, [make_request(name, n, max_tokens=3) for name, n in [("a", 6), ("b", 10), ("c", 3)]])
    # Step 2: a decodes, then b's next 7; step 3: a decodes, the last of b's prompt, then c.
    assert scheduled(core, 3) == [{"a": 6, "b": 2}, {"a": 1, "b": 7}, {"a": 1, "b": 1, "c": 3}]
    assert scheduled(core, 2) == [{"b": 1, "c": 1}, {"b": 1, "c": 1}]
    helpers.assert_nothing_leaked(core)


def test_long_prefill_threshold_caps_a_prompt_in_both_passes() -> None:
    core = page_core(max_num_batched_tokens=16, enable_chunked_prefill=True, long_prefill_token_threshold=4)
    helpers.add_all(core, [make_request("a", 10, max_tokens=1), make_request("b", 3, max_tokens=1)])
    assert scheduled(core, 3) == [{"a": 4, "b": 3}, {"a": 4}, {"a": 2}]


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 16])
def test_tokens_do_not_depend_on_the_budget(budget: int) -> None:
    core = page_core(max_num_batched_tokens=budget, enable_chunked_prefill=True)
    requests = [make_request(f"r{i}", 3 + 2 * i, max_tokens=4) for i in range(5)]
    helpers.add_all(core, requests)
    outputs = helpers.drive(core)
    for request in requests:
        assert helpers.tokens_of(outputs[request.request_id]) == fake_tokens(request.prompt_token_ids, 4)


def test_nothing_is_emitted_in_mid_prompt() -> None:
    core = page_core(max_num_batched_tokens=4, enable_chunked_prefill=True)
    core.add_request(make_request("a", 9, max_tokens=1))
    assert core.step() == [] and core.step() == []
    (output,) = core.step()
    assert len(output.new_token_ids) == 1 and output.finished


def test_computed_tokens_advance_at_scheduling() -> None:
    """Before the step ran: a pipelined engine may schedule the next one at once, and finds nothing to do for a."""
    core, request = page_core(), make_request("a", 5, max_tokens=3)
    core.add_request(request)
    first = core.scheduler.schedule()
    assert request.num_computed_tokens == 5
    core.add_request(make_request("b", 2, max_tokens=1))
    second = core.scheduler.schedule()
    assert second.num_scheduled_tokens == {"b": 2}
    for output in (first, second):
        core.scheduler.update_from_output(output, core.executor.sample(core.executor.execute(output)))
    assert request.num_output_tokens == 1 and request.num_computed_tokens == 5
    assert scheduled(core, 1) == [{"a": 1}]


def test_the_message_down_a_new_request_whole_a_known_one_as_a_diff() -> None:
    core, request = make_core(block_size=4), make_request("a", 7, max_tokens=9, seed=5)
    core.add_request(request)
    first = helpers.schedule_and_run(core)
    (new,) = first.scheduled_new_reqs
    assert (new.request_id, new.prompt_token_ids, new.block_ids) == ("a", request.prompt_token_ids, ([1, 2],))
    assert new.sampling_params is request.sampling_params and new.num_computed_tokens == 0
    assert first.sampling_req_ids == {"a"} and first.scheduled_cached_reqs == []
    rest = [helpers.schedule_and_run(core) for _ in range(2)]
    assert [step.scheduled_cached_reqs for step in rest] == [
        [CachedRequestData("a", ([],), num_computed_tokens=7)],  # position 7 is the last of block 2
        [CachedRequestData("a", ([3],), num_computed_tokens=8)],
    ]
    assert [step.scheduled_new_reqs for step in rest] == [[], []]


def test_who_samples() -> None:
    core = page_core(max_num_batched_tokens=8, enable_chunked_prefill=True)
    helpers.add_all(core, [make_request("a", 6, max_tokens=3), make_request("b", 5, max_tokens=3)])
    steps = [helpers.schedule_and_run(core) for _ in range(2)]
    assert [step.sampling_req_ids for step in steps] == [{"a"}, {"a", "b"}]


def test_priority_admits_the_urgent_first_but_preempts_nobody_for_it() -> None:
    core = page_core(max_num_seqs=1, scheduling_policy="priority")
    core.add_request(make_request("idle", 2, max_tokens=2, priority=9))
    assert scheduled(core, 1) == [{"idle": 2}]
    helpers.add_all(
        core, [make_request("b", 2, max_tokens=1, priority=5), make_request("c", 2, max_tokens=1, priority=1)]
    )
    assert scheduled(core, 3) == [{"idle": 1}, {"c": 2}, {"b": 2}]


def test_requests_added_while_others_run() -> None:
    core = page_core(max_num_seqs=3)
    requests = [make_request(f"r{i}", 1 + i % 7, max_tokens=1 + i % 5) for i in range(20)]
    outputs: dict[str, list] = {}
    for request in requests:
        core.add_request(request)
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    for request_id, more in helpers.drive(core).items():
        outputs.setdefault(request_id, []).extend(more)
    for request in requests:
        expected = fake_tokens(request.prompt_token_ids, request.max_tokens)
        assert helpers.tokens_of(outputs[request.request_id]) == expected
    helpers.assert_nothing_leaked(core)


def test_tokens_beyond_the_stop_are_dropped() -> None:
    """Several tokens in one step (drafts, later): what follows the stop is nobody's, and so are its logprobs."""
    core, request = page_core(), make_request("a", 3, max_tokens=9, stop_token_ids=[42])
    core.add_request(request)
    scheduler_output = core.scheduler.schedule()
    logprobs = [TokenLogprobs([token_id], [-0.5], rank=1) for token_id in (41, 42, 43)]
    runner_output = ModelRunnerOutput(sampled_token_ids={"a": [41, 42, 43]}, logprobs={"a": logprobs})
    (output,) = core.scheduler.update_from_output(scheduler_output, runner_output)
    assert output.new_token_ids == request.output_token_ids == [41, 42]
    assert output.new_logprobs == logprobs[:2] and (output.finish_reason, output.stop_reason) == ("stop", 42)
    assert core.stats().num_generation_tokens == 2
    helpers.assert_nothing_leaked(core)


def test_prompt_logprobs_are_collected_over_chunks_and_delivered_once() -> None:
    core = page_core(max_num_batched_tokens=2, enable_chunked_prefill=True)
    core.add_request(make_request("a", 4, max_tokens=2, prompt_logprobs=0))
    parts = [[TokenLogprobs([1], [-1.0], rank=1), TokenLogprobs([2], [-2.0], rank=1)], [TokenLogprobs([3], [-3.0], 1)]]
    outputs = []
    for part in [*parts, []]:
        scheduler_output = core.scheduler.schedule()
        runner_output = core.executor.sample(core.executor.execute(scheduler_output))
        runner_output.prompt_logprobs["a"] = part
        outputs += core.scheduler.update_from_output(scheduler_output, runner_output)
    assert [output.prompt_logprobs for output in outputs] == [parts[0] + parts[1], None]
