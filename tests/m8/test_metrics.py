"""The numbers of GET /metrics: vLLM's names, its dashboards' queries, and true values; and the line in the log.

The engine is LLMEngine on FakeExecutor; `observe` does for the observers what AsyncLLM does after each step.
"""

import asyncio
import json
import logging
import re
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.fake import FakeExecutor
from folovllm.metrics.log import ThroughputLog
from folovllm.metrics.prometheus import ServerMetrics
from folovllm.metrics.stats import Histogram, length_buckets
from folovllm.outputs import EngineStats
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.core_helpers import make_config
from tests.m8.server_process import running_server

pytestmark = pytest.mark.m8

DATA = Path(__file__).parent / "data"
VLLM = json.loads((DATA / "vllm_metrics.json").read_text(encoding="utf-8"))["names"]
DASHBOARDS = json.loads((DATA / "grafana_queries.json").read_text(encoding="utf-8"))["dashboards"]
LABELS = {"model_name": "tiny", "engine": "0"}


class Server:
    """An engine whose requests are observed as AsyncLLM lets them be observed."""

    def __init__(self, **config_args):
        self.engine = LLMEngine(make_config(**{"max_model_len": 64} | config_args), FakeExecutor(), None)
        self.metrics = ServerMetrics("tiny", self.engine.config, self.engine.engine_core.kv_cache_config)

    def add(self, request_id, prompt_len=8, **params):
        params = SamplingParams(**({"temperature": 0.0, "detokenize": False, "ignore_eos": True} | params))
        request = self.engine.process(request_id, {"prompt_token_ids": list(range(1, prompt_len + 1))}, params)
        self.engine.add_processed(request)
        for observer in self.metrics.observers:
            observer.on_added(request)

    def step(self, abort=()):
        if abort:
            outputs = self.engine.output_processor.abort(abort, 0.0).request_outputs
            self.engine.engine_core.abort_requests(abort)
        else:
            outputs = self.engine.step()
        for observer in self.metrics.observers:
            observer.on_step(self.engine.stats(), outputs)

    async def run(self):
        while self.engine.has_unfinished_requests():
            self.step()

    def finish(self):
        asyncio.run(self.run())

    def samples(self):
        """{(name, labels without the two of all): value} of the page, read by Prometheus's own parser."""
        page = self.metrics.page().decode()
        samples = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                own = tuple(sorted((k, v) for k, v in sample.labels.items() if LABELS.get(k) != v))
                assert (sample.name, own) not in samples
                samples[sample.name, own] = sample.value
        return samples

    def value(self, name, **labels):
        return self.samples()[f"vllm:{name}", tuple(sorted(labels.items()))]


@pytest.fixture
def server():
    return Server()


def families(server):
    """Family name -> (type, the labels of its series, sorted), for the vllm: names."""
    found = {}
    for family in text_string_to_metric_families(server.metrics.page().decode()):
        if family.name.startswith("vllm:"):
            found[family.name] = (family.type, sorted({k for s in family.samples for k in s.labels if k != "le"}))
    return found


def test_every_name_of_vllm_is_exported_or_has_a_reason(server):
    ours = families(server)
    have = {name: entry for name, entry in VLLM.items() if entry["ours"] == "have"}
    assert set(ours) == set(have)
    for name, entry in have.items():
        kind, labels = ours[name]
        assert kind == entry["type"], name
        if name == "vllm:cache_config_info":  # it has one label per field of the configuration
            assert set(entry["labels"]) <= set(labels)
        else:
            assert labels == sorted(entry["labels"]), name
    assert all(len(entry["ours"].split()) >= 4 for entry in VLLM.values() if entry["ours"] != "have")


def test_the_buckets_are_those_of_vllm(server):
    bounds = {}
    for name, labels in server.samples():
        if name.startswith("vllm:") and name.endswith("_bucket"):
            bounds.setdefault(name.removesuffix("_bucket"), []).append(float(dict(labels)["le"]))
    for name, entry in VLLM.items():
        if entry["type"] == "histogram" and entry["ours"] == "have":
            wanted = entry["buckets"]
            if wanted == "1-2-5":
                wanted = [b for power in (1, 10, 100, 1000) for b in (power, 2 * power, 5 * power)]
                wanted = [b for b in wanted if b <= server.engine.config.max_model_len]
            assert sorted(bounds[name]) == [*map(float, wanted), float("inf")], name


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda d: d["source"].rpartition("/")[2])
def test_every_query_of_vllms_dashboards_finds_a_series(server, dashboard):
    page = server.metrics.page().decode()
    series = set(re.findall(r"^([a-zA-Z_:][\w:]*)", page, re.MULTILINE))
    for query in dashboard["queries"]:
        assert re.sub("^vllm_", "vllm:", query) in series
    assert {"model_name", "le", "finished_reason"} >= set(dashboard["labels"])
    assert all(f'{label}="' in page for label in dashboard["labels"])


