"""m8/backpressure: the outputs of one request that its reader has not taken yet, kept as one output."""

import asyncio  # noqa: F401 - you will need them
import dataclasses  # noqa: F401

from folovllm.engine.output_collector import RequestOutputCollector as Reference
from folovllm.outputs import CompletionOutput, RequestOutput  # noqa: F401
from folovllm.sampling_params import RequestOutputKind


class RequestOutputCollector(Reference):
    def __init__(self, output_kind: RequestOutputKind) -> None:
        self.output_kind = output_kind  # RequestOutputKind.DELTA, CUMULATIVE or FINAL_ONLY

    def put(self, output: RequestOutput | Exception) -> None:
        """Takes an output or an exception for the reader. Returns at once."""
        raise NotImplementedError("m8/backpressure: put")

    async def get(self) -> RequestOutput:
        """Returns all that has come since the last call as one output. Waits for some, or raises the exception."""
        raise NotImplementedError("m8/backpressure: get")

    def get_nowait(self) -> RequestOutput | None:
        """Like `get`, but returns None if nothing has come."""
        raise NotImplementedError("m8/backpressure: get_nowait")
