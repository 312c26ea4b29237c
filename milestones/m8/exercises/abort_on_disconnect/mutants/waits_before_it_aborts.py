# killed-by: leaving_waits_for_nothing | before the request is aborted
"""aclose gives other tasks a turn before it aborts.

If the task is cancelled a second time meanwhile, as a server does that shuts down, the abort never happens.
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
            raise
        except Exception:
            self.is_over = True
            raise
        self.is_over = output.finished
        return output

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        if not self.is_over:
            self.is_over = True
            self.abort(self.request_id)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