def test_counts_of_three_requests(server):
    server.add("a", prompt_len=8, max_tokens=5)
    server.add("b", prompt_len=20, max_tokens=3)
    server.add("c", prompt_len=4, max_tokens=1)
    server.finish()
    assert server.value("prompt_tokens_total") == 32 and server.value("generation_tokens_total") == 9
    assert server.value("request_success_total", finished_reason="length") == 3
    for reason in ("stop", "abort", "error"):  # there from the start, so that rates begin at 0
        assert server.value("request_success_total", finished_reason=reason) == 0
    assert server.value("request_prompt_tokens_sum") == 32 and server.value("request_prompt_tokens_count") == 3
    assert server.value("request_generation_tokens_sum") == 9
    assert server.value("request_generation_tokens_bucket", le="2.0") == 1
    assert server.value("request_params_max_tokens_sum") == 9 and server.value("request_params_n_sum") == 3
    assert server.value("request_max_num_generation_tokens_sum") == 9
    assert server.value("time_to_first_token_seconds_count") == 3
    for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert server.value(f"{name}_count") == 9 - 3
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time",
                 "request_decode_time", "request_time_per_output_token"):  # fmt: skip
        assert server.value(f"{name}_seconds_count") == 3 and server.value(f"{name}_seconds_sum") >= 0
    stats = server.engine.stats()
    assert server.value("iteration_tokens_total_count") == stats.num_steps == 5
    assert server.value("iteration_tokens_total_sum") == 32 + 9 - 3  # the last token of a request is never computed
    assert server.value("num_requests_running") == 0 and server.value("kv_cache_usage_perc") == 0


def test_gauges_while_requests_run_and_wait():
    server = Server(max_num_seqs=2)
    for name in "abc":
        server.add(name, max_tokens=5)
    asyncio.run(one_step(server))
    assert server.value("num_requests_running") == 2 and server.value("num_requests_waiting") == 1
    usage = server.engine.stats().kv_cache_usage
    assert 0 < usage == server.value("kv_cache_usage_perc") == server.value("gpu_cache_usage_perc")


async def one_step(server, **args):
    server.step(**args)


def test_tokens_are_observed_while_a_request_streams(server):
    """A long answer would otherwise show up in one step of the graph, when it ends."""
    server.add("a", max_tokens=9, output_kind=RequestOutputKind.DELTA)
    for step in range(4):
        asyncio.run(one_step(server))
        assert server.value("time_to_first_token_seconds_count") == 1
        assert server.value("inter_token_latency_seconds_count") == step
    server.finish()
    assert server.value("inter_token_latency_seconds_count") == 8


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_every_completion_of_a_request_counts_once(server, kind):
    server.add("a", n=3, max_tokens=4, temperature=1.0, seed=1, output_kind=kind)
    server.finish()
    assert server.value("request_success_total", finished_reason="length") == 3
    assert server.value("generation_tokens_total") == server.value("request_generation_tokens_sum") == 12
    assert server.value("request_max_num_generation_tokens_sum") == 4
    assert server.value("request_max_num_generation_tokens_count") == 1
    assert server.value("request_params_n_sum") == 3 and server.value("request_params_n_count") == 1
    assert server.value("inter_token_latency_seconds_count") == 9
    assert server.value("time_to_first_token_seconds_count") == (1 if kind is RequestOutputKind.FINAL_ONLY else 3)


def test_an_aborted_request_is_counted_and_forgotten(server):
    """What is remembered of a request must not stay when its client leaves: the server runs for months."""
    server.add("a", max_tokens=50, output_kind=RequestOutputKind.DELTA)
    server.add("b", max_tokens=50, output_kind=RequestOutputKind.DELTA)
    asyncio.run(one_step(server))
    server.add("c", max_tokens=50)
    asyncio.run(one_step(server, abort=["a", "b", "c"]))
    assert server.value("request_success_total", finished_reason="abort") == 3
    assert not server.metrics.observers[0]._unfinished
    assert server.value("request_queue_time_seconds_count") == 2  # "c" never ran


