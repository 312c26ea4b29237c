"""ServerMetrics: the page of GET /metrics, under the names that vLLM 0.11.0 gives to the same numbers.

Milestone: M8. vLLM counterpart: vllm/v1/metrics/loggers.py (PrometheusStatLogger) and, for the http_ names, the package
prometheus_fastapi_instrumentator. Names, types, labels and buckets are vLLM's, so dashboards made for it work.
Left out: metrics of LoRA, speculative decoding and KV transfer, which FoloVLLM does not have; sizes of HTTP bodies.

Each server has a registry of its own. Collectors read stats.py only when the page is requested, so a number that has
two names (a current and a deprecated one) is counted once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.engine.open_requests import EngineObserver
from folovllm.metrics.log import ThroughputLog
from folovllm.metrics.replicas import ReplicaObservers
from folovllm.metrics.stats import EngineMetrics, Histogram, HttpMetrics, Progress
from folovllm.outputs import NO_STATS, EngineStats

Reader = Callable[[EngineStats], float]

LABELS = ("model_name", "engine")
CONTENT_TYPE = CONTENT_TYPE_LATEST

GAUGES: tuple[tuple[str, str, Reader], ...] = (
    ("num_requests_running", "Requests that run.", lambda stats: stats.num_running),
    ("num_requests_waiting", "Requests that wait to be scheduled.", lambda stats: stats.num_waiting),
    ("kv_cache_usage_perc", "Share of the KV cache that requests hold, 0 to 1.", lambda stats: stats.kv_cache_usage),
    ("gpu_cache_usage_perc", "Deprecated name of kv_cache_usage_perc.", lambda stats: stats.kv_cache_usage),
)
COUNTERS: tuple[tuple[str, str, Reader], ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_cache_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_cache_hits),
    ("gpu_prefix_cache_queries", "Deprecated name of prefix_cache_queries.", lambda s: s.prefix_cache_queries),
    ("gpu_prefix_cache_hits", "Deprecated name of prefix_cache_hits.", lambda s: s.prefix_cache_hits),
    ("num_preemptions", "Preemptions of requests.", lambda s: s.num_preemptions),
    ("prompt_tokens", "Prompt tokens of the requests that got a first token.", lambda s: s.num_prompt_tokens),
    ("generation_tokens", "Generated tokens.", lambda s: s.num_generation_tokens),
)
# name, help, attribute of EngineMetrics
HISTOGRAMS = (
    ("iteration_tokens_total", "Tokens that a step computes.", "step_tokens"),
    ("request_prompt_tokens", "Prompt length.", "prompt_tokens"),
    ("request_generation_tokens", "Tokens generated for a completion.", "generation_tokens"),
    ("request_max_num_generation_tokens", "Tokens of a request's longest completion.", "max_generation_tokens"),
    ("request_params_n", "Completions that a request asks for.", "params_n"),
    ("request_params_max_tokens", "Tokens that a request allows.", "params_max_tokens"),
    ("time_to_first_token_seconds", "From arrival to the first token.", "time_to_first_token"),
    ("inter_token_latency_seconds", "From one token to the next.", "inter_token_latency"),
    ("time_per_output_token_seconds", "Deprecated name of inter_token_latency_seconds.", "inter_token_latency"),
    ("request_time_per_output_token_seconds", "Mean time per token of a request.", "time_per_output_token"),
    ("e2e_request_latency_seconds", "From arrival to the end.", "e2e_latency"),
    ("request_queue_time_seconds", "From arrival to the first step.", "queue_time"),
    ("request_inference_time_seconds", "From the first step to the last token.", "inference_time"),
    ("request_prefill_time_seconds", "From the first step to the first token.", "prefill_time"),
    ("request_decode_time_seconds", "From the first token to the last one.", "decode_time"),
)


class ServerMetrics:
    """All numbers of one server. `observers` are for `AsyncLLM.add_observer`; `http` counts answers.

    With `log_stats=False` (--disable-log-stats) the engine is not observed: there is no line in the log, and the page
    has no vllm: names, as in vLLM.
    """

    def __init__(
        self, model_name: str, config: EngineConfig, kv_cache_config: KVCacheConfig, log_stats: bool = True
    ) -> None:
        self.http = HttpMetrics()
        self.observers: list[EngineObserver] = []
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.registry.register(HttpCollector(self.http))
        if log_stats:
            unfinished = dict[str, Progress]()
            count = config.parallel_config.data_parallel_size
            engines = [EngineMetrics(config.max_model_len, unfinished) for _ in range(count)]
            self.registry.register(EngineCollector(engines, model_name, cache_labels(config, kv_cache_config)))
            own = [[metrics, ThroughputLog(engine=index)] for index, metrics in enumerate(engines)]
            self.observers += own[0] if count == 1 else [ReplicaObservers(own)]

    def page(self) -> bytes:
        """The text of GET /metrics; its content type is CONTENT_TYPE."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Reads the EngineMetrics of each engine. `cache` holds the labels of vllm:cache_config_info but for "engine"."""

    def __init__(self, engines: Sequence[EngineMetrics], model_name: str, cache: dict[str, str]) -> None:
        self.engines = [((model_name, str(index)), metrics) for index, metrics in enumerate(engines)]
        self.cache = cache

    def collect(self) -> Iterator[Metric]:
        for name, text, read in GAUGES:
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for labels, metrics in self.engines:
                gauge.add_metric(labels, read(metrics.stats or NO_STATS))
            yield gauge
        for name, text, read in COUNTERS:
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
            for labels, metrics in self.engines:
                counter.add_metric(labels, read(metrics.stats or NO_STATS))
            yield counter
        for name, text, attribute in HISTOGRAMS:
            series = [(labels, getattr(metrics, attribute)) for labels, metrics in self.engines]
            yield histogram_family(f"vllm:{name}", text, LABELS, series)
        yield self._finished()
        yield self._cache_info()

    def _finished(self) -> Metric:
        text = "Completions that have ended, by the reason."
        finished = CounterMetricFamily("vllm:request_success", text, labels=(*LABELS, "finished_reason"))
        for labels, metrics in self.engines:
            for reason, count in metrics.num_finished.items():
                finished.add_metric((*labels, reason), count)
        return finished

    def _cache_info(self) -> Metric:
        text = "How the KV cache is set up."
        info = GaugeMetricFamily("vllm:cache_config_info", text, labels=(*self.cache, "engine"))
        for (_, engine), _ in self.engines:
            info.add_metric((*self.cache.values(), engine), 1)
        return info


