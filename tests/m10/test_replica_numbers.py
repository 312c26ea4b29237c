"""What users and Prometheus see of several engines: metrics, log lines, /health, limits, the start, the page; and how
engines share a machine.
"""

import asyncio
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from folovllm import LLM, platforms
from folovllm.config import EngineConfig, engine_arg_names
from folovllm.cpus import CpuCount
from folovllm.engine.start_core import share_threads
from folovllm.entrypoints.openai.health import health
from folovllm.entrypoints.openai.listen import bind
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.start_block import start_block
from folovllm.entrypoints.openai.state import ServerState, make_state
from folovllm.entrypoints.start import start_async_llm
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.parallel import ParallelConfig
from folovllm.trace.lint import lint
from folovllm.trace.record import read_trace
from folovllm.trace.watch import MAX_LINES, Watcher, Watchers
from folovllm.worker.worker import rank_device
from tests.m8.chromium import chromium
from tests.m8.server_process import running_server
from tests.m8.serving_helpers import (
    assert_all_free,
    collect,
    eventually,
    greedy,
    oracle,
    prompt_ids,
    run_async,
    serving_config,
)
from tests.m8.test_web_page import in_browser, open_chat
from tests.m10.replica_helpers import Replicas, all_alive, client_of, kill, make_replicas

pytestmark = pytest.mark.m10


def values(state: ServerState, name: str) -> dict[str, float]:
    """Engine -> the value of vllm:`name`; the page is read by Prometheus's own parser."""
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(state.metrics.page().decode())
        for sample in family.samples
        if sample.name == f"vllm:{name}" and sample.labels.get("finished_reason", "length") == "length"
    }


# ---- numbers


def test_each_engine_has_metrics_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """They sum up to what one engine would show, also if a request goes on in another engine."""
    caplog.set_level(logging.CRITICAL, "folovllm")

    async def test() -> None:
        replicas = Replicas(seconds=0.002)
        async with make_replicas(replicas) as engine:
            state = make_state(engine, ServerOptions())
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(50)) for i in range(8)]
            answers = asyncio.gather(*map(collect, streams))
            await eventually(lambda: engine.stats.num_generation_tokens > 80)
            await kill(engine, replicas, 0)
            await answers
            await all_alive(engine)
            again = [await engine.add_request(f"s{i}", prompt_ids(i), greedy(50)) for i in range(4)]
            await asyncio.gather(*map(collect, again))
            await assert_all_free(engine)
            for name, total in (
                ("request_success_total", 12),
                ("request_generation_tokens_sum", 600),
                ("request_params_n_count", 12),
                ("time_to_first_token_seconds_count", 12),
                ("inter_token_latency_seconds_count", 12 * 49),
                ("prompt_tokens_total", 120),
                ("num_requests_running", 0),
                ("cache_config_info", 2),
            ):
                by_engine = values(state, name)
                assert set(by_engine) == {"0", "1"} and sum(by_engine.values()) == total, (name, by_engine)
            assert all(values(state, "request_success_total").values()), "both have ended requests"
            assert sum(values(state, "iteration_tokens_total_count").values()) <= engine.stats.num_steps

    run_async(test)


def test_each_engine_has_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with make_replicas(Replicas()) as engine:
            state = make_state(engine, ServerOptions())
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(5)) for i in range(4)]
            await asyncio.gather(*map(collect, streams))
            for _, log in state.metrics.observers[0]._observers:  # type: ignore[attr-defined]
                log.log()

    with caplog.at_level(logging.INFO, "folovllm.metrics.log"):
        run_async(test)
    assert [line.partition(":")[0] for line in caplog.messages] == ["Engine 000", "Engine 001"]


