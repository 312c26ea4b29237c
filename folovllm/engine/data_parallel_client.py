"""DataParallelClient: several engines with all weights each, which look like one to the front end.

Milestone: M10. vLLM counterparts: `DPLBAsyncMPClient` in vllm/v1/engine/core_client.py and `DPCoordinator` in
vllm/v1/engine/coordinator.py. There the death of one engine ends the server; here it is started again. There
an engine whose process is stopped is waited for; here it is killed after data_parallel_heartbeat_timeout.
Left out: several front ends, waves (experts that all engines share), adding engines while the server runs.

    AsyncLLM --send()--> DataParallelClient --Router--> CoreClient 0 --> EngineCoreLoop 0
             <-receive-                     <---------- CoreClient 1 <-- EngineCoreLoop 1

    AddRequests      to the replica that the router chooses; the children of a request with n > 1 stay together
    AbortRequests    to the replicas that have the requests
    Call             to all replicas; their answers become one
    StepOutputs      of any replica: its outputs, and the statistics of all, summed up and one by one

Every method but `close` belongs to the thread of the event loop, so nothing needs a lock but the end of all.
Row 3, without torch.
"""

import asyncio
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from folovllm.engine.core_client import CoreClient, EngineDeadError
from folovllm.engine.core_loop import describe
from folovllm.engine.messages import (
    AbortRequests,
    AddRequests,
    Call,
    CallResult,
    Dead,
    DownMessage,
    StartFailed,
    StepOutputs,
    UpMessage,
)
from folovllm.engine.router import LeastLoadedRouter, Router
from folovllm.engine.sent_requests import SentRequest, SentRequests
from folovllm.engine.stats_sum import ReplicaStats, sum_stats
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request

logger = logging.getLogger(__name__)

MIN_DEATHS = 3  # so many, but at least one more than there are replicas, without a request that ends between them,
SECONDS_OF_DEATHS = 60.0  # and within this time, end the server
SECONDS_TO_START = 900.0  # a replica that is not ready by then is killed
SECONDS_TO_END = 10.0
LONGEST_PAUSE = 30.0  # seconds before a replica that dies again and again is started once more
WATCH_CALL = -1  # the ids of calls that are our own are negative

MakeClient = Callable[[int], CoreClient]


@dataclass
class Replica:
    """One of the engines. While it is not alive, `client` is the dead one, or one that starts."""

    index: int
    client: CoreClient
    is_alive: bool = False
    stats: ReplicaStats = field(default_factory=ReplicaStats)
    num_deaths: int = 0  # since it last ended a request


@dataclass
class PendingCall:
    """A call that some replicas have not answered yet."""

    call: Call
    replicas: set[int]
    values: list[Any] = field(default_factory=list)
    error: str | None = None


