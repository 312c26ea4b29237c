"""EngineCore: the inner loop. One step is schedule -> execute -> sample -> update.

Milestone: M1. vLLM counterpart: vllm/v1/engine/core.py. Left out: the process boundary, batch queues, KV connectors.

Row 1: no torch. What computes is behind the Executor.

An exception may come out of every line: the executor's, a bug's, or that of a signal handler (Ctrl-C). Each public call
either does its work, or leaves the engine as if it had not been made, and raises what was raised:

    add_request      the request is not there
    abort_requests   the requests are gone
    step             its requests have ended with an error, or those that the caller blames; others have lost nothing
"""

import enum
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import make_kv_cache_config
from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.executor.base import Executor
from folovllm.interrupts import HeldInterrupts
from folovllm.outputs import EngineCoreOutput, EngineStats
from folovllm.parts import load_part
from folovllm.request import Request, RequestStatus
from folovllm.trace.recorder import NullTrace
from folovllm.trace.writer import make_trace

logger = logging.getLogger(__name__)

REPAIR_ATTEMPTS = 3


class StepConsumer(Protocol):
    """What receives the outputs of a step as a part of that step."""

    def process(self, outputs: list[EngineCoreOutput]) -> None:
        """Takes the outputs. If it raises, the step is undone."""

    def take_back(self) -> None:
        """The step is undone: returns to the state before `process`, whether or how far that ran."""


class Phase(enum.Enum):
    """How far a step has come."""

    SCHEDULE = enum.auto()
    EXECUTE = enum.auto()
    UPDATE = enum.auto()
    COMMITTED = enum.auto()  # from here on nothing is taken back


