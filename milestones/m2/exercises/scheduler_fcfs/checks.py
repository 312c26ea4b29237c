"""Checks of m2/scheduler_fcfs: who computes, who joins and who leaves, on the toy engine."""

from typing import Any

from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.step import Step
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_workload, lint_workload
from folovllm.learn.toy_engine import add_all, make_core, make_request, random_workload, run_workload, schedule_and_run
from folovllm.request import Request

Steps = list[dict[str, int]]


def engine(mine: Mine, *requests: Request, **config_args: Any) -> EngineCore:
    """The toy engine with the learner's scheduler, in which `requests` wait: 16 tokens per request and per step."""
    core = make_core(parts=mine.parts, **({"num_kv_blocks": 41, "max_num_batched_tokens": 16} | config_args))
    add_all(core, requests)
    return core


def steps(core: EngineCore, count: int) -> Steps:
    return [dict(schedule_and_run(core).num_scheduled_tokens) for _ in range(count)]


def prediction() -> str:
    core = make_core(num_kv_blocks=41, max_num_seqs=2)
    add_all(core, [make_request("a", 4, 3), make_request("b", 6, 1), make_request("c", 2, 2)])
    second = steps(core, 2)[1]
    return "; ".join(f"{request_id}: {tokens}" for request_id, tokens in second.items())


@check("unit", spec="R2.1")
def a_prompt_is_computed_whole_and_then_token_by_token(mine: Mine) -> None:
    """A request computes its prompt in its first step and one token in each later step."""
    got = steps(engine(mine, make_request("a", 5, max_tokens=3)), 3)
    expected = [{"a": 5}, {"a": 1}, {"a": 1}]
    assert got == expected, (
        f"a prompt of 5 that generates 3 tokens computed {got}, expected {expected}: a request computes what it lacks, "
        "num_tokens - num_computed_tokens. If a step after the first is empty: allocate_or_preempt answers [] when the "
        "last block of a request has room, and only None means that the request gets nothing"
    )


@check("unit", spec="R2.1")
def running_requests_come_before_new_prompts(mine: Mine) -> None:
    """A new prompt gets only what the running requests leave of the budget."""
    core = engine(mine, make_request("a", 4, max_tokens=5))
    steps(core, 1)
    add_all(core, [make_request("b", 15, max_tokens=1), make_request("c", 15, max_tokens=1)])
    got = steps(core, 2)
    expected = [{"a": 1, "b": 15}, {"a": 1, "c": 15}]
    assert got == expected, (
        f"a was generating when the prompts b and c of 15 tokens arrived; the next steps were {got}, expected "
        f"{expected} "
        "with a budget of 16: new prompts must not take the running requests' tokens, or a stream of prompts stops them"
    )


@check("unit", spec="R2.1")
def running_requests_keep_the_order_of_admission(mine: Mine) -> None:
    """Pass 1 serves the running requests in the order in which they were admitted."""
    core = engine(mine, *(make_request(name, 2, max_tokens=4) for name in ("c", "a", "b")))
    got = [list(step) for step in steps(core, 2)]
    assert got == [["c", "a", "b"]] * 2, f"c, a, b arrived in this order and were served {got}: keep the order"


@check("unit", spec="R2.2")
def a_seat_that_falls_free_is_taken_in_the_next_step(mine: Mine) -> None:
    """When a request finishes, the next one starts in the very next step."""
    requests = (
        make_request("a", 4, max_tokens=3),
        make_request("b", 6, max_tokens=1),
        make_request("c", 2, max_tokens=2),
    )
    got = steps(engine(mine, *requests, max_num_seqs=2), 3)
    expected = [{"a": 4, "b": 6}, {"a": 1, "c": 2}, {"a": 1, "c": 1}]
    assert got == expected, (
        f"with two seats the steps were {got}, expected {expected}: b has finished in step 1, so c takes its seat in "
        "step 2"
    )


@check("unit", spec="R2.4")
def at_most_max_num_seqs_run(mine: Mine) -> None:
    """No more than `max_num_seqs` requests run, whatever the budget would allow."""
    core = engine(mine, *(make_request(name, 1, max_tokens=4) for name in "abcd"), max_num_seqs=3)
    got = steps(core, 2)
    expected = [{"a": 1, "b": 1, "c": 1}] * 2
    assert got == expected, f"max_num_seqs=3, four requests wait, and the steps were {got}, expected {expected}"


@check("unit", spec="R2.5")
def the_budget_is_used_up_exactly(mine: Mine) -> None:
    """A prompt that needs just what is left of the budget is admitted; with no budget left the pass ends."""
    core = engine(mine, *(make_request(name, 8, max_tokens=1) for name in "abc"))
    got = steps(core, 2)
    assert got == [{"a": 8, "b": 8}, {"c": 8}], (
        f"three prompts of 8 tokens and a budget of 16 gave {got}, expected a and b in step 1, c in step 2"
    )


