"""show: one step of a trace as text, with the blocks as a grid.

Milestone: M2. vLLM counterpart: none. Left out: colours, and everything that an HTML viewer can show better.

Row 1: no torch.
"""

import string

from folovllm.trace.record import StepRecord, Trace
from folovllm.trace.replay import Replay

FREE, SHARED = "·", "#"
_LETTERS = string.ascii_uppercase + string.ascii_lowercase
GRID_WIDTH = 64


def show(trace: Trace, step: int) -> str:
    """Returns step `step` in about a dozen lines. Raises ValueError if the trace has no such step."""
    record = next((record for record in trace.steps if record["step"] == step), None)
    if record is None:
        raise ValueError(f"the trace has no step {step}; it has 0..{len(trace.steps) - 1}")
    holders = _holders(trace, record)
    letters = {request_id: _LETTERS[i % len(_LETTERS)] for i, request_id in enumerate(dict.fromkeys(_flat(holders)))}
    lines = [*_summary(record), "", f"{'':2} {'request':12} {'what':8} {'tokens':>12}  blocks"]
    lines += [_sched_line(record, index, letters) for index in range(len(record["sched"]))]
    lines += ["", f"blocks as the step ran ({FREE} free, {SHARED} shared; the letter is the request's):"]
    return "\n".join(lines + _grid(holders, letters, trace.header["kv"]["usable_blocks"]))


def _holders(trace: Trace, record: StepRecord) -> dict[int, list[str]]:
    """Returns the requests that hold each block, after the scheduler decided and before any request finished."""
    replay = Replay()
    for earlier in trace.steps:
        if earlier is record:
            break
        for event in earlier["events"]:
            replay.apply(event)
    for event in record["events"][: record["planned"]]:
        replay.apply(event)
    return replay.holders


def _flat(holders: dict[int, list[str]]) -> list[str]:
    return [request_id for block in sorted(holders) for request_id in holders[block]]


def _summary(record: StepRecord) -> list[str]:
    budget, queues, pool = record["budget"], record["queues"], record["pool"]
    spans = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in record["spans"].items())
    moves = [event for event in record["events"] if event[0] in ("add", "preempt", "requeue", "copy", "finish")]
    waiting = queues["waiting"]
    return [
        f"step {record['step']} at {record['t0']:.3f} s, {record['dur'] * 1e3:.2f} ms ({spans})",
        f"computes {budget['used']} of at most {budget['tokens']} tokens for {len(record['sched'])} requests",
        f"then running {', '.join(queues['running']) or 'no request'}",
        f"then waiting {queues['num_waiting'] if waiting is None else ', '.join(waiting) or 'no request'}",
        f"then {pool['free']} blocks free" + (f", {pool['cached']} more free but cached" if pool["cached"] else ""),
        "events: " + ("; ".join(" ".join(map(str, event)) for event in moves) or "no request came or went"),
    ]


def _sched_line(record: StepRecord, index: int, letters: dict[str, str]) -> str:
    """E.g. "A  r1           decode       19..19  [3, 7] -> 417", or "... 4..11  [1, 5, 6], 4 tokens cached -> 7268"."""
    entry = record["sched"][index]
    sampled = [event[2] for event in record["events"] if event[0] == "sample" and event[1] == entry["req"]]
    tokens = f"{entry['start']}..{entry['start'] + entry['n'] - 1}"
    answer = f" -> {', '.join(map(str, sampled[0]))}" if sampled else ""
    hit = f", {entry['cached']} tokens cached" if "cached" in entry else ""
    letter = letters.get(entry["req"], " ")
    return f"{letter:2} {entry['req']:12} {entry['kind']:8} {tokens:>12}  {_short(entry['table'])}{hit}{answer}"


def _short(table: list[int], limit: int = 10) -> str:
    """E.g. "[3, 7]" or "[1, 2, 3, ..., 40]"."""
    shown = [*map(str, table[: limit - 1]), "...", str(table[-1])] if len(table) > limit else map(str, table)
    return f"[{', '.join(shown)}]"


def _grid(holders: dict[int, list[str]], letters: dict[str, str], usable_blocks: int) -> list[str]:
    """Returns rows of GRID_WIDTH blocks, each with the id of its first block. Rows that are all free are summed up in
    one line.
    """
    cells = [_cell(holders.get(block, []), letters) for block in range(1, usable_blocks + 1)]
    rows = ["".join(cells[i : i + GRID_WIDTH]) for i in range(0, len(cells), GRID_WIDTH)]
    used = [(i, row) for i, row in enumerate(rows) if set(row) != {FREE}]
    lines = [f"{i * GRID_WIDTH + 1:6} {row}" for i, row in used]
    empty = len(rows) - len(used)
    return lines + ([f"{'':6} and {empty} rows of up to {GRID_WIDTH} free blocks"] if empty else [])


def _cell(held_by: list[str], letters: dict[str, str]) -> str:
    return FREE if not held_by else letters[held_by[0]] if len(held_by) == 1 else SHARED
