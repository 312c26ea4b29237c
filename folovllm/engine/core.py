"""EngineCore: the inner loop. One step is schedule -> execute -> sample -> update.

Milestone: M1, M9 (several steps in flight). vLLM counterpart: vllm/v1/engine/core.py, `step` and
`step_with_batch_queue`. Left out: the process boundary, KV connectors.

Row 1: no torch. What computes is behind the Executor. If the model is a pipeline of stages, a call of `step` first
starts steps until there is one per stage, and then ends the oldest: core/sched/steps_in_flight.py has an example and
the rules.

An exception may come out of every line: the executor's, a bug's, or that of a signal handler (Ctrl-C). Each public call
either does its work, or leaves the engine as if it had not been made, and raises what was raised:

    add_request      the request is not there
    abort_requests   the requests are gone
    step             its requests have ended with an error, or those that the caller blames; others have lost nothing,
                     neither those of other steps in flight, which are computed again
"""

import enum
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import make_kv_cache_config
from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler
from folovllm.executor.base import ExecuteHandle, Executor
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


@dataclass(slots=True)
class StartedStep:
    """A step between `execute` and `sample`. Without a handle, `execute` has not returned."""

    scheduler_output: SchedulerOutput
    handle: ExecuteHandle = None


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
        self.last_scheduled: SchedulerOutput | None = None  # of the step that raised; None: `schedule` did
        self._in_flight: deque[StartedStep] = deque()  # oldest first; empty between two calls if there is one stage
        self._max_in_flight = config.max_steps_in_flight
        if self._max_in_flight < config.parallel_config.pipeline_parallel_size:
            logger.warning("with a replaced scheduler or KV cache manager, the stages of the pipeline work in turns")
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
                self._repair(lambda _: self._recover([request]))
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
            self._repair(lambda _: self._recover(requests, status))
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
            self._repair(lambda _: self._recover([]))
            raise
        return done

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to do. After an abort, that may be a step in flight whose requests are gone."""
        self._settle()
        return self.scheduler.has_unfinished_requests() or bool(self._in_flight)

    # ---- one step

    def step(
        self, consumer: StepConsumer | None = None, blamed: Collection[str] | None = None
    ) -> list[EngineCoreOutput]:
        """Runs one step and returns the outputs of the requests that got a token.

        If the model has several stages, the step that ends is the oldest in flight, and others are started before.

        If anything in it raises, the requests of the step end, or those of them whose ids are in `blamed`. All others
        have what they had before the step, and the exception goes on to the caller. `consumer` is part of the step.
        """
        self._settle()
        if not (self._in_flight or self.scheduler.has_requests()):
            return []
        phase, step = Phase.SCHEDULE, None
        try:
            while self._has_room():
                phase, step = Phase.SCHEDULE, None
                self.trace.begin_step(self.scheduler)
                step = self._add_step(self.scheduler.schedule())
                if step is None:
                    break
                phase = Phase.EXECUTE
                self.trace.scheduled(self.scheduler, step.scheduler_output)
                self.trace.begin("forward")
                step.handle = self.executor.execute(step.scheduler_output)
            phase, step = Phase.EXECUTE, self._in_flight[0]
            self.trace.begin("sample")
            runner_output = self.executor.sample(step.handle)
            self.trace.begin("update")
            phase = Phase.UPDATE
            self._in_flight.popleft()
            outputs = self.scheduler.update_from_output(step.scheduler_output, runner_output)
            if consumer is not None:
                consumer.process(outputs)
            phase = Phase.COMMITTED
            self.scheduler.commit_step()
            self.trace.end_step(self.scheduler, outputs)
            if not self.has_unfinished_requests():
                self.scheduler.check_integrity()  # the engine is idle: a leaked block shows now
        except BaseException:
            scheduled = self.last_scheduled = None if step is None else step.scheduler_output
            self._repair(lambda is_first: self._undo_step(phase, scheduled, consumer, blamed, is_first))
            raise
        return outputs

    def _has_room(self) -> bool:
        """Whether to start one more step. The first is started even if it is empty, to tell which requests are gone."""
        if not self._in_flight:
            return True
        return len(self._in_flight) < self._max_in_flight and self.scheduler.can_start_step()

    def _add_step(self, scheduler_output: SchedulerOutput) -> StartedStep | None:
        """Adds a step to those in flight. If it is empty and others are in flight, it is taken back: returns None.

        Such a step would only have told the workers which requests have finished. The next step tells them.
        """
        if self._in_flight and scheduler_output.is_empty:
            self.trace.scheduled(self.scheduler, scheduler_output)  # it may have preempted
            self.scheduler.fail_step(scheduler_output, blamed=())
            return None
        step = StartedStep(scheduler_output)
        self._in_flight.append(step)
        return step

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

        It also does if other steps were in flight. E.g. S1 tells the workers the new blocks of a, and S2 continues a.
        If a worker raises in S1 before it has noted them, and then runs S2, it writes a's K/V into the blocks that a
        had before its last preemption, and they may be another request's now. So no block can be trusted.
        """
        if phase is Phase.COMMITTED:
            self.scheduler.commit_step()
            self._recover([])
            return
        if consumer is not None:
            consumer.take_back()
        num_in_flight = len(self._in_flight)
        self._discard_in_flight()
        if phase is Phase.EXECUTE and scheduler_output is not None and num_in_flight == 1 and is_first_attempt:
            self.scheduler.fail_step(scheduler_output, blamed)
            return
        under_way = self._requests_under_way(phase, scheduler_output)
        self._recover([request for request in under_way if blamed is None or request.request_id in blamed])

    def _requests_under_way(self, phase: Phase, scheduler_output: SchedulerOutput | None) -> list[Request]:
        """The requests of the step that raised."""
        if phase is Phase.EXECUTE and scheduler_output is not None:  # of several in flight, it need not be the latest
            requests = self.scheduler.requests
            return [requests[i] for i in scheduler_output.num_scheduled_tokens if i in requests]
        return self.scheduler.requests_under_way()

    def _discard_in_flight(self) -> None:
        """Waits for all steps in flight and drops their answers."""
        while self._in_flight:
            step = self._in_flight.popleft()
            try:
                if step.handle is not None:
                    self.executor.discard(step.handle)
            except Exception:  # what matters is the exception that made this necessary
                logger.exception("an exception came while the answer of a step in flight was dropped")

    def _recover(self, ended: Iterable[Request], status: RequestStatus = RequestStatus.FINISHED_ERROR) -> None:
        """Lets the scheduler build its state anew. `ended` leave with `status`."""
        self._discard_in_flight()
        self.scheduler.recover(ended, status)

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
            self._repair(lambda _: self._recover([]))
            if self._is_broken:
                raise RuntimeError("an exception left the engine in a state it cannot repair: make a new LLM")

    def serves(self, request: Request) -> bool:
        """Whether this very request is unfinished; another one may have its id."""
        return self.scheduler.requests.get(request.request_id) is request
