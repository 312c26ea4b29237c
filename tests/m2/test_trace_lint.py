"""lint: silent on healthy engines, and for every rule of M2 an engine that breaks it and is caught, by name.

The rules of M3 (blocks) are in test_trace_lint_paging.py.
"""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.request_queue import FCFSRequestQueue
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.parts import variants
from folovllm.request import Request, RequestStatus
from folovllm.trace.lint import RANKS, RULES, lint
from folovllm.trace.lint_cache import CACHE_RULES
from folovllm.trace.record import read_trace
from tests.core_helpers import AttendingExecutor, make_request
from tests.m2.trace_helpers import CarelessExecutor, lint_broken, record_run, six_requests, traced_core

pytestmark = pytest.mark.m2

PAGING_RULES = {
    "null-block", "double-ownership", "append-only", "short-table", "waste", "kept-blocks", "conservation",
}  # fmt: skip


# ---- healthy engines


def random_config(rng: random.Random) -> dict[str, Any]:
    args: dict[str, Any] = {
        "block_size": rng.choice([1, 3, 4, "max_model_len"]),
        "batching": rng.choice(["static", "continuous", "continuous"]),
        "scheduling_policy": rng.choice(variants("core.request_queue")),
        "max_num_seqs": rng.choice([1, 3, 64]),
        "reserve_full_sequence": rng.random() < 0.5,
        "free_uncached_first": rng.random() < 0.5,
    }
    one_request = 1 if args["block_size"] == "max_model_len" else -(-16 // args["block_size"])
    args["num_kv_blocks"] = 1 + one_request * rng.choice([1, 1, 2, 4]) + rng.randint(0, 2)
    if rng.random() < 0.5:
        args |= {"enable_chunked_prefill": True, "max_num_batched_tokens": rng.choice([1, 5, 30])}
        args["long_prefill_token_threshold"] = rng.choice([0, 2])
    return args


@pytest.mark.parametrize("seed", range(40))
def test_silent_on_a_healthy_engine(seed: int, tmp_path: Path) -> None:
    """Arrivals and aborts at random; every preset's switches, both queues, pools that make preemptions."""
    rng = random.Random(seed)
    core = traced_core(tmp_path / "t.jsonl", **random_config(rng))
    to_come = [
        make_request(f"r{i}", rng.randint(1, 14), rng.randint(1, 15), priority=rng.randint(0, 2)) for i in range(20)
    ]
    while to_come or core.has_unfinished_requests():
        if to_come and rng.random() < 0.4:
            core.add_request(to_come.pop())
        if core.scheduler.requests and rng.random() < 0.05:
            core.abort_requests([rng.choice(list(core.scheduler.requests))])
        core.step()
    core.shutdown()
    assert lint(tmp_path / "t.jsonl") == []


def test_every_policy_has_a_rank() -> None:
    assert set(RANKS) == set(variants("core.request_queue"))


def test_a_learners_queue_may_admit_in_its_own_order(tmp_path: Path) -> None:
    parts = {"core.request_queue.fcfs": f"{__name__}:LastComeQueue"}
    core = traced_core(tmp_path / "t.jsonl", num_kv_blocks=7, parts=parts)
    record_run(core, six_requests())
    assert core.stats().num_preemptions > 0 and lint(tmp_path / "t.jsonl") == []


def test_the_healthy_engines_of_these_tests_preempt(tmp_path: Path) -> None:
    """Or the silence above, and the scenario that the broken engines below start from, would prove little."""
    core = traced_core(tmp_path / "t.jsonl", num_kv_blocks=7)
    record_run(core, six_requests())
    assert core.stats().num_preemptions >= 2


# ---- broken engines: each damages a healthy one in one place


def over_the_token_budget(core: EngineCore) -> None:
    core.scheduler.max_num_batched_tokens = 100


def counts_wrong(core: EngineCore) -> None:
    schedule = core.scheduler.schedule

    def wrong_total() -> SchedulerOutput:
        output = schedule()
        return dataclasses.replace(output, total_num_scheduled_tokens=output.total_num_scheduled_tokens + 1)

    core.scheduler.schedule = wrong_total  # type: ignore[method-assign]


def too_many_seats(core: EngineCore) -> None:
    core.scheduler.max_num_seqs = 5


def skips_a_decode(core: EngineCore) -> None:
    """r0 gets no token as long as others wait."""
    tokens = core.scheduler.num_tokens_to_compute

    def skip(request: Request, num_computed_tokens: int, token_budget: int) -> int:
        if request.request_id == "r0" and request in core.scheduler.running and len(core.scheduler.waiting):
            return 0
        return tokens(request, num_computed_tokens, token_budget)

    core.scheduler.num_tokens_to_compute = skip  # type: ignore[method-assign]


def newest_first(core: EngineCore) -> None:
    schedule_running = core.scheduler.schedule_running

    def reversed_order(step: Any) -> None:
        core.scheduler.running.reverse()
        schedule_running(step)
        core.scheduler.running.reverse()

    core.scheduler.schedule_running = reversed_order  # type: ignore[method-assign]


class LastComeQueue(FCFSRequestQueue):
    def peek_request(self) -> Request:
        return self._requests[-1]

    def pop_request(self) -> Request:
        return self._requests.pop()


def last_come_first(core: EngineCore) -> None:
    core.scheduler.waiting = LastComeQueue()


def ignores_priority(core: EngineCore) -> None:
    core.scheduler.waiting = FCFSRequestQueue()


def not_static(core: EngineCore) -> None:
    core.scheduler.batching = "continuous"


def admits_after_a_preemption(core: EngineCore) -> None:
    schedule_running = core.scheduler.schedule_running

    def then_admit(step: Any) -> None:
        schedule_running(step)
        if step.preempted:
            core.scheduler.schedule_waiting(step)

    core.scheduler.schedule_running = then_admit  # type: ignore[method-assign]


def dozes(core: EngineCore) -> None:
    schedule_waiting = core.scheduler.schedule_waiting

    def not_in_the_first_step(step: Any) -> None:
        if core.scheduler.num_steps > 0:
            schedule_waiting(step)

    core.scheduler.schedule_waiting = not_in_the_first_step  # type: ignore[method-assign]


def forgets_the_preempted(core: EngineCore) -> None:
    core.scheduler.waiting.prepend_request = lambda request: None  # type: ignore[method-assign]


def queues_the_running(core: EngineCore) -> None:
    """An admitted request stays in the queue too."""
    schedule = core.scheduler.schedule

    def and_keep() -> SchedulerOutput:
        output = schedule()
        core.scheduler.waiting.add_request(core.scheduler.running[0])
        return output

    core.scheduler.schedule = and_keep  # type: ignore[method-assign]


def gives_up(core: EngineCore) -> None:
    """From step 3 on nobody is told of work any more."""
    core.has_unfinished_requests = lambda: core.scheduler.num_steps < 3  # type: ignore[method-assign]
    core.scheduler.check_integrity = lambda: None  # type: ignore[method-assign]


def advances_too_little(core: EngineCore) -> None:
    advance = core.scheduler.advance

    def one_less(step: Any) -> None:
        advance(step)
        for request in core.scheduler.running:
            request.num_computed_tokens -= 1

    core.scheduler.advance = one_less  # type: ignore[method-assign]


def forgets_to_start_again(core: EngineCore) -> None:
    """A resumed request goes on where it was, though its blocks are gone."""
    admit = core.scheduler.admit

    def go_on(request: Request, num_hit_tokens: int, step: Any) -> None:
        resumed = request.status == RequestStatus.PREEMPTED
        admit(request, num_hit_tokens, step)
        request.num_computed_tokens = 2 if resumed else num_hit_tokens

    core.scheduler.admit = go_on  # type: ignore[method-assign]


def computes_too_far(core: EngineCore) -> None:
    tokens = core.scheduler.num_tokens_to_compute
    core.scheduler.num_tokens_to_compute = lambda *args: tokens(*args) + 1  # type: ignore[method-assign]


def cuts_prompts(core: EngineCore) -> None:
    core.scheduler.enable_chunked_prefill, core.scheduler.max_num_batched_tokens = True, 10


def ignores_the_threshold(core: EngineCore) -> None:
    core.scheduler.long_prefill_token_threshold = 0


class EagerExecutor(CarelessExecutor):
    """Samples in mid-prompt."""

    def samples(self, request_id: str, handle: SchedulerOutput) -> bool:
        return True


def eager(core: EngineCore) -> None:
    core.executor = EagerExecutor()


class LosingExecutor(CarelessExecutor):
    def samples(self, request_id: str, handle: SchedulerOutput) -> bool:
        return request_id != "r1" and super().samples(request_id, handle)


def loses_a_token(core: EngineCore) -> None:
    core.executor = LosingExecutor()


def never_stops(core: EngineCore) -> None:
    add_request = core.add_request

    def and_let_it_talk(request: Request) -> None:
        add_request(request)
        request.max_tokens += 2

    core.add_request = and_let_it_talk  # type: ignore[method-assign]


CHUNKED = {"enable_chunked_prefill": True, "max_num_batched_tokens": 6}
BROKEN: list[tuple[str, Callable[[EngineCore], None], dict[str, Any]]] = [
    ("token-budget", over_the_token_budget, {"max_num_batched_tokens": 16}),
    ("token-budget", counts_wrong, {}),
    ("seats", too_many_seats, {"max_num_seqs": 3}),
    ("running-first", skips_a_decode, {"max_num_seqs": 3}),
    ("running-first", newest_first, {}),
    ("queue-order", last_come_first, {}),
    ("queue-order", ignores_priority, {"scheduling_policy": "priority"}),
    ("static", not_static, {"batching": "static", "max_num_seqs": 2}),
    (
        "preempt-admits",
        admits_after_a_preemption,
        {"num_kv_blocks": 7, "reserve_full_sequence": False, "long_prefill_token_threshold": 2} | CHUNKED,
    ),
    ("progress", dozes, {}),
    ("queues", forgets_the_preempted, {"num_kv_blocks": 7}),
    ("queues", queues_the_running, {}),
    ("unfinished", gives_up, {}),
    ("recompute", advances_too_little, {}),
    ("recompute", forgets_to_start_again, {"num_kv_blocks": 7}),
    ("overrun", computes_too_far, {}),
    ("chunk", cuts_prompts, {}),
    ("chunk", ignores_the_threshold, {"long_prefill_token_threshold": 3} | CHUNKED),
    ("early-token", eager, CHUNKED),
    ("no-token", loses_a_token, {}),
    ("length", never_stops, {}),
]


@pytest.mark.parametrize(("rule", "damage", "args"), BROKEN, ids=[f"{b[0]}-{b[1].__name__}" for b in BROKEN])
def test_a_broken_engine_is_caught_by_name(rule: str, damage: Callable, args: dict[str, Any], tmp_path: Path) -> None:
    assert lint_broken(tmp_path / "healthy.jsonl", None, **args) == [], "undamaged, the same engine keeps all rules"
    violations = lint_broken(tmp_path / "broken.jsonl", damage, **args)
    assert violations and violations[0].rule == rule, "\n".join(map(str, violations[:10]))


def test_every_rule_has_a_broken_engine() -> None:
    """`steps` is about the file: no engine can break it, see below. Rules about cached blocks are M6's."""
    assert {rule for rule, _, _ in BROKEN} | PAGING_RULES | {"steps"} == set(RULES) - set(CACHE_RULES)


# ---- damaged files


@pytest.mark.parametrize(
    ("lost", "message"), [(2, "step 1: steps: step 0 was expected"), (4, "step 3: steps: step 2 was")]
)
def test_a_lost_line_is_noticed(lost: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    record_run(traced_core(path), six_requests())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: lost - 1] + lines[lost:]))
    assert str(lint(path)[0]).startswith(message)


def test_a_lost_last_step_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    trace = record_run(traced_core(path), six_requests())
    trace.steps.pop()
    assert {violation.rule for violation in lint(trace)} == {"steps", "unfinished"}


def test_a_violation_reads_as_one_line(tmp_path: Path) -> None:
    (violation, *_) = lint_broken(tmp_path / "t.jsonl", too_many_seats, max_num_seqs=3)
    assert str(violation) == "step 0: seats: 5 requests run, the limit is 3"


def test_one_bug_is_not_a_hundred_messages(tmp_path: Path) -> None:
    assert len(lint_broken(tmp_path / "t.jsonl", forgets_the_preempted, num_kv_blocks=7)) <= 5
    assert len(lint_broken(tmp_path / "t.jsonl", last_come_first)) == 1


def test_the_lint_needs_only_the_file(tmp_path: Path) -> None:
    """The tokens in a trace are those of the engine: a reader can check them too."""
    path = tmp_path / "t.jsonl"
    record_run(traced_core(path, AttendingExecutor()), [make_request("a", 4, max_tokens=3)])
    sampled = [event[2][0] for record in read_trace(path).steps for event in record["events"] if event[0] == "sample"]
    assert sampled == fake_tokens(make_request("a", 4).prompt_token_ids, 3)
