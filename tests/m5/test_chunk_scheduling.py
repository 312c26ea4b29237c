"""Chunks as the scheduler cuts them: against an oracle of twenty lines, against closed formulas, under random traffic.

Milestone: M5. On the fake executor, whose tokens are wrong if any chunk is. What must hold (R5.1 to R5.7):
the budget is never exceeded, running requests come first and none of them ever misses a step, the threshold is
respected, nothing is emitted in mid-prompt, and off means the whole prompt or nothing.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import folovllm
from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.request import Request
from tests import core_helpers as helpers
from tests.core_helpers import make_core, make_request

pytestmark = pytest.mark.m5

MAX_MODEL_LEN = 64
SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)
LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8)  # (prompt, output)


def requests_of(lengths: list[tuple[int, int]]) -> list[Request]:
    return [make_request(f"r{i}", prompt, max_tokens=output) for i, (prompt, output) in enumerate(lengths)]


def chunking_core(**args: Any) -> EngineCore:
    return make_core(**({"max_model_len": MAX_MODEL_LEN, "enable_chunked_prefill": True} | args))


def scheduled(core: EngineCore) -> list[dict[str, int]]:
    """{request: tokens} of every step until nothing is left."""
    steps: list[dict[str, int]] = []
    while core.has_unfinished_requests():
        steps.append(dict(helpers.schedule_and_run(core).num_scheduled_tokens))
        assert steps[-1] and len(steps) < helpers.MAX_STEPS, "a step without work: somebody waits for ever"
    return steps


# ---- the oracle


@dataclass
class Life:
    """A request of the oracle: how many known tokens are not computed, how many are still to be made."""

    name: str
    missing: int
    to_make: int


def foretell(lengths: list[tuple[int, int]], budget: int, threshold: int, seats: int) -> list[dict[str, int]]:
    """What each step must compute when memory is ample. No request, no queue, no blocks: only the rules."""
    waiting = [Life(f"r{i}", prompt, output) for i, (prompt, output) in enumerate(lengths)]
    running: list[Life] = []
    steps: list[dict[str, int]] = []
    while running or waiting:
        left, step = budget, {}
        while len(running) < seats and waiting:  # whoever finds a seat; what is left of the budget is seen below
            running.append(waiting.pop(0))
        for life in running:
            step[life.name] = min(life.missing, threshold or left, left)
            left -= step[life.name]
        unserved = [life for life in running if not step[life.name]]
        running, waiting = [life for life in running if step[life.name]], unserved + waiting
        for life in running:
            life.missing -= step[life.name]
            if life.missing == 0:
                life.missing, life.to_make = 1, life.to_make - 1  # the token just made is the next to compute
        running = [life for life in running if life.to_make > 0]
        steps.append({name: tokens for name, tokens in step.items() if tokens})
    return steps


@SETTINGS
@given(LENGTHS, st.integers(1, 50), st.integers(0, 12), st.integers(1, 5))
def test_every_step_is_what_the_oracle_foretells(
    lengths: list[tuple[int, int]], budget: int, threshold: int, seats: int
) -> None:
    core = chunking_core(
        max_num_batched_tokens=budget, long_prefill_token_threshold=threshold, max_num_seqs=seats, num_kv_blocks=200
    )
    helpers.add_all(core, requests_of(lengths))
    steps = scheduled(core)
    assert [list(step.items()) for step in steps] == [
        list(step.items()) for step in foretell(lengths, budget, threshold, seats)
    ]
    assert core.stats().num_preemptions == 0


def test_the_oracle_itself() -> None:
    """By hand: budget 8; a decodes first, b's 10 tokens take what is left, c comes behind it."""
    assert foretell([(6, 3), (10, 2), (3, 1)], budget=8, threshold=0, seats=4) == [
        {"r0": 6, "r1": 2},
        {"r0": 1, "r1": 7},
        {"r0": 1, "r1": 1, "r2": 3},
        {"r1": 1},
    ]


# ---- closed formulas


@pytest.mark.parametrize("budget", [1, 7, 16, 39, 40, 41])
@pytest.mark.parametrize("prompt", [1, 7, 16, 17, 40])
def test_a_lone_prompt_takes_its_length_over_the_budget(prompt: int, budget: int) -> None:
    core = chunking_core(max_num_batched_tokens=budget)
    core.add_request(make_request("a", prompt, max_tokens=1))
    steps = [step["a"] for step in scheduled(core)]
    full, rest = divmod(prompt, budget)
    assert steps == [budget] * full + [rest] * (rest > 0)


