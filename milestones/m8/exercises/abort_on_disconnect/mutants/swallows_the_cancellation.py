# killed-by: a_cancelled_reader_leaves | CancelledError was swallowed
"""The request is aborted, and the cancellation ends here: the loop of the reader just stops.

CPython issue 86296 is about the same harm in asyncio itself: a task that was cancelled went on.
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
        self.is_over = False

    async def __anext__(self) -> RequestOutput:
        if self.is_over:
            raise StopAsyncIteration
        try:
            output = await self.collector.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise StopAsyncIteration from None
        except Exception:
            self.is_over = True
            raise
        self.is_over = output.finished
        return output

    async def aclose(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.abort(self.request_id)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
