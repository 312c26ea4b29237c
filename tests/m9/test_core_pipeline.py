"""Several steps in flight, rule by rule, on a pipeline of fake stages."""

import logging

import pytest

from folovllm.core.sched.output import CachedRequestData
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.executor.fake_pipeline import FakePipeline, FakeStep
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import Request, RequestStatus, TokenLogprobs
from tests import core_helpers as helpers
from tests.core_helpers import block_ids, make_core, make_request
from tests.m9.pipeline_helpers import Started, in_flight, pipeline_core

pytestmark = pytest.mark.m9


def four_requests(max_tokens: int = 6) -> list[Request]:
    return [make_request(name, 3, max_tokens=max_tokens) for name in "abcd"]


def assert_oracle(*requests: Request) -> None:
    for request in requests:
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, request.max_tokens), request


# ---- the pipeline is full


def test_the_worked_example() -> None:
    """Two stages, four requests: each call starts as many steps as are missing and ends the oldest."""
    core, executor = pipeline_core()
    started, requests = Started(executor), four_requests()
    helpers.add_all(core, requests)
    answered = [sorted(output.request_id for output in core.step()) for _ in range(4)]
    assert answered == [["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]]
    assert [list(step) for step in started.steps] == [["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"], ["a", "b"]]
    assert in_flight(executor) == [{"a": 1, "b": 1}]
    helpers.drive(core)
    assert_oracle(*requests)
    helpers.assert_nothing_leaked(core)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_every_stage_has_a_step_while_there_are_requests_for_all(num_stages: int) -> None:
    core, executor = pipeline_core(num_stages, num_kv_blocks=200, max_num_seqs=16)
    helpers.add_all(core, [make_request(f"r{i}", 3, max_tokens=8) for i in range(num_stages + 3)])
    for _ in range(10):
        core.step()
        assert len(executor.in_flight) == num_stages - 1, "each call ends one step of num_stages"
    helpers.drive(core)


@pytest.mark.parametrize(("num_requests", "sizes"), [(4, [2, 2]), (5, [3, 2]), (1, [1]), (2, [1, 1])])
def test_a_step_takes_its_share(num_requests: int, sizes: list[int]) -> None:
    core, executor = pipeline_core()
    started = Started(executor)
    helpers.add_all(core, [make_request(f"r{i}", 3, max_tokens=9) for i in range(num_requests)])
    for _ in range(6):
        core.step()
    assert [len(step) for step in started.steps[:2]] == (sizes * 2)[:2]
    assert all(len(step) in sizes for step in started.steps)


def test_requests_that_find_no_blocks_do_not_make_the_share_larger() -> None:
    """Two requests hold nearly all blocks. With 20 more in the queue, each of the two still has a step of its own."""
    core, executor = pipeline_core(num_kv_blocks=5, max_model_len=16, max_num_seqs=32)
    started = Started(executor)
    helpers.add_all(core, [make_request(f"r{i}", 6, max_tokens=2) for i in range(22)])
    helpers.drive(core)
    assert [list(step) for step in started.steps[:3]] == [["r0", "r1"], ["r0"], ["r1"]]


def test_a_static_batch_is_admitted_whole() -> None:
    core, executor = pipeline_core(batching="static", max_num_seqs=4)
    started, requests = Started(executor), four_requests()
    helpers.add_all(core, requests)
    for _ in range(4):
        core.step()
    assert [len(step) for step in started.steps] == [4, 2, 2, 2, 2]
    helpers.drive(core)
    assert_oracle(*requests)


def test_parts_of_one_prompt_follow_each_other_into_the_pipeline() -> None:
    """12 tokens, 4 per step: S2 reads in each stage what S1 has just written there."""
    core, executor = pipeline_core(3, max_num_batched_tokens=4, enable_chunked_prefill=True)
    started, request = Started(executor), make_request("a", 12, max_tokens=3)
    core.add_request(request)
    assert core.step() == [] and started.steps == [{"a": 4}, {"a": 4}, {"a": 4}]
    assert [output.sampling_req_ids for output in started.outputs] == [set(), set(), {"a"}]
    assert core.step() == [] and len(core.step()) == 1
    helpers.drive(core)
    assert_oracle(request)


def test_one_stage_starts_and_ends_a_step_in_each_call() -> None:
    """The single process is the pipeline of length one: nothing is in flight between two calls."""
    core, executor = pipeline_core(1)
    helpers.add_all(core, four_requests())
    while core.has_unfinished_requests():
        core.step()
        assert executor.in_flight == [] and len(core._in_flight) == 0
    assert set(executor.num_in_flight) == {1}


# ---- empty steps


def test_an_empty_step_is_not_started_while_others_are_in_flight() -> None:
    """b has finished, a is in flight, c finds no blocks. The next step that computes tells the stages of b."""
    core, executor = pipeline_core(num_kv_blocks=5, max_model_len=16)
    started = Started(executor)
    a, b = make_request("a", 3, max_tokens=9), make_request("b", 3, max_tokens=1)
    helpers.add_all(core, [a, b])
    core.step()
    c = make_request("c", 13, max_tokens=2)
    core.add_request(c)
    core.step()  # starts S3 {a}, ends b's
    assert b.is_finished and in_flight(executor) == [{"a": 1}]
    num_scheduled = core.scheduler.num_steps
    core.step()
    assert core.scheduler.num_steps == num_scheduled + 1 and len(started.steps) == 3, "scheduled, and not started"
    assert core.scheduler.finished_req_ids == {"b"}
    helpers.drive(core)
    assert all(started.steps) and [sorted(output.finished_req_ids) for output in started.outputs].count(["b"]) == 1
    assert_oracle(a, b, c)
    helpers.assert_nothing_leaked(core)


def test_an_empty_step_is_started_when_nothing_else_is_in_flight() -> None:
    core, executor = pipeline_core()
    started = Started(executor)
    core.add_request(make_request("a", 3, max_tokens=1))
    core.step()
    assert not core.has_unfinished_requests() and core.scheduler.has_requests()
    assert core.step() == [] and started.outputs[-1].finished_req_ids == {"a"}
    assert [list(stage.requests) for stage in executor.stages] == [[], []]


def test_preemptions_of_an_empty_step_count() -> None:
    """b needs a block, finds none and gives its own back. Nothing is computed, but b waits from now on."""
    core, executor = pipeline_core(num_kv_blocks=5, max_model_len=16)
    a, b = make_request("a", 7, max_tokens=5), make_request("b", 8, max_tokens=5)
    helpers.add_all(core, [a, b])
    core.step()  # S1 {a} has ended, S2 {b} is in flight
    core.step()  # S3 {a}; b's token is there
    assert in_flight(executor) == [{"a": 1}]
    core.step()
    assert b.status == RequestStatus.PREEMPTED and block_ids(core, "b") == []
    helpers.drive(core)
    assert_oracle(a, b)
    helpers.assert_nothing_leaked(core)


# ---- a preemption while a step is in flight


def preempted_in_flight() -> tuple[EngineCore, FakePipeline, Request]:
    """b's first step is in flight when the prefix cache is reset, which preempts b."""
    core, executor = pipeline_core(3)
    a, b = make_request("a", 7, max_tokens=5), make_request("b", 8, max_tokens=5)
    helpers.add_all(core, [a, b])
    core.step()
    assert in_flight(executor) == [{"b": 8}]
    assert core.reset_prefix_cache(reset_running=True)
    return core, executor, b


def test_a_preempted_request_still_gets_its_token() -> None:
    core, _, b = preempted_in_flight()
    assert b.status == RequestStatus.PREEMPTED
    core.step()
    assert b.num_output_tokens == 1 and b.status == RequestStatus.PREEMPTED


def test_a_preempted_request_is_not_admitted_before_its_step_has_ended() -> None:
    """It would be sampled twice for the same position."""
    core, executor, b = preempted_in_flight()
    started = Started(executor)
    core.step()
    assert [list(step) for step in started.steps] == [["a"]] and not core.scheduler.is_in_flight(b)
    core.step()
    assert started.steps[1]["b"] == 9, "8 of the prompt, and the token that came meanwhile"
    helpers.drive(core)
    assert_oracle(b)


def test_the_queue_waits_behind_a_preempted_request_whose_step_is_in_flight() -> None:
    """b can start, c and d are in flight. There is room for two, but e does not overtake the head of the queue."""
    core, executor = pipeline_core()
    started, requests = Started(executor), four_requests()
    helpers.add_all(core, requests)
    core.step()
    assert core.reset_prefix_cache(reset_running=True)
    core.abort_requests(["a"])
    core.add_request(make_request("e", 3, max_tokens=6))
    core.step()
    assert [list(step) for step in started.steps] == [["a", "b"], ["c", "d"], ["b"]]
    helpers.drive(core)
    assert_oracle(*requests[1:])


def test_a_preempted_request_can_finish_while_it_waits() -> None:
    core, _ = pipeline_core()
    a, b = make_request("a", 3, max_tokens=5), make_request("b", 3, max_tokens=1)
    helpers.add_all(core, [a, b])
    core.step()
    assert core.reset_prefix_cache(reset_running=True) and b.status == RequestStatus.PREEMPTED
    (output,) = core.step()
    assert output.request_id == "b" and output.finish_reason == "length" and len(core.scheduler.waiting) == 0
    helpers.drive(core)
    assert_oracle(a, b)
    helpers.assert_nothing_leaked(core)


class LogprobsPipeline(FakePipeline):
    """Answers with one logprob for each of 12 prompt tokens but the first, unless there is output already."""

    def sample(self, handle: FakeStep) -> ModelRunnerOutput:
        answer = super().sample(handle)
        output, requests = handle.scheduler_output, self.stages[-1].requests
        for data in [*output.scheduled_new_reqs, *output.scheduled_cached_reqs]:
            start, token_ids = data.num_computed_tokens + 1, requests[data.request_id].token_ids
            end = start + output.num_scheduled_tokens[data.request_id]
            if len(token_ids) == 12 + len(answer.sampled_token_ids[data.request_id]):
                logprobs = [TokenLogprobs([token_id], [0.0], 1) for token_id in token_ids[start : min(end, 12)]]
                answer.prompt_logprobs[data.request_id] = logprobs
        return answer


@pytest.mark.parametrize("reset_after", [1, 2, 3])
def test_prompt_logprobs_come_once_and_whole_though_the_prompt_is_computed_twice(reset_after: int) -> None:
    """12 prompt tokens in three steps, all in flight. After 1 or 2 answers the last one, which samples, still comes."""
    core = make_core(
        LogprobsPipeline(3), pipeline_parallel_size=3, max_model_len=32, num_kv_blocks=33, max_num_batched_tokens=4,
        enable_chunked_prefill=True,
    )  # fmt: skip
    request = make_request("a", list(range(12)), max_tokens=4, prompt_logprobs=0)
    core.add_request(request)
    outputs = [output for _ in range(reset_after) for output in core.step()]
    core.reset_prefix_cache(reset_running=True)
    while core.has_unfinished_requests():
        outputs += core.step()
    first, *others = outputs
    assert [logprobs.token_ids for logprobs in first.prompt_logprobs or []] == [[i] for i in range(1, 12)]
    assert all(output.prompt_logprobs is None for output in others)
    assert request.output_token_ids == fake_tokens(range(12), 4)


def test_prompt_logprobs_start_again_if_only_the_beginning_was_in_flight() -> None:
    core = make_core(
        LogprobsPipeline(2), pipeline_parallel_size=2, max_model_len=32, num_kv_blocks=33, max_num_batched_tokens=3,
        enable_chunked_prefill=True,
    )  # fmt: skip
    core.add_request(make_request("a", list(range(12)), max_tokens=2, prompt_logprobs=0))
    assert core.step() == []  # tokens 0..2 have ended, 3..5 are in flight
    core.reset_prefix_cache(reset_running=True)
    outputs = helpers.drive(core)["a"]
    assert [logprobs.token_ids for logprobs in outputs[0].prompt_logprobs or []] == [[i] for i in range(1, 12)]


# ---- blocks


def test_a_step_hits_what_a_step_in_flight_computes() -> None:
    """b's step starts before any stage has run a's: it reads a's two full blocks in each stage right after them."""
    core, executor = pipeline_core(enable_prefix_caching=True)
    prompt = list(range(9))
    a, b = make_request("a", prompt, max_tokens=4), make_request("b", [*prompt, 9], max_tokens=4)
    started = Started(executor)
    helpers.add_all(core, [a, b])
    core.step()
    assert started.steps == [{"a": 9}, {"b": 2}] and block_ids(core, "b")[:2] == block_ids(core, "a")[:2]
    helpers.drive(core)
    assert_oracle(a, b)


def test_a_step_copies_what_a_step_in_flight_computes() -> None:
    """The copy is made in each stage behind a's step there. What the step itself computes is still no source."""
    core, executor = pipeline_core(enable_prefix_caching=True, partial_block_hits=True)
    a = make_request("a", list(range(8)), max_tokens=4)
    b, c = make_request("b", [0, 1, 2, 3, 4, 5, 99, 98], max_tokens=4), make_request("c", [7, 7], max_tokens=4)
    started = Started(executor)
    helpers.add_all(core, [a, c, b])
    core.step()
    assert [list(step) for step in started.steps] == [["a", "c"], ["b"]]
    assert started.steps[1] == {"b": 2} and len(started.outputs[1].block_copies) == 1
    source = started.outputs[1].block_copies[0][0]
    assert source == block_ids(core, "a")[1]
    helpers.drive(core)
    assert_oracle(a, b, c)
    helpers.assert_nothing_leaked(core)


def test_blocks_of_an_aborted_request_are_handed_out_while_its_step_is_in_flight() -> None:
    """b gets a's blocks at once. a's step writes them first in each stage, then b's does."""
    core, executor = pipeline_core(num_kv_blocks=4, max_model_len=12, max_num_seqs=8)
    a, b = make_request("a", 7, max_tokens=5), make_request("b", 7, max_tokens=5)
    core.add_request(make_request("c", 3, max_tokens=1))
    core.add_request(a)
    core.step()
    assert in_flight(executor) == [{"a": 7}] and len(block_ids(core, "a")) == 2
    lost = block_ids(core, "a")
    core.abort_requests(["a"])
    core.add_request(b)
    core.step()  # starts b's step before any stage has run a's
    assert in_flight(executor) == [{"b": 7}] and set(lost) == set(block_ids(core, "b"))
    helpers.drive(core)
    assert_oracle(b)
    helpers.assert_nothing_leaked(core)


def test_an_aborted_step_in_flight_is_still_ended() -> None:
    core, executor = pipeline_core()
    helpers.add_all(core, four_requests())
    core.step()
    core.abort_requests("abcd")
    assert executor.in_flight and core.has_unfinished_requests()
    assert core.step() == [] and not executor.in_flight and not core.has_unfinished_requests()
    helpers.assert_nothing_leaked(core)


def test_an_id_that_comes_back_while_its_step_is_in_flight() -> None:
    """The token of the first a is dropped, and the second a starts when that step has ended."""
    core, executor = pipeline_core(3)
    first, second = make_request("a", 7, max_tokens=5), make_request("a", [1, 2, 3], max_tokens=5)
    helpers.add_all(core, [make_request("b", 3, max_tokens=9), first])
    core.step()
    assert in_flight(executor) == [{"a": 7}]
    core.abort_requests(["a"])
    core.add_request(second)
    helpers.drive(core)
    assert first.output_token_ids == []
    assert_oracle(second)
    helpers.assert_nothing_leaked(core)


def test_the_cache_can_be_reset_while_a_copy_is_in_flight() -> None:
    core, _ = pipeline_core(enable_prefix_caching=True, partial_block_hits=True)
    a = make_request("a", list(range(8)), max_tokens=1)
    core.add_request(a)
    helpers.drive(core)
    b, c = make_request("b", [9, 9], max_tokens=4), make_request("c", [0, 1, 2, 3, 4, 5, 9], max_tokens=4)
    helpers.add_all(core, [b, c])
    core.step()
    assert core.reset_prefix_cache(reset_running=True), "no block is held back for the copy"
    helpers.drive(core)
    assert_oracle(a, b, c)


# ---- what the stages before the last are told


def test_the_message_has_the_output_tokens_that_the_step_computes() -> None:
    core, executor = pipeline_core()
    started, request = Started(executor), make_request("a", [5, 6, 7], max_tokens=4)
    core.add_request(request)
    helpers.drive(core)
    sent = [list(data.new_token_ids) for output in started.outputs for data in output.scheduled_cached_reqs]
    assert sent == [[token_id] for token_id in request.output_token_ids[:3]]


def test_a_resumed_request_brings_the_token_that_came_while_it_waited() -> None:
    core, executor, b = preempted_in_flight()
    started = Started(executor)
    core.step()
    core.step()
    (resumed,) = [data for data in started.outputs[-1].scheduled_cached_reqs if data.request_id == "b"]
    assert resumed.resumed and list(resumed.new_token_ids) == b.output_token_ids


def test_one_process_is_told_no_tokens() -> None:
    core = make_core()
    core.add_request(make_request("a", 3, max_tokens=4))
    core.step()
    output = helpers.schedule_and_run(core)
    assert [data.new_token_ids for data in output.scheduled_cached_reqs] == [()]


@pytest.mark.parametrize(
    ("num_computed", "num_scheduled", "sent", "num_known", "expected"),
    [
        (6, 1, (9,), 6, [9]),  # a stage before the last
        (6, 1, (9,), 7, []),  # the last stage has sampled it
        (0, 7, (8, 9), 6, [9]),  # resumed: 8 was sent before the preemption
        (0, 4, (), 6, []),  # a part of the prompt
    ],
)
def test_unknown_tokens(num_computed, num_scheduled, sent, num_known, expected) -> None:
    data = CachedRequestData("a", ([],), num_computed, new_token_ids=sent)
    assert list(data.unknown_tokens(num_known, num_scheduled)) == expected


def test_a_message_without_the_tokens_of_its_step_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="a: the message lacks tokens"):
        CachedRequestData("a", ([],), 6).unknown_tokens(6, 1)


# ---- parts


@pytest.mark.parametrize("part", ["core.scheduler", "core.kv_cache_manager"])
def test_a_replaced_scheduler_or_manager_has_one_step_in_flight(part: str, caplog: pytest.LogCaptureFixture) -> None:
    """It was written for one step at a time, so that is what it gets, with a warning."""
    spec = {
        "core.scheduler": "folovllm.core.sched.scheduler:Scheduler",
        "core.kv_cache_manager": "folovllm.core.kv_cache_manager:KVCacheManager",
    }[part]
    with caplog.at_level(logging.WARNING, "folovllm"):
        core, executor = pipeline_core(parts={part: spec})
    assert "the stages of the pipeline work in turns" in caplog.text
    requests = four_requests()
    helpers.add_all(core, requests)
    helpers.drive(core)
    assert set(executor.num_in_flight) == {1} and len(executor.num_in_flight) <= 7
    assert_oracle(*requests)
