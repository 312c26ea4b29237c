"""view: one or two traces as a single HTML page that opens from a file, without a network.

Milestone: M2. vLLM counterpart: none. Left out: the live page of a running engine, which is the server's
(entrypoints/web). It feeds viewer/model.js and viewer/draw.js record by record.

Row 1: no torch. The page consists of the files in viewer/ and the records as JSON. The records are replayed in the
browser (viewer/model.js), as replay.py does it, so the page contains little more than the trace file itself. The first
divergence of two traces is found here, by diff.py.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from folovllm.trace.diff import diff
from folovllm.trace.record import SchedEntry, Trace
from folovllm.trace.replay import Replay

VIEWER = Path(__file__).parent / "viewer"
SCRIPTS = ("model.js", "why.js", "draw.js", "colours.js", "page.js")  # in this order: the last one starts the page


def render_view(traces: Sequence[Trace], names: Sequence[str]) -> str:
    """Returns the page for one trace, or for two side by side. `names` are their titles."""
    assert len(traces) == len(names) in (1, 2)
    divergence = diff(traces[0], traces[1]) if len(traces) == 2 else None
    data = {
        "traces": [
            {"name": name, "header": trace.header, "steps": compact(trace)}
            for trace, name in zip(traces, names, strict=True)
        ],
        "divergence": asdict(divergence) if divergence else None,
    }
    parts = {
        "title": escape(" / ".join(names)),
        "style": (VIEWER / "style.css").read_text(encoding="utf-8"),
        "data": script_safe(data),
        "script": "\n".join((VIEWER / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    return string.Template((VIEWER / "page.html").read_text(encoding="utf-8")).substitute(parts)


def script_safe(data: Any) -> str:
    """Returns JSON that cannot close the script element it stands in. A request id may contain any text."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def compact(trace: Trace) -> list[dict[str, Any]]:
    """Returns the records without what the page can replay: tables that agree with the events, unchanged queues."""
    replay = Replay()
    queues: dict[str, Any] = {"waiting": [], "running": []}
    records = []
    for record in trace.steps:
        for event in record["events"][: record["planned"]]:
            replay.apply(event)
        sched = [_without_known_table(entry, replay) for entry in record["sched"]]
        replay.run(record["sched"])
        for event in record["events"][record["planned"] :]:
            replay.apply(event)
        now: dict[str, Any] = dict(record["queues"])
        changed = {name: value for name, value in now.items() if name not in queues or queues[name] != value}
        queues = now
        records.append({**record, "sched": sched, "queues": changed})
    return records


def _without_known_table(entry: SchedEntry, replay: Replay) -> dict[str, Any]:
    """Keeps a table only where the engine contradicts its own events. From there on, the table counts."""
    request_id, table = entry["req"], entry["table"]
    if table != replay.tables.get(request_id, []):
        replay.release(request_id)
        replay.take(request_id, table)
        return {**entry}
    return {name: value for name, value in entry.items() if name != "table"}
