"""The Ray Serve application: the server's routes, replicas that die, replicas that are added; and bad arguments."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from folovllm.entrypoints.ray_serve import build_app
from tests.m8.server_process import Client
from tests.m10.conftest import kill, wait_for

pytestmark = [pytest.mark.m10, pytest.mark.ray]
ARGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "cpu_threads": 1}
BODY: dict[str, Any] = {"prompt": "the other thing", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[[str], Path]) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def server(ray_cluster: Any, model: str) -> Iterator[Client]:
    """The application on a free port, with one to two replicas."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"model": model, "served_model_name": "tiny", "max_replicas": 2, "target_ongoing_requests": 1}
    serve.run(build_app(ARGS | args | {"api_key": "secret"}))
    yield Client(port)
    serve.shutdown()


def ask(server: Client, **changes: Any) -> Any:
    return server.post("/v1/completions", BODY | changes, Authorization="Bearer secret")


def test_the_routes_are_those_of_the_server(server, model):
    from folovllm import LLM, SamplingParams

    expected = LLM(model, **ARGS).generate(BODY["prompt"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    answer = ask(server)
    assert answer.status == 200, answer.body
    assert answer.json["choices"][0]["text"] == expected[0].outputs[0].text
    assert server.get("/health").status == 200
    assert server.get("/v1/models", Authorization="Bearer secret").json["data"][0]["id"] == "tiny"
    assert server.post("/v1/completions", BODY).status == 401
    assert "max_tokens" in ask(server, max_tokens=-1).error["message"]
    streamed = "".join(event["choices"][0]["text"] for event in ask(server, stream=True).events if event["choices"])
    assert streamed == expected[0].outputs[0].text
    assert b"vllm:" in server.get("/metrics").body


def test_a_load_adds_a_replica_and_a_dead_one_is_replaced(server):
    """One replica at the start. Requests that stay open start a second one; then both are killed."""
    with ThreadPoolExecutor(8) as pool:
        wait_for(lambda: _keep_busy(pool, server) and num_running() == 2, "there is still one replica", seconds=120)
    for pid in replica_pids():
        kill(pid)
    wait_for(lambda: ask_anyway(server) == 200, "no replica answers any more", seconds=120)


def _keep_busy(pool: ThreadPoolExecutor, server: Client) -> bool:
    answers = list(pool.map(lambda _: ask(server, max_tokens=100, ignore_eos=True).status, range(16)))
    assert set(answers) == {200}
    return True


def ask_anyway(server: Client) -> int:
    """The status, or 0 if the connection broke: Ray Serve may send a request to a replica that has just died."""
    try:
        status: int = ask(server).status
    except OSError:
        return 0
    return status


def num_running() -> int:
    from ray import serve

    return serve.status().applications["default"].deployments["folovllm"].replica_states.get("RUNNING", 0)


def replica_pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "ServeReplica" in "".join(child.cmdline()[:1])]
