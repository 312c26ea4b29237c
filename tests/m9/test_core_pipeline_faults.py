"""A step raises while others are in flight: its requests end, or the guilty one, and all others get their tokens."""

import contextlib
import logging
import random
from collections.abc import Iterable

import pytest

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.engine.messages import AddRequests
from folovllm.executor.fake import fake_tokens
from folovllm.executor.fake_pipeline import FakePipeline
from folovllm.request import Request, RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import block_ids, make_request
from tests.interruption import Moment, interrupted, moments_of
from tests.m8.test_core_loop import Run, nine_requests
from tests.m9.pipeline_helpers import in_flight, pipeline_core

pytestmark = pytest.mark.m9


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "folovllm")


class Faults:
    """Raises in the steps that hold all of `ids`, in `stage`, as often as `times` says."""

    def __init__(self, ids: Iterable[str], stage: int = 0, times: int = 1) -> None:
        self.ids, self.stage, self.times = set(ids), stage, times

    def __call__(self, output: SchedulerOutput, stage: int) -> bool:
        if not self.times or stage != self.stage or not self.ids <= output.num_scheduled_tokens.keys():
            return False
        self.times -= 1
        return True


def four_requests() -> list[Request]:
    return [make_request(name, 3, max_tokens=6) for name in "abcd"]


def ended(requests: Iterable[Request]) -> list[str]:
    return [request.request_id for request in requests if request.status == RequestStatus.FINISHED_ERROR]


def drive_and_check(core: EngineCore, executor: FakePipeline, requests: Iterable[Request], gone: str = "") -> None:
    """All go on but those in `gone`."""
    helpers.drive(core)
    for request in requests:
        if request.request_id not in gone:
            assert request.output_token_ids == fake_tokens(request.prompt_token_ids, request.max_tokens), request
    core.step()
    assert all(stage.requests == {} for stage in executor.stages)
    helpers.assert_nothing_leaked(core)


# ---- one of two steps in flight


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(
    ("blamed", "gone"), [(None, "ab"), ((), ""), (("b", "c"), "b")], ids=["its requests", "no request", "b and c"]
)
def test_the_older_step_raises(stage: int, blamed: tuple[str, ...] | None, gone: str) -> None:
    """The third step, {a, b}, raises with {c, d} in flight behind it. c is blamed in vain: it was not in the step."""
    core, executor = pipeline_core(fault=Faults("ab", stage))
    executor.fault, fault = (lambda *_: False), executor.fault
    requests = four_requests()
    helpers.add_all(core, requests)
    core.step()
    core.step()
    executor.fault = fault
    with pytest.raises(RuntimeError, match=f"a fault in stage {stage}"):
        core.step(blamed=blamed)
    assert "".join(ended(requests)) == gone and executor.in_flight == []
    assert [request.num_output_tokens for request in requests] == [1, 1, 1, 1]
    assert "".join(helpers.ids(core.scheduler.waiting)) == "".join(name for name in "abcd" if name not in gone)
    assert core.last_scheduled is not None and list(core.last_scheduled.num_scheduled_tokens) == ["a", "b"]
    drive_and_check(core, executor, requests, gone)


def test_the_newer_step_does_not_start() -> None:
    """`execute` itself raises. The older step, whose answer would have come, is computed again."""
    core, executor = pipeline_core()
    requests = four_requests()
    helpers.add_all(core, requests)
    core.step()
    assert in_flight(executor) == [{"c": 3, "d": 3}]
    execute = executor.execute

    def failing(output: SchedulerOutput) -> object:
        executor.execute = execute  # type: ignore[method-assign]
        raise RuntimeError("a rank does not listen")

    executor.execute = failing  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="does not listen"):
        core.step()
    assert ended(requests) == ["a", "b"] and executor.in_flight == []
    drive_and_check(core, executor, requests, gone="ab")


def test_a_request_that_is_in_both_steps() -> None:
    """a's prompt comes in parts, and two of them are in flight. It waits once, and is sent whole again."""
    core, executor = pipeline_core(
        fault=Faults("a"), max_num_batched_tokens=4, enable_chunked_prefill=True, max_num_seqs=2
    )
    requests = [make_request("a", 12, max_tokens=4), make_request("b", 3, max_tokens=4)]
    helpers.add_all(core, requests)
    with pytest.raises(RuntimeError):
        core.step(blamed=())
    assert helpers.ids(core.scheduler.waiting) == ["a", "b"]
    drive_and_check(core, executor, requests)


