"""OutputProcessor: what the engine core emits per step becomes what users see: text, logprobs, timing.

Milestone: M1. vLLM counterpart: vllm/v1/engine/output_processor.py.
Left out: pooling outputs, LoRA statistics; the asyncio queues are in output_collector.py (M8).

    EngineCoreOutput --> RequestState: detokenise, find stop strings, collect logprobs, observe times
                     --> CompletionOutput --> (ParentRequest if n > 1) --> RequestOutput
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from folovllm.engine.detokenizer import IncrementalDetokenizer, TextStream
from folovllm.engine.logprobs import LogprobsProcessor
from folovllm.engine.parallel_sampling import ParentRequest, merge_metrics
from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import CompletionOutput, EngineCoreOutput, LogprobsOnePosition, RequestMetrics, RequestOutput
from folovllm.request import Request, RequestTimes
from folovllm.sampling_params import RequestOutputKind


@dataclass
class ProcessedOutputs:
    """The results of one step, and the requests that met a stop string, which the engine core must now abort."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    reqs_to_abort: list[str] = field(default_factory=list)


class RequestTimer:
    """Turns the time stamps of one request into durations (R1.36)."""

    def __init__(self, arrival_time: float) -> None:
        self._metrics = RequestMetrics(arrival_time=arrival_time)
        self._first_token = 0.0
        self._last_token = 0.0

    def observe(self, output: EngineCoreOutput, now: float) -> None:
        """Takes one step's time stamps; `now` stands in for those that the core did not give."""
        times, metrics = output.times or RequestTimes(), self._metrics
        if times.scheduled:
            metrics.queue_time = times.scheduled - (times.queued or metrics.arrival_time)
        if not output.new_token_ids:
            return
        last = times.last_token or now
        if metrics.num_generation_tokens:
            metrics.inter_token_latencies.append(last - self._last_token)  # one per step, however many tokens it gave
        else:
            self._first_token = times.first_token or last
            metrics.time_to_first_token = self._first_token - metrics.arrival_time
        self._last_token = last
        metrics.replica = output.replica
        metrics.num_generation_tokens += len(output.new_token_ids)
        self._update_durations(times.scheduled)

    def snapshot(self, finish_time: float | None = None) -> RequestMetrics:
        """Returns a copy that later steps do not change."""
        copy = RequestMetrics(**vars(self._metrics))  # dataclasses.replace takes three times as long
        copy.inter_token_latencies = list(copy.inter_token_latencies)
        copy.e2e_latency = None if finish_time is None else finish_time - copy.arrival_time
        return copy

    def mark(self) -> tuple[dict[str, Any], int, float, float]:
        """What `rewind` needs to come back to this moment."""
        metrics = self._metrics
        return vars(metrics).copy(), len(metrics.inter_token_latencies), self._first_token, self._last_token

    def rewind(self, mark: tuple[dict[str, Any], int, float, float]) -> None:
        attributes, num_latencies, self._first_token, self._last_token = mark
        vars(self._metrics).update(attributes)
        del self._metrics.inter_token_latencies[num_latencies:]

    def _update_durations(self, scheduled: float) -> None:
        metrics = self._metrics
        metrics.decode_time = self._last_token - self._first_token
        metrics.time_per_output_token = metrics.decode_time / max(metrics.num_generation_tokens - 1, 1)
        if scheduled:
            metrics.prefill_time = self._first_token - scheduled
            metrics.inference_time = self._last_token - scheduled


