"""OutputProcessor: what the engine core emits per step becomes what users see: text, logprobs, timing.

Milestone: M1. vLLM counterpart: vllm/v1/engine/output_processor.py.
Left out: pooling outputs, LoRA statistics, the asyncio queues (they belong to the server, after M7).

    EngineCoreOutput --> RequestState: detokenise, find stop strings, collect logprobs, observe times
                     --> CompletionOutput --> (ParentRequest if n > 1) --> RequestOutput
"""

import dataclasses
import time
from dataclasses import dataclass, field

from folovllm.engine.detokenizer import IncrementalDetokenizer
from folovllm.engine.logprobs import LogprobsProcessor
from folovllm.engine.parallel_sampling import ParentRequest, merge_metrics
from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import CompletionOutput, EngineCoreOutput, LogprobsOnePosition, RequestMetrics, RequestOutput
from folovllm.request import Request, RequestTimes
from folovllm.sampling_params import RequestOutputKind


@dataclass
class ProcessedOutputs:
    """Results of one step, and the requests that the engine core must now abort (they met a stop string)."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    reqs_to_abort: list[str] = field(default_factory=list)


class RequestTimer:
    """Turns the time stamps of one request into durations (R1.36)."""

    def __init__(self, arrival_time: float) -> None:
        self._metrics = RequestMetrics(arrival_time=arrival_time)
        self._first_token = 0.0
        self._last_token = 0.0

    def observe(self, output: EngineCoreOutput, now: float) -> None:
        """Take one step's time stamps; `now` stands in for those that the core did not give."""
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
        metrics.num_generation_tokens += len(output.new_token_ids)
        self._update_durations(times.scheduled)

    def snapshot(self, finish_time: float | None = None) -> RequestMetrics:
        """A copy that later steps do not change."""
        copy = dataclasses.replace(self._metrics, inter_token_latencies=list(self._metrics.inter_token_latencies))
        copy.e2e_latency = None if finish_time is None else finish_time - copy.arrival_time
        return copy

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
    ) -> None:
        self.request_id = request.request_id
        self.prompt = prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.parent = parent
        self.index = index
        self.output_kind = request.sampling_params.output_kind
        self.detokenizer = IncrementalDetokenizer(tokenizer, request.sampling_params, request.prompt_token_ids)
        self.logprobs = LogprobsProcessor(tokenizer, request.sampling_params)
        self.timer = RequestTimer(request.arrival_time)
        self.num_cached_tokens: int | None = None
        self._num_sent_tokens = 0

    def absorb(self, output: EngineCoreOutput, now: float) -> str | None:
        """Take in one step; return the stop string it completed, if any."""
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
        """The prompt's logprobs; with DELTA only the first time."""
        prompt_logprobs = self.logprobs.prompt_logprobs
        if self.output_kind is RequestOutputKind.DELTA:
            self.logprobs.prompt_logprobs = None
        return prompt_logprobs


class OutputProcessor:
    """Keeps a RequestState per request of the engine core and makes RequestOutputs from its outputs."""

    def __init__(self, tokenizer: Tokenizer | None, stream_interval: int = 1) -> None:
        assert stream_interval >= 1
        self.tokenizer = tokenizer
        self.stream_interval = stream_interval
        self.states: dict[str, RequestState] = {}
        self.parents: dict[str, ParentRequest] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self.states)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.states)

    def add_request(
        self, request: Request, prompt: str | None, parent: ParentRequest | None = None, index: int = 0
    ) -> None:
        """Start to follow `request`; with `parent`, as its child number `index`."""
        names = [request.request_id]
        if parent is not None:  # with the first child check all names: all of them enter or none
            names = [parent.request_id, *sorted(parent.unfinished)] if index == 0 else []
        for name in names:
            if name in self.states or name in self.parents:
                raise ValueError(f"request id {name!r} is in use: wait until that request has finished, or rename this")
        self.states[request.request_id] = RequestState(self.tokenizer, request, prompt, parent, index)
        if parent is not None:
            self.parents[parent.request_id] = parent

    def process_outputs(self, outputs: list[EngineCoreOutput], now: float) -> ProcessedOutputs:
        """Turn one step's outputs into RequestOutputs. `now` is `time.monotonic()` after the step.

        Outputs of unknown requests are dropped: they were aborted while the step was under way.
        """
        result = ProcessedOutputs()
        for output in outputs:
            state = self.states.get(output.request_id)
            if state is None:
                continue
            finish_reason, stop_reason = output.finish_reason, output.stop_reason
            stop_string = state.absorb(output, now)
            if stop_string is not None:
                finish_reason, stop_reason = "stop", stop_string
                if not output.finished:
                    result.reqs_to_abort.append(output.request_id)
            result.request_outputs += self._emit(state, finish_reason, stop_reason, now)
        return result

    def abort_requests(self, request_ids: list[str]) -> list[str]:
        """Give up requests, a parent with all its children; return the ids to abort in the engine core."""
        return self.abort(request_ids, time.monotonic()).reqs_to_abort

    def abort(self, request_ids: list[str], now: float) -> ProcessedOutputs:
        """Like `abort_requests`, with the last outputs: finish_reason "abort" and the text up to now.

        Unknown ids are ignored.
        """
        result = ProcessedOutputs()
        for request_id in request_ids:
            parent = self.parents.get(request_id)
            core_ids = [request_id] if parent is None else sorted(parent.unfinished)
            result.reqs_to_abort += [i for i in core_ids if i in self.states and i not in result.reqs_to_abort]
        last_words = [EngineCoreOutput(core_id, [], finish_reason="abort") for core_id in result.reqs_to_abort]
        result.request_outputs = self.process_outputs(last_words, now).request_outputs
        return result

    def _emit(
        self, state: RequestState, finish_reason: str | None, stop_reason: int | str | None, now: float
    ) -> list[RequestOutput]:
        """At most one RequestOutput; forget the request if it has finished."""
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
        if parent.final_only:
            output.metrics = merge_metrics(parent.metrics)
            output.num_cached_tokens = parent.num_cached_tokens
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
