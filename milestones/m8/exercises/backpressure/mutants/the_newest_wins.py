# killed-by: deltas_are_put_together | must find everything
"""The newest output takes the place of the one that waits, as if every output said everything.

Right for cumulative outputs. Of deltas, a slow reader loses words in the middle of its text.
"""

import asyncio

from folovllm.engine.output_collector import RequestOutputCollector as Reference
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import RequestOutputKind


class RequestOutputCollector(Reference):
    def __init__(self, output_kind: RequestOutputKind) -> None:
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self.ready = asyncio.Event()

    def put(self, output: RequestOutput | Exception) -> None:
        if isinstance(output, Exception):
            self.error = output
        else:
            self.output = output
        self.ready.set()

    async def get(self) -> RequestOutput:
        while (output := self.get_nowait()) is None:
            await self.ready.wait()
        return output

    def get_nowait(self) -> RequestOutput | None:
        output, self.output = self.output, None
        if output is None and self.error is not None:
            raise self.error
        if self.error is None:
            self.ready.clear()
        return output
