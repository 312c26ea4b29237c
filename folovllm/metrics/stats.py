"""EngineMetrics and HttpMetrics: what is counted while the server runs, as plain numbers.

Milestone: M8. vLLM counterpart: vllm/v1/metrics/stats.py (IterationStats, FinishedRequestStats) and the histograms of
vllm/v1/metrics/loggers.py. Several engines: replicas.py. Left out: LoRA, speculative decoding.

A step costs one bisection per running request. Gauges and counters cost nothing, because the engine's own snapshot
holds them already; prometheus.py reads everything when the page is requested.

A streaming request is observed as its tokens come; any other request is observed when it ends.
"""

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from folovllm.engine.open_requests import EngineObserver
from folovllm.outputs import EngineStats, RequestMetrics, RequestOutput
from folovllm.request import Request

FINISH_REASONS = ("stop", "length", "abort", "error")  # vLLM 0.11.0 has no "error"

# Upper bounds of the buckets, in seconds or tokens: vLLM's.
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
PER_TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_COMPLETIONS = (1, 2, 5, 10, 20)
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
# Of prometheus_fastapi_instrumentator, which counts vLLM's HTTP requests.
HTTP_SECONDS = (0.1, 0.5, 1.0)
HTTP_FINE_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip


def length_buckets(max_value: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `max_value`. E.g. 100 -> (1, 2, 5, 10, 20, 50, 100)."""
    powers = [10**exponent for exponent in range(len(str(max_value)))]
    return tuple(digit * power for power in powers for digit in (1, 2, 5) if digit * power <= max_value)


class Histogram:
    """How often values fell into each bucket, and their sum. A bucket holds the values up to its upper bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last one: above all bounds
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """Per bound the number of values up to it, and last the number of all values, as Prometheus wants them."""
        return list(accumulate(self.counts))


class Progress:
    """What has been counted of one unfinished request."""

    def __init__(self) -> None:
        self.num_latencies: dict[int, int] = {}  # completion index -> how many of its latencies are counted
        self.longest = 0  # tokens of its longest finished completion


class EngineMetrics(EngineObserver):
    """Observes an AsyncLLM. `stats` is the engine's newest snapshot, and every histogram is an attribute."""

    def __init__(self, max_model_len: int, unfinished: dict[str, Progress] | None = None) -> None:
        """`unfinished` is shared by the metrics of several engines: a request may go on in another one."""
        lengths = length_buckets(max_model_len)
        self.stats: EngineStats | None = None
        self.num_finished = dict.fromkeys(FINISH_REASONS, 0)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.prompt_tokens = Histogram(lengths)
        self.generation_tokens = Histogram(lengths)
        self.max_generation_tokens = Histogram(lengths)  # of the longest completion of a request
        self.params_n = Histogram(NUM_COMPLETIONS)
        self.params_max_tokens = Histogram(lengths)
        self.time_to_first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.inter_token_latency = Histogram(PER_TOKEN_SECONDS)
        self.time_per_output_token = Histogram(PER_TOKEN_SECONDS)  # the mean of a request
        self.e2e_latency = Histogram(REQUEST_SECONDS)
        self.queue_time = Histogram(REQUEST_SECONDS)
        self.inference_time = Histogram(REQUEST_SECONDS)
        self.prefill_time = Histogram(REQUEST_SECONDS)
        self.decode_time = Histogram(REQUEST_SECONDS)
        # Requests that have shown a token.
        self._unfinished: dict[str, Progress] = {} if unfinished is None else unfinished

    def on_added(self, request: Request) -> None:
        """Called when a request enters the engine, once for all its completions."""
        self.params_n.observe(request.sampling_params.n)
        self.params_max_tokens.observe(request.max_tokens)

    def on_step(self, stats: EngineStats, request_outputs: list[RequestOutput]) -> None:
        """Called after each step with the outputs that it delivers, and with the last outputs of aborted requests."""
        if self.stats is None or stats.num_steps != self.stats.num_steps:
            self.step_tokens.observe(stats.num_scheduled_tokens)
        self.stats = stats
        for output in request_outputs:
            if output.metrics is not None and output.outputs:
                self._observe(output, output.metrics)

    def on_dead(self, cause: str) -> None:
        """Called if the engine dies. The numbers stay as they are."""
        self._unfinished.clear()

    def _observe(self, output: RequestOutput, metrics: RequestMetrics) -> None:
        progress = self._unfinished.get(output.request_id)
        if progress is None:
            progress = self._unfinished[output.request_id] = Progress()
        self._observe_tokens(progress, output.outputs[0].index, metrics)
        for completion in output.outputs:
            if completion.finish_reason is not None:
                # Several completions come together only at the end of a FINAL_ONLY request, with all their tokens.
                is_alone = len(output.outputs) == 1
                num_tokens = metrics.num_generation_tokens if is_alone else len(completion.token_ids)
                progress.longest = max(progress.longest, num_tokens)
                self._observe_finished(completion.finish_reason, num_tokens, output, metrics)
        if output.finished:
            self.max_generation_tokens.observe(progress.longest)
            del self._unfinished[output.request_id]

    def _observe_tokens(self, progress: Progress, index: int, metrics: RequestMetrics) -> None:
        """Counts the latencies that have come since the last output of completion `index`."""
        if metrics.time_to_first_token is None:
            return
        if index not in progress.num_latencies:
            self.time_to_first_token.observe(metrics.time_to_first_token)
        for latency in metrics.inter_token_latencies[progress.num_latencies.get(index, 0) :]:
            self.inter_token_latency.observe(latency)
        progress.num_latencies[index] = len(metrics.inter_token_latencies)

    def _observe_finished(self, reason: str, num_tokens: int, output: RequestOutput, metrics: RequestMetrics) -> None:
        """Each completion counts once, as in vLLM. Those of a FINAL_ONLY request with n > 1 share their metrics."""
        self.num_finished[reason] += 1
        self.prompt_tokens.observe(len(output.prompt_token_ids))
        self.generation_tokens.observe(num_tokens)
        for histogram, seconds in (
            (self.e2e_latency, metrics.e2e_latency),
            (self.queue_time, metrics.queue_time),
            (self.prefill_time, metrics.prefill_time),
            (self.decode_time, metrics.decode_time),
            (self.inference_time, metrics.inference_time),
            (self.time_per_output_token, metrics.time_per_output_token),
        ):
            if seconds is not None:  # unknown if the request was aborted before it ran
                histogram.observe(seconds)


class HttpMetrics:
    """Counts answers of the server. `route` is the path of the route, e.g. /v1/models/{name}; "none" for no route."""

    def __init__(self) -> None:
        self.num_requests: Counter[tuple[str, str, str]] = Counter()  # (route, method, "2xx") -> answers
        self.seconds: dict[tuple[str, str], Histogram] = {}  # (route, method)
        self.fine_seconds = Histogram(HTTP_FINE_SECONDS)  # of all routes together

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts one answer; a stream counts when it ends.

        A method that a client has made up counts as "OTHER": else each would start series that stay for good.
        """
        method = method if method in METHODS else "OTHER"
        self.num_requests[route, method, f"{status // 100}xx"] += 1
        self.seconds.setdefault((route, method), Histogram(HTTP_SECONDS)).observe(seconds)
        self.fine_seconds.observe(seconds)
