"""The workloads that are recorded from vLLM and from FoloVLLM, and the loop that runs them on either engine.

Milestone: M6. vLLM counterpart: none. No torch: the vLLM side imports this file in vLLM's own environment.

A request arrives at a *step* and not at a time, so both engines get the same requests at the same moment, however fast
they are. Prompts are random token ids from a fixed seed: a scheduler sees only how long they are and which are equal.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

VOCAB_SIZE = 49_152  # of the default model
COMMON = {
    "dtype": "float32",
    "max_model_len": 512,
    "block_size": 32,  # vLLM's attention on a CPU takes multiples of 32 only
    "num_kv_blocks": 65,  # the null block included
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "long_prefill_token_threshold": 0,
    "scheduling_policy": "fcfs",
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
}


@dataclass(frozen=True)
class Arrival:
    """A request that arrives before step `step`, or, if it follows `after`, before the step after that one finished.

    The prompt of a following request is the whole text of `after`, its answer included, and then `prompt`.
    """

    request_id: str
    prompt: Sequence[int]
    max_tokens: int
    step: int = 0
    priority: int = 0
    after: str | None = None


@dataclass(frozen=True)
class Workload:
    """`settings` are the engine arguments that differ from COMMON."""

    about: str
    arrivals: Sequence[Arrival]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def engine_args(self) -> dict[str, Any]:
        return COMMON | self.settings


class RecordedEngine(Protocol):
    """What `run` needs of an engine."""

    def add(self, arrival: Arrival, prompt: list[int]) -> None: ...

    def step(self) -> dict[str, list[int]]:
        """Runs one step. Returns the whole answers of the requests that finished in it."""

    def close(self) -> None: ...


def run(engine: RecordedEngine, workload: Workload) -> None:
    """Runs the workload to its end. If nothing runs, the next request arrives at once."""
    pending, running, texts = list(workload.arrivals), dict[str, list[int]](), dict[str, list[int]]()
    step = 0
    while pending or running:
        for arrival in _due(pending, step, texts, is_idle=not running):
            pending.remove(arrival)
            history = texts[arrival.after] if arrival.after else []
            running[arrival.request_id] = [*history, *arrival.prompt]
            engine.add(arrival, running[arrival.request_id])
        for request_id, answer in engine.step().items():
            texts[request_id] = running.pop(request_id) + answer
        step += 1
    engine.close()


def _due(pending: Sequence[Arrival], step: int, texts: dict[str, list[int]], is_idle: bool) -> list[Arrival]:
    ready = [arrival for arrival in pending if arrival.after is None or arrival.after in texts]
    due = [arrival for arrival in ready if arrival.step <= step]
    return due or (ready[:1] if is_idle else [])


# ---- the workloads


def _tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1_000, VOCAB_SIZE) for _ in range(length)]


def _chat() -> list[Arrival]:
    """Three conversations of three turns each. The second and the third begin while the first is answered."""
    rng, arrivals = random.Random(1), []
    for chat in range(3):
        for turn in range(3):
            after = f"chat{chat}.{turn - 1}" if turn else None
            prompt = _tokens(rng, 45 if turn == 0 else 20)
            arrivals.append(Arrival(f"chat{chat}.{turn}", prompt, 14, step=0 if turn else 4 * chat, after=after))
    return arrivals


def _shared_prefix() -> list[Arrival]:
    """Eight questions behind one system prompt of 100 tokens. Two arrive together, so one hits what the other computes
    in the same step.
    """
    rng = random.Random(2)
    system = _tokens(rng, 100)
    return [Arrival(f"ask{i}", system + _tokens(rng, 9 + 7 * i), 8 + i, step=3 * (i // 2)) for i in range(8)]


def _long_prompt() -> list[Arrival]:
    """Three requests decode when a prompt of 400 tokens arrives. It is still being computed when they have finished."""
    rng = random.Random(3)
    short = [Arrival(f"short{i}", _tokens(rng, 10 + 5 * i), 5 + i) for i in range(3)]
    return [*short, Arrival("long", _tokens(rng, 400), 6, step=3), Arrival("late", _tokens(rng, 12), 6, step=12)]


def _memory_pressure() -> list[Arrival]:
    """Five requests that grow by two blocks each, in a cache of twelve blocks: the youngest are preempted."""
    rng = random.Random(4)
    return [Arrival(f"grow{i}", _tokens(rng, 60 + 11 * i), 50, step=2 * i) for i in range(5)]


def _urgent() -> list[Arrival]:
    """A long prompt of low priority is preempted in the step in which it has just been given two blocks.

    `urgent0` has 62 tokens, so in step 4 it computes its 65th and needs a third block, right after the long prompt has
    taken the last two. The other requests are short enough to need no block more until they finish.
    """
    rng = random.Random(5)
    steady = Arrival("steady", _tokens(rng, 10), 20)
    urgent = [Arrival(f"urgent{i}", _tokens(rng, 62 if i == 0 else 58), 6 - i, step=1 + i) for i in range(3)]
    return [steady, Arrival("patient", _tokens(rng, 400), 8, priority=1), *urgent]


WORKLOADS: dict[str, Workload] = {
    "chat": Workload("three conversations of three turns", _chat()),
    "shared_prefix": Workload("eight questions behind one system prompt", _shared_prefix()),
    "long_prompt": Workload(
        "a long prompt among decodes, cut into chunks of at most 64 tokens",
        _long_prompt(),
        {"long_prefill_token_threshold": 64},
    ),
    "memory_pressure": Workload(
        "five requests that outgrow the cache", _memory_pressure(), {"num_kv_blocks": 13, "max_model_len": 256}
    ),
    "urgent": Workload(
        "urgent requests that take a long prompt's blocks away",
        _urgent(),
        {"num_kv_blocks": 18, "max_num_seqs": 5, "long_prefill_token_threshold": 64, "scheduling_policy": "priority"},
    ),
}
