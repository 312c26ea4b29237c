"""RequestOutputCollector: between the engine, which never waits, and a reader, who may be slow.

Milestone: M8. vLLM counterpart: `RequestOutputCollector` in vllm/v1/engine/output_processor.py.

A queue of outputs would grow as long as its reader sleeps. The collector holds one output at most: what the reader has
not taken is merged with what comes next, so its memory is bounded by the answer. This is the part
engine.output_collector.

Row 3, but without torch: the front end's process does not import it.
"""

import asyncio
import dataclasses

from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind


class RequestOutputCollector:
    """Takes the outputs of one request, and hands them to one reader. Both live on the same event loop."""

    def __init__(self, output_kind: RequestOutputKind) -> None:
        self._merge_completions = append_delta if output_kind is RequestOutputKind.DELTA else take_newer
        self._output: RequestOutput | None = None
        self._error: Exception | None = None
        self._is_filled = asyncio.Event()

    def put(self, output: RequestOutput | Exception) -> None:
        """Hands an output to the reader without waiting. An exception is the last thing that the reader gets."""
        if isinstance(output, Exception):
            self._error = output
        elif self._output is None:
            self._output = output
        else:
            self._output = self._merge(self._output, output)
        self._is_filled.set()

    async def get(self) -> RequestOutput:
        """Returns what has come since the last call, as one output. Waits if that is nothing.

        Raises an exception that was put, once all that came before it has been taken.
        """
        while (output := self.get_nowait()) is None:
            await self._is_filled.wait()
        return output

    def get_nowait(self) -> RequestOutput | None:
        """Like `get`, and returns None instead of waiting."""
        output, self._output = self._output, None
        if output is None and self._error is not None:
            raise self._error  # again and again: a reader that asks once more must not wait forever
        if self._error is None:
            self._is_filled.clear()
        return output

    def _merge(self, older: RequestOutput, newer: RequestOutput) -> RequestOutput:
        """One output that says what both say. Neither is changed: others may hold them as well."""
        completions = {completion.index: completion for completion in older.outputs}
        for completion in newer.outputs:
            before = completions.get(completion.index)
            completions[completion.index] = (
                completion if before is None else self._merge_completions(before, completion)
            )
        return dataclasses.replace(
            newer,
            outputs=list(completions.values()),
            finished=older.finished or newer.finished,
            prompt_logprobs=older.prompt_logprobs if newer.prompt_logprobs is None else newer.prompt_logprobs,
        )


def take_newer(older: CompletionOutput, newer: CompletionOutput) -> CompletionOutput:
    """CUMULATIVE: the newer output of a completion says all that the older one says."""
    return newer


def append_delta(older: CompletionOutput, newer: CompletionOutput) -> CompletionOutput:
    """DELTA: the texts, the token ids and the logprobs follow each other. The rest is the newer one's."""
    logprobs = newer.logprobs if older.logprobs is None else older.logprobs + (newer.logprobs or [])
    return dataclasses.replace(
        newer, text=older.text + newer.text, token_ids=older.token_ids + newer.token_ids, logprobs=logprobs
    )