@check("unit", spec="R2.5")
def the_last_token_of_the_budget_goes_to_a_running_request(mine: Mine) -> None:
    """With a budget of 2 and two running requests, both compute in every step, and a third one waits."""
    requests = [make_request(name, 1, max_tokens=3) for name in "abc"]
    got = steps(engine(mine, *requests, enable_chunked_prefill=True, max_num_batched_tokens=2), 3)
    expected = [{"a": 1, "b": 1}] * 3
    assert got == expected, (
        f"budget 2, a and b run and c waits: the steps were {got}, expected {expected}: pass 1 goes on while budget is "
        "left, to the last token"
    )


@check("unit", spec="R2.5")
def no_request_overtakes_a_head_that_exceeds_the_budget(mine: Mine) -> None:
    """If the head of the queue does not fit the budget, the requests behind it wait too."""
    core = engine(mine, *(make_request(name, prompt, max_tokens=1) for name, prompt in (("a", 6), ("b", 12), ("c", 1))))
    got = steps(core, 2)
    assert got == [{"a": 6}, {"b": 12, "c": 1}], (
        f"prompts a 6, b 12, c 1 with a budget of 16 gave {got}, expected a alone in step 1: b does not fit behind "
        "a, and if c may overtake b, a stream of small requests makes b wait forever"
    )


@check("unit", spec="R2.6")
def no_request_overtakes_a_head_without_blocks(mine: Mine) -> None:
    """If there are too few blocks for the head of the queue, it stays the head, and the requests behind it wait too."""
    requests = (
        make_request("a", 7, max_tokens=2),
        make_request("b", 9, max_tokens=2),
        make_request("c", 1, max_tokens=2),
    )
    core = engine(mine, *requests, num_kv_blocks=5, max_num_batched_tokens=32)
    got = steps(core, 1)
    queue = [request.request_id for request in core.scheduler.waiting]
    assert (got, queue) == ([{"a": 7}], ["b", "c"]), (
        f"4 blocks of 4 tokens, prompts a 7, b 9, c 1: step 1 was {got} and left the queue {queue}, expected a alone "
        "and the queue b, c: b lacks a block, so the pass ends and nothing has left the queue"
    )
    got = steps(core, 2)
    assert got == [{"a": 1}, {"b": 9, "c": 1}], f"the steps after that were {got}, expected a 1, then b 9 and c 1"


@check("unit", spec="R2.2")
def a_finished_request_leaves_nothing_behind(mine: Mine) -> None:
    """A request that has stopped leaves `running`, its blocks are free, and the worker is told of it."""
    core = engine(mine, make_request("a", 6, max_tokens=1))
    pool = core.scheduler.kv_cache_manager.block_pool
    free_before = pool.get_num_free_blocks()
    _run(core, core.scheduler.schedule())
    running = [request.request_id for request in core.scheduler.running]
    assert running == [], f"a has generated its only token and {running} still run: a finished request is kept"
    free = pool.get_num_free_blocks()
    assert free == free_before, f"{free} of {free_before} blocks are free after a finished: its blocks have leaked"
    assert core.scheduler.requests == {}, (
        "a has finished and is still in scheduler.requests, so its id cannot be used again"
    )
    told = core.scheduler.schedule().finished_req_ids
    assert told == {"a"}, (
        f"the next message told the worker that {set(told)} have finished, expected {{'a'}}: it keeps a's row"
    )


def _run(core: EngineCore, *outputs: SchedulerOutput) -> None:
    for output in outputs:
        core.scheduler.update_from_output(output, core.executor.sample(core.executor.execute(output)))


@check("unit", spec="R2.21", hint=3)
def a_preempted_request_can_finish_with_the_token_on_its_way(mine: Mine) -> None:
    """Two steps are scheduled before the first one has run, and the second preempts b. Then b's last token arrives."""
    a, b = make_request("a", 14, max_tokens=2), make_request("b", 4, max_tokens=2)
    core = engine(
        mine, a, b, num_kv_blocks=5, max_num_batched_tokens=8, enable_chunked_prefill=True,
        long_prefill_token_threshold=4, reserve_full_sequence=False,
    )  # fmt: skip
    steps(core, 1)
    _run(core, core.scheduler.schedule(), core.scheduler.schedule())
    queue = [request.request_id for request in core.scheduler.waiting]
    assert b.is_finished and queue == [], (
        f"b was preempted after its last step was scheduled, and stopped with that token, but the queue is {queue}, "
        "expected empty: a request that stops may be in the queue"
    )
    core.scheduler.check_integrity()


