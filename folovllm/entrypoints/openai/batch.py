"""A batch: requests in a file, one JSON object per line, and an answer per line. The format is OpenAI's and vLLM's.

Milestone: M8. vLLM counterpart: vllm/entrypoints/openai/run_batch.py. Left out: embeddings, scores, audio.

    input   {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello"}}
    output  {"id": "batch-1f", "custom_id": "a", "error": null,
             "response": {"status_code": 200, "request_id": "req-2c", "body": {"choices": [...], ...}}}

Every line is answered, in the order in which answers come. An answer is written as soon as it is there, so a run that
is interrupted keeps what it has. If a request fails, `error` holds OpenAI's error object. `response.body` is what the
server answered in either case.
"""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from folovllm.entrypoints.openai.errors import ApiError, error_body
from folovllm.entrypoints.openai_client import Answer, ServerError, error_text

logger = logging.getLogger(__name__)

Body = dict[str, Any]
Send = Callable[[str, Body], Awaitable[Answer]]  # url, body -> answer
URLS = ("/v1/completions", "/v1/chat/completions")
_SURROGATE = re.compile("[\ud800-\udfff]")
BUSY = (429, 503)  # the server asks to come again later
MAX_TRIES, LONGEST_WAIT = 600, 30.0  # of a request that a busy server refuses; seconds between two tries


class BadLine(ValueError):
    """A line of the input that is no request."""


@dataclass(frozen=True)
class BatchItem:
    """A line of the input: a request, or (`problem`) why it is none."""

    number: int  # of the line, from 1
    custom_id: str | None
    url: str = ""
    body: Body = field(default_factory=dict)
    problem: str | None = None


@dataclass
class Summary:
    """How a run went."""

    num_items: int
    num_answered: int = 0
    num_failed: int = 0  # of them


def read_batch(lines: Sequence[str]) -> list[BatchItem]:
    """The requests of a file's lines; blank lines are skipped. A custom_id that a line before has is a problem."""
    items: list[BatchItem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        item = _read_line(number, line)
        first = number if item.custom_id is None else seen.setdefault(item.custom_id, number)
        if first != number and item.problem is None:
            problem = f"custom_id {item.custom_id!r} is that of line {first}, too: give every request its own"
            item = BatchItem(number, item.custom_id, problem=problem)
        items.append(item)
    return items


def _read_line(number: int, line: str) -> BatchItem:
    custom_id = None
    try:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadLine(f"no JSON: {error}") from None
        if not isinstance(request, dict):
            raise BadLine("no JSON object with custom_id, method, url and body")
        custom_id = request.get("custom_id")
        if not isinstance(custom_id, str):
            custom_id = None
            raise BadLine('custom_id must be a string, as in {"custom_id": "a", "method": "POST", ...}')
        return BatchItem(number, custom_id, *_checked(request))
    except BadLine as error:
        return BatchItem(number, custom_id, problem=str(error))


def _checked(request: Body) -> tuple[str, Body]:
    """The url and the body of a request. Raises BadLine."""
    method, url, body = request.get("method"), request.get("url"), request.get("body")
    if method != "POST":
        raise BadLine(f'method must be "POST", got {method!r}')
    if url not in URLS:
        raise BadLine(f"url must be {' or '.join(URLS)}, got {url!r}")
    if not isinstance(body, dict):
        raise BadLine(f"body must be a JSON object, got {type(body).__name__}")
    if body.get("stream"):
        raise BadLine('a batch is not streamed: leave "stream" out')
    return url, body


async def answer_all(
    items: Sequence[BatchItem],
    send: Send,
    write: Callable[[str], None],
    num_at_once: int,
    summary: Summary,
    on_answer: Callable[[], object] = lambda: None,
) -> None:
    """Answers all items, up to `num_at_once` at a time. `write` gets each answer as a line; `summary` counts them."""
    waiting = iter(items)
    tasks = [asyncio.create_task(_work(waiting, send, write, summary, on_answer)) for _ in range(num_at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _work(
    waiting: Iterator[BatchItem],
    send: Send,
    write: Callable[[str], None],
    summary: Summary,
    on_answer: Callable[[], object],
) -> None:
    """Answers one item after another. All workers take from the same iterator."""
    for item in waiting:
        answer = await _answer(item, send)
        write(_to_text(answer))
        summary.num_answered += 1
        summary.num_failed += answer["error"] is not None
        on_answer()


def _to_text(answer: Body) -> str:
    """The answer on one line. Half of a surrogate pair, which a custom_id may hold, can only be written escaped."""
    line = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return line if line.isascii() or not _SURROGATE.search(line) else json.dumps(answer, separators=(",", ":"))


async def _answer(item: BatchItem, send: Send) -> Body:
    """The output line of one item, whatever happens to it."""
    if item.problem is not None:
        return _line(item, _error(400, f"line {item.number}: {item.problem}"))
    try:
        return _line(item, await _send_when_free(item, send))
    except ServerError as error:
        return _line(item, _error(503, str(error)))
    except Exception:
        logger.exception("the request of line %d failed", item.number)
        return _line(item, _error(500, "internal error: the log has the cause"))


def _error(status: int, message: str) -> Answer:
    return Answer(status, error_body(ApiError(status, message)), {})


async def _send_when_free(item: BatchItem, send: Send) -> Answer:
    """Sends a request, and again after a while as long as the server is busy."""
    for _ in range(MAX_TRIES):
        answer = await send(item.url, item.body)
        wait = _retry_after(answer)
        if wait is None:
            break
        await asyncio.sleep(wait)
    return answer


def _retry_after(answer: Answer) -> float | None:
    """The seconds after which to try again, or None if the answer stands."""
    header = answer.headers.get("Retry-After", "")
    if answer.status not in BUSY or not header.isdecimal():
        return None
    return min(float(header), LONGEST_WAIT)


def _line(item: BatchItem, answer: Answer) -> Body:
    """The line for an answer. `error` is OpenAI's object, or made from what a server said instead."""
    error = None
    if not 200 <= answer.status < 300:
        error = answer.body.get("error") if isinstance(answer.body, dict) else None
        if not isinstance(error, dict):
            error = error_body(ApiError(answer.status, error_text(answer.body)))["error"]
    return {
        "id": f"batch-{uuid.uuid4().hex}",
        "custom_id": item.custom_id,
        "response": {
            "status_code": answer.status,
            "request_id": answer.headers.get("X-Request-Id") or f"req-{uuid.uuid4().hex}",
            "body": answer.body,
        },
        "error": error,
    }
