"""What happens to every request before its route and after it: an id, one log line, the key, the size of its body.

Milestone: M8. vLLM counterpart: AuthenticationMiddleware, XRequestIdMiddleware and validate_json_request
(vllm/entrypoints/openai/api_server.py).

All are plain ASGI: they call the next application and may wrap `receive` and `send`. Starlette's
BaseHTTPMiddleware would put a queue between the route and the socket, and the route would not see a client leave.
"""

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from folovllm.entrypoints.openai.errors import ApiError, as_api_error, error_response, shutting_down
from folovllm.entrypoints.openai.state import ServerState

access_log = logging.getLogger("folovllm.access")

REQUEST_ID_HEADER = b"x-request-id"
MAX_REQUEST_ID_LENGTH = 128
LONGEST_PATH = 200  # in the log
GUARDED = ("/v1", "/live", "/tokenize", "/detokenize")  # these need a key, and end when the server drains
POLLED = ("/health", "/ping", "/version", "/metrics", "/live")
CLIENT_CLOSED_REQUEST = 499  # nginx's status, for the log: the client has left before its answer began
TIMES_DROPPED = 4  # of --max-body-size, of a body that is too large
SECONDS_DROPPED = 1.0  # between two pieces of it
BODY_TIMEOUT = 60.0  # seconds that a client may take between two pieces of its body


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a header, or None. `name` is in lower case."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class RequestLog:
    """The outermost layer: gives the request an id, counts its answer, and logs one line.

    The id is the client's X-Request-Id, or a new one, and every answer has it. Prompts, keys, query strings and bodies
    are never logged. Routes find the id in `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.logs = not state.options.disable_uvicorn_access_log
        self.metrics = state.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0
        request_id = _request_id(header(scope, REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER, request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._record(scope, status or CLIENT_CLOSED_REQUEST, time.perf_counter() - start, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        """What is polled is not counted, as in vLLM, and logged only if it fails."""
        is_polled = route_path(scope) in POLLED
        if not is_polled:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.http.observe(route, scope["method"], status, seconds)
        if self.logs and not (is_polled and status < 300):
            # The path as it was sent: a decoded one could break the line.
            path = scope.get("raw_path", b"").decode("latin-1").partition("?")[0][:LONGEST_PATH]
            access_log.info("%s %s %s %.3f s %s", scope["method"], path, status, seconds, request_id)


def is_request_id(text: str) -> bool:
    """Whether a client may choose this id. It goes into headers and into the log, so it must be printable ASCII."""
    return 0 < len(text) <= MAX_REQUEST_ID_LENGTH and text.isascii() and text.isprintable()


def _request_id(given: str | None) -> str:
    return given if given is not None and is_request_id(given) else f"req-{uuid.uuid4().hex}"


class AnswerErrors:
    """Answers whatever the layers below raise. It is inside CORS, so that a web page can read the errors, too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watched_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            answer = error_response(as_api_error(error, scope.get("state", {}).get("request_id", "-")))
            if not has_begun:  # else the connection is closed, which tells the client
                await answer(scope, receive, send)


class Gate:
    """Asks for the key, and lets no new request in while the server drains. /health and the like stay open."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app = app
        self.state = state
        self.keys = [key.encode() for key in state.options.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_guarded(scope):
            return await self.app(scope, receive, send)
        if self.keys and not is_one_of(_bearer(header(scope, b"authorization")), self.keys):
            raise ApiError(
                401,
                "this server needs an API key: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.state.is_draining:
            raise shutting_down()
        await self.app(scope, receive, send)


def _is_guarded(scope: Scope) -> bool:
    path = route_path(scope)
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in GUARDED)


def route_path(scope: Scope) -> str:
    """The path without --root-path, as the router sees it: otherwise a path could need no key and find its route."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path.removeprefix(root) if path.startswith(f"{root}/") else path


def _bearer(value: str | None) -> bytes:
    scheme, _, key = (value or "").partition(" ")
    return key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def is_one_of(key: bytes, keys: Collection[bytes]) -> bool:
    """Whether `key` is one of `keys`. Compares with all of them, each in a time that does not depend on the key."""
    matches = [hmac.compare_digest(key, known) for known in keys]
    return any(matches)


class BodyLimit:
    """Refuses a body that is too large or no JSON, by its headers or while it is read, and before it is parsed."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = header(scope, b"content-length") or "0"
        if not length.isdecimal() or int(length[:20]) > self.limit:
            if header(scope, b"expect") is None:
                await self._read_on(receive)
            raise self._too_large()
        if length != "0" or header(scope, b"transfer-encoding") is not None:
            _check_content_type(header(scope, b"content-type"))
        size, is_complete = 0, False

        async def counted_receive() -> Message:
            nonlocal size, is_complete
            try:
                async with asyncio.timeout(None if is_complete else BODY_TIMEOUT):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the rest of the body did not come", headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self.limit:
                await self._read_on(receive)
                raise self._too_large()
            return message

        await self.app(scope, counted_receive, send)

    async def _read_on(self, receive: Receive) -> None:
        """Drops the rest of a body that is too large, within bounds. If the connection was closed while the client
        still sends, the client would see a broken connection instead of the answer.
        """
        size, is_complete = 0, False
        with contextlib.suppress(TimeoutError):
            while not is_complete and size <= TIMES_DROPPED * self.limit:
                async with asyncio.timeout(SECONDS_DROPPED):
                    message = await receive()
                size += len(message.get("body", b""))
                is_complete = not message.get("more_body", False)

    def _too_large(self) -> ApiError:
        # The body may not have been read to its end, so the connection cannot be used again.
        message = f"the body is larger than {self.limit} bytes; the server's --max-body-size sets this limit"
        return ApiError(413, message, headers={"Connection": "close"})


def _check_content_type(value: str | None) -> None:
    kind = (value or "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise ApiError(
            415, f"the body must be JSON: send the header 'Content-Type: application/json', got {kind or 'none'!r}"
        )