@check("unit", spec="R2.15", hint=2)
def a_victim_does_not_compute_in_that_step(mine: Mine) -> None:
    """A request that was preempted while pass 1 went through the running requests gets no token in this step."""
    core = engine(mine, make_request("a", 8, max_tokens=4), make_request("b", 6, max_tokens=3), num_kv_blocks=5)
    steps(core, 1)
    step = Step(token_budget=16)
    core.scheduler.schedule_running(step)
    got, victims = step.num_scheduled_tokens, [request.request_id for request in step.preempted]
    assert (got, victims) == ({"a": 1}, ["b"]), (
        f"a needs a block of b in step 2, whose pass 1 granted {got} and preempted {victims}, expected a 1 and b "
        "preempted: allocate_or_preempt takes victims out of self.running while you walk over it"
    )


@check("unit", spec="R2.17", hint=2)
def a_victim_that_stood_earlier_makes_no_request_miss_the_step(mine: Mine) -> None:
    """Under "priority" a victim may stand before the request that needs its blocks. Those behind it all compute."""
    core = engine(
        mine, make_request("a", 5, priority=9), scheduling_policy="priority", num_kv_blocks=7, max_num_batched_tokens=32
    )
    steps(core, 1)
    add_all(core, [make_request("b", 8, priority=0), make_request("c", 5, priority=1)])
    steps(core, 1)  # a, b and c run in this order, and all 6 blocks are taken
    step = Step(token_budget=16)
    core.scheduler.schedule_running(step)
    got, victims = step.num_scheduled_tokens, [request.request_id for request in step.preempted]
    assert (got, victims) == ({"b": 1, "c": 1}, ["a"]), (
        f"a, b and c run, b needs a block of a, and pass 1 granted {got} and preempted {victims}, expected b 1, c 1 "
        "and a preempted: when a leaves self.running, the requests behind it move forward, and a walk over the list "
        "itself passes over one of them"
    )


@check("unit", spec="R2.15", hint=2)
def a_resumed_request_computes_prompt_and_output(mine: Mine) -> None:
    """A request that was preempted computes its prompt and what it had generated, and its tokens stay the same."""
    a, b = make_request("a", 8, max_tokens=4), make_request("b", 6, max_tokens=3)
    core = engine(mine, a, b, num_kv_blocks=5)
    steps(core, 4)
    output = core.scheduler.schedule()
    got = dict(output.num_scheduled_tokens)
    assert got == {"b": 7}, (
        f"b (6 prompt tokens) was preempted with one token generated, and came back with {got}, expected 7 tokens: b "
        "knows 7 and nothing of it is computed, so no rule may ask whether it 'is in prefill'"
    )
    _run(core, output)
    steps(core, 1)
    tokens = fake_tokens(b.prompt_token_ids, 3)
    assert b.output_token_ids == tokens, f"b generated {b.output_token_ids} after the preemption, and alone {tokens}"


@check("unit", spec="R2.22", hint=2)
def a_cached_prefix_is_not_computed(mine: Mine) -> None:
    """What the prefix cache holds of a prompt is adopted, not computed."""
    core = engine(mine, make_request("a", list(range(100, 110)), max_tokens=1), enable_prefix_caching=True)
    steps(core, 1)
    b = make_request("b", list(range(100, 110)), max_tokens=1)
    add_all(core, [b])
    got = steps(core, 1)
    assert got == [{"b": 2}], (
        f"b repeats a prompt of 10 tokens, of which 2 blocks of 4 are cached; it computed {got}, expected 2 tokens: "
        "ask get_computed_blocks, count from the end of the hit, and hand the hit to allocate_slots and admit"
    )


@check("property", spec="R2.22")
def no_request_starves(mine: Mine) -> None:
    """In 200 random workloads with preemptions and aborts, every request finishes with the tokens it gets alone."""
    for seed in range(200):
        workload = random_workload(seed // 8, ("m2", "m3", "m5", "m6")[seed % 4], with_aborts=seed % 3 == 0)
        try:
            run_workload(workload, mine.parts)
        except AssertionError as error:
            raise AssertionError(f"on the workload {workload}: {error}") from error


@check("property", spec="R2.1", hint=2)
def no_rule_of_scheduling_is_broken(mine: Mine) -> None:
    """In 40 random workloads, the trace keeps the rules: budget, seats, running requests first, no overtaking."""
    for seed in range(40):
        lint_workload(random_workload(seed // 2, ("m2", "m3", "m5", "m6")[seed % 4]), mine.parts)


@check("trace", spec="R2.22", hint=2)
def same_decisions_as_the_reference(mine: Mine) -> None:
    """On 24 random workloads with preemptions and aborts, every step decides what it decides with the engine's
    scheduler.
    """
    for seed in range(24):
        policy = ("fcfs", "priority")[seed % 2]
        milestone = ("m2", "m3", "m3", "m5", "m5", "m6")[seed % 6]
        check_workload(random_workload(seed, milestone, with_aborts=True, scheduling_policy=policy), mine.parts)
