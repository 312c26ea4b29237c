"""Clients and operators that do what they should not, against a real server process.

Milestone: M8. Tests with the fixture `server` use the default model; the others use a random model that is fast enough
to fill buffers, and a server of their own, which some of them end.
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.clients.conftest import MODEL, project
from tests.clients.server_process import ServerProcess
from tests.clients.streams import Stream, post_bytes, read_response, reset, start_streams

pytestmark = [pytest.mark.m8, pytest.mark.slow]

ABORT_SECONDS = 5
MIB = 2**20
LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
HARD_WORK = LONG | {"max_tokens": 8000}  # for the random model


def short_answer(server: ServerProcess) -> str:
    """The text of SHORT; fails unless the server answers."""
    status, body, _ = server.post("/v1/completions", SHORT)
    assert status == 200, body
    return json.loads(body)["choices"][0]["text"]


def assert_json_error(status: int, body: bytes) -> None:
    assert 400 <= status < 500, (status, body)
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


# ---- clients that leave


def test_200_clients_are_killed_in_mid_stream(server: ServerProcess) -> None:
    """Half of them close, half of them reset; most still wait for their turn. The next request sees none of them."""
    expected = short_answer(server)
    request = post_bytes("/v1/completions", LONG | {"stream": True})
    clients = [server.connect() for _ in range(200)]
    for client in clients:
        client.sendall(request)
    server.wait_until_running(200)
    first_bytes = clients[0].recv(4096)
    assert first_bytes.startswith(b"HTTP/1.1 200")
    for index, client in enumerate(clients):
        reset(client) if index % 2 else client.close()
    server.wait_until_idle(ABORT_SECONDS)
    assert short_answer(server) == expected


def test_clients_leave_before_the_whole_answer(server: ServerProcess) -> None:
    """A request that is not streamed is aborted, too."""
    clients = [server.connect() for _ in range(20)]
    for client in clients:
        client.sendall(post_bytes("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]} | LONG))
    server.wait_until_running(20)
    for client in clients:
        client.close()
    server.wait_until_idle(ABORT_SECONDS)


def test_bodies_that_are_sent_by_half(server: ServerProcess) -> None:
    """Some clients leave in the middle of their body, others just wait there. Nothing of it reaches the engine."""
    expected = short_answer(server)
    before = server.metrics()["vllm:prompt_tokens_total"]
    clients = [server.connect() for _ in range(60)]
    for client in clients:
        client.sendall(post_bytes("/v1/completions", b'{"prompt": "Once', length=1000))
    for index, client in enumerate(clients[:40]):
        reset(client) if index % 2 else client.close()
    assert short_answer(server) == expected
    assert server.load() == {"running": 0, "waiting": 0, "kv_cache_usage": 0}
    for client in clients[40:]:
        client.close()
    assert server.metrics()["vllm:prompt_tokens_total"] - before == 5, "only the short request was computed"


def test_headers_that_come_byte_by_byte(server: ServerProcess) -> None:
    """50 connections whose headers never end do not keep others out; one that does end is served."""
    expected = short_answer(server)
    waiting = [server.connect() for _ in range(50)]
    for client in waiting:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0")
    with server.connect() as slow:
        for byte in post_bytes("/v1/completions", SHORT, {"Connection": "close"}):
            slow.sendall(bytes([byte]))
        status, _, body = read_response(slow.makefile("rb"))
    assert status == 200 and json.loads(body)["choices"][0]["text"] == expected
    assert short_answer(server) == expected
    for client in waiting:
        client.close()


# ---- clients that do not read


def test_clients_that_never_read_cost_no_memory(serve_tiny: Callable[..., Any], tmp_path: Path) -> None:
    """16 streams of 2,000 events are not read at all, and the server's memory does not grow with the events.

    A UNIX socket has a small buffer, so the server has to keep what the clients do not take, and should keep it merged.
    A long name of the model makes each event long: 32,000 of them would be 70 MB.
    """
    options = ["--served-model-name", "m" * 2000, "--num-kv-blocks", "4000"]
    work = HARD_WORK | {"max_tokens": 2000}
    with serve_tiny(*options, uds=tmp_path / "server.sock") as server:
        for stream in start_streams(server, [work | {"max_tokens": 100}] * 16):  # warms up
            stream.wait()
        before = server.resident_bytes()
        clients = [server.connect(receive_buffer=4096) for _ in range(16)]
        try:
            for client in clients:
                client.sendall(post_bytes("/v1/completions", work | {"stream": True}, {"Connection": "close"}))
            server.wait_until_running(16)
            assert Stream(server, "/v1/completions", SHORT).wait(60).done, "the next client is served"
            server.wait_until_idle(200)  # the engine finishes them without their clients
            after = server.resident_bytes()
            for process, num_bytes in after.items():
                assert num_bytes - before[process] < 20 * MIB, (process, before, after)
            text = dechunk(read_to_end(clients[0]))
            assert text.endswith(b"data: [DONE]\n\n") and text.count(b'"finish_reason":"length"') == 1
            assert len(text) < 2 * MIB, "the events were merged"
        finally:
            for client in clients:
                client.close()
        server.wait_until_idle(ABORT_SECONDS)
        assert short_answer(server)


def read_to_end(client: Any) -> bytes:
    """All that comes until the server closes the connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