class HttpCollector(Collector):
    """Reads an HttpMetrics."""

    def __init__(self, metrics: HttpMetrics) -> None:
        self.metrics = metrics

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("http_requests", "HTTP answers.", labels=("handler", "method", "status"))
        for labels, count in self.metrics.num_requests.items():
            requests.add_metric(labels, count)
        yield requests
        text = "Time to answer, by route; a stream counts when it ends."
        yield histogram_family(
            "http_request_duration_seconds", text, ("handler", "method"), self.metrics.seconds.items()
        )
        text = "Time to answer, all routes together, in finer buckets."
        yield histogram_family("http_request_duration_highr_seconds", text, (), [((), self.metrics.fine_seconds)])


def histogram_family(
    name: str, text: str, label_names: tuple[str, ...], series: Iterable[tuple[tuple[str, ...], Histogram]]
) -> Metric:
    """The histograms of `series`, each after its label values."""
    family = HistogramMetricFamily(name, text, labels=label_names)
    for labels, histogram in series:
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, histogram.cumulative(), strict=True)), histogram.sum)
    return family


def cache_labels(config: EngineConfig, kv_cache_config: KVCacheConfig) -> dict[str, str]:
    """The labels of vllm:cache_config_info, but for "engine": our CacheConfig, and vLLM's under its own names."""
    labels = {name: str(value) for name, value in vars(config.cache_config).items()}
    labels["block_size"] = str(kv_cache_config.block_size)
    labels["num_gpu_blocks"] = str(kv_cache_config.num_blocks)
    labels["num_gpu_blocks_override"] = str(config.cache_config.num_kv_blocks)
    labels["kv_cache_memory_bytes"] = str(config.cache_config.kv_cache_memory)
    return labels