class RequestState:
    """What the front end keeps of one request of the engine core."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        request: Request,
        prompt: str | None,
        parent: ParentRequest | None = None,
        index: int = 0,
        text_stream: type[TextStream] = TextStream,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.prompt = prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.parent = parent
        self.index = index
        self.output_kind = request.sampling_params.output_kind
        self._tokenizer, self._text_stream = tokenizer, text_stream
        self.detokenizer = self._new_detokenizer()
        self.logprobs = LogprobsProcessor(tokenizer, request.sampling_params)
        self.timer = RequestTimer(request.arrival_time)
        self.num_cached_tokens: int | None = None
        self._num_sent_tokens = 0

    @property
    def user_request_id(self) -> str:
        """The id that the user gave: the parent's, if there is one."""
        return self.request_id if self.parent is None else self.parent.request_id

    def _new_detokenizer(self) -> IncrementalDetokenizer:
        params = self.request.sampling_params
        return IncrementalDetokenizer(self._tokenizer, params, self.prompt_token_ids, self._text_stream)

    def mark(self) -> tuple[Any, ...]:
        """What `rewind` needs to come back to this moment: small, since it is taken in every step."""
        sent = (self._num_sent_tokens, self.detokenizer.num_sent_chars)
        parent = None if self.parent is None else self.parent.mark()
        num_tokens = len(self.detokenizer.token_ids)
        return num_tokens, sent, self.num_cached_tokens, self.logprobs.mark(), self.timer.mark(), parent

    def rewind(self, mark: tuple[Any, ...]) -> None:
        """Comes back to `mark`. The text is decoded again from the tokens."""
        num_tokens, sent, self.num_cached_tokens, logprobs, timer, parent = mark
        token_ids, self.detokenizer = self.detokenizer.token_ids[:num_tokens], self._new_detokenizer()
        for token_id in token_ids:
            self.detokenizer.update([token_id])
        self._num_sent_tokens, self.detokenizer.num_sent_chars = sent
        self.logprobs.rewind(logprobs)
        self.timer.rewind(timer)
        if self.parent is not None:
            self.parent.rewind(parent)

    def absorb(self, output: EngineCoreOutput, now: float) -> str | None:
        """Takes in one step. Returns the stop string that it completed, if any."""
        self.timer.observe(output, now)
        self.logprobs.add_sample(output.new_logprobs)
        self.logprobs.set_prompt(output.prompt_logprobs)
        if output.new_token_ids:
            self.num_cached_tokens = output.num_cached_tokens
        return self.detokenizer.update(output.new_token_ids, output.finish_reason)

    def is_due(self, finished: bool, stream_interval: int) -> bool:
        """Whether this step's state is shown: the first token, every `stream_interval` tokens, and the end."""
        if finished or self.output_kind is RequestOutputKind.FINAL_ONLY:
            return finished
        num_tokens, sent = len(self.detokenizer.token_ids), self._num_sent_tokens
        return num_tokens > 0 and (sent == 0 or num_tokens - sent >= stream_interval)

    def completion(self, finish_reason: str | None, stop_reason: int | str | None) -> CompletionOutput:
        """The CompletionOutput to show now: everything so far, or with DELTA what was not shown yet."""
        finished, detokenizer = finish_reason is not None, self.detokenizer
        delta = self.output_kind is RequestOutputKind.DELTA
        start = self._num_sent_tokens if delta else 0
        self._num_sent_tokens = len(detokenizer.token_ids)
        logprobs = self.logprobs.logprobs
        return CompletionOutput(
            index=self.index,
            text=detokenizer.next_delta(finished) if delta else detokenizer.visible_text(finished),
            token_ids=detokenizer.token_ids[start:],
            cumulative_logprob=self.logprobs.cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[start:],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def take_prompt_logprobs(self) -> list[LogprobsOnePosition | None] | None:
        """Returns the prompt's logprobs; with DELTA only the first time."""
        prompt_logprobs = self.logprobs.prompt_logprobs
        if self.output_kind is RequestOutputKind.DELTA:
            self.logprobs.prompt_logprobs = None
        return prompt_logprobs


class OutputProcessor:
    """Keeps a RequestState per request of the engine core, and makes RequestOutputs from the core's outputs.

    `text_stream` is the part engine.text_stream.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, stream_interval: int = 1, text_stream: type[TextStream] = TextStream
    ) -> None:
        assert stream_interval >= 1
        self.tokenizer, self._text_stream = tokenizer, text_stream
        self.stream_interval = stream_interval
        self.states: dict[str, RequestState] = {}
        self.parents: dict[str, ParentRequest] = {}
        self._undo: list[tuple[RequestState, tuple[Any, ...]]] = []  # of the last step: states and their marks before

    @property
    def num_unfinished(self) -> int:
        return len(self.states)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.states)

    def add_request(
        self, request: Request, prompt: str | None, parent: ParentRequest | None = None, index: int = 0
    ) -> None:
        """Starts to follow `request`; with `parent`, as its child number `index`.

        Raises ValueError if a name is in use. With the first child all names are checked: all enter, or none.
        """
        names = [request.request_id]
        if parent is not None:
            names = [parent.request_id, *sorted(parent.unfinished)] if index == 0 else []
        for name in names:
            if name in self.states or name in self.parents:
                raise ValueError(f"request id {name!r} is in use: wait until that request has finished, or rename this")
        state = RequestState(self.tokenizer, request, prompt, parent, index, self._text_stream)
        self.states[request.request_id] = state
        if parent is not None:
            self.parents[parent.request_id] = parent

    def withdraw(self, requests: list[Request]) -> None:
        """Forgets these requests, as if they had never been added. Others with the same ids are left alone."""
        for request in requests:
            state = self.states.get(request.request_id)
            if state is not None and state.request is request:
                del self.states[request.request_id]
                if state.parent is not None:
                    self.parents.pop(state.parent.request_id, None)

    def process_outputs(self, outputs: list[EngineCoreOutput], now: float) -> ProcessedOutputs:
        """Turns one step's outputs into RequestOutputs. `now` is `time.monotonic()` after the step.

        Outputs of unknown requests are dropped: they were aborted while the step was under way.
        """
        self._undo = []
        result = ProcessedOutputs()
        for output in outputs:
            state = self.states.get(output.request_id)
            if state is None:
                continue
            self._undo.append((state, state.mark()))
            self._process(state, output, now, result)
        return result

    def take_back(self) -> None:
        """Undoes the last `process_outputs` or `abort`, wherever it was interrupted."""
        for state, mark in reversed(self._undo):
            state.rewind(mark)
            self.states[state.request_id] = state
            if state.parent is not None:
                self.parents[state.parent.request_id] = state.parent
        self._undo = []

    def commit(self) -> None:
        """The last outputs have been delivered: they are not taken back any more."""
        self._undo = []

    def _process(self, state: RequestState, output: EngineCoreOutput, now: float, result: ProcessedOutputs) -> None:
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        stop_string = state.absorb(output, now)
        if stop_string is not None:
            finish_reason, stop_reason = "stop", stop_string
            if not output.finished:
                result.reqs_to_abort.append(output.request_id)
        result.request_outputs += self._emit(state, finish_reason, stop_reason, now)

    def abort_requests(self, request_ids: list[str]) -> list[str]:
        """Gives up requests, a parent with all its children. Returns the ids to abort in the engine core."""
        return self.abort(request_ids, time.monotonic()).reqs_to_abort

    def core_ids(self, request_ids: Iterable[str]) -> list[str]:
        """The unfinished requests of the engine core behind these ids: a parent's children, or the request itself."""
        names: dict[str, None] = {}
        for request_id in request_ids:
            parent = self.parents.get(request_id)
            names |= dict.fromkeys([request_id] if parent is None else sorted(parent.unfinished))
        return [name for name in names if name in self.states]

    def abort(self, request_ids: Iterable[str], now: float, reason: str = "abort") -> ProcessedOutputs:
        """Like `abort_requests`, with the last outputs: `reason` as finish_reason, and the text up to now.

        Unknown ids are ignored.
        """
        self._undo = []
        result = ProcessedOutputs(reqs_to_abort=self.core_ids(request_ids))
        for core_id in result.reqs_to_abort:
            state = self.states[core_id]
            self._undo.append((state, state.mark()))
            self._process(state, EngineCoreOutput(core_id, [], finish_reason=reason), now, result)
        return result

    def _emit(
        self, state: RequestState, finish_reason: str | None, stop_reason: int | str | None, now: float
    ) -> list[RequestOutput]:
        """Returns at most one RequestOutput. Forgets the request if it has finished."""
        finished = finish_reason is not None
        if finished:
            del self.states[state.request_id]
        if not state.is_due(finished, self.stream_interval):
            return []
        completion = state.completion(finish_reason, stop_reason)
        metrics = state.timer.snapshot(now if finished else None)
        if state.parent is not None:
            return self._emit_child(state.parent, state, completion, metrics)
        return [_request_output(state, state.request_id, [completion], finished, metrics)]

    def _emit_child(
        self, parent: ParentRequest, state: RequestState, completion: CompletionOutput, metrics: RequestMetrics
    ) -> list[RequestOutput]:
        completions = parent.collect(state.request_id, completion)
        if not parent.unfinished:
            del self.parents[parent.request_id]
        parent.observe(state.index, metrics, state.num_cached_tokens, state.logprobs.prompt_logprobs)
        if not completions:
            return []
        output = _request_output(state, parent.request_id, completions, not parent.unfinished, metrics)
        # Of child 0, which found what was cached before this request came; its siblings find what it has cached itself.
        output.num_cached_tokens = parent.num_cached_tokens
        if parent.final_only:
            output.metrics = merge_metrics(parent.metrics)
        if state.output_kind is not RequestOutputKind.DELTA:
            output.prompt_logprobs = parent.prompt_logprobs  # child 0 computed them for all
        return [output]


def _request_output(
    state: RequestState, request_id: str, completions: list[CompletionOutput], finished: bool, metrics: RequestMetrics
) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        prompt=state.prompt,
        prompt_token_ids=state.prompt_token_ids,
        outputs=completions,
        finished=finished,
        prompt_logprobs=state.take_prompt_logprobs(),
        metrics=metrics,
        num_cached_tokens=state.num_cached_tokens,
    )
