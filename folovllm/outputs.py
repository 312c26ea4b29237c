"""The outputs of the model runner, of the engine core, and of the engine for the user.

Milestone: M0. vLLM counterparts: vllm/v1/outputs.py (ModelRunnerOutput), vllm/v1/engine (EngineCoreOutput),
vllm/outputs.py (RequestOutput, CompletionOutput), vllm/logprobs.py (Logprob).

Row 0: plain data, no torch.
"""

from dataclasses import dataclass, field

from folovllm.request import RequestTimes, TokenLogprobs


@dataclass
class Logprob:
    """The log-probability of one token at one position. The most likely token has `rank` 1, and ties
    increase the rank.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# token id -> Logprob; the sampled token is inserted first.
LogprobsOnePosition = dict[int, Logprob]


@dataclass
class ModelRunnerOutput:
    """The result of one step, as plain data without tensors.

    `sampled_token_ids[request_id]` is empty for a request whose prompt is not complete yet. `prompt_logprobs` holds,
    per request, the entries of the prompt positions that this step computed.
    """

    sampled_token_ids: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)


@dataclass
class EngineCoreOutput:
    """What one step produced for one request."""

    request_id: str
    new_token_ids: list[int]
    new_logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # complete, and delivered once, with the first token
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    times: RequestTimes | None = None
    replica: int = 0  # the engine that computed it, if there are several

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine after a step. Counters run from the start of the engine."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # share of the usable blocks that requests hold, 0..1
    num_used_slots: int  # token slots that hold K/V of running requests
    num_reserved_slots: int  # token slots in the blocks that running requests hold
    num_steps: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_scheduled_tokens: int  # in the last step
    num_preemptions: int
    # Prefix cache, in tokens, counted when a request is admitted. Requests for prompt_logprobs do not read the cache.
    prefix_cache_queries: int = 0  # tokens of the requests that were looked up
    prefix_cache_hits: int = 0
    prefix_cache_hit_rate: float = 0.0  # of the last 1000 requests, 0..1
    preempted_prefix_cache_queries: int = 0  # these two count requests that came back after a preemption
    preempted_prefix_cache_hits: int = 0
    replicas: tuple["EngineStats", ...] = ()  # of several engines: one each, and the numbers above are their sums


NO_STATS = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)  # before the first step


@dataclass
class RequestMetrics:
    """Timing of one request, in seconds (R1.36). A value is None as long as it is not known."""

    arrival_time: float
    num_generation_tokens: int = 0
    queue_time: float | None = None  # queued -> first scheduled
    prefill_time: float | None = None  # first scheduled -> first token
    decode_time: float | None = None  # first token -> last token
    inference_time: float | None = None  # first scheduled -> last token
    time_to_first_token: float | None = None  # arrival -> first token
    time_per_output_token: float | None = None  # decode_time / (tokens - 1); 0.0 for a single token
    e2e_latency: float | None = None  # arrival -> finish
    inter_token_latencies: list[float] = field(default_factory=list)
    replica: int = 0  # the engine that gave the last token, if there are several


@dataclass
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsOnePosition] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """What `LLM.generate` and `LLMEngine.step` return to the user for one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[LogprobsOnePosition | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
