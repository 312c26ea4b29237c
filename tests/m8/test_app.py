"""What every request meets before its route: errors, key, size and kind of its body, ids, log, CORS; over a socket."""

import json
import logging
import socket
import time
from collections.abc import Iterator

import pytest

from folovllm.entrypoints.openai import middleware
from folovllm.entrypoints.openai.errors import ApiError
from folovllm.entrypoints.openai.middleware import is_one_of
from tests.m8.server_process import RunningServer, open_stream, running_server, slow_executor
from tests.m8.serving_helpers import TIMEOUT, assert_all_free

pytestmark = pytest.mark.m8

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(max_body_size=20_000) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    with running_server(api_key=("first-key", "second-key"), allowed_origins=("https://a.example",)) as running:
        yield running


def raw(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Sends bytes as they are and returns all that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        received = b""
        while data := connection.recv(65536):
            received += data
        return received


# ---- errors


def test_an_unknown_path_is_a_404_in_openais_form(server: RunningServer) -> None:
    for path in ("/v1/nothing", "/v1/models/", "/health/", "/docs", "/redoc", "/v2"):
        answer = server.get(path)
        assert answer.status == 404 and answer.error["type"] == "not_found_error", path


def test_another_method_is_a_405_that_names_the_right_one(server: RunningServer) -> None:
    answer = server.get("/v1/chat/completions")
    assert (answer.status, answer.headers["allow"]) == (405, "POST") and "POST" in answer.error["message"]
    assert server.request("DELETE", "/v1/models").status == 405


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"messages": }', "not valid JSON"),
        (b"", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"text"', "body"),
        (b'{"messages": "\xff"}', "UTF-8"),
        (b'{"messages": ' + b"[" * 9000, "nested too deeply"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"messages": [], "temperature": NaN}', "temperature"),
        (b'{"messages": [], "temperature": 1e999}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogate"),
    ],
)
def test_a_body_that_is_no_request_is_a_clean_400(server: RunningServer, body: bytes, message: str) -> None:
    for path in ("/v1/chat/completions", "/v1/responses"):
        answer = server.post(path, body.replace(b"messages", b"input") if path == "/v1/responses" else body)
        assert answer.status == 400, answer.body
        assert message in answer.error["message"] or path == "/v1/responses"


def test_an_exception_in_a_route_is_a_500_without_a_traceback(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("at /secret/path")

    monkeypatch.setattr(server.state, "check_model", broken)
    answer = server.post("/v1/chat/completions", CHAT, **{"X-Request-Id": "mine-7"})
    assert answer.status == 500 and b"secret" not in answer.body and answer.error["type"] == "server_error"
    assert answer.headers["x-request-id"] == "mine-7"
    assert "mine-7" in caplog.text and "at /secret/path" in caplog.text


def test_a_server_error_is_no_end(server: RunningServer) -> None:
    assert server.post("/v1/chat/completions", CHAT).status == 200


# ---- the body


def test_a_body_over_the_limit_is_refused_by_its_header_before_it_is_sent(server: RunningServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    received = raw(server.port, head + b"Content-Length: 20001\r\n\r\n")  # and no byte of it
    assert received.startswith(b"HTTP/1.1 413 ") and b'"code":413' in received
    assert raw(server.port, head + b"Content-Length: 99999999999999999999999\r\n\r\n").startswith(b"HTTP/1.1 4")


def test_a_chunked_body_is_counted_while_it_is_read(server: RunningServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    received = raw(server.port, head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 5)  # it has no end
    assert received.startswith(b"HTTP/1.1 413 ")


def test_a_body_at_the_limit_is_read(server: RunningServer) -> None:
    body = json.dumps(CHAT).encode().ljust(20_000)
    assert server.post("/v1/chat/completions", body).status == 200


def test_a_body_that_does_not_come_is_given_up(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.1)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    assert raw(server.port, head + b'{"pro').startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "application/jsonx", "x", ""])
def test_another_content_type_is_a_415(server: RunningServer, kind: str) -> None:
    answer = server.post("/v1/chat/completions", CHAT, **{"Content-Type": kind})
    assert answer.status == 415 and "application/json" in answer.error["message"]


def test_json_in_all_its_content_types_is_read(server: RunningServer) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"):
        assert server.post("/v1/chat/completions", CHAT, **{"Content-Type": kind}).status == 200, kind


# ---- the key


def test_the_key_guards_v1_and_not_what_a_monitor_asks(locked: RunningServer) -> None:
    for path in ("/v1/models", "/v1/nothing", "/live"):
        answer = locked.get(path)
        assert answer.status == 401 and answer.error["type"] == "authentication_error", path
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
        assert locked.post(path, CHAT).status == 401, path
    for path in ("/health", "/ping", "/version", "/metrics", "/openapi.json"):
        assert locked.get(path).status == 200, path


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_key_opens(locked: RunningServer, key: str) -> None:
    assert locked.get("/v1/models", Authorization=f"Bearer {key}").status == 200
    assert locked.post("/v1/chat/completions", CHAT, Authorization=f"bearer  {key}").status == 200


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "first-key", "Basic first-key", "Bearer first-key2", "Bearer first-ke", "Bearer clé"],
)
def test_nothing_else_opens(locked: RunningServer, value: str) -> None:
    answer = locked.get("/v1/models", Authorization=value)
    assert answer.status == 401 and "first-key" not in answer.error["message"]


