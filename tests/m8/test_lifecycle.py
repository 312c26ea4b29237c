"""How a server begins and ends: the socket, signals, open streams, the engine's death; and the real command."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.entrypoints.openai import lifecycle
from folovllm.entrypoints.openai.lifecycle import Signals, read_template
from folovllm.entrypoints.openai.listen import bind
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.start_block import start_block
from folovllm.executor.fake import FakeExecutor
from folovllm.parallel import ParallelConfig
from tests.m8.server_process import (
    LONG_CHAT,
    Answer,
    SlowExecutor,
    open_stream,
    running_server,
    serve_process,
    slow_executor,
)
from tests.m8.serving_helpers import TIMEOUT, VOCAB_SIZE, Gated, assert_all_free, wait_until

pytestmark = pytest.mark.m8

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "ignore_eos": True}


class DyingExecutor(SlowExecutor):
    """Once `dies` is set, a step ends the engine: SystemExit is no error of a request."""

    dies = threading.Event()

    def execute(self, scheduler_output: Any) -> Any:
        if self.dies.is_set():
            raise SystemExit("the model has gone")
        return super().execute(scheduler_output)


def dying_executor(config: EngineConfig) -> FakeExecutor:
    DyingExecutor.dies = threading.Event()
    return DyingExecutor(vocab_size=VOCAB_SIZE)


def rest_of(response: http.client.HTTPResponse) -> Answer:
    return Answer(200, {}, response.read())


# ---- shutting down


def test_after_a_signal_open_streams_run_on_and_new_requests_are_refused() -> None:
    held = Gated()
    held.executor.gate.clear()
    held.executor.num_free_steps = 2  # a step that gives the first token, and one more
    engine = {"executor_factory": held}
    with running_server(engine, shutdown_timeout=TIMEOUT) as server, open_stream(server) as response:
        server.send_signal()
        wait_until(lambda: server.state.is_draining)
        for path in ("/v1/models", "/live"):
            refused = server.get(path)
            assert (refused.status, refused.headers["retry-after"]) == (503, "1"), path
            assert refused.error["type"] == "unavailable_error"
        assert server.post("/v1/chat/completions", CHAT).status == 503
        health = server.get("/health")
        assert health.status == 503 and "draining" in health.error["message"]
        assert server.get("/metrics").status == server.get("/version").status == 200
        held.executor.gate.set()
        answer = rest_of(response)
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert answer.events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0


def test_after_the_time_open_streams_end_with_abort_and_done() -> None:
    with running_server({"executor_factory": slow_executor}, shutdown_timeout=0.2) as server:
        with open_stream(server) as response, open_stream(server) as other:
            server.send_signal(signal.SIGINT)
            for answer in (rest_of(response), rest_of(other)):
                assert answer.body.endswith(b"data: [DONE]\n\n")
                assert answer.events[-1]["choices"][0]["finish_reason"] == "abort"
        assert server.wait() == 0


def test_an_answer_that_is_not_streamed_ends_with_abort_too() -> None:
    with running_server({"executor_factory": slow_executor}, shutdown_timeout=0.2) as server:
        answers: list[Answer] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.post("/v1/chat/completions", LONG_CHAT | {"stream": False}))
        )
        asking.start()
        wait_until(lambda: server.state.engine.num_unfinished)
        server.send_signal()
        asking.join(TIMEOUT)
        assert answers[0].status == 200 and answers[0].json["choices"][0]["finish_reason"] == "abort"
        assert server.wait() == 0


def test_a_second_signal_ends_at_once() -> None:
    with running_server({"executor_factory": slow_executor}, shutdown_timeout=60.0) as server:
        with open_stream(server, LONG_CHAT | {"max_tokens": 240}):
            server.send_signal()
            server.send_signal(signal.SIGINT)
            assert server.wait() == 128 + signal.SIGINT


def test_an_idle_server_ends_and_closes_its_port() -> None:
    with running_server() as server:
        assert server.get("/health").status == 200
        server.send_signal()
        assert server.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            server.get("/health")


def test_a_client_that_stays_connected_does_not_keep_the_server_alive() -> None:
    with running_server(shutdown_timeout=0.2) as server, open_stream(server):
        server.send_signal()
        assert server.wait() == 0


def test_a_watcher_of_the_live_page_does_not_keep_the_server_alive() -> None:
    with running_server() as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as watcher:
            watcher.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert watcher.recv(100)
            server.send_signal()
            assert server.wait() == 0


# ---- the engine's death


def test_after_the_engines_death_health_has_the_cause_and_the_status_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "SECONDS_WITH_CAUSE", TIMEOUT)
    with running_server({"executor_factory": dying_executor}) as server, open_stream(server) as response:
        DyingExecutor.dies.set()
        last = rest_of(response)
        assert last.events[-1]["error"]["code"] == 500 and last.body.endswith(b"data: [DONE]\n\n")
        time.sleep(0.3)  # a server that ended at once would be gone
        health = server.get("/health")
        assert health.status == 503 and "the model has gone" in health.error["message"]
        assert server.post("/v1/chat/completions", CHAT).status == 500
        server.send_signal()
        server.send_signal()
        assert server.wait() == 1


# ---- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(stream: bool) -> None:
    with running_server({"executor_factory": slow_executor}) as server:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)) as connection:
            body = json.dumps(LONG_CHAT | {"stream": stream, "max_tokens": 240})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            wait_until(lambda: server.state.engine.num_unfinished)
        server.in_loop(lambda: assert_all_free(server.state.engine))
        assert server.state.engine.stats.num_generation_tokens < 200, "it was not computed to its end"


# ---- the socket


def test_a_port_in_use_is_told_in_a_line_that_names_the_option() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 is in use: .*--port 0"):
            with bind(ServerOptions(port=port)):
                pass


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1"):
        with bind(ServerOptions(host="192.0.2.1", port=0)):
            pass
    with pytest.raises(ValueError, match="correct --host"):
        with bind(ServerOptions(host="no such host", port=0)):
            pass


def test_before_the_engine_is_ready_connections_are_refused() -> None:
    with bind(ServerOptions(port=0)) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname(), timeout=TIMEOUT)


def test_a_unix_socket_serves_and_its_file_goes(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with running_server(uds=str(path)) as server:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        server.send_signal()
        assert server.wait() == 0
    assert not path.exists()


def test_a_socket_left_by_a_crash_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    options = ServerOptions(uds=str(path))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with bind(options) as listener:
        assert stat.S_ISSOCK(path.stat().st_mode)
        listener.listen()
        with pytest.raises(ValueError, match="another process listens"):
            with bind(options):
                pass
        assert path.exists()
    path.write_text("precious")
    with pytest.raises(ValueError, match="is no socket"):
        with bind(options):
            pass
    assert path.read_text() == "precious"
    with pytest.raises(ValueError, match="correct the path"):
        with bind(ServerOptions(uds=str(tmp_path / "missing" / "s"))):
            pass


# ---- before the start, and at it


def test_a_chat_template_is_a_file_or_a_text(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert read_template(None) is None
    assert read_template(str(file)) == read_template("{{ messages }}") == "{{ messages }}"
    for given, message in ((str(tmp_path / "no.jinja"), "No such file"), ("{% for %}", "--chat-template: ")):
        with pytest.raises(ValueError, match=message):
            read_template(given)


def test_the_start_names_the_address_the_room_and_a_command() -> None:
    with running_server(api_key=("secret",)) as server:
        with bind(ServerOptions(port=0)) as listener:
            text = start_block(server.state, listener)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert text.startswith(f"FoloVLLM serves at {url}\n") and f"curl {url}/v1/chat/completions" in text
    assert "4,096 tokens: 16 requests of 256 tokens" in text and "256 more may wait" in text
    assert "Bearer KEY" in text and "secret" not in text


def test_the_start_names_the_ranks_of_a_model() -> None:
    with running_server() as server, bind(ServerOptions(port=0)) as listener:
        assert "ranks" not in start_block(server.state, listener)
        config = server.state.engine.config
        server.state.engine.config = dataclasses.replace(config, parallel_config=ParallelConfig(2, 3))
        text = start_block(server.state, listener)
    assert "  ranks     2 x 3 ranks (tensor x pipeline parallel), gloo\n" in text


def test_a_server_on_every_network_is_shown_by_an_address_that_can_be_asked() -> None:
    with running_server() as server:
        server.state.options = ServerOptions(host="0.0.0.0", port=0)
        with bind(server.state.options) as listener:
            text = start_block(server.state, listener)
    assert text.startswith("FoloVLLM serves at http://127.0.0.1:") and "every network" in text.splitlines()[0]
    assert "http://0.0.0.0" not in text and "every client that reaches this address is served" in text


def test_signals_are_counted() -> None:
    async def main() -> Signals:
        signals = Signals()
        signals.receive(signal.SIGINT)
        assert signals.first.is_set() and not signals.second.is_set()
        signals.receive(signal.SIGTERM)
        assert signals.second.is_set()
        return signals

    assert asyncio.run(main()).number == signal.SIGTERM


# ---- the real command


@pytest.mark.weights
def test_the_command_serves_ends_at_sigterm_and_its_front_end_has_no_torch() -> None:
    arguments = ("--served-model-name", "mine", "--max-model-len", "512", "--kv-cache-memory", "64M")
    with serve_process(*arguments) as server:
        assert "model     mine, " in server.start
        body = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        answer = server.post("/v1/completions", body)
        assert answer.status == 200 and answer.json["model"] == "mine" and "Paris" in answer.json["choices"][0]["text"]
        maps = Path(f"/proc/{server.process.pid}/maps")
        assert not maps.exists() or "libtorch" not in maps.read_text()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(TIMEOUT) == 0


@pytest.mark.weights
def test_the_death_of_the_engines_process_ends_the_command() -> None:
    psutil = pytest.importorskip("psutil")
    with serve_process("--max-model-len", "512", "--kv-cache-memory", "64M") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        engine = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
        os.kill(engine.pid, signal.SIGKILL)
        deadline = time.monotonic() + TIMEOUT
        while (health := server.get("/health")).status == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert health.status == 503 and "SIGKILL" in health.error["message"]
        assert server.process.wait(TIMEOUT) == 1


@pytest.mark.weights
def test_a_signal_while_the_model_is_loaded_ends_the_command() -> None:
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "folovllm", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            # The engine's process has been started, and takes seconds to import torch and to load the model.
            wait_until(lambda: psutil.Process(process.pid).children())
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    assert "serves at" not in output
