"""The export to Chrome trace events: the format as it is documented, tracks that nest, and one trace by hand."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from folovllm.trace.perfetto import ENGINE, REQUESTS, STEPS, to_perfetto
from folovllm.trace.record import Trace, read_trace
from tests.core_helpers import make_request
from tests.m2.test_trace import GOLDEN
from tests.m2.trace_helpers import record_run, six_requests, traced_core

pytestmark = pytest.mark.m2

# https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: what each phase must have
KEYS = {
    "M": {"ph", "name", "pid", "tid", "ts", "args"},
    "X": {"ph", "name", "pid", "tid", "ts", "dur", "args"},
    "C": {"ph", "name", "pid", "tid", "ts", "args"},
    "i": {"ph", "name", "pid", "tid", "ts", "s"},
}


def exported(trace: Trace) -> list[dict[str, Any]]:
    """The events, as a reader of the file gets them."""
    events: list[dict[str, Any]] = json.loads(json.dumps(to_perfetto(trace)))["traceEvents"]
    return events


def slices(events: list[dict[str, Any]], pid: int, tid: int) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (pid, tid)]


def tracks(events: list[dict[str, Any]]) -> dict[str, int]:
    named = [event for event in events if event["name"] == "thread_name" and event["pid"] == REQUESTS]
    return {event["args"]["name"]: event["tid"] for event in named}


def traces(tmp_path: Path) -> list[Trace]:
    """Preemptions, chunks, prefix hits, a full queue, an abort, and one that was cut."""
    tight = record_run(traced_core(tmp_path / "tight.jsonl", num_kv_blocks=7), six_requests())
    chunks = traced_core(tmp_path / "chunks.jsonl", max_num_batched_tokens=4, enable_chunked_prefill=True)
    cut = traced_core(tmp_path / "cut.jsonl", max_num_seqs=2, enable_prefix_caching=True)
    for name in "abcd":
        cut.add_request(make_request(name, list(range(9)), max_tokens=4))
    for _ in range(3):
        cut.step()
    cut.abort_requests(["a", "c"])
    cut.step()
    cut.shutdown()
    return [tight, record_run(chunks, six_requests()), read_trace(tmp_path / "cut.jsonl"), read_trace(GOLDEN)]


def test_every_event_has_the_keys_of_its_phase(tmp_path: Path) -> None:
    for trace in traces(tmp_path):
        for event in exported(trace):
            assert set(event) == KEYS[event["ph"]], event
            assert isinstance(event["name"], str) and isinstance(event["ts"], int) and event["ts"] >= 0
            assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and event.get("dur", 0) >= 0


def test_the_slices_of_a_track_nest(tmp_path: Path) -> None:
    """Perfetto drops a slice that begins in another one and ends behind it."""
    for trace in traces(tmp_path):
        by_track = defaultdict(list)
        for event in exported(trace):
            if event["ph"] == "X":
                by_track[event["pid"], event["tid"]].append((event["ts"], -event["dur"]))
        for found in by_track.values():
            ends: list[int] = []
            for begin, negative in sorted(found):
                while ends and ends[-1] <= begin:
                    ends.pop()
                assert not ends or begin - negative <= ends[-1]
                ends.append(begin - negative)


def test_phases_that_round_up_stay_within_their_step(tmp_path: Path) -> None:
    trace = read_trace(GOLDEN)
    for record in trace.steps:
        record["spans"] = {"schedule": record["dur"], "forward": 1e-6}  # one microsecond too much
    for event in slices(exported(trace), ENGINE, STEPS):
        if event["name"] == "forward":
            assert event["dur"] == 0


def test_the_small_pool_by_hand() -> None:
    """b is preempted in step 1, waits until a has finished in step 4, and computes its 9 tokens again."""
    trace = read_trace(GOLDEN)
    events = exported(trace)
    assert list(tracks(events)) == ["a", "b"]
    a, b = (slices(events, REQUESTS, tracks(events)[name]) for name in "ab")
    assert [event["name"] for event in a] == ["prefill 7", "decode", "decode", "decode", "decode"]
    assert [event["name"] for event in b] == ["prefill 8", "preempted", "prefill 9", "decode", "decode", "decode"]
    begins = [round(record["t0"] * 1e6) for record in trace.steps]
    assert (b[1]["ts"], b[1]["ts"] + b[1]["dur"]) == (begins[1], begins[5])
    assert b[2]["args"] == {"start": 0, "tokens": 9, "step": 5}
    finished = [(event["tid"], event["name"]) for event in events if event["ph"] == "i"]
    assert finished == [(tracks(events)["a"], "finish length"), (tracks(events)["b"], "finish length")]
    engine = [event["name"] for event in slices(events, ENGINE, STEPS)]
    assert engine[:7] == ["step 0", "schedule", "trace", "forward", "sample", "update", "step 1"]


def test_counters_by_hand() -> None:
    events = [event for event in exported(read_trace(GOLDEN)) if event["ph"] == "C"]
    values: dict[str, list[int]] = defaultdict(list)
    for event in events:
        values[event["name"]].append(event["args"]["value"])
    assert values == {
        "tokens per step": [15, 1, 1, 1, 1, 9, 1, 1, 1],
        "running": [2, 1, 1, 1, 0, 1, 1, 1, 0],
        "waiting": [0, 1, 1, 1, 1, 0, 0, 0, 0],
        "free blocks": [record["pool"]["free"] for record in read_trace(GOLDEN).steps],
        "cached blocks": [0] * 9,
    }


def test_chunks_hits_and_waits_are_named(tmp_path: Path) -> None:
    _, chunks, cut, _ = traces(tmp_path)
    names = {event["name"] for event in exported(chunks) if event["pid"] == REQUESTS}
    assert {"chunk 4", "queued", "decode"} <= names
    events = exported(cut)
    on_d = slices(events, REQUESTS, tracks(events)["d"])
    assert on_d[0]["name"] == "queued" and on_d[-1]["name"] != "queued"
    assert [event["name"] for event in slices(events, REQUESTS, tracks(events)["c"])] == ["queued"]  # aborted
    assert any(event["args"].get("cached") for event in on_d)


def test_a_wait_that_the_trace_does_not_end_is_shown(tmp_path: Path) -> None:
    core = traced_core(tmp_path / "t.jsonl", max_num_seqs=1)
    for name in "ab":
        core.add_request(make_request(name, 4))
    core.step()
    core.step()
    core.trace.close()
    trace = read_trace(tmp_path / "t.jsonl")
    events = exported(trace)
    (queued,) = slices(events, REQUESTS, tracks(events)["b"])
    last = trace.steps[-1]
    assert queued["name"] == "queued" and queued["ts"] + queued["dur"] == round((last["t0"] + last["dur"]) * 1e6)
