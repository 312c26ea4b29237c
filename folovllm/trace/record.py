"""The trace file, as JSON lines: first a header, then one record per step, and an end line if the writer was closed.

Milestone: M2. vLLM counterpart: none. Left out: draft tokens, several KV groups.

Row 1: no torch. A record says what the scheduler decided and how the step left the engine. E.g. (wrapped here)

    {"v": 1, "step": 7,
     "t0": 1.203, "dur": 0.031,                                             seconds since the trace began
     "spans": {"schedule": 0.0004, ..., "update": 0.0006},
     "budget": {"tokens": 64,                                               the limit, how much of it was scheduled,
                "used": 39, "seqs": 4},                                     and the limit of requests
     "sched": [{"req": "r1", ...},                                          in the order of the flat batch
               {"req": "r4", "kind": "prefill",
                "start": 0, "n": 38,
                "table": [9, 11, 12]}],
     "events": [["add", "r5", 20, 8, 0], ["preempt", "r2"], ["free", "r2", [9, 5]], ["alloc", "r4", [9, 11, 12]],
                ["sample", "r1", [417]], ["sample", "r4", [88]], ["finish", "r4", "stop"], ["free", "r4", [9, 11, 12]]],
     "planned": 4,                                                          so many events came before the forward pass
     "queues": {"num_waiting": 2,
                "waiting": ["r2", "r5"], "running": ["r1"]},
     "pool": {"free": 5,
              "cached": 0, "ref": {}}}

`queues` and `pool` are as the step left them, and `table` is as the step used it. A file stays small because unchanged
values are left out: `table` is written when it is new or has grown, the two queues when a request came, went or moved
(and `waiting` is null when very many requests wait). `read_trace` fills all that in again.

Events, in the order in which they happened:
    ["add", request, prompt tokens, max_tokens, priority]      ["preempt", request]
    ["hit", request, [blocks]]    taken from the prefix cache  ["alloc", request, [blocks]]    new
    ["copy", request, source block, its own block, tokens]     the part of a block that a prefix hit ends in
    ["requeue", request]          put back into the queue: between two steps, so that the prefix cache could be reset,
                                  or because its step failed
    ["free", request, [blocks]]   its whole table, in order    ["sample", request, [token ids]]
    ["finish", request, "stop" | "length" | "abort" | "error"]
A live trace (live.py) has no token ids: its "sample" events have their number.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from folovllm.text_files import read_text_file, split_lines

VERSION = 1
Event = list[Any]
to_json = json.JSONEncoder(separators=(",", ":")).encode  # how a line of a trace is written


class SchedEntry(TypedDict):
    """`n` tokens of a request from position `start` on. `cached` counts the tokens that a prefix hit gave it at
    admission.
    """

    req: str
    kind: str  # "prefill" or "decode", for readers; the scheduler knows no phases
    start: int
    n: int
    cached: NotRequired[int]
    table: NotRequired[list[int]]


class Queues(TypedDict):
    num_waiting: int
    waiting: NotRequired[list[str] | None]
    running: NotRequired[list[str]]


class Pool(TypedDict):
    """`free` + `cached` + the blocks that requests hold = the usable blocks. `cached` blocks are free and can still be
    hit.
    """

    free: int
    cached: int
    ref: dict[str, int]  # block -> holders, where there are several


class StepRecord(TypedDict):
    v: int
    step: int  # 0, 1, 2, ...
    t0: float
    dur: float
    spans: dict[str, float]
    budget: dict[str, int]
    sched: list[SchedEntry]
    events: list[Event]
    planned: int
    queues: Queues
    pool: Pool


REQUIRED = frozenset(StepRecord.__annotations__)
TIMES = ("t0", "dur", "spans")


@dataclass
class Trace:
    """A whole file. `end` is None if the writer was not closed: the run was interrupted, or it still goes on."""

    header: dict[str, Any]
    steps: list[StepRecord]
    end: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The engine arguments in one flat dict."""
        config: dict[str, Any] = self.header["config"]
        return config


def read_trace(path: str | Path) -> Trace:
    """Reads and completes a trace. Raises ValueError, with the line, for invalid content; an incomplete last line is
    dropped.
    """
    header, *lines = [*_json_lines(Path(path))] or [{}]
    if header.get("type") != "header":
        raise ValueError(
            f"{path} is not a trace: its first line is no header; a trace is what trace='file.jsonl' writes"
        )
    if header.get("v") != VERSION:
        raise ValueError(f"{path} has trace version {header.get('v')}, this FoloVLLM reads {VERSION}: record it again")
    end = lines.pop() if lines and lines[-1].get("type") == "end" else None
    for number, line in enumerate(lines, start=2):
        if missing := REQUIRED - line.keys():
            raise ValueError(f"{path}, line {number}: not a step record, it lacks {', '.join(sorted(missing))}")
    return Trace(header, list(_completed(lines)), end)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"no trace file {path}; write one with LLM(..., trace={str(path)!r})")
    try:
        lines = split_lines(read_text_file(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a trace: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            yield _as_object(json.loads(line))
        except ValueError:
            if number == len(lines) > 1:
                return  # the process died while it wrote
            raise ValueError(f"{path}, line {number}: not a JSON object") from None


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _completed(lines: list[Any]) -> Iterator[StepRecord]:
    """Fills in what the writer left out because it had not changed."""
    tables: dict[str, list[int]] = {}
    waiting: list[str] | None = []
    running: list[str] = []
    for record in lines:
        for entry in record["sched"]:
            entry["table"] = tables[entry["req"]] = entry.get("table", tables.get(entry["req"], []))
        queues = record["queues"]
        waiting = queues["waiting"] = queues.get("waiting", waiting)
        running = queues["running"] = queues.get("running", running)
        yield record