def test_a_strange_spelling_of_the_path_opens_nothing(locked: RunningServer) -> None:
    for path in ("/%761/models", "/v1%2Fmodels", "//v1/models", "/./v1/models", "/V1/models", "/v1/models?x=/health"):
        assert locked.get(path).status in (401, 404), path


def test_a_key_is_compared_with_every_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time must not tell which of the keys is near."""
    compared: list[bytes] = []
    real = middleware.hmac.compare_digest
    monkeypatch.setattr(middleware.hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    assert is_one_of(b"a", [b"a", b"b", b"c"]) and compared == [b"a", b"b", b"c"]
    assert not is_one_of(b"", [b"a"])


# ---- ids and the log


def test_the_request_id_comes_back_also_with_errors(server: RunningServer) -> None:
    for path, status in (("/health", 200), ("/v1/nothing", 404)):
        answer = server.get(path, **{"X-Request-Id": "abc-1"})
        assert (answer.status, answer.headers["x-request-id"]) == (status, "abc-1")
    assert server.post("/v1/completions", b"x" * 30_000, **{"X-Request-Id": "abc-2"}).headers["x-request-id"] == "abc-2"


@pytest.mark.parametrize("given", ["", "a" * 129, "caf\xe9", "tab\there"])
def test_a_strange_request_id_is_replaced(server: RunningServer, given: str) -> None:
    headers = {"X-Request-Id": given}
    ours = {server.get("/health", **headers).headers["x-request-id"] for _ in range(2)}
    assert len(ours) == 2 and all(i.startswith("req-") for i in ours)


def test_the_log_has_a_line_per_request_without_its_text(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="folovllm.access")
    body = CHAT | {"messages": [{"role": "user", "content": "a secret"}]}
    server.post("/v1/chat/completions?key=hidden", body, **{"X-Request-Id": "log-1", "Authorization": "Bearer hidden"})
    server.get("/v1/%0aINFO", **{"X-Request-Id": "log-2"})
    server.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "folovllm.access"]
    assert len(lines) == 2
    assert lines[0].startswith("POST /v1/chat/completions 200 ") and lines[0].endswith(" log-1")
    assert lines[1].startswith("GET /v1/%0aINFO 404 ")
    assert "secret" not in caplog.text and "hidden" not in caplog.text


def test_the_metrics_count_answers_by_route(server: RunningServer) -> None:
    server.get("/v1/models/nothing")
    text = server.get("/metrics").body.decode()
    assert 'handler="/v1/models/{name:path}",method="GET",status="4xx"' in text


# ---- CORS


def test_web_pages_of_other_origins_are_not_served_by_default(server: RunningServer) -> None:
    answer = server.get("/v1/models", Origin="https://a.example")
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert server.request("OPTIONS", "/v1/chat/completions", headers=preflight).status == 405


def test_an_allowed_origin_is_served_and_reads_errors_too(locked: RunningServer) -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    answer = locked.request("OPTIONS", "/v1/chat/completions", headers=preflight)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
    refused = locked.get("/v1/models", Origin="https://a.example")
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "https://a.example")
    assert "access-control-allow-origin" not in locked.get("/v1/models", Origin="https://b.example").headers


# ---- the schema, and how full the server may be


def test_the_schema_describes_bodies_and_errors(server: RunningServer) -> None:
    schema = server.get("/openapi.json").json
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
        operation = schema["paths"][path]["post"]
        assert "$ref" in operation["requestBody"]["content"]["application/json"]["schema"], path
        assert {"4XX", "5XX"} <= set(operation["responses"]) and "422" not in operation["responses"], path
    assert "folovllm.entrypoints" not in json.dumps(schema)


def test_a_full_server_answers_429() -> None:
    """One request runs, and none may wait."""
    with running_server({"max_num_seqs": 1, "executor_factory": slow_executor}, max_queue=0) as full:
        with open_stream(full):
            answer = full.post("/v1/chat/completions", CHAT)
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            assert answer.error["type"] == "rate_limit_error"
            assert full.post("/v1/completions", {"prompt": "a"}).status == 429
            assert full.post("/v1/responses", {"input": "a"}).status == 429
            assert full.get("/v1/models").status == 200
        full.in_loop(lambda: assert_all_free(full.state.engine))
        assert full.post("/v1/chat/completions", CHAT).status == 200


def test_a_request_that_is_being_tokenised_counts(server: RunningServer) -> None:
    """Else any number of long prompts could come in at the same time."""
    limit = server.state.engine.config.max_num_seqs + server.state.options.max_queue

    async def two() -> None:
        with server.state.admit(limit):
            with pytest.raises(ApiError, match="that this server holds"), server.state.admit(1):
                pass
        with server.state.admit(1):
            pass

    server.in_loop(two)


def test_an_idle_server_takes_any_number_of_prompts(server: RunningServer) -> None:
    with running_server({"max_num_seqs": 2}, max_queue=1) as small:
        answer = small.post("/v1/completions", {"prompt": ["a"] * 20, "max_tokens": 2, "ignore_eos": True})
        assert answer.status == 200 and len(answer.json["choices"]) == 20
