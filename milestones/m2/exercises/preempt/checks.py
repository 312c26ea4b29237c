"""Checks of m2/preempt: the victim, what it loses, and that no token and no block is lost, on the toy engine."""

from typing import Any

from folovllm.core.sched.step import Step
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_workload, lint_workload
from folovllm.learn.toy_engine import (
    add_all,
    block_ids,
    drive,
    make_core,
    make_request,
    random_workload,
    schedule_and_run,
)
from folovllm.outputs import TokenLogprobs
from folovllm.request import Request, RequestStatus
from folovllm.utils import cdiv


def engine(mine: Mine, *requests: Request, **config_args: Any) -> EngineCore:
    """The toy engine with the learner's scheduler and 4 blocks of 4 tokens, in which `requests` wait."""
    core = make_core(parts=mine.parts, **({"num_kv_blocks": 5} | config_args))
    add_all(core, requests)
    return core


def run(core: EngineCore) -> tuple[dict[str, int], list[str]]:
    """Runs one step. Returns what was scheduled and who was preempted."""
    output = schedule_and_run(core)
    return dict(output.num_scheduled_tokens), sorted(output.preempted_req_ids)


def names(requests: Any) -> list[str]:
    return [request.request_id for request in requests]


def two_requests() -> tuple[Request, Request]:
    """They fill the pool of 4 blocks with their prompts, so the first new token of a needs a block."""
    return make_request("a", 8, max_tokens=4), make_request("b", 6, max_tokens=3)


def prediction() -> str:
    core = make_core(num_kv_blocks=5)
    add_all(core, [make_request("a", 7, max_tokens=6), make_request("b", 7, max_tokens=5)])
    total = 0
    while core.has_unfinished_requests():
        total += schedule_and_run(core).total_num_scheduled_tokens
    return str(total)


@check("unit", spec="R2.15", hint=2)
def no_blocks_needed_is_not_no_blocks_free(mine: Mine) -> None:
    """A request whose last block has room gets an empty list, and no request is preempted."""
    core = engine(mine, make_request("a", 5, max_tokens=4), make_request("b", 5, max_tokens=4))
    core.step()
    got = [run(core) for _ in range(2)]
    assert got == [({"a": 1, "b": 1}, [])] * 2, (
        f"a and b have room in their last blocks, and the steps were {got}, expected one token for each and no "
        "preemption: allocate_slots returns [] when no new block is needed, and None when there is none"
    )


@check("unit", spec="R2.14")
def the_latest_admitted_request_is_the_victim(mine: Mine) -> None:
    """Under "fcfs" the last of `running` is preempted, and choosing it changes nothing."""
    core = engine(mine, *(make_request(name, 2, priority=number) for name, number in (("a", 1), ("b", 9), ("c", 0))))
    core.step()
    victim = core.scheduler.choose_victim()
    assert victim.request_id == "c", (
        "a, b and c were admitted in this order (with priorities 1, 9 and 0, which mean nothing under fcfs) and the "
        f"victim is {victim.request_id}, expected c: the oldest has "
        "computed most, and it could lose it again and again"
    )
    assert names(core.scheduler.running) == ["a", "b", "c"], "choose_victim changed self.running; its caller does that"


@check("unit", spec="R2.14")
def by_priority_the_least_urgent_request_is_the_victim(mine: Mine) -> None:
    """Under "priority" the largest (priority, arrival time, id) is preempted, wherever it stands in `running`."""
    late = make_request("late", 2, priority=7, arrival_time=2.0)
    early = make_request("early", 2, priority=7, arrival_time=1.0)
    core = engine(mine, late, early, scheduling_policy="priority")
    core.step()
    core.add_request(make_request("urgent", 2, priority=0, arrival_time=3.0))
    core.step()
    victim = core.scheduler.choose_victim()
    assert victim.request_id == "late", (
        f"the victim is {victim.request_id}, expected late: a larger number is less urgent, and among equals the later "
        "arrival is preempted"
    )


