"""EngineCoreLoop: the engine core as a server. It reads messages, runs steps, and sends what they give.

Milestone: M8. vLLM counterpart: `EngineCoreProc.run_busy_loop` in vllm/v1/engine/core.py.
Left out: data-parallel ranks, batch queues, threads that encode and decode messages beside the loop.

Row 1: no torch. The loop does not know whether it runs in a process of its own or in a thread:

    wait for a message if there is nothing to compute --> take all messages that wait --> one step --> send its outputs

If a step raises, the loop ends the request that made it raise, and the others go on: see fault_finder.py. vLLM ends the
engine instead. Here the engine ends only if the core cannot repair itself, if MAX_FAILED_STEPS steps in a row raise, or
if the executor is dead.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from folovllm.engine.core import EngineCore
from folovllm.engine.fault_finder import FaultFinder
from folovllm.engine.messages import (
    AbortRequests,
    AddRequests,
    Call,
    CallResult,
    DownMessage,
    StepOutputs,
    Stop,
    UpMessage,
)
from folovllm.executor.base import ExecutorDeadError
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request, RequestStatus
from folovllm.trace.live import LiveFeed

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 20  # in a row


class Inbox(Protocol):
    """Where the messages from the front end arrive."""

    def take(self, wait: bool, timeout: float | None = None) -> list[DownMessage]:
        """Returns all messages that have arrived. If `wait`, it waits for the first one, at most `timeout` seconds."""


class StepBuffer:
    """Keeps the outputs of one step: see `StepConsumer`. They are there even if the step raises after its commit."""

    def __init__(self) -> None:
        self.outputs: list[EngineCoreOutput] = []
        self.is_filled = False

    def process(self, outputs: list[EngineCoreOutput]) -> None:
        # The time stamps belong to the request. In thread mode the next step would change them under the reader.
        self.outputs = [
            output if output.times is None else dataclasses.replace(output, times=dataclasses.replace(output.times))
            for output in outputs
        ]
        self.is_filled = True

    def take_back(self) -> None:
        self.outputs = []
        self.is_filled = False


class EngineCoreLoop:
    """Runs `core` for a front end: `inbox` is where its messages come from, `send` is what takes the answers."""

    def __init__(self, core: EngineCore, inbox: Inbox, send: Callable[[UpMessage], None]) -> None:
        self.core = core
        self._inbox = inbox
        self._send = send
        self._fault_finder = FaultFinder(core.scheduler)
        self._num_failed_steps = 0  # in a row
        self._late_outputs: list[EngineCoreOutput] = []  # of requests that did not end in a step
        self._has_news = False  # something has changed since the last StepOutputs
        self._feed = LiveFeed(core)
        self._calls: dict[str, Callable[..., Any]] = {
            "reset_prefix_cache": core.reset_prefix_cache,
            "watch": self._feed.snapshot,
            "unwatch": self._feed.stop,
            "ping": lambda: None,  # the answer says that all messages before it have arrived
        }

    def run(self) -> None:
        """Serves until a Stop arrives. An exception that comes out means that the engine is dead."""
        executor = self.core.executor
        while True:
            is_idle = not self.core.has_unfinished_requests()
            if is_idle:
                executor.check_health()
            if is_idle and self._has_news:
                self._report([])
            for message in self._inbox.take(wait=is_idle, timeout=executor.health_check_seconds):
                if isinstance(message, Stop):
                    return
                self._handle(message)
            if self.core.has_unfinished_requests():
                self._step()

    # ---- messages

    def _handle(self, message: DownMessage) -> None:
        self._has_news = True
        if isinstance(message, AddRequests):
            for request in message.requests:
                self._add(request)
        elif isinstance(message, AbortRequests):
            self._abort(message.request_ids)
        elif isinstance(message, Call):
            self._send(self._call(message))

    def _add(self, request: Request) -> None:
        try:
            self.core.add_request(request)
            self._fault_finder.joined(request.request_id)
        except Exception:
            logger.exception("request %s could not be added", request.request_id)
            self._late_outputs.append(EngineCoreOutput(request.request_id, [], finish_reason="error"))

    def _abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests. Their blocks are free before the next step is scheduled."""
        known = [request_id for request_id in request_ids if request_id in self.core.scheduler.requests]
        self._end(known, RequestStatus.FINISHED_ABORTED)

    def _end(self, request_ids: list[str], status: RequestStatus) -> None:
        try:
            self.core.abort_requests(request_ids, status)
        except Exception:  # the core has repaired itself, and the requests have ended
            logger.exception("an exception came while requests were being ended")
        reason = RequestStatus.get_finished_reason(status)
        self._late_outputs += [EngineCoreOutput(request_id, [], finish_reason=reason) for request_id in request_ids]

    def _call(self, call: Call) -> CallResult:
        try:
            return CallResult(call.call_id, self._calls[call.name](*call.args))
        except Exception as error:
            logger.exception("the call %s raised", call.name)
            return CallResult(call.call_id, error=describe(error))

    # ---- steps

    def _step(self) -> None:
        self._fault_finder.before_step()
        buffer = StepBuffer()
        try:
            self.core.step(buffer, blamed=())
            self._num_failed_steps = 0
        except Exception as error:
            self._after_failure(error, is_undone=not buffer.is_filled)
        if buffer.is_filled:
            self._fault_finder.step_succeeded([output.request_id for output in buffer.outputs])
        self._report(buffer.outputs)

    def _after_failure(self, error: Exception, is_undone: bool) -> None:
        """Goes on after a step that raised, or raises if it is one too many, or if no step can be run any more."""
        if isinstance(error, ExecutorDeadError):
            raise error
        self._num_failed_steps += 1
        logger.error("step %d raised", self.core.scheduler.num_steps, exc_info=error)
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise RuntimeError(f"{MAX_FAILED_STEPS} steps in a row raised, the last one {describe(error)}") from error
        self.core.has_unfinished_requests()  # raises if the core cannot be repaired
        guilty = self._fault_finder.step_failed(self.core.last_scheduled) if is_undone else None
        if guilty is not None:
            logger.error("request %s ends with an error: its steps raise %s", guilty, describe(error))
            self._end([guilty], RequestStatus.FINISHED_ERROR)

    def _report(self, outputs: list[EngineCoreOutput]) -> None:
        outputs, self._late_outputs = self._late_outputs + outputs, []
        self._has_news = False
        self._send(StepOutputs(outputs, self.core.stats(), self._feed.take()))


def describe(error: BaseException) -> str:
    """An exception in one line, for a person: its type and its text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