class DataParallelClient(CoreClient):
    """`make_client(i)` makes the client of replica i, also when that replica is started again."""

    def __init__(
        self,
        make_client: MakeClient,
        num_replicas: int,
        router_class: Callable[[int, int, int], Router],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._make_client, self._make_router, self._clock = make_client, router_class, clock
        self.replicas = [Replica(index, make_client(index)) for index in range(num_replicas)]
        self._router: Router = LeastLoadedRouter(num_replicas, 1, 0)  # until the size of the caches is known
        self._fallback = LeastLoadedRouter(num_replicas, 1, 0)
        self._requests = SentRequests(num_replicas)
        self._calls: dict[int, PendingCall] = {}
        self._is_watched = False
        self._pings: dict[int, SentRequest] = {}  # call id -> the suspect that was sent just before
        self._ping_ids = itertools.count(WATCH_CALL - 1, -1)
        # When, since a request has ended.
        self._deaths: deque[float] = deque(maxlen=max(MIN_DEATHS, num_replicas + 1))
        self._is_dead = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()  # no replica is launched once `close` has begun

    # ---- the start

    def launch(self) -> None:
        for replica in self.replicas:
            replica.client.launch()
        self._spawn(self._become_ready())

    async def _become_ready(self) -> None:
        """Says that all are ready, or why one is not."""
        try:
            answers = await asyncio.gather(*(replica.client.ready() for replica in self.replicas))
            # Their caches differ if each took what memory was free.
            ready = min(answers, key=lambda answer: answer.kv_cache_config.num_blocks)
            has_cache = ready.config.cache_config.enable_prefix_caching
            num_blocks = ready.kv_cache_config.num_usable_blocks if has_cache else 0
            self._router = self._make_router(len(self.replicas), ready.kv_cache_config.block_size, num_blocks)
        except Exception as error:
            self._take(StartFailed(cause_of(error), isinstance(error, ValueError)))
            return
        self._take(ready)
        self._report([])  # the statistics of every engine are there from the beginning
        for replica in self.replicas:
            self._join(replica)

    def _join(self, replica: Replica) -> None:
        """A replica is ready: it takes part from now on."""
        replica.is_alive = True
        if self._is_watched:
            replica.client.send(Call(WATCH_CALL, "watch"))
        replica.client.subscribe(functools.partial(self._on_message, replica, replica.client))

    @property
    def num_alive(self) -> int:
        return len(self._alive())

    def _alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_alive]

    # ---- on the way down

    def send(self, message: DownMessage) -> None:
        if self._is_dead:
            return
        if isinstance(message, AddRequests):
            self._add(message.requests)
        elif isinstance(message, AbortRequests):
            self._abort(message.request_ids)
        elif isinstance(message, Call):
            self._call(message)

    def _add(self, requests: Sequence[Request]) -> None:
        sent = [self._requests.add(request) for request in requests]
        try:
            if self._requests.is_searching:
                self._send_waiting()  # one by one
            else:
                self._send_together(sent)
        except BaseException:  # e.g. it cannot be pickled
            self._requests.withdraw(sent)
            raise

    def _abort(self, request_ids: Iterable[str]) -> None:
        by_replica: dict[int, list[str]] = {}
        ended = list[EngineCoreOutput]()
        for sent in self._requests.abort(request_ids):
            request_id = sent.request.request_id
            if sent.replica is None:
                ended.append(EngineCoreOutput(request_id, [], finish_reason="abort"))
            else:  # e.g. its text has ended with a stop string
                by_replica.setdefault(sent.replica, []).append(request_id)
                self._tell_router("finished", sent.request, sent.replica, sent.output_token_ids)
        for index, ids in by_replica.items():
            self.replicas[index].client.send(AbortRequests(ids))
        if ended:  # not at once: the front end is in the middle of ending them
            self._event_loop.call_soon(self._report, ended)

    def _send_together(self, sent: Sequence[SentRequest]) -> None:
        """Sends new requests to the replica that the router chooses for the first. They wait if there is none."""
        by_replica: dict[int, list[SentRequest]] = {}
        chosen = -1
        for entry in sent:
            places = self._places(entry)
            if not places:
                return
            if chosen not in places:
                chosen = self._route(entry.request, places)
            by_replica.setdefault(chosen, []).append(entry)
        for index, entries in by_replica.items():
            self._send_to(index, entries)

    def _send_waiting(self) -> None:
        """Sends what waits for a replica, as far as one may have it now."""
        for entry in self._requests.waiting():
            if places := self._places(entry):
                try:
                    self._send_to(self._route(entry.request, places), [entry])
                except Exception:
                    logger.exception("request %s could not be sent", entry.request.request_id)
                    self._requests.withdraw([entry])
                    self._report([EngineCoreOutput(entry.request.request_id, [], finish_reason="error")])

    def _places(self, sent: SentRequest) -> list[int]:
        places = self._requests.places(sent, [replica.index for replica in self._alive()])
        return [index for index in places if self._requests.keeps_trials_clear(sent, index)]

    def _send_to(self, index: int, entries: Sequence[SentRequest]) -> None:
        self.replicas[index].client.send(AddRequests([entry.continuation() for entry in entries]))
        for entry in entries:
            self._requests.assign(entry, index)
            self._tell_router("started", entry.request, index)
            if entry.is_suspect:
                self._ping(entry)

    def _ping(self, suspect: SentRequest) -> None:
        """Asks the replica to say that the suspect has arrived. It answers before it computes the next step."""
        assert suspect.replica is not None
        call_id = next(self._ping_ids)
        self._pings[call_id] = suspect
        self.replicas[suspect.replica].client.send(Call(call_id, "ping"))

    def _route(self, request: Request, places: Sequence[int]) -> int:
        """The router's choice. The router may be a learner's: a fault in it must not lose a request."""
        if len(places) == 1:
            return places[0]
        loads = [self._requests.load(index) for index in places]
        try:
            chosen = self._router.route(request, loads)
            if chosen in places:
                return chosen
            logger.error("the router chose replica %r, and the choice was among %s", chosen, places)
        except Exception:
            logger.exception("the router raised")
        return self._fallback.route(request, loads)

    def _tell_router(self, name: str, *args: Any) -> None:
        try:
            getattr(self._router, name)(*args)
        except Exception:
            logger.exception("the router's %s raised", name)

    def _call(self, call: Call) -> None:
        if call.name in ("watch", "unwatch"):
            self._is_watched = call.name == "watch"
            self._event_loop.call_soon(self._tell_watchers_of_the_dead, self.replicas)
        alive = self._alive()
        self._calls[call.call_id] = PendingCall(call, {replica.index for replica in alive})
        for replica in alive:
            replica.client.send(call)
        if not alive:  # a replica that starts has nothing that a call could change
            self._event_loop.call_soon(self._answer_calls)

    # ---- on the way up

    def _on_message(self, replica: Replica, client: CoreClient, message: UpMessage) -> None:
        if not replica.is_alive or replica.client is not client:
            return
        if isinstance(message, StepOutputs):
            self._on_step(replica, message)
        elif isinstance(message, CallResult):
            self._on_call_result(replica, message)
        elif isinstance(message, Dead):
            self._on_death(replica, message.cause)

    def _on_step(self, replica: Replica, message: StepOutputs) -> None:
        for output in message.outputs:
            output.replica = replica.index
        for sent, last in self._requests.receive(message.outputs):
            self._tell_router("finished", sent.request, replica.index, sent.output_token_ids)
            if last.finish_reason != "error":
                self._deaths.clear()
                replica.num_deaths = 0
        replica.stats.update(message.stats)
        self._report(message.outputs, [record | {"replica": replica.index} for record in message.records])
        if self._requests.num_waiting:  # a suspect may have been acquitted
            self._send_waiting()

    def _report(self, outputs: list[EngineCoreOutput], records: Iterable[dict[str, Any]] = ()) -> None:
        stats = sum_stats([replica.stats.total for replica in self.replicas], self._requests.num_waiting)
        self._take(StepOutputs(outputs, stats, list(records)))

    def _tell_watchers_of_the_dead(self, replicas: Iterable[Replica]) -> None:
        """A watcher would take the last step of a dead engine for its present state."""
        dead = [{"type": "dead", "replica": replica.index} for replica in replicas if not replica.is_alive]
        if dead and self._is_watched:
            self._report([], dead)

    def _on_call_result(self, replica: Replica, result: CallResult) -> None:
        if suspect := self._pings.pop(result.call_id, None):
            suspect.has_arrived = True
        pending = self._calls.get(result.call_id)
        if pending is None:
            return
        if pending.call.name == "reset_prefix_cache" and result.value is True:
            self._tell_router("forget", replica.index)
        pending.replicas.discard(replica.index)
        pending.values.append(result.value)
        pending.error = pending.error or result.error
        self._answer_calls()

    def _answer_calls(self) -> None:
        """Answers the calls that no replica has still to answer: True unless one has answered False."""
        for call_id in [call_id for call_id, pending in self._calls.items() if not pending.replicas]:
            pending = self._calls.pop(call_id)
            self._take(CallResult(call_id, False not in pending.values, pending.error))

    # ---- death and restart

    def _on_death(self, replica: Replica, cause: str) -> None:
        replica.is_alive = False
        replica.stats.restart()
        self._tell_router("forget", replica.index)
        count = self._requests.load(replica.index).num_requests
        logger.error("engine %d is dead, with %d requests: %s", replica.index, count, cause)
        self._pings = {i: suspect for i, suspect in self._pings.items() if suspect.replica != replica.index}
        ended = self._requests.lose(replica.index)
        for output in ended:
            if output.finish_reason == "error":
                logger.error("request %s fails: several engines have died with it", output.request_id)
                self._deaths.clear()
        for pending in self._calls.values():
            pending.replicas.discard(replica.index)
        self._report(ended)
        self._tell_watchers_of_the_dead([replica])
        self._answer_calls()
        self._send_waiting()
        self._deaths.append(self._clock())
        self._start_again(replica, cause)

    def _start_again(self, replica: Replica, cause: str) -> None:
        """Starts a dead replica again, or gives up."""
        if self._is_closing or self._is_dead:
            return
        replica.num_deaths += 1
        if len(self._deaths) == self._deaths.maxlen and self._deaths[-1] - self._deaths[0] <= SECONDS_OF_DEATHS:
            self._is_dead = True
            for other in self.replicas:
                other.is_alive = False
            within = f"{len(self._deaths)} engines have died within {SECONDS_OF_DEATHS:g} s, and no request has ended"
            self._take(Dead(f"{within}; the last one: {cause}"))
        else:
            self._spawn(self._restart(replica))

    async def _restart(self, replica: Replica) -> None:
        await asyncio.to_thread(replica.client.close, SECONDS_TO_END)  # it has the memory that the new one needs
        await asyncio.sleep(pause_before_start(replica.num_deaths))
        try:
            with self._lock:
                if self._is_closing or self._is_dead:
                    return
                replica.client = self._make_client(replica.index)
                replica.client.launch()
            async with asyncio.timeout(SECONDS_TO_START):
                await replica.client.ready()
        except TimeoutError:
            self._on_failed_start(replica, f"it was not ready after {SECONDS_TO_START:g} s")
        except Exception as error:
            self._on_failed_start(replica, f"it could not be started again: {cause_of(error)}")
        else:
            if self._is_closing or self._is_dead:
                return
            logger.info("engine %d is ready again", replica.index)
            self._join(replica)
            self._send_waiting()

    def _on_failed_start(self, replica: Replica, cause: str) -> None:
        """It counts as a death only if no other replica serves meanwhile."""
        if not self._is_closing:
            logger.error("engine %d: %s", replica.index, cause)
        if not self._alive():
            self._deaths.append(self._clock())
        self._start_again(replica, cause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- the end

    def close(self, timeout: float = 10.0) -> None:
        with self._lock:
            self._is_closing = True
            clients = [replica.client for replica in self.replicas]
        with ThreadPoolExecutor(len(clients)) as pool:
            list(pool.map(lambda client: client.close(timeout), clients))


def pause_before_start(num_deaths: int) -> float:
    """Seconds: none after the first death, then 1, 2, 4, ..."""
    return 0.0 if num_deaths <= 1 else min(2.0 ** (num_deaths - 2), LONGEST_PAUSE)


def cause_of(error: Exception) -> str:
    """What a person reads. The texts of our own errors stand alone."""
    return str(error) if isinstance(error, ValueError | EngineDeadError) else describe(error)
