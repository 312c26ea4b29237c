"""LiveFeed: the records of a running engine, for the pages and programs that watch it.

Milestone: M8. vLLM counterpart: none.

Row 1: no torch. This is the engine's half; watch.py is the half of the front end. A trace file tells a run from its
beginning. A watcher comes later, so a live trace begins with a snapshot: a record whose events recreate the requests,
the queues and the block tables that are there. It has the form of a step, so what replays a trace replays it too.

    header     what drawing needs of the config and the KV cache; it names no path and nothing of the machine
    snapshot   its "type" is "snapshot", and its events are e.g. [["add", "r1", 20, 8, 0], ["sample", "r1", 5],
               ["alloc", "r1", [3, 9]], ["cached", "", [4, 6]]]; "cached" lists the free blocks that can still be hit
    records    one per step from here on, as in a file; now and then a header and a snapshot again

A live record has no token ids. A "sample" event has their number instead.

Cost: while a watcher is there, a step of 32 decodes takes about 50 microseconds longer, and a snapshot takes about 300
(`pytest -s tests/m8/test_live_trace.py -k cost` prints both). Without a watcher nothing is called.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request, RequestStatus
from folovllm.trace.header import make_header
from folovllm.trace.record import Event, SchedEntry
from folovllm.trace.recorder import NullTrace, Recorder, Seen

SNAPSHOT_EVERY = 1000  # steps; a page keeps the records since the last snapshot, and no more
SHOWN_CONFIG = (
    "batching",
    "block_size",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "long_prefill_token_threshold",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "reserve_full_sequence",
    "scheduling_policy",
)
Line = dict[str, Any]
logger = logging.getLogger(__name__)


def live_header(config: EngineConfig, kv_cache_config: KVCacheConfig) -> Line:
    """The header of a live trace. It is public, so it names nothing of the machine."""
    header = make_header(config, kv_cache_config)
    shown = {name: header["config"][name] for name in SHOWN_CONFIG}
    return {"type": "header", "v": header["v"], "config": shown, "kv": header["kv"]}


class LiveTrace(Recorder):
    """Hands its lines to `take_line`. It can begin at any moment between two steps, and begin again (`attach`)."""

    def __init__(
        self, header: Line, take_line: Callable[[Line], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(header, clock)
        self._header, self._take_line = header, take_line

    def emit(self, line: Line) -> None:
        self._take_line(line)

    def shown_tokens(self, token_ids: list[int]) -> int:
        return len(token_ids)

    def end_step(self, scheduler: Scheduler, outputs: Iterable[EngineCoreOutput]) -> None:
        super().end_step(scheduler, outputs)
        if self._num_steps % SNAPSHOT_EVERY == 0:
            self.attach(scheduler)

    def lost_track(self, scheduler: Scheduler) -> NullTrace:
        """Begins again with the engine as it is now."""
        self.attach(scheduler)
        return self

    @property
    def has_pending_events(self) -> bool:
        """Whether something has happened since the last record."""
        return bool(self._events)

    def attach(self, scheduler: Scheduler) -> None:
        """Emits the header and a snapshot of the present state. Call it between two steps."""
        self._reset()
        self._is_noting = False
        self._num_steps = max(self._num_steps, scheduler.num_steps)  # a pipeline also records steps that only end
        tables = {r.request_id: scheduler.kv_cache_manager.get_block_ids(r.request_id)[0] for r in scheduler.running}
        holders = Counter(block for table in tables.values() for block in table)
        self._shared = {block for block, count in holders.items() if count > 1}
        requests = [*scheduler.running, *scheduler.waiting]
        self._seen = {r.request_id: _seen(r, tables.get(r.request_id)) for r in requests}
        self._events = list(_snapshot_events(scheduler, tables))
        self._num_planned = len(self._events)
        self._sched = [_computed(request) for request in scheduler.running]
        self._queues_changed = True
        self._marks = [("", self._clock())] * 2
        self.emit(self._header)
        self.emit({"type": "snapshot", **self._record(scheduler), "step": self._num_steps - 1})
        self._reset()


def _seen(request: Request, table: list[int] | None) -> Seen:
    return Seen(request, request.num_prompt_tokens, request.num_tokens, table or [], is_running=table is not None)


def _snapshot_events(scheduler: Scheduler, tables: dict[str, list[int]]) -> Iterator[Event]:
    """The shortest story that ends in the present state, apart from the computed tokens."""
    waiting = list(scheduler.waiting)
    for request in [*scheduler.running, *waiting]:
        yield ["add", request.request_id, request.num_prompt_tokens, request.max_tokens, request.priority]
        if request.num_output_tokens:
            yield ["sample", request.request_id, request.num_output_tokens]
    requeued = [request for request in waiting if request.status == RequestStatus.PREEMPTED]
    if requeued and scheduler.scheduling_policy == "fcfs":
        # Those ahead of a preempted request were requeued as well, because their step failed: new ones queue behind.
        requeued = waiting[: waiting.index(requeued[-1]) + 1]
    for request in reversed(requeued):
        yield ["requeue", request.request_id]
    for request_id, table in tables.items():
        yield ["alloc", request_id, table]
    pool = scheduler.kv_cache_manager.block_pool
    if pool.num_free_cached_blocks:
        is_cached = (block for block in pool.blocks if block.ref_cnt == 0 and block.block_hash is not None)
        yield ["cached", "", [block.block_id for block in is_cached]]


def _computed(request: Request) -> SchedEntry:
    """What a running request has computed so far, as if one step had done it."""
    entry: SchedEntry = {"req": request.request_id, "kind": "prefill", "start": 0, "n": request.num_computed_tokens}
    if request.num_cached_tokens > 0 and not request.num_preemptions:
        entry["cached"] = request.num_cached_tokens
    return entry


class WatchedTrace(NullTrace):
    """Tells `base`, the engine's own trace, and `live`. An exception in `live` ends the watching, never a request."""

    def __init__(self, base: NullTrace, live: NullTrace) -> None:
        self.base, self.live = base, live

    def _tell(self, name: str, *args: Any) -> None:
        try:
            getattr(self.live, name)(*args)
        except Exception:
            logger.exception("the live trace ends until the next snapshot")
            self.live = NullTrace()

    def added(self, request: Request) -> None:
        self.base.added(request)
        self._tell("added", request)

    def finished(self, scheduler: Scheduler, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self.base.finished(scheduler, requests)
        self._tell("finished", scheduler, requests)

    def preempted(self, scheduler: Scheduler, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self.base.preempted(scheduler, requests)
        self._tell("preempted", scheduler, requests)

    def begin_step(self, scheduler: Scheduler) -> None:
        self.base.begin_step(scheduler)
        self._tell("begin_step", scheduler)

    def begin(self, span: str) -> None:
        self.base.begin(span)
        self._tell("begin", span)

    def scheduled(self, scheduler: Scheduler, output: SchedulerOutput) -> None:
        self.base.scheduled(scheduler, output)
        self._tell("scheduled", scheduler, output)

    def end_step(self, scheduler: Scheduler, outputs: Iterable[EngineCoreOutput]) -> None:
        outputs = list(outputs)
        self.base.end_step(scheduler, outputs)
        self._tell("end_step", scheduler, outputs)

    def recovered(self, scheduler: Scheduler) -> NullTrace:
        self.base = self.base.recovered(scheduler)
        self._tell("recovered", scheduler)
        return self

    def close(self) -> None:
        self.base.close()
        self._tell("close")


class Traced(Protocol):
    """What a feed needs of an EngineCore."""

    config: EngineConfig
    kv_cache_config: KVCacheConfig
    scheduler: Scheduler
    trace: NullTrace


class LiveFeed:
    """Switches the live trace of `core` on and off. While it is off, the engine's trace is untouched and costs nothing.

    Every method is called between two steps, in the thread of the engine.
    """

    def __init__(self, core: Traced) -> None:
        self._core = core
        self._lines: list[Line] = []
        self._live = LiveTrace(live_header(core.config, core.kv_cache_config), self._add_line)
        self._watched: WatchedTrace | None = None  # None: switched off
        self._is_asked = False  # for a snapshot

    def _add_line(self, line: Line) -> None:
        self._lines.append(line)

    def snapshot(self) -> None:
        """Switches on, if it is off. The next `take` has a header and a snapshot: a watcher has come, or lost records.

        Many watchers that come between two steps cost one snapshot.
        """
        if self._watched is None:
            self._core.trace = self._watched = WatchedTrace(self._core.trace, NullTrace())
        self._is_asked = True
        if self._watched.live is not self._live:  # it has just been switched on, or had ended by a fault
            self._attach()
            self._watched.live = self._live

    def _attach(self) -> None:
        self._is_asked = False
        self._live.attach(self._core.scheduler)

    def stop(self) -> None:
        """Switches off. What has not been taken is dropped."""
        if self._watched is not None:
            self._core.trace, self._watched = self._watched.base, None
        self._lines, self._is_asked = [], False

    def take(self) -> list[Line]:
        """The lines since the last call, oldest first.

        If the last requests were aborted, no step follows whose record would tell of it, so a snapshot does.
        """
        is_idle = not self._core.scheduler.has_unfinished_requests()
        if self._watched is not None and (self._is_asked or (is_idle and self._live.has_pending_events)):
            self._attach()
        lines, self._lines = self._lines, []
        return lines
