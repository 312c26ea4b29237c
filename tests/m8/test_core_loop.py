"""EngineCoreLoop and FaultFinder: messages in order, blocks freed at once, and a failing request that fails alone."""

import dataclasses
import logging
import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.engine.core_loop import MAX_FAILED_STEPS, EngineCoreLoop
from folovllm.engine.fault_finder import FaultFinder
from folovllm.engine.messages import AbortRequests, AddRequests, Call, CallResult, DownMessage, StepOutputs, Stop
from folovllm.executor.fake import FakeExecutor
from folovllm.learn.toy_engine import assert_nothing_leaked, expected_tokens, make_config, make_request
from folovllm.outputs import EngineCoreOutput, ModelRunnerOutput
from folovllm.request import Request, RequestStatus

pytestmark = pytest.mark.m8

Raises = Callable[["FaultyExecutor", SchedulerOutput], bool]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "folovllm")


class FaultyExecutor(FakeExecutor):
    """Raises in the steps that `raises` picks; `num_raised` counts them."""

    def __init__(self, raises: Raises) -> None:
        super().__init__()
        self._raises = raises
        self.num_raised = 0
        self.raised_with: list[int] = []  # how many requests were in those steps

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        if self._raises(self, handle):
            self.num_raised += 1
            self.raised_with.append(len(handle.num_scheduled_tokens))
            raise RuntimeError("a fault in the model")
        return super().sample(handle)


class Script:
    """An inbox that gives one list of messages per step, then waits until the engine is idle, and stops it."""

    def __init__(self, *batches: Iterable[DownMessage]) -> None:
        self._batches = [list(batch) for batch in batches]

    def take(self, wait: bool, timeout: float | None = None) -> list[DownMessage]:
        if self._batches:
            return self._batches.pop(0)
        return [Stop()] if wait else []


class Run:
    """What a loop has sent, by kind and by request."""

    def __init__(self, core: EngineCore, *batches: Iterable[DownMessage]) -> None:
        self.core = core
        self.sent: list[object] = []
        EngineCoreLoop(core, Script(*batches), self.sent.append).run()
        self.steps = [message for message in self.sent if isinstance(message, StepOutputs)]
        self.outputs: dict[str, list[EngineCoreOutput]] = {}
        for step in self.steps:
            for output in step.outputs:
                self.outputs.setdefault(output.request_id, []).append(output)

    def tokens(self, request_id: str) -> list[int]:
        return [i for output in self.outputs[request_id] for i in output.new_token_ids]

    def reason(self, request_id: str) -> str | None:
        """How the request ended. The last output says so, and no other one does."""
        *others, last = self.outputs[request_id]
        assert not any(output.finished for output in others)
        return last.finish_reason


def make_core(executor: FakeExecutor | None = None, **args) -> EngineCore:
    defaults = {
        "max_model_len": 64,
        "num_kv_blocks": 200,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
    }
    return EngineCore(make_config(**defaults | args), executor or FakeExecutor())


def nine_requests(max_tokens: int = 12) -> list[Request]:
    """Eight innocent ones, and X in the middle."""
    names = ["r0", "r1", "r2", "r3", "X", "r4", "r5", "r6", "r7"]
    return [make_request(name, prompt=5 + i, max_tokens=max_tokens) for i, name in enumerate(names)]


def run_with_faults(raises: Raises, requests: list[Request] | None = None, **args) -> tuple[Run, dict[str, list[int]]]:
    requests = requests or nine_requests()
    expected = {request.request_id: expected_tokens(request, 64) for request in requests}
    run = Run(make_core(FaultyExecutor(raises), **args), [AddRequests(requests)])
    assert_nothing_leaked(run.core)
    return run, expected


def assert_only_x_failed(run: Run, expected: dict[str, list[int]]) -> None:
    assert run.reason("X") == "error"
    for request_id, tokens in expected.items():
        if request_id == "X":
            assert run.tokens("X") == tokens[: len(run.tokens("X"))]
        else:
            assert run.tokens(request_id) == tokens and run.reason(request_id) == "length"


# ---- messages


