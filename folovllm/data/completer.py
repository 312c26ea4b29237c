"""Completer: an engine in a Ray Data actor. It gets batches of rows and writes their answers.

Milestone: M10. vLLM counterpart: none; Ray has its own for vLLM, vLLMEngineStage in ray.data.llm.

Ray Data hands several batches at once to the actor, because `__call__` is asynchronous. All of their rows are requests
of the same engine, so the engine's batch stays full while the last rows of a batch are still being computed:

    batch 1   ##########          a row that ends makes room for the next one that waits,
    batch 2       ##########      whatever batch that one is in
    batch 3            ########

Row 5. torch is imported when the engine starts.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from folovllm.data.results import result_row, write_part, write_rejected
from folovllm.data.rows import BadRow, Columns, RowId, is_conversation, parse_line, row_id, row_params, row_prompt
from folovllm.engine.core_client import EngineDeadError

if TYPE_CHECKING:
    from folovllm.engine.async_llm import AsyncLLM


@dataclass(frozen=True)
class Job:
    """What a Completer is made with."""

    output: Path
    engine_args: Mapping[str, Any]
    preset: str | None
    without: tuple[str, ...]
    sampling: Mapping[str, Any]
    columns: Columns
    id_kind: type
    is_lines: bool
    seed: int
    written: frozenset[RowId]


@dataclass
class Counts:
    """What became of the rows of a batch."""

    completed: int = 0
    failed: int = 0  # a row with an id whose prompt is bad; it has a row in the results
    rejected: int = 0  # a row without a usable id
    skipped: int = 0  # its id was in the results before


class Starts:
    """An actor that counts the starts of engines in a run. Ray starts an actor again whenever its process has died."""

    def __init__(self, limit: int) -> None:
        self._limit, self._count = limit, 0

    def may_start(self) -> bool:
        self._count += 1
        return self._count <= self._limit


class Completer:
    """The class for `map_batches`. A batch in is a pyarrow table, a batch out is one row with its counts."""

    def __init__(self, job: Job, starts: Any) -> None:
        self._job, self._starts = job, starts
        self._engine: AsyncLLM | None = None
        self._starting = asyncio.Lock()

    async def __call__(self, batch: Any) -> AsyncIterator[dict[str, list[int]]]:
        engine = await self._start()
        counts, rejected = Counts(), list[dict[str, Any]]()
        tasks = [asyncio.create_task(self._complete(engine, row, counts, rejected)) for row in batch.to_pylist()]
        try:
            results = [result for result in await asyncio.gather(*tasks) if result is not None]
        finally:
            for task in tasks:
                task.cancel()
        if results:
            await asyncio.to_thread(write_part, self._job.output, results, self._job.id_kind)
        if rejected:
            await asyncio.to_thread(write_rejected, self._job.output, rejected)
        yield {name: [value] for name, value in vars(counts).items()}

    async def _start(self) -> "AsyncLLM":
        """The engine, which the first batch starts: it belongs to the event loop that runs `__call__`."""
        from folovllm.entrypoints.start import start_async_llm

        async with self._starting:
            if self._engine is None:
                if not await self._starts.may_start.remote():
                    raise RuntimeError("the processes of the engines die again and again: the log of Ray says why")
                job = self._job
                self._engine = await start_async_llm(
                    preset=job.preset, without=job.without, in_process=False, **job.engine_args
                )
            return self._engine

    async def _complete(
        self, engine: "AsyncLLM", row: dict[str, Any], counts: Counts, rejected: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """The result of one row, or None if it has one already or is rejected. Raises only if the engine is dead."""
        try:
            parsed = parse_line(row["text"]) if self._job.is_lines else row
            identity = row_id(parsed, self._job.columns, self._job.id_kind)
        except BadRow as error:
            counts.rejected += 1
            rejected.append({"row": row, "error": str(error)})
            return None
        if identity in self._job.written:
            counts.skipped += 1
            return None
        try:
            result = await self._answer(engine, parsed, identity)
            counts.completed += 1
            return result
        except EngineDeadError:
            raise
        except (ValueError, RuntimeError) as error:  # a bad row, or a request that failed alone
            counts.failed += 1
            return result_row(identity, error=str(error))

    async def _answer(self, engine: "AsyncLLM", row: dict[str, Any], identity: RowId) -> dict[str, Any]:
        prompt: Any = row_prompt(row, self._job.columns)
        params = row_params(row, {**engine.sampling_defaults, **self._job.sampling}, identity, self._job.seed)
        if is_conversation(prompt):
            prompt = await engine.render_chat(prompt)
        request_id = f"{type(identity).__name__}:{identity}"
        async with await engine.add_request(request_id, prompt, params) as stream:
            final = [output async for output in stream][-1]
        answer = final.outputs[0]
        assert answer.finish_reason is not None
        return result_row(identity, answer.text, answer.token_ids, len(final.prompt_token_ids), answer.finish_reason)
