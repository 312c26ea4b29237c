"""HttpProtocol: reads the bytes of one connection. It is uvicorn's, made safe against clients that do not play fair.

Milestone: M8. vLLM counterpart: none; vLLM uses uvicorn's class as it is, on top of h11.

What uvicorn's class would do, and this one does not:

- It stores a head (request line and headers) of any length, and waits for its end for any time.
- It loses the body of a request that offers another protocol. Java's HttpClient offers HTTP/2 (`Upgrade: h2c`) with
  every request; see https://github.com/Kludex/uvicorn/issues/2722.
- It sends chunks to a client of HTTP/1.0, which would take the lengths between them for text.
- If a client sends a second request before the first one is answered, and leaves, the first one runs on.
- It answers what it cannot read in plain text. Here every error has OpenAI's form.
"""

import asyncio
import functools
import uuid
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from folovllm.entrypoints.openai.errors import ApiError, bad_request, error_response

MAX_HEAD = 64 * 1024  # bytes
SECONDS_FOR_HEAD = 30.0
MAX_PIPELINED = 16  # requests that wait for the answer to the one before; then the connection is not read
UPGRADE_HEADERS = (b"upgrade", b"connection", b"http2-settings")


class HttpProtocol(HttpToolsProtocol):
    """One connection of `HttpServer`."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._answering: RequestResponseCycle | None = None  # `self.cycle` is the newest, which may be a pipelined one
        self._num_unused = 0  # bytes since the last head or piece of a body: of a head, a trailer, or a chunk's size
        self._head_timer: asyncio.TimerHandle | None = None

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._num_unused += len(data)
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        else:
            if self._num_unused > MAX_HEAD:
                self._refuse(ApiError(431, f"the headers are longer than {MAX_HEAD} bytes"))

    def _feed(self, data: bytes) -> bytes:
        """Parses `data`. If it holds a request that offers another protocol, returns what to parse next: the same
        request without the offer, and what comes after its head.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            if self.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserError("this is no proxy") from None
            head = self._head_without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
            return head + data[offer.args[0] :]
        return b""

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] not in UPGRADE_HEADERS]
        if any(name == b"connection" and b"close" in value.lower() for name, value in self.headers):
            lines.append(b"connection: close")
        return b"\r\n".join([*lines, b"\r\n"])

    # ---- what the parser finds

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_head_timer()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see `_feed`
        self._num_unused = 0
        self._stop_head_timer()
        super().on_headers_complete()
        if 0 < len(self.pipeline) < MAX_PIPELINED:
            self.flow.resume_reading()  # else the end of the connection would not be seen

    def on_body(self, body: bytes) -> None:
        self._num_unused = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        if cycle.scope["http_version"] == "1.0":
            app = functools.partial(_without_chunks, cycle, app)
        super()._start_asgi_task(cycle, app)

    # ---- what is refused here

    def _start_head_timer(self) -> None:
        """The time runs from the connection, or from the first byte of a later head, to the end of the head."""
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(SECONDS_FOR_HEAD, self._head_is_late)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(ApiError(408, f"the headers did not come within {SECONDS_FOR_HEAD:g} seconds"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(bad_request("this is no valid HTTP/1.1 request"))

    def _unsupported_upgrade_warning(self) -> None:
        """Says nothing: an offer may be ignored."""

    def _refuse(self, error: ApiError) -> None:
        """Answers, unless it is another request's turn, and closes the connection: what comes next cannot be read."""
        if self.transport.is_closing():
            return
        cycle = self._answering
        if cycle is None or cycle.response_complete or (cycle.more_body and not cycle.response_started):
            answer = error_response(error)
            request_id = f"req-{uuid.uuid4().hex}".encode()
            headers = [*answer.raw_headers, (b"x-request-id", request_id), (b"connection", b"close")]
            lines = [b"%s: %s\r\n" % header for header in headers]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()


async def _without_chunks(
    cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """Runs `app`. An answer of unknown length goes out as it is, and the end of the connection ends it."""

    has_length = True

    async def send_plain(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = None if has_length else False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))  # of this piece
        await send(message)

    await app(scope, receive, send_plain)
