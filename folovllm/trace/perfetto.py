"""perfetto: a trace as Chrome trace events, for https://ui.perfetto.dev and chrome://tracing.

Milestone: M2. vLLM counterpart: none. Left out: arrows from a preemption to the return (both are on one track).
Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

Row 1: no torch. Perfetto does not show slices of a track that overlap without nesting
(https://perfetto.dev/docs/faq), so every request has a track of its own and all times are whole microseconds.

    process Engine      track "steps": step 7 [schedule | trace | forward | sample | update]      counters
    process Requests    a track per request: queued, prefill 38, chunk 16, decode, preempted

The records have no times of arrival. "queued" therefore begins with the first step whose record names the request.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from folovllm.trace.record import SchedEntry, StepRecord, Trace
from folovllm.trace.replay import Replay

ENGINE, REQUESTS = 1, 2  # pid: Chrome's processes group tracks
STEPS = 1  # tid of the engine's only track
TraceEvent = dict[str, Any]


def to_perfetto(trace: Trace) -> dict[str, Any]:
    """Returns the JSON object of a trace: its "traceEvents" and the engine's arguments as metadata."""
    requests = _RequestTracks()
    events = [_name("process", "Engine", ENGINE), _name("process", "Requests", REQUESTS)]
    events.append(_name("thread", "steps", ENGINE, STEPS))
    for record in trace.steps:
        events += _step_slices(record)
        events += _counters(record)
        requests.add(record)
    events += requests.close()
    metadata = {"folovllm": trace.header.get("folovllm"), "config": trace.config}
    return {"traceEvents": events, "displayTimeUnit": "ms", "metadata": metadata}


def _name(kind: str, name: str, pid: int, tid: int = 0) -> TraceEvent:
    return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _slice(name: str, begin: int, end: int, pid: int, tid: int, **args: Any) -> TraceEvent:
    return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "pid": pid, "tid": tid, "args": args}


def _times(record: StepRecord) -> tuple[int, int]:
    """Returns begin and end of a step, in microseconds."""
    return round(record["t0"] * 1e6), round((record["t0"] + record["dur"]) * 1e6)


# ---- the engine


def _step_slices(record: StepRecord) -> Iterator[TraceEvent]:
    """Yields the step, and its phases within it. Their rounded lengths may add up to more than the step's."""
    begin, end = _times(record)
    budget = record["budget"]
    args = {"tokens": budget["used"], "budget": budget["tokens"], "requests": len(record["sched"])}
    yield _slice(f"step {record['step']}", begin, end, ENGINE, STEPS, **args)
    seconds = record["t0"]
    for name, duration in record["spans"].items():
        phase_begin = min(round(seconds * 1e6), end)
        seconds += duration
        yield _slice(name, phase_begin, min(round(seconds * 1e6), end), ENGINE, STEPS)


def _counters(record: StepRecord) -> Iterator[TraceEvent]:
    """Yields the tokens of the step at its begin, and at its end what it left behind."""
    begin, end = _times(record)
    yield _counter("tokens per step", begin, record["budget"]["used"])
    yield _counter("running", end, len(record["queues"]["running"]))
    yield _counter("waiting", end, record["queues"]["num_waiting"])
    yield _counter("free blocks", end, record["pool"]["free"])
    yield _counter("cached blocks", end, record["pool"]["cached"])


def _counter(name: str, time: int, value: int) -> TraceEvent:
    return {"ph": "C", "name": name, "ts": time, "pid": ENGINE, "tid": 0, "args": {"value": value}}


# ---- the requests


@dataclass
class _RequestTracks:
    """A track per request id, in order of arrival. A request that waits has an open slice."""

    replay: Replay = field(default_factory=Replay)
    tids: dict[str, int] = field(default_factory=dict)
    open: dict[str, tuple[str, int]] = field(default_factory=dict)  # request -> ("queued" or "preempted", begin)
    events: list[TraceEvent] = field(default_factory=list)
    end: int = 0

    def add(self, record: StepRecord) -> None:
        begin, self.end = _times(record)
        self._apply(record["events"][: record["planned"]], begin)
        for entry in record["sched"]:
            request_id = entry["req"]
            self._close_wait(request_id, begin)
            args = {"start": entry["start"], "tokens": entry["n"], "step": record["step"]}
            if "cached" in entry:
                args["cached"] = entry["cached"]
            self.events.append(self._slice(request_id, self._kind(entry), begin, self.end, **args))
        self.replay.run(record["sched"])
        self._apply(record["events"][record["planned"] :], self.end)

    def close(self) -> list[TraceEvent]:
        """Ends the waits that the trace does not end. Returns all events."""
        for request_id in list(self.open):
            self._close_wait(request_id, self.end)
        return self.events

    def _apply(self, events: list[list[Any]], time: int) -> None:
        for event in events:
            kind, request_id = event[0], event[1]
            self.replay.apply(event)
            if kind == "add":
                self._begin_wait(request_id, "queued", time)
            elif kind in ("preempt", "requeue"):
                self._begin_wait(request_id, "preempted", time)
            elif kind == "finish":
                self._close_wait(request_id, time)
                self.events.append(self._on_track(request_id, f"finish {event[2]}") | {"ph": "i", "s": "t", "ts": time})

    def _kind(self, entry: SchedEntry) -> str:
        """E.g. "decode", "prefill 38", or "chunk 16" for a part of a prefill that does not reach its end."""
        if entry["kind"] == "decode":
            return "decode"
        request = self.replay.requests.get(entry["req"])
        is_part = request is not None and entry["start"] + entry["n"] < request.num_tokens
        return f"{'chunk' if is_part else 'prefill'} {entry['n']}"

    def _begin_wait(self, request_id: str, name: str, time: int) -> None:
        self._close_wait(request_id, time)
        self.open[request_id] = (name, time)

    def _close_wait(self, request_id: str, time: int) -> None:
        name, begin = self.open.pop(request_id, ("", time))
        if begin < time:
            self.events.append(self._slice(request_id, name, begin, time))

    def _slice(self, request_id: str, name: str, begin: int, end: int, **args: Any) -> TraceEvent:
        return _slice(name, begin, end, **self._track(request_id), **args)

    def _on_track(self, request_id: str, name: str) -> TraceEvent:
        return {"name": name, **self._track(request_id)}

    def _track(self, request_id: str) -> dict[str, int]:
        if request_id not in self.tids:
            self.tids[request_id] = len(self.tids) + 1
            self.events.append(_name("thread", request_id, REQUESTS, self.tids[request_id]))
        return {"pid": REQUESTS, "tid": self.tids[request_id]}
