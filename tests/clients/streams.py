"""A client that is as rude or as slow as a test wants: raw sockets, and streams that are read by hand.

Milestone: M8.
"""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

from tests.clients.server_process import ServerProcess


def post_bytes(path: str, body: Any, headers: dict[str, str] | None = None, length: int | None = None) -> bytes:
    """A POST request as it goes over the wire. `length`: a Content-Length that promises more than `body`."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def reset(client: socket.socket) -> None:
    """Closes with RST instead of FIN, as a crashed client's kernel does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def read_response(file: Any) -> tuple[int, dict[str, str], bytes]:
    """One response with a Content-Length from a socket's file: status, headers and body."""
    status = int(file.readline().split()[1])
    headers: dict[str, str] = {}
    while (line := file.readline().strip()) != b"":
        name, _, value = line.decode().partition(":")
        headers[name.strip().lower()] = value.strip()
    return status, headers, file.read(int(headers["content-length"]))


class Stream(threading.Thread):
    """Reads one streamed answer in a thread: `status`, `events` (parsed, without [DONE]), `done`, and `error`."""

    def __init__(self, server: ServerProcess, path: str, body: dict[str, Any], timeout: float = 120) -> None:
        super().__init__(daemon=True)
        self.status: int | None = None
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.error: Exception | None = None
        self.started = threading.Event()
        self._connection = server.connection(timeout)
        self._path = path
        self._body = json.dumps(body | {"stream": True})
        self.start()

    def run(self) -> None:
        try:
            with contextlib.closing(self._connection):
                self._connection.request("POST", self._path, self._body, {"Content-Type": "application/json"})
                response = self._connection.getresponse()
                self.status = response.status
                for line in response:
                    self._read(line)
        except Exception as error:
            self.error = error
        finally:
            self.started.set()

    def _read(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self.done = True
        else:
            self.events.append(json.loads(data))
            self.started.set()

    def wait(self, seconds: float = 120) -> "Stream":
        self.join(seconds)
        assert not self.is_alive(), f"the stream did not end within {seconds} s"
        return self

    @property
    def finish_reasons(self) -> list[str]:
        return [reason for choice in self._choices() if (reason := choice.get("finish_reason"))]

    @property
    def text(self) -> str:
        return "".join(choice.get("text") or "" for choice in self._choices())

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [event["error"] for event in self.events if "error" in event]

    def _choices(self) -> Iterator[dict[str, Any]]:
        for event in self.events:
            yield from event.get("choices", ())


def start_streams(server: ServerProcess, bodies: list[dict[str, Any]]) -> list[Stream]:
    """Opens one stream for each body, and returns when each has its first event."""
    streams = [Stream(server, "/v1/completions", body) for body in bodies]
    for stream in streams:
        assert stream.started.wait(120) and stream.events, (stream.status, stream.error)
    return streams