def test_a_request_that_was_preempted_in_flight_keeps_its_place_when_the_step_fails() -> None:
    """The only step in flight is undone alone. b is in the queue already, and its first token never comes."""
    core, executor = pipeline_core(fault=Faults("b"))
    requests = [make_request(name, 3, max_tokens=4) for name in "abc"]
    helpers.add_all(core, requests[:2])
    core.step()
    assert in_flight(executor) == [{"b": 3}] and core.reset_prefix_cache(reset_running=True)
    core.abort_requests(["a"])
    core.add_request(requests[2])
    core._max_in_flight = 1  # so that c's step does not start before b's has failed
    with pytest.raises(RuntimeError):
        core.step(blamed=())
    core._max_in_flight = 2
    assert helpers.ids(core.scheduler.waiting) == ["b", "c"] and requests[1].status == RequestStatus.WAITING
    drive_and_check(core, executor, requests, gone="a")


def test_stages_hear_of_finished_requests_though_the_step_that_said_so_was_undone() -> None:
    """a is aborted. {c, d} would have told the stages, and is in flight when {b} raises."""
    core, executor = pipeline_core(fault=Faults("b", stage=1))
    executor.fault, fault = (lambda *_: False), executor.fault
    requests = four_requests()
    helpers.add_all(core, requests)
    core.step()
    core.abort_requests(["a"])
    core.step()
    executor.fault = fault
    with pytest.raises(RuntimeError):
        core.step(blamed=())
    drive_and_check(core, executor, requests, gone="a")


def test_what_a_worker_writes_after_a_failure_is_not_read() -> None:
    """A later step may run on a block table that the failed one should have replaced.

    b holds what were a's blocks before a reset. The step that tells the stages a's new blocks raises. The next one,
    with the rest of a's prompt, is in flight. So stage 0 writes a's K/V where b's are. b had finished its prompt, and
    would hit these blocks if the prefix cache had been kept.
    """
    core, executor = pipeline_core(
        3, enable_prefix_caching=True, enable_chunked_prefill=True, long_prefill_token_threshold=8, num_kv_blocks=11,
        scheduling_policy="priority",
    )  # fmt: skip
    a, b = make_request("a", 16, max_tokens=4, priority=1), make_request("b", 12, max_tokens=4, priority=0)
    core.add_request(make_request("c", 16, max_tokens=4, priority=2))
    core.step()
    core.add_request(a)
    while not a.num_output_tokens:
        core.step()
    old_blocks = block_ids(core, "a")
    core.reset_prefix_cache(reset_running=True)
    core.abort_requests(["c"])
    core.add_request(b)
    while not b.num_output_tokens:
        core.step()
    assert set(block_ids(core, "b")) & set(old_blocks) and [*in_flight(executor)[0]] == ["a"]
    executor.fault = Faults("a")
    with pytest.raises(RuntimeError):
        core.step(blamed=())
    assert len(executor.discarded) == 2 and any(
        "a" in s.scheduler_output.num_scheduled_tokens for s in executor.discarded
    )
    drive_and_check(core, executor, [a, b])


def test_a_step_that_fails_alone_unpublishes_its_own_blocks() -> None:
    """S1 {a} has ended and S2 {b} fails. b computes all of its prompt again, and c hits what S1 computed."""
    core, executor = pipeline_core(enable_prefix_caching=True, fault=Faults("b"))
    a, b = make_request("a", list(range(8)), max_tokens=1), make_request("b", list(range(10, 19)), max_tokens=3)
    helpers.add_all(core, [a, b])
    core.step()
    assert a.is_finished and in_flight(executor) == [{"b": 9}]
    with pytest.raises(RuntimeError):
        core.step(blamed=())
    c = make_request("c", list(range(9)), max_tokens=3)
    core.add_request(c)
    core.step()
    assert (b.num_cached_tokens, c.num_cached_tokens) == (0, 8)
    drive_and_check(core, executor, [a, b, c])


@pytest.mark.parametrize("fails", [True, False])
def test_a_step_that_was_taken_back_is_not_taken_for_the_one_before_it(fails: bool) -> None:
    """c finds no blocks, so its step is empty and not started. What a's step publishes depends on a's step alone."""
    core, executor = pipeline_core(enable_prefix_caching=True, num_kv_blocks=5, max_model_len=16)
    executor.fault = Faults("a", times=int(fails))
    a, c = make_request("a", 9, max_tokens=3), make_request("c", 13, max_tokens=2)
    helpers.add_all(core, [a, c])
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        core.step(blamed=())
    assert core.scheduler.num_steps == 2 and executor.num_in_flight == [1]
    assert core.scheduler.kv_cache_manager.get_computed_blocks(a)[1] == (0 if fails else 8)
    drive_and_check(core, executor, [a, c])


