"""What happens to every request before its route and after it: an id, one log line, the key, the size of its body.

Milestone: M8. vLLM counterpart: AuthenticationMiddleware, XRequestIdMiddleware and validate_json_request
(vllm/entrypoints/openai/api_server.py).

All three are plain ASGI: they call the next application and may wrap `receive` and `send`. Starlette's
BaseHTTPMiddleware would put a queue between the route and the socket, and the route would not see a client leave.
"""

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
LONGEST_REQUEST_ID = 128
GUARDED = ("/v1", "/live", "/tokenize", "/detokenize")  # these need a key, and end when the server drains
POLLED = ("/health", "/ping", "/metrics", "/live")  # logged only if they fail


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a header, or None. `name` is in lower case."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


class RequestLog:
    """The outermost layer. Gives the request an id, answers whatever its route raises, and logs one line.

    The id is the client's X-Request-Id, or a new one, and every answer has it. Prompts, keys, query strings and bodies
    are never logged. Routes find the id in `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp, log: bool = True) -> None:
        self.app = app
        self.log = log

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
                message = message | {"headers": [*message["headers"], (REQUEST_ID_HEADER, request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            answer = error_response(as_api_error(error, request_id))
            if not status:  # else the answer has begun; the connection is closed, which tells the client
                await answer(scope, receive, send_with_id)
        finally:
            self._log(scope, status, time.perf_counter() - start, request_id)

    def _log(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        if self.log and not (scope["path"] in POLLED and 200 <= status < 300):
            path = (
                scope.get("raw_path", b"").decode("latin-1").partition("?")[0][:200]
            )  # as it was sent: no line breaks
            access_log.info("%s %s %s %.3f s %s", scope["method"], path, status or "left", seconds, request_id)


def _request_id(given: str | None) -> str:
    if given and len(given) <= LONGEST_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return f"req-{uuid.uuid4().hex}"


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
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in GUARDED)


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
            raise self._too_large()
        if length != "0" or header(scope, b"transfer-encoding") is not None:
            _check_content_type(header(scope, b"content-type"))
        size = 0

        async def counted_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, counted_receive, send)

    def _too_large(self) -> ApiError:
        # The rest of the body is not read, so the connection cannot be used again.
        message = f"the body is larger than {self.limit} bytes; the server's --max-body-size sets this limit"
        return ApiError(413, message, headers={"Connection": "close"})


def _check_content_type(value: str | None) -> None:
    kind = (value or "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise ApiError(
            415, f"the body must be JSON: send the header 'Content-Type: application/json', got {kind or 'none'!r}"
        )
