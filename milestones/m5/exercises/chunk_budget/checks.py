"""Checks of m5/chunk_budget: the number itself, and what it does to the steps of the toy engine."""

import random
from typing import Any

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_workload
from folovllm.learn.toy_engine import add_all, make_core, make_request, random_workload, schedule_and_run
from folovllm.request import Request
from folovllm.utils import cdiv

CHUNKS: dict[str, Any] = {"enable_chunked_prefill": True, "max_model_len": 64, "num_kv_blocks": 61}


def engine(mine: Mine, *requests: Request, **config_args: Any) -> EngineCore:
    """The toy engine with the learner's scheduler, chunks on, in which `requests` wait."""
    core = make_core(parts=mine.parts, **(CHUNKS | config_args))
    add_all(core, requests)
    return core


def ask(mine: Mine, request: Request, num_computed_tokens: int, token_budget: int, **config_args: Any) -> int:
    scheduler = engine(mine, **config_args).scheduler
    return scheduler.num_tokens_to_compute(request, num_computed_tokens, token_budget)


def steps(core: EngineCore, limit: int = 200) -> list[dict[str, int]]:
    """What each step computes, to the end."""
    done: list[dict[str, int]] = []
    while core.has_unfinished_requests():
        done.append(dict(schedule_and_run(core).num_scheduled_tokens))
        assert len(done) < limit, (
            f"not done after {limit} steps, the last of which computed {done[-3:]}: a request is stuck"
        )
    return done


def long_prompt_among_decodes(core: EngineCore) -> list[dict[str, int]]:
    """a is generating when b, with a prompt of 20 tokens, arrives. What each step computes from then on."""
    add_all(core, [make_request("a", 3, max_tokens=6)])
    schedule_and_run(core)
    add_all(core, [make_request("b", 20, max_tokens=2)])
    return steps(core)


def prediction() -> str:
    core = make_core(**CHUNKS, max_num_batched_tokens=16, long_prefill_token_threshold=12)
    add_all(core, [make_request(name, 3, max_tokens=20) for name in ("a1", "a2")])
    schedule_and_run(core)
    add_all(core, [make_request("b", 25, max_tokens=1)])
    return ", ".join(str(step["b"]) for step in steps(core) if "b" in step)


@check("unit", spec="R5.2", hint=3)
def a_request_gets_what_it_lacks(mine: Mine) -> None:
    """If the budget allows, a request computes all that it knows and has not computed."""
    request = make_request("a", 20)
    for computed, expected in ((0, 20), (7, 13), (19, 1), (20, 0)):
        got = ask(mine, request, computed, 64)
        assert got == expected, (
            f"num_tokens_to_compute(request, {computed}, 64) for a request of 20 known tokens: you returned {got}, "
            f"expected {expected}: the second argument says how many of them need not be computed"
        )


@check("unit", spec="R5.2", hint=2)
def the_budget_cuts_a_prompt(mine: Mine) -> None:
    """With chunks, a request that exceeds the budget gets just the budget."""
    request = make_request("a", 20)
    for computed, budget, expected in ((0, 8, 8), (8, 8, 8), (16, 8, 4), (0, 20, 20), (0, 1, 1)):
        got = ask(mine, request, computed, budget)
        assert got == expected, (
            f"20 known tokens, {computed} computed, budget {budget}: you returned {got}, expected {expected}"
        )


@check("unit", spec="R5.7", hint=3)
def without_chunks_it_is_the_whole_or_nothing(mine: Mine) -> None:
    """With chunked prefill off, a request that exceeds the budget gets 0, and not a part."""
    off = {"enable_chunked_prefill": False, "max_num_batched_tokens": 64}
    request = make_request("a", 20)
    for computed, budget, expected in ((0, 20, 20), (0, 19, 0), (19, 1, 1)):
        got = ask(mine, request, computed, budget, **off)
        assert got == expected, (
            f"chunks off, 20 known tokens, {computed} computed, budget {budget}: you returned {got}, expected "
            f"{expected}: a prompt is computed whole or not at all"
        )


@check("unit", spec="R5.3", hint=2)
def the_threshold_cuts_a_prompt_too(mine: Mine) -> None:
    """A step computes at most `long_prefill_token_threshold` tokens of one request; 0 means that there is no
    threshold.
    """
    request = make_request("a", 20)
    for threshold, budget, expected in ((4, 64, 4), (4, 3, 3), (30, 64, 20), (0, 64, 20)):
        got = ask(mine, request, 0, budget, long_prefill_token_threshold=threshold)
        assert got == expected, (
            f"20 tokens are missing, threshold {threshold}, budget {budget}: you returned {got}, expected "
            f"{expected}: the smallest of the three, and a threshold of 0 is none"
        )
    for token_id in (5, 6, 7):
        request.append_output_token_id(token_id)
    got = ask(mine, request, 0, 64, long_prefill_token_threshold=4)
    assert got == 4, (
        f"a request that was preempted lacks 20 prompt and 3 output tokens, threshold 4, budget 64: you returned "
        f"{got}, expected 4: the threshold is for every request, also for one that has output"
    )