def test_preemptions_and_the_prefix_cache():
    server = Server(max_model_len=16, num_kv_blocks=9, block_size=4, max_num_seqs=4, enable_prefix_caching=True)
    for name in "abcd":
        server.add(name, prompt_len=6, max_tokens=9)
    server.finish()
    stats = server.engine.stats()
    assert server.value("num_preemptions_total") == stats.num_preemptions > 0
    assert server.value("prefix_cache_queries_total") == stats.prefix_cache_queries > 0
    assert server.value("prefix_cache_hits_total") == stats.prefix_cache_hits > 0
    assert server.value("gpu_prefix_cache_hits_total") == stats.prefix_cache_hits


def test_cache_config_info(server):
    page = server.metrics.page().decode()
    line = next(line for line in page.splitlines() if line.startswith("vllm:cache_config_info{"))
    kv_cache_config = server.engine.engine_core.kv_cache_config
    for label in (f'block_size="{kv_cache_config.block_size}"', f'num_gpu_blocks="{kv_cache_config.num_blocks}"'):
        assert label in line
    assert line.endswith(" 1.0")


def test_two_servers_in_one_process_do_not_clash(server):
    other = Server()
    server.add("a", max_tokens=2)
    server.finish()
    assert server.value("generation_tokens_total") == 2 and other.value("generation_tokens_total") == 0


def test_without_statistics_the_page_has_the_process_and_http_only(server):
    config, kv_cache_config = server.engine.config, server.engine.engine_core.kv_cache_config
    metrics = ServerMetrics("tiny", config, kv_cache_config, log_stats=False)
    assert metrics.observers == []
    page = metrics.page().decode()
    assert "vllm:" not in page and "process_resident_memory_bytes" in page and "http_requests_total" in page


def test_http_requests_are_counted_by_route_method_and_class_of_status(server):
    http = server.metrics.http
    http.observe("/v1/completions", "POST", 200, 0.3)
    http.observe("/v1/completions", "POST", 400, 0.004)
    http.observe("/v1/models", "GET", 200, 0.001)
    samples = server.samples()
    post = (("handler", "/v1/completions"), ("method", "POST"))
    assert samples["http_requests_total", (*post, ("status", "2xx"))] == 1
    assert samples["http_requests_total", (*post, ("status", "4xx"))] == 1
    assert samples["http_request_duration_seconds_bucket", (post[0], ("le", "0.1"), post[1])] == 1
    assert samples["http_request_duration_seconds_count", post] == 2
    assert samples["http_request_duration_highr_seconds_count", ()] == 3


def test_a_client_cannot_make_up_series(server):
    for number in range(50):
        server.metrics.http.observe("none", f"METHOD{number}", 404, 0.1)
    assert server.samples()["http_requests_total", (("handler", "none"), ("method", "OTHER"), ("status", "4xx"))] == 50


def test_a_bucket_holds_the_values_up_to_its_bound():
    histogram = Histogram((1, 2, 5))
    for value in (0, 1, 1.5, 2, 5, 6):
        histogram.observe(value)
    assert histogram.cumulative() == [2, 4, 5, 6] and histogram.sum == 15.5


@pytest.mark.parametrize("longest", [1, 4, 5, 512, 8192, 1_000_000])
def test_length_buckets(longest):
    bounds = length_buckets(longest)
    assert bounds[0] == 1 and longest / 2.5 < bounds[-1] <= longest
    assert all(str(b).strip("0") in ("1", "2", "5") for b in bounds) and list(bounds) == sorted(set(bounds))


# ---- the line in the log


class Clock:
    """A loop's timer and a clock that tests move."""

    def __init__(self):
        self.now, self.timers = 100.0, []

    def __call__(self):
        return self.now

    def call_later(self, seconds, callback):
        self.timers.append((self.now + seconds, callback))
        return asyncio.TimerHandle(self.now + seconds, callback, (), asyncio.new_event_loop())

    def advance(self, seconds):
        self.now += seconds
        due, self.timers = [t for t in self.timers if t[0] <= self.now], [t for t in self.timers if t[0] > self.now]
        for _, callback in due:
            callback()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("folovllm.metrics.log.asyncio.get_running_loop", lambda: clock)
    return clock


def stats(prompt, generation, running=1, waiting=0):
    numbers = {"kv_cache_usage": 0.125, "num_used_slots": 0, "num_reserved_slots": 0, "num_steps": generation}
    tokens = {"num_prompt_tokens": prompt, "num_generation_tokens": generation, "num_scheduled_tokens": 1}
    return EngineStats(
        num_running=running, num_waiting=waiting, num_preemptions=0, prefix_cache_hit_rate=0.5, **numbers, **tokens
    )


