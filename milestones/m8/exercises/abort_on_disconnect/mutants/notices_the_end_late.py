# killed-by: a_reader_may_leave_with_the_last_output | broke out of its loop at the last output
"""The stream is over when the reader asks for an output after the last one, and not when the last one is returned.

A reader that breaks out of its loop at `finished`, or whose last write fails, aborts a request that has finished.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType

from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.request_stream import RequestStream as Reference
from folovllm.outputs import RequestOutput


class RequestStream(Reference):
    def __init__(self, request_id: str, collector: RequestOutputCollector, abort: Callable[[str], None]) -> None:
        self.request_id, self.collector, self.abort = request_id, collector, abort
        self.is_over = self.was_last = False

    async def __anext__(self) -> RequestOutput:
        self.is_over = self.is_over or self.was_last
        if self.is_over:
            raise StopAsyncIteration
        try:
            output = await self.collector.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        except Exception:
            self.is_over = True
            raise
        self.was_last = output.finished
        return output

    async def aclose(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.abort(self.request_id)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
