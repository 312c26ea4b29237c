"""The scheduler and the engine core under random life: arrivals, aborts, failing steps, tiny pools, every switch.

A Hypothesis state machine on the fake executor. After every step the integrity check runs; at the end everybody who was
neither aborted nor in a failing step has exactly the tokens that the oracle foretold, and nothing has leaked.
"""

import random
from dataclasses import dataclass
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
from folovllm.engine.core import EngineCore
from folovllm.outputs import EngineCoreOutput
from folovllm.parts import variants
from folovllm.request import Request, RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import make_core, make_request

pytestmark = [pytest.mark.m2, pytest.mark.m3]

VOCAB = 11  # small, so that EOS and stop ids really come up, also as the first token
EOS = 3
STOP_ARGS: list[dict[str, Any]] = [{}, {}, {"eos_token_id": EOS}, {"stop_token_ids": [5]}]


@dataclass
class Totals:
    """What all runs of the machine have seen together: proof that the interesting things happened."""

    steps: int = 0
    preemptions: int = 0
    finished: int = 0
    finished_on_first_token: int = 0
    aborted: int = 0
    errors: int = 0
    in_mid_prompt: int = 0
    prefix_hits: int = 0
    partial_hits: int = 0
    cached_errors: int = 0  # failed steps with prefix caching on