@check("unit", spec="R2.15")
def a_victim_gives_back_its_blocks_and_starts_again(mine: Mine) -> None:
    """A preempted request holds no block, has nothing computed, and keeps its tokens."""
    a, b = two_requests()
    core = engine(mine, a, b)
    core.step()
    scheduler = core.scheduler
    scheduler.running.remove(b)
    b.prompt_logprobs = [TokenLogprobs([1], [0.0], 1)]
    scheduler.preempt(b)
    held = block_ids(core, "b")
    assert held == [], f"b was preempted and still holds the blocks {held}: nothing was freed"
    assert b.status == RequestStatus.PREEMPTED, f"b was preempted and its status is {b.status.name}, expected PREEMPTED"
    assert b.num_computed_tokens == 0, (
        f"b was preempted with num_computed_tokens={b.num_computed_tokens}, expected 0: its K/V are gone with its "
        "blocks, and a token that counts as computed is not computed again"
    )
    assert b.num_output_tokens == 1, (
        f"b had generated 1 token and has {b.num_output_tokens}: a preemption loses no token"
    )
    assert b.prompt_logprobs == [], (
        "b keeps prompt logprobs that are collected again with its prompt: they would come twice"
    )
    counts = (b.num_preemptions, core.stats().num_preemptions)
    assert counts == (1, 1), f"(request.num_preemptions, self.num_preemptions) are {counts} after one preemption"


@check("unit", spec="R2.15")
def a_victim_waits_in_front(mine: Mine) -> None:
    """A preempted request goes to the front of the queue, ahead of requests that have never run."""
    core = engine(mine, *two_requests())
    core.step()
    core.add_request(make_request("c", 1, max_tokens=1))
    core.step()
    queue = names(core.scheduler.waiting)
    assert queue == ["b", "c"], (
        f"b was preempted while c waited, and the queue is {queue}, expected b, c: if later arrivals went first, b "
        "could wait forever"
    )


@check("unit", spec="R2.14", hint=2)
def the_request_that_needs_a_block_may_be_the_victim(mine: Mine) -> None:
    """If the latest admitted request is the one that needs a block, it preempts itself and gets None."""
    a, b = make_request("a", 7, max_tokens=3), make_request("b", 8, max_tokens=3)
    core = engine(mine, a, b)
    core.step()
    got = run(core)
    assert got == ({"a": 1}, ["b"]), (
        f"b needs a block, none is free, and b is the latest admitted; the step was {got[0]} and preempted {got[1]}, "
        "expected a to compute 1 token and b to preempt itself"
    )
    core.scheduler.check_integrity()


@check("unit", spec="R2.14", hint=2)
def victims_are_taken_one_at_a_time_until_it_fits(mine: Mine) -> None:
    """No more requests are preempted than necessary, and several victims keep their order in the queue."""
    requests = [make_request("a", 12, max_tokens=3), make_request("b", 2), make_request("c", 3)]
    core = engine(mine, *requests, num_kv_blocks=6)
    core.step()
    got = run(core)
    assert got == ({"a": 1, "b": 1}, ["c"]), (
        f"a needs one block and c has one; the step was {got[0]} and preempted {got[1]}, expected only c"
    )
    core = engine(mine, *(make_request(name, 3) for name in "abc"))
    core.step()
    step = Step(token_budget=16)
    core.scheduler.allocate_or_preempt(core.scheduler.running[0], 13, step)  # 3 blocks, and 1 is free
    got = names(step.preempted), names(core.scheduler.waiting)
    assert got == (["c", "b"], ["b", "c"]), (
        f"a needs three blocks, one is free, b and c have one each; (preempted, queue) is {got}, expected c, b "
        "preempted and b, c in the queue: the order of admission"
    )


@check("unit", spec="R2.16", hint=2)
def a_step_that_preempted_admits_no_request(mine: Mine) -> None:
    """The scheduler sees in `step.preempted` that blocks were short, and admits no request in that step."""
    core = engine(mine, *two_requests())
    core.step()
    core.add_request(make_request("c", 1, max_tokens=1))
    got = run(core)
    assert got == ({"a": 1}, ["b"]), (
        f"b was preempted while c waited; the step was {got[0]} and preempted {got[1]}, expected no request "
        "admitted: append "
        "every victim to step.preempted, or blocks are taken from one request and given to a new one"
    )


@check("unit", spec="R2.17", hint=3)
def a_victim_scheduled_earlier_in_the_step_is_taken_back(mine: Mine) -> None:
    """Under "priority" the victim may have been granted tokens in this very step: they return to the budget."""
    core = engine(mine, make_request("a", 5, priority=9), scheduling_policy="priority", num_kv_blocks=7)
    core.step()
    add_all(core, [make_request("b", 8, priority=0), make_request("c", 5, priority=1)])
    core.step()  # a, b and c run in this order, and all blocks are taken
    core.scheduler.max_num_batched_tokens = 2
    output = core.scheduler.schedule()
    got = dict(output.num_scheduled_tokens), sorted(output.preempted_req_ids)
    assert got == ({"b": 1, "c": 1}, ["a"]), (
        "a (least urgent) had been granted 1 of the 2 tokens of this step when b needed a block; the step became "
        f"{got[0]} and "
        f"preempted {got[1]}, expected b 1, c 1 and a preempted: what a victim was granted returns to the budget "
        "(step.undo)"
    )


