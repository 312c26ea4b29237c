"""How an answer is written: as one JSON object, or as chunks of JSON in a stream of events.

Milestone: M8. vLLM counterpart: `model_dump_json` of the response classes, and StreamingResponse in
vllm/entrypoints/openai/api_server.py. vLLM makes a pydantic object per chunk. Here a chunk is a dict, and what all
chunks of a stream share is encoded once: the event loop writes a chunk per token of every stream, on the same
processors that compute the tokens.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from folovllm.entrypoints.openai.errors import as_api_error, error_body
from folovllm.entrypoints.openai.generation import Generation, unless_client_leaves
from folovllm.entrypoints.openai.prompts import TokenizedPrompt
from folovllm.entrypoints.openai.protocol import GenerationRequest
from folovllm.entrypoints.openai.sse import DONE
from folovllm.entrypoints.openai.state import ServerState
from folovllm.outputs import RequestOutput

Encode = Callable[[str], bytes]  # EventStream.encode
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dumps(content: Any) -> str:
    """JSON that has a UTF-8 form: half of a surrogate pair, which an answer may repeat, is written as its escape."""
    return _to_json(content).encode("utf-8", "backslashreplace").decode("utf-8")


def json_answer(content: dict[str, Any]) -> Response:
    return Response(dumps(content).encode(), media_type="application/json")


class Chunks:
    """Writes the chunks of one stream. `shared` are the fields that all of them begin with."""

    def __init__(self, shared: dict[str, Any], encode: Encode, include_usage: bool) -> None:
        self._head = dumps(shared)[:-1] + ',"choices":'
        self._encode = encode
        # OpenAI: if a stream ends with a chunk of usage, every other chunk has the field, too.
        self._rest: dict[str, Any] = {"usage": None} if include_usage else {}

    def write(self, choices: Sequence[dict[str, Any]], **more: Any) -> bytes:
        rest = {**self._rest, **more}
        tail = f",{dumps(rest)[1:]}" if rest else "}"
        return self._encode(f"{self._head}{dumps(choices)}{tail}")


class Usage:
    """Counts the tokens of one request. A prompt counts once, however many answers it gets."""

    def __init__(self, prompts: Sequence[TokenizedPrompt], num_choices: int) -> None:
        self._num_choices = num_choices
        self._prompt_tokens = [len(prompt.token_ids) for prompt in prompts]
        self._cached_tokens = [0] * len(prompts)
        self._completion_tokens = [0] * (len(prompts) * num_choices)

    def add(self, prompt_index: int, output: RequestOutput) -> None:
        """Counts the new tokens of an output: all that it has, or with DELTA what has come since the last one."""
        for completion in output.outputs:
            self._completion_tokens[prompt_index * self._num_choices + completion.index] += len(completion.token_ids)
        if output.num_cached_tokens is not None:
            self._cached_tokens[prompt_index] = output.num_cached_tokens

    def total(self) -> dict[str, Any]:
        usage = _usage(sum(self._prompt_tokens), sum(self._completion_tokens))
        return {**usage, "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)}}

    def so_far(self, choice_index: int) -> dict[str, Any]:
        """The usage of one choice, for `continuous_usage_stats`."""
        return _usage(self._prompt_tokens[choice_index // self._num_choices], self._completion_tokens[choice_index])


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


class Answer(Protocol):
    """What an API makes of the engine's outputs."""

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The body of an answer that is not streamed, from the last output of each prompt."""
        ...

    def chunks(self, outputs: AsyncIterator[tuple[int, RequestOutput]], encode: Encode) -> AsyncIterator[bytes]:
        """The events of a stream, except the last one. What an output holds is sent at once."""
        ...


async def respond(
    state: ServerState,
    body: GenerationRequest,
    raw_request: Request,
    start: Callable[[], Awaitable[tuple[Answer, Generation]]],
) -> Response:
    """Sends the answer that `start` begins, streamed or not. The generation ends with it, and if the client leaves."""
    if body.stream:
        answer, generation = await start()
        encode = state.event_stream.encode
        chunks = answer.chunks(generation.outputs(), encode)
        return EventStreamResponse(generation, chunks, encode, raw_request.state.request_id)

    async def run() -> Response:
        answer, generation = await start()
        async with generation:
            return json_answer(answer.whole(await generation.results()))

    return await unless_client_leaves(raw_request, run())


def includes_usage(body: GenerationRequest) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def includes_continuous_usage(body: GenerationRequest) -> bool:
    return includes_usage(body) and bool(body.stream_options and body.stream_options.continuous_usage_stats)


class GenerationStream(StreamingResponse):
    """Streams `events` while the generation runs.

    If the client leaves, StreamingResponse cancels the sending, wherever it is. What remains in the engine is aborted
    then, and on every other way out.
    """

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must pass on each event at once
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.aclose()


class EventStreamResponse(GenerationStream):
    """Streams `chunks`, then [DONE]. An error becomes one event before it, as the status 200 has been sent."""

    def __init__(self, generation: Generation, chunks: AsyncIterator[bytes], encode: Encode, request_id: str) -> None:
        super().__init__(generation, _until_done(chunks, encode, request_id))


async def _until_done(chunks: AsyncIterator[bytes], encode: Encode, request_id: str) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:
        yield encode(dumps(error_body(as_api_error(error, request_id))))
    yield encode(DONE)