# ---- the search for the guilty request


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("args", [{}, {"num_kv_blocks": 17}, {"max_num_seqs": 3}, {"batching": "static"}], ids=str)
def test_a_poisonous_request_fails_alone(num_stages: int, where: str, args: dict[str, int]) -> None:
    """The loop of the server finds X, though other steps are in flight when X's raise."""
    stage = 0 if where == "first" else num_stages - 1
    defaults = {"max_model_len": 64, "num_kv_blocks": 200, "enable_chunked_prefill": True}
    core, executor = pipeline_core(num_stages, fault=Faults("X", stage, times=-1), **defaults | args)
    requests = nine_requests()
    run = Run(core, [AddRequests(requests)])
    assert run.reason("X") == "error" and run.tokens("X") == []
    for request in requests:
        if request.request_id != "X":
            assert run.tokens(request.request_id) == fake_tokens(request.prompt_token_ids, 12)
            assert run.reason(request.request_id) == "length"
    core.step()
    helpers.assert_nothing_leaked(core)
    if "batching" not in args:  # a static batch is one request while the search goes on, and it went on to the end
        assert max(executor.num_in_flight) == num_stages


def test_aborts_while_a_search_goes_on_and_steps_are_in_flight_leave_nothing() -> None:
    core, executor = pipeline_core(fault=Faults("b"))
    requests = four_requests()
    helpers.add_all(core, requests)
    with pytest.raises(RuntimeError):
        core.step(blamed=())
    core.step(blamed=())
    core.abort_requests("abcd")
    drive_and_check(core, executor, [])


# ---- an exception at any line


def run_to_the_end(core: EngineCore, requests: list[Request]) -> list[str]:
    """Adds, runs, resets and aborts. An exception is caught, and the engine goes on."""
    caught = []
    pending = list(requests)
    for i in range(200):
        try:
            if pending and i % 2 == 0:
                core.add_request(pending[0])
                pending.pop(0)
            if i == 5:
                core.reset_prefix_cache(reset_running=True)
            if not pending and not core.has_unfinished_requests():
                break
            core.step(blamed=())
        except Boom as error:
            caught.append(str(error))
            if pending and core.serves(pending[0]):
                pending.pop(0)
            elif pending and pending[0].is_finished:  # its addition was interrupted
                i = requests.index(pending[0])
                old = pending[0]
                pending[0] = requests[i] = make_request(old.request_id, old.prompt_token_ids, old.max_tokens)
    return caught


class Boom(Exception):
    pass


def scenario() -> tuple[EngineCore, FakePipeline, list[Request]]:
    core, executor = pipeline_core(
        3, rng=random.Random(0), num_kv_blocks=13, max_num_batched_tokens=6, enable_chunked_prefill=True,
        enable_prefix_caching=True, partial_block_hits=True, reserve_full_sequence=False,
    )  # fmt: skip
    prompts = [range(9), range(14), [*range(6), 9, 9], range(20), [5]]
    return core, executor, [make_request(f"r{i}", list(prompt), max_tokens=9) for i, prompt in enumerate(prompts)]


def test_an_exception_at_any_line_costs_no_request_anything() -> None:
    """No request is blamed, so all of them get all their tokens, whatever line of the engine it was."""
    core, executor, requests = scenario()
    moments = [m for m in moments_of(lambda: run_to_the_end(core, requests)) if "/executor/" not in m[0]]
    assert core.stats().num_preemptions > len(requests) and core.stats().prefix_cache_hits > 0
    assert max(executor.num_in_flight) == 3
    num_caught = 0
    for moment in random.Random(1).sample(moments, 80):
        num_caught += check_interruption(moment)
    assert num_caught >= 60


def check_interruption(moment: Moment) -> bool:
    core, executor, requests = scenario()
    with interrupted(moment, Boom(str(moment))) as at:
        caught = run_to_the_end(core, requests)
    assert len(caught) == bool(at), (moment, caught)
    for request in requests:
        tokens = fake_tokens(request.prompt_token_ids, request.max_tokens)
        assert request.output_token_ids == tokens, (moment, request)
    core.step()
    assert executor.in_flight == [] and not core._in_flight, moment
    assert all(stage.requests == {} for stage in executor.stages), moment
    helpers.assert_nothing_leaked(core)
    return bool(at)
