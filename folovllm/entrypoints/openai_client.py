"""OpenAIClient: a small asynchronous client for any server with OpenAI's API: ours, vLLM's, llama.cpp's, OpenAI's own.

Milestone: M8. vLLM counterpart: none; its commands in vllm/entrypoints/cli/openai.py use the package `openai`.
Left out: everything but posting a JSON body and reading the answer, whole or as a stream.

All errors are ServerErrors, whose message says what to do. Leaving a stream early closes its connection, and the server
then aborts the request.
"""

import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

try:
    import aiohttp
except ImportError:
    raise ValueError("to talk to a server, install the packages of the server: pip install 'folovllm[serve]'") from None

from folovllm.entrypoints.openai.sse import DONE, EventStream

Body = dict[str, Any]
CONNECT_SECONDS = 10.0
LONGEST_ERROR = 300  # characters of a body that is not OpenAI's JSON, e.g. a proxy's HTML page
_BROKEN = (aiohttp.ClientError, ConnectionError, TimeoutError)


class ServerError(ValueError):
    """What went wrong at the server, or on the way. `status` is the HTTP status; None without an answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """A whole answer. `body` is its JSON, or its text if it is none."""

    status: int
    body: Any
    headers: Mapping[str, str]


class OpenAIClient:
    """Use it as `async with OpenAIClient("http://127.0.0.1:8000") as client`. The URL may end with /v1 or not."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.base_url = base_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # An answer may take as long as it takes; the user's Ctrl-C ends it.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        # As many connections as there are requests, each for one of them: a server closes idle connections after a few
        # seconds, and a request on one that it is just closing is lost.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=timeout, connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def models(self) -> list[Body]:
        """The cards of the served models. `id` is the name that requests use; vLLM and we add `max_model_len`."""
        answer = await self.get("/models")
        cards = answer.body.get("data") if isinstance(answer.body, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
            raise ServerError(f"{self.base_url}/models is no list of models: is {self.base_url} an OpenAI API?")
        return cards

    async def model_card(self, name: str | None = None) -> Body:
        """The card of the model `name`, or of the one that the server shows first."""
        try:
            cards = await self.models()
        except ServerError as error:
            if name is None or error.status in (None, 401, 403):
                raise
            return {"id": name}  # a server without /v1/models; it will say whether it knows the name
        found = [card for card in cards if name in (None, card["id"])]
        if not found:
            names = ", ".join(repr(card["id"]) for card in cards)
            raise ServerError(f"{self.base_url} has no model {name!r}; it serves {names or 'none'}")
        return found[0]

    async def get(self, path: str) -> Answer:
        """Raises ServerError if the status is not 2xx."""
        return self._checked(await self.send("GET", path))

    async def post(self, path: str, body: Body) -> Answer:
        """Raises ServerError if the status is not 2xx."""
        return self._checked(await self.send("POST", path, body))

    async def count_tokens(self, model: str, messages: Sequence[Body]) -> int | None:
        """Returns the length of a conversation's prompt, or None if the server has no /tokenize (OpenAI has none)."""
        root = self.base_url.rpartition("/")[0]
        answer = await self._send("POST", f"{root}/tokenize", {"model": model, "messages": list(messages)})
        count = answer.body.get("count") if isinstance(answer.body, dict) else None
        return count if isinstance(count, int) else None

    async def send(self, method: str, path: str, body: Body | None = None) -> Answer:
        """Sends a request, and returns the answer whatever its status. `path` comes after /v1, e.g. /models."""
        return await self._send(method, self.base_url + path, body)

    async def _send(self, method: str, url: str, body: Body | None) -> Answer:
        try:
            async with self._open.request(method, url, json=body) as response:
                return Answer(response.status, read_json(await response.read()), response.headers)
        except _BROKEN as error:
            self._explain(error)

    async def stream(self, path: str, body: Body) -> AsyncGenerator[Body, None]:
        """Yields the JSON of each event of a streamed answer.

        Raises ServerError if the server answers with an error, sends one as an event, or stops in mid-answer.
        """
        events, is_done = EventStream(), False
        try:
            async with self._open.post(self.base_url + path, json={**body, "stream": True}) as response:
                if not response.ok:
                    self._checked(Answer(response.status, read_json(await response.read()), response.headers))
                async for chunk in response.content.iter_any():
                    for data in events.feed(chunk):
                        if data == DONE:
                            return
                        event = read_json(data.encode())
                        if not isinstance(event, dict) or event.get("error"):
                            raise ServerError(f"the server ended the answer: {error_text(event)}")
                        is_done = is_done or _is_last(event)
                        yield event
        except _BROKEN as error:
            self._explain(error)
        if not is_done:  # some servers leave [DONE] out, but each says why an answer ended
            raise ServerError(f"the answer of {self.base_url} broke off: the server or the connection has ended")

    def stream_chat(self, model: str, messages: Sequence[Body], **fields: Any) -> AsyncGenerator[Body, None]:
        return self.stream("/chat/completions", {"model": model, "messages": list(messages), **fields})

    def stream_completion(self, model: str, prompt: str | list[int], **fields: Any) -> AsyncGenerator[Body, None]:
        return self.stream("/completions", {"model": model, "prompt": prompt, **fields})

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use the client in `async with`"
        return self._session

    def _checked(self, answer: Answer) -> Answer:
        if 200 <= answer.status < 300:
            return answer
        hint = ""
        if answer.status == 401:
            hint = "; pass the server's key with --api-key"
        elif answer.status == 404 and not _is_error_json(answer.body):
            hint = f"; is {self.base_url} the address of an OpenAI API?"
        raise ServerError(f"the server answered {answer.status}: {error_text(answer.body)}{hint}", answer.status)

    def _explain(self, error: Exception) -> NoReturn:
        """Raises a ServerError that says what to do about a connection that could not be opened, or broke."""
        if isinstance(error, aiohttp.ClientConnectorError | TimeoutError):
            reason = getattr(getattr(error, "os_error", None), "strerror", None) or "no answer in time"
            raise ServerError(
                f"no server at {self.base_url} ({reason}): start one with `folovllm serve`, or correct the URL"
            ) from None
        raise ServerError(f"the connection to {self.base_url} broke: {error or type(error).__name__}") from None


def base_url(url: str) -> str:
    """Returns the URL that ends with /v1, e.g. http://localhost:8000/v1 for localhost:8000/. Raises ValueError."""
    text = url.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # e.g. the port is no number
        is_good = False
    if not is_good or parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not the URL of a server; write e.g. http://127.0.0.1:8000")
    return text if re.search(r"/v\d+$", parts.path) else f"{text}/v1"


def read_json(data: bytes) -> Any:
    """The JSON of a body, or its text if it is none."""
    text = data.decode("utf-8", errors="replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def error_text(body: Any) -> str:
    """The message of an error's body, in any of the forms that servers use: OpenAI's, FastAPI's, or plain text."""
    while isinstance(body, dict):
        inner = next((body[key] for key in ("error", "message", "detail") if body.get(key)), None)
        if inner is None:
            break
        body = inner
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}..."


def _is_error_json(body: Any) -> bool:
    return isinstance(body, dict) and isinstance(body.get("error"), dict)


def _is_last(event: Body) -> bool:
    choices = event.get("choices")
    return isinstance(choices, list) and any(isinstance(c, dict) and c.get("finish_reason") for c in choices)
