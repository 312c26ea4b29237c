"""OpenRequests: the unfinished requests of an AsyncLLM, from the core's outputs to each reader's stream.

Milestone: M8. vLLM counterpart: `AsyncLLM.output_handler` and the queues in vllm/v1/engine/output_processor.py.
Left out: chunks that give other tasks a turn between the outputs of one step (for batches of hundreds).

A request leaves in one of four ways:

    it ends in the core        its last output says so
    its text ends (stop)       the core is told to abort it, and confirms
    it is aborted              the stream gets what there is; the core is told, and confirms
    it fails                   the stream raises RequestFailedError; the core is told if it does not know

Until the core confirms, what it sends for that id comes too late and is dropped. Messages keep their order in both
directions, so the user may give the id to a new request at once. Row 3, without torch.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

from folovllm.config import EngineConfig
from folovllm.engine.core_client import EngineDeadError
from folovllm.engine.messages import AbortRequests, AddRequests, DownMessage
from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.output_processor import OutputProcessor, ProcessedOutputs, RequestState
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.engine.request_stream import RequestStream
from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import NO_STATS, CompletionOutput, EngineCoreOutput, EngineStats, RequestOutput
from folovllm.parts import load_part
from folovllm.request import Request

logger = logging.getLogger(__name__)


class RequestFailedError(RuntimeError):
    """This request failed inside the engine. Others go on."""


class EngineObserver:
    """Hears of every request and every step of an AsyncLLM, on the event loop. The metrics are observers.

    A class that inherits from this one needs only the methods that it has a use for.
    """

    def on_added(self, request: Request) -> None:
        """A request has entered the engine. A request with n > 1 counts once."""

    def on_step(self, stats: EngineStats, outputs: list[RequestOutput]) -> None:
        """A step, or an abort, has given `outputs`."""

    def on_dead(self, cause: str) -> None:
        """The engine has died."""


class OpenRequests:
    """Adds requests to the core, hands out its outputs, and ends requests. `send` sends a message to the core."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None, send: Callable[[DownMessage], None]) -> None:
        self._processor = OutputProcessor(tokenizer, text_stream=load_part("engine.text_stream", config.parts))
        self._make_collector: type[RequestOutputCollector] = load_part("engine.output_collector", config.parts)
        self._make_stream: type[RequestStream] = load_part("engine.request_stream", config.parts)
        self._send = send
        self._collectors: dict[str, RequestOutputCollector] = {}  # by the id that the user gave
        self._leaving: Counter[str] = Counter()  # requests of the core that ended here, and are not confirmed yet
        self.observers: list[EngineObserver] = []
        self.stats = NO_STATS
        self.all_done = asyncio.Event()
        self.all_done.set()

    def __len__(self) -> int:
        """How many requests the core has to compute; one with n > 1 counts n times."""
        return self._processor.num_unfinished

    def request_ids(self) -> list[str]:
        """The ids that the users gave."""
        return list(self._collectors)

    def is_settled(self) -> bool:
        """Whether nothing is open, and the core has confirmed everything."""
        return not (self._collectors or self._leaving or self._processor.states)

    def add(self, request: Request, text: str | None) -> RequestStream:
        """Sends a request to the core; with n > 1 as n requests.

        Raises ValueError, and adds nothing, if the id is in use.
        """
        parent = ParentRequest(request) if request.sampling_params.n > 1 else None
        requests = [request] if parent is None else parent.children()
        try:
            for index, core_request in enumerate(requests):
                self._processor.add_request(core_request, text, parent, index)
            self._send(AddRequests(requests))
        except BaseException:
            self._processor.withdraw(requests)
            raise
        collector = self._make_collector(request.sampling_params.output_kind)
        self._collectors[request.request_id] = collector
        self.all_done.clear()
        self._tell_observers(lambda observer: observer.on_added(request))
        return self._make_stream(request.request_id, collector, self.abort)

    def abort(self, request_id: str) -> None:
        """Ends a request now. Its stream gets what there is, with finish_reason "abort". Unknown ids are ignored."""
        if request_id in self._collectors:
            self._deliver(self._end(request_id, "abort"))

    def on_step(self, stats: EngineStats, outputs: list[EngineCoreOutput]) -> None:
        """Takes the outputs of one step."""
        self.stats = stats
        processed = self._process([output for output in outputs if not self._is_too_late(output)])
        self._abort_in_core(processed.reqs_to_abort)  # a stop string ends a request that the core would continue
        self._deliver(processed.request_outputs)

    def die(self, cause: str) -> None:
        """Ends every stream with an EngineDeadError of its own, because a raised exception collects tracebacks."""
        for collector in self._collectors.values():
            collector.put(EngineDeadError(cause))
        self._processor.withdraw([state.request for state in self._processor.states.values()])
        self._collectors.clear()
        self._leaving.clear()
        self.all_done.set()
        self._tell_observers(lambda observer: observer.on_dead(cause))

    # ---- from the core's outputs to the users' outputs

    def _is_too_late(self, output: EngineCoreOutput) -> bool:
        """Whether the request has ended here already. Its last output confirms that the core has ended it, too."""
        if output.request_id not in self._leaving:
            return False
        if output.finished:
            self._confirm(output.request_id)
        return True

    def _confirm(self, core_id: str) -> None:
        self._leaving[core_id] -= 1
        if not self._leaving[core_id]:
            del self._leaving[core_id]

    def _process(self, outputs: list[EngineCoreOutput]) -> ProcessedOutputs:
        """What the outputs of a step mean to the users. A request whose output cannot be processed fails alone."""
        try:
            processed = self._processor.process_outputs(outputs, time.monotonic())
        except Exception:
            self._processor.take_back()
            return self._process_one_by_one(outputs)
        self._processor.commit()
        return processed

    def _process_one_by_one(self, outputs: list[EngineCoreOutput]) -> ProcessedOutputs:
        result = ProcessedOutputs()
        for output in outputs:
            try:
                processed = self._processor.process_outputs([output], time.monotonic())
                self._processor.commit()
                result.request_outputs += processed.request_outputs
                result.reqs_to_abort += processed.reqs_to_abort
            except Exception:
                logger.exception("an output of request %s cannot be processed", output.request_id)
                self._processor.take_back()
                user_request_id = self._processor.states[output.request_id].user_request_id
                result.request_outputs += self._end(user_request_id, "error")
                if output.finished:
                    self._confirm(output.request_id)
        return result

    # ---- from the outputs to the streams

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hands outputs to their streams. If one says that its request has failed, the stream gets an exception."""
        outputs = list(outputs)
        for request_id in dict.fromkeys(output.request_id for output in outputs if _has_failed(output)):
            outputs += self._end(request_id, "error")  # its other completions
            self._close(request_id, RequestFailedError(f"request {request_id!r} failed inside the engine"))
        for output in outputs:
            if output.request_id in self._collectors:
                if output.finished:
                    self._close(output.request_id, output)
                else:
                    self._collectors[output.request_id].put(output)
        self._tell_observers(lambda observer: observer.on_step(self.stats, outputs))

    def _close(self, request_id: str, last: RequestOutput | Exception) -> None:
        """Hands the last thing to the stream of a request."""
        collector = self._collectors.pop(request_id, None)
        if collector is not None:
            collector.put(last)
        if not self._collectors:
            self.all_done.set()

    def _end(self, request_id: str, reason: str) -> list[RequestOutput]:
        """Ends a request, here and in the core, and returns its last outputs; with n > 1, those of all completions."""
        core_ids = self._processor.core_ids([request_id])
        states = [self._processor.states[core_id] for core_id in core_ids]
        try:
            outputs = self._processor.abort(core_ids, time.monotonic(), reason).request_outputs
        except Exception:
            logger.exception("the last output of request %s cannot be made", request_id)
            self._processor.take_back()
            self._processor.withdraw([state.request for state in states])
            outputs = [_without_text(states[0], reason)]
        self._processor.commit()
        self._abort_in_core(core_ids)
        return outputs

    def _abort_in_core(self, core_ids: list[str]) -> None:
        if core_ids:
            self._leaving.update(core_ids)
            self._send(AbortRequests(core_ids))

    def _tell_observers(self, tell: Callable[[EngineObserver], None]) -> None:
        for observer in self.observers:
            try:
                tell(observer)
            except Exception:
                logger.exception("an observer of the engine raised")


def _has_failed(output: RequestOutput) -> bool:
    return any(completion.finish_reason == "error" for completion in output.outputs)


def _without_text(state: RequestState, reason: str) -> RequestOutput:
    """The last output of a request whose text cannot be made."""
    completion = CompletionOutput(state.index, "", [], finish_reason=reason)
    metrics = state.timer.snapshot(time.monotonic())
    return RequestOutput(state.user_request_id, state.prompt, state.prompt_token_ids, [completion], True, None, metrics)
