"""lint: the rules of scheduling and paging in executable form, checked on a trace.

Milestone: M2 (queues, budgets, tokens), M3 (blocks), M6 (hits: lint_cache.py), M9 (tokens in flight). vLLM counterpart:
none. The rules are requirements of milestones/m2/SPEC.md, m3 and m6. Left out: which cached block is evicted.

Row 1: no torch. The lint replays the events and compares the result with what the engine reports about itself. After a
violation it accepts the engine's report and goes on, so one bug gives one message instead of a hundred.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.trace.lint_cache import CACHE_RULES, CacheLinter
from folovllm.trace.record import Event, SchedEntry, StepRecord, Trace, read_trace
from folovllm.trace.replay import Replay, ReplayedRequest
from folovllm.utils import cdiv

RULES: dict[str, str] = {
    # M2: which requests run
    "steps": "steps are numbered 0, 1, 2, ... and none is missing",
    "token-budget": "a step computes at most max_num_batched_tokens, and as many as it says",
    "seats": "at most max_num_seqs requests run",
    "running-first": "running requests come first, in order of admission, and none is skipped while budget is left",
    "queue-order": "the head of the queue is admitted first, no request overtakes it",
    "static": "batching 'static' admits only when nothing runs",
    "preempt-admits": "a step that preempted admits no request",
    "progress": "a step with requests to serve computes something",
    "queues": "every unfinished request either waits or runs, as its events say",
    "unfinished": "every request finishes",
    # M2: which tokens
    "recompute": "no computed token is computed again without a preemption, and none is skipped",
    "overrun": "only known tokens are computed",
    "chunk": "without chunked prefill a prompt is computed whole; with it, in parts no larger than the threshold",
    "early-token": "a request gets a token only when all its known tokens are computed",
    "no-token": "a request whose known tokens are all computed gets a token",
    "length": "no request outgrows max_tokens or max_model_len",
    # M3: which blocks
    "null-block": "the null block (0) is in no table, and no block is out of range",
    "double-ownership": "a block is in two tables only after a prefix hit, and its ref count says so",
    "append-only": "a table is what was allocated, in that order; while a request runs it only grows",
    "short-table": "a table has a block for every computed token",
    "waste": "a table has no block that its tokens do not need",
    "kept-blocks": "who does not run holds no blocks",
    "conservation": "free + cached + held blocks are all there are",
} | CACHE_RULES

# scheduling_policy -> the rank of a waiting request. The smallest is admitted first; among equals it may be any, as a
# trace does not say which arrived first. None: the order in which they came, preempted requests in front. A policy
# without a line here and a queue that a learner replaced may admit in any order.
RANKS: dict[str, Callable[[ReplayedRequest], int] | None] = {
    "fcfs": None,
    "priority": lambda request: request.priority,
}


@dataclass(frozen=True)
class Violation:
    """The engine broke `rule` (a key of RULES) at `step`, or, if `step` is None, by the end of the trace."""

    step: int | None
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{'end' if self.step is None else f'step {self.step}'}: {self.rule}: {self.message}"


def lint(source: str | Path | Trace) -> list[Violation]:
    """Returns all violations in a trace or its file: an empty list for a healthy engine. Raises ValueError if it is no
    trace.
    """
    trace = source if isinstance(source, Trace) else read_trace(source)
    linter = _Linter(trace)
    for record in trace.steps:
        linter.check_step(record)
    linter.check_end(trace)
    return linter.violations


class _Linter:
    def __init__(self, trace: Trace) -> None:
        config = trace.config
        self.max_num_seqs: int = config["max_num_seqs"]
        self.max_num_batched_tokens: int = config["max_num_batched_tokens"]
        self.max_model_len: int = config["max_model_len"]
        self.chunked: bool = config["enable_chunked_prefill"]
        self.threshold: int = config["long_prefill_token_threshold"]
        self.is_static: bool = config["batching"] == "static"
        self.rank = _rank_of_queue(config)
        self.block_size: int = trace.header["kv"]["block_size"]
        self.usable_blocks: int = trace.header["kv"]["usable_blocks"]
        self.violations: list[Violation] = []
        self.replay = Replay()
        self.cache = CacheLinter(self.block_size, self.report)
        self.step: int | None = None
        self.num_steps = 0
        self.missing_blocks = 0  # blocks that were reported already
        self.num_idle = 0  # steps in a row that computed nothing
        self.is_stalled = False
        self.cut_short: set[str] = set()  # requests that were aborted or preempted in this step
        # In a pipeline, a token comes some records after the one that has its step.
        self.num_stages: int = config.get("pipeline_parallel_size", 1)
        self.awaited: dict[str, int] = {}  # request whose next token is on its way -> the step that samples it
        self.late: set[str] = set()  # requests that were put back into the queue while they were awaited

    def report(self, rule: str, message: str) -> None:
        assert rule in RULES
        self.violations.append(Violation(self.step, rule, message))

    def check_step(self, record: StepRecord) -> None:
        self.step = record["step"]
        self.cut_short = set()
        if self.step != self.num_steps:
            self.report("steps", f"step {self.num_steps} was expected")
        self.num_steps = self.step + 1
        preempted = self._apply(record["events"][: record["planned"]])
        self.cache.planned(record["events"][: record["planned"]])
        self._check_budget(record)
        self._check_order(record["sched"], record["budget"]["used"], preempted)
        for entry in record["sched"]:
            self._check_entry(entry)
            self.cache.entry(entry)
        self.cache.ran(record)
        self.replay.run(record["sched"])
        if len(self.replay.running) > self.max_num_seqs:
            self.report("seats", f"{len(self.replay.running)} requests run, the limit is {self.max_num_seqs}")
        self._apply(record["events"][record["planned"] :])
        if self.num_stages == 1:
            self._check_all_sampled(record)
        else:
            self._check_awaited(record)
        self._check_queues(record)
        self._check_blocks(record)
        is_idle = not record["sched"] and not preempted and bool(self.replay.requests)
        self.num_idle = self.num_idle + 1 if is_idle else 0
        # If nothing can start, the steps in flight end one after another: at most num_stages - 1, then one must start.
        self._check_progress(is_stalled=self.num_idle >= self.num_stages)

    def check_end(self, trace: Trace) -> None:
        self.step = None
        if trace.end is None:
            return  # the trace was cut: requests that were still waiting or running may have finished later
        if trace.end["steps"] != self.num_steps:
            self.report("steps", f"the writer counted {trace.end['steps']} steps, the file ends after {self.num_steps}")
        self._apply(trace.end["events"])
        if self.replay.requests:
            self.report("unfinished", f"{_names(self.replay.requests)} never finished")

    # ---- events

    def _apply(self, events: Iterable[Event]) -> list[str]:
        """Replays `events` and judges each one first. Returns the requests that they preempted."""
        preempted = []
        for event in events:
            kind, request_id, *rest = event
            if kind in ("hit", "alloc"):
                self._check_new_blocks(request_id, rest[0], shared=kind == "hit")
            elif kind == "sample":
                self._check_sample(request_id, rest[0])
            elif kind == "preempt":
                preempted.append(request_id)
            elif kind == "finish" and rest[0] in ("abort", "error"):
                self.cut_short.add(request_id)
            self._note_awaited(kind, request_id)
            self.replay.apply(event)
        self.cut_short.update(preempted)
        return preempted

    def _note_awaited(self, kind: str, request_id: str) -> None:
        if kind in ("sample", "finish"):
            self.awaited.pop(request_id, None)
            self.late.discard(request_id)
        elif kind in ("preempt", "requeue") and self.awaited.pop(request_id, None) is not None:
            self.late.add(request_id)

    def _check_new_blocks(self, request_id: str, blocks: list[int], shared: bool) -> None:
        seen: set[int] = set()
        for block in blocks:
            if not 0 < block <= self.usable_blocks:
                self.report("null-block", f"{request_id} was given block {block}; there are 1..{self.usable_blocks}")
            holders = [*self.replay.holders.get(block, []), *([request_id] if block in seen else [])]
            if request_id in holders or (holders and not shared):
                self.report("double-ownership", f"block {block} went to {request_id}, but {_names(holders)} holds it")
            seen.add(block)

    def _check_sample(self, request_id: str, token_ids: list[int]) -> None:
        request = self.replay.requests.get(request_id)
        if request is None:
            self.report("early-token", f"{request_id} got a token, but is not there")
            return
        computed, known = request.num_computed_tokens, request.num_tokens
        if computed < known and request_id not in self.late:
            self.report("early-token", f"{request_id} got a token with {computed} of its {known} tokens computed")
        num_output_tokens, num_tokens = request.num_output_tokens + len(token_ids), known + len(token_ids)
        if num_output_tokens > request.max_tokens or num_tokens > self.max_model_len:
            self.report(
                "length",
                f"{request_id} has {num_output_tokens} output tokens (max_tokens {request.max_tokens}) and "
                f"{num_tokens} in all (max_model_len {self.max_model_len})",
            )

    # ---- what was scheduled

    def _check_budget(self, record: StepRecord) -> None:
        total, used = sum(entry["n"] for entry in record["sched"]), record["budget"]["used"]
        if total > self.max_num_batched_tokens:
            self.report("token-budget", f"{total} tokens, the limit is {self.max_num_batched_tokens}")
        if total != used:
            self.report("token-budget", f"{total} tokens are scheduled, the step says {used}")

    def _check_order(self, sched: list[SchedEntry], used: int, preempted: list[str]) -> None:
        share = cdiv(len(self.replay.running), self.num_stages)
        running = [request_id for request_id in self.replay.running if request_id not in self.awaited]
        scheduled = [entry["req"] for entry in sched]
        continued = [request_id for request_id in scheduled if request_id in running]
        admitted = [request_id for request_id in scheduled if request_id not in running]
        budget_left = used < self.max_num_batched_tokens and not preempted
        skipped = [request_id for request_id in running if request_id not in continued]
        if scheduled != [*running[: len(continued)], *admitted]:
            self.report("running-first", f"scheduled {_names(scheduled)} while {_names(running)} ran, in this order")
        elif skipped and (budget_left or admitted) and len(continued) < share:
            self.report("running-first", f"{_names(skipped)} ran and got no token, though there was room")
        if admitted and preempted:
            self.report("preempt-admits", f"{_names(admitted)} was admitted, {_names(preempted)} preempted")
        if admitted and self.is_static and (self.replay.running or preempted):
            others = _names(self.replay.running or preempted)
            self.report("static", f"{_names(admitted)} was admitted while {others} ran")
        self._check_queue_order(admitted)

    def _check_queue_order(self, admitted: list[str]) -> None:
        waiting = list(self.replay.waiting)
        for request_id in admitted:
            if request_id not in waiting:
                return self.report("queue-order", f"{request_id} was admitted, but did not wait")
            head = waiting[0] if self.rank is None else min(waiting, key=self._rank_of)
            if head != request_id and (self.rank is None or self._rank_of(head) < self._rank_of(request_id)):
                return self.report("queue-order", f"{request_id} was admitted before {head}")
            waiting.remove(request_id)

    def _rank_of(self, request_id: str) -> int:
        assert self.rank is not None
        return self.rank(self.replay.requests[request_id])

    def _check_entry(self, entry: SchedEntry) -> None:
        request = self.replay.requests.get(entry["req"])
        if request is None:
            self.report("queues", f"{entry['req']} is scheduled, but is not there")
            return
        request_id, start, n, end = entry["req"], entry["start"], entry["n"], entry["start"] + entry["n"]
        joins = request_id not in self.replay.running
        computed = self._num_hit_tokens(request_id) if joins else request.num_computed_tokens
        if start != computed:
            self.report("recompute", f"{request_id} starts at token {start} with {computed} computed")
        if n < 1 or end > request.num_tokens:
            self.report("overrun", f"{request_id} computes tokens {start}..{end - 1}, it has {request.num_tokens}")
        if not self.chunked and end < request.num_tokens:
            self.report("chunk", f"{request_id} stops at {end} of {request.num_tokens} tokens without chunked prefill")
        if 0 < self.threshold < n:
            self.report("chunk", f"{request_id} computes {n} tokens at once, the threshold is {self.threshold}")
        self._check_table(request_id, entry["table"], end)

    def _num_hit_tokens(self, request_id: str) -> int:
        """Returns how many tokens a request just admitted has from the cache, in shared blocks and copied."""
        return self.replay.hits.get(request_id, 0) * self.block_size + self.cache.copies.get(request_id, 0)

    def _check_progress(self, is_stalled: bool) -> None:
        if is_stalled and not self.is_stalled:  # a stalled engine is stalled in every step, so report it once
            self.report("progress", f"nothing was computed though {_names(self.replay.requests)} could go on")
        self.is_stalled = is_stalled

    # ---- blocks

    def _check_table(self, request_id: str, table: list[int], num_tokens: int) -> None:
        allocated = self.replay.tables.get(request_id, [])
        if table != allocated:
            self.report("append-only", f"{request_id} has table {table}, but was given {allocated}")
            hits = self.replay.hits.get(request_id, 0)
            self.replay.release(request_id)
            self.replay.take(request_id, table)
            self.replay.hits[request_id] = hits
        if any(not 0 < block <= self.usable_blocks for block in set(table) - set(allocated)):
            self.report("null-block", f"{request_id} has table {table}; there are blocks 1..{self.usable_blocks}")
        needed = cdiv(num_tokens, self.block_size)
        if len(table) < needed:
            self.report("short-table", f"{request_id} has {len(table)} blocks for {num_tokens} tokens, needs {needed}")
        # More blocks than needed are a violation, too: blocks taken in advance are reserved without use.
        elif len(table) > needed:
            self.report("waste", f"{request_id} has {len(table)} blocks for {num_tokens} tokens, needs only {needed}")

    def _check_blocks(self, record: StepRecord) -> None:
        replay, pool = self.replay, record["pool"]
        for request_id in [r for r in replay.tables if replay.tables[r] and r not in replay.running]:
            # Its blocks stay held, as the pool counts them. One message is enough.
            self.report("kept-blocks", f"{request_id} does not run, but holds blocks {replay.tables.pop(request_id)}")
        missing = self.usable_blocks - (pool["free"] + pool["cached"] + len(replay.holders))
        if missing != self.missing_blocks:
            self.report(
                "conservation",
                f"{pool['free']} free + {pool['cached']} cached + {len(replay.holders)} held blocks, "
                f"there are {self.usable_blocks}",
            )
        self.missing_blocks = missing
        shared = {str(block): len(held_by) for block, held_by in replay.holders.items() if len(held_by) > 1}
        for block in sorted(shared.keys() | pool["ref"].keys()):
            if shared.get(block, 1) != pool["ref"].get(block, 1):
                counts = f"{shared.get(block, 1)} tables hold it, its count is {pool['ref'].get(block, 1)}"
                self.report("double-ownership", f"block {block}: {counts}")

    # ---- how the step left the engine

    def _check_all_sampled(self, record: StepRecord) -> None:
        sampled = {event[1] for event in record["events"] if event[0] == "sample"}
        for entry in record["sched"]:
            request = self.replay.requests.get(entry["req"])
            if request is None or entry["req"] in sampled | self.cut_short:
                continue
            if _is_computed(request):
                self.report("no-token", f"{entry['req']} has all {request.num_tokens} tokens computed and got no token")

    def _check_awaited(self, record: StepRecord) -> None:
        """In a pipeline: a request whose known tokens are all computed gets a token before the pipeline is empty again.

        At most `num_stages` steps are in flight, and each record starts or ends one.
        """
        for entry in record["sched"]:
            request = self.replay.requests.get(entry["req"])
            if request is not None and entry["req"] in self.replay.running and _is_computed(request):
                self.awaited.setdefault(entry["req"], record["step"])
                self.late.discard(entry["req"])
        for request_id in [r for r, step in self.awaited.items() if record["step"] - step > 2 * self.num_stages]:
            del self.awaited[request_id]
            self.report("no-token", f"{request_id} has all its tokens computed and got no token")

    def _check_queues(self, record: StepRecord) -> None:
        replay, queues = self.replay, record["queues"]
        running, waiting = queues["running"], queues.get("waiting")
        order: Callable[[list[str]], list[str]] = list if self.rank is None else sorted
        if running != replay.running:
            self.report("queues", f"the engine runs {_names(running)}; by the events {_names(replay.running)}")
            replay.running = list(running)
        if queues["num_waiting"] != len(replay.waiting) or (
            waiting is not None and order(waiting) != order(replay.waiting)
        ):
            told = f"{queues['num_waiting']} requests" if waiting is None else _names(waiting)
            self.report("queues", f"in the engine {told} wait; by the events {_names(replay.waiting)}")
            if waiting is not None:
                replay.waiting = list(waiting)
        if both := set(running) & set(waiting or ()):
            self.report("queues", f"{_names(sorted(both))} both waits and runs")


def _rank_of_queue(config: dict[str, Any]) -> Callable[[ReplayedRequest], int] | None:
    """The rank that the queue of this run should admit by: a line of RANKS, or 0 for all if the queue is not known."""
    policy: str = config["scheduling_policy"]
    replaced = f"core.request_queue.{policy}" in (config.get("parts") or {})
    return (lambda request: 0) if replaced or policy not in RANKS else RANKS[policy]


def _is_computed(request: ReplayedRequest) -> bool:
    """Whether all its known tokens are computed, so that the next one is sampled."""
    return request.num_computed_tokens >= request.num_tokens


def _names(request_ids: Iterable[str], limit: int = 8) -> str:
    """E.g. "r1, r2, r3", "no request", or "r1, ..., and 40 more"."""
    names = list(request_ids)
    rest = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest or "no request"
