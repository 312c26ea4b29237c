"""lint, the rules of M3: for each an engine whose blocks go wrong and which is caught, by name; sharing is allowed."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.core.sched.output import CachedRequestData
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.request import Request
from folovllm.trace.lint import lint
from folovllm.trace.record import Trace
from folovllm.trace.show import show
from tests.core_helpers import AttendingExecutor, make_request
from tests.m2.test_trace_lint import PAGING_RULES
from tests.m2.trace_helpers import CarelessExecutor, lint_broken, record_run, traced_core

pytestmark = pytest.mark.m3


def pool_of(core: EngineCore) -> Any:
    return core.scheduler.kv_cache_manager.block_pool


def hands_out_the_null_block(core: EngineCore) -> None:
    get_new_blocks = pool_of(core).get_new_blocks
    pool_of(core).get_new_blocks = lambda n: [*get_new_blocks(n)[1:], pool_of(core).null_block] if n else []


def hands_out_a_block_twice(core: EngineCore) -> None:
    """The last block of a request is not taken out of the free queue."""
    get_new_blocks = pool_of(core).get_new_blocks

    def and_keep(n: int) -> list[KVCacheBlock]:
        blocks = get_new_blocks(n)
        if blocks:
            blocks[-1].ref_cnt = 0
            pool_of(core).free_block_queue.prepend_n(blocks[-1:])
        return blocks

    pool_of(core).get_new_blocks = and_keep


def reverses_a_growing_table(core: EngineCore) -> None:
    manager = core.scheduler.kv_cache_manager
    allocate_slots = manager.allocate_slots

    def and_reverse(request: Request, *args: Any, **kwargs: Any) -> list[KVCacheBlock] | None:
        new_blocks = allocate_slots(request, *args, **kwargs)
        if new_blocks and request.num_output_tokens:
            manager.req_to_blocks[request.request_id].reverse()
        return new_blocks

    manager.allocate_slots = and_reverse  # type: ignore[method-assign]


def tells_the_worker_of_other_blocks(core: EngineCore) -> None:
    """Manager and pool are right; the message down is wrong."""
    make_data = core.scheduler._cached_request_data

    def wrong(request: Request, step: Any, resumed: bool) -> CachedRequestData:
        data = make_data(request, step, resumed)
        others = (list(reversed(data.new_block_ids[0])),)
        return dataclasses.replace(data, new_block_ids=others) if resumed else data

    core.scheduler._cached_request_data = wrong  # type: ignore[method-assign]


def allocates_too_few(core: EngineCore) -> None:
    manager = core.scheduler.kv_cache_manager
    num_new_blocks = manager.num_new_blocks
    manager.num_new_blocks = lambda num_slots, num_held: num_new_blocks(max(num_slots - 1, 1), num_held)  # type: ignore[method-assign]


def allocates_too_many(core: EngineCore) -> None:
    manager = core.scheduler.kv_cache_manager
    num_new_blocks = manager.num_new_blocks
    manager.num_new_blocks = lambda num_slots, num_held: num_new_blocks(num_slots + 4, num_held)  # type: ignore[method-assign]


def keeps_the_blocks_of_the_finished(core: EngineCore) -> None:
    free = core.scheduler.kv_cache_manager.free
    core.scheduler.kv_cache_manager.free = lambda request: None if request.is_finished else free(request)  # type: ignore[method-assign]


def keeps_the_blocks_of_the_preempted(core: EngineCore) -> None:
    """Only while it waits, or nothing would ever fit again."""
    manager = core.scheduler.kv_cache_manager
    preempt = core.scheduler.preempt

    def and_take_again(request: Request) -> None:
        held = manager.req_to_blocks[request.request_id][:1]
        preempt(request)
        manager.req_to_blocks[request.request_id] = held

    core.scheduler.preempt = and_take_again  # type: ignore[method-assign]


def leaks_a_block(core: EngineCore) -> None:
    free_blocks = pool_of(core).free_blocks
    pool_of(core).free_blocks = lambda blocks: free_blocks(blocks[1:])


def frees_a_block_too_early(core: EngineCore) -> None:
    """The pool has more free blocks than the tables leave it."""
    get_new_blocks = pool_of(core).get_new_blocks

    def and_count_wrong(n: int) -> list[KVCacheBlock]:
        blocks = get_new_blocks(n)
        pool_of(core).free_block_queue.num_free_blocks += 1 if n > 1 else 0
        return blocks

    pool_of(core).get_new_blocks = and_count_wrong


BROKEN: list[tuple[str, Callable[[EngineCore], None], dict[str, Any]]] = [
    ("null-block", hands_out_the_null_block, {}),
    ("double-ownership", hands_out_a_block_twice, {}),
    ("append-only", reverses_a_growing_table, {}),
    ("append-only", tells_the_worker_of_other_blocks, {"num_kv_blocks": 7}),
    ("short-table", allocates_too_few, {}),
    ("waste", allocates_too_many, {}),
    ("kept-blocks", keeps_the_blocks_of_the_finished, {}),
    ("kept-blocks", keeps_the_blocks_of_the_preempted, {"num_kv_blocks": 7}),
    ("conservation", leaks_a_block, {}),
    ("conservation", frees_a_block_too_early, {}),
]


@pytest.mark.parametrize(("rule", "damage", "args"), BROKEN, ids=[f"{b[0]}-{b[1].__name__}" for b in BROKEN])
def test_a_broken_engine_is_caught_by_name(rule: str, damage: Callable, args: dict[str, Any], tmp_path: Path) -> None:
    assert lint_broken(tmp_path / "healthy.jsonl", None, **args) == [], "undamaged, the same engine keeps all rules"
    violations = lint_broken(tmp_path / "broken.jsonl", damage, **args)
    assert violations and violations[0].rule == rule, "\n".join(map(str, violations[:10]))


def test_every_paging_rule_has_a_broken_engine() -> None:
    assert {rule for rule, _, _ in BROKEN} == PAGING_RULES


def test_a_block_out_of_range_is_no_block(tmp_path: Path) -> None:
    """No pool can hand it out; a file can hold it."""
    core = traced_core(tmp_path / "t.jsonl", CarelessExecutor(), num_kv_blocks=5)
    trace = record_run(core, [make_request("a", 3, max_tokens=2)])
    for event in (event for record in trace.steps for event in record["events"] if event[0] == "alloc"):
        event[2][0] = 5
    assert lint(trace)[0].rule == "null-block"


# ---- sharing: what a prefix index does to a trace, before there is one (M6)


class ToyPrefixIndex(NullPrefixIndex):
    """Shares full blocks of equal prompts, found by their tokens; never forgets, so it needs a pool without reuse."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], KVCacheBlock] = {}

    def match(self, request: Request) -> list[KVCacheBlock]:
        hits = []
        for end in range(4, request.num_tokens, 4):  # at least one token stays to be computed
            block = self.known.get(tuple(request.all_token_ids[:end]))
            if block is None:
                break
            hits.append(block)
        return hits

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        for i in range(num_full_blocks):
            self.known.setdefault(tuple(request.all_token_ids[: (i + 1) * 4]), blocks[i])