def test_requests_run_and_each_ends_with_one_output_that_says_so():
    requests = nine_requests()
    expected = {request.request_id: expected_tokens(request, 64) for request in requests}
    run = Run(make_core(), [AddRequests(requests[:4])], [AddRequests(requests[4:])])
    for request_id, tokens in expected.items():
        assert run.tokens(request_id) == tokens and run.reason(request_id) == "length"
    assert run.steps[-1].stats.num_running == 0
    assert_nothing_leaked(run.core)


def test_an_abort_frees_the_blocks_before_the_next_step():
    long, other = make_request("long", prompt=20, max_tokens=40), make_request("other", prompt=5, max_tokens=9)
    core = make_core(num_kv_blocks=17)
    run = Run(core, [AddRequests([long, other])], [], [AbortRequests(["long", "unknown"])])
    assert run.reason("long") == "abort" and run.reason("other") == "length"
    assert len(run.tokens("long")) == 2  # the steps before it
    with_it, without_it = run.steps[1].stats, run.steps[2].stats
    assert with_it.num_running == 2 and without_it.num_running == 1
    assert without_it.num_reserved_slots < with_it.num_reserved_slots
    assert_nothing_leaked(core)


def test_an_abort_while_nothing_else_runs_is_reported_at_once():
    run = Run(make_core(), [AddRequests([make_request("r", 5, max_tokens=40)])], [AbortRequests(["r"])])
    assert run.reason("r") == "abort" and run.steps[-1].stats.num_running == 0
    assert run.steps[-1].stats.kv_cache_usage == 0.0


def test_a_waiting_request_can_be_aborted_with_the_message_that_adds_it():
    run = Run(make_core(), [AddRequests([make_request("r", 5)]), AbortRequests(["r"])])
    assert run.tokens("r") == [] and run.reason("r") == "abort"


def test_an_id_that_is_in_use_fails_alone():
    first, second = make_request("r", 5, max_tokens=3), make_request("s", 5, max_tokens=3)
    core = make_core()
    core.scheduler.add_request(make_request("s", 4, max_tokens=2))
    run = Run(core, [AddRequests([second, first])])
    assert run.reason("r") == "length"
    assert run.outputs["s"][0].finish_reason == "error"


def test_calls_are_answered_and_an_error_is_an_answer():
    run = Run(
        make_core(), [Call(1, "reset_prefix_cache"), Call(2, "no_such_call"), Call(3, "reset_prefix_cache", (1, 2))]
    )
    first, second, third = (message for message in run.sent if isinstance(message, CallResult))
    assert (first.call_id, first.value, first.error) == (1, True, None)
    assert "no_such_call" in (second.error or "") and "TypeError" in (third.error or "")


def test_a_watcher_of_an_idle_engine_gets_its_snapshot_at_once():
    run = Run(make_core(), [Call(1, "watch")])
    assert [line.get("type") for line in run.steps[-1].records] == ["header", "snapshot"]


def test_records_are_made_while_it_is_watched_and_not_afterwards():
    request = make_request("r", 5, max_tokens=6)
    run = Run(make_core(), [AddRequests([request])], [Call(1, "watch")], [], [Call(2, "unwatch")])
    assert [bool(step.records) for step in run.steps] == [False, True, True, False, False, False]


def test_time_stamps_are_copies():
    """In thread mode the next step would change them while the front end reads."""
    run = Run(make_core(), [AddRequests([make_request("r", 5, max_tokens=4)])])
    stamps = [output.times for output in run.outputs["r"]]
    assert len({id(times) for times in stamps}) == 4
    assert sorted(times.last_token for times in stamps) == [times.last_token for times in stamps]
    assert stamps[0].last_token < stamps[-1].last_token


# ---- a request whose steps raise


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"scheduling_policy": "priority"},
        {"num_kv_blocks": 17},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 3},
        {"batching": "static"},
    ],
    ids=str,
)
def test_a_poisonous_request_fails_alone(args):
    """vLLM ends its engine instead, and with it all requests: https://github.com/vllm-project/vllm/issues/20056"""
    run, expected = run_with_faults(lambda _, handle: "X" in handle.num_scheduled_tokens, **args)
    assert_only_x_failed(run, expected)
    assert run.tokens("X") == []


@pytest.mark.parametrize("args", [{}, {"max_num_batched_tokens": 7}, {"num_kv_blocks": 17}])
def test_a_request_that_raises_at_its_fifth_token_keeps_the_four_before(args):
    def raises(executor: FaultyExecutor, handle: SchedulerOutput) -> bool:
        return "X" in handle.sampling_req_ids and len(executor.requests["X"].token_ids) == 9 + 4

    run, expected = run_with_faults(raises, **args)
    assert_only_x_failed(run, expected)
    assert len(run.tokens("X")) == 4


