"""Generation: the prompts of one HTTP request in the engine. Whatever happens, none of them stays there.

Milestone: M8. vLLM counterpart: the middle of `create_completion` and `create_chat_completion`, merge_async_iterators
(vllm/utils), and `with_cancellation` (vllm/entrypoints/utils.py).
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi import Request
from fastapi.responses import Response

from folovllm.engine.request_stream import RequestStream
from folovllm.entrypoints.openai.errors import bad_request
from folovllm.entrypoints.openai.middleware import CLIENT_CLOSED_REQUEST, MAX_REQUEST_ID_LENGTH, is_request_id
from folovllm.entrypoints.openai.prompts import TokenizedPrompt
from folovllm.entrypoints.openai.protocol import GenerationRequest
from folovllm.entrypoints.openai.sampling import as_bad_request
from folovllm.entrypoints.openai.state import ServerState
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

T = TypeVar("T")
Outputs = asyncio.Queue[tuple[int, RequestOutput | Exception | None]]


class Generation:
    """One stream per prompt. `aclose`, or the end of an `async with`, aborts those that have not finished."""

    def __init__(self) -> None:
        self._streams: list[RequestStream] = []
        self._pumps: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        state: ServerState,
        body: GenerationRequest,
        request_id: str,
        prompts: Sequence[TokenizedPrompt],
        params: SamplingParams,
    ) -> Self:
        """Adds all prompts to the engine, or none: raises ApiError (400) if the engine refuses one."""
        _check_priority(state, body)
        engine_id = f"{request_id}-{uuid.uuid4().hex[:8]}"  # two clients may have chosen the same request id
        generation = cls()
        try:
            for index, prompt in enumerate(prompts):
                await asyncio.sleep(0)  # other streams have their turn between two prompts
                generation._streams.append(
                    await state.engine.add_request(
                        f"{engine_id}-{index}", prompt.for_engine(body.cache_salt), params, priority=body.priority or 0
                    )
                )
        except BaseException as error:
            await generation.aclose()
            if isinstance(error, ValueError):
                raise as_bad_request(error, body) from None
            raise
        if state.options.log_requests:
            lengths = ", ".join(str(len(prompt.token_ids)) for prompt in prompts)
            logger.info("%s: prompts of %s tokens, %s", engine_id, lengths, params)
        return generation

    async def results(self) -> list[RequestOutput]:
        """The last output of every prompt, in order. Raises what the engine raises for any of them."""
        return [[output async for output in stream][-1] for stream in self._streams]

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """The outputs of all prompts as they come, each with the number of its prompt."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield 0, output
            return
        # A queue of one: while the reader is slow, the streams collect what comes (see RequestOutputCollector).
        queue: Outputs = asyncio.Queue(maxsize=1)
        self._pumps = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(self._streams)]
        num_open = len(self._pumps)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item

    async def aclose(self) -> None:
        """Aborts what has not finished. Calling it twice is fine."""
        for pump in self._pumps:
            pump.cancel()
        for stream in self._streams:
            await stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


async def unless_client_leaves(raw_request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """Runs `work`, and cancels it if the client disconnects. An answer that is not streamed needs this: nothing is
    sent to the client, so no failure to send tells that it has gone.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(raw_request))
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def answer_id(prefix: str, body: GenerationRequest, raw_request: Request) -> str:
    """The id that an answer and all its chunks carry, e.g. "cmpl-4f1c...".

    As in vLLM, the client chooses it with the header X-Request-Id, or with the field `request_id`.
    """
    if body.request_id is not None and not is_request_id(body.request_id):
        raise bad_request(
            f"request_id must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters, got {body.request_id[:80]!r}",
            "request_id",
        )
    header = raw_request.headers.get("x-request-id", "")
    return f"{prefix}-{header if is_request_id(header) else body.request_id or uuid.uuid4().hex}"


def _check_priority(state: ServerState, body: GenerationRequest) -> None:
    if body.priority and state.engine.config.scheduler_config.scheduling_policy != "priority":
        raise bad_request(
            f"priority {body.priority} has no effect: the server was started without --scheduling-policy priority;"
            " leave it out",
            "priority",
        )


async def _pump(index: int, stream: RequestStream, queue: Outputs) -> None:
    """Moves the outputs of one stream into the queue, then None; or the exception that ends them."""
    try:
        async for output in stream:
            await queue.put((index, output))
        await queue.put((index, None))
    except Exception as error:
        await queue.put((index, error))


async def _disconnect(raw_request: Request) -> None:
    """Returns when the client has left. The body has been read, so no other message is of interest."""
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass
