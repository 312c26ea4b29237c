"""AsyncLLM: the engine behind a server. Many requests at once on one event loop, each with a stream of its own.

Milestone: M8. vLLM counterpart: vllm/v1/engine/async_llm.py.
Left out: LoRA, pooling, profiling, sleep mode, data parallelism.

    prompt --InputProcessor--> Request --AddRequests--> EngineCoreLoop (a process or a thread), one step after another
    RequestStream <--RequestOutputCollector <--OutputProcessor <--StepOutputs

This is LLMEngine cut in two: the front half (text, streams) runs here, the core runs elsewhere. A step never holds up
the event loop, and a slow reader or a long text never holds up a step. All methods belong to the thread of the event
loop. Row 3, but without torch: a test checks that the front end's process does not import it.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.engine.core_client import CoreClient, EngineDeadError, ProcessCoreClient, ThreadCoreClient
from folovllm.engine.input_processor import InputProcessor, Prompt
from folovllm.engine.messages import (
    AbortRequests,
    AddRequests,
    Call,
    CallResult,
    Dead,
    Ready,
    StepOutputs,
    UpMessage,
)
from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.output_processor import OutputProcessor, ProcessedOutputs
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.engine.request_stream import RequestStream
from folovllm.engine.start_core import ExecutorFactory
from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import EngineCoreOutput, EngineStats, RequestOutput
from folovllm.parts import load_part
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
T = TypeVar("T")

LONG_TEXT = 4_000  # characters; a shorter text is encoded in about a millisecond, on the event loop
TEXT_THREADS = 2
MAX_UNREAD_RECORDS = 1_000  # of one reader of the live trace


class RequestFailedError(RuntimeError):
    """This request failed inside the engine. Others go on."""


class EngineClosingError(RuntimeError):
    """The engine finishes what it has, and takes no new requests."""


class EngineObserver(Protocol):
    """What wants to know of every step: the metrics."""

    def on_step(self, stats: EngineStats, outputs: list[RequestOutput]) -> None:
        """A step, or an abort, has given `outputs`."""

    def on_dead(self, cause: str) -> None:
        """The engine has died."""


class AsyncLLM:
    """An engine for many concurrent callers. Make it with `await start(...)`, or by a model's name with
    `await folovllm.start_async_llm("smollm2-135m")`.

    `config` is the resolved one, `description` says what runs, `stats` is the latest snapshot of the engine.
    """

    def __init__(
        self,
        client: CoreClient,
        ready: Ready,
        tokenizer: Tokenizer | None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.config: EngineConfig = ready.config
        self.kv_cache_config: KVCacheConfig = ready.kv_cache_config
        self.description = ready.description
        self.tokenizer = tokenizer
        self.sampling_defaults = dict(sampling_defaults or {})
        self.stats = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)
        self.dead_error: EngineDeadError | None = None
        self.input_processor = InputProcessor.from_config(self.config, tokenizer)
        parts = self.config.parts
        self.output_processor = OutputProcessor(tokenizer, text_stream=load_part("engine.text_stream", parts))
        self._make_collector: type[RequestOutputCollector] = load_part("engine.output_collector", parts)
        self._make_stream: type[RequestStream] = load_part("engine.request_stream", parts)
        self._collectors: dict[str, RequestOutputCollector] = {}  # of the unfinished requests
        self._leaving: set[str] = set()  # ended here; the core has not confirmed it yet
        self._observers: list[EngineObserver] = []
        self._watchers: list[Watcher] = []
        self._call_ids = itertools.count()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._text_threads = concurrent.futures.ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="folovllm-text")
        self._is_closing = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._client = client
        client.subscribe(self._receive)

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        model_path: Path,
        tokenizer: Tokenizer | None,
        *,
        in_process: bool = True,
        executor_factory: ExecutorFactory | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
    ) -> "AsyncLLM":
        """Starts the engine, in a process of its own or (`in_process=False`) in a thread, and waits until it is ready.

        Raises ValueError for a bad argument, EngineDeadError if the engine cannot be started. `executor_factory` takes
        the place of the model; `config` must then be resolved.
        """
        make_client = ProcessCoreClient if in_process else ThreadCoreClient
        client = make_client(config, model_path, executor_factory)
        ready = await client.start()
        try:
            return cls(client, ready, tokenizer, sampling_defaults)
        except BaseException:
            client.close()
            raise

    # ---- requests

    async def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        arrival_time: float | None = None,
    ) -> RequestStream:
        """Queues a request and returns the stream of its outputs.

        Raises ValueError, and queues nothing, if it is bad. With n > 1 it becomes n requests of the core.
        """
        arrival_time = time.monotonic() if arrival_time is None else arrival_time
        self._check_open()
        text = self.input_processor.prompt_text(prompt)
        if text is not None and _is_long(text) and self.tokenizer is not None:
            prompt = await self._encode_prompt(prompt, text)
            self._check_open()  # much may have happened meanwhile
        # Requests without a seed draw theirs here, in the order of their arrival.
        request = self.input_processor.process(request_id, prompt, params, arrival_time, priority)
        return self._queue(request, text)

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the outputs of one request. Leaving the loop, or cancelling the task, aborts it."""
        async with await self.add_request(request_id, prompt, sampling_params, priority=priority) as stream:
            async for output in stream:
                yield output

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """Ends requests now: their streams get what there is, with finish_reason "abort". Unknown ids are ignored."""
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        for request_id in ids:
            try:
                processed = self.output_processor.abort([request_id], time.monotonic())
                self.output_processor.commit()
                self._abort_in_core(processed.reqs_to_abort)
                self._deliver(processed.request_outputs)
            except Exception:
                self._fail(request_id)

    @property
    def num_unfinished(self) -> int:
        """How many requests are unfinished; one with n > 1 counts n times."""
        return self.output_processor.num_unfinished

    def _queue(self, request: Request, text: str | None) -> RequestStream:
        parent = ParentRequest(request) if request.sampling_params.n > 1 else None
        requests = [request] if parent is None else parent.children()
        for core_request in requests:
            if core_request.request_id in self._leaving:
                raise ValueError(f"request id {request.request_id!r} has just been aborted: give every request its own")
        try:
            for index, core_request in enumerate(requests):
                self.output_processor.add_request(core_request, text, parent, index)
            self._client.send(AddRequests(requests))
        except BaseException:
            self.output_processor.withdraw(requests)
            raise
        collector = self._make_collector(request.sampling_params.output_kind)
        self._collectors[request.request_id] = collector
        self._is_idle.clear()
        return self._make_stream(request.request_id, collector, self.abort)

    # ---- text

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. A long one is encoded in another thread. Raises ValueError without a tokenizer."""
        tokenizer = self._get_tokenizer()
        if not _is_long(text):
            return tokenizer.encode(text, add_special_tokens)
        return await self._in_text_thread(tokenizer.encode, text, add_special_tokens)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **chat_keywords: Any,
    ) -> dict[str, Any]:
        """The prompt for a conversation: see `Tokenizer.chat_prompt`. A long one is rendered in another thread."""
        render = functools.partial(
            self._get_tokenizer().chat_prompt, messages, chat_template, add_generation_prompt, **chat_keywords
        )
        return await self._in_text_thread(render) if len(str(messages)) > LONG_TEXT else render()

    async def _encode_prompt(self, prompt: Prompt, text: str) -> dict[str, Any]:
        self.input_processor.check_text(text)
        given = dict(prompt) if isinstance(prompt, dict) else {"prompt": prompt}
        if given.get("prompt_token_ids") is None:
            given["prompt_token_ids"] = await self.encode(text)
        return given

    def _get_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this engine has no tokenizer: start it without skip_tokenizer_init")
        return self.tokenizer

    async def _in_text_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._text_threads, function, *args)

    # ---- what the core sends

    def _receive(self, message: UpMessage) -> None:
        if isinstance(message, StepOutputs):
            self._on_step(message)
        elif isinstance(message, CallResult):
            self._on_call_result(message)
        elif isinstance(message, Dead):
            self._die(message.cause)

    def _on_step(self, message: StepOutputs) -> None:
        self.stats = message.stats
        processed = self._process([output for output in message.outputs if not self._has_left(output)])
        self._abort_in_core(processed.reqs_to_abort)  # a stop string ends a request that the core would continue
        self._deliver(processed.request_outputs)
        for watcher in self._watchers:
            watcher.put(message.records)

    def _has_left(self, output: EngineCoreOutput) -> bool:
        """Whether this output comes too late: the request has ended here. Its last one confirms that it is gone."""
        if output.request_id not in self._leaving:
            return False
        if output.finished:
            self._leaving.discard(output.request_id)
        return True

    def _process(self, outputs: list[EngineCoreOutput]) -> ProcessedOutputs:
        """What the outputs of a step mean to the users. A request whose output cannot be processed fails alone."""
        try:
            processed = self.output_processor.process_outputs(outputs, time.monotonic())
        except Exception:
            self.output_processor.take_back()
            return self._process_one_by_one(outputs)
        self.output_processor.commit()
        return processed

    def _process_one_by_one(self, outputs: list[EngineCoreOutput]) -> ProcessedOutputs:
        result = ProcessedOutputs()
        for output in outputs:
            try:
                processed = self.output_processor.process_outputs([output], time.monotonic())
                self.output_processor.commit()
                result.request_outputs += processed.request_outputs
                result.reqs_to_abort += processed.reqs_to_abort
            except Exception:
                logger.exception("an output of request %s cannot be processed", output.request_id)
                self.output_processor.take_back()
                state = self.output_processor.states[output.request_id]
                self._fail(state.request_id if state.parent is None else state.parent.request_id)
                if output.finished:
                    self._leaving.discard(output.request_id)
        return result

    def _abort_in_core(self, core_ids: list[str]) -> None:
        if core_ids:
            self._leaving.update(core_ids)
            self._client.send(AbortRequests(core_ids))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hands outputs to their streams. One that has failed in the core becomes an exception."""
        for output in outputs:
            collector = self._collectors.get(output.request_id)
            if any(completion.finish_reason == "error" for completion in output.outputs):
                self._fail(output.request_id)
            elif collector is not None:
                collector.put(output)
                if output.finished:
                    self._forget(output.request_id)
        for observer in self._observers:
            with _logged("a metrics observer raised"):
                observer.on_step(self.stats, outputs)

    def _fail(self, request_id: str) -> None:
        """Ends one request with a RequestFailedError; with n > 1, all its completions."""
        states = [self.output_processor.states[core_id] for core_id in self.output_processor.core_ids([request_id])]
        self.output_processor.withdraw([state.request for state in states])
        self._abort_in_core([state.request_id for state in states])
        collector = self._collectors.get(request_id)
        if collector is not None:
            collector.put(RequestFailedError(f"request {request_id!r} failed inside the engine; its log says why"))
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._collectors.pop(request_id, None)
        if not self._collectors:
            self._is_idle.set()

    # ---- calls of the core

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forgets all cached blocks. Returns False while requests run; `reset_running_requests` makes them restart."""
        return bool(await self._call("reset_prefix_cache", reset_running_requests))

    async def _call(self, name: str, *args: Any) -> Any:
        self.check_health()
        call_id, future = next(self._call_ids), asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._client.send(Call(call_id, name, args))
            return await future
        finally:
            self._calls.pop(call_id, None)

    def _on_call_result(self, result: CallResult) -> None:
        future = self._calls.get(result.call_id)
        if future is None or future.done():
            return
        if result.error is None:
            future.set_result(result.value)
        else:
            future.set_exception(RuntimeError(result.error))

    # ---- watching

    def add_observer(self, observer: EngineObserver) -> None:
        """From now on `observer` hears of every step."""
        self._observers.append(observer)

    async def watch(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yields the live trace: a header, then the record of each step. A new header means that it starts afresh.

        The engine makes records only while someone watches. A reader that falls far behind is dropped: its loop ends.
        """
        watcher = Watcher()
        self._watchers.append(watcher)
        try:
            await self._call("watch")
            while (record := await watcher.get()) is not None:
                yield record
        finally:
            self._watchers.remove(watcher)
            if not self._watchers and not self.is_dead:
                self._client.send(Call(next(self._call_ids), "unwatch"))

    # ---- the end

    @property
    def is_dead(self) -> bool:
        return self.dead_error is not None

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine is dead."""
        if self.dead_error is not None:
            raise EngineDeadError(str(self.dead_error))

    def _check_open(self) -> None:
        self.check_health()
        if self._is_closing:
            raise EngineClosingError("the engine is shutting down and takes no new requests")

    def _die(self, cause: str) -> None:
        """Tells everyone who waits that nothing more will come."""
        if self.dead_error is not None:
            return
        logger.error("the engine is dead: %s", cause)
        self.dead_error = EngineDeadError(cause)
        for collector in self._collectors.values():
            collector.put(EngineDeadError(cause))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(cause))
        for watcher in self._watchers:
            watcher.end()
        self.output_processor.withdraw([state.request for state in self.output_processor.states.values()])
        self._collectors.clear()
        self._leaving.clear()
        self._is_idle.set()
        for observer in self._observers:
            with _logged("a metrics observer raised"):
                observer.on_dead(cause)

    async def drain(self, timeout: float) -> int:
        """Takes no new requests, and waits up to `timeout` seconds for those that it has.

        The rest is aborted: their streams end with finish_reason "abort". Returns how many those were.
        """
        self._is_closing = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_idle.wait(), timeout)
        rest = list(self._collectors)
        self.abort(rest)
        return len(rest)

    async def shutdown(self) -> None:
        """Ends everything: unfinished requests are aborted, and the engine stops. Calling it twice is fine."""
        self._is_closing = True
        self.abort(list(self._collectors))
        for watcher in self._watchers:
            watcher.end()
        await asyncio.to_thread(self._client.close)
        self._text_threads.shutdown(wait=False, cancel_futures=True)
        for future in self._calls.values():
            future.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()


class Watcher:
    """One reader of the live trace. What it has not read yet is kept, up to a limit."""

    def __init__(self) -> None:
        self._records: deque[dict[str, Any] | None] = deque()  # None: the end
        self._has_header = False
        self._is_filled = asyncio.Event()

    def put(self, records: Iterable[dict[str, Any]]) -> None:
        """Takes records, from the first header on: those before it belong to a trace that this reader does not know."""
        for record in records:
            self._has_header = self._has_header or record.get("type") == "header"
            if self._has_header:
                self._records.append(record)
                self._is_filled.set()
        if len(self._records) > MAX_UNREAD_RECORDS:
            self._records.clear()
            self.end()

    def end(self) -> None:
        self._records.append(None)
        self._is_filled.set()

    async def get(self) -> dict[str, Any] | None:
        """The next record, or None at the end."""
        while not self._records:
            self._is_filled.clear()
            await self._is_filled.wait()
        return self._records.popleft()


def _is_long(text: str) -> bool:
    return isinstance(text, str) and len(text) > LONG_TEXT


@contextlib.contextmanager
def _logged(what: str) -> Any:
    """Logs an exception and goes on."""
    try:
        yield
    except Exception:
        logger.exception("%s", what)
