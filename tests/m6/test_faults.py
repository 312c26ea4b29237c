"""Blocks are published before they are computed. If the step then does not run, they must be unpublished (R6.10).

Two ways that happens: the executor raises; or a request is scheduled, and loses its blocks again in the same step to
one of higher priority. Property tests with both, next to the cases by hand.
"""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.fake import fake_tokens
from folovllm.outputs import ModelRunnerOutput
from tests import core_helpers as helpers
from tests.core_helpers import free_ids, make_request
from tests.m2.test_core_machine import EngineMachine, StrictExecutor, Totals, config_args, early_victims
from tests.m6.cache_helpers import INDEXES, HitOracle, cached_core, index_of, known_blocks, serve

pytestmark = pytest.mark.m6

P = list(range(100, 110))


class FaultyExecutor(StrictExecutor):
    """Fails when told to: before it has done anything, half way through the batch, or when it should sample."""

    moment = "before"

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        if self.fails and self.moment == "half":
            self.fails = False
            self._update_states(scheduler_output)
            for request_id in list(scheduler_output.num_scheduled_tokens)[::2]:
                self._write(self.requests[request_id], max(scheduler_output.num_scheduled_tokens[request_id] // 2, 1))
            raise RuntimeError("the device is gone")
        if self.fails and self.moment == "sample":
            return super(StrictExecutor, self).execute(scheduler_output)
        return super().execute(scheduler_output)

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        if self.fails:
            self.fails = False
            raise RuntimeError("the device is gone")
        return super().sample(handle)


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("moment", ["before", "half", "sample"])
def test_what_a_failed_step_published_is_no_hit(index: str, moment: str) -> None:
    executor = FaultyExecutor()
    core = cached_core(index, executor, num_kv_blocks=12)
    executor.vocab_size = 1000
    assert serve(core, "old", P[:5]) == 0
    helpers.add_all(core, [make_request("a", P, max_tokens=3), make_request("b", P, max_tokens=3)])
    executor.fails, executor.moment = True, moment
    with pytest.raises(RuntimeError, match="the device is gone"):
        core.step()
    assert list(known_blocks(index_of(core))) == [1], "what an earlier step computed stays"
    assert free_ids(core)[:1] != [1] and len(free_ids(core)) == 11, "and everything is free"
    helpers.assert_nothing_leaked(core)
    assert serve(core, "c", P, max_tokens=3) == 4


@pytest.mark.parametrize("index", INDEXES)
def test_a_victim_of_the_same_step_takes_back_what_it_published(index: str) -> None:
    """5 usable blocks. b computes 6 tokens and publishes block 4; then a, more urgent, needs a block and b must go."""
    core = cached_core(
        index, num_kv_blocks=6, scheduling_policy="priority", enable_chunked_prefill=True,
        long_prefill_token_threshold=4, reserve_full_sequence=False,
    )  # fmt: skip
    b = make_request("b", [*P, 1, 2, 3, 4], max_tokens=1, priority=2)
    core.add_request(b)
    core.step()  # b: block 1
    core.add_request(make_request("a", list(range(200, 204)), max_tokens=2, priority=1))
    core.step()  # b: block 2; a: block 3
    core.scheduler.long_prefill_token_threshold = 8
    output = helpers.schedule_and_run(core)  # b: blocks 4 and 5, which is not full; then a needs one
    assert output.preempted_req_ids == {"b"} and output.num_scheduled_tokens == {"a": 1}
    assert sorted(known_blocks(index_of(core))) == [1, 2, 3], (
        "block 4 was never computed; 1 and 2 were, in earlier steps"
    )
    assert free_ids(core) == [5, 4, 2, 1, 3], "without a hash it is worth nothing: reused first (a, done, had 3 and 5)"
    output = helpers.schedule_and_run(core)
    assert output.scheduled_cached_reqs[0].num_computed_tokens == 8 and output.num_scheduled_tokens == {"b": 6}
    assert b.output_token_ids == fake_tokens(b.prompt_token_ids, 1)


# ---- random life with both faults, under the oracle's eyes


class CacheMachine(EngineMachine):
    """The engine's random life with prefix caching always on, in which steps fail half way and caches are reset.

    After every step the index knows exactly the blocks whose tokens were computed.
    """

    totals = Totals()
    resets = 0

    @initialize(args=config_args(), weak=st.booleans())
    def start(self, args: dict[str, Any], weak: bool) -> None:
        args["enable_prefix_caching"] = True
        super().start(args)
        self.executor = self.core.executor = FaultyExecutor()
        self.executor.initialize_kv_cache(self.core.kv_cache_config)
        self.oracle = HitOracle(self.core)

    @precondition(lambda self: self.core.has_unfinished_requests())
    @rule(seldom=st.integers(0, 2), moment=st.sampled_from(["before", "half", "sample"]))
    def failing_step(self, seldom: int, moment: str = "before") -> None:
        self.executor.moment = moment
        super().failing_step(seldom)

    @precondition(lambda self: self.core.has_unfinished_requests())
    @rule(seldom=st.integers(0, 5), reset_running=st.booleans())
    def reset(self, seldom: int, reset_running: bool) -> None:
        if not seldom:
            type(self).resets += self.core.reset_prefix_cache(reset_running)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "oracle"):
            self.oracle.check(self.core)


def test_random_life_with_faults() -> None:
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=80,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    totals = CacheMachine.totals
    assert totals.errors >= 20 and totals.preemptions >= 50 and totals.prefix_hits >= 100, totals
    assert CacheMachine.resets >= 5


@pytest.mark.parametrize("index", INDEXES)
def test_priorities_and_failures_in_dense_traffic(index: str) -> None:
    """The rarest branch again, a victim that was scheduled in the same step, with shared prefixes and failing steps."""
    num_early_victims = num_failures = num_hits = 0
    for seed in range(40):
        rng = random.Random(seed)
        executor, block_size = FaultyExecutor(), rng.choice([1, 2, 3])
        core = cached_core(
            index, executor, max_model_len=24, block_size=block_size, scheduling_policy="priority",
            num_kv_blocks=1 + -(-24 // block_size) + rng.randint(0, 6), reserve_full_sequence=rng.random() < 0.5,
            partial_block_hits=rng.random() < 0.5,
        )  # fmt: skip
        oracle, requests = HitOracle(core), []
        for i in range(60):
            if rng.random() < 0.6:
                prompt = [*range(rng.randint(0, 6)), *(rng.randrange(2) for _ in range(rng.randint(1, 6)))]
                request = make_request(f"r{i}", prompt, max_tokens=rng.randint(1, 12), priority=i % 3)
                requests.append((request, helpers.expected_tokens(request, 24, vocab_size=11)))
                core.add_request(request)
            if rng.random() < 0.1 and core.scheduler.requests:
                executor.fails, executor.moment = True, rng.choice(["before", "half", "sample"])
                with pytest.raises(RuntimeError, match="the device is gone"):
                    core.step()
                num_failures += 1
            else:
                num_early_victims += early_victims(core, helpers.ids(core.scheduler.running))
            oracle.check(core)
        helpers.drive(core)
        helpers.assert_nothing_leaked(core)
        for request, expected in requests:
            assert request.output_token_ids == expected or request.status.name == "FINISHED_ERROR"
        num_hits += oracle.hits
    assert num_early_victims >= 10 and num_failures >= 50 and num_hits >= 500, (num_early_victims, num_failures)
