"""Several engines as processes, and real faults: kill -9 under load, poison, the end of the front end, half a request.

Nothing may hang, no request may be lost or answered twice, and no process may be left behind.
"""

import asyncio
import functools
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM, RequestFailedError
from folovllm.engine.core_client import ProcessCoreClient
from folovllm.entrypoints.openai.sse import EventStream
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import ModelRunnerOutput
from tests.m8.server_process import ServeProcess, serve_process
from tests.m8.serving_helpers import (
    TIMEOUT,
    VOCAB_SIZE,
    assert_all_free,
    collect,
    eventually,
    greedy,
    oracle,
    prompt_ids,
    run_async,
    wait_until,
)
from tests.m8.test_core_client import file_gated, is_alive
from tests.m10.replica_helpers import all_alive, client_of, make_replicas

pytestmark = pytest.mark.m10
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "folovllm")


class SlowExecutor(FakeExecutor):
    """A step takes 5 ms. A request called "bad" kills the process."""

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        time.sleep(0.005)
        if "bad" in handle.num_scheduled_tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(handle)


def slow(config: EngineConfig) -> SlowExecutor:
    return SlowExecutor(VOCAB_SIZE)


def pids_of(engine: AsyncLLM) -> list[int]:
    clients = [replica.client for replica in client_of(engine).replicas]
    return [client.pid or 0 for client in clients if isinstance(client, ProcessCoreClient)]


async def killed(engine: AsyncLLM, index: int) -> None:
    """kill -9, and the front end has noticed."""
    before = client_of(engine).replicas[index].client
    os.kill(pids_of(engine)[index], signal.SIGKILL)
    await eventually(
        lambda: not client_of(engine).replicas[index].is_alive or client_of(engine).replicas[index].client is not before
    )


@pytest.mark.parametrize("has_requests", [True, False])
def test_an_engine_that_hangs_is_replaced(has_requests: bool) -> None:
    """SIGSTOP: the process lives and says nothing. Its requests waited for good, and new ones went there, too."""

    async def test() -> None:
        async with make_replicas(slow, in_process=True, heartbeat_timeout=3.0) as engine:
            stopped, other = pids_of(engine)
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(120)) for i in range(8 * has_requests)]
            answers = asyncio.gather(*map(collect, streams))
            await eventually(lambda: engine.stats.num_generation_tokens >= 10 * has_requests)
            os.kill(stopped, signal.SIGSTOP)
            assert await answers == [oracle(prompt_ids(i), 120) for i in range(8 * has_requests)]
            await eventually(lambda: stopped not in pids_of(engine))
            await all_alive(engine)
            assert pids_of(engine)[1] == other and not is_alive(stopped)
            assert await collect(await engine.add_request("late", prompt_ids(50), greedy(5))) == oracle(
                prompt_ids(50), 5
            )
            await assert_all_free(engine)

    run_async(test)


def slow_start(config: EngineConfig) -> FakeExecutor:
    time.sleep(1.5)
    return FakeExecutor(VOCAB_SIZE)


def test_heartbeats_during_the_start_are_not_taken_for_its_result() -> None:
    async def test() -> None:
        async with make_replicas(slow_start, in_process=True, heartbeat_timeout=3.0) as engine:
            assert await collect(await engine.add_request("r", prompt_ids(1), greedy(5))) == oracle(prompt_ids(1), 5)

    run_async(test)


def test_a_long_step_is_no_reason_to_kill_an_engine(tmp_path: Path) -> None:
    """The loop says nothing during a step, and its process does."""

    async def test() -> None:
        gate = tmp_path / "gate"
        gate.touch()
        factory = functools.partial(file_gated, gate)
        async with make_replicas(factory, in_process=True, heartbeat_timeout=3.0) as engine:
            pids = pids_of(engine)
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(5)) for i in range(2)]
            await asyncio.sleep(6.0)
            gate.unlink()
            assert [await collect(stream) for stream in streams] == [oracle(prompt_ids(i), 5) for i in range(2)]
            assert pids_of(engine) == pids

    run_async(test)


def test_kill_9_under_load_and_again_loses_nothing() -> None:
    """One engine, then the other: for a moment none lives. All requests end as they would have without the kills."""

    async def test() -> None:
        async with make_replicas(slow, in_process=True) as engine:
            pids = pids_of(engine)
            assert len(set(pids)) == 2
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(120)) for i in range(16)]
            answers = asyncio.gather(*map(collect, streams))
            await eventually(lambda: engine.stats.num_generation_tokens > 100)
            await killed(engine, 0)
            requests = client_of(engine)._requests
            await eventually(lambda: not any(sent.is_suspect for sent in requests._requests.values()))
            assert not answers.done()
            await killed(engine, 1)
            late = await engine.add_request("late", prompt_ids(50), greedy(5))
            assert await answers == [oracle(prompt_ids(i), 120) for i in range(16)]
            assert await collect(late) == oracle(prompt_ids(50), 5)
            await all_alive(engine)
            await assert_all_free(engine)
            pids += pids_of(engine)
            assert len(set(pids)) == 4
        assert not any(map(is_alive, pids))

    run_async(test)


