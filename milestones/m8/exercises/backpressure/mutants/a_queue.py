# killed-by: deltas_are_put_together | must find everything
"""A queue: one output per get, however many wait.

vLLM had one queue per request until pull 12298 put bunched outputs together: fewer tasks and messages under load.
"""

import asyncio

from folovllm.engine.output_collector import RequestOutputCollector as Reference
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import RequestOutputKind


class RequestOutputCollector(Reference):
    def __init__(self, output_kind: RequestOutputKind) -> None:
        self.queue: list[RequestOutput] = []
        self.error: Exception | None = None
        self.ready = asyncio.Event()

    def put(self, output: RequestOutput | Exception) -> None:
        if isinstance(output, Exception):
            self.error = output
        else:
            self.queue.append(output)
        self.ready.set()

    async def get(self) -> RequestOutput:
        while (output := self.get_nowait()) is None:
            await self.ready.wait()
        return output

    def get_nowait(self) -> RequestOutput | None:
        output = self.queue.pop(0) if self.queue else None
        if output is None and self.error is not None:
            raise self.error
        if self.error is None and not self.queue:
            self.ready.clear()
        return output
