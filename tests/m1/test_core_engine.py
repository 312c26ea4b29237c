"""EngineCore with one request at a time: the loop, the fake executor, and what a failing executor leaves behind."""

from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import Request, RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import make_core, make_request

pytestmark = pytest.mark.m1


def one_page_core(**args: Any) -> EngineCore:
    """The engine as of M1: one seat, one page per request."""
    defaults: dict[str, Any] = {"block_size": "max_model_len", "max_num_seqs": 1, "batching": "static"}
    return make_core(**(defaults | args))


def test_one_request() -> None:
    core, request = one_page_core(), make_request("a", 5, max_tokens=4)
    core.add_request(request)
    outputs = helpers.drive(core)["a"]
    assert [output.new_token_ids for output in outputs] == [[t] for t in fake_tokens(request.prompt_token_ids, 4)]
    assert [output.finish_reason for output in outputs] == [None, None, None, "length"]
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
    helpers.assert_nothing_leaked(core)


def test_the_preset_of_m1_is_this_engine() -> None:
    config = EngineConfig.preset("m1", max_model_len=16).resolve(helpers.tiny_arch(), "cpu")
    core = EngineCore(config, FakeExecutor())
    assert (core.kv_cache_config.block_size, core.scheduler.max_num_seqs, core.scheduler.batching) == (16, 1, "static")
    helpers.add_all(core, [make_request(f"r{i}", 3 + i, max_tokens=3) for i in range(3)])
    order = list(helpers.drive(core))
    assert order == ["r0", "r1", "r2"]


def test_one_after_the_other_in_the_only_seat() -> None:
    core = one_page_core()
    helpers.add_all(core, [make_request("a", 5, max_tokens=2), make_request("b", 3, max_tokens=2)])
    scheduled = [helpers.schedule_and_run(core).num_scheduled_tokens for _ in range(4)]
    assert scheduled == [{"a": 5}, {"a": 1}, {"b": 3}, {"b": 1}]


def test_the_context_ends_generation() -> None:
    core, request = one_page_core(), make_request("a", 13, max_tokens=100)  # max_model_len 16
    core.add_request(request)
    assert helpers.tokens_of(helpers.drive(core)["a"]) == fake_tokens(request.prompt_token_ids, 3)
    assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED


def test_finish_on_the_first_token() -> None:
    core, request = one_page_core(), make_request("a", 5, max_tokens=1)
    core.add_request(request)
    (output,) = core.step()
    assert output.finished and len(output.new_token_ids) == 1
    assert request.times.first_token == request.times.last_token > 0
    helpers.assert_nothing_leaked(core)


def test_stop_on_the_first_token_by_eos_and_by_stop_id() -> None:
    prompt = [1, 2, 3]
    (first,) = fake_tokens(prompt, 1)
    core = one_page_core()
    core.add_request(make_request("eos", prompt, eos_token_id=first))
    core.add_request(make_request("id", prompt, stop_token_ids=[first]))
    outputs = helpers.drive(core)
    assert [(o.finish_reason, o.stop_reason) for o in outputs["eos"]] == [("stop", None)]
    assert [(o.finish_reason, o.stop_reason) for o in outputs["id"]] == [("stop", first)]


def test_a_duplicate_id_is_refused_until_the_first_is_done() -> None:
    core = one_page_core()
    core.add_request(make_request("a", 5, max_tokens=2))
    with pytest.raises(ValueError, match="'a' is already in use"):
        core.add_request(make_request("a", 3))
    first = helpers.tokens_of(helpers.drive(core)["a"])
    core.add_request(make_request("a", 5, max_tokens=2))
    assert helpers.tokens_of(helpers.drive(core)["a"]) == first, "the worker must have dropped the old state"


def test_a_prompt_that_leaves_no_room_is_our_bug() -> None:
    """Refused by the input processor; in the core it would wait forever, or run past its blocks."""
    core = one_page_core()
    with pytest.raises(AssertionError, match="no room"):
        core.add_request(make_request("a", 16))
    assert not core.has_unfinished_requests()


