"""The trace of an engine: what is in a record, by hand and against a golden file; reading, showing, the off-switch.

The golden file is made again with: python -m tests.m2.test_trace
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.executor.fake import fake_tokens
from folovllm.trace.header import make_header
from folovllm.trace.lint import lint
from folovllm.trace.record import TIMES, Trace, read_trace
from folovllm.trace.recorder import MAX_WAITING_SHOWN, NullTrace
from folovllm.trace.replay import Replay
from folovllm.trace.show import show
from folovllm.trace.writer import TraceWriter, make_trace
from tests.core_helpers import AttendingExecutor, make_config, make_core, make_request, tiny_arch
from tests.m2.trace_helpers import record_run, six_requests, traced_core

pytestmark = pytest.mark.m2

GOLDEN = Path(__file__).parent / "test_trace_golden.jsonl"


def without_times(record: Any) -> dict[str, Any]:
    """Returns the record without what differs between two equal runs."""
    return {name: value for name, value in record.items() if name not in TIMES}


def small_pool_run(path: Path) -> Trace:
    """4 blocks of 4. In step 1 b needs a third block, finds none and is preempted; it resumes when a is done."""
    core = traced_core(path, num_kv_blocks=5)
    return record_run(core, [make_request("a", 7, max_tokens=5), make_request("b", 8, max_tokens=5)])


def raw_steps(path: Path) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, path.read_text().splitlines()) if "step" in record]


def test_records_worked_out_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    trace = small_pool_run(path)
    a_tokens, b_tokens = (fake_tokens(make_request(r, n).prompt_token_ids, 5) for r, n in (("a", 7), ("b", 8)))
    steps = raw_steps(path)
    assert without_times(steps[0]) == {
        "v": 1,
        "step": 0,
        "budget": {"tokens": 2048, "used": 15, "seqs": 64},
        "sched": [
            {"req": "a", "kind": "prefill", "start": 0, "n": 7, "table": [1, 2]},
            {"req": "b", "kind": "prefill", "start": 0, "n": 8, "table": [3, 4]},
        ],
        "events": [
            ["add", "a", 7, 5, 0],
            ["add", "b", 8, 5, 0],
            ["alloc", "a", [1, 2]],
            ["alloc", "b", [3, 4]],
            ["sample", "a", a_tokens[:1]],
            ["sample", "b", b_tokens[:1]],
        ],
        "planned": 4,
        "queues": {"num_waiting": 0, "waiting": [], "running": ["a", "b"]},
        "pool": {"free": 0, "cached": 0, "ref": {}},
    }
    assert (
        without_times(steps[1])
        == {
            "v": 1,
            "step": 1,
            "budget": {"tokens": 2048, "used": 1, "seqs": 64},
            "sched": [{"req": "a", "kind": "decode", "start": 7, "n": 1}],  # its table did not change
            "events": [["preempt", "b"], ["free", "b", [3, 4]], ["sample", "a", a_tokens[1:2]]],
            "planned": 2,
            "queues": {"num_waiting": 1, "waiting": ["b"], "running": ["a"]},
            "pool": {"free": 2, "cached": 0, "ref": {}},
        }
    )
    # Blocks come back in reverse, and the first to come is the next to go: 4 before 3.
    assert steps[2]["sched"] == [{"req": "a", "kind": "decode", "start": 8, "n": 1, "table": [1, 2, 4]}]
    assert steps[2]["queues"] == {"num_waiting": 1}  # nobody came, went or moved
    assert steps[4]["events"] == [["sample", "a", a_tokens[4:]], ["finish", "a", "length"], ["free", "a", [1, 2, 4]]]
    assert steps[5]["sched"] == [{"req": "b", "kind": "prefill", "start": 0, "n": 9, "table": [4, 2, 1]}]
    assert [len(steps), steps[8]["events"][-1], steps[8]["pool"]["free"]] == [9, ["free", "b", [4, 2, 1]], 4]
    assert trace.end == {"type": "end", "v": 1, "steps": 9, "events": []}


def test_the_golden_trace_is_written_again(tmp_path: Path) -> None:
    golden, now = read_trace(GOLDEN), small_pool_run(tmp_path / "t.jsonl")
    assert list(map(without_times, now.steps)) == list(map(without_times, golden.steps))
    assert now.end == golden.end and now.header["kv"] == golden.header["kv"]
    assert lint(golden) == []


def test_times_add_up(tmp_path: Path) -> None:
    steps = small_pool_run(tmp_path / "t.jsonl").steps
    for record in steps:
        assert list(record["spans"]) == ["schedule", "trace", "forward", "sample", "update"]
        assert all(seconds >= 0 for seconds in record["spans"].values())
        assert record["dur"] == pytest.approx(sum(record["spans"].values()), abs=1e-5)
    for earlier, later in itertools.pairwise(steps):
        assert earlier["t0"] + earlier["dur"] <= later["t0"] + 2e-6


def test_the_reader_puts_back_what_was_left_out(tmp_path: Path) -> None:
    trace = small_pool_run(tmp_path / "t.jsonl")
    assert trace.steps[1]["sched"][0]["table"] == [1, 2]
    assert [trace.steps[2]["queues"][name] for name in ("waiting", "running")] == [["b"], ["a"]]


def test_the_header_tells_what_ran_and_not_where(tmp_path: Path) -> None:
    config = EngineConfig.preset(
        "m2",
        model=str(tmp_path / "my-model"),
        tokenizer=str(tmp_path / "my-tokenizer"),
        trace=str(tmp_path / "t.jsonl"),
        parts={"core.scheduler": f"{tmp_path}/mine.py:Mine"},
    )
    header = make_header(config.resolve(tiny_arch(64), "cpu"), KVCacheConfig(9, 64, 512))
    assert header["config"]["model"] == "my-model" and str(tmp_path) not in json.dumps(header)
    assert header["config"]["parts"] == {"core.scheduler": "mine.py:Mine"}
    assert header["config"]["max_num_seqs"] == 64 and "trace" not in header["config"]
    assert header["switches"]["batching"] == "continuous" and header["switches"]["block_size"] == 64
    assert header["kv"] == {"block_size": 64, "usable_blocks": 8, "bytes_per_block": 512}
    assert header["model"]["num_hidden_layers"] == 1 and header["machine"]["python"]


def test_off_is_the_default_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    core = make_core()
    assert type(core.trace) is NullTrace
    for request in six_requests():
        core.add_request(request)
    while core.has_unfinished_requests():
        core.step()
    core.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_the_same_with_and_without_a_trace(tmp_path: Path) -> None:
    with_trace: dict[str, list[int]] = {}
    trace = record_run(traced_core(tmp_path / "t.jsonl", num_kv_blocks=12), six_requests())
    for event in (event for record in trace.steps for event in record["events"] if event[0] == "sample"):
        with_trace.setdefault(event[1], []).extend(event[2])
    expected = {
        r.request_id: fake_tokens(r.prompt_token_ids, r.max_tokens)[: 16 - r.num_prompt_tokens] for r in six_requests()
    }
    assert with_trace == expected


def test_replay_ends_with_an_empty_engine(tmp_path: Path) -> None:
    replay = Replay()
    for record in small_pool_run(tmp_path / "t.jsonl").steps:
        for event in record["events"][: record["planned"]]:
            replay.apply(event)
        replay.run(record["sched"])
        assert replay.tables == {r: t for r, t in replay.tables.items() if r in replay.running}
        for event in record["events"][record["planned"] :]:
            replay.apply(event)
    assert not replay.requests and not replay.tables and not replay.holders and not replay.running


# ---- ends that are not a finish


def test_aborts_between_steps_and_after_the_last_one(tmp_path: Path) -> None:
    core = traced_core(tmp_path / "t.jsonl")
    for name in "abc":
        core.add_request(make_request(name, 5))
    core.step()
    core.abort_requests(["b", "nobody"])
    core.step()
    core.abort_requests(["a", "c"])
    core.shutdown()
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.steps[1]["events"][:2] == [["finish", "b", "abort"], ["free", "b", [3, 4]]]
    assert trace.end is not None and [event[:2] for event in trace.end["events"] if event[0] == "finish"] == [
        ["finish", "a"],
        ["finish", "c"],
    ]
    assert lint(trace) == []


def test_an_abort_in_the_middle_of_a_step_and_an_id_that_comes_back(tmp_path: Path) -> None:
    class Aborting(AttendingExecutor):
        def sample(self, handle: Any) -> Any:
            output = super().sample(handle)
            if core.scheduler.num_steps == 2:
                core.abort_requests(["a"])
                core.add_request(make_request("a", 3, max_tokens=2))
            return output

    core = traced_core(tmp_path / "t.jsonl", Aborting())
    trace = record_run(core, [make_request("a", 5), make_request("b", 6, max_tokens=4)])
    events = trace.steps[1]["events"]
    assert events[trace.steps[1]["planned"] :][:3] == [
        ["finish", "a", "abort"],
        ["free", "a", [1, 2]],
        ["add", "a", 3, 2, 0],
    ]
    assert lint(trace) == []


def test_a_step_that_fails_ends_its_requests_in_the_trace_too(tmp_path: Path) -> None:
    class Failing(AttendingExecutor):
        def sample(self, handle: Any) -> Any:
            if core.scheduler.num_steps == 2:
                raise RuntimeError("out of memory")
            return super().sample(handle)

    core = traced_core(tmp_path / "t.jsonl", Failing(), max_num_seqs=1)
    for name in "ab":
        core.add_request(make_request(name, 5, max_tokens=3))
    core.step()
    with pytest.raises(RuntimeError, match="out of memory"):
        core.step()
    trace = record_run(core, [])
    assert trace.steps[1]["events"] == [["finish", "a", "error"], ["free", "a", [1, 2]]]
    assert [event for event in trace.steps[-1]["events"] if event[0] == "finish"] == [["finish", "b", "length"]]
    assert lint(trace) == []


def test_an_idle_engine_has_written_everything_and_a_cut_trace_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    core = traced_core(path)
    core.add_request(make_request("a", 5, max_tokens=3))
    while core.has_unfinished_requests():
        core.step()
    trace = read_trace(path)
    assert len(trace.steps) == 3 and trace.end is None and lint(trace) == []
    path.write_text(path.read_text()[:-40])  # the process died while it wrote
    cut = read_trace(path)
    assert len(cut.steps) == 2 and lint(cut) == [], "who was still running is not judged"


def test_a_long_queue_is_only_counted(tmp_path: Path) -> None:
    core = traced_core(tmp_path / "t.jsonl", max_num_seqs=1)
    trace = record_run(
        core, [make_request(f"r{i}", 3, max_tokens=1) for i in range(MAX_WAITING_SHOWN + 3)], max_steps=99
    )
    assert [trace.steps[i]["queues"]["num_waiting"] for i in (0, 1, 2)] == [66, 65, 64]
    assert trace.steps[1]["queues"]["waiting"] is None
    assert trace.steps[2]["queues"]["waiting"] == [f"r{i}" for i in range(3, 67)]
    assert lint(trace) == []


# ---- files


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write the trace to .*missing.*choose another file"):
        traced_core(tmp_path / "missing" / "t.jsonl")


def test_make_trace_follows_the_config(tmp_path: Path) -> None:
    kv = KVCacheConfig(9, 4, 32)
    assert type(make_trace(make_config(), kv)) is NullTrace
    core = traced_core(tmp_path / "t.jsonl")
    assert type(core.trace) is TraceWriter
    core.shutdown()
    core.shutdown()  # closing twice is fine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a trace"),
        ("hello\n", "line 1: not a JSON object"),
        ('{"step": 1}\n', "is not a trace"),
        ('{"type": "header", "v": 99}\n', "trace version 99"),
        ('{"type": "header", "v": 1}\n[]\n{}\n', "line 2: not a JSON object"),
        ('{"type": "header", "v": 1}\n{"step": 0}\n', "line 2: not a step record, it lacks budget"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace file"):
        read_trace(tmp_path / "t.jsonl")


# ---- show


def test_show_draws_the_blocks_as_the_step_ran() -> None:
    text = show(read_trace(GOLDEN), 4)  # a finishes in this step; b waits
    assert "computes 1 of at most 2048 tokens for 1 requests" in text
    assert "then waiting b" in text and "finish a length" in text
    assert "[1, 2, 4] -> " in text
    assert text.splitlines()[-1].split() == ["1", "AA·A"]


def test_show_of_a_step_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no step 9; it has 0\.\.8"):
        show(read_trace(GOLDEN), 9)


if __name__ == "__main__":
    small_pool_run(GOLDEN)
