"""The live trace: the records that watchers of a running engine get (folovllm/trace/live.py, watch.py)."""

import asyncio
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import ModelRunnerOutput
from folovllm.trace import live
from folovllm.trace.live import LiveFeed
from folovllm.trace.record import TIMES, read_trace
from folovllm.trace.recorder import NullTrace
from folovllm.trace.replay import Replay
from folovllm.trace.view import VIEWER
from folovllm.trace.watch import MAX_LINES, Watchers
from folovllm.trace.writer import TraceWriter
from tests.core_helpers import make_config, make_request
from tests.m2.browser_helpers import needs_browser, open_page
from tests.m2.trace_helpers import six_requests, traced_core

pytestmark = pytest.mark.m8

TIGHT = {"num_kv_blocks": 8, "max_num_seqs": 4, "max_num_batched_tokens": 16, "enable_chunked_prefill": True}


def make_core(**config_args: Any) -> EngineCore:
    return EngineCore(make_config(**config_args), FakeExecutor())


def assert_pool_agrees(line: dict[str, Any], core: EngineCore) -> None:
    """The record's counts of the pool are the pool's."""
    pool = core.scheduler.kv_cache_manager.block_pool
    assert line["pool"]["ref"] == {block.block_id: block.ref_cnt for block in pool.blocks if block.ref_cnt > 1}
    assert line["pool"]["free"] + line["pool"]["cached"] == pool.get_num_free_blocks()


def play(replay: Replay, line: dict[str, Any]) -> None:
    """Applies a step or a snapshot to the end. A snapshot replaces everything."""
    if line.get("type") == "snapshot":
        replay.__init__()  # type: ignore[misc]
    for event in line["events"][: line["planned"]]:
        replay.apply(event)
    replay.run(line["sched"])
    for event in line["events"][line["planned"] :]:
        replay.apply(event)


def assert_agrees(replay: Replay, core: EngineCore) -> None:
    """The replayed state is the scheduler's."""
    scheduler, manager = core.scheduler, core.scheduler.kv_cache_manager
    assert replay.running == [r.request_id for r in scheduler.running]
    waiting = [r.request_id for r in scheduler.waiting]
    if scheduler.scheduling_policy == "priority":  # the replay keeps the order of arrival
        assert sorted(replay.waiting) == sorted(waiting)
    else:
        assert replay.waiting == waiting
    tables = {r: [block.block_id for block in blocks] for r, blocks in manager.req_to_blocks.items() if blocks}
    assert {r: table for r, table in replay.tables.items() if table} == tables
    assert {r.request_id: (r.num_tokens, r.num_prompt_tokens) for r in replay.requests.values()} == {
        r.request_id: (r.num_tokens, r.num_prompt_tokens) for r in scheduler.requests.values()
    }
    for request in scheduler.running:
        assert replay.requests[request.request_id].num_computed_tokens == request.num_computed_tokens


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in TIMES}


