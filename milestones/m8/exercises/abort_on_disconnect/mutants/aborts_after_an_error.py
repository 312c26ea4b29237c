# killed-by: an_error_of_the_engine_ends_the_stream | abort was called with ['a']
"""An error of the engine is treated like a reader that leaves, and aborts a request that is gone.

If the engine is dead, the abort raises a second error, and the client sees that one instead of the cause.
"""

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
        except BaseException:
            await self.aclose()
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