def test_a_line_per_interval_of_work_one_with_zeros_and_then_silence(clock, caplog):
    log = ThroughputLog(10.0, clock)
    with caplog.at_level(logging.INFO, "folovllm.metrics.log"):
        log.on_step(stats(100, 1), [])
        clock.advance(5)
        log.on_step(stats(200, 30, running=2, waiting=3), [])
        clock.advance(5)
        log.on_step(stats(200, 80, running=0), [])
        clock.advance(10)
        clock.advance(10)
        assert len(caplog.messages) == 3 and not clock.timers
        clock.advance(3600)
        log.on_step(stats(210, 81), [])
        clock.advance(10)
    assert caplog.messages[0] == (
        "Engine 000: Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: 3.0 tokens/s, Running: 2 reqs, "
        "Waiting: 3 reqs, GPU KV cache usage: 12.5%, Prefix cache hit rate: 50.0%"
    )
    assert "prompt throughput: 0.0 tokens/s, Avg generation throughput: 5.0 tokens/s, Running: 0" in caplog.messages[1]
    assert "prompt throughput: 0.0 tokens/s, Avg generation throughput: 0.0 tokens/s" in caplog.messages[2]
    # The hour without work is in no interval.
    assert "prompt throughput: 1.0 tokens/s, Avg generation throughput: 0.1 tokens/s" in caplog.messages[3]


def test_requests_that_are_stuck_are_logged_too(clock, caplog):
    log = ThroughputLog(10.0, clock)
    with caplog.at_level(logging.INFO, "folovllm.metrics.log"):
        log.on_step(stats(100, 1), [])
        for _ in range(4):
            clock.advance(10)
    assert len(caplog.messages) == 4 and len(clock.timers) == 1


# ---- a server


@pytest.fixture(scope="module")
def running():
    with running_server() as running:
        yield running


def page_of(running):
    answer = running.get("/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


def change(before, after, name, **labels):
    model = next(dict(key[1])["model_name"] for key in after if key[0] == "vllm:num_requests_running")
    if name.startswith("vllm:"):
        labels |= {"model_name": model, "engine": "0"}
    key = (name, tuple(sorted(labels.items())))
    return after[key] - before.get(key, 0.0)


def test_the_page_of_a_server(running):
    before = page_of(running)
    body = {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 4, "n": 2, "ignore_eos": True, "temperature": 1}
    assert running.post("/v1/completions", body).status == 200
    assert running.post("/v1/completions", body | {"stream": True}).status == 200
    assert running.post("/v1/completions", body | {"n": -1}).status == 400
    after = page_of(running)
    assert change(before, after, "vllm:generation_tokens_total") == 32
    assert change(before, after, "vllm:request_success_total", finished_reason="length") == 8
    assert change(before, after, "vllm:request_params_n_sum") == 8
    assert change(before, after, "vllm:request_params_n_count") == 4
    assert change(before, after, "vllm:inter_token_latency_seconds_count") == 24
    route = {"handler": "/v1/completions", "method": "POST"}
    assert change(before, after, "http_requests_total", status="2xx", **route) == 2
    assert change(before, after, "http_requests_total", status="4xx", **route) == 1
    assert change(before, after, "http_request_duration_seconds_count", **route) == 3
    assert not any("/metrics" in dict(labels).get("handler", "") for _, labels in after)  # it does not count itself


def test_a_stop_string_counts_as_stop_and_a_client_that_leaves_as_abort(running):
    prompt = {"prompt": [5, 6, 7], "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    text = running.post("/v1/completions", prompt).json["choices"][0]["text"]
    stop = next(character for character in text if character.isascii() and character.isalnum())
    before = page_of(running)
    assert running.post("/v1/completions", prompt | {"stop": [stop]}).json["choices"][0]["finish_reason"] == "stop"

    async def leave():
        stream = await running.state.engine.add_request(
            "left", {"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=99)
        )
        async with stream:
            await anext(stream)

    running.in_loop(leave)
    deadline = time.monotonic() + 30
    while change(before, after := page_of(running), "vllm:request_success_total", finished_reason="abort") < 1:
        assert time.monotonic() < deadline, "the abort is not counted"  # the engine learns of it a moment later
    assert change(before, after, "vllm:request_success_total", finished_reason="stop") == 1
    assert change(before, after, "vllm:request_success_total", finished_reason="abort") == 1
    assert not running.state.metrics.observers[0]._unfinished


def test_disable_log_stats():
    with running_server(engine={"disable_log_stats": True}) as running:
        body = running.get("/metrics").body.decode()
    assert "vllm:" not in body and "process_resident_memory_bytes" in body