def test_the_innocent_are_undone_at_most_twice():
    """The last trial of a suspect is a step without others."""
    run, _ = run_with_faults(lambda _, handle: "X" in handle.num_scheduled_tokens)
    assert isinstance(run.core.executor, FaultyExecutor)
    everyone, some, alone = run.core.executor.raised_with
    assert everyone == 9 and alone == 1 and some <= 9


def test_one_suspect_at_a_time_is_admitted():
    """Also if its prompt takes several steps, and if new requests come meanwhile."""
    core = make_core(max_num_batched_tokens=8)
    finder = FaultFinder(core.scheduler)
    for name in "abc":
        core.add_request(make_request(name, prompt=20, max_tokens=30))
    assert finder.step_failed(None) is None
    running = []
    for step in range(8):
        finder.before_step()
        outputs = core.step()
        finder.step_succeeded([output.request_id for output in outputs])
        running.append(len(core.scheduler.running))
        if step == 0:
            core.add_request(make_request("new", prompt=20, max_tokens=30))
            finder.joined("new")
    assert running[:3] == [1, 1, 1] and running[3:6] == [2, 2, 2] and running[6] == 3


def test_a_suspect_is_not_blamed_for_a_newcomer():
    core = make_core()
    finder = FaultFinder(core.scheduler)
    core.add_request(make_request("a", prompt=5))
    assert finder.step_failed(None) is None and finder.is_searching
    scheduled = core.scheduler.schedule()
    core.scheduler.recover([], RequestStatus.FINISHED_ERROR)
    for i in range(4):
        core.add_request(make_request(f"new{i}", prompt=5))
        finder.joined(f"new{i}")
        step = dataclasses.replace(scheduled, num_scheduled_tokens={"a": 5, f"new{i}": 5})
        assert finder.step_failed(step) is None


def test_two_poisonous_requests_fail_and_no_other():
    run, expected = run_with_faults(lambda _, handle: bool({"X", "r2"} & handle.num_scheduled_tokens.keys()))
    assert run.reason("X") == run.reason("r2") == "error"
    for request_id in expected.keys() - {"X", "r2"}:
        assert run.tokens(request_id) == expected[request_id]


def test_a_fault_by_chance_costs_no_request():
    run, expected = run_with_faults(lambda executor, _: executor.num_raised == 0)
    assert isinstance(run.core.executor, FaultyExecutor) and run.core.executor.num_raised == 1
    for request_id, tokens in expected.items():
        assert run.tokens(request_id) == tokens and run.reason(request_id) == "length"


def test_after_the_search_requests_are_admitted_together_again():
    requests = nine_requests(max_tokens=30)
    late = [make_request(f"late{i}", 5, max_tokens=3) for i in range(4)]
    core = make_core(FaultyExecutor(lambda executor, _: executor.num_raised == 0))
    seats = core.scheduler.max_num_seqs
    run = Run(core, [AddRequests(requests)], *([] for _ in range(15)), [AddRequests(late)])
    assert core.scheduler.max_num_seqs == seats
    assert max(step.stats.num_running for step in run.steps) == len(requests + late)


def test_a_request_that_comes_during_the_search_is_a_suspect_too():
    poison, others = make_request("X", 9, max_tokens=5), nine_requests()
    others = [request for request in others if request.request_id != "X"]
    expected = {request.request_id: expected_tokens(request, 64) for request in others}
    executor = FaultyExecutor(lambda self, handle: self.num_raised == 0 or "X" in handle.num_scheduled_tokens)
    run = Run(make_core(executor), [AddRequests(others)], [], [AddRequests([poison])])
    assert_only_x_failed(run, expected | {"X": expected_tokens(poison, 64)})


def test_an_aborted_suspect_does_not_hold_up_the_others():
    requests = nine_requests()
    expected = {request.request_id: expected_tokens(request, 64) for request in requests}
    executor = FaultyExecutor(lambda _, handle: "X" in handle.num_scheduled_tokens)
    run = Run(make_core(executor), [AddRequests(requests)], [], [AbortRequests(["X", "r0"])])
    assert run.reason("X") == run.reason("r0") == "abort"
    for request_id in expected.keys() - {"X", "r0"}:
        assert run.tokens(request_id) == expected[request_id]
    assert run.core.scheduler.max_num_seqs == run.core.config.max_num_seqs  # the search has ended