def test_finished_ids_are_delivered_once() -> None:
    core = one_page_core()
    helpers.add_all(core, [make_request("a", 5, max_tokens=1), make_request("b", 3, max_tokens=2)])
    delivered = [set(helpers.schedule_and_run(core).finished_req_ids) for _ in range(3)]
    assert delivered == [set(), {"a"}, set()]
    assert core.scheduler.has_requests() and not core.has_unfinished_requests()
    last = helpers.schedule_and_run(core)  # nothing to run, but the worker must hear of b
    assert last.is_empty and last.finished_req_ids == {"b"}
    assert not core.scheduler.has_requests() and core.step() == []
    assert helpers.worker_requests(core) == []


def test_times_and_counters() -> None:
    core, request = one_page_core(), make_request("a", 5, max_tokens=3)
    core.add_request(request)
    helpers.drive(core)
    times = request.times
    assert times.arrival <= times.queued <= times.scheduled <= times.first_token < times.last_token
    stats = core.stats()
    assert (stats.num_prompt_tokens, stats.num_generation_tokens, stats.num_steps) == (5, 3, 3)
    assert (stats.num_scheduled_tokens, stats.num_preemptions, stats.kv_cache_usage) == (1, 0, 0.0)


def test_stats_count_slots() -> None:
    core = make_core(block_size=4, num_kv_blocks=9)
    core.add_request(make_request("a", 6))
    core.step()
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 0)
    assert (stats.num_used_slots, stats.num_reserved_slots, stats.kv_cache_usage) == (6, 8, 0.25)


class FailingExecutor(helpers.AttendingExecutor):
    """Raises once, in the call that `fail_in` names."""

    fail_in = ""

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        self._maybe_fail("execute")  # before it has read anything: not even who is finished
        return super().execute(scheduler_output)

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        self._maybe_fail("sample")
        return super().sample(handle)

    def _maybe_fail(self, call: str) -> None:
        if self.fail_in == call:
            self.fail_in = ""
            raise RuntimeError(f"out of memory in {call}")


@pytest.mark.parametrize("call", ["execute", "sample"])
def test_a_failing_step_ends_only_its_own_requests(call: str) -> None:
    executor = FailingExecutor()
    core = make_core(executor, max_num_seqs=2, num_kv_blocks=9)
    requests = [make_request(f"r{i}", 5, max_tokens=2) for i in range(4)]
    helpers.add_all(core, requests)
    core.step()
    core.step()  # r0 and r1 finish; the worker hears of it in the next step, which fails
    executor.fail_in = call
    with pytest.raises(RuntimeError, match=f"out of memory in {call}"):
        core.step()
    core.scheduler.check_integrity()
    assert [request.status.name for request in requests[2:]] == ["FINISHED_ERROR"] * 2
    late: Request = make_request("late", 7, max_tokens=3)
    core.add_request(late)
    assert helpers.tokens_of(helpers.drive(core)["late"]) == fake_tokens(late.prompt_token_ids, 3)
    core.step()
    assert executor.requests == {}, "the worker heard of everybody who is gone"
    helpers.assert_nothing_leaked(core)


def test_a_failing_step_spares_who_waits() -> None:
    executor = FailingExecutor()
    core = make_core(executor, max_num_seqs=1)
    helpers.add_all(core, [make_request("a", 5, max_tokens=3), make_request("b", 5, max_tokens=3)])
    executor.fail_in = "sample"
    with pytest.raises(RuntimeError):
        core.step()
    assert list(helpers.drive(core)) == ["b"]
    helpers.assert_nothing_leaked(core)


def test_an_idle_engine_notices_a_leak() -> None:
    core = make_core()
    core.add_request(make_request("a", 5, max_tokens=2))
    core.step()
    core.scheduler.kv_cache_manager.block_pool.get_new_blocks(1)  # nobody's
    with pytest.raises(AssertionError, match="blocks lost"):
        core.step()
