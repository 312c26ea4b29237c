"""RequestStream: the outputs of one request, as an asynchronous iterator. Leaving it ends the request.

Milestone: M8. vLLM counterpart: the body of `AsyncLLM.generate` in vllm/v1/engine/async_llm.py.

A reader who goes away must not leave a request behind that computes tokens and holds blocks. There are three ways to
go: `aclose`, the end of an `async with`, and the cancellation of the task that waits for an output, which is how a
server hears of a client that has disconnected. Each aborts the request, once. This is the part engine.request_stream.

Row 3, but without torch: the front end's process does not import it.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.outputs import RequestOutput


class RequestStream:
    """Yields what the collector has, until the request has finished. `abort` ends a request of the engine by its id."""

    def __init__(self, request_id: str, collector: RequestOutputCollector, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._collector = collector
        self._abort = abort
        self._is_over = False  # the request has finished, has failed, or was left

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        try:
            output = await self._collector.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        except BaseException:  # the request or the engine failed: there is nothing left to abort
            self._is_over = True
            raise
        self._is_over = output.finished
        return output

    async def aclose(self) -> None:
        """Aborts the request if it has not finished. Calling it twice is fine."""
        if not self._is_over:
            self._is_over = True
            self._abort(self.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
