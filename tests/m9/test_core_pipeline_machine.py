"""Several steps in flight under random life: arrivals, aborts, preemptions, resets, faults in any stage, every switch.

A Hypothesis state machine on a pipeline of 1 to 4 fake stages, which check every slot of every sequence. After every
call the integrity check runs. At the end, all requests that were neither aborted nor blamed have exactly the tokens
that the oracle foretold, nothing has leaked, and the lint finds nothing in the trace.
"""

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from folovllm.core.sched.output import SchedulerOutput
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request, RequestStatus
from folovllm.trace.lint import lint
from folovllm.trace.record import read_trace
from tests import core_helpers as helpers
from tests.core_helpers import make_request
from tests.m2.test_core_machine import STOP_ARGS, VOCAB, config_args, random_prompt
from tests.m9.pipeline_helpers import pipeline_core

pytestmark = pytest.mark.m9


@dataclass
class Totals:
    """What all runs of the machine have seen together: proof that the interesting things happened."""

    steps: int = 0
    full: int = 0  # steps started when all other stages had one
    preempted_in_flight: int = 0
    late_tokens: int = 0  # of requests that waited when their token came
    aborted_in_flight: int = 0
    resets_in_flight: int = 0
    faults: int = 0
    undone_beside: int = 0  # other steps in flight when one raised
    errors: int = 0
    prefix_hits: int = 0
    partial_hits: int = 0
    finished: int = 0


