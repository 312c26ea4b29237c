# killed-by: breaking_out_frees_the_blocks | abort was not called
"""Closing leaves a note, and the next call of __anext__ would abort. There is no next call.

Servers that ask `is_disconnected()` between two outputs have it: a client that leaves during a long prefill is
noticed after it, and one whose request waits in the queue is not noticed at all.
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
        self.is_over = self.left = False

    async def __anext__(self) -> RequestOutput:
        if self.is_over or self.left:
            if not self.is_over:
                self.abort(self.request_id)
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
        self.left = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
