"""Connections of clients that do not play fair, or that speak another HTTP than usual: raw bytes to a real socket."""

import json
import socket
import time
from collections.abc import Iterator

import pytest

from folovllm.entrypoints.openai import http_protocol
from tests.m8.api_helpers import slow_executor
from tests.m8.server_process import RunningServer, running_server
from tests.m8.serving_helpers import TIMEOUT

pytestmark = pytest.mark.m8

BODY = b'{"prompt": "Hi", "max_tokens": 3, "temperature": 0, "ignore_eos": true}'
STREAM = BODY.replace(b"}", b', "stream": true}')
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


def head(body: bytes, more: bytes = b"", version: bytes = b"1.1") -> bytes:
    lines = b"POST /v1/completions HTTP/%s\r\nHost: a\r\nContent-Type: application/json\r\n" % version
    return lines + more + b"Content-Length: %d\r\n\r\n" % len(body)


def connect(server: RunningServer, *pieces: bytes) -> socket.socket:
    """Sends each of `pieces` in a packet of its own, as far as a pause between them can bring that about."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT)
    for piece in pieces:
        connection.sendall(piece)
        time.sleep(0.02 if len(pieces) > 1 else 0)
    return connection


def ask(server: RunningServer, *pieces: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with connect(server, *pieces) as connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def error_of(answer: bytes, status: int) -> str:
    """The message of an error, after a check of its form."""
    lines, _, body = answer.partition(b"\r\n\r\n")
    assert lines.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nx-request-id: req-" in lines and b"\r\nconnection: close" in lines
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    "data",
    [
        b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health\r\nHost a\r\n\r\n",
        b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        head(BODY, b"Content-Length: x\r\n"),
        head(BODY, b"Content-Length: 5\r\n"),  # two lengths, and below two ways to tell the length: request smuggling
        head(BODY, b"Transfer-Encoding: chunked\r\n"),
        head(BODY).replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length"),
    ],
)
def test_a_malformed_request_is_answered_with_json(server: RunningServer, data: bytes) -> None:
    assert "valid HTTP" in error_of(ask(server, data), 400)


@pytest.mark.parametrize(
    "pieces",
    [
        (head(BODY, UPGRADE) + BODY,),
        (head(BODY, UPGRADE)[:90], head(BODY, UPGRADE)[90:] + BODY[:5], BODY[5:]),
        (head(b"", UPGRADE).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"),
         b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
    ],
    ids=["one packet", "three packets", "chunked"],
)  # fmt: skip
def test_a_request_that_offers_http2_keeps_its_body(server: RunningServer, pieces: tuple[bytes, ...]) -> None:
    """Java's HttpClient sends such requests: https://github.com/Kludex/uvicorn/issues/2722."""
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"  # the connection can be used again
    answer = ask(server, *pieces, last)
    assert answer.count(b"HTTP/1.1 200 OK") == 2 and b'"completion_tokens":3' in answer


def test_http_1_0_gets_no_chunks(server: RunningServer) -> None:
    answer = ask(server, head(STREAM, version=b"1.0") + STREAM)
    lines, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in lines
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n") and b"\r\n" not in body
    assert b'"completion_tokens":3' in ask(server, head(BODY, version=b"1.0") + BODY)


@pytest.mark.parametrize("start", [b"GET /health HTTP/1.1\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 9])
def test_a_head_without_end_is_refused(server: RunningServer, start: bytes) -> None:
    answer = ask(server, start + b"x" * http_protocol.MAX_HEAD)
    assert "longer than" in error_of(answer, 431)


def test_a_trailer_without_end_is_refused(server: RunningServer) -> None:
    start = head(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"1\r\n{\r\n0\r\nX: "
    assert "longer than" in error_of(ask(server, start, b"x" * (http_protocol.MAX_HEAD + 1)), 431)


def test_a_malformed_body_is_answered_unless_another_answer_is_on_its_way(server: RunningServer) -> None:
    start = head(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    assert "valid HTTP" in error_of(ask(server, start + b"zz\r\n{"), 400)
    answer = ask(server, head(BODY) + BODY + b"garbage\r\n\r\n")
    assert answer == b"" or answer.startswith(b"HTTP/1.1 200 OK")


def test_long_headers_are_served(server: RunningServer) -> None:
    answer = ask(server, head(BODY, b"Connection: close\r\nX: " + b"x" * 10_000 + b"\r\n") + BODY)
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_a_head_must_come_in_time(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else connections that send nothing, or a byte now and then, would use up the process's file descriptors."""
    monkeypatch.setattr(http_protocol, "SECONDS_FOR_HEAD", 0.05)
    assert "did not come" in error_of(ask(server), 408)
    assert "did not come" in error_of(ask(server, b"GET /health HTTP/1.1\r\nHo"), 408)
    answer = ask(server, b"GET /health HTTP/1.1\r\n\r\nGET /hea")
    assert answer.startswith(b"HTTP/1.1 200 OK") and b"HTTP/1.1 408" in answer


def test_a_client_that_pipelines_and_leaves_is_noticed() -> None:
    """uvicorn tells only the newest request of a connection that it has ended."""
    long = STREAM.replace(b"3", b"200")
    whole = BODY.replace(b"3", b"200")
    with running_server({"executor_factory": slow_executor}) as server:
        for first in (long, whole):
            with connect(server, head(first) + first + head(BODY) + BODY):
                wait_for(server, lambda count: count == 1)
            wait_for(server, lambda count: count == 0)
        # Each has 200 steps of 10 ms: had they run to the end, there would be 400.
        assert server.state.engine.stats.num_generation_tokens < 300


def wait_for(server: RunningServer, condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + TIMEOUT
    while not condition(server.state.engine.num_unfinished):
        assert time.monotonic() < deadline
        time.sleep(0.005)