def test_a_request_that_the_scheduler_cannot_handle_fails_alone():
    """The fault is in `schedule`, so there is no step whose requests could be named."""
    core = make_core()
    schedule = core.scheduler.schedule

    def faulty_schedule() -> SchedulerOutput:
        output = schedule()
        assert "X" not in output.num_scheduled_tokens
        return output

    core.scheduler.schedule = faulty_schedule  # type: ignore[method-assign]
    requests = nine_requests()
    expected = {request.request_id: expected_tokens(request, 64) for request in requests}
    run = Run(core, [AddRequests(requests)])
    assert_only_x_failed(run, expected)


def test_outputs_of_a_step_that_raises_after_its_commit_are_sent():
    core = make_core()
    end_step, num_calls = core.trace.end_step, []

    def faulty_end_step(*args: object) -> None:
        num_calls.append(1)
        if len(num_calls) == 2:
            raise RuntimeError("a fault in the trace")
        end_step(*args)  # type: ignore[arg-type]

    core.trace.end_step = faulty_end_step  # type: ignore[method-assign]
    requests = nine_requests()
    expected = {request.request_id: expected_tokens(request, 64) for request in requests}
    run = Run(core, [AddRequests(requests)])
    for request_id, tokens in expected.items():
        assert run.tokens(request_id) == tokens and run.reason(request_id) == "length"


def test_an_executor_that_always_raises_ends_the_engine():
    requests = [make_request(f"r{i}", 5, max_tokens=3) for i in range(30)]
    executor = FaultyExecutor(lambda *_: True)
    with pytest.raises(
        RuntimeError, match=f"{MAX_FAILED_STEPS} steps in a row raised, the last one RuntimeError: a fault"
    ):
        Run(make_core(executor), [AddRequests(requests)])
    assert executor.num_raised == MAX_FAILED_STEPS


def test_a_core_that_cannot_be_repaired_ends_the_engine():
    core = make_core(FaultyExecutor(lambda *_: True))
    for name in ("fail_step", "recover"):
        setattr(core.scheduler, name, lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="cannot repair"):
        Run(core, [AddRequests([make_request("r", 5)])])


@example(seed=3556, poisonous={1, 2}, chance=0.1)
@given(seed=st.integers(0, 2**32), poisonous=st.sets(st.integers(0, 6), max_size=2), chance=st.sampled_from([0.0, 0.1]))
def test_whatever_raises_no_innocent_request_is_hurt(seed, poisonous, chance):
    rng = random.Random(seed)
    requests = [make_request(f"r{i}", rng.randint(1, 20), max_tokens=rng.randint(1, 12)) for i in range(7)]
    at_token = {f"r{i}": rng.randint(0, 3) for i in poisonous}
    # One at most: a request that fails two trials by chance alone is taken for guilty, as it has to be.
    chances = [i == 1 and rng.random() < 3 * chance for i in range(3)]

    def raises(executor: FaultyExecutor, handle: SchedulerOutput) -> bool:
        if chances and chances.pop():
            return True
        grown = {i: len(executor.requests[i].token_ids) - len(prompts[i]) for i in handle.sampling_req_ids}
        return any(grown.get(request_id) == count for request_id, count in at_token.items())

    prompts = {request.request_id: request.prompt_token_ids for request in requests}
    expected = {request.request_id: expected_tokens(request, 64) for request in requests}
    arrivals = [[AddRequests([request])] for request in requests]
    args = {"num_kv_blocks": rng.choice([12, 200]), "max_num_batched_tokens": rng.choice([6, 100])}
    run = Run(make_core(FaultyExecutor(raises), max_model_len=40, **args), *arrivals)
    assert_nothing_leaked(run.core)
    for request_id, tokens in expected.items():
        if at_token.get(request_id, len(tokens)) < len(tokens):
            assert run.reason(request_id) == "error"
            assert run.tokens(request_id) == tokens[: at_token[request_id]]
        else:
            assert run.tokens(request_id) == tokens and run.reason(request_id) == "length"