@pytest.mark.parametrize(("budget", "threshold"), [(8, 0), (11, 0), (40, 0), (40, 4), (9, 4), (6, 5)])
def test_a_prompt_among_decodes_gets_what_they_leave(budget: int, threshold: int) -> None:
    """4 decodes and a prompt of 30: ceil(30 / min(threshold, budget - 4)) steps, and nobody decodes later for it."""
    core = chunking_core(
        max_num_batched_tokens=budget, long_prefill_token_threshold=threshold, max_num_seqs=8, num_kv_blocks=200
    )
    decodes = [f"d{i}" for i in range(4)]
    helpers.add_all(core, [make_request(name, 1, max_tokens=40) for name in decodes])
    helpers.schedule_and_run(core)
    core.add_request(make_request("long", 30, max_tokens=2))
    chunk = min(threshold or budget, budget - 4)
    num_steps = -(-30 // chunk)
    outputs = [core.step() for _ in range(num_steps)]
    assert all([output.request_id for output in step][:4] == decodes for step in outputs), "one token each, every step"
    assert [len(step) for step in outputs] == [4] * (num_steps - 1) + [5], "the prompt's first token, and none before"


# ---- under random traffic, also when the pool runs dry


@st.composite
def dense_args(draw: st.DrawFn) -> dict[str, Any]:
    """A pool that barely holds one request, so that prompts are preempted in their middle."""
    block_size = draw(st.integers(1, 6))
    needed = -(-MAX_MODEL_LEN // block_size)
    chunked = draw(st.sampled_from([True, True, True, False]))
    return {
        "block_size": block_size,
        "num_kv_blocks": 1 + needed + draw(st.integers(0, needed)),
        "max_num_seqs": draw(st.integers(1, 6)),
        "enable_chunked_prefill": chunked,
        "max_num_batched_tokens": draw(st.integers(1, 30)) if chunked else MAX_MODEL_LEN,
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 1, 5])) if chunked else 0,
        "batching": draw(st.sampled_from(["continuous", "continuous", "static"])),
        "reserve_full_sequence": draw(st.booleans()),
    }


class Watch:
    """Looks over a core's shoulder in every step."""

    def __init__(self, core: EngineCore, args: dict[str, Any]) -> None:
        self.core, self.args = core, args
        self.num_mid_prompt = self.num_preempted_in_mid_prompt = 0

    def step(self) -> None:
        scheduler = self.core.scheduler
        mid_prompt = {r.request_id for r in scheduler.running if r.num_computed_tokens < r.num_prompt_tokens}
        requests = dict(scheduler.requests)
        lengths = {name: request.num_output_tokens for name, request in requests.items()}
        output = scheduler.schedule()
        self.check_counts(output)
        assert list(output.num_scheduled_tokens) == helpers.ids(scheduler.running), "a running request missed a step"
        runner_output = self.core.executor.sample(self.core.executor.execute(output))
        emitted = {o.request_id for o in scheduler.update_from_output(output, runner_output)}
        for name, request in requests.items():
            num_new = request.num_output_tokens - lengths[name]
            assert num_new == (name in emitted) == (name in output.sampling_req_ids), "a token exactly where it samples"
        helpers.check(self.core)
        self.num_mid_prompt += bool(mid_prompt)
        self.num_preempted_in_mid_prompt += len(mid_prompt & output.preempted_req_ids)

    def check_counts(self, output: SchedulerOutput) -> None:
        """After schedule(), which has added the counts to num_computed_tokens already."""
        counts, args, requests = output.num_scheduled_tokens, self.args, self.core.scheduler.requests
        assert sum(counts.values()) == output.total_num_scheduled_tokens <= args["max_num_batched_tokens"]
        assert all(1 <= n <= (args["long_prefill_token_threshold"] or n) for n in counts.values())
        complete = {name for name in counts if requests[name].num_computed_tokens == requests[name].num_tokens}
        assert output.sampling_req_ids == complete
        if not args["enable_chunked_prefill"]:
            assert complete == set(counts)
            assert all(n in (1, requests[name].num_tokens) for name, n in counts.items()), "a part of a prompt"