@check("unit", spec="R5.15", hint=3)
def tokens_are_counted_from_the_end_of_the_hit(mine: Mine) -> None:
    """What the prefix cache holds of a waiting request is not computed, though the request itself says 0."""
    core = engine(mine, make_request("a", list(range(100, 113)), max_tokens=1), enable_prefix_caching=True)
    steps(core)
    core.scheduler.max_num_batched_tokens = 4
    add_all(core, [make_request("b", list(range(100, 121)), max_tokens=1)])
    output = core.scheduler.schedule()
    got = dict(output.num_scheduled_tokens), output.scheduled_new_reqs[0].num_computed_tokens
    assert got == ({"b": 4}, 12), f"b has 12 of 21 tokens in the cache, budget 4; (scheduled, computed before) is {got}"
    request = make_request("c", 21)
    lengths = [ask(mine, request, hit, 64) for hit in (12, 20)]
    assert lengths == [9, 1], (
        f"21 known tokens with 12 and 20 of them cached: you returned {lengths}, expected [9, 1]: count from "
        "num_computed_tokens, for request.num_computed_tokens is 0 until the request is admitted"
    )


@check("unit", spec="R5.15", hint=1)
def a_resumed_request_computes_its_output_again(mine: Mine) -> None:
    """Prompt and output are one thing to cut: a request that was preempted lacks both."""
    request = make_request("a", 8)
    for token_id in (5, 6, 7):
        request.append_output_token_id(token_id)
    got = [ask(mine, request, computed, budget) for computed, budget in ((0, 64), (0, 9), (9, 64), (10, 64))]
    assert got == [11, 9, 2, 1], (
        "8 prompt tokens and 3 generated ones, (computed, budget) = (0, 64), (0, 9), (9, 64), (10, 64): you "
        f"returned {got}, "
        "expected [11, 9, 2, 1]: the known tokens are request.num_tokens, and no rule asks whether this 'is a prompt'"
    )


@check("unit", spec="R5.2", hint=2)
def a_lone_prompt_takes_its_length_over_the_budget(mine: Mine) -> None:
    """In the engine, a prompt of P tokens takes ceil(P / budget) steps."""
    for prompt, budget in ((20, 8), (16, 8), (1, 8), (33, 5)):
        got = steps(engine(mine, make_request("a", prompt, max_tokens=1), max_num_batched_tokens=budget))
        assert len(got) == cdiv(prompt, budget), (
            f"a prompt of {prompt} with a budget of {budget} took {len(got)} steps {got}, expected "
            f"{cdiv(prompt, budget)}"
        )


@check("unit", spec="R5.4", hint=2)
def a_long_prompt_takes_what_the_decodes_leave(mine: Mine) -> None:
    """The worked example: every step computes a token of a, and of b what is left."""
    got = long_prompt_among_decodes(engine(mine, max_num_batched_tokens=8))
    expected = [{"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 1, "b": 6}, {"a": 1, "b": 1}, {"a": 1}]
    assert got == expected, f"the steps of the worked example were {got}, expected {expected}"


@check("property", spec="R5.3")
def no_step_exceeds_the_budget_and_no_decode_waits(mine: Mine) -> None:
    """In 100 random workloads: the budget holds, a running request computes in every step, and the tokens are right."""
    for seed in range(100):
        rng = random.Random(seed)
        budget, threshold = rng.randint(1, 12), rng.choice((0, 0, 1, 3, 5))
        core = engine(mine, max_num_batched_tokens=budget, long_prefill_token_threshold=threshold, max_num_seqs=budget)
        sizes = [(rng.randint(1, 4 + seed // 3), rng.randint(1, 6)) for _ in range(1 + seed // 12)]
        case = f"budget {budget}, threshold {threshold}, prompts and outputs {sizes}"
        add_all(core, [make_request(f"r{i}", prompt, max_tokens=n) for i, (prompt, n) in enumerate(sizes)])
        for _ in range(1_000):
            if not core.has_unfinished_requests():
                break
            generating = [r for r in core.scheduler.running if r.num_tokens - r.num_computed_tokens == 1]
            _check_step(case, budget, threshold, generating, schedule_and_run(core))
        assert not core.has_unfinished_requests(), f"{case}: not done after 1,000 steps"


def _check_step(case: str, budget: int, threshold: int, generating: list[Request], output: SchedulerOutput) -> None:
    scheduled = dict(output.num_scheduled_tokens)
    assert sum(scheduled.values()) <= budget, f"{case}: a step computed {scheduled}, which exceeds the budget"
    assert not threshold or max(scheduled.values()) <= threshold, f"{case}: {scheduled} exceeds the threshold"
    late = [r.request_id for r in generating if scheduled.get(r.request_id) != 1]
    assert not late, f"{case}: {late} were generating and got no token in a step that computed {scheduled}"


@check("trace", spec="R5.3", hint=2)
def same_decisions_as_the_reference(mine: Mine) -> None:
    """On 24 random workloads with preemptions and aborts, every step decides what it decides with the engine's
    scheduler.
    """
    for seed in range(24):
        policy = ("fcfs", "priority")[seed % 2]
        milestone = ("m2", "m5", "m6")[seed % 3]
        check_workload(random_workload(seed, milestone, with_aborts=True, scheduling_policy=policy), mine.parts)
