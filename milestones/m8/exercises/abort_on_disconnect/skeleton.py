"""m8/abort_on_disconnect: the outputs of one request for one reader, who may leave at any moment."""

from collections.abc import Callable
from types import TracebackType

from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.request_stream import RequestStream as Reference
from folovllm.outputs import RequestOutput


class RequestStream(Reference):
    """Inherited: `__aiter__` and `__aenter__`, which return the stream itself."""

    def __init__(self, request_id: str, collector: RequestOutputCollector, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.collector = collector
        self.abort = abort

    async def __anext__(self) -> RequestOutput:
        """Returns the next output, or raises StopAsyncIteration if the stream is over."""
        raise NotImplementedError("m8/abort_on_disconnect: __anext__")

    async def aclose(self) -> None:
        """Leaves the request: aborts it, unless there is nothing left to abort."""
        raise NotImplementedError("m8/abort_on_disconnect: aclose")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends an `async with`. `error` is what ended it, or None; if this returned True, it would be swallowed."""
        raise NotImplementedError("m8/abort_on_disconnect: __aexit__")