SEEN = {"steps in mid-prompt": 0, "preempted in mid-prompt": 0}


@settings(SETTINGS, max_examples=120)
@given(dense_args(), st.integers(0, 2**16))
def random_traffic(args: dict[str, Any], seed: int) -> None:
    core, rng = chunking_core(**args), random.Random(seed)
    requests = [make_request(f"r{i}", rng.randint(1, 50), max_tokens=rng.randint(1, 14)) for i in range(8)]
    watch, to_come = Watch(core, args), list(requests)
    for _ in range(helpers.MAX_STEPS):
        while to_come and rng.random() < 0.3:
            core.add_request(to_come.pop(0))
        if not core.has_unfinished_requests() and not to_come:
            break
        watch.step()
    for request in requests:
        room = MAX_MODEL_LEN - request.num_prompt_tokens
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, min(request.max_tokens, room))
    helpers.assert_nothing_leaked(core)
    SEEN["steps in mid-prompt"] += watch.num_mid_prompt
    SEEN["preempted in mid-prompt"] += watch.num_preempted_in_mid_prompt


def test_random_traffic() -> None:
    """First come, first served. Whoever runs computes in every step, so a decode never waits longer than one."""
    random_traffic()
    print(SEEN)
    assert SEEN["steps in mid-prompt"] > 1000 and SEEN["preempted in mid-prompt"] > 10, SEEN


# ---- off, and what is refused


def test_off_is_the_whole_prompt_or_stop() -> None:
    """b does not fit beside a, and c, which would, may not overtake it."""
    core = make_core(max_num_batched_tokens=16, max_num_seqs=4)
    helpers.add_all(core, [make_request(name, n, max_tokens=2) for name, n in [("a", 10), ("b", 12), ("c", 2)]])
    assert scheduled(core) == [{"a": 10}, {"a": 1, "b": 12, "c": 2}, {"b": 1, "c": 1}]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_batched_tokens": 63}, "would wait forever: raise it, or lower max_model_len"),
        ({"long_prefill_token_threshold": 8}, "set enable_chunked_prefill=True or leave it 0"),
        ({"max_num_batched_tokens": 0, "enable_chunked_prefill": True}, "max_num_batched_tokens must be between 1 and"),
        ({"long_prefill_token_threshold": -1, "enable_chunked_prefill": True}, "must be at least 0"),
        ({"enable_chunked_prefill": "yes"}, "enable_chunked_prefill must be True or False"),
    ],
)
def test_what_could_wait_for_ever_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        helpers.make_config(max_model_len=MAX_MODEL_LEN, **args)


@pytest.mark.parametrize(
    ("args", "budget"),
    [
        ({"max_num_batched_tokens": MAX_MODEL_LEN}, MAX_MODEL_LEN),  # just enough without chunks
        ({"max_num_batched_tokens": 1, "enable_chunked_prefill": True}, 1),
        ({"max_model_len": 3000}, 3000),  # off: the longest prompt must fit
        ({"max_model_len": 3000, "enable_chunked_prefill": True}, 2048),
        ({}, 2048),
    ],
)
def test_the_budget_that_is_used(args: dict[str, Any], budget: int) -> None:
    config = helpers.make_config(**({"max_model_len": MAX_MODEL_LEN} | args))
    assert config.max_num_batched_tokens == budget


def test_the_rung_switches_chunks_and_nothing_else() -> None:
    """m4, m5 without m5 and m5: one field apart."""
    m4, m5 = EngineConfig.preset("m4"), EngineConfig.preset("m5")
    assert EngineConfig.preset("m5", without=["m5"]) == m4 != m5
    assert (m4.scheduler_config.enable_chunked_prefill, m5.scheduler_config.enable_chunked_prefill) == (False, True)
    assert EngineConfig.preset("m4", enable_chunked_prefill=True) == m5


def test_only_scheduler_and_config_know_of_chunks() -> None:
    """R5.9: no model, kernel, worker or sampler asks whether a prompt is in parts."""
    package = Path(folovllm.__file__).parent
    knows = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search("chunked_prefill|long_prefill|is_prefill", path.read_text(encoding="utf-8"))
    }
    below = {"worker", "attention", "model_executor", "sample", "executor", "engine", "quantize"}
    assert {"config.py", "core/sched/scheduler.py", "milestones.py"} <= knows
    assert not [path for path in knows if path.split("/")[0] in below], knows