def test_a_slow_reader_gets_everything(serve_tiny: Callable[..., Any], tmp_path: Path) -> None:
    """It reads a few bytes at a time; events may be merged for it, but the text and the number of tokens are right."""
    with serve_tiny(uds=tmp_path / "server.sock") as server:
        body = HARD_WORK | {"max_tokens": 1000, "logprobs": 0}
        whole = json.loads(server.post("/v1/completions", body)[1])["choices"][0]
        client = server.connect(receive_buffer=4096)
        client.sendall(post_bytes("/v1/completions", body | {"stream": True}, {"Connection": "close"}))
        data = bytearray()
        for _ in range(20):  # the engine is far ahead after this
            data += client.recv(300)
            time.sleep(0.05)
        data += read_to_end(client)
        client.close()
        text, tokens = "", []
        for line in dechunk(bytes(data)).splitlines():
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
                tokens += choice["logprobs"]["tokens"] if choice["logprobs"] else []
        assert text == whole["text"]
        assert tokens == whole["logprobs"]["tokens"] and len(tokens) == 1000


def dechunk(response: bytes) -> bytes:
    """The body of a chunked response. Chunks may split events anywhere."""
    _, _, rest = response.partition(b"\r\n\r\n")
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16) if size else 0
        body += rest[:length]
        rest = rest[length + 2 :]
    return bytes(body)


# ---- requests that are wrong

INVALID: list[tuple[bytes, str]] = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"[]", "application/json"),
    (b"null", "application/json"),
    (b'{"prompt": "\xff\xfe"}', "application/json"),
    (b'{"prompt": ' + b"[" * 100_000, "application/json"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "application/json"),
    (b'{"prompt": "x", "temperature": NaN}', "application/json"),
    (b'{"prompt": "x", "temperature": 1e999}', "application/json"),
    (b'{"prompt": "x", "top_p": -Infinity}', "application/json"),
    (b'{"prompt": {"a": 1}}', "application/json"),
    (b'{"prompt": []}', "application/json"),
    (b'{"prompt": [-1]}', "application/json"),
    (b'{"prompt": [999999999]}', "application/json"),
    (b'{"prompt": [1, "two"]}', "application/json"),
    (b'{"prompt": "x", "n": 100000000}', "application/json"),
    (b'{"prompt": "x", "max_tokens": "many"}', "application/json"),
    (b'{"prompt": "x", "stop": ""}', "application/json"),
    (b'{"prompt": "x", "stop_token_ids": ["a"]}', "application/json"),
    (b'{"prompt": "x", "logit_bias": {"a": 1}}', "application/json"),
    (b'{"prompt": "x", "stream": true, "stream_options": {"include_usage": "perhaps"}}', "application/json"),
    (b'{"prompt": "x", "model": "another"}', "application/json"),
    (b'{"prompt": "x", "model": 5}', "application/json"),
    (b'{"prompt": "x"}', "text/plain"),
    (b"prompt=x", "application/x-www-form-urlencoded"),
]


