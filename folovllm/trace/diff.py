"""diff: the first step in which two traces differ, what only one of them did there, and one sentence about why.

Milestone: M2. vLLM counterpart: none. Left out: aligning the traces again after the first difference (from there on the
queues differ, and so does everything else).

Row 1: no torch. Times are never compared. Within a step, the arriving requests are compared first, then what each
request computes, then the blocks, the tokens and the rest. The first of these to differ is nearest to the cause.
"""

from collections.abc import Callable
from dataclasses import dataclass

from folovllm.trace.record import SchedEntry, StepRecord, Trace


@dataclass(frozen=True)
class Divergence:
    """The first difference. `a_only` and `b_only` are phrases such as "r1 decode 1" or "preempt r2"."""

    step: int
    a_only: tuple[str, ...]
    b_only: tuple[str, ...]
    sentence: str
    config: tuple[str, ...] = ()  # engine arguments that differ, "batching: 'continuous' / 'static'"
    names: tuple[str, str] = ("a", "b")  # what the two sides are called

    def __str__(self) -> str:
        sides = [f"{name}-only " + ", ".join(f"({phrase})" for phrase in phrases)
                 for name, phrases in zip(self.names, (self.a_only, self.b_only), strict=True) if phrases]  # fmt: skip
        lines = [f"first divergence at step {self.step}: {'; '.join(sides)}", self.sentence]
        return "\n".join(lines + [f"config differs in {difference}" for difference in self.config])


Names = tuple[str, str]
View = tuple[Callable[[StepRecord], list[str]], Callable[[StepRecord, StepRecord, Names], str]]


def diff(a: Trace, b: Trace, names: Names = ("a", "b")) -> Divergence | None:
    """Returns the first step that differs between `a` and `b`, or None if there is none.

    Block ids are compared only between caches of the same shape. `names` is what the answer calls the two sides.
    """
    views, config = _views(with_blocks=a.header["kv"] == b.header["kv"]), _config_differences(a, b)
    for step_a, step_b in zip(a.steps, b.steps, strict=False):
        for phrases, explain in views:
            if phrases(step_a) != phrases(step_b):
                sides = _only(phrases(step_a), phrases(step_b))
                return Divergence(step_a["step"], *sides, explain(step_a, step_b, names), config, names)
    common = min(len(a.steps), len(b.steps))
    if len(a.steps) > common:
        sentence = f"{names[1]} ends after {common} steps, {names[0]} goes on"
        return Divergence(common, _more(a.steps[common]), (), sentence, config, names)
    if len(b.steps) > common:
        sentence = f"{names[0]} ends after {common} steps, {names[1]} goes on"
        return Divergence(common, (), _more(b.steps[common]), sentence, config, names)
    return None