def redacted(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a trace file, as a live trace writes it."""
    events = [[*e[:2], len(e[2])] if e[0] == "sample" else e for e in record["events"]]
    return without_times({**record, "events": events})


# ---- the records


@pytest.mark.parametrize("args", [{"num_kv_blocks": 12}, TIGHT, {**TIGHT, "enable_prefix_caching": True}])
def test_live_records_equal_the_file_of_the_same_run(args: dict[str, Any], tmp_path: Path) -> None:
    """Both are on at once, from the first step on. The live records lack nothing but the token ids."""
    path = tmp_path / "t.jsonl"
    core = traced_core(path, FakeExecutor(), **args)
    feed = LiveFeed(core)
    feed.snapshot()
    header, snapshot = feed.take()
    assert (header["type"], snapshot["type"], snapshot["step"], snapshot["sched"]) == ("header", "snapshot", -1, [])
    for request in six_requests():
        core.add_request(request)
    lines = []
    while core.has_unfinished_requests():
        core.step()
        lines += feed.take()
    core.shutdown()
    in_file = [json.loads(line) for line in path.read_text().splitlines()[1:-1]]
    assert [without_times(line) for line in lines] == [redacted(record) for record in in_file]
    assert any(event[0] == "preempt" for line in lines for event in line["events"])
    completed, replays = read_trace(path), (Replay(), Replay())
    for line, record in zip(lines, completed.steps, strict=True):
        play(replays[0], line)
        play(replays[1], dict(record))
        assert vars(replays[0]) == vars(replays[1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_snapshot_in_mid_run_agrees_with_the_scheduler_at_every_following_step(data: st.DataObject) -> None:
    """Whatever came before: chunks, preemptions, prefix hits, aborts, resets of the prefix cache, a failed step."""
    args = {
        "num_kv_blocks": data.draw(st.sampled_from([9, 12, 40])),
        "max_num_seqs": data.draw(st.integers(1, 5)),
        "max_num_batched_tokens": data.draw(st.sampled_from([16, 64])),
        "enable_chunked_prefill": data.draw(st.booleans()),
        "enable_prefix_caching": data.draw(st.booleans()),
        "scheduling_policy": data.draw(st.sampled_from(["fcfs", "priority"])),
    }
    core = make_core(**args)
    feed, replay, is_on = LiveFeed(core), Replay(), False
    num_added = 0
    for _ in range(data.draw(st.integers(4, 30))):
        match data.draw(st.sampled_from(["add", "add", "step", "step", "step", "abort", "reset", "fail", "watch"])):
            case "add":
                prompt = [num_added % 3] * data.draw(st.integers(1, 10)) + [num_added]
                core.add_request(
                    make_request(f"r{num_added}", prompt, data.draw(st.integers(1, 5)), priority=num_added % 2)
                )
                num_added += 1
            case "abort":
                core.abort_requests(list(core.scheduler.requests)[: data.draw(st.integers(0, 2))])
            case "reset":
                core.reset_prefix_cache(reset_running=data.draw(st.booleans()))
            case "fail":
                fail_once(core, blames=data.draw(st.booleans()))
            case "watch":
                feed.snapshot()
                is_on = True
                snapshot = feed.take()[-1]
                play(replay, snapshot)
                assert_agrees(replay, core)
                assert_pool_agrees(snapshot, core)
                continue
            case "step":
                core.step()
                if is_on:
                    for line in feed.take():
                        play(replay, line)
                        if line["step"] == core.scheduler.num_steps - 1:
                            assert_pool_agrees(line, core)
                    assert_agrees(replay, core)
                continue
    while core.has_unfinished_requests():
        core.step()
        for line in feed.take():
            play(replay, line)
        if is_on:
            assert_agrees(replay, core)


def test_a_snapshot_after_a_failed_step_that_preempted_keeps_the_order_of_the_queue() -> None:
    """The failed step preempted r3, and then its other requests were put back ahead of r3."""
    core = make_core(num_kv_blocks=9, max_num_seqs=4, max_num_batched_tokens=64)
    for number, length in enumerate((2, 3, 7, 7)):
        core.add_request(make_request(f"r{number}", [number] * length, 3))
    core.step()
    core.step()
    fail_once(core, blames=False)
    assert [request.request_id for request in core.scheduler.waiting] == ["r0", "r1", "r2", "r3"]
    feed, replay = LiveFeed(core), Replay()
    feed.snapshot()
    play(replay, feed.take()[-1])
    assert_agrees(replay, core)


def fail_once(core: EngineCore, blames: bool) -> None:
    """One step of which the executor's half raises."""

    def sample(handle: Any) -> ModelRunnerOutput:
        raise RuntimeError("the executor fails")

    if not core.has_unfinished_requests():
        return
    core.executor.sample = sample  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError):
            core.step(blamed=None if blames else ())
    finally:
        del core.executor.sample


def test_preempted_requests_keep_their_order_in_a_snapshot() -> None:
    core = make_core(enable_prefix_caching=True)
    for name in "abc":
        core.add_request(make_request(name, 5, 6))
    core.step()
    core.add_request(make_request("d", 5, 6))
    core.reset_prefix_cache(reset_running=True)
    feed, replay = LiveFeed(core), Replay()
    feed.snapshot()
    play(replay, feed.take()[-1])
    assert_agrees(replay, core)
    assert replay.waiting == ["a", "b", "c", "d"]


def test_shared_blocks_are_counted_from_the_snapshot_on() -> None:
    core = make_core(enable_prefix_caching=True, max_num_batched_tokens=16, enable_chunked_prefill=True)
    for name in "abc":
        core.add_request(make_request(name, list(range(9)), 6))
    for _ in range(4):
        core.step()
    feed = LiveFeed(core)
    feed.snapshot()
    core.step()
    for line in feed.take()[-3:]:
        if line.get("type") != "header":
            assert line["pool"]["ref"] == {1: 3, 2: 3}
    assert_pool_agrees(line, core)


