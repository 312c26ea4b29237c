"""Recorder: makes a record of what every step decided. NullTrace: does nothing, so that the engine needs no "if".

Milestone: M2. vLLM counterpart: none.

Row 1: no torch. The recorder makes records and hands each line to `emit`. Two classes inherit from it: TraceWriter
(writer.py) writes the lines to a file, LiveTrace (live.py) hands them to watchers. It only looks: at the messages that
pass between scheduler and executor, and at public state of the scheduler. Blocks come from two sides on purpose.
"alloc" is what the message told the worker, `table` is what the KV cache manager believes; a lint that finds them
different has found a bug.

Cost: a step of 32 decodes takes about a tenth of a millisecond (`pytest -s tests/m2/test_trace_cost.py` prints it). It
does not depend on the length of the queue, and on that of a prompt only in the step in which its table grows.
"""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from folovllm.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request, RequestStatus
from folovllm.trace.record import VERSION, Event, SchedEntry

MAX_WAITING_SHOWN = 64  # ids of a longer queue are not written: a step must not cost more because many wait


class NullTrace:
    """The trace switched off, and the interface of one that is on. EngineCore calls these in the order below."""

    def added(self, request: Request) -> None:
        """A request joined the queue."""

    def finished(self, scheduler: Scheduler, requests: Iterable[Request]) -> None:
        """`requests` were ended from outside: an abort, an error."""

    def preempted(self, scheduler: Scheduler, requests: Iterable[Request]) -> None:
        """`requests` were put back into the queue between two steps."""

    def begin_step(self, scheduler: Scheduler) -> None:
        """A step is about to be scheduled. If another one was, and has no record yet, it is on its way now."""

    def begin(self, span: str) -> None:
        """The part `span` of a step begins; the one before it ends."""

    def scheduled(self, scheduler: Scheduler, output: SchedulerOutput) -> None:
        """The scheduler has decided; nothing is computed yet."""

    def end_step(self, scheduler: Scheduler, outputs: Iterable[EngineCoreOutput]) -> None:
        """The step is over."""

    def recovered(self, scheduler: Scheduler) -> "NullTrace":
        """An exception came out of the engine, which has repaired itself. Returns the trace to go on with."""
        return self

    def close(self) -> None:
        """No more steps will come."""


def _noting(method: Callable[..., None]) -> Callable[..., None]:
    """Marks the recorder as in the middle of its work: an exception then leaves the mark."""

    @functools.wraps(method)
    def marked(self: "Recorder", *args: Any) -> None:
        self._is_noting = True
        method(self, *args)
        self._is_noting = False

    return marked


@dataclass
class Seen:
    """What the trace knows of an unfinished request."""

    request: Request
    num_prompt_tokens: int
    num_tokens: int
    table: list[int] = field(default_factory=list)
    is_running: bool = False  # by the events so far