def test_health_says_whether_an_engine_lives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "folovllm")

    async def status_of(state: ServerState) -> int:
        app = type("App", (), {"state": type("State", (), {"server": state})})
        try:
            return (await health(type("Request", (), {"app": app}))).status_code  # type: ignore[arg-type]
        except Exception as error:
            return int(error.status)  # type: ignore[attr-defined]

    async def test() -> None:
        replicas = Replicas(seconds=0.001)
        async with make_replicas(replicas) as engine:
            state = make_state(engine, ServerOptions())
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(100)) for i in range(4)]
            answers = asyncio.gather(*map(collect, streams))
            await eventually(lambda: engine.stats.num_generation_tokens > 10)
            replicas.may_start.clear()
            await kill(engine, replicas, 0)
            assert await status_of(state) == 200
            await eventually(lambda: engine.stats.num_running == 4)
            await kill(engine, replicas, 1)
            assert await status_of(state) == 503
            replicas.may_start.set()
            await answers
            assert await status_of(state) == 200

    run_async(test)


def test_a_server_holds_as_many_requests_as_its_engines_together() -> None:
    async def test() -> None:
        async with make_replicas(Replicas(), max_num_seqs=3) as engine:
            state = make_state(engine, ServerOptions(max_queue=2))
            with state.admit(7), state.admit(1), pytest.raises(Exception, match="8 requests are running or waiting"):
                with state.admit(1):
                    pass
            with bind(ServerOptions(port=0)) as listener:
                text = start_block(state, listener)
            assert "6 run at once, 2 more may wait" in text
            assert "engines   2, each with all weights and a KV cache as above" in text

    run_async(test)


# ---- traces


