"""Checks of m5/last_chunk: who samples, how far each request is computed, and what reaches the client."""

from typing import Any

from folovllm.core.sched.step import Step
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_workload, lint_workload
from folovllm.learn.toy_engine import add_all, make_core, make_request, random_workload, schedule_and_run
from folovllm.request import Request

CHUNKS: dict[str, Any] = {"enable_chunked_prefill": True, "max_model_len": 64, "num_kv_blocks": 61}


def engine(mine: Mine, *requests: Request, **config_args: Any) -> EngineCore:
    """The toy engine with the learner's scheduler, chunks on, in which `requests` wait."""
    core = make_core(parts=mine.parts, **(CHUNKS | config_args))
    add_all(core, requests)
    return core


def step_of(**num_tokens: int) -> Step:
    """A step that computes so many tokens of each request. E.g. step_of(a=1, b=5)."""
    step = Step(token_budget=64)
    step.num_scheduled_tokens.update(num_tokens)
    return step


def request_with(request_id: str, prompt: int, output: int = 0, computed: int = 0) -> Request:
    request = make_request(request_id, prompt)
    for token_id in range(output):
        request.append_output_token_id(token_id)
    request.num_computed_tokens = computed
    return request


def sampling_steps(core: EngineCore, prompt: int = 12) -> list[list[str]]:
    """Who samples in each step, from the arrival of b on; a is generating. Budget 6."""
    add_all(core, [make_request("a", 3, max_tokens=6)])
    schedule_and_run(core)
    add_all(core, [make_request("b", prompt, max_tokens=2)])
    return [sorted(schedule_and_run(core).sampling_req_ids) for _ in range(4)]


def prediction() -> str:
    steps = sampling_steps(make_core(**CHUNKS, max_num_batched_tokens=6), prompt=15)
    return str(1 + next(i for i, sampling in enumerate(steps) if "b" in sampling))


@check("unit", spec="R5.6")
def a_chunk_in_mid_prompt_does_not_sample(mine: Mine) -> None:
    """A request whose prompt is not complete after this step does not sample."""
    core = engine(mine, request_with("a", 12), request_with("b", 12, computed=5))
    got = core.scheduler.choose_sampling(step_of(a=5, b=5))
    assert got == frozenset(), (
        f"a will be computed up to 5 of 12 and b up to 10 of 12, and you let {sorted(got)} sample: what their logits "
        "predict is the next token of the prompt, which is known"
    )


@check("unit", spec="R5.6")
def the_last_chunk_and_a_decode_sample(mine: Mine) -> None:
    """A request that lacks nothing after this step samples in this step."""
    core = engine(
        mine, request_with("a", 12, computed=10), request_with("b", 3, output=2, computed=4), request_with("c", 7)
    )
    got = core.scheduler.choose_sampling(step_of(a=2, b=1, c=7))
    assert got == {"a", "b", "c"}, (
        f"a's last chunk ends its prompt, b is a decode and c a whole prompt, and you let {sorted(got)} sample, "
        "expected a, b and c: a prompt that ends with its chunk samples in that very step"
    )


@check("unit", spec="R5.15", hint=2)
def a_resumed_request_samples_after_its_output_is_computed(mine: Mine) -> None:
    """A request that comes back after a preemption has output, and samples only when all of it is computed again."""
    core = engine(mine, request_with("a", 8, output=4), request_with("b", 8, output=4, computed=6))
    for step, expected in ((step_of(a=8, b=3), set()), (step_of(a=12, b=6), {"a", "b"})):
        got = core.scheduler.choose_sampling(step)
        assert got == expected, (
            f"a and b know 8 prompt and 4 output tokens; a has computed 0 and b 6 of these 12, the step computes "
            f"{step.num_scheduled_tokens}, and you let {sorted(got)} sample, expected {sorted(expected)}: output is "
            "no sign that a request is complete, nor is a computed prompt"
        )


@check("unit", spec="R5.6")
def only_requests_of_the_step_sample(mine: Mine) -> None:
    """A request that computes nothing in this step does not sample in it, and asking changes nothing."""
    core = engine(mine, request_with("a", 4, output=1, computed=4), request_with("b", 4, output=1, computed=5))
    got = core.scheduler.choose_sampling(step_of(a=1))
    assert got == {"a"}, f"only a computes in this step, and you let {sorted(got)} sample"
    computed = [request.num_computed_tokens for request in core.scheduler.requests.values()]
    assert computed == [4, 5], (
        f"choose_sampling changed num_computed_tokens to {computed}, expected [4, 5]: advance does that"
    )


@check("unit", spec="R5.16", hint=3)
def computed_tokens_end_at_the_end_of_the_chunk(mine: Mine) -> None:
    """`advance` adds what this step computes, and not the rest of the prompt."""
    core = engine(
        mine, request_with("a", 12, computed=5), request_with("b", 3, output=1, computed=3), request_with("c", 9)
    )
    core.scheduler.advance(step_of(a=5, b=1))
    got = [request.num_computed_tokens for request in core.scheduler.requests.values()]
    assert got == [10, 4, 0], (
        f"a computed 5 more tokens after 5, b one after 3, c none; num_computed_tokens are now {got}, expected [10, "
        "4, 0]: attention ends where the chunk ends, and what comes later is not there yet"
    )


@check("unit", spec="R5.6", hint=2)
def the_worked_example(mine: Mine) -> None:
    """In the engine, b samples for the first time in the step that completes its prompt."""
    got = sampling_steps(engine(mine, max_num_batched_tokens=6))
    assert got == [["a"], ["a"], ["a", "b"], ["a", "b"]], (
        f"in the four steps of the worked example these requests sampled: {got}, expected a, a, a and b, a and b"
    )


@check("unit", spec="R5.17", hint=2)
def the_first_token_follows_the_whole_prompt(mine: Mine) -> None:
    """However the prompt is cut, the client gets the tokens that follow all of it."""
    for budget in (1, 4, 9, 10, 64):
        request = make_request("a", 10, max_tokens=3)
        core = engine(mine, request, max_num_batched_tokens=budget)
        for _ in range(20):
            if core.has_unfinished_requests():
                core.step()
        expected = fake_tokens(request.prompt_token_ids, 3)
        assert request.output_token_ids == expected, (
            f"a prompt of 10 with a budget of {budget} generated {request.output_token_ids}, expected {expected} "
            "after 20 steps"
        )


@check("property", spec="R5.17", hint=3)
def any_cut_gives_the_same_tokens(mine: Mine) -> None:
    """In 100 random workloads with preemptions and aborts, every request gets the tokens that it gets alone."""
    for seed in range(100):
        switches = {"block_size": 2, "num_kv_blocks": 9 + seed % 3, "max_num_batched_tokens": 1 + seed % 7}
        workload = random_workload(seed // 4, ("m5", "m6")[seed % 2], with_aborts=True, **switches)
        lint_workload(workload, mine.parts)


@check("trace", spec="R5.6", hint=2)
def same_decisions_as_the_reference(mine: Mine) -> None:
    """On 24 random workloads with preemptions and aborts, every step decides what the reference decides."""
    for seed in range(24):
        policy = ("fcfs", "priority")[seed % 2]
        milestone = ("m2", "m5", "m6")[seed % 3]
        check_workload(random_workload(seed, milestone, with_aborts=True, scheduling_policy=policy), mine.parts)