def test_100_invalid_requests_among_valid_ones(server: ServerProcess) -> None:
    """All of them at the same time: the valid ones get what they get alone, the others a JSON error."""
    expected = short_answer(server)
    good: list[str] = []
    bad: list[tuple[int, bytes, bytes]] = []

    def send_valid() -> None:
        good.append(short_answer(server))

    def send_invalid(body: bytes, content_type: str) -> None:
        status, answer, _ = server.request("POST", "/v1/completions", body, {"Content-Type": content_type})
        bad.append((status, answer, body[:80]))

    threads = [threading.Thread(target=send_invalid, args=INVALID[index % len(INVALID)]) for index in range(100)]
    for place in range(0, 120, 6):
        threads.insert(place, threading.Thread(target=send_valid))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert good == [expected] * 20
    assert len(bad) == 100
    for status, answer, body in bad:
        assert status in (400, 404, 415, 422), (status, answer, body)
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], body
        assert b"Traceback" not in answer and b"File \\" not in answer


def test_a_body_that_is_too_large(server: ServerProcess) -> None:
    """Refused by its length before it is sent, and by counting if it does not say its length."""
    with server.connect() as client:
        client.sendall(post_bytes("/v1/completions", b"{", length=10**9))
        status, _, body = read_response(client.makefile("rb"))
        assert status == 413
        assert_json_error(status, body)
    with server.connect() as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(64):
                client.sendall(b"100000\r\n" + b" " * MIB + b"\r\n")
            client.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # the server answered and closed
        else:  # it dropped what came after the limit, so that the client can read the answer
            status, _, body = read_response(client.makefile("rb"))
            assert status == 413
            assert_json_error(status, body)
    assert short_answer(server)


def test_huge_headers(server: ServerProcess) -> None:
    """A refusal, a closed connection or an answer: but no 500, and the next client is served."""
    for size in (10_000, 100_000, 5_000_000):
        with server.connect(timeout=20) as client:
            try:
                client.sendall(post_bytes("/v1/completions", SHORT, {"X-Huge": "a" * size, "Connection": "close"}))
                answer = client.recv(65536)
            except OSError:
                answer = b""
        assert answer == b"" or answer.split()[1] in (b"200", b"400", b"413", b"431"), answer[:200]
    many = {f"X-Header-{index}": "a" for index in range(5000)}
    with server.connect(timeout=20) as client:
        client.sendall(post_bytes("/v1/completions", SHORT, many | {"Connection": "close"}))
        answer = client.recv(65536)
    assert answer == b"" or answer.split()[1] in (b"200", b"400", b"413", b"431"), answer[:200]
    status, _, headers = server.request("GET", "/v1/models", headers={"X-Request-Id": "é" * 10 + "a" * 500})
    assert status == 200 and len(headers["x-request-id"]) <= 128
    assert short_answer(server)


def test_a_client_that_pipelines(server: ServerProcess) -> None:
    """Three requests in one packet get three answers, in their order."""
    expected = short_answer(server)
    prompts = ["The capital of France is", "2, 4, 6, 8,", "The capital of France is"]
    packet = b"".join(post_bytes("/v1/completions", SHORT | {"prompt": prompt}) for prompt in prompts)
    with server.connect() as client:
        client.sendall(packet)
        file = client.makefile("rb")
        answers = [read_response(file) for _ in prompts]
    texts = [json.loads(body)["choices"][0]["text"] for status, _, body in answers]
    assert [status for status, _, _ in answers] == [200] * 3
    assert texts[0] == texts[2] == expected != texts[1]


