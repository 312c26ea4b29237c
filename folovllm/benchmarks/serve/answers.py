"""From what the client stamped to what the user saw: one Answer per request, with the latencies of that request.

Milestone: M8. vLLM counterpart: `RequestFuncOutput` in vllm/benchmarks/lib/endpoint_request_func.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from folovllm.benchmarks.serve.load import Exchange
from folovllm.benchmarks.serve.traffic import ServeRequest
from folovllm.entrypoints.openai.sse import DONE, EventStream
from folovllm.entrypoints.openai_client import error_text, read_json

FAILED_REASONS = ("abort", "error")  # finish reasons of an answer that the server gave up


@dataclass
class Answer:
    """What one request brought. Moments are seconds since the start of the run; `error` is why it failed, or None."""

    sent: float
    ended: float
    error: str | None = None
    token_times: list[float] = field(default_factory=list)  # of each chunk that brought text or a token
    last_choice: float | None = None  # of the last chunk of the answer itself: a usage chunk and [DONE] come later
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token: from the send to the first chunk that brings text or a token.

        A chunk without either, such as a chat's first one with the role, is no token. The time includes the connection,
        the queue of the server and the prompt.
        """
        return self.token_times[0] - self.sent if self.token_times else None

    @property
    def e2e_latency(self) -> float | None:
        """From the send to the chunk that ended the answer."""
        return None if self.last_choice is None else self.last_choice - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token: what follows the first token, over the number of tokens that follow it.

        It counts tokens and not chunks, since a server may put several tokens into one chunk. None for one token.
        """
        if self.ttft is None or self.e2e_latency is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.e2e_latency - self.ttft) / (self.output_tokens - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """The gap before every chunk but the first. A chunk of several tokens is one gap: a reader sees it so."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


def read_answer(seen: Exchange, request: ServeRequest) -> Answer:
    """Parse an exchange. An answer that is not complete is failed, and its `error` says how."""
    answer = Answer(seen.sent, seen.ended, prompt_tokens=request.prompt_len)
    if seen.status is not None and seen.status != 200:
        body = read_json(b"".join(chunk for _, chunk in seen.chunks))
        answer.error = f"HTTP {seen.status}: {error_text(body) or 'an empty body'}"
        return answer
    is_done, num_token_ids = False, 0
    for moment, data in _events(seen):
        if data == DONE:
            is_done = True
            continue
        try:
            num_token_ids += _read_chunk(answer, moment, json.loads(data))
        except (ValueError, TypeError, AttributeError):
            answer.error = f"not a chunk of a completion: {error_text(data)}"
    is_done = is_done or answer.finish_reason is not None  # some servers leave [DONE] out
    answer.error = answer.error or seen.error or (None if is_done else "the stream ended in mid-answer")
    if answer.output_tokens is None and num_token_ids:
        answer.output_tokens = num_token_ids
    elif answer.output_tokens is None and answer.finish_reason == "length":
        answer.output_tokens = request.output_len  # that is what "length" means: all tokens that were asked for
    return answer


def _events(seen: Exchange) -> Iterator[tuple[float, str]]:
    """The events of a stream, each with the moment at which its last byte came."""
    stream = EventStream()
    for moment, chunk in seen.chunks:
        for data in stream.feed(chunk):
            yield moment, data


def _read_chunk(answer: Answer, moment: float, chunk: dict[str, Any]) -> int:
    """Add a chunk to the answer; the number of token ids in it, which few servers send."""
    if chunk.get("error"):
        answer.error = f"error in the stream: {error_text(chunk)}"
    if usage := chunk.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
        answer.output_tokens = usage.get("completion_tokens", answer.output_tokens)
    num_token_ids = 0
    for choice in chunk.get("choices") or ():
        answer.last_choice = moment
        token_ids = choice.get("token_ids") or ()
        num_token_ids += len(token_ids)
        if choice.get("text") or (choice.get("delta") or {}).get("content") or token_ids:
            answer.token_times.append(moment)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if answer.finish_reason in FAILED_REASONS:
        answer.error = f"the server ended it: finish_reason {answer.finish_reason!r}"
    return num_token_ids
