"""The three requests that every learning page, picture and notebook of M1 to M6 uses, and a core to run them on.

Milestone: M1. vLLM counterpart: none. Request c continues the conversation that request a began: its prompt holds a's
prompt and a's answer. The texts, token ids and answers are those of SmolLM2-135M-Instruct in fp32, greedy; the core
replays them, so the examples need no weights and no torch, while the scheduler and the KV cache are the real ones.
A test with the weights holds the recorded answers to the model.

    core = example_core(block_size=4, num_kv_blocks=7)
    for step in run_example(core):
        print(step)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.learn.toy_engine import AttendingExecutor, block_ids, check_core, make_core, make_request, steps_of
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import Request


@dataclass(frozen=True)
class Example:
    """One request: its text, its token ids, what the model answers, and the step before which it arrives."""

    text: str
    pieces: tuple[str, ...]  # the prompt's tokens as text
    prompt_token_ids: tuple[int, ...]
    answer_pieces: tuple[str, ...]
    answer_token_ids: tuple[int, ...]
    max_tokens: int
    arrival: int


EXAMPLES: dict[str, Example] = {
    "a": Example(
        text="The capital of France is",
        pieces=("The", " capital", " of", " France", " is"),
        prompt_token_ids=(504, 3575, 282, 4649, 314),
        answer_pieces=(" Paris", ".", "\n", "\n", "The", " answer", " is", ":"),
        answer_token_ids=(7042, 30, 198, 198, 504, 2988, 314, 42),
        max_tokens=4,
        arrival=0,
    ),
    "b": Example(
        text="Once upon a time",
        pieces=("Once", " upon", " a", " time"),
        prompt_token_ids=(6403, 1980, 253, 655),
        answer_pieces=(",", " the", " city", " of", " Nova", " Haven", " was", " a"),
        answer_token_ids=(28, 260, 2240, 282, 23324, 27108, 436, 253),
        max_tokens=6,
        arrival=0,
    ),
    "c": Example(
        text="The capital of France is Paris. The capital of Italy is",
        pieces=("The", " capital", " of", " France", " is", " Paris", ".", " The", " capital", " of", " Italy", " is"),
        prompt_token_ids=(504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282, 7158, 314),
        answer_pieces=(" Rome", ".", " The", " capital"),
        answer_token_ids=(7268, 30, 378, 3575),
        max_tokens=2,
        arrival=2,
    ),
}
LESSONS = [(example.pieces, example.answer_pieces) for example in EXAMPLES.values()]  # for hub.tiny_model
PIECES: dict[int, str] = {
    token_id: piece
    for example in EXAMPLES.values()
    for token_id, piece in zip(
        example.prompt_token_ids + example.answer_token_ids, example.pieces + example.answer_pieces, strict=True
    )
}


def text_of(token_ids: list[int] | tuple[int, ...]) -> str:
    """The text of token ids that occur in the three requests."""
    return "".join(PIECES[token_id] for token_id in token_ids)


class ReplayExecutor(AttendingExecutor):
    """Checks every KV slot like its base class, then answers with the recorded token of the real model."""

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        output = super().sample(handle)
        for request_id, sampled in output.sampled_token_ids.items():
            if sampled:
                state, example = self.requests[request_id], EXAMPLES[request_id]
                position = len(state.token_ids) - 1 - len(example.prompt_token_ids)
                sampled[0] = state.token_ids[-1] = example.answer_token_ids[position]
        return output


def example_request(name: str, **params: Any) -> Request:
    """Request "a", "b" or "c". `params` take the place of its sampling parameters (max_tokens at most as recorded)."""
    if name not in EXAMPLES:
        raise ValueError(f"there is no example request {name!r}; there are {', '.join(EXAMPLES)}")
    example = EXAMPLES[name]
    max_tokens = params.pop("max_tokens", example.max_tokens)
    if max_tokens > len(example.answer_token_ids):
        raise ValueError(f"max_tokens of {name!r} must be at most {len(example.answer_token_ids)}, got {max_tokens}")
    return make_request(name, example.prompt_token_ids, max_tokens=max_tokens, **params)


def example_core(**engine_args: Any) -> EngineCore:
    """A core that answers the three requests. Blocks of 4 tokens and 16 tokens per request, unless said otherwise."""
    return make_core(ReplayExecutor(), **engine_args)


@dataclass(frozen=True)
class Step:
    """What one step did. Printed, it is one line."""

    number: int
    scheduled: dict[str, int]  # request -> tokens computed in this step
    start: dict[str, int]  # request -> position of the first of them
    blocks: dict[str, list[int]]  # request -> its block table after scheduling
    sampled: dict[str, list[int]]  # request -> new tokens; empty in mid-prompt
    hits: dict[str, int]  # admitted request -> cached tokens that it did not compute
    preempted: list[str]
    waiting: list[str]  # after scheduling

    def __str__(self) -> str:
        names = [*self.scheduled, *self.preempted, *(name for name in self.waiting if name not in self.preempted)]
        return f"step {self.number}: " + "; ".join(map(self.of, names))

    def of(self, name: str) -> str:
        """What the step did with one request, e.g. "b position 4 in blocks [3, 4] -> ' the'" or "c waits"."""
        if name in self.preempted:
            return f"{name} preempted"
        if name not in self.scheduled:
            return f"{name} waits" if name in self.waiting else f"{name} is not in the engine"
        start, count = self.start[name], self.scheduled[name]
        where = f"position {start}" if count == 1 else f"positions {start}-{start + count - 1}"
        hit = f" ({self.hits[name]} cached)" if self.hits.get(name) else ""
        new = "".join(repr(PIECES[token_id]) for token_id in self.sampled[name]) or "no token yet"
        return f"{name} {where}{hit} in blocks {self.blocks[name]} -> {new}"


def run_example(core: EngineCore, names: str = "abc") -> Iterator[Step]:
    """Runs the named requests to their ends, each arriving before its step, and yields what every step did."""
    arrivals = [(EXAMPLES[name].arrival, example_request(name)) for name in names]
    for number in steps_of(core, arrivals):
        yield run_step(core, number)


def run_step(core: EngineCore, number: int) -> Step:
    """One step like EngineCore.step, but answering what it did."""
    scheduler = core.scheduler
    output = scheduler.schedule()
    new = {request.request_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
    cached = {request.request_id: request.num_computed_tokens for request in output.scheduled_cached_reqs}
    resumed = {r.request_id: r.num_computed_tokens for r in output.scheduled_cached_reqs if r.resumed}
    blocks = {name: block_ids(core, name) for name in output.num_scheduled_tokens}
    waiting = [request.request_id for request in scheduler.waiting]
    runner_output = core.executor.sample(core.executor.execute(output))
    scheduler.update_from_output(output, runner_output)
    check_core(core)
    return Step(
        number=number,
        scheduled=dict(output.num_scheduled_tokens),
        start=new | cached,
        blocks=blocks,
        sampled=runner_output.sampled_token_ids,
        hits=new | resumed,
        preempted=list(output.preempted_req_ids),
        waiting=waiting,
    )