def test_a_request_that_kills_its_engine_fails_alone() -> None:
    async def test() -> None:
        async with make_replicas(slow, in_process=True) as engine:
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(60)) for i in range(8)]
            answers = asyncio.gather(*map(collect, streams))
            await eventually(lambda: engine.stats.num_generation_tokens > 50)
            with pytest.raises(RequestFailedError, match="'bad' failed inside the engine"):
                await collect(await engine.add_request("bad", prompt_ids(9), greedy(60)))
            assert await answers == [oracle(prompt_ids(i), 60) for i in range(8)]
            assert not engine.is_dead
            await all_alive(engine)
            await assert_all_free(engine)

    run_async(test)


SCRIPT = """
import asyncio, sys
from tests.m8.serving_helpers import *
from tests.m10.replica_helpers import make_replicas
from tests.m10.test_replica_faults import pids_of, slow

async def main():
    async with make_replicas(slow, in_process=True) as engine:
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        stream = await engine.add_request("r", prompt_ids(1), greedy(200))
        await anext(stream)
        print(*pids_of(engine), flush=True)
        await asyncio.sleep(0 if sys.argv[1] == "end" else 60)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("kill", -signal.SIGKILL)])
def test_the_front_end_takes_all_its_engines_along(how: str, status: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script), how], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as front_end:
        assert front_end.stdout is not None
        pids = [int(pid) for pid in front_end.stdout.readline().split()]
        assert len(pids) == 2
        if how == "kill":
            front_end.kill()
        assert front_end.wait(30) == status
    wait_until(lambda: not any(map(is_alive, pids)))


# ---- the real command


class Streams:
    """Clients that stream completions, each in a thread of its own. `texts[i]` grows with the answer of client i."""

    def __init__(self, server: ServeProcess, bodies: list[dict[str, Any]]) -> None:
        self.texts = [""] * len(bodies)
        self.ends: list[str] = [""] * len(bodies)
        self._threads = [
            threading.Thread(target=self._run, args=(server.port, i, body), daemon=True)
            for i, body in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, port: int, index: int, body: dict[str, Any]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}), headers)
        response, events = connection.getresponse(), EventStream()
        while data := response.read1(65536):
            for event in events.feed(data):
                self.ends[index] += event if event == "[DONE]" or "error" in event else ""
                if event != "[DONE]" and "choices" in event:
                    self.texts[index] += json.loads(event)["choices"][0]["text"]

    def wait(self) -> list[str]:
        for thread in self._threads:
            thread.join(TIMEOUT)
        assert self.ends == ["[DONE]"] * len(self.texts), "each answer ends once, and none with an error"
        return self.texts


def engines_of(server: ServeProcess) -> list[int]:
    psutil = pytest.importorskip("psutil")
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]


def metric(server: ServeProcess, name: str) -> dict[str, float]:
    """Label `engine` -> the value."""
    page = server.get("/metrics").body.decode()
    return {
        found[1]: float(found[2])
        for found in re.finditer(rf'^vllm:{name}{{engine="(\d+)",model_name="[^"]*"}} (.*)$', page, re.MULTILINE)
    }


def test_the_command_serves_with_two_engines_through_a_kill(tiny_model_dir: Callable[[str], Path]) -> None:
    """The texts are those of a server that nothing has happened to, also the sampled ones. SIGTERM ends everything."""
    options = ("-dp", "2", "--kv-cache-memory", "16M", "--dtype", "float32")
    with serve_process(str(tiny_model_dir("llama")), *options) as server:
        assert "engines   2, each with all weights" in server.start
        bodies = [
            {"prompt": [3 + i, 4, 5], "max_tokens": 300, "ignore_eos": True, "temperature": i % 2, "seed": i}
            for i in range(8)
        ]
        expected = Streams(server, bodies).wait()
        assert all(expected) and set(metric(server, "generation_tokens_total")) == {"0", "1"}
        before = metric(server, "generation_tokens_total")
        assert all(before.values()), "both engines have computed"

        pids = engines_of(server)
        half_open = socket.create_connection(("127.0.0.1", server.port))
        half_open.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
        streams = Streams(server, bodies)
        wait_until(lambda: all(streams.texts))
        os.kill(pids[0], signal.SIGKILL)
        assert server.get("/health").status == 200
        assert streams.wait() == expected
        after = metric(server, "generation_tokens_total")
        assert sum(after.values()) >= sum(before.values()) + 8 * 300 and all(after[i] >= before[i] for i in after)
        wait_until(lambda: len(engines_of(server)) == 2)

        pids += engines_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(TIMEOUT) == 0
        half_open.close()
        assert not any(map(is_alive, pids))
