"""Servers for tests, and a small client: in a thread with the fake model, or as the real command in a process.

E.g.  with running_server(api_key=("secret",)) as server: server.get("/health").status
"""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from folovllm.config import EngineConfig
from folovllm.entrypoints.openai.lifecycle import Signals, run_until_end
from folovllm.entrypoints.openai.listen import bind
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.state import ServerState, make_state
from folovllm.executor.fake import FakeExecutor
from tests.m8.serving_helpers import TIMEOUT, VOCAB_SIZE, make_async_llm

CHAT_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)

LONG_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 0,
    "ignore_eos": True,
    "max_tokens": 200,
    "stream": True,
}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer, after a check of its form."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"} and list(self.json) == ["error"]
        assert "Traceback" not in error["message"] and "http" not in error["message"]
        return error

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON of the events of a stream, without [DONE]."""
        lines = [line.removeprefix("data: ") for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class Client:
    """Asks a server on 127.0.0.1, with a connection for each question."""

    def __init__(self, port: int) -> None:
        self.port = port

    def request(
        self, method: str, path: str, body: bytes | Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """`body` is sent as it is if it is bytes, and as JSON otherwise."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, names, response.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.request("POST", path, body, headers)


class RunningServer(Client):
    """A server in a thread of this process."""

    def __init__(self, port: int, state: ServerState, signals: Signals, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(port)
        self.state, self.signals, self.loop = state, signals, loop
        self.thread: threading.Thread
        self.exit_status: int | None = None

    def in_loop(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Runs a coroutine on the server's event loop and returns its result."""
        return asyncio.run_coroutine_threadsafe(make(), self.loop).result(TIMEOUT)

    def send_signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """As if the process got this signal."""
        self.loop.call_soon_threadsafe(self.signals.receive, number)

    def wait(self) -> int:
        """The exit status, when the server has ended."""
        self.thread.join(TIMEOUT)
        assert self.exit_status is not None, "the server has not ended"
        return self.exit_status


@contextlib.contextmanager
def running_server(
    engine: dict[str, Any] | None = None, make_engine: Callable[..., Any] = make_async_llm, **options: Any
) -> Iterator[RunningServer]:
    """A server on a free port, until the end of the block. `engine` is for `make_engine`."""
    ready, running, failure = threading.Event(), list[RunningServer](), list[BaseException]()

    async def main() -> None:
        server_options = ServerOptions(**{"port": 0, "shutdown_timeout": 5.0, "chat_template": CHAT_TEMPLATE} | options)
        async with make_engine(**engine or {}) as llm:
            with bind(server_options) as listener:
                state = make_state(llm, server_options, server_options.chat_template)
                loop, signals = asyncio.get_running_loop(), Signals()
                port = 0 if server_options.uds else listener.getsockname()[1]
                running.append(RunningServer(port, state, signals, loop))
                running[0].exit_status = await run_until_end(state, listener, signals, ready.set)

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failure.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    assert ready.wait(TIMEOUT)
    if failure:
        raise failure[0]
    running[0].thread = thread
    try:
        yield running[0]
    finally:
        if thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended
                running[0].send_signal()
                running[0].send_signal()
        thread.join(TIMEOUT)
    if failure:
        raise failure[0]


# ---- requests that take their time


class SlowExecutor(FakeExecutor):
    """A step takes 20 ms, so that a stream of 200 tokens is still open when something happens to it."""

    def execute(self, scheduler_output: Any) -> Any:
        time.sleep(0.02)
        return super().execute(scheduler_output)


def slow_executor(config: EngineConfig) -> FakeExecutor:
    return SlowExecutor(vocab_size=VOCAB_SIZE)


@contextlib.contextmanager
def open_stream(server: RunningServer, body: dict[str, Any] = LONG_CHAT) -> Iterator[http.client.HTTPResponse]:
    """A stream of which the first event has come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        response.readline()
        yield response


# ---- the real command


class ServeProcess(Client):
    """`folovllm serve`, as a user starts it."""

    def __init__(self, process: "subprocess.Popen[str]", start: str) -> None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", start)
        super().__init__(int(found[1]) if found else 0)
        self.process = process
        self.start = start  # what it has printed


@contextlib.contextmanager
def serve_process(*arguments: str) -> Iterator[ServeProcess]:
    """The command in a process, ready; on a free port unless `arguments` say otherwise. It is killed at the end."""
    command = [sys.executable, "-m", "folovllm", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        start = ""
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            start += line
            if line.startswith("Ctrl-C"):
                break
        else:
            raise AssertionError(f"the server did not start: {process.stderr.read()}")
        yield ServeProcess(process, start)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