class PipelineMachine(RuleBasedStateMachine):
    """One engine; `expected` is what each request that is still to be served must generate."""

    totals = Totals()

    @initialize(args=config_args(), num_stages=st.integers(1, 4), seed=st.none() | st.integers(0, 2**16))
    def start(self, args: dict[str, Any], num_stages: int, seed: int | None) -> None:
        self.args = args
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "trace.jsonl"
        rng = None if seed is None else random.Random(seed)
        self.faulty: tuple[set[str], int] | None = None
        self.core, self.executor = pipeline_core(num_stages, VOCAB, rng, self.raises, **args, trace=str(self.path))
        self.requests: list[Request] = []
        self.expected: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = {}

    def raises(self, output: SchedulerOutput, stage: int) -> bool:
        """The next time that this stage sees one of these requests, it raises."""
        if self.faulty is None or stage != self.faulty[1] or not self.faulty[0] & output.num_scheduled_tokens.keys():
            return False
        self.faulty = None
        return True

    @rule(seed=st.integers(0, 2**16), n=st.integers(1, 8))
    def crowd(self, seed: int, n: int) -> None:
        rng = random.Random(seed)
        for _ in range(n):
            self.arrive(rng)

    @rule(seed=st.integers(0, 2**16), n=st.integers(1, 12), rate=st.sampled_from([0.0, 0.5]))
    def traffic(self, seed: int, n: int, rate: float) -> None:
        """n calls of `step`; a request may arrive before each of them."""
        rng = random.Random(seed)
        for _ in range(n):
            if rng.random() < rate:
                self.arrive(rng)
            self.one_step()

    def arrive(self, rng: random.Random) -> None:
        max_model_len = self.args["max_model_len"]
        max_tokens = rng.choice([rng.randint(1, max_model_len), max_model_len])
        names = [
            r.request_id for r in self.requests if r.request_id not in self.core.scheduler.requests and r.is_finished
        ]
        aborted = [name for name in names if name not in self.expected]
        request = make_request(
            rng.choice(aborted) if aborted and rng.random() < 0.3 else f"r{len(self.requests)}",  # an id may come back
            random_prompt(rng, max_model_len - 1),
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, min(2, max_tokens)),
            priority=rng.randint(0, 2),
            arrival_time=float(rng.randint(0, 2)),
            cache_salt=rng.choice([None, None, None, "salt"]),
            **rng.choice(STOP_ARGS),
        )
        self.requests.append(request)
        self.expected[request.request_id] = helpers.expected_tokens(request, max_model_len, VOCAB)
        self.got[request.request_id] = []
        self.core.add_request(request)

    @precondition(lambda self: self.core.scheduler.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victims = data.draw(self.some_ids())
        in_flight = self.ids_in_flight()
        self.core.abort_requests(victims)
        for request_id in set(victims):
            self.expected.pop(request_id, None)
            self.totals.aborted_in_flight += request_id in in_flight

    @precondition(lambda self: self.core.scheduler.running)
    @rule(seldom=st.integers(0, 2))
    def reset(self, seldom: int) -> None:
        """Preempts everything, whatever is in flight."""
        if not seldom:
            self.totals.resets_in_flight += bool(self.executor.in_flight)
            assert self.core.reset_prefix_cache(reset_running=True)

    @precondition(lambda self: self.core.scheduler.requests)
    @rule(data=st.data(), stage=st.integers(0, 3), blames=st.sampled_from(["all", "none", "some"]))
    def fault(self, data: st.DataObject, stage: int, blames: str) -> None:
        ids = set(data.draw(self.some_ids()))
        blamed = {"all": None, "none": set(), "some": ids}[blames]
        self.faulty = ids, min(stage, len(self.executor.stages) - 1)
        for _ in range(6):
            if self.step_raises(blamed):
                return
        self.faulty = None
        while any(step.error for step in self.executor.in_flight):  # it has raised, and its answer is not taken yet
            self.step_raises(blamed)

    def step_raises(self, blamed: set[str] | None) -> bool:
        """Runs a step. Returns whether it raised, and checks what became of all requests then."""
        before = dict(self.core.scheduler.requests)
        try:
            self.one_step(blamed)
        except RuntimeError as error:
            assert "a fault in stage" in str(error)
            self.check_undone(before, blamed)
            return True
        return False

    def check_undone(self, before: dict[str, Request], blamed: set[str] | None) -> None:
        """Nothing is in flight, the blamed requests of the step have ended, and all others go on."""
        assert not self.executor.in_flight and not self.core._in_flight
        gone = [request_id for request_id in before if request_id not in self.core.scheduler.requests]
        assert self.core.last_scheduled is not None
        in_step = self.core.last_scheduled.num_scheduled_tokens.keys() & before.keys()
        assert set(gone) <= (in_step if blamed is None else in_step & blamed)
        for request_id in gone:
            assert before[request_id].status == RequestStatus.FINISHED_ERROR
            del self.expected[request_id]
        self.totals.errors += len(gone)
        self.totals.faults += 1
        self.totals.undone_beside += len(self.executor.discarded)
        self.executor.discarded = []

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "core"):
            helpers.check(self.core)
            assert len(self.executor.in_flight) <= max(len(self.executor.stages) - 1, 0)
            assert [step.scheduler_output for step in self.core._in_flight] == [
                step.scheduler_output for step in self.executor.in_flight
            ]

    def teardown(self) -> None:
        """All that is left finishes, in a bounded number of steps."""
        if not hasattr(self, "core"):
            return
        for _ in range(helpers.MAX_STEPS):
            if not self.core.scheduler.has_requests() and not self.executor.in_flight:
                break
            self.one_step()
        helpers.assert_nothing_leaked(self.core)
        assert all(stage.requests == {} for stage in self.executor.stages)
        wrong = {i: (self.got[i], tokens) for i, tokens in self.expected.items() if self.got[i] != tokens}
        assert not wrong, wrong
        self.core.shutdown()
        violations = lint(read_trace(self.path))
        assert not violations, [str(violation) for violation in violations]
        self.folder.cleanup()
        cached = [request.num_cached_tokens for request in self.requests if request.num_cached_tokens > 0]
        self.totals.prefix_hits += len(cached)
        self.totals.partial_hits += sum(n % self.args["block_size"] > 0 for n in cached)

    def one_step(self, blamed: set[str] | None = None) -> None:
        in_flight = self.ids_in_flight()
        num_preemptions = {i: r.num_preemptions for i, r in self.core.scheduler.requests.items() if i in in_flight}
        num_started = len(self.executor.num_in_flight)
        outputs = self.core.step(blamed=blamed)
        self.collect(outputs)
        started = self.executor.num_in_flight[num_started:]
        self.totals.steps += len(started)
        self.totals.full += started.count(len(self.executor.stages)) if len(self.executor.stages) > 1 else 0
        requests = self.core.scheduler.requests
        self.totals.preempted_in_flight += sum(
            i in requests and requests[i].num_preemptions > n for i, n in num_preemptions.items()
        )
        helpers.check(self.core)

    def collect(self, outputs: list[EngineCoreOutput]) -> None:
        requests = self.core.scheduler.requests
        for output in outputs:
            assert output.request_id in self.expected, "an output for a request that is gone"
            assert output.new_token_ids, "nothing is emitted in mid-prompt"
            self.got[output.request_id] += output.new_token_ids
            self.totals.finished += output.finished
            request = requests.get(output.request_id)
            self.totals.late_tokens += request is not None and request.status == RequestStatus.PREEMPTED

    def ids_in_flight(self) -> set[str]:
        return {i for step in self.executor.in_flight for i in step.scheduler_output.num_scheduled_tokens}

    def some_ids(self) -> st.SearchStrategy[list[str]]:
        return st.lists(st.sampled_from(list(self.core.scheduler.requests)), min_size=1, max_size=3)


def test_random_life_of_a_pipeline() -> None:
    run_state_machine_as_test(
        PipelineMachine,
        settings=settings(
            max_examples=200,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    totals = PipelineMachine.totals
    assert totals.steps >= 5_000 and totals.full >= 1_000 and totals.finished >= 1_000, totals
    assert totals.preempted_in_flight >= 50 and totals.late_tokens >= 50, totals
    assert totals.aborted_in_flight >= 5 and totals.resets_in_flight >= 5, totals
    assert totals.faults >= 20 and totals.undone_beside >= 10 and totals.errors >= 10, totals
    assert totals.prefix_hits >= 100 and totals.partial_hits >= 20, totals
