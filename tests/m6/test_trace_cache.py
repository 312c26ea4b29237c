"""What a trace says of hits, copies and cached blocks, and the lint's two rules about them."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.core import EngineCore
from folovllm.parts import variants
from folovllm.trace.diff import diff
from folovllm.trace.lint import lint
from folovllm.trace.lint_cache import CACHE_RULES
from folovllm.trace.record import Trace
from folovllm.trace.show import show
from tests.core_helpers import make_request
from tests.m2.trace_helpers import CarelessExecutor, record_run, traced_core
from tests.m6.cache_helpers import INDEXES, index_of
from tests.m6.test_faults import FaultyExecutor

pytestmark = pytest.mark.m6

POLICIES = variants("core.request_queue")
P = list(range(100, 110))


def cached(path: Path, index: str = "hash", executor: Any = None, **args: Any) -> EngineCore:
    return traced_core(path, executor, enable_prefix_caching=True, prefix_index=index, **args)


def events(trace: Trace, kind: str) -> list[list[Any]]:
    return [event for record in trace.steps for event in record["events"] if event[0] == kind]


def one_after_the_other(core: EngineCore, prompts: list[list[int]], max_steps: int = 200) -> Trace:
    core.scheduler.max_num_seqs = 1
    return record_run(core, [make_request(f"r{i}", p, max_tokens=2) for i, p in enumerate(prompts)], max_steps)


@pytest.mark.parametrize("index", INDEXES)
def test_hits_copies_and_cached_blocks(index: str, tmp_path: Path) -> None:
    core = cached(tmp_path / "t.jsonl", index, num_kv_blocks=9, partial_block_hits=True)
    trace = one_after_the_other(core, [P, [*P[:6], 1, 2, 3]])
    assert events(trace, "hit") == [["hit", "r1", [1]]] and events(trace, "copy") == [["copy", "r1", 2, 3, 2]]
    admitted = trace.steps[2]
    assert [(e["start"], e["n"], e["cached"], e["table"]) for e in admitted["sched"]] == [(6, 3, 6, [1, 3, 4])]
    assert [(step["pool"]["free"], step["pool"]["cached"]) for step in trace.steps] == [(5, 0), (6, 2), (4, 1), (5, 3)]
    assert lint(trace) == []
    assert "5 blocks free, 3 more free but cached" in show(trace, 3)
    assert "6..8  [1, 3, 4], 6 tokens cached -> " in show(trace, 2) and "tokens cached" not in show(trace, 0)


def test_diff_sees_what_is_cached(tmp_path: Path) -> None:
    on = one_after_the_other(cached(tmp_path / "on.jsonl", num_kv_blocks=9), [P, P])
    off = one_after_the_other(traced_core(tmp_path / "off.jsonl", num_kv_blocks=9), [P, P])
    assert str(diff(on, off)).startswith("first divergence at step 1: a-only (free 6), (cached 2); b-only (free 8), ")


def test_a_reset_is_recorded(tmp_path: Path) -> None:
    core = cached(tmp_path / "t.jsonl", num_kv_blocks=9)
    for name in "ab":
        core.add_request(make_request(name, P, max_tokens=4))
    core.step()
    assert core.reset_prefix_cache(reset_running=True)
    trace = record_run(core, [])
    assert [event[:2] for event in trace.steps[1]["events"][:4]] == [
        ["requeue", "b"],
        ["free", "b"],
        ["requeue", "a"],
        ["free", "a"],
    ]
    assert lint(trace) == []


@pytest.mark.parametrize("seed", range(20))
def test_silent_on_a_healthy_engine(seed: int, tmp_path: Path) -> None:
    """Shared prefixes, evictions, preemptions, aborts, failing steps and resets, with every index and copies."""
    rng = random.Random(seed)
    block_size, executor = rng.choice([1, 2, 3, 4]), FaultyExecutor()
    core = cached(
        tmp_path / "t.jsonl", INDEXES[seed % 2], executor, max_model_len=24, block_size=block_size,
        num_kv_blocks=1 + -(-24 // block_size) + rng.randint(0, 8), scheduling_policy=rng.choice(POLICIES),
        enable_chunked_prefill=True, max_num_batched_tokens=rng.choice([3, 8, 24]),
        reserve_full_sequence=rng.random() < 0.7, partial_block_hits=rng.random() < 0.7,
    )  # fmt: skip
    to_come = [
        make_request(f"r{i}", [*range(rng.randint(0, 9)), *(rng.randrange(2) for _ in range(rng.randint(1, 6)))],
                     rng.randint(1, 8), priority=rng.randint(0, 2))
        for i in range(25)
    ]  # fmt: skip
    while to_come or core.has_unfinished_requests():
        if to_come and rng.random() < 0.5:
            core.add_request(to_come.pop())
        if core.scheduler.requests and rng.random() < 0.05:
            core.abort_requests([rng.choice(list(core.scheduler.requests))])
        if rng.random() < 0.03:
            core.reset_prefix_cache(reset_running=rng.random() < 0.5)
        if core.scheduler.requests and rng.random() < 0.05:
            executor.fails, executor.moment = True, rng.choice(["before", "half", "sample"])
        try:
            core.step()
        except RuntimeError as error:
            assert "the device is gone" in str(error)
    trace = record_run(core, [])
    assert lint(trace) == []
    assert events(trace, "hit")


# ---- broken engines


def publishes_too_early(core: EngineCore) -> None:
    """The next block is published before it is full."""
    insert = index_of(core).insert

    def too_many(request: Any, blocks: list[Any], num_full_blocks: int) -> None:
        if len(request.block_tokens) > num_full_blocks and len(blocks) > num_full_blocks:
            num_full_blocks += 1
        insert(request, blocks, num_full_blocks)

    index_of(core).insert = too_many  # type: ignore[method-assign]


def keeps_what_never_ran(core: EngineCore) -> None:
    """Decision 9 forgotten: what a failed step published stays."""
    core.scheduler.kv_cache_manager.block_pool.unpublish = lambda blocks: None  # type: ignore[method-assign]


def copies_from_the_same_step(core: EngineCore) -> None:
    """The source is what another request of this step will only compute."""
    index = index_of(core)
    match_partial = index.match_partial
    index.match_partial = lambda request, hits, _=(): match_partial(request, hits)  # type: ignore[method-assign]


class CarelessAndFaulty(CarelessExecutor):
    """Fails in its third step."""

    num_steps = 0

    def execute(self, scheduler_output: Any) -> Any:
        self.num_steps += 1
        if self.num_steps == 3:
            raise ValueError("the device is gone")
        return super().execute(scheduler_output)


LONG = list(range(100, 115))
BROKEN: list[tuple[str, Callable[[EngineCore], None], list[list[int]], dict[str, Any]]] = [
    (
        "hit",
        publishes_too_early,
        [LONG[:11], LONG[:14]],
        {"long_prefill_token_threshold": 5, "enable_chunked_prefill": True},
    ),
    ("hit", keeps_what_never_ran, [[1, 2, 3], LONG[:14], LONG[:14], LONG[:14]], {"max_num_seqs": 1}),
    ("copy", copies_from_the_same_step, [LONG[:9], [*LONG[:6], 1, 2]], {"partial_block_hits": True}),
]


def run_one_by_one(core: EngineCore, prompts: list[list[int]]) -> Trace:
    """A step that fails, and an engine that notices its own bug, end nothing but themselves."""
    for i, prompt in enumerate(prompts):
        core.add_request(make_request(f"r{i}", prompt, max_tokens=2))
    while core.has_unfinished_requests():
        try:
            core.step()
        except ValueError as error:
            assert "the device is gone" in str(error)
        except AssertionError:
            break
    return record_run(core, [])


@pytest.mark.parametrize(("rule", "damage", "prompts", "args"), BROKEN, ids=[f"{b[0]}-{b[1].__name__}" for b in BROKEN])
def test_a_broken_engine_is_caught_by_name(
    rule: str, damage: Callable[[EngineCore], None], prompts: list[list[int]], args: dict[str, Any], tmp_path: Path
) -> None:
    make_executor = CarelessAndFaulty if damage is keeps_what_never_ran else CarelessExecutor
    healthy = cached(tmp_path / "healthy.jsonl", "hash", make_executor(), **args)
    assert lint(run_one_by_one(healthy, prompts)) == [], "undamaged, the same engine keeps all rules"
    broken = cached(tmp_path / "broken.jsonl", "hash", make_executor(), **args)
    damage(broken)
    violations = lint(run_one_by_one(broken, prompts))
    assert violations and violations[0].rule == rule, "\n".join(map(str, violations[:10]))


def test_every_rule_has_a_broken_engine() -> None:
    assert {rule for rule, *_ in BROKEN} == set(CACHE_RULES)