def test_every_route_answers_every_method(server: ServerProcess) -> None:
    """HEAD and OPTIONS, and methods that no route has: a status, no 500, and a JSON error with a body if any."""
    status, body, _ = server.get("/openapi.json")
    paths = list(json.loads(body)["paths"]) if status == 200 else []
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/tokenize"} <= set(paths)
    for path in [*paths, "/", "/metrics", "/nowhere"]:
        path = path.replace("{", "").replace("}", "")
        for method in ("HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"):
            status, body, headers = server.request(method, path)
            assert status < 500, (method, path, status, body)
            if method == "HEAD":
                assert body == b""
            elif status >= 400:
                assert_json_error(status, body)
            assert headers["x-request-id"], (method, path)
    assert short_answer(server)


# ---- the server's end


def test_sigterm_under_load(serve_tiny: Callable[..., Any]) -> None:
    """New requests are refused; short streams finish; long ones end with "abort" and [DONE] at the deadline."""
    with serve_tiny("--shutdown-timeout", "3") as server:
        long = start_streams(server, [HARD_WORK] * 40)
        short = start_streams(server, [HARD_WORK | {"max_tokens": 40}] * 8)
        assert any(stream.is_alive() for stream in long)
        server.signal(signal.SIGTERM)
        assert_refused_while_draining(server)
        for stream in short:
            assert stream.wait().finish_reasons == ["length"] and stream.done
        for stream in long:
            assert stream.wait(30).error is None
            assert len(stream.finish_reasons) == 1 and stream.finish_reasons[0] in ("length", "abort") and stream.done
        assert {"abort"} <= {stream.finish_reasons[0] for stream in long}
        assert server.wait(20) == 0
        assert "Traceback" not in server.log_text()


def assert_refused_while_draining(server: ServerProcess) -> None:
    deadline = time.monotonic() + 2
    while True:
        status, body, headers = server.post("/v1/completions", SHORT)
        if status == 503 or time.monotonic() > deadline:
            break
    assert status == 503 and int(headers["retry-after"]) >= 1
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    status, body, _ = server.get("/health")
    assert status == 503 and b"drain" in body


def test_sigterm_waits_for_streams_that_finish_in_time(serve_tiny: Callable[..., Any]) -> None:
    """Nothing is aborted if the deadline is far, and the server ends as soon as the last stream has ended."""
    with serve_tiny("--shutdown-timeout", "300") as server:
        streams = start_streams(server, [HARD_WORK | {"max_tokens": 3000}] * 4)
        server.signal(signal.SIGTERM)
        for stream in streams:
            assert stream.wait().finish_reasons == ["length"] and stream.done
        assert server.wait(20) == 0


def test_whole_answers_are_not_lost_at_the_end(serve_tiny: Callable[..., Any]) -> None:
    """A request that is not streamed gets its answer while the server drains, and "abort" after the deadline."""
    with serve_tiny("--shutdown-timeout", "2") as server:
        answers: list[tuple[int, bytes, dict[str, str]]] = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.post("/v1/completions", HARD_WORK, timeout=120)))
            for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        server.wait_until_running(40)
        server.signal(signal.SIGINT)
        for thread in threads:
            thread.join(60)
        assert len(answers) == 40 and {status for status, _, _ in answers} == {200}
        reasons = {json.loads(body)["choices"][0]["finish_reason"] for _, body, _ in answers}
        assert "abort" in reasons and reasons <= {"abort", "length"}
        assert server.wait(20) == 0


def test_a_second_sigterm_ends_at_once(serve_tiny: Callable[..., Any]) -> None:
    with serve_tiny("--shutdown-timeout", "300") as server:
        streams = start_streams(server, [HARD_WORK] * 40)
        children = server.processes()[1:]
        server.signal(signal.SIGTERM)
        assert_refused_while_draining(server)
        server.signal(signal.SIGTERM)
        server.wait(10)
        for stream in streams:
            stream.wait(10)
        assert any(not stream.finish_reasons or stream.finish_reasons == ["abort"] for stream in streams)
        assert_all_end(children)