def test_the_trace_of_an_engine_that_takes_over_is_without_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that comes with tokens of its answer is a longer prompt to the engine, and to the trace."""
    caplog.set_level(logging.CRITICAL, "folovllm")

    async def test() -> None:
        replicas = Replicas(seconds=0.001)
        async with make_replicas(replicas, trace=str(tmp_path / "run.jsonl")) as engine:
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(60)) for i in range(6)]
            answers = asyncio.gather(*map(collect, streams))
            await eventually(lambda: engine.stats.num_generation_tokens > 60)
            replicas.may_start.clear()
            await kill(engine, replicas, 0)
            assert await answers == [oracle(prompt_ids(i), 60) for i in range(6)]
            replicas.may_start.set()
            await all_alive(engine)

    run_async(test)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.0-2.jsonl", "run.0.jsonl", "run.1.jsonl"]
    trace = read_trace(tmp_path / "run.1.jsonl")
    assert lint(trace) == []
    added = [event for record in trace.steps for event in record["events"] if event[0] == "add"]
    assert len(added) == 6 and sum(event[2] > 10 for event in added) == 3, "three came with tokens"
    assert all(event[2] + event[3] == 70 for event in added)


def taken(watcher: Watcher) -> list[tuple[Any, int]]:
    lines = [json.loads(line) for line in watcher._lines]
    watcher._lines.clear()
    return [(line.get("type"), line["replica"]) for line in lines]


def test_a_slow_watcher_gets_a_snapshot_of_every_engine() -> None:
    """The snapshot of one engine says nothing about the blocks of another one."""

    async def test() -> None:
        asked: list[str] = []
        watchers = Watchers(asked.append)
        watcher = watchers.join()
        start = [{"type": kind, "replica": i} for i in (0, 1) for kind in ("header", "snapshot")]
        watchers.put([{"replica": 1}, *start, {"replica": 0}, {"replica": 1}])
        assert taken(watcher) == [*((line["type"], line["replica"]) for line in start), (None, 0), (None, 1)]
        watchers.put([{"replica": i % 2} for i in range(MAX_LINES + 1)])
        assert asked == ["watch", "watch"] and taken(watcher) == []
        watchers.put([*start[:2], {"replica": 0}, {"replica": 1}])
        assert taken(watcher) == [("header", 0), ("snapshot", 0), (None, 0)], (
            "the lines of engine 1 wait for a snapshot"
        )
        watchers.put([*start[2:], {"replica": 1}])
        assert taken(watcher) == [("header", 1), ("snapshot", 1), (None, 1)] and len(asked) == 2

    run_async(test)


# ---- sharing a machine


def config_of(**args: Any) -> EngineConfig:
    return dataclasses.replace(serving_config(), parallel_config=ParallelConfig(**args))


def test_engines_share_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(platforms, "usable_cpus", lambda: CpuCount(8, "a test"))
    assert share_threads(config_of()).cpu_threads is None
    assert share_threads(config_of(data_parallel_size=2)).cpu_threads == 4
    assert share_threads(config_of(data_parallel_size=2, tensor_parallel_size=2)).cpu_threads == 2
    assert share_threads(config_of(data_parallel_size=16)).cpu_threads == 1
    assert share_threads(config_of(data_parallel_size=2, data_parallel_backend="ray")).cpu_threads is None
    given = dataclasses.replace(config_of(data_parallel_size=2), cpu_threads=7)
    assert share_threads(given).cpu_threads == 7


def test_engines_share_the_memory(tiny_model_dir: Callable[[str], Path]) -> None:
    folder = tiny_model_dir("llama")
    sizes = []
    for size in (1, 2):
        config = EngineConfig.from_args(model=str(folder), data_parallel_size=size)
        executor = UniProcExecutor(_resolved(config, folder), folder)
        sizes.append(executor.available_kv_cache_bytes())
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.2)


def _resolved(config: EngineConfig, folder: Path) -> EngineConfig:
    from folovllm.engine.start_core import resolve_config
    from folovllm.hf_config import load_hf_config

    return resolve_config(config, load_hf_config(folder))


def test_engines_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def device(**args: Any) -> str:
        config = dataclasses.replace(config_of(**args), device="cuda")
        return str(rank_device(config, config.parallel_config.shard(config.parallel_config.world_size - 1)))

    assert device() == "cuda"
    assert device(data_parallel_size=4, data_parallel_rank=3) == "cuda:3"
    assert device(data_parallel_size=2, tensor_parallel_size=2, data_parallel_rank=1) == "cuda:3"
    with pytest.raises(ValueError, match="data_parallel_size=5 need 5 GPUs, and there are 4"):
        device(data_parallel_size=5)


def test_an_llm_is_one_engine(tiny_model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"data_parallel_size=2: an LLM is one engine.*folovllm serve -dp 2"):
        LLM(str(tiny_model_dir("llama")), data_parallel_size=2)


def test_several_engines_are_processes(tiny_model_dir: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="engines cannot be threads of one process"):
        asyncio.run(start_async_llm(str(tiny_model_dir("llama")), data_parallel_size=2, in_process=False))


def test_the_rank_is_no_argument() -> None:
    assert "data_parallel_rank" not in engine_arg_names() and "data_parallel_size" in engine_arg_names()


# ---- the page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@in_browser
async def test_the_page_shows_the_engine_that_is_chosen(browser: str) -> None:
    """The other engine's lines are another engine's blocks. Each choice begins with a snapshot."""
    replicas = Replicas(seconds=0.02)
    with running_server(make_engine=functools.partial(make_replicas, replicas, num_kv_blocks=65)) as server:
        async with open_chat(server, browser) as page:
            await page.until("!document.getElementById('which').hidden")
            assert await page.evaluate("document.getElementById('which').textContent") == "engine 0engine 1"
            stream = server.in_loop(
                functools.partial(server.state.engine.add_request, "one", prompt_ids(1), greedy(240))
            )
            owner = next(sent.replica for sent in client_of(server.state.engine)._requests._requests.values())
            for shown in (owner, 1 - owner, owner):
                await page.evaluate(
                    f"document.getElementById('which').selectedIndex = {shown};"
                    "document.getElementById('which').dispatchEvent(new Event('change'));"
                )
                is_busy = "true" if shown == owner else "false"
                await page.until(f"(document.getElementById('state').dataset.is === 'busy') === {is_busy}")
                await page.until(f"(document.getElementById('num-running').textContent === '1') === {is_busy}")
            replicas.may_start.clear()
            server.in_loop(functools.partial(kill, server.state.engine, replicas, owner))
            await page.until("document.getElementById('state').innerText === 'dead, starts again'")
            replicas.may_start.set()
            await page.until("document.getElementById('state').dataset.is !== 'lost'")
            server.in_loop(stream.aclose)