class EngineCore:
    """Scheduler and executor, and the order in which they are called. `config` must be resolved.

    `trace` is told of everything; by default it is what `config.trace` asks for.
    """

    def __init__(self, config: EngineConfig, executor: Executor, trace: NullTrace | None = None) -> None:
        self.config = config
        self.executor = executor
        self.kv_cache_config = make_kv_cache_config(config, executor.available_kv_cache_bytes())
        executor.initialize_kv_cache(self.kv_cache_config)
        self.scheduler: Scheduler = load_part("core.scheduler", config.parts)(config, self.kv_cache_config)
        self.trace = trace or make_trace(config, self.kv_cache_config)
        self.last_scheduled: SchedulerOutput | None = None  # of the latest step, also if it raised
        self._is_broken = False  # an exception came, and the state is not repaired yet

    # ---- requests

    def add_request(self, request: Request) -> None:
        """Queues a request. Raises ValueError, and changes nothing, if its id is in use."""
        self._settle()
        was_there = self.serves(request)
        try:
            self.scheduler.add_request(request)
            self.trace.added(request)
        except BaseException:
            if self.serves(request) and not was_there:
                self._repair(lambda _: self.scheduler.recover([request], RequestStatus.FINISHED_ERROR))
            raise

    def abort_requests(
        self, request_ids: Iterable[str], status: RequestStatus = RequestStatus.FINISHED_ABORTED
    ) -> None:
        """Ends requests at any moment, with `status`. Unknown ids are ignored."""
        self._settle()
        ids = list(request_ids)
        requests = [self.scheduler.requests[i] for i in ids if i in self.scheduler.requests]
        try:
            finished = self.scheduler.finish_requests(ids, status)
            self.trace.finished(self.scheduler, finished)
        except BaseException:
            self._repair(lambda _: self.scheduler.recover(requests, status))
            raise

    def reset_prefix_cache(self, reset_running: bool = False) -> bool:
        """Forgets all cached blocks.

        While requests run, it returns False and changes nothing, unless `reset_running` lets it preempt them.
        """
        self._settle()
        running = list(self.scheduler.running) if reset_running else []
        try:
            done = self.scheduler.reset_prefix_cache(reset_running)
            self.trace.preempted(self.scheduler, running[::-1])
        except BaseException:
            self._repair(lambda _: self.scheduler.recover([], RequestStatus.FINISHED_ERROR))
            raise
        return done

    def has_unfinished_requests(self) -> bool:
        self._settle()
        return self.scheduler.has_unfinished_requests()

    # ---- one step

    def step(
        self, consumer: StepConsumer | None = None, blamed: Collection[str] | None = None
    ) -> list[EngineCoreOutput]:
        """Runs one step and returns the outputs of the requests that got a token.

        If anything in it raises, the requests of the step end, or those of them whose ids are in `blamed`. All others
        have what they had before the step, and the exception goes on to the caller. `consumer` is part of the step.
        """
        self._settle()
        if not self.scheduler.has_requests():
            return []
        phase, scheduler_output = Phase.SCHEDULE, None
        self.last_scheduled = None
        try:
            self.trace.begin("schedule")
            scheduler_output = self.last_scheduled = self.scheduler.schedule()
            phase = Phase.EXECUTE
            self.trace.scheduled(self.scheduler, scheduler_output)
            self.trace.begin("forward")
            handle = self.executor.execute(scheduler_output)
            self.trace.begin("sample")
            runner_output = self.executor.sample(handle)
            phase = Phase.UPDATE
            self.trace.begin("update")
            outputs = self.scheduler.update_from_output(scheduler_output, runner_output)
            if consumer is not None:
                consumer.process(outputs)
            phase = Phase.COMMITTED
            self.scheduler.commit_step()
            self.trace.end_step(self.scheduler, outputs)
            if not self.scheduler.has_unfinished_requests():
                self.scheduler.check_integrity()  # the engine is idle: a leaked block shows now
        except BaseException:
            self._repair(lambda is_first: self._undo_step(phase, scheduler_output, consumer, blamed, is_first))
            raise
        return outputs

    def stats(self) -> EngineStats:
        return self.scheduler.make_stats()

    def shutdown(self) -> None:
        self.trace.close()
        self.executor.shutdown()

    # ---- after an exception

    def _undo_step(
        self,
        phase: Phase,
        scheduler_output: SchedulerOutput | None,
        consumer: StepConsumer | None,
        blamed: Collection[str] | None,
        is_first_attempt: bool,
    ) -> None:
        """Ends a step that raised in `phase`.

        If the executor raised, the scheduler's own state is whole, and what earlier steps have computed is kept.
        Otherwise, or if that was interrupted, the scheduler starts afresh.
        """
        if phase is Phase.COMMITTED:
            self.scheduler.commit_step()
            self.scheduler.recover([], RequestStatus.FINISHED_ERROR)
            return
        if consumer is not None:
            consumer.take_back()
        if phase is Phase.EXECUTE and scheduler_output is not None and is_first_attempt:
            self.scheduler.fail_step(scheduler_output, blamed)
            return
        under_way = self.scheduler.requests_under_way()
        ended = [request for request in under_way if blamed is None or request.request_id in blamed]
        self.scheduler.recover(ended, RequestStatus.FINISHED_ERROR)

    def _repair(self, repair: Callable[[bool], object]) -> None:
        """Runs `repair(is_first_attempt)` with Ctrl-C held back. If it is interrupted nevertheless, it runs again.

        What interrupts it is dropped: the exception that made the repair necessary is the one that the caller gets.
        """
        self._is_broken = True
        with HeldInterrupts(patience=None):
            for attempt in range(REPAIR_ATTEMPTS):
                try:
                    repair(attempt == 0)
                    self.trace = self.trace.recovered(self.scheduler)
                    self._is_broken = False
                    return
                except BaseException:
                    logger.exception("the repair of the engine after an exception was itself interrupted")

    def _settle(self) -> None:
        """Repairs what could not be repaired at the time. Raises RuntimeError if it cannot be repaired at all."""
        if self._is_broken:
            self._repair(lambda _: self.scheduler.recover([], RequestStatus.FINISHED_ERROR))
            if self._is_broken:
                raise RuntimeError("an exception left the engine in a state it cannot repair: make a new LLM")

    def serves(self, request: Request) -> bool:
        """Whether this very request is unfinished; another one may have its id."""
        return self.scheduler.requests.get(request.request_id) is request