def sharing_run(path: Path, damage: Callable[[Any], None] = lambda pool: None) -> Trace:
    """Three requests with the same first 8 tokens; b and c take a's two full blocks while a fills them."""
    core = traced_core(path, AttendingExecutor())
    pool_of(core).prefix_index = ToyPrefixIndex()
    damage(pool_of(core))
    common = list(range(100, 108))
    return record_run(core, [make_request(name, [*common, i], max_tokens=3) for i, name in enumerate("abc")])


def test_shared_blocks_are_recorded_and_allowed(tmp_path: Path) -> None:
    trace = sharing_run(tmp_path / "t.jsonl")
    first = trace.steps[0]
    assert [entry["table"] for entry in first["sched"]] == [[1, 2, 3], [1, 2, 4], [1, 2, 5]]
    assert [(entry["start"], entry["n"], entry.get("cached")) for entry in first["sched"]] == [
        (0, 9, None),
        (8, 1, 8),
        (8, 1, 8),
    ]
    assert [event for event in first["events"] if event[0] in ("hit", "alloc")] == [
        ["alloc", "a", [1, 2, 3]],
        ["hit", "b", [1, 2]],
        ["alloc", "b", [4]],
        ["hit", "c", [1, 2]],
        ["alloc", "c", [5]],
    ]
    assert first["pool"]["ref"] == {"1": 3, "2": 3} and trace.steps[-1]["pool"]["ref"] == {}
    assert lint(trace) == []
    tokens = [event[2][0] for record in trace.steps for event in record["events"] if event[:2] == ["sample", "c"]]
    assert tokens == fake_tokens([*range(100, 108), 2], 3)
    assert show(trace, 0).splitlines()[-2].split()[1].startswith("##ABC·")


def test_shared_blocks_with_a_wrong_count_are_caught(tmp_path: Path) -> None:
    def forget_to_count(pool: Any) -> None:
        def touch(blocks: Iterable[KVCacheBlock]) -> None:
            """Leaves every count as it is."""

        pool.touch = touch

    violations = lint(sharing_run(tmp_path / "t.jsonl", forget_to_count))
    assert violations[0].rule == "double-ownership"
    assert str(violations[0]) == "step 0: double-ownership: block 1: 3 tables hold it, its count is 1"


def test_a_hit_that_claims_too_much_is_caught(tmp_path: Path) -> None:
    """One block hit, two blocks of tokens counted as computed."""

    class Boasting(ToyPrefixIndex):
        def match(self, request: Request) -> list[KVCacheBlock]:
            return super().match(request)[:1]

    core = traced_core(tmp_path / "t.jsonl", CarelessExecutor())
    pool_of(core).prefix_index = Boasting()
    get_computed_blocks = core.scheduler.kv_cache_manager.get_computed_blocks

    def too_many(request: Request) -> tuple[Sequence[KVCacheBlock], int]:
        blocks, num_tokens = get_computed_blocks(request)
        return blocks, num_tokens + (2 if blocks else 0)

    core.scheduler.kv_cache_manager.get_computed_blocks = too_many  # type: ignore[method-assign, assignment]
    common = list(range(100, 108))
    trace = record_run(core, [make_request(name, [*common, i], max_tokens=3) for i, name in enumerate("ab")])
    assert "recompute" in {violation.rule for violation in lint(trace)}
