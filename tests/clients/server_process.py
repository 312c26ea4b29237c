"""A real `folovllm serve` process, started and always stopped by the tests that talk to it.

Milestone: M8. The tests run in .venv-clients, and the server runs with the project's own .venv: they share only HTTP.
"""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROJECT_BIN = ROOT / ".venv" / "bin"
READY_SECONDS = 120  # a bound, not a requirement: a busy machine loads the model slowly
STOP_SECONDS = 60


def free_port() -> int:
    """A port that is free now. Another program could take it before the server does; the server then fails to start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ServerProcess:
    """`folovllm serve` with options, its log, its metrics and its processes."""

    def __init__(self, log: Path, *options: str, model: str, uds: Path | None = None) -> None:
        self.log = log
        self.uds = uds
        self.port = free_port()
        where = ["--uds", str(uds)] if uds else ["--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(PROJECT_BIN / "folovllm"), "serve", model, *where, *options],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log_text()[-4000:]}")
            with contextlib.suppress(OSError):
                if self.get("/health")[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready after {READY_SECONDS} s:\n{self.log_text()[-4000:]}")

    # ---- HTTP, without any client library

    def connect(self, timeout: float = 60, receive_buffer: int | None = None) -> socket.socket:
        """A connected socket; `receive_buffer` in bytes makes the client a slow reader sooner."""
        family = socket.AF_UNIX if self.uds else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM)
        client.settimeout(timeout)
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.connect(str(self.uds) if self.uds else ("127.0.0.1", self.port))
        return client

    def connection(self, timeout: float = 60) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if self.uds:
            connection.sock = self.connect(timeout)
        return connection

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers (names in lower case). `body` is sent as JSON unless it is bytes."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        connection = self.connection(timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read(), {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        return self.request("GET", path)

    def post(self, path: str, body: Any, timeout: float = 60) -> tuple[int, bytes, dict[str, str]]:
        return self.request("POST", path, body, timeout=timeout)

    # ---- what it does now

    def metrics(self) -> dict[str, float]:
        """The value of each metric, such as "vllm:num_requests_running", summed over its labels."""
        status, body, _ = self.get("/metrics")
        assert status == 200, body
        sums: dict[str, float] = {}
        for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", body.decode(), re.MULTILINE):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    def load(self) -> dict[str, float]:
        """How many requests run and wait, and which share of the KV cache is used."""
        metrics = self.metrics()
        return {
            "running": metrics["vllm:num_requests_running"],
            "waiting": metrics["vllm:num_requests_waiting"],
            "kv_cache_usage": metrics["vllm:kv_cache_usage_perc"],
        }

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Fails unless all requests end and all blocks are free within `seconds`."""
        idle = {"running": 0.0, "waiting": 0.0, "kv_cache_usage": 0.0}
        deadline = time.monotonic() + seconds
        while (load := self.load()) != idle:
            assert time.monotonic() < deadline, f"not idle after {seconds} s: {load}"
            time.sleep(0.02)

    def wait_until_running(self, count: int, seconds: float = 60) -> None:
        """Fails unless `count` requests are in the engine (running or waiting) within `seconds`."""
        deadline = time.monotonic() + seconds
        while (load := self.load())["running"] + load["waiting"] < count:
            assert time.monotonic() < deadline, f"not {count} requests after {seconds} s: {load}"
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """The front end and all its children."""
        front_end = psutil.Process(self.process.pid)
        return [front_end, *front_end.children(recursive=True)]

    def engine_process(self) -> psutil.Process:
        """The child that runs the engine: the largest one, because multiprocessing's resource tracker is small."""
        children = self.processes()[1:]
        assert children, "the engine does not run in a process of its own"
        return max(children, key=lambda child: child.memory_info().rss)

    def resident_bytes(self) -> dict[str, int]:
        front_end, *children = [process.memory_info().rss for process in self.processes()]
        return {"front end": front_end, "engine": sum(children)}

    # ---- its end

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """The exit status; fails if the server still runs after `seconds`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log_text()[-4000:]}") from None

    def kill(self) -> None:
        """Ends whatever of it is left."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in reversed(self.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(STOP_SECONDS)

    def stop(self) -> None:
        """Asks it to end, and kills it if it does not."""
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
                self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()


@contextlib.contextmanager
def serve(log: Path, *options: str, model: str, uds: Path | None = None) -> Iterator[ServerProcess]:
    """A server that is ready; it is stopped when the block is left, however that happens."""
    server = ServerProcess(log, *options, model=model, uds=uds)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