def test_the_engine_process_is_killed(serve_tiny: Callable[..., Any]) -> None:
    """Streams and waiting requests get an error, /health says why, and the server ends with status 1."""
    with serve_tiny() as server:
        streams = start_streams(server, [HARD_WORK] * 8)
        whole: list[tuple[int, bytes, dict[str, str]]] = []
        waiting = threading.Thread(target=lambda: whole.append(server.post("/v1/completions", HARD_WORK, timeout=60)))
        waiting.start()
        server.wait_until_running(9)
        server.engine_process().kill()
        for stream in streams:
            stream.wait(20)
            assert stream.errors or stream.error is not None, "a stream that is cut off must not look complete"
            assert "length" not in stream.finish_reasons
        status, body, _ = server.get("/health")
        assert status == 503 and len(body) > 20, body
        assert b"Traceback" not in body
        waiting.join(20)
        assert [answer[0] for answer in whole] == [500]
        assert "error" in json.loads(whole[0][1]) and b"Traceback" not in whole[0][1]
        assert server.wait(20) == 1
        assert any(stream.errors for stream in streams)


def test_sigterm_does_not_wait_for_clients_that_neither_send_nor_read(
    serve_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    """Half a body, half of the headers, an idle connection, and streams that are not read: the deadline is kept."""
    options = ["--shutdown-timeout", "2", "--served-model-name", "m" * 2000]
    with serve_tiny(*options, uds=tmp_path / "server.sock") as server:
        clients = [server.connect(receive_buffer=4096) for _ in range(8)]
        try:
            clients[0].sendall(post_bytes("/v1/completions", b"{", length=1000))
            clients[1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
            for client in clients[4:]:
                client.sendall(post_bytes("/v1/completions", HARD_WORK | {"stream": True}))
            server.wait_until_running(4)
            server.signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            for client in clients:
                client.close()


def test_the_front_end_is_killed(serve_tiny: Callable[..., Any]) -> None:
    """The engine's process does not outlive it, whatever it was doing."""
    with serve_tiny() as server:
        streams = start_streams(server, [HARD_WORK] * 4)
        children = server.processes()[1:]
        try:
            server.signal(signal.SIGKILL)
            server.wait(10)
            assert_all_end(children)
        finally:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        for stream in streams:
            stream.wait(10)


def assert_all_end(processes: list[psutil.Process], seconds: float = 20) -> None:
    """A zombie has ended, too: its parent is only slow to say so."""
    deadline = time.monotonic() + seconds
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, "the engine's process outlived the server"
        time.sleep(0.05)


# ---- a small pool


def test_a_pool_so_small_that_everything_preempts(serve_tiny: Callable[..., Any], tiny_model: str) -> None:
    """24 requests that need four times the blocks that there are: each gets the answer that it gets alone."""
    prompts = [f"{'tale ' * (index % 5)}number {index}: " for index in range(24)]
    lengths = [60 + 5 * index for index in range(24)]
    expected = project("generate", model=tiny_model, prompts=prompts, max_tokens=lengths, ignore_eos=True)
    with serve_tiny("--num-kv-blocks", "40", "--max-model-len", "512", "--dtype", "float32") as server:
        bodies = [
            {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        streams = start_streams(server, bodies)
        for stream, answer in zip(streams, expected, strict=True):
            assert stream.wait().text == answer["text"] and stream.finish_reasons == ["length"] and stream.done
        assert server.metrics()["vllm:num_preemptions_total"] > 0
        server.wait_until_idle(ABORT_SECONDS)
        status, body, _ = server.post("/v1/completions", {"prompt": [5] * 600, "max_tokens": 1})
        assert_json_error(status, body)


def test_the_server_uses_the_default_model(server: ServerProcess) -> None:
    """The tests above that say so run the real model."""
    assert json.loads(server.get("/v1/models")[1])["data"][0]["id"] == MODEL