@check("unit", spec="R2.15", hint=3)
def tokens_are_the_same_after_a_preemption(mine: Mine) -> None:
    """The worked example: every step, every table, and the tokens that each request generates alone."""
    a, b = two_requests()
    core = engine(mine, a, b)
    got = []
    for _ in range(6):
        got.append((*run(core), block_ids(core, "a"), block_ids(core, "b")))
    expected: list[Any] = [
        ({"a": 8, "b": 6}, [], [1, 2], [3, 4]),
        ({"a": 1}, ["b"], [1, 2, 4], []),
        ({"a": 1}, [], [1, 2, 4], []),
        ({"a": 1}, [], [], []),
        ({"b": 7}, [], [], [4, 2]),
        ({"b": 1}, [], [], []),
    ]
    for i, (is_, ought) in enumerate(zip(got, expected, strict=True), start=1):
        assert is_ == ought, f"step {i} (scheduled, preempted, a's blocks, b's blocks) was {is_}, expected {ought}"
    for request, count in ((a, 4), (b, 3)):
        alone = fake_tokens(request.prompt_token_ids, count)
        assert request.output_token_ids == alone, (
            f"{request.request_id} generated {request.output_token_ids}, and alone it generates {alone}"
        )


@check("unit", spec="R2.22", hint=2)
def a_victim_unpublishes_what_it_has_not_computed(mine: Mine) -> None:
    """With prefix caching, blocks that the victim was granted in this step hold nothing and must not be hit."""
    a = make_request("a", 7, max_tokens=9)
    core = engine(mine, a, enable_prefix_caching=True)
    while a.num_tokens < 12:
        core.step()
    scheduler, step = core.scheduler, Step(token_budget=8)
    scheduler.schedule_running(step)  # the token that fills a's third block: published, and not computed yet
    scheduler.running.remove(a)
    step.undo(a)
    scheduler.preempt(a)
    twin = make_request("twin", [*a.all_token_ids, 1])
    scheduler.kv_cache_manager.add_request(twin)
    hit = scheduler.kv_cache_manager.get_computed_blocks(twin)[1]
    assert hit == 8, (
        f"a was preempted before its third block of 4 was computed, and another request hit {hit} of its tokens, "
        "expected 8: use kv_cache_manager.preempt, which unpublishes, and not free"
    )


@check("property", spec="R2.22")
def no_block_leaks_and_every_request_finishes(mine: Mine) -> None:
    """In 60 random workloads in a tight pool, every request finishes with the tokens it gets alone, and no block
    leaks.
    """
    for seed in range(60):
        switches: dict[str, Any] = {"scheduling_policy": ("fcfs", "priority")[seed % 2], "block_size": 1 + seed % 4}
        switches["num_kv_blocks"] = 1 + cdiv(18, switches["block_size"])  # one request of 16 tokens fits, two do not
        workload = random_workload(seed // 3, ("m3", "m5", "m6")[seed % 3], **switches)
        lint_workload(workload, mine.parts)


@check("trace", spec="R2.22", hint=2)
def same_decisions_as_the_reference(mine: Mine) -> None:
    """On 24 random workloads with preemptions and aborts, every step decides what it decides with the engine's
    scheduler.
    """
    for seed in range(24):
        policy = ("fcfs", "priority")[seed % 2]
        args: dict[str, Any] = {"scheduling_policy": policy, "block_size": 2, "num_kv_blocks": 9 + seed % 3}
        workload = random_workload(seed, ("m3", "m5", "m6")[seed % 3], with_aborts=True, max_num_seqs=5, **args)
        check_workload(workload, mine.parts)


@check("counters", spec="R2.14")
def no_more_preemptions_than_necessary(mine: Mine) -> None:
    """Over 20 workloads, your scheduler preempts as often as the reference."""
    counts = {}
    for who, parts in (("yours", mine.parts), ("the reference", None)):
        counts[who] = 0
        for seed in range(20):
            workload = random_workload(seed, "m3")
            core = make_core(**workload.config_args, parts=parts)
            add_all(core, [make_request(**args) for _, args in workload.arrivals])
            drive(core)
            counts[who] += core.stats().num_preemptions
    assert counts["yours"] == counts["the reference"], (
        f"yours preempted {counts['yours']} times, the reference {counts['the reference']} times, on the same workloads"
    )