def test_a_request_that_ends_between_steps_is_told_with_the_next_record() -> None:
    core = make_core()
    for name in ("a", "b"):
        core.add_request(make_request(name, 5, 6))
    core.step()
    feed, replay = LiveFeed(core), Replay()
    feed.snapshot()
    core.abort_requests(["a"])
    core.step()
    for line in feed.take()[1:]:
        play(replay, line)
    assert_agrees(replay, core)
    assert replay.running == ["b"]


REPLAYED = """(() => {
  const [header, ...lines] = JSON.parse(document.getElementById('data').textContent);
  const model = new TraceModel({ name: "live", header, steps: [] });
  return lines.map((line) => {
    model.push(line);
    const { running, waiting, tables, holders, requests, cachedIsProved } = model.last;
    return { running: [...running], waiting: [...waiting], cachedIsProved,
             tables: Object.fromEntries(tables), holders: Object.fromEntries(holders),
             tokens: Object.fromEntries([...requests].map(([id, r]) => [id, [r.computed, r.known]])) };
  });
})()"""


@pytest.mark.parametrize("num_steps_before", [0, 3, 8])
def test_the_page_s_model_follows_a_live_trace(num_steps_before: int, tmp_path: Path) -> None:
    """It agrees with the replay at every step, and knows which free blocks are cached, also those from before."""
    core = make_core(**TIGHT, enable_prefix_caching=True)
    for request in six_requests():
        core.add_request(request)
    for _ in range(num_steps_before):
        core.step()
    feed = LiveFeed(core)
    feed.snapshot()
    while core.has_unfinished_requests():
        core.step()
    lines, replay, expected = feed.take(), Replay(), []
    for line in lines[1:]:
        play(replay, line)
        expected.append(
            {
                "running": [*replay.running],
                "waiting": [*replay.waiting],
                "tables": {r: [*table] for r, table in replay.tables.items() if table},
                "holders": {str(block): [*held] for block, held in replay.holders.items()},
                "tokens": {r.request_id: [r.num_computed_tokens, r.num_tokens] for r in replay.requests.values()},
                "cachedIsProved": True,
            }
        )
    script = (VIEWER / "model.js").read_text()
    data = f'<script id="data" type="application/json">{json.dumps(lines)}</script>'
    page = f'<body>{data}<pre id="answer"></pre></body>'
    run = f"{script}\ndocument.getElementById('answer').textContent = JSON.stringify({REPLAYED});"
    seen = json.loads(open_page(tmp_path, page, script=run).parts["answer"][0])
    for state in seen:
        state["tables"] = {r: table for r, table in state["tables"].items() if table}
    assert seen == expected and any(line["pool"]["cached"] for line in lines[1:])


for mark in needs_browser:
    test_the_page_s_model_follows_a_live_trace = mark(test_the_page_s_model_follows_a_live_trace)


def test_the_abort_of_the_last_request_is_told_though_no_step_follows() -> None:
    core = make_core()
    core.add_request(make_request("a", 5, 6))
    core.step()
    feed, replay = LiveFeed(core), Replay()
    feed.snapshot()
    play(replay, feed.take()[1])
    core.abort_requests(["a"])
    _, snapshot = feed.take()
    play(replay, snapshot)
    assert_agrees(replay, core)
    assert replay.requests == {} and replay.holders == {} and feed.take() == []


def test_free_blocks_that_can_still_be_hit_are_in_the_snapshot() -> None:
    core = make_core(enable_prefix_caching=True)
    core.add_request(make_request("a", 9, 2))
    while core.has_unfinished_requests():
        core.step()
    feed = LiveFeed(core)
    feed.snapshot()
    snapshot = feed.take()[1]
    assert snapshot["events"] == [["cached", "", [1, 2]]]
    assert snapshot["pool"]["cached"] == 2
    play(Replay(), snapshot)


def test_records_go_on_after_what_the_trace_cannot_tell() -> None:
    """An exception in the middle of the trace's own work: the next line is a snapshot, not an end."""
    core = make_core()
    feed, replay = LiveFeed(core), Replay()
    feed.snapshot()
    core.add_request(make_request("a", 5, 4))
    core.step()
    assert feed._live is not None
    make_record = feed._live._record

    class Stop(BaseException):
        pass

    def interrupted_once(*args: Any) -> Any:
        feed._live._record = make_record  # type: ignore[method-assign, union-attr]
        raise Stop

    feed._live._record = interrupted_once  # type: ignore[method-assign]
    with pytest.raises(Stop):
        core.step()
    core.step()
    lines = feed.take()
    assert [line.get("type") for line in lines] == ["header", "snapshot", None, "header", "snapshot", None]
    for line in lines:
        if line.get("type") != "header":
            play(replay, line)
    assert_agrees(replay, core)