@st.composite
def config_args(draw: st.DrawFn) -> dict[str, Any]:
    """Any valid combination of the switches that exist, around a pool that barely holds one request."""
    max_model_len = draw(st.integers(2, 24) | st.just(24))
    block_size = draw(st.integers(1, min(3, max_model_len)) | st.integers(1, max_model_len))
    needed = -(-max_model_len // block_size)
    chunked, cached = draw(st.booleans()), draw(st.booleans())
    return {
        "max_model_len": max_model_len,
        "block_size": block_size,
        "num_kv_blocks": 1 + needed + draw(st.integers(0, needed)),
        "max_num_seqs": draw(st.integers(2, 6) | st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(1, 20)) if chunked else max_model_len + draw(st.integers(0, 20)),
        "enable_chunked_prefill": chunked,
        "long_prefill_token_threshold": draw(st.integers(0, 5)) if chunked else 0,
        "batching": draw(st.sampled_from(["continuous", "static"])),
        "scheduling_policy": draw(st.sampled_from(variants("core.request_queue"))),
        "reserve_full_sequence": draw(st.booleans()),
        "free_uncached_first": draw(st.booleans()),
        "enable_prefix_caching": cached,
        "prefix_index": draw(st.sampled_from(["hash", "trie"])),
        "partial_block_hits": cached and draw(st.booleans()),
    }


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    """Often begins as others do, so that prefix hits really come up."""
    longest = rng.randint(1, longest)
    common, own = rng.randint(0, longest), rng.randint(1, longest)
    return ([i % VOCAB for i in range(common)] + [rng.randrange(VOCAB) for _ in range(own)])[:longest]


class StrictExecutor(helpers.AttendingExecutor):
    """Hears of every id that is gone exactly once, and can be told to fail."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB)
        self.fails = False
        self.heard_of: list[str] = []

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        if self.fails:
            self.fails = False
            raise RuntimeError("the device is gone")
        self.heard_of += scheduler_output.finished_req_ids
        return super().execute(scheduler_output)


class EngineMachine(RuleBasedStateMachine):
    """One engine; `expected` is what each request that is still to be served must generate."""

    totals = Totals()

    @initialize(args=config_args())
    def start(self, args: dict[str, Any]) -> None:
        self.args = args
        self.executor = StrictExecutor()
        self.core = make_core(self.executor, **args)
        self.requests: list[Request] = []
        self.expected: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = {}

    @rule(seed=st.integers(0, 2**16), n=st.integers(1, 8))
    def crowd(self, seed: int, n: int) -> None:
        rng = random.Random(seed)
        for _ in range(n):
            self.arrive(rng)

    @rule(seed=st.integers(0, 2**16), n=st.integers(1, 12), rate=st.sampled_from([0.0, 0.5]))
    def traffic(self, seed: int, n: int, rate: float) -> None:
        """n steps; before each of them somebody may arrive."""
        rng = random.Random(seed)
        for _ in range(n):
            if rng.random() < rate:
                self.arrive(rng)
            self.one_step()

    def arrive(self, rng: random.Random) -> None:
        max_model_len = self.args["max_model_len"]
        max_tokens = rng.choice([rng.randint(1, max_model_len), max_model_len])
        request = make_request(
            f"r{len(self.requests)}",
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

    @precondition(lambda self: self.core.has_unfinished_requests())
    @rule(data=st.data(), moment=st.sampled_from(["between steps", "execute", "sample", "update"]))
    def abort(self, data: st.DataObject, moment: str) -> None:
        victims = data.draw(self.some_ids())
        if moment == "between steps":
            return self.give_up(victims)
        scheduler_output = self.core.scheduler.schedule()
        self.totals.steps += 1
        if moment == "execute":
            self.give_up(victims)
        handle = self.executor.execute(scheduler_output)
        if moment == "sample":
            self.give_up(victims)
        runner_output = self.executor.sample(handle)
        if moment == "update":
            self.give_up(victims)
        self.collect(self.core.scheduler.update_from_output(scheduler_output, runner_output))

    @precondition(lambda self: self.core.has_unfinished_requests())
    @rule(seldom=st.integers(0, 3))
    def failing_step(self, seldom: int) -> None:
        if seldom:
            return
        before = list(self.core.scheduler.requests)
        self.executor.fails = True
        with pytest.raises(RuntimeError, match="the device is gone"):
            self.core.step()
        self.totals.steps += 1
        gone = [request_id for request_id in before if request_id not in self.core.scheduler.requests]
        for request in self.requests:
            assert (request.status == RequestStatus.FINISHED_ERROR) >= (request.request_id in gone)
        for request_id in gone:
            del self.expected[request_id]
        self.totals.errors += len(gone)
        self.totals.cached_errors += self.args["enable_prefix_caching"] and bool(gone)

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "core"):
            helpers.check(self.core)

    def teardown(self) -> None:
        """Everybody left finishes, in a bounded number of steps."""
        if not hasattr(self, "core"):
            return
        for _ in range(helpers.MAX_STEPS):
            if not self.core.scheduler.has_requests():
                break
            self.one_step()
        helpers.assert_nothing_leaked(self.core)
        assert self.executor.requests == {}
        assert sorted(self.executor.heard_of) == sorted(r.request_id for r in self.requests), "each id once"
        assert {request_id: self.got[request_id] for request_id in self.expected} == self.expected
        self.totals.preemptions += self.core.stats().num_preemptions
        cached = [request.num_cached_tokens for request in self.requests if request.num_cached_tokens > 0]
        self.totals.prefix_hits += len(cached)
        self.totals.partial_hits += sum(n % self.args["block_size"] > 0 for n in cached)

    def one_step(self) -> None:
        self.totals.steps += self.core.scheduler.has_requests()
        self.collect(self.core.step())
        helpers.check(self.core)

    def collect(self, outputs: list[EngineCoreOutput]) -> None:
        for output in outputs:
            assert output.request_id in self.expected, "an output for somebody who is gone"
            assert output.new_token_ids, "nothing is emitted in mid-prompt"
            self.got[output.request_id] += output.new_token_ids
            self.totals.finished += output.finished
            self.totals.finished_on_first_token += output.finished and len(self.got[output.request_id]) == 1
        running = self.core.scheduler.running
        self.totals.in_mid_prompt += any(request.num_computed_tokens < request.num_tokens - 1 for request in running)

    def some_ids(self) -> st.SearchStrategy[list[str]]:
        return st.lists(st.sampled_from(list(self.core.scheduler.requests)), min_size=1, max_size=2)

    def give_up(self, request_ids: list[str]) -> None:
        self.core.abort_requests(request_ids)
        for request_id in set(request_ids):
            self.expected.pop(request_id, None)
            self.totals.aborted += 1


def test_random_life_of_the_engine() -> None:
    run_state_machine_as_test(
        EngineMachine,
        settings=settings(
            max_examples=200,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    totals = EngineMachine.totals
    assert totals.steps >= 2_000, totals
    assert totals.preemptions >= 100 and totals.in_mid_prompt >= 100, totals
    assert totals.finished >= 300 and totals.finished_on_first_token >= 50, totals
    assert totals.aborted >= 100 and totals.errors >= 20, totals
    assert totals.prefix_hits >= 100 and totals.partial_hits >= 10 and totals.cached_errors >= 10, totals


def crowded_core(rng: random.Random) -> EngineCore:
    """A pool of one to two requests, block by block, under priorities."""
    chunked, block_size = rng.random() < 0.5, rng.choice([1, 2, 3, 5])
    return make_core(
        max_model_len=24,
        block_size=block_size,
        num_kv_blocks=1 + -(-24 // block_size) + rng.randint(0, 10 // block_size),
        scheduling_policy="priority",
        enable_chunked_prefill=chunked,
        max_num_batched_tokens=rng.randint(4, 20) if chunked else None,
        reserve_full_sequence=rng.random() < 0.5,
        enable_prefix_caching=rng.random() < 0.5,
    )


def early_victims(core: EngineCore, order: list[str]) -> int:
    """One step; how many were preempted although they stood before somebody who was scheduled."""
    output = helpers.schedule_and_run(core)
    last = max(
        (order.index(request_id) for request_id in output.num_scheduled_tokens if request_id in order), default=-1
    )
    return sum(order.index(request_id) < last for request_id in output.preempted_req_ids)


def test_preemption_under_priority_in_dense_traffic() -> None:
    """The rarest branch: a victim that was scheduled in the same step. Hypothesis hardly gets there, a crowd does."""
    num_early_victims = num_preemptions = 0
    for seed in range(60):
        rng = random.Random(seed)
        core, requests = crowded_core(rng), []
        for i in range(60):
            if rng.random() < 0.6:
                request = make_request(f"r{i}", rng.randint(1, 12), max_tokens=rng.randint(1, 20), priority=i % 3)
                requests.append((request, helpers.expected_tokens(request, 24)))
                core.add_request(request)
            num_early_victims += early_victims(core, helpers.ids(core.scheduler.running))
        helpers.drive(core)
        helpers.assert_nothing_leaked(core)
        assert all(request.output_token_ids == expected for request, expected in requests)
        num_preemptions += core.stats().num_preemptions
    assert num_preemptions >= 300 and num_early_victims >= 20, (num_preemptions, num_early_victims)