class Recorder(NullTrace, ABC):
    """Makes the records. `clock` tells the time in seconds; a simulator has a clock of its own."""

    def __init__(self, header: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._origin = clock, clock()
        self._limits = (header["config"]["max_num_batched_tokens"], header["config"]["max_num_seqs"])
        self._seen: dict[str, Seen] = {}
        self._shared: set[int] = set()  # blocks that were hit: only they can have several holders
        self._running: list[str] = []  # as last written
        self._num_steps = 0
        self._is_noting = False  # in the middle of its own work
        self._reset()

    # ---- what becomes of the records

    @abstractmethod
    def emit(self, line: dict[str, Any]) -> None:
        """Takes a finished record."""

    def went_idle(self) -> None:
        """No request is left, so this is the moment for work that takes time."""

    @abstractmethod
    def lost_track(self, scheduler: Scheduler) -> NullTrace:
        """What happened in the engine cannot be told. Returns the trace to go on with."""

    def shown_tokens(self, token_ids: list[int]) -> list[int] | int:
        """What a "sample" event says: the token ids or, if they are private, their number."""
        return token_ids

    def _reset(self) -> None:
        """Nothing is known of the next step yet."""
        self._events: list[Event] = []
        self._copies: dict[int, int] = {}  # destination block -> source
        self._sched: list[SchedEntry] = []
        self._num_used = self._num_planned = 0
        self._is_scheduled = False  # a step belongs to the record
        self._queues_changed = False
        self._marks: list[tuple[str, float]] = []  # (span, when it began)

    # ---- between steps, or in the middle of one

    @_noting
    def added(self, request: Request) -> None:
        # A request that another engine began brings tokens of its answer. To this engine they are a part of the prompt.
        num_tokens, num_left = request.num_tokens, request.max_tokens - request.num_output_tokens
        self._seen[request.request_id] = Seen(request, num_tokens, num_tokens)
        self._events.append(["add", request.request_id, num_tokens, num_left, request.priority])
        self._queues_changed = True

    @_noting
    def finished(self, scheduler: Scheduler, requests: Iterable[Request]) -> None:
        for request in requests:
            self._note_finish(scheduler, request.request_id, RequestStatus.get_finished_reason(request.status))

    @_noting
    def preempted(self, scheduler: Scheduler, requests: Iterable[Request]) -> None:
        for request in requests:
            self._note_requeue(scheduler, request)

    def recovered(self, scheduler: Scheduler) -> NullTrace:
        """Notes how the engine is now. If the executor failed, its step is recorded; if `schedule` failed, none is.

        If the engine has tokens that the trace has not seen, the trace cannot tell what happened.
        """
        unfinished = scheduler.requests
        gone = [seen.request for seen in self._seen.values() if not _is_served(scheduler, seen.request)]
        known = all(i in self._seen and self._seen[i].num_tokens == r.num_tokens for i, r in unfinished.items())
        if self._is_noting or not known:
            return self.lost_track(scheduler)
        self.finished(scheduler, gone)
        self.preempted(scheduler, [r for r in scheduler.waiting if self._seen[r.request_id].is_running][::-1])
        if self._is_scheduled:
            self.end_step(scheduler, [])
        self._marks = []
        return self

    def _note_requeue(self, scheduler: Scheduler, request: Request) -> None:
        self._events.append(["requeue", request.request_id])
        self._seen[request.request_id].is_running = False
        self._note_free(scheduler, request.request_id)
        self._queues_changed = True

    def _note_finish(self, scheduler: Scheduler, request_id: str, reason: str | None) -> None:
        self._events.append(["finish", request_id, reason])
        self._note_free(scheduler, request_id)
        del self._seen[request_id]
        self._queues_changed = True

    def _note_free(self, scheduler: Scheduler, request_id: str, has_new_table: bool = False) -> None:
        """Adds an event only if the blocks are really free: a request that keeps them is what the lint looks for."""
        seen = self._seen[request_id]
        if seen.table and (has_new_table or not scheduler.kv_cache_manager.get_block_ids(request_id)[0]):
            self._events.append(["free", request_id, seen.table])
            seen.table = []

    # ---- in a step

    def begin_step(self, scheduler: Scheduler) -> None:
        if self._is_scheduled:
            self.end_step(scheduler, [])
        self.begin("schedule")

    def begin(self, span: str) -> None:
        if not self._marks:  # the record of a step that only ends: what came before was decided between two steps
            self._num_planned = len(self._events)
        self._marks.append((span, self._clock()))

    @_noting
    def scheduled(self, scheduler: Scheduler, output: SchedulerOutput) -> None:
        self.begin("trace")  # what the trace itself costs is not hidden in the other spans
        ranks = {request_id: rank for rank, request_id in enumerate(self._running)} if output.preempted_req_ids else {}
        for request_id in sorted(output.preempted_req_ids, key=lambda r: (-ranks.get(r, -1), r)):  # last admitted first
            self._events.append(["preempt", request_id])
            self._seen[request_id].is_running = False
            self._note_free(scheduler, request_id, has_new_table=request_id in output.num_scheduled_tokens)
            self._queues_changed = True
        sent: dict[str, NewRequestData | CachedRequestData] = {new.request_id: new for new in output.scheduled_new_reqs}
        sent |= {cached.request_id: cached for cached in output.scheduled_cached_reqs}
        self._copies = {destination: source for source, destination in output.block_copies}
        self._sched = [self._entry(scheduler, sent[r], n) for r, n in output.num_scheduled_tokens.items()]
        self._num_used = output.total_num_scheduled_tokens
        self._num_planned = len(self._events)
        self._is_scheduled = True

    def _entry(self, scheduler: Scheduler, data: NewRequestData | CachedRequestData, n: int) -> SchedEntry:
        seen, start = self._seen[data.request_id], data.num_computed_tokens
        seen.is_running = True
        is_decode = n == 1 and seen.num_prompt_tokens <= start == seen.num_tokens - 1
        kind = "decode" if is_decode else "prefill"
        entry: SchedEntry = {"req": data.request_id, "kind": kind, "start": start, "n": n}
        joins = isinstance(data, NewRequestData) or data.resumed
        if joins and start > 0:
            entry["cached"] = start
        blocks = (data.block_ids if isinstance(data, NewRequestData) else data.new_block_ids)[0]
        if blocks:
            self._note_blocks(scheduler, data.request_id, blocks, num_hit_tokens=start if joins else 0)
            entry["table"] = seen.table = scheduler.kv_cache_manager.get_block_ids(data.request_id)[0]
        self._queues_changed |= joins
        return entry

    def _note_blocks(self, scheduler: Scheduler, request_id: str, blocks: list[int], num_hit_tokens: int) -> None:
        num_hits = num_hit_tokens // scheduler.kv_cache_manager.block_size
        if num_hits:
            self._events.append(["hit", request_id, blocks[:num_hits]])
            self._shared.update(blocks[:num_hits])
        if blocks[num_hits:]:
            self._events.append(["alloc", request_id, blocks[num_hits:]])
            if source := self._copies.get(blocks[num_hits]):
                length = num_hit_tokens - num_hits * scheduler.kv_cache_manager.block_size
                self._events.append(["copy", request_id, source, blocks[num_hits], length])

    @_noting
    def end_step(self, scheduler: Scheduler, outputs: Iterable[EngineCoreOutput]) -> None:
        self.begin("")  # ends the last span
        for output in outputs:
            self._events.append(["sample", output.request_id, self.shown_tokens(output.new_token_ids)])
            self._seen[output.request_id].num_tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._note_finish(scheduler, output.request_id, output.finish_reason)
        self.emit(self._record(scheduler))
        self._num_steps += 1
        self._reset()
        if not scheduler.has_unfinished_requests():
            self.went_idle()

    # ---- the record

    def _record(self, scheduler: Scheduler) -> dict[str, Any]:
        max_tokens, max_seqs = self._limits
        return {
            "v": VERSION,
            "step": self._num_steps,
            **self._times(),
            "budget": {"tokens": max_tokens, "used": self._num_used, "seqs": max_seqs},
            "sched": self._sched,
            "events": self._events,
            "planned": self._num_planned,
            "queues": self._queues(scheduler),
            "pool": self._pool(scheduler),
        }

    def _times(self) -> dict[str, Any]:
        t0, t1 = self._marks[0][1], self._marks[-1][1]
        following = (when for _, when in self._marks[1:])
        spans = {name: round(after - when, 6) for (name, when), after in zip(self._marks, following, strict=False)}
        return {"t0": round(t0 - self._origin, 6), "dur": round(t1 - t0, 6), "spans": spans}

    def _queues(self, scheduler: Scheduler) -> dict[str, Any]:
        num_waiting = len(scheduler.waiting)
        queues: dict[str, Any] = {"num_waiting": num_waiting}
        if self._queues_changed:
            few = num_waiting <= MAX_WAITING_SHOWN
            queues["waiting"] = [request.request_id for request in scheduler.waiting] if few else None
            queues["running"] = self._running = [request.request_id for request in scheduler.running]
        return queues

    def _pool(self, scheduler: Scheduler) -> dict[str, Any]:
        pool = scheduler.kv_cache_manager.block_pool
        counts = {block_id: pool.blocks[block_id].ref_cnt for block_id in self._shared}
        self._shared = {block_id for block_id, count in counts.items() if count > 1}
        cached = pool.num_free_cached_blocks
        ref = {block_id: counts[block_id] for block_id in sorted(self._shared)}
        return {"free": pool.get_num_free_blocks() - cached, "cached": cached, "ref": ref}


def _is_served(scheduler: Scheduler, request: Request) -> bool:
    return scheduler.requests.get(request.request_id) is request