def test_a_fault_of_the_live_trace_costs_no_request_anything(caplog: pytest.LogCaptureFixture) -> None:
    """It is not the engine's own: watching ends, and comes back with the next snapshot."""
    core = make_core()
    feed = LiveFeed(core)
    feed.snapshot()
    feed.take()
    core.add_request(make_request("a", 5, 4))
    assert feed._live is not None
    feed._live._seen.clear()  # a bug, in effect
    core.step()
    core.step()
    assert core.scheduler.requests["a"].num_output_tokens == 2 and feed.take() == []
    assert "the live trace ends" in caplog.text
    feed.snapshot()
    core.step()
    assert [line.get("type") for line in feed.take()] == ["header", "snapshot", None]


def test_a_long_watch_gets_a_snapshot_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a page need not keep all records since it was opened."""
    monkeypatch.setattr(live, "SNAPSHOT_EVERY", 5)
    core = make_core(max_model_len=64)
    feed, replay = LiveFeed(core), Replay()
    core.add_request(make_request("a", 5, 12))
    core.step()
    feed.snapshot()
    steps = []
    while core.has_unfinished_requests():
        core.step()
        for line in feed.take():
            if line.get("type") != "header":
                steps.append((line.get("type"), line["step"]))
                play(replay, line)
        assert_agrees(replay, core)
    assert steps == [("snapshot", 0), *[(None, i) for i in range(1, 5)], ("snapshot", 4),
                     *[(None, i) for i in range(5, 10)], ("snapshot", 9), (None, 10), (None, 11)]  # fmt: skip


# ---- privacy, and the off-switch


def test_live_lines_contain_no_tokens_no_path_and_nothing_of_the_machine(tmp_path: Path) -> None:
    config = dataclasses.replace(make_config(enable_prefix_caching=True), trace=str(tmp_path / "t.jsonl"))
    core = EngineCore(config, FakeExecutor(vocab_size=10**9))
    feed = LiveFeed(core)
    secret = [123456, 234567, 345678, 456789, 567890]
    core.add_request(make_request("a", secret, 6))
    core.step()
    request = core.scheduler.requests["a"]
    feed.snapshot()
    while core.has_unfinished_requests():
        core.step()
    text = json.dumps(feed.take())
    core.shutdown()
    assert len(request.output_token_ids) == 6
    assert not any(str(token) in text for token in request.all_token_ids)
    assert str(tmp_path) not in text and "machine" not in text and "model" not in json.loads(text)[0]
    assert set(json.loads(text)[0]["config"]) == set(live.SHOWN_CONFIG)


def test_nothing_is_left_when_watching_ends(tmp_path: Path) -> None:
    for core, kind in ((make_core(), NullTrace), (traced_core(tmp_path / "t.jsonl"), TraceWriter)):
        before = core.trace
        feed = LiveFeed(core)
        assert core.trace is before and type(before) is kind and feed.take() == []
        feed.snapshot()
        feed.snapshot()
        assert core.trace is not before
        feed.stop()
        feed.stop()
        assert core.trace is before and feed.take() == []
        core.shutdown()


def test_cost_of_a_watched_step_is_printed() -> None:
    """`pytest -s` prints it; a clock is no gate."""
    core = make_core(max_model_len=8192, block_size=16, max_num_seqs=32, max_num_batched_tokens=32 * 8192)
    for i in range(32):
        core.add_request(make_request(f"request-{i}", 100, max_tokens=4000))
    core.step()
    feed, medians = LiveFeed(core), {}
    for name, act in (("alone", feed.stop), ("watched", feed.snapshot)):
        act()
        costs = []
        for _ in range(300):
            t0 = time.thread_time()
            core.step()
            feed.take()
            costs.append((time.thread_time() - t0) * 1e6)
        medians[name] = statistics.median(costs)
    t0 = time.thread_time()
    feed.snapshot()
    snapshot = (time.thread_time() - t0) * 1e6
    extra = medians["watched"] - medians["alone"]
    print(f"\n32 decodes: a watched step costs {extra:.0f} us more; a snapshot {snapshot:.0f} us")
    assert len(json.dumps(feed.take())) < 100_000


# ---- the watchers


class Engine:
    """A core and its feed behind two queues, as a core loop would have them."""

    def __init__(self, core: EngineCore) -> None:
        self.core, self.feed, self.asked = core, LiveFeed(core), []
        self.watchers = Watchers(self.asked.append)

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.obey()
            self.core.step()
            self.watchers.put(self.feed.take())
        self.obey()
        self.watchers.put(self.feed.take())

    def obey(self) -> None:
        for what in self.asked:
            {"watch": self.feed.snapshot, "unwatch": self.feed.stop}[what]()
        self.asked.clear()


def busy_engine() -> Engine:
    core = make_core(max_model_len=4096, num_kv_blocks=2000)
    for i in range(3):
        core.add_request(make_request(f"r{i}", 5 + i, 4000))
    return Engine(core)


async def taken(watcher: Any) -> list[dict[str, Any]]:
    """What the watcher can take without waiting."""
    lines = []
    while watcher._lines:
        lines.append(json.loads(await anext(watcher)))
    return lines


def in_loop(test: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 30))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_loop
async def test_several_watchers_come_and_go() -> None:
    engine = busy_engine()
    engine.run(2)
    assert type(engine.core.trace) is NullTrace
    with engine.watchers.join() as first:
        engine.run(3)
        with engine.watchers.join() as second:
            engine.run(2)
            assert [line.get("type") for line in await taken(second)] == ["header", "snapshot", None]
        engine.run(1)
        lines = await taken(first)
        assert [line["step"] for line in lines if "type" not in line] == [2, 3, 4, 5, 6, 7]
        assert len(engine.watchers) == 1 and type(engine.core.trace) is not NullTrace
    engine.run(1)
    assert type(engine.core.trace) is NullTrace and len(engine.watchers) == 0


@in_loop
async def test_many_watchers_that_come_at_once_cost_one_snapshot() -> None:
    engine = busy_engine()
    with engine.watchers.join() as first:
        engine.run(1)
        assert len(await taken(first)) == 3
        crowd = [engine.watchers.join() for _ in range(20)]
        engine.run(1)
        assert [line.get("type") for line in await taken(crowd[-1])] == ["header", "snapshot"]
        assert [line.get("type") for line in await taken(first)] == [None, "header", "snapshot"]


@in_loop
async def test_a_slow_watcher_gets_a_snapshot_for_what_it_lost() -> None:
    engine = busy_engine()
    with engine.watchers.join() as slow, engine.watchers.join() as quick:
        seen = 0
        for _ in range(30):
            engine.run(50)
            seen += len([line for line in await taken(quick) if "type" not in line])
            assert len(slow._lines) <= MAX_LINES + 1
        assert seen == 1500, "a slow watcher costs the quick one nothing"
        lines, replay = await taken(slow), Replay()
        assert lines[0].get("type") == "header", "nothing of the lost part is left"
        for before, line in itertools.pairwise(lines):
            assert "type" in line or line["step"] == before["step"] + 1, "after a gap there is a snapshot"
        start = max(i for i, line in enumerate(lines) if line.get("type") == "header")
        assert lines[start + 1]["type"] == "snapshot"
        for line in lines[start + 1 :]:
            play(replay, line)
        assert_agrees(replay, engine.core)


@in_loop
async def test_a_watcher_that_comes_while_the_last_one_goes_misses_no_step() -> None:
    """The lines that were under way belong to the watch before: what counts is the newest snapshot."""
    engine = busy_engine()
    engine.watchers.join().__exit__()
    with engine.watchers.join() as watcher:
        engine.run(4)
        replay = Replay()
        for line in await taken(watcher):
            if line.get("type") != "header":
                play(replay, line)
        assert_agrees(replay, engine.core)


@in_loop
async def test_closing_ends_every_watch_after_its_last_line() -> None:
    engine = busy_engine()
    watcher = engine.watchers.join()
    waiting = asyncio.ensure_future(anext(engine.watchers.join()))
    await asyncio.sleep(0)
    engine.watchers.close()
    with pytest.raises(StopAsyncIteration):
        await waiting
    engine.obey()
    assert [line async for line in watcher] == []
    assert [line async for line in engine.watchers.join()] == [], "an engine that has ended cannot be watched"
    watcher.__exit__()
    engine.watchers.close()


@in_loop
async def test_a_cancelled_wait_loses_no_line() -> None:
    engine = busy_engine()
    with engine.watchers.join() as watcher:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(watcher), 0.01)
        engine.run(1)
        assert [line.get("type") for line in await taken(watcher)] == ["header", "snapshot", None]
