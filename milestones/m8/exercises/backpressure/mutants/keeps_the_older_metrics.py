# killed-by: the_rest_is_the_newest | expected those of the newer
"""The merged output is a copy of the older one with more text in it, so everything else is out of date.

Usage and metrics of a slow reader then lag behind, and the number of cached tokens is missing.
"""

import asyncio
import dataclasses

from folovllm.engine.output_collector import RequestOutputCollector as Reference
from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind


class RequestOutputCollector(Reference):
    def __init__(self, output_kind: RequestOutputKind) -> None:
        self.adds_up = output_kind is RequestOutputKind.DELTA
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self.ready = asyncio.Event()

    def put(self, output: RequestOutput | Exception) -> None:
        if isinstance(output, Exception):
            self.error = output
        elif self.output is None:
            self.output = output
        else:
            self.output = self.merged(self.output, output)
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

    def merged(self, old: RequestOutput, new: RequestOutput) -> RequestOutput:
        completions = {c.index: c for c in old.outputs}
        for c in new.outputs:
            joins = self.adds_up and c.index in completions
            completions[c.index] = self.joined(completions[c.index], c) if joins else c
        return dataclasses.replace(
            old,
            outputs=list(completions.values()),
            finished=old.finished or new.finished,
            prompt_logprobs=new.prompt_logprobs or old.prompt_logprobs,
        )

    def joined(self, old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
        logprobs = None if old.logprobs is None else old.logprobs + (new.logprobs or [])
        return dataclasses.replace(
            new, text=old.text + new.text, token_ids=old.token_ids + new.token_ids, logprobs=logprobs
        )