def _only(of_a: list[str], of_b: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the phrases that only one side has, or all of both if only their order differs."""
    a_only = tuple(phrase for phrase in of_a if phrase not in of_b)
    b_only = tuple(phrase for phrase in of_b if phrase not in of_a)
    return (a_only, b_only) if a_only or b_only else (tuple(of_a), tuple(of_b))


def _more(record: StepRecord) -> tuple[str, ...]:
    return tuple(_work(record)) or ("an empty step",)


def _views(with_blocks: bool) -> list[View]:
    """Returns what to compare in a step, nearest to the cause first. Together the views cover all but
    times and limits.
    """
    views: list[View] = [
        (_arrivals, lambda a, b, names: "the engines were not given the same requests, or not at the same step"),
        (_work, _policy_sentence),
        (_starts, _policy_sentence),
        (_tokens, lambda a, b, names: "the same work, but other tokens came out"),
        (_rest, lambda a, b, names: "the same work and tokens, but other requests wait, run or finish"),
    ]
    if with_blocks:
        views.insert(3, (_tables, lambda a, b, names: "the same work, in other blocks"))
        views.append((_pool, lambda a, b, names: "the same work and tokens, but other blocks are free"))
    return views


# ---- views: a step as phrases


def _arrivals(record: StepRecord) -> list[str]:
    planned = record["events"][: record["planned"]]
    return [_phrase(event) for event in planned if event[0] in ("add", "finish")]


def _work(record: StepRecord) -> list[str]:
    preempted = [f"preempt {event[1]}" for event in record["events"] if event[0] == "preempt"]
    return preempted + [_work_phrase(entry) for entry in record["sched"]]


def _work_phrase(entry: SchedEntry) -> str:
    """E.g. "r1 decode 1", "r2 prefill 8", "r2 prefill 8 from 16"."""
    is_later_part = entry["kind"] == "prefill" and entry["start"] > 0
    return f"{entry['req']} {entry['kind']} {entry['n']}" + (f" from {entry['start']}" if is_later_part else "")


def _starts(record: StepRecord) -> list[str]:
    return [f"{entry['req']} from {entry['start']}" for entry in record["sched"]]


def _tables(record: StepRecord) -> list[str]:
    return [f"{entry['req']} in blocks {entry['table']}" for entry in record["sched"]]


def _tokens(record: StepRecord) -> list[str]:
    return [_phrase(event) for event in record["events"] if event[0] == "sample"]


_BLOCK_EVENTS = ("alloc", "hit", "copy", "free")


def _rest(record: StepRecord) -> list[str]:
    others = [_phrase(event) for event in record["events"] if event[0] not in _BLOCK_EVENTS]
    return others + [f"{name} {value}" for name, value in record["queues"].items()]


def _pool(record: StepRecord) -> list[str]:
    blocks = [_phrase(event) for event in record["events"] if event[0] in _BLOCK_EVENTS]
    return blocks + [f"{name} {value}" for name, value in record["pool"].items()]


def _phrase(event: list[object]) -> str:
    return " ".join(map(str, event))


# ---- the sentence


def _policy_sentence(a: StepRecord, b: StepRecord, names: Names) -> str:
    """Returns a sentence on what the side that did less did not do. The first reason that applies is taken."""
    name_a, name_b = names
    for mine, other, name, others_name in ((a, b, name_b, name_a), (b, a, name_a, name_b)):
        lacking = [entry for entry in mine["sched"] if _entry_of(other, entry["req"]) is None]
        preempted = {event[1] for event in other["events"] if event[0] == "preempt"}
        if victims := [entry["req"] for entry in lacking if entry["req"] in preempted]:
            return f"{name} preempted {victims[0]}, {others_name} did not"
        if decodes := [entry["req"] for entry in lacking if entry["kind"] == "decode"]:
            return f"a running decode was skipped: {decodes[0]} in {name}"
        if lacking:
            return _admission_sentence(lacking[0]["req"], name, others_name, other)
    for entry in a["sched"]:
        twin = _entry_of(b, entry["req"])
        assert twin is not None, "both sides computed the same requests"
        if twin["start"] != entry["start"]:
            return f"{entry['req']} starts at token {entry['start']} in {name_a}, at {twin['start']} in {name_b}"
        if twin["n"] != entry["n"]:
            return (
                f"the same requests, but {entry['req']} got {entry['n']} tokens in {name_a} and {twin['n']} in {name_b}"
            )
    return "the same requests in another order"


def _admission_sentence(request_id: str, name: str, others_name: str, record: StepRecord) -> str:
    ran = [entry["req"] for entry in record["sched"]]
    why = f" while {', '.join(ran)} ran" if ran else ""
    return f"{others_name} computed {request_id}, {name} let it wait{why}"


def _entry_of(record: StepRecord, request_id: str) -> SchedEntry | None:
    return next((entry for entry in record["sched"] if entry["req"] == request_id), None)


def _config_differences(a: Trace, b: Trace) -> tuple[str, ...]:
    """Compares the engine arguments that both traces name: a trace of another engine does not have all of them."""
    return tuple(
        f"{name}: {value!r} / {b.config[name]!r}"
        for name, value in a.config.items()
        if name in b.config and b.config[name] != value
    )
